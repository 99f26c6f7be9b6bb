//! `preface decode`: explains header bytes field by field.

use std::fmt::{self, Write as _};
use std::io::{IsTerminal, Read, Write};
use std::path::Path;

use anyhow::{Context, bail};

use super::capture::{self, Payload};
use crate::proxy_protocol::explain::{explain, explain_error, explain_spp};
use crate::proxy_protocol::spp::{self, SppError};
use crate::proxy_protocol::{Decoded, Transport, decode};

/// Largest input.
const INPUT_BYTES_MAX: u64 = 256 << 20;

/// Explain the bytes of a PROXY header, v1, v2 or spp, field by field
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Examples:
  preface decode 0d0a0d0a000d0a515549540a2111000cc0a864c8c0a864c9d86f1f90
  preface decode 'PROXY TCP4 198.51.100.22 203.0.113.7 35646 80\\r\\n'
  tcpdump -i any -w - port 8080 | preface decode -")]
pub struct Args {
    /// Hex digits (spaces, colons, \x and 0x are fine), a v1 line, a file of raw bytes or hex, a pcap or pcapng capture
    /// (TCP and UDP), or - for standard input
    #[arg(value_name = "HEX or FILE or -")]
    pub input: Vec<String>,
}

/// Prints the explanation; an error if no valid header is in the input.
pub fn run(args: Args) -> anyhow::Result<()> {
    let text = explain_input(&read(&args.input)?)?;
    match std::io::stdout().write_all(text.as_bytes()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => Err(error.into()),
        _ => Ok(()),
    }
}

fn read(input: &[String]) -> anyhow::Result<Vec<u8>> {
    let limited = |reader: &mut dyn Read, name: &str| {
        let mut bytes = Vec::new();
        reader.take(INPUT_BYTES_MAX + 1).read_to_end(&mut bytes).with_context(|| format!("cannot read {name}"))?;
        match bytes.len() as u64 {
            0..=INPUT_BYTES_MAX => Ok(bytes),
            _ => bail!(
                "{name} has more than 256 MiB; cut the capture, for example with tcpdump -r FILE -c 1000 -w SHORTER"
            ),
        }
    };
    match input {
        [] if std::io::stdin().is_terminal() => {
            bail!("nothing to decode: give hex digits, a file, or - for standard input")
        }
        [] => limited(&mut std::io::stdin().lock(), "standard input"),
        [dash] if dash == "-" => limited(&mut std::io::stdin().lock(), "standard input"),
        [path] if Path::new(path).is_file() => {
            let mut file = std::fs::File::open(path).with_context(|| format!("cannot open {path}"))?;
            limited(&mut file, path)
        }
        words => {
            let text = words.join(" ");
            if text.starts_with("PROXY") {
                return Ok(text.replace("\\r", "\r").replace("\\n", "\n").into_bytes());
            }
            from_hex(text.as_bytes())
                .with_context(|| format!("{text:?} is neither a file nor an even number of hex digits"))
        }
    }
}

/// The bytes of a text of hex digits with the usual decoration; `None` if anything else is in it.
fn from_hex(text: &[u8]) -> Option<Vec<u8>> {
    let text = std::str::from_utf8(text).ok()?;
    let text = text.replace("\\x", " ").replace("0x", " ").replace("0X", " ");
    let digits: Vec<char> = text.chars().filter(|c| !c.is_ascii_whitespace() && !":,;|-".contains(*c)).collect();
    if digits.is_empty() || !digits.len().is_multiple_of(2) {
        return None;
    }
    let digit = |c: char| c.to_digit(16).and_then(|digit| u8::try_from(digit).ok());
    digits.chunks(2).map(|pair| Some(digit(pair[0])? << 4 | digit(pair[1])?)).collect()
}

/// Any input that `decode` takes, explained.
fn explain_input(bytes: &[u8]) -> anyhow::Result<String> {
    if bytes.is_empty() || bytes == b"\n" {
        bail!("no input came: give a file, hex digits or a line of v1, or write a capture or a header into the pipe");
    }
    if capture::is_capture(bytes) {
        return explain_capture(&capture::payloads(bytes)?);
    }
    match from_hex(bytes) {
        Some(bytes) => explain_datagram(&bytes),
        None => explain_datagram(bytes),
    }
}

/// What may also be Cloudflare's header, which only datagrams have.
fn explain_datagram(bytes: &[u8]) -> anyhow::Result<String> {
    match spp::decode(bytes) {
        Ok(spp) => {
            let (raw, payload) = bytes.split_at(spp::HEADER_BYTES);
            Ok(explain_spp(&spp, raw) + &following(raw.len(), payload.len()))
        }
        Err(error @ SppError::Short { .. }) => bail!("{error}; the datagram, or this copy of it, was cut"),
        Err(SppError::Magic) => explain_bytes(bytes),
    }
}

fn following(at: usize, len: usize) -> String {
    if len == 0 { String::new() } else { format!("{at:5}  bytes that follow the header: {len}\n") }
}

fn explain_bytes(bytes: &[u8]) -> anyhow::Result<String> {
    match decode(bytes) {
        Ok(Decoded::Complete { header, len }) => {
            Ok(explain(&header, &bytes[..len]) + &following(len, bytes.len() - len))
        }
        Ok(Decoded::Incomplete { needed }) => bail!(
            "the header is not complete: {} bytes are here and valid so far, at least {needed} more must follow; \
             if this is all that was sent, the sender is broken",
            bytes.len()
        ),
        Err(error) => bail!("{}", explain_error(&error, bytes).trim_end()),
    }
}

fn explain_capture(payloads: &[Payload]) -> anyhow::Result<String> {
    let (mut text, mut introduced, mut bare) = (String::new(), Counts::default(), Counts::default());
    for payload in payloads {
        let is_datagram = payload.transport == Transport::Dgram;
        let is_spp = is_datagram && spp::decode(&payload.bytes).is_ok();
        if !is_spp && matches!(decode(&payload.bytes), Err(error) if error.is_no_header()) {
            bare.add(payload.transport, 1 + payload.alike);
            continue;
        }
        introduced.add(payload.transport, 1 + payload.alike);
        bare.add(payload.transport, payload.bare);
        let kind = if is_datagram { "UDP datagram" } else { "TCP connection" };
        writeln!(text, "== {kind} {} > {}", payload.source, payload.destination)?;
        let explained = if is_datagram { explain_datagram(&payload.bytes) } else { explain_bytes(&payload.bytes) };
        match explained {
            Ok(explained) => text.push_str(&explained),
            Err(error) => writeln!(text, "{error}")?,
        }
        if is_datagram && (payload.alike, payload.bare) != (0, 0) {
            writeln!(
                text,
                "further datagrams of this flow: {} with this header, {} without one",
                payload.alike, payload.bare
            )?;
        }
        text.push('\n');
    }
    writeln!(text, "with a PROXY header: {introduced}; without one: {bare}")?;
    match introduced {
        Counts { connections: 0, datagrams: 0 } => bail!(
            "no PROXY header in this capture (without one: {bare}); \
             capture from before the connections are opened, between the sender of the header and its receiver"
        ),
        _ => Ok(text),
    }
}

/// How much of a capture is of one kind.
#[derive(Clone, Copy, Default)]
struct Counts {
    connections: usize,
    datagrams: usize,
}

impl Counts {
    fn add(&mut self, transport: Transport, count: usize) {
        match transport {
            Transport::Stream => self.connections += count,
            Transport::Dgram => self.datagrams += count,
        }
    }
}

impl fmt::Display for Counts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "TCP connections {}, UDP datagrams {}", self.connections, self.datagrams)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hex_in_all_its_dresses() {
        let bytes = vec![0x0d, 0x0a, 0xff];
        for text in
            ["0d0aff", "0d 0a FF\n", "0d:0a:ff", "\\x0d\\x0a\\xff", "0x0d, 0x0a, 0xff", "0x0d0aff", " 0d0a | ff"]
        {
            assert_eq!(from_hex(text.as_bytes()), Some(bytes.clone()), "{text}");
        }
        for text in ["", " ", "0d0", "xyz0", "PROXY UNKNOWN", "\u{fffd}a"] {
            assert_eq!(from_hex(text.as_bytes()), None, "{text}");
        }
    }

    #[test]
    fn a_line_on_the_command_line() {
        let bytes = read(&["PROXY".into(), "UNKNOWN\\r\\n".into()]).expect("a line");
        assert_eq!(bytes, b"PROXY UNKNOWN\r\n");
    }

    #[test]
    fn what_follows_is_counted() {
        let text = explain_input(b"PROXY UNKNOWN\r\nGET / HTTP/1.1\r\n").expect("a header");
        assert!(text.ends_with("   15  bytes that follow the header: 16\n"), "{text}");
        let hex = explain_input(b"50524f585920554e4b4e4f574e0d0a 00").expect("a header");
        assert!(hex.ends_with("   15  bytes that follow the header: 1\n"), "{hex}");
    }

    #[test]
    fn errors_that_people_read() {
        let errors = [
            explain_input(b""),
            explain_input(b"PROXY TCP4 198.51.100.22"),
            explain_input(b"220 mail.example.com ESMTP"),
            explain_input(b"56ec 00000000000000000000ffffc0000207"),
            explain_capture(&[]),
            read(&["no-such-file".into()]).map(|_| String::new()),
        ];
        let all: Vec<String> = errors.map(|result| format!("{:#}", result.expect_err("an error"))).into();
        insta::assert_snapshot!(all.join("\n-----\n"));
    }

    #[test]
    fn a_capture_in_words() {
        let address = |text: &str| text.parse().expect("an address");
        let payload =
            |transport, bytes: &[u8]| Payload::new(transport, address("10.0.0.1:40000"), address("10.0.0.2:80"), bytes);
        let mut spp = Vec::new();
        spp::encode(&mut spp, address("192.0.2.7:4660"), address("203.0.113.9:53"));
        spp.extend(b"query");
        let payloads = [
            payload(Transport::Stream, b"PROXY UNKNOWN\r\n"),
            payload(Transport::Stream, b"GET /"),
            payload(
                Transport::Dgram,
                b"\r\n\r\n\0\r\nQUIT\n\x21\x12\x00\x0c\xc0\0\x02\x01\xc0\0\x02\x02\0\x01\0\x02query",
            ),
            payload(Transport::Dgram, b"\r\n\r\n\0\r\nQUIT\n\x21\x12\x00\x0b"),
            Payload { alike: 12, bare: 3, ..payload(Transport::Dgram, &spp) },
            Payload { alike: 14, ..payload(Transport::Dgram, b"answer") },
            // A connection cannot begin with it.
            payload(Transport::Stream, &spp),
        ];
        insta::assert_snapshot!(explain_capture(&payloads).expect("headers"));
    }
}
