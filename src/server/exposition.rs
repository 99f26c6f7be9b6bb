//! The metrics: what the control thread and the lives know, as Prometheus families.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;
use std::time::SystemTime;

use crate::address::Address;
use crate::config::{HeaderFormat, Protocol};
use crate::connection::measured::{KINDS, ROUND_TRIP, SESSION};
use crate::control::lookups::Outcome;
use crate::metrics::Families;
use crate::metrics::latency::{self, Buckets};
use crate::net::limits;
use crate::pool::rejection::Rejection;
use crate::pool::{AdminState, Health, Upstream, UpstreamKey};
use crate::server::slowness::Phase;
use crate::server::state::State;
use crate::server::status::Usage;
use crate::snapshot::{ListenerLife, Moved, SessionCounters, Snapshot};
use crate::termination::{DropReason, Termination};

/// An upstream with the labels of its samples.
struct Labelled<'a> {
    pool: &'a str,
    address: String,
    upstream: &'a Upstream,
    key: UpstreamKey,
}

impl State {
    /// The text of `/metrics`.
    pub fn exposition(&self) -> String {
        let mut families = Families::new();
        self.process_families(&mut families);
        self.listener_families(&mut families);
        self.session_families(&mut families);
        let snapshot = self.snapshot.load();
        let mut upstreams: BTreeMap<(&str, &Address), &Upstream> = BTreeMap::new();
        for pool in snapshot.pools.values() {
            for upstream in &pool.upstreams {
                upstreams.insert((&pool.name, &upstream.life.address), upstream);
            }
        }
        let upstreams: Vec<Labelled> = upstreams
            .into_iter()
            .map(|((pool, address), upstream)| Labelled {
                pool,
                address: address.to_string(),
                upstream,
                key: UpstreamKey { pool: pool.to_owned(), address: address.clone() },
            })
            .collect();
        self.pool_families(&mut families, &snapshot);
        self.upstream_families(&mut families, &upstreams);
        self.upstream_states(&mut families, &upstreams);
        self.time_families(&mut families, &upstreams);
        self.check_families(&mut families, &upstreams);
        self.name_families(&mut families);
        families.into_text()
    }

    fn process_families(&self, families: &mut Families) {
        let started = self.started.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs_f64();
        families
            .gauge("preface_build_info", "Always 1; the version is in the label.")
            .sample(&[("version", env!("CARGO_PKG_VERSION"))], 1_u64);
        families
            .gauge("preface_start_time_seconds", "When the process started, in seconds since 1970.")
            .sample(&[], started);
        families
            .gauge("preface_connections_open", "Client connections open now.")
            .sample(&[], self.open.count() as u64);
        families
            .gauge("preface_connections_max", "Client connections that may be open at once.")
            .sample(&[], self.inputs.connections_max as u64);
        let mut reloads = families.counter("preface_reloads_total", "Reloads by their outcome.");
        for (outcome, count) in ["applied", "unchanged", "refused"].iter().zip(self.reloads) {
            reloads.sample(&[("outcome", outcome)], count);
        }
        let refused = self.reports.front().is_some_and(|report| !report.errors.is_empty());
        families
            .gauge("preface_config_last_reload_successful", "0 while the last reload was refused: the file is wrong.")
            .sample(&[], u64::from(!refused));
        families
            .counter("preface_log_lines_dropped_total", "Log lines dropped because standard output was not read.")
            .sample(&[], self.log.dropped());
        families
            .counter("preface_worker_unresponsive_total", "Times that a worker did not answer within 200 ms.")
            .sample(&[], self.unresponsive);
        let mut busy = families.counter(
            "preface_worker_cpu_seconds_total",
            "Processor time by worker: its rate is the busy share, 1 is a whole processor.",
        );
        for (worker, (cpu, _)) in self.history.workers().enumerate() {
            busy.sample(&[("worker", &worker.to_string())], cpu.as_secs_f64());
        }
        let usage = Usage::now(self.descriptors);
        families
            .counter("preface_process_cpu_seconds_total", "Processor time of the process.")
            .sample(&[], limits::process_time().as_secs_f64());
        families
            .gauge("preface_process_resident_memory_bytes", "Resident memory of the process.")
            .sample(&[], usage.memory_bytes);
        families
            .gauge("preface_process_open_descriptors", "Descriptors that the process has open.")
            .sample(&[], usage.descriptors);
        families
            .gauge("preface_process_max_descriptors", "Descriptors that the process may have open.")
            .sample(&[], self.descriptors);
        families
            .histogram("preface_reload_duration_seconds", "Load, validation, binding and building of a reload.")
            .distribution(&[], self.history.reload_buckets(), latency::WAITS);
    }

    fn pool_families(&self, families: &mut Families, snapshot: &Snapshot) {
        let names = || self.config.pools.keys();
        let mut usable = families.gauge("preface_pool_usable", "1 while a new connection would get an upstream.");
        for name in names() {
            let is_usable = snapshot.pools.values().filter(|pool| *pool.name == **name).all(|pool| pool.is_usable());
            usable.sample(&[("pool", name)], is_usable);
        }
        let nothing: [Buckets; KINDS] = Default::default();
        let udp = self.udp_pools();
        let mut distribution = |name, help, kind: usize, shown: Range<usize>| {
            let mut family = families.histogram(name, help);
            for pool in names().filter(|pool| kind < ROUND_TRIP || udp.contains(pool.as_str())) {
                let buckets = self.history.pool_buckets(pool).unwrap_or(&nothing);
                family.distribution(&[("pool", pool)], &buckets[kind], shown.clone());
            }
        };
        distribution("preface_pool_connect_seconds", "Connects that succeeded.", 0, latency::WAITS);
        distribution("preface_pool_first_byte_seconds", "From accept to the upstream's first byte.", 1, latency::WAITS);
        distribution("preface_pool_connection_seconds", "From accept to end.", 2, latency::LIFETIMES);
        distribution(
            "preface_pool_round_trip_seconds",
            "UDP: from a client's first datagram without a reply to the next reply.",
            ROUND_TRIP,
            latency::WAITS,
        );
        distribution(
            "preface_pool_session_seconds",
            "UDP: from a session's first datagram to its end.",
            SESSION,
            latency::LIFETIMES,
        );
    }

    /// Pools that a UDP listener sends to.
    fn udp_pools(&self) -> BTreeSet<&str> {
        let listeners = self.config.listeners.values().filter(|listener| listener.serves(Protocol::Udp));
        listeners.map(|listener| listener.pool.as_str()).collect()
    }

    fn time_families(&self, families: &mut Families, upstreams: &[Labelled]) {
        let nothing = Buckets::default();
        let udp = self.udp_pools();
        let of_udp = [ROUND_TRIP, SESSION];
        let mut distribution = |name, help, kind: usize, shown: Range<usize>| {
            let mut family = families.histogram(name, help);
            let has_kind = |one: &&Labelled| !of_udp.contains(&kind) || udp.contains(one.pool);
            for Labelled { pool, address, key, .. } in upstreams.iter().filter(has_kind) {
                let buckets = self.history.upstream_buckets(key).map_or(&nothing, |all| all[kind]);
                family.distribution(&[("pool", pool), ("upstream", address)], buckets, shown.clone());
            }
        };
        distribution("preface_upstream_connect_seconds", "Connects that succeeded.", 0, latency::WAITS);
        distribution(
            "preface_upstream_first_byte_seconds",
            "From accept to the upstream's first byte.",
            1,
            latency::WAITS,
        );
        distribution("preface_upstream_connection_seconds", "From accept to end.", 2, latency::LIFETIMES);
        distribution(
            "preface_upstream_round_trip_seconds",
            "UDP: from a client's first datagram without a reply to the next reply.",
            ROUND_TRIP,
            latency::WAITS,
        );
        distribution(
            "preface_upstream_session_seconds",
            "UDP: from a session's first datagram to its end.",
            SESSION,
            latency::LIFETIMES,
        );
        distribution("preface_health_check_seconds", "Health checks that said something.", KINDS, latency::WAITS);
    }

    fn listener_families(&self, families: &mut Families) {
        let lives: BTreeMap<&String, &Arc<ListenerLife>> = self.inputs.listener_lives.iter().collect();
        let mut open = families.gauge("preface_listener_connections_open", "Connections open now, by listener.");
        for (name, life) in &lives {
            open.sample(&[("listener", name)], u64::from(life.open.load(Relaxed)));
        }
        let mut accepted =
            families.counter("preface_connections_accepted_total", "Connections accepted, refused ones included.");
        for (name, life) in &lives {
            accepted.sample(&[("listener", name)], life.accepted.load(Relaxed));
        }
        let mut ended =
            families.counter("preface_connections_ended_total", "Connections ended, by who, phase and why.");
        for (name, life) in &lives {
            for termination in Termination::ALL {
                let count = life.ends[*termination as usize].load(Relaxed);
                if count > 0 {
                    let (who, phase) = (termination.who().as_str(), termination.phase().as_str());
                    let labels =
                        [("listener", name.as_str()), ("who", who), ("phase", phase), ("why", termination.why())];
                    ended.sample(&labels, count);
                }
            }
        }
        let mut bytes = families
            .counter("preface_bytes_total", "Payload bytes: in from clients, out to clients; headers not counted.");
        for (name, life) in &lives {
            bytes.sample(&[("listener", name), ("direction", "in")], life.bytes_in.load(Relaxed));
            bytes.sample(&[("listener", name), ("direction", "out")], life.bytes_out.load(Relaxed));
        }
        let mut headers = families.counter(
            "preface_headers_sent_total",
            "Headers sent, by version; UDP: one for each datagram that had one.",
        );
        for (name, life) in &lives {
            for (format, count) in HeaderFormat::ALL.iter().zip(&life.headers) {
                headers.sample(&[("listener", name), ("version", format.as_str())], count.load(Relaxed));
            }
        }
    }

    fn session_families(&self, families: &mut Families) {
        let is_udp = |name: &str| self.config.listeners.get(name).is_some_and(|one| one.serves(Protocol::Udp));
        let lives = self.inputs.listener_lives.iter();
        let lives: BTreeMap<&str, &SessionCounters> =
            lives.filter(|(name, _)| is_udp(name)).map(|(name, life)| (name.as_str(), &life.sessions)).collect();
        let mut open = families.gauge("preface_sessions_open", "UDP sessions open now, by listener.");
        for (name, counters) in &lives {
            open.sample(&[("listener", name)], counters.open.load(Relaxed));
        }
        let mut begun = families.counter("preface_sessions_begun_total", "UDP sessions begun.");
        for (name, counters) in &lives {
            begun.sample(&[("listener", name)], counters.begun.load(Relaxed));
        }
        let mut ended = families.counter("preface_sessions_ended_total", "UDP sessions ended, by who, phase and why.");
        for (name, counters) in &lives {
            for termination in Termination::ALL {
                let count = counters.ends[*termination as usize].load(Relaxed);
                if count > 0 {
                    let (who, phase) = (termination.who().as_str(), termination.phase().as_str());
                    let labels = [("listener", *name), ("who", who), ("phase", phase), ("why", termination.why())];
                    ended.sample(&labels, count);
                }
            }
        }
        let mut moved =
            families.counter("preface_sessions_moved_total", "UDP sessions that went on with another upstream.");
        for (name, counters) in &lives {
            for (why, count) in Moved::ALL.iter().zip(&counters.moved) {
                moved.sample(&[("listener", name), ("reason", why.as_str())], count.load(Relaxed));
            }
        }
        for (family, help, count) in [
            ("preface_datagrams_total", "Datagrams passed on: in from clients, out to clients.", 0),
            ("preface_datagram_bytes_total", "Their payload; headers not counted.", 1),
            (
                "preface_datagrams_segmented_total",
                "Those of them that left together, as segments of one larger send.",
                2,
            ),
        ] {
            let mut family = families.counter(family, help);
            for (name, counters) in &lives {
                let counts = [&counters.datagrams, &counters.bytes, &counters.segmented][count];
                for (direction, count) in ["in", "out"].iter().zip(counts) {
                    family.sample(&[("listener", name), ("direction", direction)], count.load(Relaxed));
                }
            }
        }
        let mut dropped = families.counter("preface_datagrams_dropped_total", "Datagrams not passed on, by reason.");
        for (name, counters) in &lives {
            for (reason, count) in DropReason::ALL.iter().zip(&counters.dropped) {
                dropped.sample(&[("listener", name), ("reason", reason.as_str())], count.load(Relaxed));
            }
        }
    }

    fn upstream_families(&self, families: &mut Families, upstreams: &[Labelled]) {
        let mut open = families.gauge("preface_upstream_connections_open", "Connections open now, by upstream.");
        for Labelled { pool, address, upstream, .. } in upstreams {
            open.sample(&[("pool", pool), ("upstream", address)], u64::from(upstream.life.open()));
        }
        let mut counter = |name, help, value: fn(&Upstream) -> &AtomicU64| {
            let mut family = families.counter(name, help);
            for Labelled { pool, address, upstream, .. } in upstreams {
                family.sample(&[("pool", pool), ("upstream", address)], value(upstream).load(Relaxed));
            }
        };
        counter("preface_upstream_connections_total", "Connections established.", |up| &up.life.counters.connections);
        counter("preface_upstream_connect_failures_total", "Connects that failed.", |up| {
            &up.life.counters.connect_failures
        });
        counter("preface_upstream_bytes_in_total", "Payload bytes sent to the upstream.", |up| {
            &up.life.counters.bytes_in
        });
        counter("preface_upstream_bytes_out_total", "Payload bytes from the upstream.", |up| {
            &up.life.counters.bytes_out
        });
        let mut datagrams = families
            .counter("preface_upstream_datagrams_total", "UDP: datagrams passed on: in from clients, out to clients.");
        let udp = self.udp_pools();
        for Labelled { pool, address, upstream, .. } in upstreams.iter().filter(|one| udp.contains(one.pool)) {
            for (direction, count) in ["in", "out"].iter().zip(&upstream.life.counters.datagrams) {
                let labels = [("pool", *pool), ("upstream", address.as_str()), ("direction", direction)];
                datagrams.sample(&labels, count.load(Relaxed));
            }
        }
    }

    fn upstream_states(&self, families: &mut Families, upstreams: &[Labelled]) {
        let mut rejected = families.counter(
            "preface_headers_rejected_total",
            "Connections that looked as if the upstream had not taken the header, or had missed one.",
        );
        for Labelled { pool, address, upstream, .. } in upstreams {
            for (rejection, count) in Rejection::ALL.iter().zip(&upstream.life.counters.rejections) {
                let labels = [("pool", *pool), ("upstream", address.as_str()), ("how", rejection.as_str())];
                rejected.sample(&labels, count.load(Relaxed));
            }
        }
        let mut suspected = families.gauge(
            "preface_upstream_header_rejected",
            "1 while the upstream seems to reject the header, or to miss one: see the log or the status.",
        );
        for Labelled { pool, address, key, .. } in upstreams {
            let is_certain = self.suspicions.get(key).is_some_and(|suspicion| suspicion.is_certain);
            suspected.sample(&[("pool", pool), ("upstream", address)], is_certain);
        }
        let mut silent = families.gauge(
            "preface_upstream_never_answers",
            "1 while the upstream closes without an answer, and has never given one: it rejects the header, or misses one, or never answers at all.",
        );
        for Labelled { pool, address, key, .. } in upstreams {
            let is_silent = self.suspicions.get(key).is_some_and(|suspicion| !suspicion.is_certain);
            silent.sample(&[("pool", pool), ("upstream", address)], is_silent);
        }
        let mut slow = families.gauge(
            "preface_upstream_slow",
            "1 while the upstream is clearly slower than its siblings and than it was before: see the log or the status.",
        );
        for Labelled { pool, address, key, .. } in upstreams {
            for phase in Phase::ALL {
                let labels = [("pool", *pool), ("upstream", address.as_str()), ("phase", phase.as_str())];
                slow.sample(&labels, self.slow.of(key).is_some_and(|(slow, _)| slow == phase));
            }
        }
        let mut health =
            families.gauge("preface_upstream_health", "1 for the health that checks observed, 0 for the others.");
        for Labelled { pool, address, upstream, .. } in upstreams {
            for value in [Health::Unknown, Health::Healthy, Health::Unhealthy] {
                let labels = [("pool", *pool), ("upstream", address.as_str()), ("health", value.as_str())];
                health.sample(&labels, u64::from(upstream.candidate.health == value));
            }
        }
        let mut admin =
            families.gauge("preface_upstream_admin", "1 for the state that the operator ordered, 0 for the others.");
        for Labelled { pool, address, upstream, .. } in upstreams {
            for value in [AdminState::Enabled, AdminState::Draining, AdminState::Disabled] {
                let labels = [("pool", *pool), ("upstream", address.as_str()), ("admin", value.as_str())];
                admin.sample(&labels, u64::from(upstream.candidate.admin == value));
            }
        }
    }

    fn check_families(&self, families: &mut Families, upstreams: &[Labelled]) {
        let mut checks =
            families.counter("preface_health_checks_total", "Health checks by result; void ones say nothing.");
        for Labelled { pool, address, key, .. } in upstreams {
            let Some(checker) = self.checkers.get(key) else { continue };
            let stats = checker.stats();
            for (result, count) in [("passed", stats.passed()), ("failed", stats.failed()), ("void", stats.void())] {
                checks.sample(&[("pool", pool), ("upstream", address), ("result", result)], count);
            }
        }
    }

    fn name_families(&self, families: &mut Families) {
        let mut lookups = families.counter("preface_dns_lookups_total", "Look-ups of upstreams' names, by outcome.");
        for (name, counts) in self.names.counts() {
            for (outcome, count) in Outcome::ALL.iter().zip(counts.lookups) {
                lookups.sample(&[("name", &name), ("outcome", outcome.as_str())], count);
            }
        }
        let mut addresses =
            families.gauge("preface_dns_addresses", "Addresses in the last good answer for a name; 0: there was none.");
        for (name, counts) in self.names.counts() {
            addresses.sample(&[("name", &name)], counts.addresses as u64);
        }
        let mut ages = families.gauge(
            "preface_dns_answer_age_seconds",
            "Since the last good answer for a name; beyond its TTL and 5 minutes, look-ups fail.",
        );
        for (name, counts) in self.names.counts() {
            if let Some(age) = counts.age {
                ages.sample(&[("name", &name)], age.as_secs_f64());
            }
        }
    }
}
