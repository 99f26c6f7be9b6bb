//! PURE. What the doctor sends: the headers that it tries, and the question behind them.

use std::net::SocketAddr;

use crate::address::Address;
use crate::config::{HeaderFormat, Tlvs};
use crate::pool::header::HeaderPlan;
use crate::proxy_protocol::error::EncodeError;
use crate::proxy_protocol::{Addresses, Header, Transport, Version};

/// One connection of an examination, by what goes first on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Try {
    /// No header at all.
    Bare,
    /// v2 PROXY with the connection's own addresses.
    V2,
    /// v1 with the connection's own addresses.
    V1,
    /// v2 LOCAL, as health checks send.
    Local,
    /// v2 PROXY with TLVs.
    Tlvs,
    /// `PROXY UNKNOWN`, as GCP's health checks send.
    Unknown,
    /// Simple Proxy Protocol; UDP only.
    Spp,
}

impl Try {
    /// Over UDP, which has no v1.
    pub const UDP: [Try; 5] = [Try::Bare, Try::V2, Try::Local, Try::Tlvs, Try::Spp];

    /// Over TCP, in the order in which they are made: the first three decide.
    pub const ALL: [Try; 6] = [Try::Bare, Try::V2, Try::V1, Try::Local, Try::Tlvs, Try::Unknown];

    /// How many of them decide whether a header is expected; where all of these are met with silence, so are the rest.
    pub const DECIDING: usize = 3;

    /// For people.
    pub fn name(self) -> &'static str {
        match self {
            Try::Bare => "no header",
            Try::V2 => "v2",
            Try::V1 => "v1",
            Try::Local => "v2 LOCAL",
            Try::Tlvs => "v2 with TLVs",
            Try::Unknown => "v1 UNKNOWN",
            Try::Spp => "spp",
        }
    }

    /// For machines.
    pub fn word(self) -> &'static str {
        match self {
            Try::Bare => "off",
            Try::V2 => "v2",
            Try::V1 => "v1",
            Try::Local => "v2_local",
            Try::Tlvs => "v2_tlvs",
            Try::Unknown => "v1_unknown",
            Try::Spp => "spp",
        }
    }

    /// The one with this header.
    pub fn of(format: HeaderFormat) -> Try {
        match format {
            HeaderFormat::V1 => Try::V1,
            HeaderFormat::V2 => Try::V2,
            HeaderFormat::Spp => Try::Spp,
        }
    }

    /// The header's bytes. `ends` are this side's address and the upstream's, the connection's own: nothing is forged, and
    /// whoever decides by address decides about this machine.
    pub fn header(
        self,
        tlvs: &Tlvs,
        ends: (SocketAddr, SocketAddr),
        transport: Transport,
    ) -> Result<Vec<u8>, EncodeError> {
        let mut bytes = Vec::new();
        let none = Tlvs::default();
        let mut encode = |format, tlvs| {
            HeaderPlan::new(Some(format), tlvs)?.encode(Some(ends), transport, CONNECTION_ID, &mut bytes)
        };
        match self {
            Try::Bare => {}
            Try::V2 => encode(HeaderFormat::V2, &none)?,
            Try::V1 => encode(HeaderFormat::V1, &none)?,
            Try::Tlvs => encode(HeaderFormat::V2, tlvs)?,
            Try::Spp => encode(HeaderFormat::Spp, &none)?,
            Try::Local => Header::local(vec![]).encode(&mut bytes)?,
            Try::Unknown => Header::proxy(Version::V1, Addresses::Unknown, vec![]).encode(&mut bytes)?,
        }
        Ok(bytes)
    }
}

/// What the header's unique ID says: that of a connection of the doctor's.
const CONNECTION_ID: &str = "00000000000000000000D0CT0R";

/// The TLVs of an examination without a configuration: the usual ones, and well below the size that all receivers take.
pub fn usual_tlvs() -> Tlvs {
    Tlvs {
        vpce_id: Some("vpce-08d2bf15fac5001c9".to_owned()),
        crc32c: Some(true),
        unique_id: Some(true),
        ..Tlvs::default()
    }
}

/// What is asked behind the header.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Question {
    /// `GET path`.
    Http {
        /// Request target.
        path: String,
        /// `Host`; `None`: the address.
        host: Option<String>,
    },
    /// A TLS ClientHello.
    Tls,
    /// The addresses of a name, or, of the root, its name servers.
    Dns {
        /// With or without the dot at its end.
        name: String,
    },
    /// Bytes, and a part of the answer; both may be empty.
    Given {
        /// Empty: the server speaks first.
        send: Vec<u8>,
        /// Empty: any answer will do.
        expect: Vec<u8>,
    },
}

/// Of a question about names (RFC 1035, section 4.1.1): any will do, for its answer comes to this socket alone.
pub const DNS_ID: [u8; 2] = [0x12, 0x34];
/// Where names are asked for.
const DNS_PORT: u16 = 53;

/// Ports on which TLS begins at once.
const TLS_PORTS: [u16; 9] = [443, 465, 636, 853, 990, 993, 995, 6443, 8443];

impl Question {
    /// For a port of which nothing is known; `None`: a UNIX socket.
    pub fn usual(port: Option<u16>) -> Question {
        match port {
            Some(DNS_PORT) => Question::Dns { name: ".".to_owned() },
            Some(port) if TLS_PORTS.contains(&port) => Question::Tls,
            _ => Question::Http { path: "/".to_owned(), host: None },
        }
    }

    /// The same for UDP, where a port of which nothing is known can be asked nothing.
    pub fn usual_of_datagrams(port: Option<u16>) -> Option<Question> {
        (port == Some(DNS_PORT)).then(|| Question::usual(port))
    }

    /// In a datagram.
    pub fn datagram(&self) -> Vec<u8> {
        match self {
            Question::Dns { name } => dns_query(name),
            Question::Given { send, .. } => send.clone(),
            Question::Http { .. } | Question::Tls => Vec::new(),
        }
    }

    /// Its bytes.
    pub fn bytes(&self, to: &Address) -> Vec<u8> {
        match self {
            Question::Http { path, host } => {
                let host = host.clone().unwrap_or_else(|| match to {
                    Address::Ip(to) => to.to_string(),
                    Address::Unix(_) => "localhost".to_owned(),
                });
                format!(
                    "GET {path} HTTP/1.1\r\nHost: {host}\r\nUser-Agent: preface-doctor\r\nConnection: close\r\n\r\n"
                )
                .into()
            }
            Question::Tls => client_hello(),
            Question::Dns { name } => {
                let query = dns_query(name);
                let length = u16::try_from(query.len()).expect("a name is short");
                [&length.to_be_bytes()[..], &query].concat()
            }
            Question::Given { send, .. } => send.clone(),
        }
    }

    /// Is this enough of an answer to judge it? What still comes is read at the close.
    pub fn is_answered(&self, answer: &[u8]) -> bool {
        match self {
            Question::Http { .. } => answer.windows(4).any(|window| window == b"\r\n\r\n"),
            Question::Tls => answer.len() >= 7,
            Question::Dns { .. } => match answer {
                [high, low, rest @ ..] => rest.len() >= usize::from(u16::from_be_bytes([*high, *low])),
                _ => false,
            },
            Question::Given { expect, .. } => !expect.is_empty() && contains(answer, expect),
        }
    }

    /// For people: "asked ...".
    pub fn describe(&self) -> String {
        match self {
            Question::Http { path, host: None } => format!("HTTP, GET {path}"),
            Question::Http { path, host: Some(host) } => format!("HTTP, GET {path} of {host}"),
            Question::Tls => "a TLS handshake".to_owned(),
            Question::Dns { name } => format!("DNS, {name}"),
            Question::Given { send, .. } if send.is_empty() => "nothing, for the server to speak first".to_owned(),
            Question::Given { send, .. } => format!("\"{}\"", send.escape_ascii()),
        }
    }
}

/// A question of class IN that wants recursion (RFC 1035, section 4.1).
fn dns_query(name: &str) -> Vec<u8> {
    const LABEL_BYTES_MAX: usize = 63;
    let mut query = [&DNS_ID[..], &[1, 0, 0, 1, 0, 0, 0, 0, 0, 0]].concat();
    let labels: Vec<&str> = name.split('.').filter(|label| !label.is_empty()).collect();
    for label in &labels {
        let label = &label.as_bytes()[..label.len().min(LABEL_BYTES_MAX)];
        query.push(label.len() as u8);
        query.extend(label);
    }
    // NS of the root, A of everything else.
    let kind = if labels.is_empty() { 2 } else { 1 };
    query.extend([0, 0, kind, 0, 1]);
    query
}

/// Does the one hold the other?
pub fn contains(bytes: &[u8], part: &[u8]) -> bool {
    part.is_empty() || bytes.windows(part.len()).any(|window| window == part)
}

/// How to leave politely, by what the server said first; `None`: just close.
pub fn goodbye(greeting: &[u8]) -> Option<&'static [u8]> {
    let says = |text: &[u8]| greeting.starts_with(text);
    match () {
        () if says(b"220 ") || says(b"220-") || says(b"+OK") => Some(b"QUIT\r\n"),
        () if says(b"* OK") || says(b"* PREAUTH") => Some(b"a LOGOUT\r\n"),
        () => None,
    }
}

/// A ClientHello for TLS 1.2 and 1.3, without a name. Its list of key shares is empty, so it takes no cryptography to
/// send: a server of TLS 1.3 asks for another hello (RFC 8446, section 4.1.4), which is an answer too.
fn client_hello() -> Vec<u8> {
    const CIPHERS: [u16; 12] =
        [0x1301, 0x1302, 0x1303, 0xc02b, 0xc02f, 0xc02c, 0xc030, 0xcca9, 0xcca8, 0xc013, 0x009c, 0x002f];
    const EXTENSIONS: [(u16, &[u8]); 6] = [
        (10, &[0, 6, 0, 0x1d, 0, 0x17, 0, 0x18]),           // supported_groups
        (11, &[1, 0]),                                      // ec_point_formats
        (13, &[0, 12, 4, 3, 8, 4, 4, 1, 5, 3, 8, 5, 5, 1]), // signature_algorithms
        (43, &[4, 3, 4, 3, 3]),                             // supported_versions
        (45, &[1, 1]),                                      // psk_key_exchange_modes
        (51, &[0, 0]),                                      // key_share
    ];
    let length = |bytes: &[u8]| u16::try_from(bytes.len()).expect("a short list").to_be_bytes();
    let mut extensions = Vec::new();
    for (kind, value) in EXTENSIONS {
        extensions.extend([&kind.to_be_bytes()[..], &length(value), value].concat());
    }
    let ciphers: Vec<u8> = CIPHERS.iter().flat_map(|cipher| cipher.to_be_bytes()).collect();
    let hello = [
        &[3, 3][..],
        b"preface doctor: no secret here..",
        &[0],
        &length(&ciphers),
        &ciphers,
        &[1, 0],
        &length(&extensions),
        &extensions,
    ]
    .concat();
    let handshake = [&[1, 0][..], &length(&hello), &hello].concat();
    [&[0x16, 3, 1][..], &length(&handshake), &handshake].concat()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proxy_protocol::{Command, Decoded, HEADER_BYTES_SAFE, decode};

    #[test]
    fn every_header_is_valid_and_of_a_size_that_all_receivers_take() {
        for (local, peer) in [("192.0.2.1:40000", "192.0.2.2:80"), ("[2001:db8::1]:40000", "[2001:db8::2]:80")] {
            let (local, peer) = (local.parse().unwrap(), peer.parse().unwrap());
            for attempt in Try::ALL {
                let bytes = attempt.header(&usual_tlvs(), (local, peer), Transport::Stream).unwrap();
                assert!(bytes.len() <= HEADER_BYTES_SAFE, "{attempt:?}: {} bytes", bytes.len());
                if attempt == Try::Bare {
                    assert!(bytes.is_empty());
                    continue;
                }
                let Ok(Decoded::Complete { header, len }) = decode(&bytes) else { panic!("{attempt:?}: {bytes:?}") };
                assert_eq!(len, bytes.len());
                let v1 = matches!(attempt, Try::V1 | Try::Unknown);
                assert_eq!(header.version, if v1 { Version::V1 } else { Version::V2 });
                assert_eq!(header.command == Command::Local, attempt == Try::Local);
                assert_eq!(header.tlvs.len(), if attempt == Try::Tlvs { 3 } else { 0 });
                let own = !matches!(attempt, Try::Local | Try::Unknown);
                assert_eq!(header.addresses.ends(), own.then_some((local, peer)));
            }
        }
    }

    #[test]
    fn the_hello_is_as_long_as_it_says() {
        let hello = client_hello();
        let length = |at: usize| usize::from(u16::from_be_bytes([hello[at], hello[at + 1]]));
        assert_eq!(length(3), hello.len() - 5);
        assert_eq!(length(7), hello.len() - 9);
        assert_eq!(&hello[11..43], b"preface doctor: no secret here..");
    }
}
