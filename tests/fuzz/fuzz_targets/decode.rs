//! Any bytes: no panic; what is read is written again and read the same; one byte less of a header is incomplete.
#![no_main]

use libfuzzer_sys::fuzz_target;
use preface::proxy_protocol::{Addresses, Command, Decoded, Version, decode, spp};

fuzz_target!(|bytes: &[u8]| {
    if let Ok(spp::Spp { client, local }) = spp::decode(bytes) {
        let mut again = Vec::new();
        spp::encode(&mut again, client, local);
        assert_eq!(again, bytes[..spp::HEADER_BYTES]);
    }
    let Ok(Decoded::Complete { header, len }) = decode(bytes) else { return };
    assert!(matches!(decode(&bytes[..len - 1]), Ok(Decoded::Incomplete { needed: 1 })));
    let mut again = Vec::new();
    header.encode(&mut again).expect("what was read can be written");
    let nothing_said = matches!(header.addresses, Addresses::Unknown | Addresses::Skipped { .. });
    match (header.version, header.command) {
        (Version::V2, Command::Proxy) if nothing_said => assert_eq!(again[12], 0x20),
        (Version::V2, _) => assert_eq!(again, bytes[..len]),
        (Version::V1, _) => assert_eq!(decode(&again), Ok(Decoded::Complete { header, len: again.len() })),
    }
});
