//! What a header costs: `cargo bench --bench codec`.

use divan::{Bencher, black_box};
use preface::proxy_protocol::{Addresses, Command, Header, Tlv, Transport, Version, decode, v1, v2};

fn main() {
    divan::main();
}

fn addresses(ipv6: bool) -> Addresses {
    let (source, destination) = match ipv6 {
        false => ("198.51.100.22:35646", "203.0.113.7:80"),
        true => ("[2001:db8:1234::22]:35646", "[2001:db8:5678::7]:80"),
    };
    let address = |text: &str| text.parse().expect("an address");
    Addresses::inet(address(source), address(destination), Transport::Stream)
}

fn tlvs(crc32c: bool) -> Vec<Tlv> {
    let mut tlvs =
        vec![Tlv::UniqueId(b"01ARZ3NDEKTSV4RRFFQ69G5FAV".into()), Tlv::AwsVpcEndpoint("vpce-08d2bf15fac5001c9".into())];
    if crc32c {
        tlvs.insert(0, Tlv::Crc32c);
    }
    tlvs
}

/// As a worker does it: into a buffer that is there, with TLVs that are encoded already.
#[divan::bench_group]
mod encode {
    use super::*;

    #[divan::bench(args = [false, true])]
    fn v1(bencher: Bencher, ipv6: bool) {
        let (mut out, addresses) = (Vec::with_capacity(128), addresses(ipv6));
        bencher.bench_local(|| {
            out.clear();
            v1::encode(&mut out, black_box(&addresses)).expect("IP addresses");
            out.len()
        });
    }

    #[divan::bench(args = [false, true])]
    fn v2(bencher: Bencher, ipv6: bool) {
        with_tlvs(bencher, ipv6, &[]);
    }

    #[divan::bench(args = [false, true])]
    fn v2_tlvs(bencher: Bencher, ipv6: bool) {
        with_tlvs(bencher, ipv6, &tlvs(false));
    }

    #[divan::bench(args = [false, true])]
    fn v2_tlvs_crc32c(bencher: Bencher, ipv6: bool) {
        with_tlvs(bencher, ipv6, &tlvs(true));
    }

    fn with_tlvs(bencher: Bencher, ipv6: bool, tlvs: &[Tlv]) {
        let (mut out, mut encoded, addresses) = (Vec::with_capacity(256), Vec::new(), addresses(ipv6));
        for tlv in tlvs {
            tlv.encode(&mut encoded).expect("a short TLV");
        }
        bencher.bench_local(|| {
            out.clear();
            v2::encode_with(&mut out, Command::Proxy, black_box(&addresses), &[black_box(&encoded)]).expect("short");
            out.len()
        });
    }
}

#[divan::bench_group]
mod decode_whole {
    use super::*;

    #[divan::bench(args = [false, true])]
    fn v1(bencher: Bencher, ipv6: bool) {
        one(bencher, Header::proxy(Version::V1, addresses(ipv6), vec![]));
    }

    #[divan::bench(args = [false, true])]
    fn v2(bencher: Bencher, ipv6: bool) {
        one(bencher, Header::proxy(Version::V2, addresses(ipv6), vec![]));
    }

    #[divan::bench(args = [false, true])]
    fn v2_tlvs(bencher: Bencher, ipv6: bool) {
        one(bencher, Header::proxy(Version::V2, addresses(ipv6), tlvs(false)));
    }

    #[divan::bench(args = [false, true])]
    fn v2_tlvs_crc32c(bencher: Bencher, ipv6: bool) {
        one(bencher, Header::proxy(Version::V2, addresses(ipv6), tlvs(true)));
    }

    fn one(bencher: Bencher, header: Header) {
        let mut bytes = Vec::new();
        header.encode(&mut bytes).expect("a header that can be written");
        bencher.bench(|| decode(black_box(&bytes)));
    }
}
