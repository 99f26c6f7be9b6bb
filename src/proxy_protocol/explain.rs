//! PURE. A header in words: each field with its offset, its bytes and their meaning; what is wrong, and what to do.

use std::fmt::Write as _;
use std::net::IpAddr;

use crate::proxy_protocol::spp::Spp;
use crate::proxy_protocol::tlv::{self, RawTlv, TLV_PREFIX_BYTES};
use crate::proxy_protocol::v2::{PREFIX_BYTES, SIGNATURE};
use crate::proxy_protocol::{Addresses, Command, DecodeError, Header, SslTlv, Tlv, Transport, Version};

/// Bytes in one line of the table.
const LINE_BYTES: usize = 12;
/// Lines of bytes of one field; what is longer is cut.
const FIELD_LINES_MAX: usize = 4;
/// Characters of text or hex shown in one value.
const VALUE_CHARS_MAX: usize = 256;

/// What the header says, and below it every field of `raw`, the bytes it was read from.
pub fn explain(header: &Header, raw: &[u8]) -> String {
    let mut out = summary(header);
    out.push('\n');
    for field in fields(header, raw) {
        field.line(&raw[field.at..field.at + field.len], &mut out);
    }
    out
}

/// The same of Cloudflare's 38 bytes.
pub fn explain_spp(spp: &Spp, raw: &[u8]) -> String {
    let mut fields = Fields { fields: Vec::new(), at: 0 };
    let mapped = |ip: IpAddr| if ip.is_ipv4() { format!("{ip}, as IPv6") } else { ip.to_string() };
    fields.push(2, "magic of the Simple Proxy Protocol");
    fields.push(16, format!("client address {}", mapped(spp.client.ip())));
    fields.push(16, format!("proxy address {}", mapped(spp.local.ip())));
    fields.push(2, format!("client port {}", spp.client.port()));
    fields.push(2, format!("proxy port {}", spp.local.port()));
    let mut out = table(&spp_facts(spp));
    out.push('\n');
    for field in fields.fields {
        field.line(&raw[field.at..field.at + field.len], &mut out);
    }
    out
}

/// Names and values of Cloudflare's header.
pub fn spp_facts(spp: &Spp) -> Vec<(String, String)> {
    let fact = |name: &str, value: String| (name.to_owned(), value);
    vec![
        fact("header", "Simple Proxy Protocol (Cloudflare, UDP)".to_owned()),
        fact("client", spp.client.to_string()),
        fact("destination", spp.local.to_string()),
    ]
}

/// One fact a line, names in the first column: what `whoami` answers and `demo` shows.
pub fn summary(header: &Header) -> String {
    table(&facts(header))
}

/// Lines of names and values.
pub fn table(facts: &[(String, String)]) -> String {
    let width = facts.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    facts.iter().fold(String::new(), |mut out, (name, value)| {
        writeln!(out, "{name:width$}  {value}").expect("writing to a String cannot fail");
        out
    })
}

/// Names and values, made printable; not escaped for HTML.
pub fn facts(header: &Header) -> Vec<(String, String)> {
    let fact = |name: &str, value: String| (name.to_owned(), value);
    let version = match header.version {
        Version::V1 => "PROXY protocol version 1 (text)",
        Version::V2 => "PROXY protocol version 2 (binary)",
    };
    let mut facts = vec![fact("header", version.to_owned())];
    let nothing = "not named: the connection's own addresses count".to_owned();
    match (&header.addresses, header.command) {
        (_, Command::Local) => {
            let why = "LOCAL: the sender speaks for itself (a health check, or a client without an address); the connection's own addresses count";
            facts.push(fact("command", why.to_owned()));
        }
        (Addresses::Unknown | Addresses::Skipped { .. }, Command::Proxy) => facts.push(fact("client", nothing)),
        (Addresses::Inet { source, destination, transport }, Command::Proxy) => {
            facts.push(fact("client", source.to_string()));
            facts.push(fact("destination", destination.to_string()));
            let transport = if *transport == Transport::Stream { "TCP" } else { "UDP" };
            let family = if source.is_ipv4() { "IPv4" } else { "IPv6" };
            facts.push(fact("transport", format!("{transport} over {family}")));
        }
        (Addresses::Unix { source, destination, transport }, Command::Proxy) => {
            facts.push(fact("client", opaque(source)));
            facts.push(fact("destination", opaque(destination)));
            let transport = if *transport == Transport::Stream { "stream" } else { "datagram" };
            facts.push(fact("transport", format!("UNIX {transport}")));
        }
    }
    for tlv in &header.tlvs {
        facts.push((format!("TLV 0x{:02x}", tlv.kind()), tlv_in_words(tlv)));
        if let Tlv::Ssl { tlvs, .. } = tlv {
            let subs = tlvs.iter().map(|sub| (format!(" sub 0x{:02x}", sub.parts().0), ssl_tlv_in_words(sub)));
            facts.extend(subs);
        }
    }
    facts
}

fn tlv_in_words(tlv: &Tlv) -> String {
    let name = tlv::name(tlv.kind());
    match tlv {
        Tlv::Alpn(value) | Tlv::UniqueId(value) => format!("{name} {}", opaque(value)),
        Tlv::Authority(text) | Tlv::Netns(text) => format!("{name} {}", printable(text)),
        Tlv::Crc32c => format!("{name} correct"),
        Tlv::Noop(value) => format!("{name} {} bytes of padding", value.len()),
        Tlv::Ssl { client, verify, .. } => format!("{name} {}; {}", ssl_client(*client), ssl_verify(*verify)),
        Tlv::AwsVpcEndpoint(id) => format!("AWS VPC endpoint {}", printable(id)),
        Tlv::AzureLinkId(id) => format!("Azure private endpoint LINKID {id}"),
        Tlv::GcpPscConnectionId(id) => format!("GCP Private Service Connect connection {id}"),
        Tlv::Custom { value, .. } => format!("{name} {}", opaque(value)),
    }
}

fn ssl_tlv_in_words(tlv: &SslTlv) -> String {
    let (kind, value) = tlv.parts();
    let name = tlv::ssl_name(kind);
    match tlv {
        SslTlv::ClientCert(der) => format!("{name} {} bytes of DER", der.len()),
        _ => format!("{name} {}", opaque(value)),
    }
}

fn ssl_client(bits: u8) -> String {
    let names =
        [(1, "over TLS"), (2, "client certificate on this connection"), (4, "client certificate in this session")];
    let set: Vec<&str> = names.iter().filter(|(bit, _)| bits & bit != 0).map(|(_, name)| *name).collect();
    if set.is_empty() { "not over TLS".to_owned() } else { set.join(", ") }
}

fn ssl_verify(verify: u32) -> String {
    match verify {
        0 => "client certificate verified".to_owned(),
        code => format!("no verified client certificate (code {code})"),
    }
}

/// Text from the network, without control characters, cut where it is long.
fn printable(text: &str) -> String {
    let mut shown: String = text.chars().take(VALUE_CHARS_MAX).flat_map(char::escape_debug).collect();
    if text.chars().nth(VALUE_CHARS_MAX).is_some() {
        shown.push_str("...");
    }
    shown
}

/// Bytes as quoted text where they are printable ASCII, else as hex.
fn opaque(bytes: &[u8]) -> String {
    match std::str::from_utf8(bytes) {
        Ok("") => "empty".to_owned(),
        Ok(text) if text.chars().all(|c| !c.is_control()) => printable(text),
        _ => {
            let cut = bytes.len().min(VALUE_CHARS_MAX / 2);
            let dots = if cut < bytes.len() { "..." } else { "" };
            format!("0x{}{dots}", hex(&bytes[..cut], ""))
        }
    }
}

/// Two digits a byte.
pub fn hex(bytes: &[u8], separator: &str) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().join(separator)
}

/// One row of the table.
pub struct Field {
    /// Offset in the header.
    pub at: usize,
    /// Bytes.
    pub len: usize,
    /// In words.
    pub meaning: String,
}

impl Field {
    fn line(&self, bytes: &[u8], out: &mut String) {
        let mut meaning = self.meaning.as_str();
        let lines = bytes.len().div_ceil(LINE_BYTES);
        for (index, line) in bytes.chunks(LINE_BYTES).enumerate() {
            let at = self.at + index * LINE_BYTES;
            if index == FIELD_LINES_MAX && lines > FIELD_LINES_MAX + 1 {
                writeln!(out, "{at:5}  ... {} bytes more", bytes.len() - index * LINE_BYTES).expect("a String");
                return;
            }
            let row = format!("{at:5}  {:width$}  {meaning}", hex(line, " "), width = LINE_BYTES * 3 - 1);
            writeln!(out, "{}", row.trim_end()).expect("writing to a String cannot fail");
            meaning = "";
        }
    }
}

/// Rows one after the other.
struct Fields {
    fields: Vec<Field>,
    at: usize,
}

impl Fields {
    fn push(&mut self, len: usize, meaning: impl Into<String>) {
        self.fields.push(Field { at: self.at, len, meaning: meaning.into() });
        self.at += len;
    }
}

/// Every field of `raw`, the bytes that the header was read from.
pub fn fields(header: &Header, raw: &[u8]) -> Vec<Field> {
    let mut fields = Fields { fields: Vec::new(), at: 0 };
    match header.version {
        Version::V1 => v1_fields(header, raw, &mut fields),
        Version::V2 => v2_fields(header, raw, &mut fields),
    }
    fields.fields
}

fn v1_fields(header: &Header, raw: &[u8], fields: &mut Fields) {
    fields.push(6, "\"PROXY \": version 1");
    let Some((source, destination)) = header.addresses.ends() else {
        fields.push(7, "UNKNOWN: no addresses");
        if raw.len() > fields.at + 2 {
            fields.push(raw.len() - fields.at - 2, "ignored");
        }
        return fields.push(2, "end of line");
    };
    fields.push(5, if source.is_ipv4() { "TCP over IPv4" } else { "TCP over IPv6" });
    let meanings = [
        format!("source address {}", source.ip()),
        format!("destination address {}", destination.ip()),
        format!("source port {}", source.port()),
    ];
    for meaning in meanings {
        let rest = &raw[fields.at..];
        let len = rest.iter().position(|&byte| byte == b' ').map_or(rest.len(), |end| end + 1);
        fields.push(len, meaning);
    }
    fields.push(raw.len() - fields.at - 2, format!("destination port {}", destination.port()));
    fields.push(2, "end of line");
}

fn v2_fields(header: &Header, raw: &[u8], fields: &mut Fields) {
    fields.push(SIGNATURE.len(), "signature of version 2");
    fields.push(1, if header.command == Command::Local { "version 2, LOCAL" } else { "version 2, PROXY" });
    fields.push(1, family_in_words(raw[13]));
    fields.push(2, format!("length of what follows: {}", raw.len() - PREFIX_BYTES));
    match &header.addresses {
        Addresses::Unknown => {}
        Addresses::Inet { source, destination, .. } => {
            let ip = if source.is_ipv4() { 4 } else { 16 };
            fields.push(ip, format!("source address {}", source.ip()));
            fields.push(ip, format!("destination address {}", destination.ip()));
            fields.push(2, format!("source port {}", source.port()));
            fields.push(2, format!("destination port {}", destination.port()));
        }
        Addresses::Unix { source, destination, .. } => {
            fields.push(108, format!("source path {}", opaque(source)));
            fields.push(108, format!("destination path {}", opaque(destination)));
        }
        Addresses::Skipped { bytes, .. } if bytes.is_empty() => {}
        Addresses::Skipped { bytes, .. } => fields.push(bytes.len(), "skipped"),
    }
    for (raw, tlv) in tlv::walk(raw, fields.at, raw.len()).flatten().zip(&header.tlvs) {
        fields.push(TLV_PREFIX_BYTES, format!("TLV 0x{:02x} {}, {} bytes", raw.kind, tlv::name(raw.kind), raw.length));
        tlv_fields(raw, tlv, fields);
    }
}

fn family_in_words(byte: u8) -> String {
    let family = ["UNSPEC", "INET (IPv4)", "INET6 (IPv6)", "UNIX"].get(usize::from(byte >> 4)).unwrap_or(&"unknown");
    let transport = ["UNSPEC", "STREAM", "DGRAM"].get(usize::from(byte & 15)).unwrap_or(&"unknown");
    format!("family {family}, transport {transport}")
}

fn tlv_fields(raw: RawTlv<'_>, tlv: &Tlv, fields: &mut Fields) {
    match tlv {
        _ if raw.value.is_empty() => {}
        Tlv::Ssl { client, verify, tlvs } => {
            fields.push(1, ssl_client(*client));
            fields.push(4, ssl_verify(*verify));
            for sub in tlvs {
                let (kind, value) = sub.parts();
                let name = tlv::ssl_name(kind);
                fields.push(TLV_PREFIX_BYTES, format!("  sub-TLV 0x{kind:02x} {name}, {} bytes", value.len()));
                if !value.is_empty() {
                    fields.push(value.len(), format!("  {}", ssl_tlv_in_words(sub)));
                }
            }
        }
        Tlv::AwsVpcEndpoint(_) | Tlv::AzureLinkId(_) => {
            fields.push(1, "sub-type 1");
            if raw.length > 1 {
                fields.push(raw.length - 1, tlv_in_words(tlv));
            }
        }
        _ => fields.push(raw.length, tlv_in_words(tlv)),
    }
}

/// What is wrong with `bytes`, where, and what to do.
pub fn explain_error(error: &DecodeError, bytes: &[u8]) -> String {
    let at = error.at().min(bytes.len().saturating_sub(1));
    let start = at - at % LINE_BYTES;
    let mut out = format!("{error}\n\n");
    for line in [start.checked_sub(LINE_BYTES), Some(start)].into_iter().flatten() {
        let shown = &bytes[line..bytes.len().min(line + LINE_BYTES)];
        let text: String = shown.iter().map(|&b| if (32..127).contains(&b) { b as char } else { '.' }).collect();
        writeln!(out, "{line:5}  {:width$}  {text}", hex(shown, " "), width = LINE_BYTES * 3 - 1).expect("a String");
    }
    write!(out, "       {}^^ byte {at}\n\n{}\n", "   ".repeat(at - start), help(error, bytes)).expect("a String");
    out
}

/// What to do about it.
fn help(error: &DecodeError, bytes: &[u8]) -> &'static str {
    match error {
        _ if bytes.starts_with(&[0x16, 0x03]) => {
            "these bytes begin a TLS handshake: the sender sends no header, so switch the header on there, \
             or don't expect one here"
        }
        error if error.is_no_header() => {
            "the sender sends no header, or not first: switch it on there (preface: proxy_protocol = \"v2\" in the pool), \
             or don't expect one here"
        }
        DecodeError::V1TooLong => "a line has 107 bytes at most: the sender is broken, or this is no PROXY header",
        DecodeError::V1LineEnd { .. } => "the line must end in the bytes 0d 0a, and have no fields beyond the four",
        DecodeError::V1Protocol { .. }
        | DecodeError::V1Address { .. }
        | DecodeError::V1Port { .. }
        | DecodeError::V1Prefix { .. } => {
            "a line is `PROXY TCP4 source destination source-port destination-port`, with one space between, and CR LF"
        }
        DecodeError::V2Version { .. } | DecodeError::V2Command { .. } => "LOCAL is 20, PROXY is 21",
        DecodeError::V2Family { .. } | DecodeError::V2Transport { .. } => {
            "11 is TCP over IPv4, 12 UDP over IPv4, 21 TCP over IPv6, 22 UDP over IPv6, 31 and 32 UNIX"
        }
        DecodeError::V2Length { .. } => "IPv4 needs 12 bytes, IPv6 36, UNIX 216; TLVs come on top",
        DecodeError::Crc32c { .. } => {
            "the header was changed on its way, or the sender computed the checksum over other bytes: \
             it covers the whole header with its own 4 bytes zero"
        }
        DecodeError::Crc32cLength { .. } | DecodeError::DuplicateCrc32c { .. } => "CRC32C has 4 bytes and comes once",
        _ => "a TLV is one byte of type, two of length (big-endian), and that many bytes; they fill the header exactly",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proxy_protocol::{Decoded, decode, spp};

    fn shown(bytes: &[u8]) -> String {
        match decode(bytes) {
            Ok(Decoded::Complete { header, len }) => explain(&header, &bytes[..len]),
            Ok(Decoded::Incomplete { needed }) => format!("incomplete: {needed}"),
            Err(error) => explain_error(&error, bytes),
        }
    }

    fn written(header: &Header) -> Vec<u8> {
        let mut bytes = Vec::new();
        header.encode(&mut bytes).expect("a header that can be written");
        bytes
    }

    fn tcp6() -> Addresses {
        let address = |text: &str| text.parse().expect("an address");
        Addresses::inet(address("[2001:db8::22]:35646"), address("[2001:db8::7]:443"), Transport::Stream)
    }

    #[test]
    fn a_line_of_version_1() {
        insta::assert_snapshot!(shown(b"PROXY TCP4 198.51.100.22 203.0.113.7 35646 80\r\nGET /"));
    }

    #[test]
    fn version_1_unknown_with_more_in_the_line() {
        insta::assert_snapshot!(shown(b"PROXY UNKNOWN ffff\r\n"));
    }

    #[test]
    fn version_2_with_tlvs_of_the_clouds() {
        let tlvs = vec![
            Tlv::Crc32c,
            Tlv::Noop(vec![0; 90]),
            Tlv::UniqueId(b"01ARZ3NDEKTSV4RRFFQ69G5FAV".into()),
            Tlv::GcpPscConnectionId(81_234),
            Tlv::AwsVpcEndpoint("vpce-08d2bf15fac5001c9".into()),
            Tlv::AzureLinkId(513),
            Tlv::Custom { kind: 0xf1, value: vec![0, 255] },
        ];
        insta::assert_snapshot!(shown(&written(&Header::proxy(Version::V2, tcp6(), tlvs))));
    }

    #[test]
    fn version_2_with_tls() {
        let tlvs = vec![
            SslTlv::Version("TLSv1.3".into()),
            SslTlv::CommonName("client\u{1b}[31m".into()),
            SslTlv::ClientCert(vec![0x30; 20]),
        ];
        let tlvs = vec![Tlv::Authority("example.com".into()), Tlv::Ssl { client: 3, verify: 0, tlvs }];
        insta::assert_snapshot!(shown(&written(&Header::proxy(Version::V2, tcp6(), tlvs))));
    }

    #[test]
    fn a_health_check() {
        insta::assert_snapshot!(shown(&written(&Header::local(vec![]))));
    }

    #[test]
    fn the_simple_proxy_protocol() {
        let address = |text: &str| text.parse().expect("an address");
        let both = [("192.0.2.7:4660", "203.0.113.9:53"), ("[2001:db8::7]:4660", "[2001:db8::9]:53")];
        let shown = both.map(|(client, local)| {
            let mut raw = Vec::new();
            spp::encode(&mut raw, address(client), address(local));
            explain_spp(&spp::decode(&raw).expect("a header"), &raw)
        });
        insta::assert_snapshot!(shown.join("-----\n"));
    }

    #[test]
    fn what_is_wrong_and_what_to_do() {
        let v2 = |rest: &[u8]| [&SIGNATURE, rest].concat();
        let wrong: [Vec<u8>; 9] = [
            b"GET / HTTP/1.1\r\n".into(),
            b"\x16\x03\x01\x02\x00".into(),
            b"PROXY TCP4 198.51.100.22 203.0.113.7 +35646 80\r\n".into(),
            b"PROXY TCP4 ::1 203.0.113.7 35646 80\r\n".into(),
            b"PROXY TCP4 198.51.100.22 203.0.113.7 35646 80\n".into(),
            v2(&[0x31, 0x11, 0, 12]),
            v2(&[0x21, 0x11, 0, 11]),
            v2(&[0x21, 0x11, 0, 17, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 0xea, 0, 9, 1, 2]),
            v2(&[0x20, 0x00, 0, 7, 3, 0, 4, 1, 2, 3, 4]),
        ];
        let all: Vec<String> = wrong.iter().map(|bytes| shown(bytes)).collect();
        insta::assert_snapshot!(all.join("-----\n"));
    }
}
