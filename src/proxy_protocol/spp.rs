//! Cloudflare's Simple Proxy Protocol for UDP: 38 bytes before the payload of each datagram, to bytes and back.
//!
//! Magic 0x56EC, the client's address, the proxy's, the client's port, the proxy's; all big-endian, each address 16
//! bytes, an IPv4 one as `::ffff:a.b.c.d`. There is no version, no checksum and nothing for TCP.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};

use thiserror::Error;

/// What it begins with.
pub const MAGIC: [u8; 2] = [0x56, 0xec];

/// Every one is as long as this.
pub const HEADER_BYTES: usize = 38;

/// What one says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Spp {
    /// Who sent the datagram.
    pub client: SocketAddr,
    /// The address of the proxy that it was sent to.
    pub local: SocketAddr,
}

/// Why bytes do not begin with one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum SppError {
    /// The first bytes are others.
    #[error("no Simple Proxy Protocol header: it begins with 56ec")]
    Magic,
    /// The magic is right, but the datagram ends within the header.
    #[error("Simple Proxy Protocol: {len} bytes came, but the header alone has 38")]
    Short {
        /// Bytes of the datagram.
        len: usize,
    },
}

/// Appends the header. Every pair of addresses has one; flow labels and scopes, which it cannot carry, are dropped.
pub fn encode(out: &mut Vec<u8>, client: SocketAddr, local: SocketAddr) {
    out.extend(MAGIC);
    out.extend(super::to_v6(client.ip()).octets());
    out.extend(super::to_v6(local.ip()).octets());
    out.extend(client.port().to_be_bytes());
    out.extend(local.port().to_be_bytes());
}

/// Reads the header of a whole datagram; the payload follows after `HEADER_BYTES`.
pub fn decode(datagram: &[u8]) -> Result<Spp, SppError> {
    if !datagram.starts_with(&MAGIC) {
        return Err(SppError::Magic);
    }
    let Some(header) = datagram.first_chunk::<HEADER_BYTES>() else {
        return Err(SppError::Short { len: datagram.len() });
    };
    let address = |at: usize, port: usize| {
        let ip = Ipv6Addr::from(<[u8; 16]>::try_from(&header[at..at + 16]).expect("a slice of 16 bytes"));
        let port = u16::from_be_bytes([header[port], header[port + 1]]);
        SocketAddr::new(IpAddr::V6(ip).to_canonical(), port)
    };
    Ok(Spp { client: address(2, 34), local: address(18, 36) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn address(text: &str) -> SocketAddr {
        text.parse().expect("an address")
    }

    fn encoded(client: &str, local: &str) -> Vec<u8> {
        let mut out = Vec::new();
        encode(&mut out, address(client), address(local));
        out
    }

    const MAPPED: [u8; 12] = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff];

    #[test]
    fn vector_ipv4() {
        let bytes =
            [&[0x56, 0xec][..], &MAPPED, &[192, 0, 2, 7], &MAPPED, &[203, 0, 113, 9], &[0x12, 0x34, 0, 53]].concat();
        assert_eq!((bytes.len(), encoded("192.0.2.7:4660", "203.0.113.9:53")), (38, bytes.clone()));
        // The same on a dual-stack socket, which says IPv4 so.
        assert_eq!(encoded("[::ffff:192.0.2.7]:4660", "[::ffff:203.0.113.9]:53"), bytes);
        let expected = Spp { client: address("192.0.2.7:4660"), local: address("203.0.113.9:53") };
        assert_eq!(decode(&[&bytes[..], b"payload"].concat()), Ok(expected));
    }

    #[test]
    fn vector_ipv6() {
        let client = [0x20, 0x01, 0x0d, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x0a];
        let local = [0xfe, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x01];
        let bytes = [&[0x56, 0xec][..], &client, &local, &[0xff, 0xff, 0x01, 0xbb]].concat();
        assert_eq!(encoded("[2001:db8::a]:65535", "[fe80::1%3]:443"), bytes);
        let expected = Spp { client: address("[2001:db8::a]:65535"), local: address("[fe80::1]:443") };
        assert_eq!(decode(&bytes), Ok(expected));
    }

    #[test]
    fn the_families_need_not_be_the_same() {
        let mixed = Spp { client: address("192.0.2.7:1"), local: address("[2001:db8::2]:2") };
        assert_eq!(decode(&encoded("192.0.2.7:1", "[2001:db8::2]:2")), Ok(mixed));
    }

    #[test]
    fn appends_behind_what_is_there() {
        let mut out = b"before".to_vec();
        encode(&mut out, address("192.0.2.7:1"), address("192.0.2.8:2"));
        assert_eq!(out.len(), 6 + HEADER_BYTES);
        assert!(out.starts_with(b"before\x56\xec"));
    }

    #[test]
    fn truncated_at_every_length() {
        let bytes = encoded("192.0.2.7:4660", "203.0.113.9:53");
        for len in 0..bytes.len() {
            let expected = if len < 2 { SppError::Magic } else { SppError::Short { len } };
            assert_eq!(decode(&bytes[..len]), Err(expected), "{len} bytes");
        }
    }

    #[test]
    fn every_value_of_both_bytes_of_the_magic() {
        for at in 0..2 {
            for value in 0..=255 {
                let mut bytes = encoded("192.0.2.7:4660", "203.0.113.9:53");
                bytes[at] = value;
                assert_eq!(decode(&bytes).is_ok(), value == MAGIC[at], "byte {at} = {value:#04x}");
            }
        }
    }

    /// A receiver that takes both tells them apart by the first byte.
    #[test]
    fn neither_reader_takes_the_others_header() {
        let spp = encoded("192.0.2.7:4660", "203.0.113.9:53");
        assert_eq!(
            crate::proxy_protocol::decode(&spp),
            Err(crate::proxy_protocol::DecodeError::NoHeader { byte: 0x56 })
        );
        assert_eq!(decode(b"\r\n\r\n\0\r\nQUIT\n\x20\0\0\0"), Err(SppError::Magic));
        assert_eq!(decode(b"PROXY UNKNOWN\r\n"), Err(SppError::Magic));
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn any_38_bytes_with_the_magic_come_out_as_they_went_in(rest in any::<[u8; 36]>(), payload in any::<Vec<u8>>()) {
            let bytes = [&MAGIC[..], &rest].concat();
            let Spp { client, local } = decode(&[&bytes[..], &payload].concat()).expect("a header");
            let mut out = Vec::new();
            encode(&mut out, client, local);
            prop_assert_eq!(out, bytes);
        }

        #[test]
        fn no_bytes_make_it_panic(bytes in any::<Vec<u8>>()) {
            let _ = decode(&bytes);
        }
    }
}
