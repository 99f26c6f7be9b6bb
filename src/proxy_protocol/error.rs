//! What can be wrong with a header: one variant a rule, in the specification's words, with the offending value inside.

use thiserror::Error;

/// Why a header cannot be written.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum EncodeError {
    /// v1 has no LOCAL (section 2.1).
    #[error("v1 has no LOCAL command; send the connection's own addresses with PROXY, or use v2")]
    V1Local,
    /// v1 has no TLVs.
    #[error("v1 cannot carry TLVs, and there are {count}; use v2")]
    V1Tlvs {
        /// How many were given.
        count: usize,
    },
    /// v1 has no UDP.
    #[error("v1 knows TCP only; use v2 for datagrams")]
    V1Dgram,
    /// v1 has no UNIX addresses.
    #[error("v1 has no UNIX addresses; use v2")]
    V1Unix,
    /// Longer than the length field of a TLV can say.
    #[error("TLV 0x{kind:02x} has a value of {len} bytes; at most 65535 fit")]
    TlvTooLong {
        /// Type of the TLV.
        kind: u8,
        /// Bytes of its value.
        len: usize,
    },
    /// Section 2.2.5: at most 128 bytes.
    #[error("UNIQUE_ID has {len} bytes; at most 128 are allowed")]
    UniqueIdTooLong {
        /// Its bytes.
        len: usize,
    },
    /// A checksum given as bytes would be wrong: it is computed.
    #[error("TLV type 0x03 is the checksum, which is computed; it cannot be given as a custom TLV")]
    CustomCrc32c,
    /// No two checksums can both be right.
    #[error("two CRC32C TLVs; only one can be right")]
    DuplicateCrc32c,
    /// `sun_path` has 108 bytes.
    #[error("UNIX path of {len} bytes; at most 108 fit")]
    UnixPathTooLong {
        /// Its bytes.
        len: usize,
    },
    /// Longer than the length field of the header can say.
    #[error("addresses and TLVs have {len} bytes; at most 65535 fit")]
    TooLong {
        /// Bytes after the first 16.
        len: usize,
    },
}

/// Why bytes are not a valid header. `at` counts from 0.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum DecodeError {
    /// The first byte begins neither version.
    #[error("no PROXY header: it begins with `PROXY` (v1) or 0x0d (v2), not with 0x{byte:02x}")]
    NoHeader {
        /// The first byte.
        byte: u8,
    },
    /// Began like v1 but is not `PROXY `.
    #[error("no PROXY header: byte {at} is 0x{byte:02x}, which is not `PROXY ` followed by TCP4, TCP6 or UNKNOWN")]
    V1Prefix {
        /// Where it differs.
        at: usize,
        /// What stands there.
        byte: u8,
    },
    /// Neither TCP4, TCP6 nor UNKNOWN.
    #[error("v1: byte {at} is 0x{byte:02x}, but the protocol must be TCP4, TCP6 or UNKNOWN and one space")]
    V1Protocol {
        /// Where it differs.
        at: usize,
        /// What stands there.
        byte: u8,
    },
    /// Not an address of the family that the line announced.
    #[error("v1: {field} at byte {at} is {text:?}, which is not {expected}")]
    V1Address {
        /// Where the field begins.
        at: usize,
        /// Which one.
        field: &'static str,
        /// What stands there.
        text: String,
        /// What should.
        expected: &'static str,
    },
    /// Not a decimal number of 0 to 65535 without sign and leading zeros.
    #[error(
        "v1: {field} at byte {at} is {text:?}, which is not a number from 0 to 65535 without sign or leading zeros"
    )]
    V1Port {
        /// Where the field begins.
        at: usize,
        /// Which one.
        field: &'static str,
        /// What stands there.
        text: String,
    },
    /// CR without LF, LF without CR, or a line end in the middle.
    #[error("v1: byte {at} is 0x{byte:02x}, but the line must end in CR LF after its last field, and only there")]
    V1LineEnd {
        /// Where.
        at: usize,
        /// What stands there.
        byte: u8,
    },
    /// Section 2.1: no CRLF in the first 107 bytes.
    #[error("v1: no CR LF within the first 107 bytes")]
    V1TooLong,
    /// Began like v2 but is not its signature.
    #[error("no PROXY header: byte {at} is 0x{byte:02x}, which differs from the v2 signature")]
    V2Signature {
        /// Where it differs.
        at: usize,
        /// What stands there.
        byte: u8,
    },
    /// The high nibble of byte 12 is not 2.
    #[error("v2: byte 12 is 0x{byte:02x}; its high nibble, the version, must be 2")]
    V2Version {
        /// The byte.
        byte: u8,
    },
    /// The low nibble of byte 12 is neither 0 nor 1.
    #[error("v2: byte 12 is 0x{byte:02x}; its low nibble, the command, must be 0 (LOCAL) or 1 (PROXY)")]
    V2Command {
        /// The byte.
        byte: u8,
    },
    /// The high nibble of byte 13 is over 3.
    #[error("v2: byte 13 is 0x{byte:02x}; its high nibble, the address family, must be 0 to 3")]
    V2Family {
        /// The byte.
        byte: u8,
    },
    /// The low nibble of byte 13 is over 2.
    #[error("v2: byte 13 is 0x{byte:02x}; its low nibble, the transport, must be 0 to 2")]
    V2Transport {
        /// The byte.
        byte: u8,
    },
    /// The length has no room for the addresses of the family.
    #[error("v2: the length at byte 14 is {length}, but the addresses of family 0x{family:02x} alone need {needed}")]
    V2Length {
        /// The length field.
        length: usize,
        /// Byte 13.
        family: u8,
        /// Bytes of the address block.
        needed: usize,
    },
    /// A TLV says that it is longer than what is left of the header.
    #[error("v2: TLV 0x{kind:02x} at byte {at} says {length} bytes, but {left} are left in the header")]
    TlvLength {
        /// Where the TLV begins.
        at: usize,
        /// Its type.
        kind: u8,
        /// Its length field.
        length: usize,
        /// Bytes from its value to the end of the header.
        left: usize,
    },
    /// One or two bytes stand behind the last TLV.
    #[error("v2: {left} byte(s) at byte {at} are left behind the last TLV; a TLV has at least 3")]
    TlvStub {
        /// Where they begin.
        at: usize,
        /// How many.
        left: usize,
    },
    /// CRC32C must have 4 bytes.
    #[error("v2: CRC32C at byte {at} has {length} bytes instead of 4")]
    Crc32cLength {
        /// Where the TLV begins.
        at: usize,
        /// Its length field.
        length: usize,
    },
    /// A second CRC32C.
    #[error("v2: a second CRC32C at byte {at}")]
    DuplicateCrc32c {
        /// Where the second TLV begins.
        at: usize,
    },
    /// Section 2.2.2: the receiver must reject.
    #[error("v2: CRC32C at byte {at} says {found:08x}, but the header's checksum is {computed:08x}")]
    Crc32c {
        /// Where the TLV begins.
        at: usize,
        /// What the header says.
        found: u32,
        /// What it should say.
        computed: u32,
    },
}

impl DecodeError {
    /// The bytes don't even begin like a header: most likely the client's own.
    pub fn is_no_header(&self) -> bool {
        matches!(self, DecodeError::NoHeader { .. } | DecodeError::V1Prefix { .. } | DecodeError::V2Signature { .. })
    }

    /// Where the error is, counted from 0.
    pub fn at(&self) -> usize {
        match *self {
            DecodeError::NoHeader { .. } => 0,
            DecodeError::V1Prefix { at, .. }
            | DecodeError::V1Protocol { at, .. }
            | DecodeError::V1Address { at, .. }
            | DecodeError::V1Port { at, .. }
            | DecodeError::V1LineEnd { at, .. }
            | DecodeError::V2Signature { at, .. }
            | DecodeError::TlvLength { at, .. }
            | DecodeError::TlvStub { at, .. }
            | DecodeError::Crc32cLength { at, .. }
            | DecodeError::DuplicateCrc32c { at }
            | DecodeError::Crc32c { at, .. } => at,
            DecodeError::V1TooLong => super::v1::LINE_BYTES_MAX,
            DecodeError::V2Version { .. } | DecodeError::V2Command { .. } => 12,
            DecodeError::V2Family { .. } | DecodeError::V2Transport { .. } => 13,
            DecodeError::V2Length { .. } => 14,
        }
    }
}
