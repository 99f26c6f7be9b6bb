//! What it costs to read the snapshot and to pick an upstream: `cargo bench --bench pick`.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Instant;

use arc_swap::{ArcSwap, Cache};
use divan::{Bencher, black_box};
use preface::config;
use preface::pool::source_hash::{Member, Table};
use preface::pool::{Picked, Pool};
use preface::snapshot::{Inputs, Snapshot, build};

fn main() {
    divan::main();
}

const UPSTREAMS: [usize; 3] = [2, 16, 256];

/// What each upstream has open while picks are measured: a policy that compares has something to compare.
const OPEN: usize = 8;

fn snapshot(balance: &str, upstreams: usize) -> Snapshot {
    let addresses: Vec<String> = (1..=upstreams).map(|port| format!("\"192.0.2.1:{port}\"")).collect();
    let text = format!(
        "[listeners.test]\nbind = \":80\"\npool = \"test\"\n\
         [pools.test]\nbalance = \"{balance}\"\nupstreams = [{}]\n",
        addresses.join(", ")
    );
    let config = config::parse("bench.toml", &text).expect("a good configuration").config;
    build(&Snapshot::default(), &config, &mut Inputs::default(), None, Instant::now())
}

/// Many, in no order: each one's first slot is somewhere else.
fn client(number: usize) -> IpAddr {
    IpAddr::from((number as u32).wrapping_mul(0x9E37_79B9).to_be_bytes())
}

/// As a connection does it: the upstream, and its place among the open connections, which is given back.
fn pick(bencher: Bencher, balance: &str, upstreams: usize) {
    let snapshot = snapshot(balance, upstreams);
    let pool: &Arc<Pool> = &snapshot.pools[&("test".to_owned(), None)];
    let held: Vec<Picked> =
        (0..upstreams * OPEN).map(|open| pool.pick(Some(client(open)), &[]).expect("an upstream")).collect();
    let mut clients = 0;
    bencher.bench_local(|| {
        clients += 1;
        black_box(pool).pick(Some(client(clients)), black_box(&[])).expect("an upstream").index
    });
    drop(held);
}

#[divan::bench(args = UPSTREAMS)]
fn round_robin(bencher: Bencher, upstreams: usize) {
    pick(bencher, "round_robin", upstreams);
}

#[divan::bench(args = UPSTREAMS)]
fn least_connections(bencher: Bencher, upstreams: usize) {
    pick(bencher, "least_connections", upstreams);
}

#[divan::bench(args = UPSTREAMS)]
fn random_two(bencher: Bencher, upstreams: usize) {
    pick(bencher, "random_two", upstreams);
}

#[divan::bench(args = UPSTREAMS)]
fn source_hash(bencher: Bencher, upstreams: usize) {
    pick(bencher, "source_hash", upstreams);
}

/// Once a set of upstreams, on the control thread: the table of `source_hash`. Of one weight, and of many.
#[divan::bench_group]
mod table {
    use super::*;

    fn build(bencher: Bencher, upstreams: usize, weight: fn(usize) -> u32) {
        let member = |index: usize| Member { name: format!("192.0.2.1:{}", index + 1), weight: weight(index) };
        let members: Vec<Member> = (0..upstreams).map(member).collect();
        bencher.with_inputs(|| members.clone()).bench_local_values(Table::new);
    }

    #[divan::bench(args = UPSTREAMS)]
    fn equal(bencher: Bencher, upstreams: usize) {
        build(bencher, upstreams, |_| 1);
    }

    #[divan::bench(args = UPSTREAMS)]
    fn weighted(bencher: Bencher, upstreams: usize) {
        build(bencher, upstreams, |index| 1 + index as u32 * 37 % 256);
    }
}

/// Once a connection: what a worker has, and what it would be without its cache.
#[divan::bench_group]
mod load {
    use super::*;

    fn shared() -> Arc<ArcSwap<Snapshot>> {
        Arc::new(ArcSwap::from_pointee(snapshot("round_robin", 16)))
    }

    #[divan::bench]
    fn cached(bencher: Bencher) {
        let mut cache = Cache::new(shared());
        bencher.bench_local(|| black_box(&mut cache).load().generation);
    }

    #[divan::bench]
    fn uncached(bencher: Bencher) {
        let shared = shared();
        bencher.bench_local(|| black_box(&shared).load().generation);
    }
}
