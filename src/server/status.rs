//! The status as JSON: everything an operator asks for, and the configuration in force.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;
use std::time::SystemTime;

use serde_json::{Map, Value, json};

use crate::config::{HeaderFormat, Protocol};
use crate::pool::{Pool, Upstream, UpstreamKey};
use crate::server::state::State;
use crate::snapshot::{ListenerLife, Moved, SessionCounters};
use crate::termination::{DropReason, Termination};

/// RFC 3339 in UTC, with milliseconds.
fn time(time: SystemTime) -> String {
    humantime::format_rfc3339_millis(time).to_string()
}

impl State {
    /// Everything on one page.
    pub fn status(&self) -> Value {
        let snapshot = self.snapshot.load();
        let mut listeners = Map::new();
        for listener in self.config.listeners.values() {
            let binds: Vec<String> = listener.binds.iter().map(|bind| bind.address.to_string()).collect();
            let Some(life) = self.inputs.listener_lives.get(&listener.name) else { continue };
            let mut value = listener_value(life);
            value["bind"] = json!(binds);
            value["protocol"] = json!(listener.protocols.iter().map(|one| one.as_str()).collect::<Vec<_>>());
            if listener.serves(Protocol::Udp) {
                let max = snapshot.slots.values().find(|slot| slot.config.name == listener.name);
                value["sessions"] = sessions_value(&life.sessions, max.map_or(0, |slot| slot.sessions_max));
            }
            value["pool"] = json!(listener.pool);
            listeners.insert(listener.name.clone(), value);
        }
        let mut pools: BTreeMap<String, BTreeMap<SocketAddr, Value>> = BTreeMap::new();
        for pool in snapshot.pools.values() {
            let upstreams = pools.entry(pool.name.to_string()).or_default();
            for upstream in &pool.upstreams {
                upstreams.insert(upstream.life.address, self.upstream_value(pool, upstream));
            }
        }
        let pools: Map<String, Value> = pools
            .into_iter()
            .map(|(name, upstreams)| {
                let usable = snapshot.pools.values().filter(|pool| *pool.name == *name).all(|pool| pool.is_usable());
                let upstreams: Vec<Value> = upstreams.into_values().collect();
                (name, json!({ "usable": usable, "upstreams": upstreams }))
            })
            .collect();
        json!({
            "version": env!("CARGO_PKG_VERSION"),
            "pid": std::process::id(),
            "started": time(self.started),
            "config": self.path.display().to_string(),
            "state": if self.stopping { "stopping" } else { "running" },
            "workers": self.workers.len(),
            "connections": { "open": self.open.count(), "max": self.inputs.connections_max },
            "snapshot": snapshot.generation,
            "listeners": listeners,
            "pools": pools,
            "reloads": self.reports.iter().map(|report| json!(**report)).collect::<Vec<_>>(),
            "warnings": self.warnings,
            "log_lines_dropped": self.log.dropped(),
        })
    }

    fn upstream_value(&self, pool: &Arc<Pool>, upstream: &Upstream) -> Value {
        let address = upstream.life.address;
        let key = UpstreamKey { pool: pool.name.to_string(), address };
        let health = self.inputs.health.get(&key);
        let unrecorded = if pool.config.health_check.is_some() { "not checked yet" } else { "not checked" };
        let admin = self.inputs.admin.get(&key);
        let counters = &upstream.life.counters;
        let mut value = json!({
            "address": address.to_string(),
            "health": upstream.candidate.health,
            "health_reason": health.map_or(unrecorded, |record| record.reason.as_str()),
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
        });
        if let Some(checker) = self.checkers.get(&key) {
            let stats = checker.stats();
            value["checks"] = json!({
                "passed": stats.passed(), "failed": stats.failed(), "void": stats.void(), "last": stats.last(),
            });
        }
        value
    }

    /// The file in force as written, and where it is.
    pub fn config_in_force(&self) -> Value {
        json!({ "file": self.path.display().to_string(), "toml": self.text })
    }
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

fn listener_value(life: &ListenerLife) -> Value {
    let mut ends = Map::new();
    for termination in Termination::ALL {
        let count = life.ends[*termination as usize].load(Relaxed);
        if count > 0 {
            ends.insert(termination.to_string(), json!(count));
        }
    }
    json!({
        "open": life.open.load(Relaxed),
        "accepted": life.accepted.load(Relaxed),
        "bytes_in": life.bytes_in.load(Relaxed),
        "bytes_out": life.bytes_out.load(Relaxed),
        "headers": by_word(HeaderFormat::ALL.iter().map(|format| format.as_str()).zip(&life.headers)),
        "ends": ends,
    })
}
