//! What of an upstream outlives a reload: its open connections and counters.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use super::rejection::{self, Rejection};
use crate::address::Address;

/// What of an upstream outlives every change but its removal. Shared by all workers; key: pool and address.
#[derive(Debug)]
pub struct UpstreamLife {
    /// Where connections go.
    pub address: Address,
    /// Connections open now, connecting ones included.
    pub open: AtomicU32,
    /// Failed connects in a row, over all workers, since it was taken in (again).
    pub failed_connects: AtomicU32,
    /// Failed connects in a row, since it was last known to answer.
    failing: AtomicU32,
    /// When the first and the last of those failed: milliseconds of UNIX time.
    failing_since: [AtomicU64; 2],
    /// Has it answered a connection, with the header that it gets now?
    has_answered: AtomicBool,
    /// Rejections in a row, over all workers; and how the last one looked.
    rejections: AtomicU32,
    last_rejection: AtomicU8,
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
    /// Datagrams from clients, and to clients.
    pub datagrams: [AtomicU64; 2],
    /// What looked like a rejected header, by `Rejection`.
    pub rejections: [AtomicU64; Rejection::ALL.len()],
}

/// One place among an upstream's open connections; given back on drop.
#[derive(Debug)]
pub struct Lease {
    life: Arc<UpstreamLife>,
}

impl UpstreamLife {
    /// A new one: nothing open, nothing counted.
    pub fn new(address: Address) -> Arc<UpstreamLife> {
        Arc::new(UpstreamLife {
            address,
            open: AtomicU32::new(0),
            failed_connects: AtomicU32::new(0),
            failing: AtomicU32::new(0),
            failing_since: Default::default(),
            has_answered: AtomicBool::new(false),
            rejections: AtomicU32::new(0),
            last_rejection: AtomicU8::new(0),
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
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_millis() as u64;
        let [first, last] = &self.failing_since;
        last.store(now, Ordering::Relaxed);
        if self.failing.fetch_add(1, Ordering::Relaxed) == 0 {
            first.store(now, Ordering::Relaxed);
        }
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
        if self.failing.load(Ordering::Relaxed) != 0 {
            self.failing.store(0, Ordering::Relaxed);
            self.failed_connects.store(0, Ordering::Relaxed);
        }
    }

    /// How many of its last connects failed, without one in between that did not, and when the first and the last did.
    pub fn failing(&self) -> Option<(u32, [SystemTime; 2])> {
        let in_a_row = self.failing.load(Ordering::Relaxed);
        let at = |time: &AtomicU64| SystemTime::UNIX_EPOCH + Duration::from_millis(time.load(Ordering::Relaxed));
        (in_a_row > 0).then(|| (in_a_row, self.failing_since.each_ref().map(at)))
    }
}

impl UpstreamLife {
    /// A connection got an answer: nothing is wrong with the header.
    pub fn header_taken(&self) {
        // Written only when they change: the line is shared by all workers.
        if !self.has_answered.load(Ordering::Relaxed) {
            self.has_answered.store(true, Ordering::Relaxed);
        }
        if self.rejections.load(Ordering::Relaxed) != 0 {
            self.rejections.store(0, Ordering::Relaxed);
        }
    }

    /// A connection looked as if its header had been rejected.
    pub fn rejected(&self, rejection: Rejection) {
        self.counters.rejections[rejection as usize].fetch_add(1, Ordering::Relaxed);
        self.last_rejection.store(rejection as u8, Ordering::Relaxed);
        self.rejections.fetch_add(1, Ordering::Relaxed);
    }

    /// Are there so many rejections in a row that the header must be wrong? How many, and how the last one looked.
    pub fn suspicion(&self) -> Option<(u32, Rejection)> {
        let in_a_row = self.rejections.load(Ordering::Relaxed);
        let last = Rejection::ALL[usize::from(self.last_rejection.load(Ordering::Relaxed))];
        rejection::is_suspicious(in_a_row, self.has_answered.load(Ordering::Relaxed)).then_some((in_a_row, last))
    }

    /// Has it answered a connection, with the header that it gets now?
    pub fn has_answered(&self) -> bool {
        self.has_answered.load(Ordering::Relaxed)
    }

    /// It gets another header from now on.
    pub fn forget_answers(&self) {
        self.has_answered.store(false, Ordering::Relaxed);
        self.rejections.store(0, Ordering::Relaxed);
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
