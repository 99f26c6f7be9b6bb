//! PURE. What changed between two configurations, and what may stay as it is.

use std::collections::BTreeMap;
use std::fmt::{Debug, Display};
use std::sync::Arc;
use std::time::Duration;

use super::{Config, HeaderFormat, HealthCheck, Listener, Pool, Probe, Protocol, Tlvs, Upstream};

/// One line a change, for people, in the order of the file: `pool "ingress": upstream 10.0.0.31:80 added`.
pub fn diff(old: &Config, new: &Config) -> Vec<String> {
    let mut lines = Lines::default();
    runtime_log_admin(&mut lines, old, new);
    for (name, change) in changes(&old.listeners, &new.listeners) {
        let what = format!("listener {name:?}");
        match change {
            Change::Added(listener) => {
                let binds = listener.binds.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
                lines.list.push(format!("{what} added: {binds} to pool {:?}", listener.pool));
            }
            Change::Removed => lines.list.push(format!("{what} removed")),
            Change::Changed(old, new) => changed_listener(lines.below(what), old, new),
        }
    }
    for (name, change) in changes(&old.pools, &new.pools) {
        let what = format!("pool {name:?}");
        match change {
            Change::Added(pool) => {
                let written: Vec<&Upstream> = pool.upstreams.iter().filter(|one| one.name.is_none()).collect();
                lines.list.push(format!("{what} added: upstreams {}", comma(&written)));
            }
            Change::Removed => lines.list.push(format!("{what} removed")),
            Change::Changed(old, new) => changed_pool(lines.below(what), old, new),
        }
    }
    lines.list
}

/// What of the changes applies at the next start only, one line each.
pub fn start_only(old: &Config, new: &Config) -> Vec<String> {
    let probe_bind = |config: &Config| config.admin.probe_bind.map_or("not set".to_owned(), |bind| bind.to_string());
    let values = |config: &Config| {
        [
            ("runtime: workers", config.runtime.workers.to_string()),
            ("runtime: pin_workers", config.runtime.pin_workers.to_string()),
            ("admin: bind", config.admin.bind.to_string()),
            ("admin: probe_bind", probe_bind(config)),
        ]
    };
    let both = values(old).into_iter().zip(values(new));
    let changed = both.filter(|((_, old), (_, new))| old != new);
    changed.map(|((key, old), (_, new))| format!("{key} {old} -> {new} (applies at the next start)")).collect()
}

/// The new configuration with those values as they are in force.
pub fn without_start_only(old: &Config, mut new: Config) -> Config {
    new.runtime.workers = old.runtime.workers;
    new.runtime.pin_workers = old.runtime.pin_workers;
    new.admin.bind = old.admin.bind.clone();
    new.admin.probe_bind = old.admin.probe_bind;
    new
}

/// The new configuration with the old one's `Arc` for every listener and pool that did not change.
pub fn reuse(old: &Config, mut new: Config) -> Config {
    fn keep<T: PartialEq>(old: &BTreeMap<String, Arc<T>>, new: &mut BTreeMap<String, Arc<T>>) {
        for (name, value) in new {
            if let Some(same) = old.get(name).filter(|old| *old == value) {
                *value = same.clone();
            }
        }
    }
    keep(&old.listeners, &mut new.listeners);
    keep(&old.pools, &mut new.pools);
    new
}

enum Change<'a, T> {
    Added(&'a T),
    Removed,
    Changed(&'a T, &'a T),
}

fn changes<'a, T: PartialEq>(
    old: &'a BTreeMap<String, Arc<T>>,
    new: &'a BTreeMap<String, Arc<T>>,
) -> Vec<(&'a str, Change<'a, T>)> {
    let removed = old.keys().filter(|name| !new.contains_key(*name)).map(|name| (name.as_str(), Change::Removed));
    let others = new.iter().filter_map(|(name, new)| match old.get(name) {
        None => Some((name.as_str(), Change::Added(new.as_ref()))),
        Some(old) if old != new => Some((name.as_str(), Change::Changed(old.as_ref(), new.as_ref()))),
        Some(_) => None,
    });
    removed.chain(others).collect()
}

/// The report, and what the next lines are about.
#[derive(Default)]
struct Lines {
    list: Vec<String>,
    what: String,
}

impl Lines {
    fn below(&mut self, what: String) -> &mut Lines {
        self.what = what;
        self
    }

    fn say(&mut self, line: &str) {
        self.list.push(format!("{}: {line}", self.what));
    }

    /// One line if the two differ.
    fn key<T: PartialEq>(&mut self, key: &str, old: &T, new: &T, show: impl Fn(&T) -> String) {
        if old != new {
            self.say(&format!("{key} {} -> {}", show(old), show(new)));
        }
    }

    fn plain<T: PartialEq + Display>(&mut self, key: &str, old: &T, new: &T) {
        self.key(key, old, new, T::to_string);
    }

    fn duration(&mut self, key: &str, old: Duration, new: Duration) {
        self.key(key, &old, &new, |time| humantime::format_duration(*time).to_string());
    }

    fn list<T: PartialEq + Display>(&mut self, key: &str, old: &[T], new: &[T]) {
        self.key(key, &old, &new, |list| format!("[{}]", comma(list)));
    }

    fn optional<T: PartialEq + Debug>(&mut self, key: &str, old: &Option<T>, new: &Option<T>) {
        self.key(key, old, new, |value| {
            value.as_ref().map_or_else(|| "not set".to_owned(), |value| format!("{value:?}"))
        });
    }
}

fn comma<T: Display>(list: &[T]) -> String {
    list.iter().map(T::to_string).collect::<Vec<_>>().join(", ")
}

fn format(format: &Option<HeaderFormat>) -> String {
    format.map_or("off", HeaderFormat::as_str).to_owned()
}

fn runtime_log_admin(lines: &mut Lines, old: &Config, new: &Config) {
    lines.list.extend(start_only(old, new));
    let lines = lines.below("runtime".to_owned());
    let (a, b) = (&old.runtime, &new.runtime);
    lines.plain("max_connections", &a.max_connections, &b.max_connections);
    lines.duration("stop_delay", a.stop_delay, b.stop_delay);
    lines.duration("stop_timeout", a.stop_timeout, b.stop_timeout);
    let lines = lines.below("log".to_owned());
    let (a, b) = (&old.log, &new.log);
    lines.key("level", &a.level, &b.level, |level| format!("{level:?}"));
    lines.plain("format", &a.format, &b.format);
    lines.plain("connections", &a.connections, &b.connections);
    let lines = lines.below("admin".to_owned());
    lines.optional("token_file", &old.admin.token_file, &new.admin.token_file);
}

fn changed_listener(lines: &mut Lines, old: &Listener, new: &Listener) {
    let shown = |listener: &Listener| comma(&listener.binds);
    match shown(old) == shown(new) {
        true if old.binds != new.binds => lines.say("bind: whether \"[::]\" takes IPv4, too, has changed"),
        true => {}
        false => lines.say(&format!("bind [{}] -> [{}]", shown(old), shown(new))),
    }
    lines.list("protocol", &old.protocols, &new.protocols);
    lines.key("pool", &old.pool, &new.pool, |pool| format!("{pool:?}"));
    if old.serves(Protocol::Tcp) || new.serves(Protocol::Tcp) {
        lines.duration("idle_timeout", old.idle_timeout, new.idle_timeout);
    }
    if old.serves(Protocol::Udp) || new.serves(Protocol::Udp) {
        lines.duration("idle_timeout (udp)", old.idle_timeout_udp, new.idle_timeout_udp);
    }
    lines.key("keepalive", &old.keepalive, &new.keepalive, |time| match time {
        None => "off".to_owned(),
        Some(time) => humantime::format_duration(*time).to_string(),
    });
    lines.plain("max_connections", &old.max_connections, &new.max_connections);
    lines.plain("max_connections_per_source", &old.max_connections_per_source, &new.max_connections_per_source);
    lines.plain("max_sessions", &old.max_sessions, &new.max_sessions);
    lines.plain("responses", &old.responses, &new.responses);
    lines.list("allow", &old.allow, &new.allow);
    lines.list("deny", &old.deny, &new.deny);
    changed_tlvs(lines, "", &old.tlvs, &new.tlvs);
}

fn changed_pool(lines: &mut Lines, old: &Pool, new: &Pool) {
    lines.plain("balance", &old.balance, &new.balance);
    lines.plain("udp_header", &old.udp_header, &new.udp_header);
    lines.list("source", &old.source, &new.source);
    lines.duration("connect_timeout", old.connect_timeout, new.connect_timeout);
    lines.duration("connect_deadline", old.connect_deadline, new.connect_deadline);
    lines.plain("retries", &old.retries, &new.retries);
    lines.duration("slow_start", old.slow_start, new.slow_start);
    let (a, b) = (&old.unhealthy_after_failed_connects, &new.unhealthy_after_failed_connects);
    lines.plain("unhealthy_after_failed_connects", a, b);
    lines.duration("drain_timeout", old.drain_timeout, new.drain_timeout);
    lines.plain("on_unhealthy", &old.on_unhealthy, &new.on_unhealthy);
    lines.plain("fast_open", &old.fast_open, &new.fast_open);
    lines.plain("when_none_healthy", &old.when_none_healthy, &new.when_none_healthy);
    match (&old.health_check, &new.health_check) {
        (None, None) => {}
        (None, Some(_)) => lines.say("health_check added"),
        (Some(_), None) => lines.say("health_check removed: its upstreams count as healthy"),
        (Some(old), Some(new)) => changed_health_check(lines, old, new),
    }
    changed_tlvs(lines, "", &old.tlvs, &new.tlvs);
    changed_upstreams(lines, &old.upstreams, &new.upstreams);
}

fn changed_upstreams(lines: &mut Lines, old: &[Upstream], new: &[Upstream]) {
    // What a name stands for is no change of the file.
    let written = |list: &[Upstream]| list.iter().filter(|upstream| upstream.name.is_none()).cloned().collect();
    let (old, new): (Vec<Upstream>, Vec<Upstream>) = (written(old), written(new));
    let key = |upstream: &Upstream| upstream.address.clone();
    let old_by_key: BTreeMap<_, _> = old.iter().map(|upstream| (key(upstream), upstream)).collect();
    let new_by_key: BTreeMap<_, _> = new.iter().map(|upstream| (key(upstream), upstream)).collect();
    for upstream in old.iter().filter(|upstream| !new_by_key.contains_key(&key(upstream))) {
        lines.say(&format!("upstream {upstream} removed"));
    }
    for upstream in &new {
        let what = format!("upstream {upstream}");
        let Some(old) = old_by_key.get(&key(upstream)) else {
            lines.say(&format!("{what} added"));
            continue;
        };
        lines.plain(&format!("{what}: weight"), &old.weight, &upstream.weight);
        lines.plain(&format!("{what}: backup"), &old.backup, &upstream.backup);
        lines.key(&format!("{what}: proxy_protocol"), &old.proxy_protocol, &upstream.proxy_protocol, format);
        lines.plain(&format!("{what}: max_connections"), &old.max_connections, &upstream.max_connections);
        changed_tlvs(lines, &format!("{what}: "), &old.tlvs, &upstream.tlvs);
    }
    let same_set = old.len() == new.len() && old_by_key.keys().eq(new_by_key.keys());
    if same_set && !old.iter().map(key).eq(new.iter().map(key)) {
        lines.say("upstreams are in another order");
    }
}

fn changed_health_check(lines: &mut Lines, old: &HealthCheck, new: &HealthCheck) {
    lines.key("health_check.protocol", &old.probe, &new.probe, |probe| match probe {
        Probe::Tcp { send, expect } if send.is_empty() && expect.is_empty() => "tcp".to_owned(),
        Probe::Tcp { send, expect } => {
            format!("tcp (send \"{}\", expect \"{}\")", send.escape_ascii(), expect.escape_ascii())
        }
        Probe::Udp { send, expect } => {
            format!("udp (send \"{}\", expect \"{}\")", send.escape_ascii(), expect.escape_ascii())
        }
        Probe::Http { path, host, expect_status } => {
            let ranges = expect_status.iter().map(|(low, high)| match low == high {
                true => low.to_string(),
                false => format!("{low}-{high}"),
            });
            let ranges = ranges.collect::<Vec<_>>().join(",");
            let host = host.as_ref().map_or_else(String::new, |host| format!(" host {host}"));
            format!("http ({path}{host}, expect {ranges})")
        }
    });
    lines.duration("health_check.interval", old.interval, new.interval);
    lines.duration("health_check.timeout", old.timeout, new.timeout);
    lines.plain("health_check.healthy_threshold", &old.healthy_threshold, &new.healthy_threshold);
    lines.plain("health_check.unhealthy_threshold", &old.unhealthy_threshold, &new.unhealthy_threshold);
    lines.key("health_check.port", &old.port, &new.port, |port| {
        port.map_or_else(|| "the traffic port".to_owned(), |port| port.to_string())
    });
    lines.plain("health_check.proxy_protocol", &old.proxy_protocol, &new.proxy_protocol);
    lines.plain("health_check.proxy_command", &old.proxy_command, &new.proxy_command);
}

fn changed_tlvs(lines: &mut Lines, before: &str, old: &Tlvs, new: &Tlvs) {
    macro_rules! keys {
        ($($key:ident),+) => {
            $( lines.optional(&format!(concat!("{}tlvs.", stringify!($key)), before), &old.$key, &new.$key); )+
        };
    }
    keys!(vpce_id, azure_link_id, gcp_psc_id, crc32c, unique_id, authority, netns);
    lines.key(&format!("{before}tlvs.vpce_id_by_source"), &old.vpce_id_by_source, &new.vpce_id_by_source, |list| {
        let entries = list.iter().flatten().map(|(network, id)| format!("{network} {id}"));
        format!("[{}]", entries.collect::<Vec<_>>().join(", "))
    });
    lines.key(&format!("{before}tlvs.custom"), &old.custom, &new.custom, |list| {
        let entries = list.iter().flatten().map(|(kind, value)| format!("0x{kind:02X} \"{}\"", value.escape_ascii()));
        format!("[{}]", entries.collect::<Vec<_>>().join(", "))
    });
}
