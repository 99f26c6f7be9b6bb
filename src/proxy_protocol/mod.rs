//! The PROXY protocol, versions 1 and 2: what a header says, to bytes and back. Pure: no I/O, no clock.
//!
//! Sections are those of HAProxy's `proxy-protocol.txt`, revision 2026-04-27.

pub mod error;
pub mod explain;
pub mod tlv;
pub mod v1;
pub mod v2;

use std::net::{IpAddr, SocketAddr};

pub use error::{DecodeError, EncodeError};
pub use tlv::{SslTlv, Tlv};

/// Longest v2 header: 16 bytes and a 16-bit length (section 2.2).
pub const HEADER_BYTES_MAX: usize = 16 + 65_535;

/// Every receiver that was tried takes a header of this size; the first ones refuse or ignore longer ones at 256.
pub const HEADER_BYTES_SAFE: usize = 232;

/// Which version of the header is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Version {
    /// One line of text.
    V1,
    /// Binary, with TLVs.
    V2,
}

impl Version {
    /// The word in configuration, logs and metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Version::V1 => "v1",
            Version::V2 => "v2",
        }
    }
}

/// What the header asks of the receiver.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Command {
    /// The sender speaks for itself (a health check): use the connection's real addresses.
    Local,
    /// Use the addresses in the header.
    Proxy,
}

/// The transport nibble of a v2 header (section 2.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Transport {
    /// TCP, or a UNIX stream.
    Stream,
    /// UDP, or a UNIX datagram.
    Dgram,
}

/// The two ends that a header names.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Addresses {
    /// Nothing is said: v1 UNKNOWN, v2 UNSPEC. The receiver uses the connection's own.
    Unknown,
    /// IPv4 or IPv6, both of one family after `Addresses::inet`.
    Inet {
        /// Who connected.
        source: SocketAddr,
        /// The address it connected to.
        destination: SocketAddr,
        /// TCP or UDP.
        transport: Transport,
    },
    /// UNIX socket paths (decoded only), 108 bytes each at most, without trailing zeros.
    Unix {
        /// Path of the client's socket.
        source: Vec<u8>,
        /// Path of the server's socket.
        destination: Vec<u8>,
        /// Stream or datagram.
        transport: Transport,
    },
    /// What a v2 header carried that the receiver must skip (decoded only): the family and addresses of LOCAL, or of a
    /// family or transport UNSPEC. Means the same as `Unknown`; kept so that the header can be written again.
    Skipped {
        /// Byte 14 of the header.
        family: u8,
        /// What stood before the TLVs.
        bytes: Vec<u8>,
    },
}

/// One header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// v1 or v2.
    pub version: Version,
    /// LOCAL or PROXY; v1 knows PROXY only.
    pub command: Command,
    /// The ends.
    pub addresses: Addresses,
    /// In the order written; always empty for v1.
    pub tlvs: Vec<Tlv>,
}

/// What the bytes so far are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decoded {
    /// A whole header.
    Complete {
        /// What it says.
        header: Header,
        /// Its length; what follows is the client's.
        len: usize,
    },
    /// The beginning of a header that may still become a valid one.
    Incomplete {
        /// At least this many more bytes are to come.
        needed: usize,
    },
}

impl Addresses {
    /// The addresses of one connection, made one family: both IPv4 or IPv4-mapped become IPv4; of a mixed pair the IPv4
    /// one becomes `::ffff:a.b.c.d`. Flow labels and scopes, which no header can carry, are dropped.
    pub fn inet(source: SocketAddr, destination: SocketAddr, transport: Transport) -> Addresses {
        let (from, to) = match (source.ip().to_canonical(), destination.ip().to_canonical()) {
            (from @ IpAddr::V4(_), to @ IpAddr::V4(_)) => (from, to),
            (from, to) => (IpAddr::V6(to_v6(from)), IpAddr::V6(to_v6(to))),
        };
        Addresses::Inet {
            source: SocketAddr::new(from, source.port()),
            destination: SocketAddr::new(to, destination.port()),
            transport,
        }
    }

    /// Source and destination, where the header names IP addresses.
    pub fn ends(&self) -> Option<(SocketAddr, SocketAddr)> {
        match *self {
            Addresses::Inet { source, destination, .. } => Some((source, destination)),
            _ => None,
        }
    }
}

/// As IPv6, an IPv4 one as `::ffff:a.b.c.d`.
fn to_v6(ip: IpAddr) -> std::net::Ipv6Addr {
    match ip {
        IpAddr::V4(ip) => ip.to_ipv6_mapped(),
        IpAddr::V6(ip) => ip,
    }
}

impl Header {
    /// v2 LOCAL: the sender speaks for itself.
    pub fn local(tlvs: Vec<Tlv>) -> Header {
        Header { version: Version::V2, command: Command::Local, addresses: Addresses::Unknown, tlvs }
    }

    /// PROXY with these addresses. TLVs belong to v2 alone; see `encode`.
    pub fn proxy(version: Version, addresses: Addresses, tlvs: Vec<Tlv>) -> Header {
        Header { version, command: Command::Proxy, addresses, tlvs }
    }

    /// Appends the header. After an error `out` is as it was.
    ///
    /// A v2 header that was decoded is written byte for byte as it came, but for one thing: PROXY without addresses,
    /// which many receivers refuse, becomes LOCAL, which means the same to those that don't.
    pub fn encode(&self, out: &mut Vec<u8>) -> Result<(), EncodeError> {
        match self.version {
            Version::V1 if self.command == Command::Local => Err(EncodeError::V1Local),
            Version::V1 if !self.tlvs.is_empty() => Err(EncodeError::V1Tlvs { count: self.tlvs.len() }),
            Version::V1 => v1::encode(out, &self.addresses),
            Version::V2 => {
                let mut tlvs = Vec::new();
                for tlv in &self.tlvs {
                    tlv.encode(&mut tlvs)?;
                }
                v2::encode_with(out, self.command, &self.addresses, &[&tlvs])
            }
        }
    }
}

/// Bytes of a PROXY header for IP addresses: exact for v2, the longest possible line for v1.
pub fn encoded_len(version: Version, ipv6: bool, tlvs: &[Tlv]) -> usize {
    match version {
        Version::V1 if ipv6 => v1::TCP6_BYTES_MAX,
        Version::V1 => v1::TCP4_BYTES_MAX,
        Version::V2 => {
            let addresses = if ipv6 { v2::INET6_BYTES } else { v2::INET_BYTES };
            v2::PREFIX_BYTES + addresses + tlvs.iter().map(Tlv::encoded_len).sum::<usize>()
        }
    }
}

/// Reads the header at the start of `bytes`. Answers `Incomplete` only as long as more bytes can still make it valid.
pub fn decode(bytes: &[u8]) -> Result<Decoded, DecodeError> {
    match bytes.first() {
        None => Ok(Decoded::Incomplete { needed: v1::HEADER_BYTES_MIN }),
        Some(b'P') => v1::decode(bytes),
        Some(&first) if first == v2::SIGNATURE[0] => v2::decode(bytes),
        Some(&byte) => Err(DecodeError::NoHeader { byte }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bytes of a hex text with spaces and `"quoted text"`.
    fn hex(text: &str) -> Vec<u8> {
        text.split('"')
            .enumerate()
            .flat_map(|(index, part)| match index % 2 {
                1 => part.as_bytes().to_vec(),
                _ => {
                    let digits: String = part.chars().filter(char::is_ascii_hexdigit).collect();
                    let byte = |at: usize| u8::from_str_radix(&digits[at..at + 2], 16).expect("hex digits");
                    (0..digits.len()).step_by(2).map(byte).collect()
                }
            })
            .collect()
    }

    fn complete(bytes: &[u8]) -> Header {
        match decode(bytes) {
            Ok(Decoded::Complete { header, len }) if len == bytes.len() => header,
            other => panic!("{other:?}"),
        }
    }

    fn encoded(header: &Header) -> Vec<u8> {
        let mut out = Vec::new();
        header.encode(&mut out).expect("a header that can be written");
        out
    }

    fn tcp(source: &str, destination: &str) -> Addresses {
        let address = |text: &str| text.parse().expect("an address");
        Addresses::inet(address(source), address(destination), Transport::Stream)
    }

    /// A header, its bytes, and the other way round.
    fn pins(header: Header, bytes: &[u8]) {
        assert_eq!(complete(bytes), header);
        assert_eq!(encoded(&header), bytes);
    }

    const SIGNATURE: &str = "0d0a0d0a000d0a515549540a";

    #[test]
    fn vector_tcp4_v1() {
        let addresses = tcp("198.51.100.22:35646", "203.0.113.7:80");
        pins(Header::proxy(Version::V1, addresses, vec![]), b"PROXY TCP4 198.51.100.22 203.0.113.7 35646 80\r\n");
    }

    #[test]
    fn vector_tcp4_v2() {
        let bytes = hex(&format!("{SIGNATURE} 21 11 000c c0a864c8 c0a864c9 d86f 1f90"));
        assert_eq!(bytes.len(), 28);
        pins(Header::proxy(Version::V2, tcp("192.168.100.200:55407", "192.168.100.201:8080"), vec![]), &bytes);
    }

    #[test]
    fn vector_aws_private_link() {
        let bytes = hex(&format!(
            "{SIGNATURE} 21 11 0054 ac1f0771 ac1f0a1f c8f2 0050 | 03 0004 e8d6892d | ea 0017 01 \"vpce-08d2bf15fac5001c9\" \
             | 04 0024 {}",
            "00".repeat(36)
        ));
        assert_eq!(bytes.len(), 100);
        let vpce = Tlv::AwsVpcEndpoint("vpce-08d2bf15fac5001c9".into());
        let tlvs = vec![Tlv::Crc32c, vpce, Tlv::Noop(vec![0; 36])];
        pins(Header::proxy(Version::V2, tcp("172.31.7.113:51442", "172.31.10.31:80"), tlvs), &bytes);
    }

    #[test]
    fn vector_aws_health_check() {
        let bytes = hex(&format!("{SIGNATURE} 20 11 0054 | 03 0004 bce5951f | 04 004a {}", "00".repeat(74)));
        assert_eq!(bytes.len(), 100);
        let mut header = Header::local(vec![Tlv::Crc32c, Tlv::Noop(vec![0; 74])]);
        header.addresses = Addresses::Skipped { family: 0x11, bytes: vec![] };
        pins(header, &bytes);
    }

    #[test]
    fn the_published_check_value_of_crc32c() {
        assert_eq!(crc32c::crc32c(b"123456789"), 0xE306_9283);
    }

    /// A v2 header: byte 12, byte 13, body.
    fn v2_bytes(command: u8, family: u8, body: &[u8]) -> Vec<u8> {
        let length = u16::try_from(body.len()).expect("a short body");
        [&v2::SIGNATURE, &[command, family][..], &length.to_be_bytes(), body].concat()
    }

    #[test]
    fn both_families_by_the_rules_for_mixed_ones() {
        let cases = [
            ("192.0.2.1:1", "192.0.2.2:2", "192.0.2.1:1", "192.0.2.2:2"),
            ("[::ffff:192.0.2.1]:1", "[::ffff:192.0.2.2]:2", "192.0.2.1:1", "192.0.2.2:2"),
            ("[::ffff:192.0.2.1]:1", "192.0.2.2:2", "192.0.2.1:1", "192.0.2.2:2"),
            ("192.0.2.1:1", "[2001:db8::2]:2", "[::ffff:192.0.2.1]:1", "[2001:db8::2]:2"),
            ("[2001:db8::1]:1", "192.0.2.2:2", "[2001:db8::1]:1", "[::ffff:192.0.2.2]:2"),
            ("[2001:db8::1]:1", "[::ffff:192.0.2.2]:2", "[2001:db8::1]:1", "[::ffff:192.0.2.2]:2"),
            ("[fe80::1%3]:1", "[fe80::2%3]:2", "[fe80::1]:1", "[fe80::2]:2"),
        ];
        for (source, destination, from, to) in cases {
            let address = |text: &str| text.parse().expect("an address");
            assert_eq!(tcp(source, destination).ends(), Some((address(from), address(to))), "{source} {destination}");
        }
        let mixed = Header::proxy(Version::V1, tcp("192.0.2.1:1", "[2001:db8::2]:2"), vec![]);
        assert_eq!(encoded(&mixed), b"PROXY TCP6 ::ffff:192.0.2.1 2001:db8::2 1 2\r\n");
        let by_hand = Addresses::Inet {
            source: "192.0.2.1:1".parse().expect("an address"),
            destination: "[2001:db8::2]:2".parse().expect("an address"),
            transport: Transport::Stream,
        };
        assert_eq!(encoded(&Header::proxy(Version::V1, by_hand.clone(), vec![])), encoded(&mixed));
        let mixed = Header { version: Version::V2, ..mixed };
        assert_eq!(encoded(&Header::proxy(Version::V2, by_hand, vec![])), encoded(&mixed));
    }

    #[test]
    fn every_value_of_every_byte_of_the_fixed_part() {
        let whole = v2_bytes(0x21, 0x11, &[1; 12]);
        for at in 0..14 {
            for value in 0..=255 {
                let mut bytes = whole.clone();
                bytes[at] = value;
                let expected = match (at, value) {
                    (0, b'P') => Err(DecodeError::V1Prefix { at: 1, byte: b'\n' }),
                    (0, byte) if byte != b'\r' => Err(DecodeError::NoHeader { byte }),
                    (..12, byte) if byte != whole[at] => Err(DecodeError::V2Signature { at, byte }),
                    (12, byte) if byte >> 4 != 2 => Err(DecodeError::V2Version { byte }),
                    (12, byte) if byte & 15 > 1 => Err(DecodeError::V2Command { byte }),
                    (13, byte) if byte >> 4 > 3 => Err(DecodeError::V2Family { byte }),
                    (13, byte) if byte & 15 > 2 => Err(DecodeError::V2Transport { byte }),
                    (13, family @ (0x21 | 0x22)) => Err(DecodeError::V2Length { length: 12, family, needed: 36 }),
                    (13, family @ (0x31 | 0x32)) => Err(DecodeError::V2Length { length: 12, family, needed: 216 }),
                    _ => Ok(()),
                };
                let known = if expected.is_ok() { whole.len() } else { 16 };
                for len in [known, whole.len()] {
                    assert_eq!(decode(&bytes[..len]).map(|_| ()), expected, "byte {at} = {value:#04x}, {len} bytes");
                }
                if let (Err(error), true) = (&expected, at < 14 && expected != Ok(())) {
                    let first = if matches!(error, DecodeError::V2Length { .. }) { 16 } else { error.at() + 1 };
                    assert_eq!(decode(&bytes[..first]), Err(error.clone()), "must be known after byte {first}");
                    assert!(decode(&bytes[..first - 1]).is_ok(), "cannot be known before byte {first}");
                }
                if let (12, 0x20) = (at, value) {
                    assert_eq!(complete(&bytes).command, Command::Local);
                }
            }
        }
    }

    #[test]
    fn local_takes_every_family_and_every_length() {
        for family in 0..=255 {
            for len in [0, 1, 2, 11, 12, 35, 36, 37, 216, 300] {
                let bytes = v2_bytes(0x20, family, &vec![0xff; len]);
                let header = complete(&bytes);
                assert_eq!((header.command, header.addresses.ends()), (Command::Local, None));
                assert_eq!(encoded(&header), bytes);
            }
        }
    }

    #[test]
    fn proxy_without_addresses_is_accepted_and_never_written() {
        for family in [0x00, 0x01, 0x02, 0x10, 0x20, 0x30] {
            for body in [&b""[..], b"\x04\0\x01x", b"no TLVs"] {
                let header = complete(&v2_bytes(0x21, family, body));
                assert_eq!((header.command, header.addresses.ends()), (Command::Proxy, None));
                assert_eq!(encoded(&header), v2_bytes(0x20, family, body));
            }
        }
        let header = Header::proxy(Version::V2, Addresses::Unknown, vec![]);
        assert_eq!(encoded(&header), v2_bytes(0x20, 0x00, b""));
        let local = Header { addresses: tcp("192.0.2.1:1", "192.0.2.2:2"), ..Header::local(vec![]) };
        assert_eq!(encoded(&local), v2_bytes(0x20, 0x00, b""));
    }

    #[test]
    fn unix_addresses() {
        let mut body = [0; 216];
        body[..8].copy_from_slice(b"/run/cli");
        body[108..].fill(b'x');
        for (family, transport) in [(0x31, Transport::Stream), (0x32, Transport::Dgram)] {
            let addresses = Addresses::Unix { source: b"/run/cli".into(), destination: vec![b'x'; 108], transport };
            pins(Header::proxy(Version::V2, addresses, vec![]), &v2_bytes(0x21, family, &body));
        }
    }

    #[test]
    fn every_tlv_both_ways() {
        let text = String::from;
        let ssl = vec![
            SslTlv::Version(text("TLSv1.3")),
            SslTlv::CommonName(text("example.com")),
            SslTlv::Cipher(text("TLS_AES_128_GCM_SHA256")),
            SslTlv::SigAlg(text("RSA-SHA256")),
            SslTlv::KeyAlg(text("RSA2048")),
            SslTlv::Group(text("secp256r1")),
            SslTlv::SigScheme(text("rsa_pss_rsae_sha256")),
            SslTlv::ClientCert(vec![0x30, 0x82]),
            SslTlv::Custom { kind: 0x29, value: vec![0xff] },
        ];
        let ssl_hex = "20 0078 07 00000001 210007\"TLSv1.3\" 22000b\"example.com\" 230016\"TLS_AES_128_GCM_SHA256\" \
                       24000a\"RSA-SHA256\" 250007\"RSA2048\" 260009\"secp256r1\" 270013\"rsa_pss_rsae_sha256\" \
                       280002 3082 290001 ff";
        let cases = [
            (Tlv::Alpn(b"h2".into()), "01 0002 \"h2\""),
            (Tlv::Authority(text("example.com")), "02 000b \"example.com\""),
            (Tlv::Noop(vec![]), "04 0000"),
            (Tlv::Noop(vec![1, 2]), "04 0002 0102"),
            (Tlv::UniqueId(b"01ARZ3".into()), "05 0006 \"01ARZ3\""),
            (Tlv::Ssl { client: 7, verify: 1, tlvs: ssl }, ssl_hex),
            (Tlv::Netns(text("blue")), "30 0004 \"blue\""),
            (Tlv::GcpPscConnectionId(0x0102_0304_0506_0708), "e0 0008 0102030405060708"),
            (Tlv::AwsVpcEndpoint(text("vpce-0a1b")), "ea 000a 01 \"vpce-0a1b\""),
            (Tlv::AzureLinkId(0x0102_0304), "ee 0005 01 04030201"),
            (Tlv::Custom { kind: 0xe4, value: b"edge-1".into() }, "e4 0006 \"edge-1\""),
            // What does not have the form of its type stays as it is.
            (Tlv::Custom { kind: 0x02, value: vec![0xff] }, "02 0001 ff"),
            (Tlv::Custom { kind: 0x05, value: vec![0; 129] }, &format!("05 0081 {}", "00".repeat(129))),
            (Tlv::Custom { kind: 0x20, value: vec![0; 4] }, "20 0004 00000000"),
            (Tlv::Custom { kind: 0x20, value: vec![0; 6] }, "20 0006 000000000000"),
            (Tlv::Custom { kind: 0xe0, value: vec![1] }, "e0 0001 01"),
            (Tlv::Custom { kind: 0xea, value: vec![2, b'x'] }, "ea 0002 02 \"x\""),
            (Tlv::Custom { kind: 0xea, value: vec![] }, "ea 0000"),
            (Tlv::Custom { kind: 0xee, value: vec![1, 2] }, "ee 0002 0102"),
        ];
        let addresses = tcp("192.0.2.1:1", "192.0.2.2:2");
        for (tlv, text) in cases {
            let bytes = hex(text);
            assert_eq!(tlv.encoded_len(), bytes.len(), "{tlv:?}");
            let body = [&hex("c0000201 c0000202 0001 0002"), &bytes[..]].concat();
            let header = Header::proxy(Version::V2, addresses.clone(), vec![tlv]);
            assert_eq!(encoded_len(Version::V2, false, &header.tlvs), 16 + body.len());
            pins(header, &v2_bytes(0x21, 0x11, &body));
        }
    }

    #[test]
    fn a_wrong_checksum_is_rejected_wherever_it_stands() {
        let custom = |kind| Tlv::Custom { kind, value: b"some bytes".into() };
        for at in 0..3 {
            let mut tlvs = vec![custom(0xe1), custom(0xe2)];
            tlvs.insert(at, Tlv::Crc32c);
            let header = Header::proxy(Version::V2, tcp("[2001:db8::1]:1", "[2001:db8::2]:2"), tlvs);
            let bytes = encoded(&header);
            assert_eq!(complete(&bytes), header);
            for bit in 16 * 8..52 * 8 {
                let mut bytes = bytes.clone();
                bytes[bit / 8] ^= 1 << (bit % 8);
                let error = decode(&bytes).expect_err("one bit is wrong");
                assert!(matches!(error, DecodeError::Crc32c { .. }), "{error:?}");
            }
        }
        let bytes = encoded(&Header::local(vec![Tlv::Crc32c]));
        let wrong = [&bytes[..19], &[0; 4]].concat();
        assert!(matches!(decode(&wrong), Err(DecodeError::Crc32c { at: 16, found: 0, .. })));
    }

    #[test]
    fn tlvs_that_do_not_fit_are_known_to_be_wrong_at_once() {
        let address = hex("c0000201 c0000202 0001 0002");
        let cases = [
            ("01 0003 0000", 31, DecodeError::TlvLength { at: 28, kind: 1, length: 3, left: 2 }),
            ("01", 16, DecodeError::TlvStub { at: 28, left: 1 }),
            ("04 0000 ffff", 31, DecodeError::TlvStub { at: 31, left: 2 }),
            ("03 0003 000000", 31, DecodeError::Crc32cLength { at: 28, length: 3 }),
            ("03 0004 00000000 03 0004 00000000", 38, DecodeError::DuplicateCrc32c { at: 35 }),
        ];
        for (tlvs, known_after, error) in cases {
            let bytes = v2_bytes(0x21, 0x11, &[&address[..], &hex(tlvs)].concat());
            assert_eq!(decode(&bytes), Err(error.clone()));
            assert_eq!(decode(&bytes[..known_after]), Err(error));
            assert!(matches!(decode(&bytes[..known_after - 1]), Ok(Decoded::Incomplete { .. })));
        }
        let short = DecodeError::V2Length { length: 11, family: 0x11, needed: 12 };
        assert_eq!(decode(&v2_bytes(0x21, 0x11, &[0; 11])[..16]), Err(short));
    }

    #[test]
    fn v1_lines_that_are_wrong_and_when_that_is_known() {
        // The line up to the first byte that proves it wrong.
        let wrong = [
            "PROXYX",
            "PROXY T4",
            "PROXY TCP5",
            "PROXY TCP44",
            "PROXY t",
            "PROXY  ",
            "PROXY UNKNOWNX",
            "PROXY UNKNOWN x\n",
            "PROXY UNKNOWN\rX",
            "PROXY TCP4  ",
            "PROXY TCP4 :",
            "PROXY TCP4 256",
            "PROXY TCP4 01",
            "PROXY TCP4 1.2.3.4.",
            "PROXY TCP4 1.2.3 ",
            "PROXY TCP4 1.2.3.4\r",
            "PROXY TCP4 1.2.3.4 5.6.7.8\n",
            "PROXY TCP4 1.2.3.4 5.6.7.8  ",
            "PROXY TCP4 1.2.3.4 5.6.7.8 +",
            "PROXY TCP4 1.2.3.4 5.6.7.8 01",
            "PROXY TCP4 1.2.3.4 5.6.7.8 65536",
            "PROXY TCP4 1.2.3.4 5.6.7.8 1\r",
            "PROXY TCP4 1.2.3.4 5.6.7.8 1 -",
            "PROXY TCP4 1.2.3.4 5.6.7.8 1 2 ",
            "PROXY TCP4 1.2.3.4 5.6.7.8 1 2\n",
            "PROXY TCP4 1.2.3.4 5.6.7.8 1 2\rX",
            "PROXY TCP4 1.2.3.4 5.6.7.8 1 \r",
            "PROXY TCP4 1.2.3.4 5.6.7.8 1 00",
            "PROXY TCP4 1.2.3.4 2:",
            "PROXY TCP6 1.",
            "PROXY TCP6 12345",
            "PROXY TCP6 :1",
            "PROXY TCP6 :::",
            "PROXY TCP6 1::2::",
            "PROXY TCP6 1:2:3:4:5:6:7:8:",
            "PROXY TCP6 fe80::1%",
            "PROXY TCP6 ::ffff:1.2.3.256",
            "PROXY TCP6 ::1 1.",
            "PROXY TCP6 g",
        ];
        for line in wrong {
            let (last, start) = line.as_bytes().split_last().expect("not empty");
            assert!(matches!(decode(start), Ok(Decoded::Incomplete { .. })), "{:?}: {:?}", line, decode(start));
            let error = decode(line.as_bytes()).expect_err(line);
            assert!(error.at() < line.len(), "{line:?}: {error} after {last}");
        }
        let long = format!("PROXY UNKNOWN {}", "x".repeat(93));
        assert_eq!(decode(&long.as_bytes()[..106]), Err(DecodeError::V1TooLong));
        assert_eq!(decode(long.as_bytes()), Err(DecodeError::V1TooLong));
        assert_eq!(decode(&long.as_bytes()[..105]), Ok(Decoded::Incomplete { needed: 2 }));
    }

    #[test]
    fn v1_unknown_ignores_the_rest_of_the_line() {
        let rest = [
            "",
            " ",
            " TCP4 x y",
            " ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff 65535 65535",
        ];
        for rest in rest {
            let header = complete(format!("PROXY UNKNOWN{rest}\r\n").as_bytes());
            assert_eq!(header, Header::proxy(Version::V1, Addresses::Unknown, vec![]));
            assert_eq!(encoded(&header), b"PROXY UNKNOWN\r\n");
        }
    }

    #[test]
    fn v1_limits_of_the_specification() {
        let longest4 = "PROXY TCP4 255.255.255.255 255.255.255.255 65535 65535\r\n";
        assert_eq!((longest4.len(), encoded_len(Version::V1, false, &[])), (56, 56));
        let v6 = "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff";
        let longest6 = format!("PROXY TCP6 {v6} {v6} 65535 65535\r\n");
        assert_eq!((longest6.len(), encoded_len(Version::V1, true, &[])), (104, 104));
        for line in [longest4, &longest6, "PROXY TCP4 0.0.0.0 0.0.0.0 0 0\r\n", "PROXY TCP6 :: ::1 0 0\r\n"] {
            assert_eq!(encoded(&complete(line.as_bytes())), line.as_bytes());
        }
    }

    #[test]
    fn what_cannot_be_written_leaves_the_buffer_alone() {
        let addresses = tcp("192.0.2.1:1", "192.0.2.2:2");
        let v2 = |tlvs| Header::proxy(Version::V2, addresses.clone(), tlvs);
        let custom = |kind, len| Tlv::Custom { kind, value: vec![0; len] };
        let dgram = Addresses::inet(([192, 0, 2, 1], 1).into(), ([192, 0, 2, 2], 2).into(), Transport::Dgram);
        let unix = Addresses::Unix { source: vec![b'x'; 109], destination: vec![], transport: Transport::Stream };
        let cases = [
            (Header { version: Version::V1, ..Header::local(vec![]) }, EncodeError::V1Local),
            (Header { version: Version::V1, ..v2(vec![Tlv::Crc32c]) }, EncodeError::V1Tlvs { count: 1 }),
            (Header::proxy(Version::V1, dgram, vec![]), EncodeError::V1Dgram),
            (Header::proxy(Version::V1, unix.clone(), vec![]), EncodeError::V1Unix),
            (Header::proxy(Version::V2, unix, vec![]), EncodeError::UnixPathTooLong { len: 109 }),
            (v2(vec![custom(0xe4, 65_536)]), EncodeError::TlvTooLong { kind: 0xe4, len: 65_536 }),
            (v2(vec![custom(0xe4, 65_521)]), EncodeError::TooLong { len: 65_536 }),
            (v2(vec![custom(0x03, 4)]), EncodeError::CustomCrc32c),
            (v2(vec![Tlv::Crc32c, Tlv::Crc32c]), EncodeError::DuplicateCrc32c),
            (v2(vec![Tlv::UniqueId(vec![0; 129])]), EncodeError::UniqueIdTooLong { len: 129 }),
        ];
        for (header, error) in cases {
            let mut out = b"before".to_vec();
            assert_eq!(header.encode(&mut out), Err(error));
            assert_eq!(out, b"before");
        }
        let longest = encoded(&v2(vec![custom(0xe4, 65_520)]));
        assert_eq!(longest.len(), HEADER_BYTES_MAX);
        assert_eq!(complete(&longest).tlvs.len(), 1);
    }

    #[test]
    fn pieces_of_encoded_tlvs_make_the_same_header() {
        let tlvs = vec![Tlv::Crc32c, Tlv::UniqueId(b"id".into()), Tlv::AwsVpcEndpoint("vpce-0a1b".into())];
        let mut pieces = [vec![], vec![], vec![]];
        for (piece, tlv) in pieces.iter_mut().zip(&tlvs) {
            tlv.encode(piece).expect("a short TLV");
        }
        let header = Header::proxy(Version::V2, tcp("192.0.2.1:1", "192.0.2.2:2"), tlvs);
        let mut out = b"before".to_vec();
        let pieces: Vec<&[u8]> = pieces.iter().map(Vec::as_slice).collect();
        v2::encode_with(&mut out, Command::Proxy, &header.addresses, &pieces).expect("a short header");
        assert_eq!(out[6..], encoded(&header));
    }
}
