//! One reload: parse, bind what is new, build and store the snapshot, then listen. It happens entirely or not at all.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use socket2::Socket;
use tokio::sync::oneshot::{self, error::TryRecvError};
use tokio::time::timeout_at;

use crate::address::Address;
use crate::admin::guard::Access;
use crate::config::error::Style;
use crate::config::load;
use crate::config::names::{self, Name};
use crate::config::{self, Config, Parsed, Protocol, diff};
use crate::control::{ReloadOutcome, ReloadReport, ReloadTrigger};
use crate::discovery::surroundings;
use crate::net::limits;
use crate::net::listen;
use crate::net::unix::SocketFile;
use crate::pool::UpstreamKey;
use crate::server::names::log_changes;
use crate::server::state::{Deadline, LogLevel, State, renamed_pools, upstream_keys};
use crate::snapshot::{self, At, SocketKey};
use crate::worker::Message;

/// Reads a configuration out of the bytes of its file.
pub fn parse(path: &Path, content: &[u8]) -> Result<(Parsed, String), Vec<String>> {
    let name = path.display().to_string();
    let text = load::text(path, content.to_owned()).map_err(|error| error.render(Style::Plain))?;
    match config::parse_in(&name, &text, &surroundings::here()) {
        Ok(parsed) => Ok((parsed, text)),
        Err(errors) => Err(errors.render(Style::Plain)),
    }
}

/// The names in a configuration that can be used.
pub fn names_in(path: &Path, content: &[u8]) -> Option<BTreeSet<Name>> {
    parse(path, content).ok().map(|(parsed, _)| names::names(&parsed.config))
}

/// Room for fewer connections than this is hardly meant.
const ROOM_MIN: usize = 64;

/// A reload waits this long at most for sockets of an earlier one to close; they take 0.1 s.
const CLOSING_MAX: Duration = Duration::from_secs(1);

/// And this long at most for its workers to change a socket option.
const SETTING_MAX: Duration = Duration::from_millis(200);

/// An address that a reload has bound and nobody can connect to yet.
pub struct Bound {
    key: SocketKey,
    address: Address,
    /// One for each worker, or the one of which it has one.
    sockets: Vec<Socket>,
    file: Option<SocketFile>,
}

impl State {
    /// Loads this content in place of what runs, and reports what came of it.
    pub async fn reload(&mut self, trigger: ReloadTrigger, content: Result<Vec<u8>, String>) -> Arc<ReloadReport> {
        let begun = Instant::now();
        if !self.stopping {
            self.notifier.reloading();
        }
        let mut report = ReloadReport {
            time: humantime::format_rfc3339_millis(SystemTime::now()).to_string(),
            trigger: trigger.as_str(),
            outcome: ReloadOutcome::Refused,
            changes: Vec::new(),
            pending: Vec::new(),
            errors: Vec::new(),
            warnings: Vec::new(),
            duration_ms: 0.0,
        };
        let parsed = content.map_err(|error| vec![error]).and_then(|content| parse(&self.path, &content));
        match parsed {
            Err(errors) => report.errors = errors,
            Ok((parsed, text)) => {
                report.warnings = parsed.warnings.render(Style::Plain);
                let mut new = parsed.config;
                report.warnings.extend(self.limit_warnings(&new));
                self.resolve(&mut new);
                report.pending = diff::start_only(&self.config, &new);
                let new = diff::reuse(&self.config, diff::without_start_only(&self.config, new));
                report.changes = diff::diff(&self.config, &new);
                match self.apply(new).await {
                    Err(errors) => {
                        report.changes.clear();
                        report.pending.clear();
                        report.errors = errors;
                    }
                    Ok(()) => {
                        report.outcome =
                            if report.changes.is_empty() { ReloadOutcome::Unchanged } else { ReloadOutcome::Applied };
                        self.text = text;
                        self.warnings = report.warnings.clone();
                        self.pending = report.pending.clone();
                    }
                }
            }
        }
        self.look_up_what_is_configured();
        report.duration_ms = begun.elapsed().as_secs_f64() * 1000.0;
        log_report(&report);
        let report = Arc::new(report);
        self.remember(Arc::clone(&report));
        if !self.stopping {
            self.notify_ready();
        }
        report
    }

    /// Puts a configuration in force, or says why it can't be; then nothing has changed.
    pub async fn apply(&mut self, new: Config) -> Result<(), Vec<String>> {
        self.wait_for_closing(&new).await;
        let bound = self.bind(&new)?;
        self.put_in_force(new, bound).await;
        Ok(())
    }

    /// Everything that can fail has succeeded.
    pub async fn put_in_force(&mut self, new: Config, mut bound: Vec<Bound>) {
        for bound in &mut bound {
            self.inputs.slots.insert(bound.key.clone(), self.next_slot);
            self.socket_files.extend(bound.file.take().map(|file| (bound.key.clone(), file)));
            self.next_slot += 1;
        }
        let old = self.go_over_to(new);
        let wanted: HashSet<SocketKey> = self.socket_keys(&self.config).into_keys().collect();
        let mut gone: Vec<(SocketKey, usize)> = Vec::new();
        self.inputs.slots.retain(|key, slot| {
            let stays = wanted.contains(key);
            if !stays {
                gone.push((key.clone(), *slot));
            }
            stays
        });
        let token_file = self.config.admin.token_file.clone();
        self.access.store(Arc::new(Access { token_file }));
        let before = self.snapshot.load_full();
        self.store_next();
        self.listen(bound).await;
        self.close(&gone).await;
        self.update_keepalive(&before).await;
        // An order by the admin API stands until the file says something else than before.
        if old.log.level != self.config.log.level {
            if let Err(error) = self.log.set_level(&self.config.log.level) {
                tracing::warn!(event = "log", reason = %error);
            }
            self.log_level = LogLevel::configured(&self.config.log.level);
        }
        self.log.set_format(self.config.log.format);
    }

    /// Goes over to another configuration, up to the snapshot that is made of it: sees to what left, joined and stays, and
    /// returns the one before.
    pub fn go_over_to(&mut self, new: Config) -> Config {
        let old = std::mem::replace(&mut self.config, new);
        self.inputs.connections_max = self.connections_max();
        self.carry_over(&old);
        self.forget_answers_to_other_headers(&old);
        self.check_what_is_configured();
        log_changes(&old, &self.config);
        old
    }

    /// The limit for all listeners together: beyond what the descriptors allow nobody is accepted, and none of our own
    /// work gets one either.
    fn connections_max(&self) -> usize {
        match (self.config.runtime.max_connections, self.room(&self.config)) {
            (0, room) => room,
            (limit, room) => limit.min(room),
        }
    }

    /// As many connections as the descriptors have room for. One takes two, a UDP session one.
    fn room(&self, config: &Config) -> usize {
        let workers = self.workers.len();
        let for_each_worker = 16 + 2 * limits::pipes_max(self.descriptors, workers);
        let reserved = 64 + for_each_worker * workers + config.listeners.len();
        let is_udp_alone = config.listeners.values().all(|listener| !listener.serves(Protocol::Tcp));
        let each = if is_udp_alone && config.runtime.max_connections > 0 { 1 } else { 2 };
        (self.descriptors.saturating_sub(reserved) / each).max(1)
    }

    /// What the descriptor limit makes of `runtime.max_connections`, where that is not what anybody wants.
    pub fn limit_warnings(&self, config: &Config) -> Vec<String> {
        let (wanted, room, descriptors) = (config.runtime.max_connections, self.room(config), self.descriptors);
        let what = if wanted > room {
            format!(
                "runtime.max_connections = {wanted} is more than {descriptors} descriptors have room for: {room} is in force"
            )
        } else if room < ROOM_MIN && wanted == 0 {
            format!("the descriptor limit of {descriptors} leaves room for {room} connections")
        } else {
            return Vec::new();
        };
        let next = "raise the descriptor limit (LimitNOFILE= in systemd, ulimit -n in a shell) and start again";
        vec![format!("warning: {what}\n  = help: {next}")]
    }

    fn socket_keys(&self, config: &Config) -> BTreeMap<SocketKey, String> {
        let mut keys = BTreeMap::new();
        for listener in config.listeners.values() {
            for key in snapshot::socket_keys(listener, &self.inputs) {
                keys.insert(key, listener.name.clone());
            }
        }
        keys
    }

    /// Binds every address that is new. On any failure all of them are closed again; nobody had connected.
    pub fn bind(&mut self, new: &Config) -> Result<Vec<Bound>, Vec<String>> {
        let mut bound = Vec::new();
        let mut errors = self.inherited_errors(new);
        let mut own: BTreeSet<SocketKey> = self.inputs.slots.keys().cloned().collect();
        for (key, name) in self.socket_keys(new) {
            if self.inputs.slots.contains_key(&key) {
                continue;
            }
            let shared = own.iter().any(|other| shares(&key, other));
            let made = self.make_sockets(&key, &new.listeners[&name], shared);
            match made {
                Ok((sockets, address, file)) => {
                    own.insert(key.clone());
                    bound.push(Bound { key, address, sockets, file });
                }
                Err(error) => errors.push(bind_error(&name, &key, &error)),
            }
        }
        if errors.is_empty() { Ok(bound) } else { Err(errors) }
    }

    /// Moves what outlives a reload to its new names, and sees to what left and what joined.
    fn carry_over(&mut self, old: &Config) {
        let renamed = renamed_pools(old, &self.config);
        let old_keys: BTreeSet<UpstreamKey> = upstream_keys(old).into_iter().collect();
        let new_keys: BTreeSet<UpstreamKey> = upstream_keys(&self.config).into_iter().collect();
        self.history.rename(&renamed);
        let mut inherited = HashSet::new();
        for (new_name, old_name) in &renamed {
            self.slow.rename(new_name, old_name);
            for key in new_keys.iter().filter(|key| key.pool == *new_name) {
                let before = UpstreamKey { pool: old_name.clone(), address: key.address.clone() };
                inherited.insert(before.clone());
                let inputs = &mut self.inputs;
                inputs.lives.remove(&before).map(|life| inputs.lives.insert(key.clone(), life));
                inputs.health.remove(&before).map(|health| inputs.health.insert(key.clone(), health));
                inputs.admin.remove(&before).map(|admin| inputs.admin.insert(key.clone(), admin));
                let named = self.deadlines.iter_mut().filter_map(|(_, deadline)| deadline.key_mut());
                named.filter(|named| **named == before).for_each(|named| *named = key.clone());
                if self.joined.remove(&before) {
                    self.joined.insert(key.clone());
                }
            }
        }
        let now = Instant::now();
        for key in old_keys.difference(&new_keys).filter(|key| !inherited.contains(*key)) {
            self.joined.remove(key);
            self.inputs.health.remove(key);
            self.inputs.admin.remove(key);
            self.deadlines.retain_mut(|(_, deadline)| deadline.key_mut().is_none_or(|named| named != key));
            if let Some(life) = self.inputs.lives.remove(key)
                && let Some(pool) = old.pools.get(&key.pool)
            {
                self.inputs.leaving.insert(key.clone(), Arc::clone(&life));
                self.deadlines.push((now + pool.drain_timeout, Deadline::DrainOver { life, order: None }));
            }
        }
        for key in new_keys.difference(&old_keys) {
            // It was removed and comes back in time: the same life, and its connections stay.
            if let Some(life) = self.inputs.leaving.remove(key) {
                self.deadlines.retain(|(_, deadline)| !deadline.is_removal_of(&life));
                self.inputs.lives.entry(key.clone()).or_insert(life);
            }
            // At the start of the process, and in a new pool, everyone joins: there is nobody to spare.
            let joins = old.pools.contains_key(&key.pool);
            let pool = Arc::clone(&self.config.pools[&key.pool]);
            match (&pool.health_check, joins) {
                (Some(_), true) => drop(self.joined.insert(key.clone())),
                (None, true) if !pool.slow_start.is_zero() => self.start_slowly(key.clone(), pool.slow_start, now),
                _ => {}
            }
        }
        self.drop_health_of_other_checks(old, &renamed);
        self.inputs.turns.retain(|(name, _), _| self.config.pools.contains_key(name));
        let listeners = &self.config.listeners;
        // A listener that comes back while its connections or sessions are open goes on counting them.
        self.inputs.listener_lives.retain(|name, life| listeners.contains_key(name) || life.is_used());
    }

    /// A pool that is checked from now on starts as unknown; one that isn't any more is healthy.
    fn drop_health_of_other_checks(&mut self, old: &Config, renamed: &HashMap<String, String>) {
        for (name, pool) in &self.config.pools {
            let old_name = renamed.get(name).unwrap_or(name);
            let checked_before = old.pools.get(old_name).map(|pool| pool.health_check.is_some());
            if checked_before.is_some_and(|before| before != pool.health_check.is_some()) {
                self.inputs.health.retain(|key, _| key.pool != *name);
                // What was to happen to that health is off, too.
                self.deadlines.retain_mut(|(_, deadline)| {
                    matches!(deadline, Deadline::DrainOver { .. })
                        || deadline.key_mut().is_none_or(|key| key.pool != *name)
                });
            }
        }
    }

    async fn listen(&mut self, bound: Vec<Bound>) {
        let snapshot = self.snapshot.load_full();
        for Bound { key, address, sockets, .. } in bound {
            let slot = self.inputs.slots[&key];
            let Some(listener) = snapshot.slots.get(&slot) else { continue };
            // A socket that one worker serves alone is not always the first one's.
            let workers = self.workers.iter().cycle().skip(slot % self.workers.len());
            for (worker, socket) in workers.zip(sockets) {
                let opened = match (key.protocol, &key.at) {
                    (Protocol::Tcp, At::Ip { .. } | At::Unix(_)) => listen::listen(&socket),
                    // It takes datagrams already, or listens already, with the queue that its maker chose.
                    (Protocol::Udp, _) | (_, At::Inherited { .. }) => Ok(()),
                };
                if let Err(error) = opened {
                    tracing::error!(event = "listen", listener = &*listener.life.name, %address, reason = %error);
                    continue;
                }
                let (key, bound, listener) = (key.clone(), address.clone(), Arc::clone(listener));
                worker.send(Message::Listen { key, socket, bound, slot, listener }).await;
            }
        }
    }

    async fn close(&mut self, gone: &[(SocketKey, usize)]) {
        for (key, slot) in gone {
            // From here on a path leads nowhere; what is queued is still served.
            drop(self.socket_files.remove(key));
            for worker in &self.workers {
                let (closed, closing) = oneshot::channel();
                worker.send(Message::Unlisten { slot: *slot, closed }).await;
                self.closing.push((key.clone(), closing));
            }
        }
    }

    /// An address that left a moment ago and comes back would find its own port taken: its sockets still serve what was
    /// queued, and refuse handshakes that the new ones should get.
    async fn wait_for_closing(&mut self, new: &Config) {
        self.closing.retain_mut(|(_, closing)| matches!(closing.try_recv(), Err(TryRecvError::Empty)));
        let keys = self.socket_keys(new).into_keys().filter(|key| !self.inputs.slots.contains_key(key));
        let port = |key: &SocketKey| Some((key.protocol, key.port()?));
        let ports: HashSet<(Protocol, u16)> = keys.filter_map(|key| port(&key)).collect();
        let awaited = self.closing.extract_if(.., |(key, _)| port(key).is_some_and(|port| ports.contains(&port)));
        let deadline = tokio::time::Instant::now() + CLOSING_MAX;
        for (_, closing) in awaited.collect::<Vec<_>>() {
            // A worker that is late is found out by the bind.
            let _ = timeout_at(deadline, closing).await;
        }
    }

    /// Sockets hand their keepalive to what they accept: it is changed by the time that the reload is reported.
    async fn update_keepalive(&self, before: &snapshot::Snapshot) {
        let mut setting = Vec::new();
        for (slot, listener) in &self.snapshot.load().slots {
            let keepalive: Option<Duration> = listener.config.keepalive;
            if listener.config.serves(Protocol::Tcp)
                && before.slots.get(slot).is_some_and(|before| before.config.keepalive != keepalive)
            {
                for worker in &self.workers {
                    let (set, is_set) = oneshot::channel();
                    worker.send(Message::Keepalive { slot: *slot, keepalive, set }).await;
                    setting.push(is_set);
                }
            }
        }
        let deadline = tokio::time::Instant::now() + SETTING_MAX;
        for is_set in setting {
            // A worker that is late sets it later.
            let _ = timeout_at(deadline, is_set).await;
        }
    }
}

/// Only our own wildcard may share a port with our own address.
fn shares(one: &SocketKey, other: &SocketKey) -> bool {
    let (Some(one_address), Some(address)) = (one.ip(), other.ip()) else { return false };
    other.protocol == one.protocol
        && address.port() == one_address.port()
        && (address.ip().is_unspecified() || one_address.ip().is_unspecified() || address == one_address)
}

fn bind_error(name: &str, key: &SocketKey, error: &std::io::Error) -> String {
    let (protocol, address) = match &key.at {
        At::Ip { address, .. } => (key.protocol, address),
        At::Unix(path) => return unix_error(name, path, error),
        At::Inherited { name: fd, .. } => return format!("error: listener {name:?} cannot use fd:{fd}: {error}"),
    };
    let port = address.port();
    let next = match error.kind() {
        std::io::ErrorKind::AddrInUse => {
            format!("see who has it: ss -l{}np 'sport = :{port}'", &protocol.as_str()[..1])
        }
        std::io::ErrorKind::PermissionDenied => {
            format!("ports below 1024 need CAP_NET_BIND_SERVICE, or net.ipv4.ip_unprivileged_port_start <= {port}")
        }
        std::io::ErrorKind::AddrNotAvailable => {
            "no interface of this machine has that address: see `ip address`".to_owned()
        }
        _ => "see the system's message".to_owned(),
    };
    let protocol = if protocol == Protocol::Udp { " for UDP" } else { "" };
    format!("error: listener {name:?} cannot bind {address}{protocol}: {error}; {next}")
}

fn unix_error(name: &str, path: &Path, error: &std::io::Error) -> String {
    let path = path.display();
    let next = match error.kind() {
        std::io::ErrorKind::AddrInUse => format!("see who has it: ss -xlp src {path}; or choose another path"),
        std::io::ErrorKind::AlreadyExists => "choose another path, or move it away".to_owned(),
        std::io::ErrorKind::PermissionDenied => "let the user that runs preface write to its directory".to_owned(),
        std::io::ErrorKind::NotFound => "make its directory first".to_owned(),
        _ => "see the system's message".to_owned(),
    };
    format!("error: listener {name:?} cannot bind unix:{path}: {error}; {next}")
}

fn log_report(report: &ReloadReport) {
    match report.outcome {
        ReloadOutcome::Refused => tracing::error!(
            event = "reload",
            trigger = report.trigger,
            outcome = "refused",
            errors = report.errors.join("\n"),
            "the configuration stays as it was"
        ),
        ReloadOutcome::Unchanged => {
            tracing::info!(event = "reload", trigger = report.trigger, outcome = "unchanged");
        }
        ReloadOutcome::Applied => tracing::info!(
            event = "reload",
            trigger = report.trigger,
            outcome = "applied",
            duration_ms = format!("{:.1}", report.duration_ms),
            changes = report.changes.join("; ")
        ),
    }
    for pending in &report.pending {
        tracing::warn!(event = "config", pending, "not in force");
    }
    for warning in &report.warnings {
        tracing::warn!(event = "config", warning);
    }
}
