//! What was measured, by time: rates and latencies of every listener, pool and upstream, of the last ten minutes in
//! steps of five seconds. The control thread's alone.

mod sessions;

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant, SystemTime};

use serde_json::{Map, Value, json};

use crate::connection::measured::{KINDS, Measured, OfUpstream};
use crate::health::Checker;
use crate::metrics::latency::{Buckets, CoarseTrack, FineTrack, Percentiles};
use crate::pool::UpstreamKey;
use crate::server::speed::{SAMPLES_MIN, WINDOW_INTERVALS_MAX};
use crate::snapshot::{Inputs, ListenerLife};
use crate::termination::{DropReason, Termination};
use sessions::{Lately, OfSessions};

/// Between two points.
pub const INTERVAL: Duration = Duration::from_secs(5);
/// Ten minutes.
pub const POINTS_MAX: usize = 120;

/// Names of the distributions in JSON: what `Measured` has, and health checks.
const LATENCIES: [&str; KINDS + 1] =
    ["connect_ms", "first_byte_ms", "duration_ms", "round_trip_ms", "session_ms", "health_check_ms"];

/// By kind, and of health checks.
type Latencies = [Option<Percentiles>; KINDS + 1];

/// What is counted of a listener, a pool or an upstream, of its connections and UDP sessions together: totals that only
/// grow, but for `open`.
#[derive(Clone, Copy, Debug, Default)]
pub struct Totals {
    /// Open now.
    pub open: u64,
    /// Accepted, or established to an upstream.
    pub connections: u64,
    /// Ends that aren't regular, or failed connects.
    pub failures: u64,
    /// From clients.
    pub bytes_in: u64,
    /// To clients.
    pub bytes_out: u64,
    /// From clients, and to clients.
    pub datagrams: [u64; 2],
}

/// One interval. Small, because there are 120 of each upstream.
#[derive(Clone, Copy, Debug, Default)]
struct Point {
    open: u32,
    /// In the order of `RATES`: for each second.
    rates: [f32; RATES.len()],
    /// p50, p99 and the longest, in the order of `LATENCIES`; not a number where nothing was measured.
    latencies: [[f32; 3]; KINDS + 1],
}

const RATES: [&str; 6] = [
    "connections_per_s",
    "failures_per_s",
    "bytes_in_per_s",
    "bytes_out_per_s",
    "datagrams_in_per_s",
    "datagrams_out_per_s",
];

/// The rate of failures among them.
const FAILURES: usize = 1;

impl Totals {
    fn add(&mut self, more: Totals) {
        self.open += more.open;
        self.connections += more.connections;
        self.failures += more.failures;
        self.bytes_in += more.bytes_in;
        self.bytes_out += more.bytes_out;
        self.datagrams.iter_mut().zip(more.datagrams).for_each(|(sum, more)| *sum += more);
    }

    fn of_listener(life: &ListenerLife) -> Totals {
        let of = |ends: &[AtomicU64; Termination::ALL.len()], is_regular: fn(Termination) -> bool| -> u64 {
            let irregular = Termination::ALL.iter().filter(|end| !is_regular(**end));
            irregular.map(|end| ends[*end as usize].load(Relaxed)).sum()
        };
        let sessions = &life.sessions;
        Totals {
            open: u64::from(life.open.load(Relaxed)) + u64::from(sessions.open.load(Relaxed)),
            connections: life.accepted.load(Relaxed) + sessions.begun.load(Relaxed),
            failures: of(&life.ends, Termination::is_regular) + of(&sessions.ends, Termination::is_regular_for_session),
            bytes_in: life.bytes_in.load(Relaxed) + sessions.bytes[0].load(Relaxed),
            bytes_out: life.bytes_out.load(Relaxed) + sessions.bytes[1].load(Relaxed),
            datagrams: sessions.datagrams.each_ref().map(|count| count.load(Relaxed)),
        }
    }
}

/// The last ten minutes of one thing.
#[derive(Debug, Default)]
pub struct Points {
    before: Totals,
    points: VecDeque<Point>,
}

impl Points {
    fn push(&mut self, now: Totals, elapsed: Duration, latencies: Latencies) {
        // Totals of a pool get smaller when an upstream leaves it.
        let rate = |now: u64, before: u64| (now.saturating_sub(before) as f64 / elapsed.as_secs_f64()) as f32;
        let before = std::mem::replace(&mut self.before, now);
        self.points.push_back(Point {
            open: now.open as u32,
            rates: [
                rate(now.connections, before.connections),
                rate(now.failures, before.failures),
                rate(now.bytes_in, before.bytes_in),
                rate(now.bytes_out, before.bytes_out),
                rate(now.datagrams[0], before.datagrams[0]),
                rate(now.datagrams[1], before.datagrams[1]),
            ],
            latencies: latencies
                .map(|all| all.map_or([f32::NAN; 3], |of| [of.p50 as f32, of.p99 as f32, of.max as f32])),
        });
        if self.points.len() > POINTS_MAX {
            self.points.pop_front();
        }
    }

    /// Rates of the last interval.
    pub fn rates(&self) -> Value {
        let last = self.points.back().copied().unwrap_or_default();
        RATES.iter().zip(last.rates).map(|(name, rate)| ((*name).to_owned(), rounded(rate))).collect()
    }

    /// Columns of `length`, the newest last; what was not there yet is null.
    fn columns(&self, length: usize, latencies: &[usize]) -> Map<String, Value> {
        let missing = length.saturating_sub(self.points.len());
        let column = |value: &dyn Fn(&Point) -> Value| -> Value {
            let nothing = std::iter::repeat_n(Value::Null, missing);
            nothing.chain(self.points.iter().skip(self.points.len().saturating_sub(length)).map(value)).collect()
        };
        let mut columns = Map::new();
        columns.insert("open".to_owned(), column(&|point| json!(point.open)));
        for (index, name) in RATES.iter().enumerate() {
            columns.insert((*name).to_owned(), column(&|point| rounded(point.rates[index])));
        }
        for kind in latencies {
            let part = |index: usize| column(&|point| rounded(point.latencies[*kind][index]));
            let value = json!({ "p50": part(0), "p99": part(1), "max": part(2) });
            columns.insert(LATENCIES[*kind].to_owned(), value);
        }
        columns
    }
}

/// Three figures after the point are enough for people, and keep the answer short. What is not a number is null.
fn rounded(value: f32) -> Value {
    json!((f64::from(value) * 1000.0).round() / 1000.0)
}

/// Of one listener.
#[derive(Debug, Default)]
struct OfListener {
    points: Points,
    ends: Lately<{ Termination::ALL.len() }>,
    sessions: OfSessions,
}

/// Of one pool.
#[derive(Debug, Default)]
struct OfPool {
    points: Points,
    times: [FineTrack; KINDS],
    /// The same in buckets, for Prometheus.
    buckets: [Buckets; KINDS],
    checks: CoarseTrack,
}

/// Of one upstream.
#[derive(Debug, Default)]
struct OneUpstream {
    points: Points,
    /// Every interval since has failures.
    failures_since: Option<SystemTime>,
    times: [CoarseTrack; KINDS],
    checks: CoarseTrack,
}

/// Everything measured.
#[derive(Debug)]
pub struct History {
    sampled: Instant,
    times: VecDeque<SystemTime>,
    process: Points,
    listeners: BTreeMap<String, OfListener>,
    pools: BTreeMap<String, OfPool>,
    upstreams: BTreeMap<UpstreamKey, OneUpstream>,
    reloads: CoarseTrack,
    /// Processor time of each worker: now, at the last point, and its share in the last interval.
    workers: Vec<(Duration, Duration, f64)>,
}

impl History {
    /// Nothing yet.
    pub fn new(workers: usize, now: Instant) -> History {
        History {
            sampled: now,
            times: VecDeque::new(),
            process: Points::default(),
            listeners: BTreeMap::new(),
            pools: BTreeMap::new(),
            upstreams: BTreeMap::new(),
            reloads: CoarseTrack::default(),
            workers: vec![Default::default(); workers],
        }
    }

    /// Takes in what a worker measured since it was asked last.
    pub fn add(&mut self, worker: usize, measured: &Measured, inputs: &Inputs) {
        self.workers[worker].0 = measured.cpu;
        for pool in measured.pools() {
            let of_pool = self.pools.entry(pool.name.to_string()).or_default();
            of_pool.times.iter_mut().zip(&pool.times).for_each(|(track, times)| track.add(times));
        }
        let keys: HashMap<usize, &UpstreamKey> =
            inputs.lives.iter().map(|(key, life)| (Arc::as_ptr(life).addr(), key)).collect();
        for (pool, OfUpstream { life, times, .. }) in measured.upstreams() {
            if let Some(of_pool) = self.pools.get_mut(pool) {
                of_pool.buckets.iter_mut().zip(times).for_each(|(sum, times)| sum.merge(times));
            }
            // One that was removed counts for its pool alone.
            if let Some(key) = keys.get(&Arc::as_ptr(life).addr()) {
                let upstream = self.upstreams.entry((*key).clone()).or_default();
                upstream.times.iter_mut().zip(times).for_each(|(track, times)| track.add(times));
            }
        }
    }

    /// A reload took this long.
    pub fn reloaded(&mut self, duration: Duration) {
        let mut one = Buckets::default();
        one.record(duration);
        self.reloads.add(&one);
    }

    /// Takes in how long health checks took since the last time.
    pub fn add_checks(&mut self, checkers: &BTreeMap<UpstreamKey, Checker>) {
        for (key, checker) in checkers {
            let durations = checker.stats().take_durations();
            if durations.count() > 0 {
                self.pools.entry(key.pool.clone()).or_default().checks.add(&durations);
                self.upstreams.entry(key.clone()).or_default().checks.add(&durations);
            }
        }
    }

    /// Pools got other names: old name by new name.
    pub fn rename(&mut self, renamed: &HashMap<String, String>) {
        for (new, old) in renamed {
            self.pools.remove(old).map(|pool| self.pools.insert(new.clone(), pool));
            let keys: Vec<UpstreamKey> = self.upstreams.keys().filter(|key| key.pool == *old).cloned().collect();
            for key in keys {
                let upstream = self.upstreams.remove(&key).expect("it was just found");
                self.upstreams.insert(UpstreamKey { pool: new.clone(), ..key }, upstream);
            }
        }
    }

    /// Ends an interval: a point for everything that there is.
    pub fn sample(&mut self, inputs: &Inputs, pools: impl Iterator<Item = String>, open: usize, now: Instant) {
        // The first interval has no length: what came in it must not look like a flood for ten minutes.
        let elapsed = now.duration_since(self.sampled).max(INTERVAL / 5);
        self.sampled = now;
        self.times.push_back(SystemTime::now());
        if self.times.len() > POINTS_MAX {
            self.times.pop_front();
        }
        for (cpu, before, share) in &mut self.workers {
            *share = cpu.saturating_sub(*before).as_secs_f64() / elapsed.as_secs_f64();
            *before = *cpu;
        }
        let mut process = Totals::default();
        self.listeners.retain(|name, _| inputs.listener_lives.contains_key(name));
        for (name, life) in &inputs.listener_lives {
            let totals = Totals::of_listener(life);
            process.add(totals);
            let listener = self.listeners.entry(name.clone()).or_default();
            listener.points.push(totals, elapsed, [None; KINDS + 1]);
            listener.ends.push(&life.ends);
            listener.sessions.push(&life.sessions, elapsed);
        }
        process.open = open as u64;
        self.process.push(process, elapsed, [None; KINDS + 1]);
        self.upstreams.retain(|key, _| inputs.lives.contains_key(key));
        let mut of_pools: BTreeMap<String, Totals> = pools.map(|name| (name, Totals::default())).collect();
        for (key, life) in &inputs.lives {
            let totals = Totals {
                open: u64::from(life.open()),
                connections: life.counters.connections.load(Relaxed),
                failures: life.counters.connect_failures.load(Relaxed),
                bytes_in: life.counters.bytes_in.load(Relaxed),
                bytes_out: life.counters.bytes_out.load(Relaxed),
                datagrams: life.counters.datagrams.each_ref().map(|count| count.load(Relaxed)),
            };
            of_pools.entry(key.pool.clone()).or_default().add(totals);
            let upstream = self.upstreams.entry(key.clone()).or_default();
            let times = upstream.times.each_mut().map(CoarseTrack::close);
            upstream.points.push(totals, elapsed, with_checks(times, upstream.checks.close()));
            let begun = SystemTime::now().checked_sub(elapsed);
            let has_failed = upstream.points.points.back().is_some_and(|point| point.rates[FAILURES] > 0.0);
            upstream.failures_since = upstream.failures_since.or(begun).filter(|_| has_failed);
        }
        self.pools.retain(|name, _| of_pools.contains_key(name));
        for (name, totals) in of_pools {
            let pool = self.pools.entry(name).or_default();
            let times = pool.times.each_mut().map(FineTrack::close);
            pool.points.push(totals, elapsed, with_checks(times, pool.checks.close()));
        }
        self.reloads.close();
    }

    /// The last ten minutes, as columns; those of sessions where `has_udp` says so of a listener.
    pub fn value(&self, has_udp: impl Fn(&str) -> bool) -> Value {
        let length = self.times.len();
        let times: Vec<String> =
            self.times.iter().map(|time| humantime::format_rfc3339_millis(*time).to_string()).collect();
        let all: [usize; LATENCIES.len()] = std::array::from_fn(|kind| kind);
        let listeners = self.listeners.iter().map(|(name, of)| {
            let mut columns = of.points.columns(length, &[]);
            if has_udp(name) {
                columns.insert("sessions".to_owned(), of.sessions.columns(length).into());
            }
            (name.clone(), columns.into())
        });
        let mut pools: Map<String, Value> = Map::new();
        for (name, of) in &self.pools {
            let mut columns = of.points.columns(length, &all);
            columns.insert("upstreams".to_owned(), json!({}));
            pools.insert(name.clone(), columns.into());
        }
        for (key, of) in &self.upstreams {
            if let Some(pool) = pools.get_mut(&key.pool) {
                pool["upstreams"][key.address.to_string()] = of.points.columns(length, &all).into();
            }
        }
        json!({
            "interval_s": INTERVAL.as_secs(),
            "times": times,
            "process": self.process.columns(length, &[]),
            "listeners": Value::Object(listeners.collect()),
            "pools": pools,
        })
    }

    /// Rates of the whole process in the last interval.
    pub fn process_rates(&self) -> Value {
        self.process.rates()
    }

    /// Rates of a listener in the last interval.
    pub fn listener_rates(&self, name: &str) -> Value {
        self.listeners.get(name).map_or_else(|| Points::default().rates(), |listener| listener.points.rates())
    }

    /// Ends of the last ten minutes, of one listener or of all.
    pub fn recent_ends(&self, name: Option<&str>) -> [u64; Termination::ALL.len()] {
        let mut sums = [0; Termination::ALL.len()];
        let listeners = self.listeners.iter().filter(|(known, _)| name.is_none_or(|name| name == *known));
        listeners.for_each(|(_, listener)| listener.ends.add_to(&mut sums));
        sums
    }

    /// Ends of sessions and drops of the last ten minutes, of one listener.
    pub fn recent_sessions(&self, name: &str) -> ([u64; Termination::ALL.len()], [u64; DropReason::ALL.len()]) {
        let sessions = self.listeners.get(name).map(|listener| &listener.sessions);
        match sessions {
            Some(sessions) => (sessions.ends.sums(), sessions.dropped.sums()),
            None => ([0; Termination::ALL.len()], [0; DropReason::ALL.len()]),
        }
    }

    /// Rates of a pool in the last interval.
    pub fn pool_rates(&self, name: &str) -> Value {
        self.pools.get(name).map_or_else(|| Points::default().rates(), |pool| pool.points.rates())
    }

    /// Percentiles of a pool.
    pub fn pool_latency(&self, name: &str) -> Value {
        let Some(pool) = self.pools.get(name) else { return nothing_measured() };
        let times = pool.times.each_ref().map(|track| (track.last_minute(), track.since_start()));
        latency(with_checks(times, (pool.checks.last_minute(), pool.checks.total().percentiles())))
    }

    /// Rates of an upstream in the last interval.
    pub fn upstream_rates(&self, key: &UpstreamKey) -> Value {
        self.upstreams.get(key).map_or_else(|| Points::default().rates(), |upstream| upstream.points.rates())
    }

    /// Each interval since then has a failed connect.
    pub fn failures_since(&self, key: &UpstreamKey) -> Option<SystemTime> {
        self.upstreams.get(key)?.failures_since
    }

    /// Percentiles of an upstream.
    pub fn upstream_latency(&self, key: &UpstreamKey) -> Value {
        let Some(upstream) = self.upstreams.get(key) else { return nothing_measured() };
        let both = |track: &CoarseTrack| (track.last_minute(), track.total().percentiles());
        latency(with_checks(upstream.times.each_ref().map(both), both(&upstream.checks)))
    }

    /// What an upstream's connections took in the last seconds, and in the minute before. Longer than half an interval,
    /// because a moment says nothing, and as far back as there are enough of them.
    pub fn recent(&self, key: &UpstreamKey, kind: usize, now: Instant) -> [Buckets; 2] {
        let Some(upstream) = self.upstreams.get(key) else { return Default::default() };
        let is_young = now.duration_since(self.sampled) < INTERVAL / 2;
        let closed = upstream.times[kind].closed_for(SAMPLES_MIN, usize::from(is_young)..=WINDOW_INTERVALS_MAX);
        upstream.times[kind].recent(closed)
    }

    /// Percentiles of reloads.
    pub fn reload_latency(&self) -> Value {
        json!({ "last_minute": self.reloads.last_minute(), "since_start": self.reloads.total().percentiles() })
    }

    /// Distributions of a pool since the start, in the order of `Measured`.
    pub fn pool_buckets(&self, name: &str) -> Option<&[Buckets; KINDS]> {
        self.pools.get(name).map(|pool| &pool.buckets)
    }

    /// Distributions of an upstream since it joined: in the order of `Measured`, and health checks.
    pub fn upstream_buckets(&self, key: &UpstreamKey) -> Option<[&Buckets; KINDS + 1]> {
        let upstream = self.upstreams.get(key)?;
        Some(with_checks(upstream.times.each_ref().map(CoarseTrack::total), upstream.checks.total()))
    }

    /// Reloads since the start.
    pub fn reload_buckets(&self) -> &Buckets {
        self.reloads.total()
    }

    /// Each worker's processor time since it started, and its share of one processor in the last interval.
    pub fn workers(&self) -> impl Iterator<Item = (Duration, f64)> {
        self.workers.iter().map(|(cpu, _, share)| (*cpu, *share))
    }
}

/// What there is of each kind, and of health checks.
fn with_checks<T>(times: [T; KINDS], checks: T) -> [T; KINDS + 1] {
    let [connect, first_byte, duration, round_trip, session] = times;
    [connect, first_byte, duration, round_trip, session, checks]
}

fn nothing_measured() -> Value {
    latency([(None, None); KINDS + 1])
}

fn latency(of: [(Option<Percentiles>, Option<Percentiles>); KINDS + 1]) -> Value {
    let values = LATENCIES.iter().zip(of).map(|(name, (last_minute, since_start))| {
        ((*name).to_owned(), json!({ "last_minute": last_minute, "since_start": since_start }))
    });
    values.collect()
}
