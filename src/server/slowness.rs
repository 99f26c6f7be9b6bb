//! Upstreams that have slowed: looked for once a second at most, said once in the log, kept while it lasts.

use std::collections::BTreeMap;
use std::time::{Duration, Instant, SystemTime};

use serde_json::{Value, json};

use crate::metrics::latency::Buckets;
use crate::pool::UpstreamKey;
use crate::server::speed::{Seen, Slow, has_slowed, still_slow};
use crate::server::state::State;

/// Between two looks at least: whoever asks for the status more often gets what the last one found.
const LOOK_EVERY: Duration = Duration::from_millis(900);

/// What of an upstream has slowed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// To take connections: the path to it, or its accept queue.
    Connect,
    /// From the accept to its first byte: the application.
    FirstByte,
}

impl Phase {
    /// In the order of `Measured`.
    pub const ALL: [Phase; 2] = [Phase::Connect, Phase::FirstByte];

    /// The word in status and metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Phase::Connect => "connect",
            Phase::FirstByte => "first_byte",
        }
    }
}

/// What has slowed, since when, and by how much.
#[derive(Clone, Copy, Debug)]
pub struct Slowness {
    /// When it was first seen.
    pub since: SystemTime,
    /// By how much.
    pub slow: Slow,
}

impl Slowness {
    /// As the status shows it.
    pub fn value(&self, phase: Phase) -> Value {
        json!({
            "phase": phase.as_str(),
            "since": humantime::format_rfc3339_millis(self.since).to_string(),
            "now_ms": rounded(self.slow.now_ms),
            "before_ms": rounded(self.slow.before_ms),
            "siblings_ms": rounded(self.slow.siblings_ms),
        })
    }
}

fn rounded(milliseconds: f64) -> f64 {
    (milliseconds * 1000.0).round() / 1000.0
}

/// What is known about upstreams that have slowed.
#[derive(Debug)]
pub struct SlowUpstreams {
    looked: Instant,
    found: BTreeMap<(UpstreamKey, Phase), Slowness>,
}

impl SlowUpstreams {
    /// Nothing yet.
    pub fn new(now: Instant) -> SlowUpstreams {
        SlowUpstreams { looked: now, found: BTreeMap::new() }
    }

    /// How it has slowed: where connects alone explain the rest, they are what is said.
    pub fn of(&self, key: &UpstreamKey) -> Option<(Phase, &Slowness)> {
        Phase::ALL.into_iter().find_map(|phase| Some((phase, self.found.get(&(key.clone(), phase))?)))
    }

    /// A pool got another name.
    pub fn rename(&mut self, new: &str, old: &str) {
        let found = std::mem::take(&mut self.found).into_iter();
        let renamed = found.map(|((key, phase), slowness)| {
            let key = if key.pool == old { UpstreamKey { pool: new.to_owned(), ..key } } else { key };
            ((key, phase), slowness)
        });
        self.found = renamed.collect();
    }
}

impl State {
    /// Looks whether upstreams have slowed, or are as fast as before again, and tells of what turned.
    pub fn look_at_speed(&mut self) {
        let now = Instant::now();
        if now.duration_since(self.slow.looked) < LOOK_EVERY {
            return;
        }
        self.slow.looked = now;
        let mut pools: BTreeMap<&str, Vec<&UpstreamKey>> = BTreeMap::new();
        for key in self.inputs.lives.keys() {
            pools.entry(&key.pool).or_default().push(key);
        }
        let before = std::mem::take(&mut self.slow.found);
        // One that has nobody beside it is compared with nobody.
        for keys in pools.into_values().filter(|keys| keys.len() > 1) {
            for (kind, phase) in Phase::ALL.into_iter().enumerate() {
                let seen: Vec<[Seen; 2]> =
                    keys.iter().map(|key| self.history.recent(key, kind, now).map(seen)).collect();
                for (at, key) in keys.iter().enumerate() {
                    let others = seen.iter().enumerate().filter(|(other, _)| *other != at);
                    let siblings: Vec<&Seen> = others.map(|(_, [recent, _])| recent).collect();
                    let [recent, earlier] = &seen[at];
                    let place = ((*key).clone(), phase);
                    let known = before.get(&place);
                    let slow = match known {
                        Some(known) => still_slow(known.slow, recent, earlier, &siblings),
                        None => has_slowed(recent, earlier, &siblings),
                    };
                    if let Some(slow) = slow {
                        let since = known.map_or_else(SystemTime::now, |known| known.since);
                        self.slow.found.insert(place, Slowness { since, slow });
                    }
                }
            }
        }
        self.tell_of_speed(&before);
    }

    fn tell_of_speed(&self, before: &BTreeMap<(UpstreamKey, Phase), Slowness>) {
        let now = &self.slow.found;
        for ((key, phase), Slowness { slow, .. }) in now.iter().filter(|(place, _)| !before.contains_key(place)) {
            tracing::warn!(
                event = "slow", pool = %key.pool, upstream = %key.address, phase = phase.as_str(),
                now_ms = rounded(slow.now_ms), before_ms = rounded(slow.before_ms), siblings_ms = rounded(slow.siblings_ms),
            );
        }
        for (key, phase) in before.keys().filter(|place| !now.contains_key(place)) {
            tracing::info!(
                event = "slow_no_more", pool = %key.pool, upstream = %key.address, phase = phase.as_str(),
            );
        }
    }
}

fn seen(buckets: Buckets) -> Seen {
    Seen { median_ms: buckets.percentiles().map_or(0.0, |all| all.p50), counts: buckets.counts() }
}
