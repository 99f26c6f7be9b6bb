//! What of an upstream outlives a reload: its open connections and counters.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// What of an upstream outlives every change but its removal. Shared by all workers; key: pool and address.
#[derive(Debug)]
pub struct UpstreamLife {
    /// Where connections go.
    pub address: SocketAddr,
    /// Connections open now, connecting ones included.
    pub open: AtomicU32,
    /// Failed connects in a row, over all workers.
    pub failed_connects: AtomicU32,
    /// The longest datagram that may leave as a segment of a larger send; lowered when the kernel refuses one.
    pub segment_max: AtomicU32,
    /// Counters since the upstream joined.
    pub counters: UpstreamCounters,
}

/// Counters of one upstream, since it joined.
#[derive(Debug, Default)]
pub struct UpstreamCounters {
    /// Connections established.
    pub connections: AtomicU64,
    /// Connects that failed.
    pub connect_failures: AtomicU64,
    /// Bytes from clients.
    pub bytes_in: AtomicU64,
    /// Bytes to clients.
    pub bytes_out: AtomicU64,
}

/// One place among an upstream's open connections; given back on drop.
#[derive(Debug)]
pub struct Lease {
    life: Arc<UpstreamLife>,
}

impl UpstreamLife {
    /// A new one: nothing open, nothing counted.
    pub fn new(address: SocketAddr) -> Arc<UpstreamLife> {
        Arc::new(UpstreamLife {
            address,
            open: AtomicU32::new(0),
            failed_connects: AtomicU32::new(0),
            segment_max: AtomicU32::new(u32::MAX),
            counters: UpstreamCounters::default(),
        })
    }

    /// Connections open now.
    pub fn open(&self) -> u32 {
        self.open.load(Ordering::Relaxed)
    }

    /// Takes a place unless `limit` (0: none) are taken. Exact over all workers.
    pub fn lease(self: &Arc<Self>, limit: u32) -> Option<Lease> {
        let more = |open: u32| (limit == 0 || open < limit).then_some(open + 1);
        self.open.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more).ok()?;
        Some(Lease { life: Arc::clone(self) })
    }

    /// Takes a place if there still are `seen` taken ones.
    pub fn lease_if(self: &Arc<Self>, seen: u32) -> Option<Lease> {
        self.open.compare_exchange(seen, seen + 1, Ordering::Relaxed, Ordering::Relaxed).ok()?;
        Some(Lease { life: Arc::clone(self) })
    }

    /// Counts a failed connect; how many in a row that makes.
    pub fn connect_failed(&self) -> u32 {
        self.counters.connect_failures.fetch_add(1, Ordering::Relaxed);
        self.failed_connects.fetch_add(1, Ordering::Relaxed) + 1
    }

    /// Counts an established connection.
    pub fn connect_succeeded(&self) {
        self.counters.connections.fetch_add(1, Ordering::Relaxed);
        self.answered();
    }

    /// Counts a UDP session. That it was begun says nothing about the upstream; its first reply will.
    pub fn session_begun(&self) {
        self.counters.connections.fetch_add(1, Ordering::Relaxed);
    }

    /// It is there: failed connects are no longer in a row.
    pub fn answered(&self) {
        // Written only when it changes: the line is shared by all workers.
        if self.failed_connects.load(Ordering::Relaxed) != 0 {
            self.failed_connects.store(0, Ordering::Relaxed);
        }
    }
}

impl Lease {
    /// The upstream.
    pub fn life(&self) -> &Arc<UpstreamLife> {
        &self.life
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.life.open.fetch_sub(1, Ordering::Relaxed);
    }
}
