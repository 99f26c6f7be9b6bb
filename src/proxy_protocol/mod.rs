//! The PROXY protocol, versions 1 and 2: what a header says, to bytes and back. Pure: no I/O, no clock.

pub mod tlv;
pub mod v1;
pub mod v2;

use std::net::SocketAddr;

pub use tlv::Tlv;

/// Longest v2 header: 16 bytes and a 16-bit length (section 2.2).
pub const HEADER_BYTES_MAX: usize = 16 + 65_535;

/// Which version of the header is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Version {
    /// One line of text.
    V1,
    /// Binary, with TLVs.
    V2,
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
