//! What was of a listener's UDP, by time: sessions, drops by reason, and ends of the last ten minutes.

use std::collections::VecDeque;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use serde_json::{Map, Value, json};

use super::{POINTS_MAX, rounded};
use crate::snapshot::SessionCounters;
use crate::termination::{DropReason, Termination};

/// Counts by cause, of the last ten minutes, interval by interval.
#[derive(Debug)]
pub struct Lately<const CAUSES: usize> {
    before: [u64; CAUSES],
    counts: VecDeque<[u32; CAUSES]>,
}

impl<const CAUSES: usize> Default for Lately<CAUSES> {
    fn default() -> Lately<CAUSES> {
        Lately { before: [0; CAUSES], counts: VecDeque::new() }
    }
}

impl<const CAUSES: usize> Lately<CAUSES> {
    /// Ends an interval.
    pub fn push(&mut self, counters: &[AtomicU64; CAUSES]) {
        let now = counters.each_ref().map(|count| count.load(Relaxed));
        let before = std::mem::replace(&mut self.before, now);
        // A listener that left and came back within one interval has new counters: all that they hold is new.
        let since = |now: u64, before: u64| now.checked_sub(before).unwrap_or(now) as u32;
        self.counts.push_back(std::array::from_fn(|cause| since(now[cause], before[cause])));
        if self.counts.len() > POINTS_MAX {
            self.counts.pop_front();
        }
    }

    /// All of them together.
    pub fn sums(&self) -> [u64; CAUSES] {
        let mut sums = [0; CAUSES];
        self.add_to(&mut sums);
        sums
    }

    /// Adds all of them.
    pub fn add_to(&self, sums: &mut [u64; CAUSES]) {
        for counts in &self.counts {
            sums.iter_mut().zip(counts).for_each(|(sum, count)| *sum += u64::from(*count));
        }
    }
}

/// Of one listener.
#[derive(Debug, Default)]
pub struct OfSessions {
    begun: u64,
    /// Open, and begun in a second.
    points: VecDeque<(u32, f32)>,
    /// Seconds that each interval took.
    lengths: VecDeque<f32>,
    /// Ends of sessions.
    pub ends: Lately<{ Termination::ALL.len() }>,
    /// Datagrams that were not passed on.
    pub dropped: Lately<{ DropReason::ALL.len() }>,
}

impl OfSessions {
    /// Ends an interval.
    pub fn push(&mut self, counters: &SessionCounters, elapsed: Duration) {
        let begun = counters.begun.load(Relaxed);
        let more = begun.saturating_sub(std::mem::replace(&mut self.begun, begun));
        self.points.push_back((counters.open.load(Relaxed), (more as f64 / elapsed.as_secs_f64()) as f32));
        self.lengths.push_back(elapsed.as_secs_f32());
        if self.points.len() > POINTS_MAX {
            self.points.pop_front();
            self.lengths.pop_front();
        }
        self.ends.push(&counters.ends);
        self.dropped.push(&counters.dropped);
    }

    /// Columns of `length`, the newest last; what was not there yet is null. Of the reasons those that there were.
    pub fn columns(&self, length: usize) -> Map<String, Value> {
        let missing = || std::iter::repeat_n(Value::Null, length.saturating_sub(self.points.len()));
        let skipped = self.points.len().saturating_sub(length);
        let column =
            |values: &mut dyn Iterator<Item = Value>| -> Value { missing().chain(values.skip(skipped)).collect() };
        let mut columns = Map::new();
        columns.insert("open".to_owned(), column(&mut self.points.iter().map(|(open, _)| json!(open))));
        columns.insert("begun_per_s".to_owned(), column(&mut self.points.iter().map(|(_, rate)| rounded(*rate))));
        let sums = self.dropped.sums();
        let reasons = DropReason::ALL.iter().filter(|reason| sums[**reason as usize] > 0);
        let dropped: Map<String, Value> = reasons
            .map(|reason| {
                let counts = self.dropped.counts.iter().zip(&self.lengths);
                let mut rates = counts.map(|(counts, seconds)| rounded(counts[*reason as usize] as f32 / seconds));
                (reason.as_str().to_owned(), column(&mut rates))
            })
            .collect();
        columns.insert("dropped_per_s".to_owned(), dropped.into());
        columns
    }
}
