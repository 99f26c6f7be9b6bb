//! TLVs: typed values to bytes and back, and the walk over encoded ones (sections 2.2.1 to 2.2.8).
//!
//! A value that does not have the form of its type (0xEA with another sub-type, an AUTHORITY that is not UTF-8) is kept
//! as `Custom`, so that what was decoded is written again byte for byte.

use super::error::{DecodeError, EncodeError};

/// Application protocol, as negotiated by ALPN.
pub const ALPN: u8 = 0x01;
/// Host name that the client asked for.
pub const AUTHORITY: u8 = 0x02;
/// Checksum of the header.
pub const CRC32C: u8 = 0x03;
/// Padding.
pub const NOOP: u8 = 0x04;
/// Identifier of the connection.
pub const UNIQUE_ID: u8 = 0x05;
/// What the front end knows of TLS.
pub const SSL: u8 = 0x20;
/// Network namespace.
pub const NETNS: u8 = 0x30;
/// GCP Private Service Connect.
pub const GCP: u8 = 0xE0;
/// AWS.
pub const AWS: u8 = 0xEA;
/// Azure.
pub const AZURE: u8 = 0xEE;

/// Type and length.
pub const TLV_PREFIX_BYTES: usize = 3;
/// Section 2.2.5.
pub const UNIQUE_ID_BYTES_MAX: usize = 128;
/// The only sub-type of 0xEA and of 0xEE that is in use.
const SUBTYPE: u8 = 0x01;

/// One TLV.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Tlv {
    /// 0x01: the protocol negotiated by ALPN.
    Alpn(Vec<u8>),
    /// 0x02: the host name that the client asked for (SNI).
    Authority(String),
    /// 0x03: the checksum of the header; computed when the header is written, verified when it is read.
    Crc32c,
    /// 0x04: padding.
    Noop(Vec<u8>),
    /// 0x05: opaque, 128 bytes at most.
    UniqueId(Vec<u8>),
    /// 0x20: what the front end knows of TLS.
    Ssl {
        /// Bits: 1 TLS, 2 certificate on this connection, 4 certificate in this session.
        client: u8,
        /// 0 only if the client presented a certificate and it was verified.
        verify: u32,
        /// In the order written.
        tlvs: Vec<SslTlv>,
    },
    /// 0x30: name of the network namespace.
    Netns(String),
    /// 0xEA, sub-type 1: AWS VPC endpoint ID.
    AwsVpcEndpoint(String),
    /// 0xEE, sub-type 1: Azure private endpoint LINKID.
    AzureLinkId(u32),
    /// 0xE0: GCP Private Service Connect connection id.
    GcpPscConnectionId(u64),
    /// Any other, and values that don't have the form of their type.
    Custom {
        /// Type.
        kind: u8,
        /// Value.
        value: Vec<u8>,
    },
}

/// A TLV within the SSL TLV.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SslTlv {
    /// 0x21: "TLSv1.3".
    Version(String),
    /// 0x22: common name of the client's certificate.
    CommonName(String),
    /// 0x23: cipher.
    Cipher(String),
    /// 0x24: signature algorithm of the front end's certificate, "RSA-SHA256".
    SigAlg(String),
    /// 0x25: key algorithm of the front end's certificate, "RSA2048".
    KeyAlg(String),
    /// 0x26: key exchange group, "secp256r1".
    Group(String),
    /// 0x27: signature scheme, "rsa_pss_rsae_sha256".
    SigScheme(String),
    /// 0x28: the client's certificate, DER.
    ClientCert(Vec<u8>),
    /// Any other, and text that is not UTF-8.
    Custom {
        /// Sub-type.
        kind: u8,
        /// Value.
        value: Vec<u8>,
    },
}

impl Tlv {
    /// The type byte.
    pub fn kind(&self) -> u8 {
        match self {
            Tlv::Alpn(_) => ALPN,
            Tlv::Authority(_) => AUTHORITY,
            Tlv::Crc32c => CRC32C,
            Tlv::Noop(_) => NOOP,
            Tlv::UniqueId(_) => UNIQUE_ID,
            Tlv::Ssl { .. } => SSL,
            Tlv::Netns(_) => NETNS,
            Tlv::AwsVpcEndpoint(_) => AWS,
            Tlv::AzureLinkId(_) => AZURE,
            Tlv::GcpPscConnectionId(_) => GCP,
            Tlv::Custom { kind, .. } => *kind,
        }
    }

    /// Appends type, length and value. A checksum is four zeros here: only the whole header has one.
    /// After an error `out` is as it was.
    pub fn encode(&self, out: &mut Vec<u8>) -> Result<(), EncodeError> {
        match self {
            Tlv::Alpn(value) | Tlv::Noop(value) => encode_raw(self.kind(), value, out),
            Tlv::Authority(text) | Tlv::Netns(text) => encode_raw(self.kind(), text.as_bytes(), out),
            Tlv::Crc32c => encode_raw(CRC32C, &[0; 4], out),
            Tlv::UniqueId(id) if id.len() > UNIQUE_ID_BYTES_MAX => Err(EncodeError::UniqueIdTooLong { len: id.len() }),
            Tlv::UniqueId(id) => encode_raw(UNIQUE_ID, id, out),
            Tlv::Ssl { client, verify, tlvs } => {
                let mut value = vec![*client];
                value.extend_from_slice(&verify.to_be_bytes());
                for tlv in tlvs {
                    let (kind, bytes) = tlv.parts();
                    encode_raw(kind, bytes, &mut value)?;
                }
                encode_raw(SSL, &value, out)
            }
            Tlv::AwsVpcEndpoint(id) => encode_raw(AWS, &[&[SUBTYPE], id.as_bytes()].concat(), out),
            // Little-endian, unlike everything else in the header: so Azure documents it.
            Tlv::AzureLinkId(id) => encode_raw(AZURE, &[&[SUBTYPE][..], &id.to_le_bytes()].concat(), out),
            Tlv::GcpPscConnectionId(id) => encode_raw(GCP, &id.to_be_bytes(), out),
            Tlv::Custom { kind: CRC32C, .. } => Err(EncodeError::CustomCrc32c),
            Tlv::Custom { kind, value } => encode_raw(*kind, value, out),
        }
    }

    /// Bytes that `encode` appends.
    pub fn encoded_len(&self) -> usize {
        let value = match self {
            Tlv::Alpn(value) | Tlv::Noop(value) | Tlv::UniqueId(value) | Tlv::Custom { value, .. } => value.len(),
            Tlv::Authority(text) | Tlv::Netns(text) => text.len(),
            Tlv::Crc32c => 4,
            Tlv::Ssl { tlvs, .. } => 5 + tlvs.iter().map(|tlv| TLV_PREFIX_BYTES + tlv.parts().1.len()).sum::<usize>(),
            Tlv::AwsVpcEndpoint(id) => 1 + id.len(),
            Tlv::AzureLinkId(_) => 5,
            Tlv::GcpPscConnectionId(_) => 8,
        };
        TLV_PREFIX_BYTES + value
    }

    /// What a type and a value mean. Never fails: what does not have the form of its type is `Custom`.
    pub fn from_raw(kind: u8, value: &[u8]) -> Tlv {
        let known = match kind {
            ALPN => Some(Tlv::Alpn(value.to_vec())),
            AUTHORITY => text(value).map(Tlv::Authority),
            CRC32C => Some(Tlv::Crc32c),
            NOOP => Some(Tlv::Noop(value.to_vec())),
            UNIQUE_ID if value.len() <= UNIQUE_ID_BYTES_MAX => Some(Tlv::UniqueId(value.to_vec())),
            SSL => ssl(value),
            NETNS => text(value).map(Tlv::Netns),
            AWS => match value {
                [SUBTYPE, id @ ..] if id.is_ascii() => text(id).map(Tlv::AwsVpcEndpoint),
                _ => None,
            },
            AZURE => match *value {
                [SUBTYPE, a, b, c, d] => Some(Tlv::AzureLinkId(u32::from_le_bytes([a, b, c, d]))),
                _ => None,
            },
            GCP => value.try_into().ok().map(|id| Tlv::GcpPscConnectionId(u64::from_be_bytes(id))),
            _ => None,
        };
        known.unwrap_or_else(|| Tlv::Custom { kind, value: value.to_vec() })
    }
}

/// Section 2.2.6. A sub-TLV that does not fit makes the whole value opaque.
fn ssl(value: &[u8]) -> Option<Tlv> {
    let (&[client, a, b, c, d], rest) = value.split_first_chunk()?;
    let tlvs = walk(rest, 0, rest.len()).map(|raw| raw.map(|raw| SslTlv::from_raw(raw.kind, raw.value)));
    Some(Tlv::Ssl { client, verify: u32::from_be_bytes([a, b, c, d]), tlvs: tlvs.collect::<Result<_, _>>().ok()? })
}

fn text(value: &[u8]) -> Option<String> {
    String::from_utf8(value.to_vec()).ok()
}

impl SslTlv {
    /// Sub-type and value.
    pub fn parts(&self) -> (u8, &[u8]) {
        match self {
            SslTlv::Version(text) => (0x21, text.as_bytes()),
            SslTlv::CommonName(text) => (0x22, text.as_bytes()),
            SslTlv::Cipher(text) => (0x23, text.as_bytes()),
            SslTlv::SigAlg(text) => (0x24, text.as_bytes()),
            SslTlv::KeyAlg(text) => (0x25, text.as_bytes()),
            SslTlv::Group(text) => (0x26, text.as_bytes()),
            SslTlv::SigScheme(text) => (0x27, text.as_bytes()),
            SslTlv::ClientCert(der) => (0x28, der),
            SslTlv::Custom { kind, value } => (*kind, value),
        }
    }

    /// What a sub-type and a value mean. Never fails.
    pub fn from_raw(kind: u8, value: &[u8]) -> SslTlv {
        let known = match kind {
            0x21 => text(value).map(SslTlv::Version),
            0x22 => text(value).map(SslTlv::CommonName),
            0x23 => text(value).map(SslTlv::Cipher),
            0x24 => text(value).map(SslTlv::SigAlg),
            0x25 => text(value).map(SslTlv::KeyAlg),
            0x26 => text(value).map(SslTlv::Group),
            0x27 => text(value).map(SslTlv::SigScheme),
            0x28 => Some(SslTlv::ClientCert(value.to_vec())),
            _ => None,
        };
        known.unwrap_or_else(|| SslTlv::Custom { kind, value: value.to_vec() })
    }
}

/// Appends type, length and value as they are; allocates only if `out` must grow.
pub fn encode_raw(kind: u8, value: &[u8], out: &mut Vec<u8>) -> Result<(), EncodeError> {
    let len = u16::try_from(value.len()).map_err(|_| EncodeError::TlvTooLong { kind, len: value.len() })?;
    out.push(kind);
    out.extend_from_slice(&len.to_be_bytes());
    out.extend_from_slice(value);
    Ok(())
}

/// The name of a type, for people.
pub fn name(kind: u8) -> &'static str {
    match kind {
        ALPN => "ALPN",
        AUTHORITY => "AUTHORITY",
        CRC32C => "CRC32C",
        NOOP => "NOOP",
        UNIQUE_ID => "UNIQUE_ID",
        SSL => "SSL",
        NETNS => "NETNS",
        GCP => "GCP",
        AWS => "AWS",
        AZURE => "AZURE",
        0xF8.. => "reserved",
        0xF0.. => "experimental",
        0xE1.. => "custom",
        _ => "unassigned",
    }
}

/// The name of a sub-type of SSL, for people.
pub fn ssl_name(kind: u8) -> &'static str {
    match kind {
        0x21 => "SSL_VERSION",
        0x22 => "SSL_CN",
        0x23 => "SSL_CIPHER",
        0x24 => "SSL_SIG_ALG",
        0x25 => "SSL_KEY_ALG",
        0x26 => "SSL_GROUP",
        0x27 => "SSL_SIG_SCHEME",
        0x28 => "SSL_CLIENT_CERT",
        _ => "unassigned",
    }
}

/// One TLV as it stands in the bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RawTlv<'a> {
    /// Where its type stands.
    pub at: usize,
    /// Type.
    pub kind: u8,
    /// Value; short only where the bytes given to `walk` end before the list does.
    pub value: &'a [u8],
    /// What the length field says.
    pub length: usize,
}

/// Walks the TLVs that stand from `start` to `end`, of which `bytes` may hold the first part only: the walk then ends
/// where the bytes do, but finds every error that they already prove. After an error it ends.
pub fn walk(bytes: &[u8], start: usize, end: usize) -> Walk<'_> {
    Walk { bytes: &bytes[..bytes.len().min(end)], at: start, end }
}

/// See `walk`.
#[derive(Clone, Debug)]
pub struct Walk<'a> {
    bytes: &'a [u8],
    at: usize,
    end: usize,
}

impl<'a> Iterator for Walk<'a> {
    type Item = Result<RawTlv<'a>, DecodeError>;

    fn next(&mut self) -> Option<Self::Item> {
        let at = self.at;
        if at >= self.end {
            return None;
        }
        let left = self.end - at;
        if left < TLV_PREFIX_BYTES {
            self.at = self.end;
            return Some(Err(DecodeError::TlvStub { at, left }));
        }
        let &[kind, high, low, ref rest @ ..] = self.bytes.get(at..)? else { return None };
        let length = usize::from(u16::from_be_bytes([high, low]));
        let left = left - TLV_PREFIX_BYTES;
        if length > left {
            self.at = self.end;
            return Some(Err(DecodeError::TlvLength { at, kind, length, left }));
        }
        self.at = at + TLV_PREFIX_BYTES + length;
        Some(Ok(RawTlv { at, kind, value: &rest[..length.min(rest.len())], length }))
    }
}
