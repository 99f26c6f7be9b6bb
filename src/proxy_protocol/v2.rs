//! Version 2: binary, with TLVs (section 2.2).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use super::error::{DecodeError, EncodeError};
use super::tlv::{self, Tlv};
use super::{Addresses, Command, Decoded, Header, Transport, Version, to_v6};

/// The first 12 bytes.
pub const SIGNATURE: [u8; 12] = *b"\r\n\r\n\0\r\nQUIT\n";
/// Signature, version and command, family, length.
pub const PREFIX_BYTES: usize = 16;
/// Address block of IPv4.
pub const INET_BYTES: usize = 12;
/// Address block of IPv6.
pub const INET6_BYTES: usize = 36;
/// Address block of UNIX.
pub const UNIX_BYTES: usize = 216;
/// One path of it.
const UNIX_PATH_BYTES: usize = 108;

/// Appends a header whose TLVs are encoded already, as whole TLVs in one or several pieces. The checksum is filled in
/// if there is a CRC32C TLV among them. Allocates only if `out` must grow; after an error `out` is as it was.
///
/// PROXY without addresses is written as LOCAL: HAProxy, Apache, Envoy and others refuse PROXY with UNSPEC.
pub fn encode_with(
    out: &mut Vec<u8>,
    command: Command,
    addresses: &Addresses,
    tlvs: &[&[u8]],
) -> Result<(), EncodeError> {
    let start = out.len();
    let result = encode_from(out, start, command, addresses, tlvs);
    if result.is_err() {
        out.truncate(start);
    }
    result
}

fn encode_from(
    out: &mut Vec<u8>,
    start: usize,
    command: Command,
    addresses: &Addresses,
    tlvs: &[&[u8]],
) -> Result<(), EncodeError> {
    out.extend_from_slice(&SIGNATURE);
    match (command, addresses) {
        // "the sender should use this family when sending LOCAL commands": family 0, no addresses.
        (Command::Local, Addresses::Inet { .. } | Addresses::Unix { .. }) | (_, Addresses::Unknown) => {
            out.extend_from_slice(&[0x20, 0x00, 0, 0]);
        }
        (_, Addresses::Skipped { family, bytes }) => {
            out.extend_from_slice(&[0x20, *family, 0, 0]);
            out.extend_from_slice(bytes);
        }
        (Command::Proxy, &Addresses::Inet { source, destination, transport }) => {
            inet_block(out, source, destination, transport);
        }
        (Command::Proxy, Addresses::Unix { source, destination, transport }) => {
            out.extend_from_slice(&[0x21, 0x30 | transport.nibble(), 0, 0]);
            for path in [source, destination] {
                let padding =
                    UNIX_PATH_BYTES.checked_sub(path.len()).ok_or(EncodeError::UnixPathTooLong { len: path.len() })?;
                out.extend_from_slice(path);
                out.resize(out.len() + padding, 0);
            }
        }
    }
    let tlvs_start = out.len();
    for piece in tlvs {
        out.extend_from_slice(piece);
    }
    let len = out.len() - start - PREFIX_BYTES;
    let field = u16::try_from(len).map_err(|_| EncodeError::TooLong { len })?;
    out[start + 14..start + PREFIX_BYTES].copy_from_slice(&field.to_be_bytes());
    fill_crc32c(out, start, tlvs_start)
}

fn inet_block(out: &mut Vec<u8>, source: SocketAddr, destination: SocketAddr, transport: Transport) {
    match (source.ip(), destination.ip()) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            out.extend_from_slice(&[0x21, 0x10 | transport.nibble(), 0, 0]);
            out.extend_from_slice(&source.octets());
            out.extend_from_slice(&destination.octets());
        }
        (source, destination) => {
            out.extend_from_slice(&[0x21, 0x20 | transport.nibble(), 0, 0]);
            out.extend_from_slice(&to_v6(source).octets());
            out.extend_from_slice(&to_v6(destination).octets());
        }
    }
    out.extend_from_slice(&source.port().to_be_bytes());
    out.extend_from_slice(&destination.port().to_be_bytes());
}

/// "calculated over the whole header with the CRC field zeroed" (section 2.2.3), so last of all.
fn fill_crc32c(out: &mut [u8], start: usize, tlvs_start: usize) -> Result<(), EncodeError> {
    let mut checksums = tlv::walk(out, tlvs_start, out.len()).flatten().filter(|raw| raw.kind == tlv::CRC32C);
    let Some(first) = checksums.next() else { return Ok(()) };
    if first.length != 4 {
        return Err(EncodeError::CustomCrc32c);
    }
    if checksums.next().is_some() {
        return Err(EncodeError::DuplicateCrc32c);
    }
    let at = first.at + tlv::TLV_PREFIX_BYTES;
    out[at..at + 4].fill(0);
    let crc = crc32c::crc32c(&out[start..]);
    out[at..at + 4].copy_from_slice(&crc.to_be_bytes());
    Ok(())
}

impl Transport {
    fn nibble(self) -> u8 {
        match self {
            Transport::Stream => 1,
            Transport::Dgram => 2,
        }
    }
}

/// Reads a header; `bytes` begins with the signature's first byte.
pub fn decode(bytes: &[u8]) -> Result<Decoded, DecodeError> {
    if let Some(at) = (0..bytes.len().min(SIGNATURE.len())).find(|&at| bytes[at] != SIGNATURE[at]) {
        return Err(DecodeError::V2Signature { at, byte: bytes[at] });
    }
    let command = match bytes.get(12) {
        None | Some(0x20) => Command::Local,
        Some(0x21) => Command::Proxy,
        Some(&byte) if byte >> 4 != 2 => return Err(DecodeError::V2Version { byte }),
        Some(&byte) => return Err(DecodeError::V2Command { byte }),
    };
    let family = Family::of(bytes.get(13).copied().unwrap_or(0), command)?;
    let Some(&[high, low]) = bytes.get(14..PREFIX_BYTES) else {
        return Ok(Decoded::Incomplete { needed: PREFIX_BYTES - bytes.len() });
    };
    let length = usize::from(u16::from_be_bytes([high, low]));
    let end = PREFIX_BYTES + length;
    let tlvs_start = PREFIX_BYTES + family.address_bytes();
    if tlvs_start > end {
        return Err(DecodeError::V2Length { length, family: family.byte, needed: family.address_bytes() });
    }
    if !family.skipped {
        check_tlvs(bytes, tlvs_start, end)?;
    }
    let Some(bytes) = bytes.get(..end) else {
        return Ok(Decoded::Incomplete { needed: end - bytes.len() });
    };
    let (addresses, tlvs) = match family.skipped {
        true => skipped(bytes, family.byte)?,
        false => (family.addresses(bytes), tlvs(bytes, tlvs_start)?),
    };
    let header = Header { version: Version::V2, command, addresses, tlvs };
    Ok(Decoded::Complete { header, len: end })
}

/// Byte 13, and whether the receiver skips what it says.
struct Family {
    byte: u8,
    /// LOCAL ("must discard the protocol block including the family which is ignored"), or UNSPEC in either nibble.
    skipped: bool,
}

impl Family {
    fn of(byte: u8, command: Command) -> Result<Family, DecodeError> {
        let (family, transport) = (byte >> 4, byte & 0x0f);
        match command {
            Command::Local => Ok(Family { byte, skipped: true }),
            Command::Proxy if family > 3 => Err(DecodeError::V2Family { byte }),
            Command::Proxy if transport > 2 => Err(DecodeError::V2Transport { byte }),
            Command::Proxy => Ok(Family { byte, skipped: family == 0 || transport == 0 }),
        }
    }

    /// Bytes of addresses that must be there.
    fn address_bytes(&self) -> usize {
        if self.skipped { 0 } else { block_bytes(self.byte) }
    }

    /// `bytes` is a whole header with room for the addresses.
    fn addresses(&self, bytes: &[u8]) -> Addresses {
        let transport = if self.byte & 0x0f == 1 { Transport::Stream } else { Transport::Dgram };
        let block = &bytes[PREFIX_BYTES..PREFIX_BYTES + self.address_bytes()];
        let port = |at: usize| u16::from_be_bytes([block[at], block[at + 1]]);
        let v4 = |at: usize| Ipv4Addr::new(block[at], block[at + 1], block[at + 2], block[at + 3]);
        let v6 = |at: usize| Ipv6Addr::from(<[u8; 16]>::try_from(&block[at..at + 16]).expect("a slice of 16 bytes"));
        let path = |at: usize| trim(&block[at..at + UNIX_PATH_BYTES]).to_vec();
        match self.byte >> 4 {
            1 => Addresses::Inet {
                source: SocketAddr::new(v4(0).into(), port(8)),
                destination: SocketAddr::new(v4(4).into(), port(10)),
                transport,
            },
            2 => Addresses::Inet {
                source: SocketAddr::new(v6(0).into(), port(32)),
                destination: SocketAddr::new(v6(16).into(), port(34)),
                transport,
            },
            _ => Addresses::Unix { source: path(0), destination: path(UNIX_PATH_BYTES), transport },
        }
    }
}

/// Bytes of the addresses of a family byte.
fn block_bytes(family: u8) -> usize {
    match family >> 4 {
        1 => INET_BYTES,
        2 => INET6_BYTES,
        3 => UNIX_BYTES,
        _ => 0,
    }
}

/// Without trailing zeros.
fn trim(path: &[u8]) -> &[u8] {
    let len = path.iter().rposition(|&byte| byte != 0).map_or(0, |last| last + 1);
    &path[..len]
}

/// Everything that can be wrong with the TLVs, as far as they have come.
fn check_tlvs(bytes: &[u8], start: usize, end: usize) -> Result<(), DecodeError> {
    let mut checksum = None;
    for raw in tlv::walk(bytes, start, end) {
        let raw = raw?;
        if raw.kind != tlv::CRC32C {
            continue;
        }
        if raw.length != 4 {
            return Err(DecodeError::Crc32cLength { at: raw.at, length: raw.length });
        }
        if checksum.replace(raw.at).is_some() {
            return Err(DecodeError::DuplicateCrc32c { at: raw.at });
        }
    }
    match checksum {
        Some(at) if bytes.len() >= end => check_crc32c(&bytes[..end], at),
        _ => Ok(()),
    }
}

fn check_crc32c(bytes: &[u8], at: usize) -> Result<(), DecodeError> {
    let value = at + tlv::TLV_PREFIX_BYTES;
    let found = u32::from_be_bytes(bytes[value..value + 4].try_into().expect("a slice of 4 bytes"));
    let computed = crc32c::crc32c(&bytes[..value]);
    let computed = crc32c::crc32c_append(computed, &[0; 4]);
    let computed = crc32c::crc32c_append(computed, &bytes[value + 4..]);
    if found == computed { Ok(()) } else { Err(DecodeError::Crc32c { at, found, computed }) }
}

/// TLVs of a whole header that passed `check_tlvs`.
fn tlvs(bytes: &[u8], start: usize) -> Result<Vec<Tlv>, DecodeError> {
    tlv::walk(bytes, start, bytes.len()).map(|raw| raw.map(|raw| Tlv::from_raw(raw.kind, raw.value))).collect()
}

/// What stands in a header whose addresses don't count. It is valid whatever it is, but TLVs are worth finding: AWS's
/// check says INET and carries them without addresses, others carry both. Type 0 is unassigned: where it appears,
/// zeros were read from the wrong place. What is no list of TLVs is kept as it is. A wrong checksum is wrong here too.
fn skipped(bytes: &[u8], family: u8) -> Result<(Addresses, Vec<Tlv>), DecodeError> {
    let is_list = |start: usize| {
        start <= bytes.len()
            && tlv::walk(bytes, start, bytes.len())
                .all(|raw| raw.is_ok_and(|raw| raw.kind != 0 && (raw.kind != tlv::CRC32C || raw.length == 4)))
    };
    let starts = [PREFIX_BYTES + block_bytes(family), PREFIX_BYTES];
    let start = starts.into_iter().find(|&start| is_list(start)).unwrap_or(bytes.len());
    check_tlvs(bytes, start, bytes.len())?;
    let addresses = match (family, &bytes[PREFIX_BYTES..start]) {
        (0, []) => Addresses::Unknown,
        (family, block) => Addresses::Skipped { family, bytes: block.to_vec() },
    };
    Ok((addresses, tlvs(bytes, start)?))
}
