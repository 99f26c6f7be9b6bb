//! What it costs to read the snapshot and to pick an upstream: `cargo bench --bench pick`.

use std::sync::Arc;
use std::time::Instant;

use arc_swap::{ArcSwap, Cache};
use divan::{Bencher, black_box};
use preface::config;
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

/// As a connection does it: the upstream, and its place among the open connections, which is given back.
fn pick(bencher: Bencher, balance: &str, upstreams: usize) {
    let snapshot = snapshot(balance, upstreams);
    let pool: &Arc<Pool> = &snapshot.pools[&("test".to_owned(), None)];
    let held: Vec<Picked> = (0..upstreams * OPEN).map(|_| pool.pick(&[]).expect("an upstream")).collect();
    bencher.bench_local(|| black_box(pool).pick(black_box(&[])).expect("an upstream").index);
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
