//! The status as JSON: everything an operator asks for, and the configuration in force.
//!
//! `GET /status`, shortened; `RATES` are those of the last five seconds, `LATENCY` is below.
//!
//! ```text
//! { version, pid, started, time, config, state: "running" | "stopping", workers: N,
//!   connections: { open, max }, rates: RATES, ends: ENDS,
//!   process: { memory_bytes, descriptors, descriptors_max, cpu_seconds, workers: [ { cpu_seconds, busy: 0.0..1.0 } ] },
//!   listeners: { NAME: { bind: [], pool, open, accepted, bytes_in, bytes_out, headers: { v1, v2 }, rates: RATES,
//!                        ends: { "who.phase.why": N }, ends_10m: { "who.phase.why": N }, sessions: SESSIONS,
//!                        local_resources: null | { since, count_10m, reason, change } } },
//!   pools: { NAME: { balance, usable, open, rates: RATES, latency: LATENCY, upstreams: [
//!            { address, health, health_reason, health_since, admin, admin_since, admin_by, weight, backup, header,
//!              open, connections, connect_failures, bytes_in, bytes_out, datagrams_in, datagrams_out,
//!              rates: RATES, latency: LATENCY,
//!              now_ms: { connect, first_byte },   medians of the last seconds, or null
//!              name: null | what the file says, where it says a name,
//!              failing: null | { in_a_row, since, last },   connects, the last ones of which all failed
//!              failures_since: null | time,   each interval since has a failed connect
//!              slow: null | { phase: "connect" | "first_byte", since, now_ms, before_ms, siblings_ms },
//!              header_rejected: null | { how, since, reason, change, certain: bool },
//!              rejections: { reset, closed, http_400, tls_alert: N },
//!              checks: { passed, failed, void, last: { time, outcome, reason, duration_ms } } } ],
//!            names: [ { name, addresses: [], from, answered, ttl_s, remarks: [], outcome, error, failing_since, next } ] } },
//!   reloads: [ { time, trigger, outcome, changes: [], pending: [], errors: [], warnings: [], duration_ms } ],   newest first
//!   reloads_refused_since: null | time,   of the first refused one since one was not
//!   reload_ms: { last_minute: PERCENTILES, since_start: PERCENTILES },
//!   log: { level, by, since },
//!   pending: [],   what of the file applies at the next start only
//!   warnings: [], log_lines_dropped: N, snapshot: N,
//!   problems: [ { severity: "bad" | "warn", kind, pool, upstream, what, since, advice } ] }   the worst first; see `problems`
//!
//! SESSIONS     { open, max, begun, datagrams_in, datagrams_out, segmented_in, segmented_out, bytes_in, bytes_out,
//!                moved: { reason: N }, dropped, dropped_10m: { reason: N }, ends, ends_10m: { "who.phase.why": N } }
//!              of a listener that serves UDP; its `open`, `accepted`, bytes and ends are of TCP alone
//! RATES        { connections_per_s, failures_per_s, bytes_in_per_s, bytes_out_per_s, datagrams_in_per_s, datagrams_out_per_s }
//!              of connections and UDP sessions together; failures: of a listener ends that aren't regular, of a pool or
//!              upstream failed connects
//! LATENCY      { connect_ms, first_byte_ms, duration_ms, round_trip_ms, session_ms, health_check_ms:
//!                { last_minute: PERCENTILES, since_start: PERCENTILES } }
//!              of UDP: round_trip_ms, from a client's first datagram without a reply to the next reply; session_ms, from
//!              a session's first datagram to its end
//! PERCENTILES  { count, p50, p90, p99, p999, max } in milliseconds, or null where nothing was measured.
//!              A pool's are exact to 1 %, those of upstreams, checks and reloads are estimated from buckets
//! ENDS         { total: { "who.phase.why": N }, last_10m: { "who.phase.why": N } }
//! ```
//!
//! `GET /history`: the last ten minutes in columns, the newest last, a column as long as `times`. null: it did not
//! exist yet, or (in latencies) nothing was measured in that interval.
//!
//! ```text
//! { interval_s: 5, times: [ "2026-...Z" ],
//!   process: SERIES, listeners: { NAME: SERIES }, pools: { NAME: SERIES + LATENCIES + { upstreams: { ADDRESS: SERIES + LATENCIES } } } }
//!
//! SERIES     { open: [], connections_per_s: [], failures_per_s: [], bytes_in_per_s: [], bytes_out_per_s: [],
//!              datagrams_in_per_s: [], datagrams_out_per_s: [] }
//!            of connections and UDP sessions together; a listener that serves UDP has also
//!            sessions: { open: [], begun_per_s: [], dropped_per_s: { reason: [] } }, the reasons that there were
//! LATENCIES  { connect_ms, first_byte_ms, duration_ms, round_trip_ms, session_ms, health_check_ms: { p50: [], p99: [], max: [] } }
//! ```

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Instant, SystemTime};

use serde_json::{Map, Value, json};

use crate::address::Address;
use crate::config::{Bind, HeaderFormat, Protocol};
use crate::net::limits;
use crate::pool::rejection::Rejection;
use crate::pool::{Pool, Upstream, UpstreamKey};
use crate::server::history;
use crate::server::local_resources::Shortage;
use crate::server::problems::problems;
use crate::server::slowness::Phase;
use crate::server::state::State;
use crate::server::suspicion::Suspicion;
use crate::snapshot::{ListenerLife, Moved, SessionCounters, Snapshot};
use crate::termination::{DropReason, Termination};

/// RFC 3339 in UTC, with milliseconds.
pub fn time(time: SystemTime) -> String {
    humantime::format_rfc3339_millis(time).to_string()
}

impl State {
    /// Everything on one page.
    pub fn status(&self) -> Value {
        let snapshot = self.snapshot.load();
        let mut listeners = Map::new();
        for listener in self.config.listeners.values() {
            let binds: Vec<String> = listener.binds.iter().map(bind_text).collect();
            let Some(life) = self.inputs.listener_lives.get(&listener.name) else { continue };
            let mut value = listener_value(life);
            value["rates"] = self.history.listener_rates(&listener.name);
            value["ends_10m"] = ends(&self.history.recent_ends(Some(&listener.name)));
            value["bind"] = json!(binds);
            value["protocol"] = json!(listener.protocols.iter().map(|one| one.as_str()).collect::<Vec<_>>());
            if listener.serves(Protocol::Udp) {
                let max = snapshot.slots.values().find(|slot| slot.config.name == listener.name);
                let mut sessions = sessions_value(&life.sessions, max.map_or(0, |slot| slot.sessions_max));
                let (ended, dropped) = self.history.recent_sessions(&listener.name);
                sessions["ends_10m"] = ends(&ended);
                let dropped = DropReason::ALL.iter().zip(dropped).filter(|(_, count)| *count > 0);
                sessions["dropped_10m"] =
                    dropped.map(|(reason, count)| (reason.as_str().to_owned(), json!(count))).collect();
                value["sessions"] = sessions;
            }
            value["local_resources"] = self.shortages.get(&listener.name).map_or(Value::Null, Shortage::value);
            value["pool"] = json!(listener.pool);
            listeners.insert(listener.name.clone(), value);
        }
        let mut value = json!({
            "version": env!("CARGO_PKG_VERSION"),
            "pid": std::process::id(),
            "started": time(self.started),
            "time": time(SystemTime::now()),
            "config": self.path.display().to_string(),
            "state": if self.stopping { "stopping" } else { "running" },
            "workers": self.workers.len(),
            "connections": { "open": self.open.count(), "max": self.inputs.connections_max },
            "rates": self.history.process_rates(),
            "ends": { "total": ends(&self.ends_total()), "last_10m": ends(&self.history.recent_ends(None)) },
            "process": self.process_value(),
            "snapshot": snapshot.generation,
            "listeners": listeners,
            "pools": self.pools_value(&snapshot),
            "reloads": self.reports.iter().map(|report| json!(**report)).collect::<Vec<_>>(),
            "reloads_refused_since": self.refused_since,
            "reload_ms": self.history.reload_latency(),
            "warnings": self.warnings,
            "pending": self.pending,
            "log": { "level": self.log_level.level, "by": self.log_level.by, "since": time(self.log_level.since) },
            "log_lines_dropped": self.log.dropped(),
        });
        value["problems"] = json!(problems(&value));
        value
    }

    fn pools_value(&self, snapshot: &Snapshot) -> Map<String, Value> {
        let mut pools: BTreeMap<String, BTreeMap<Address, Value>> = BTreeMap::new();
        for pool in snapshot.pools.values() {
            let upstreams = pools.entry(pool.name.to_string()).or_default();
            for upstream in &pool.upstreams {
                upstreams.insert(upstream.life.address.clone(), self.upstream_value(pool, upstream));
            }
        }
        pools
            .into_iter()
            .map(|(name, upstreams)| {
                let usable = snapshot.pools.values().filter(|pool| *pool.name == *name).all(|pool| pool.is_usable());
                let upstreams: Vec<Value> = upstreams.into_values().collect();
                let open: u64 = upstreams.iter().filter_map(|upstream| upstream["open"].as_u64()).sum();
                let (rates, latency) = (self.history.pool_rates(&name), self.history.pool_latency(&name));
                let balance = self.config.pools.get(&name).map(|pool| pool.balance.as_str());
                let mut value = json!({
                    "balance": balance, "usable": usable, "open": open, "rates": rates, "latency": latency, "upstreams": upstreams
                });
                if let Some(names) = self.config.pools.get(&name).map(|pool| self.names_value(pool)) {
                    value["names"] = names;
                }
                (name, value)
            })
            .collect()
    }

    fn upstream_value(&self, pool: &Arc<Pool>, upstream: &Upstream) -> Value {
        let key = UpstreamKey { pool: pool.name.to_string(), address: upstream.life.address.clone() };
        let health = self.inputs.health.get(&key);
        let unrecorded = if pool.config.health_check.is_some() { "not checked yet" } else { "not checked" };
        let admin = self.inputs.admin.get(&key);
        let counters = &upstream.life.counters;
        let suspicion = self.suspicions.get(&key);
        let mut reason = health.map_or(unrecorded, |record| record.reason.as_str()).to_owned();
        if let Some(suspicion) = suspicion {
            reason += &format!("; header rejected? {}", suspicion.reason);
        }
        let mut value = json!({
            "address": key.address,
            "name": pool.config.upstreams[upstream.entry].name.as_deref().map(ToString::to_string),
            "health": upstream.candidate.health,
            "health_reason": reason,
            "health_since": time(health.map_or(self.started, |record| record.since)),
            "admin": upstream.candidate.admin,
            "admin_since": admin.map(|record| time(record.since)),
            "admin_by": admin.map(|record| record.by.as_str()),
            "weight": upstream.candidate.weight,
            "backup": upstream.candidate.backup,
            "header": pool.config.upstreams[upstream.entry].proxy_protocol.map_or("off", |format| format.as_str()),
            "open": upstream.life.open(),
            "connections": counters.connections.load(Relaxed),
            "connect_failures": counters.connect_failures.load(Relaxed),
            "bytes_in": counters.bytes_in.load(Relaxed),
            "bytes_out": counters.bytes_out.load(Relaxed),
            "datagrams_in": counters.datagrams[0].load(Relaxed),
            "datagrams_out": counters.datagrams[1].load(Relaxed),
            "header_rejected": suspicion.map(Suspicion::value),
            "now_ms": self.medians_now(&key),
            "slow": self.slow.of(&key).map(|(phase, slowness)| slowness.value(phase)),
            "rejections": rejections(upstream),
            "failing": failing(upstream),
            "failures_since": self.history.failures_since(&key).map(time),
            "rates": self.history.upstream_rates(&key),
            "latency": self.history.upstream_latency(&key),
        });
        if let Some(checker) = self.checkers.get(&key) {
            let stats = checker.stats();
            value["checks"] = json!({
                "passed": stats.passed(), "failed": stats.failed(), "void": stats.void(), "last": stats.last(),
            });
        }
        value
    }

    /// What connections took in the last seconds.
    fn medians_now(&self, key: &UpstreamKey) -> Value {
        let now = Instant::now();
        let medians = Phase::ALL.into_iter().enumerate().map(|(kind, phase)| {
            let [recent, _] = self.history.recent(key, kind, now);
            (phase.as_str().to_owned(), json!(recent.percentiles().map(|all| all.p50)))
        });
        medians.collect()
    }

    fn process_value(&self) -> Value {
        let Usage { memory_bytes, descriptors } = Usage::now(self.descriptors);
        let workers = self.history.workers();
        let workers: Vec<Value> = workers
            .map(|(cpu, busy)| json!({ "cpu_seconds": cpu.as_secs_f64(), "busy": (busy * 1000.0).round() / 1000.0 }))
            .collect();
        json!({
            "memory_bytes": memory_bytes,
            "descriptors": descriptors,
            "descriptors_max": self.descriptors,
            "cpu_seconds": limits::process_time().as_secs_f64(),
            "workers": workers,
        })
    }

    fn ends_total(&self) -> [u64; Termination::ALL.len()] {
        let mut sums = [0; Termination::ALL.len()];
        for life in self.inputs.listener_lives.values() {
            sums.iter_mut().zip(&life.ends).for_each(|(sum, count)| *sum += count.load(Relaxed));
        }
        sums
    }

    /// The file in force as written, where it is, and what of it is not in force yet.
    pub fn config_in_force(&self) -> Value {
        json!({ "file": self.path.display().to_string(), "toml": self.text, "pending": self.pending })
    }
}

/// An address as the kernel has it: `":80"` is `[::]:80`.
fn bind_text(bind: &Bind) -> String {
    bind.ip().map_or_else(|| bind.to_string(), |bind| bind.address.to_string())
}

/// What of a listener's UDP happened, by its word; the words that never did are left out.
fn sessions_value(counters: &SessionCounters, max: usize) -> Value {
    let happened = |counts: Map<String, Value>| counts.into_iter().filter(|(_, count)| *count != 0).collect();
    let ends = Termination::ALL.iter().map(|end| end.to_string()).zip(&counters.ends);
    let ends: Map<String, Value> = happened(by_word(ends));
    let dropped: Map<String, Value> =
        happened(by_word(DropReason::ALL.iter().map(|reason| reason.as_str()).zip(&counters.dropped)));
    json!({
        "open": counters.open.load(Relaxed),
        "max": max,
        "begun": counters.begun.load(Relaxed),
        "datagrams_in": counters.datagrams[0].load(Relaxed),
        "datagrams_out": counters.datagrams[1].load(Relaxed),
        "segmented_in": counters.segmented[0].load(Relaxed),
        "segmented_out": counters.segmented[1].load(Relaxed),
        "bytes_in": counters.bytes[0].load(Relaxed),
        "bytes_out": counters.bytes[1].load(Relaxed),
        "moved": by_word(Moved::ALL.iter().map(|why| why.as_str()).zip(&counters.moved)),
        "dropped": dropped,
        "ends": ends,
    })
}

fn by_word<'a>(counts: impl Iterator<Item = (impl Into<String>, &'a AtomicU64)>) -> Map<String, Value> {
    counts.map(|(word, count)| (word.into(), json!(count.load(Relaxed)))).collect()
}

/// Connects that all failed, the last one not long ago: nobody may have come since.
fn failing(upstream: &Upstream) -> Value {
    let Some((in_a_row, [first, last])) = upstream.life.failing() else { return Value::Null };
    let is_recent = last.elapsed().is_ok_and(|elapsed| elapsed < history::INTERVAL * history::POINTS_MAX as u32);
    if is_recent { json!({ "in_a_row": in_a_row, "since": time(first), "last": time(last) }) } else { Value::Null }
}

/// Connections that looked as if their header had been rejected, by how; those that there were.
fn rejections(upstream: &Upstream) -> Value {
    let counts = Rejection::ALL.iter().zip(&upstream.life.counters.rejections);
    let counts = counts.map(|(rejection, count)| (rejection.as_str().to_owned(), count.load(Relaxed)));
    counts.filter(|(_, count)| *count > 0).map(|(how, count)| (how, json!(count))).collect()
}

/// What the process takes of the machine.
pub struct Usage {
    /// Resident.
    pub memory_bytes: u64,
    /// Open.
    pub descriptors: u64,
}

impl Usage {
    /// As the kernel counts it; zero where /proc is hidden. Of `descriptors_max` all are open where none is left to count
    /// with.
    pub fn now(descriptors_max: usize) -> Usage {
        let pages = |text: String| text.split(' ').nth(1).and_then(|pages| pages.parse::<u64>().ok());
        let memory = std::fs::read_to_string("/proc/self/statm").ok().and_then(pages);
        Usage {
            memory_bytes: memory.unwrap_or_default() * rustix::param::page_size() as u64,
            descriptors: match std::fs::read_dir("/proc/self/fd") {
                Ok(entries) => entries.count() as u64,
                Err(error) if error.raw_os_error() == Some(libc::EMFILE) => descriptors_max as u64,
                Err(_) => 0,
            },
        }
    }
}

/// By cause; those that there were.
fn ends(counts: &[u64; Termination::ALL.len()]) -> Value {
    let seen = Termination::ALL.iter().zip(counts).filter(|(_, count)| **count > 0);
    seen.map(|(termination, count)| (termination.to_string(), json!(count))).collect()
}

fn listener_value(life: &ListenerLife) -> Value {
    json!({
        "open": life.open.load(Relaxed),
        "accepted": life.accepted.load(Relaxed),
        "bytes_in": life.bytes_in.load(Relaxed),
        "bytes_out": life.bytes_out.load(Relaxed),
        "headers": by_word(HeaderFormat::ALL.iter().map(|format| format.as_str()).zip(&life.headers)),
        "ends": ends(&life.ends.each_ref().map(|count| count.load(Relaxed))),
    })
}
