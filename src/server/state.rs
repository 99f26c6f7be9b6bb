//! What the control thread knows, and the one place where all of it changes: health, admin orders, the snapshot.

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant, SystemTime};

use arc_swap::ArcSwap;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use crate::address::Address;
use crate::admin::guard::Access;
use crate::config::{self, Config, OnUnhealthy};
use crate::connection::measured::Measured;
use crate::control::probes::Probes;
use crate::control::{self, ReloadOutcome, ReloadReport, SetAdmin, SetAdminError, SetAdminReply};
use crate::drain::OpenConnections;
use crate::health::{Checker, Target};
use crate::log::Log;
use crate::net::unix::SocketFile;
use crate::pool::balance::SLOW_START_STEPS;
use crate::pool::{AdminState, Health, Observation, UpstreamKey, UpstreamLife};
use crate::server::admin_side::AdminSide;
use crate::server::history::History;
use crate::server::local_resources::Shortage;
use crate::server::names::Names;
use crate::server::notify::Notifier;
use crate::server::slowness::SlowUpstreams;
use crate::server::suspicion::Suspicion;
use crate::server::upgrade::{Predecessor, Program, Upgrade};
use crate::snapshot::{self, AdminRecord, HealthRecord, Inputs, Snapshot, SocketKey};
use crate::termination::Termination;
use crate::worker::{Message, Worker};

/// How long an upstream of an unchecked pool stays out after failed connects.
const UNCHECKED_EJECTION: Duration = Duration::from_secs(10);
/// A worker that does not answer a scrape within this time is left out.
pub const COLLECT_TIMEOUT: Duration = Duration::from_millis(200);
/// Reload reports kept for `/status`.
const REPORTS_MAX: usize = 10;

/// Something that is to happen at a time.
#[derive(Debug)]
pub enum Deadline {
    /// Connections of a removed or draining upstream are reset.
    DrainOver {
        /// Whose.
        life: Arc<UpstreamLife>,
        /// Only if it still drains; `None`: it was removed.
        order: Option<UpstreamKey>,
    },
    /// An upstream of an unchecked pool comes back.
    Readmit(UpstreamKey),
    /// The next step of a slow start.
    SlowStart(UpstreamKey),
}

impl Deadline {
    /// Is it the end of a removed upstream's time?
    pub fn is_removal_of(&self, removed: &Arc<UpstreamLife>) -> bool {
        matches!(self, Deadline::DrainOver { life, order: None } if Arc::ptr_eq(life, removed))
    }

    fn is_ordered_for(&self, upstream: &UpstreamKey) -> bool {
        matches!(self, Deadline::DrainOver { order: Some(key), .. } if key == upstream)
    }

    /// The upstream that it names, if it has one to name.
    pub fn key_mut(&mut self) -> Option<&mut UpstreamKey> {
        match self {
            Deadline::DrainOver { order, .. } => order.as_mut(),
            Deadline::Readmit(key) | Deadline::SlowStart(key) => Some(key),
        }
    }
}

/// The level of the log, and who wanted it.
#[derive(Clone, Debug)]
pub struct LogLevel {
    /// In force.
    pub level: String,
    /// "configuration", or who ordered another one.
    pub by: String,
    /// Since when.
    pub since: SystemTime,
}

impl LogLevel {
    /// As the file says, from now on.
    pub fn configured(level: &str) -> LogLevel {
        LogLevel { level: level.to_owned(), by: "configuration".to_owned(), since: SystemTime::now() }
    }
}

/// The control thread's state.
pub struct State {
    /// The configuration file.
    pub path: PathBuf,
    /// In force.
    pub config: Config,
    /// Its text.
    pub text: String,
    /// What of it applies at the next start only.
    pub pending: Vec<String>,
    /// Rendered warnings of it.
    pub warnings: Vec<String>,
    /// What snapshots are built from.
    pub inputs: Inputs,
    /// What workers read.
    pub snapshot: Arc<ArcSwap<Snapshot>>,
    /// The threads that carry traffic.
    pub workers: Vec<Worker>,
    /// By upstream of checked pools.
    pub checkers: BTreeMap<UpstreamKey, Checker>,
    /// In no order; there are few.
    pub deadlines: Vec<(Instant, Deadline)>,
    /// The last ones, newest first.
    pub reports: VecDeque<Arc<ReloadReport>>,
    /// Reloads applied, unchanged, refused.
    pub reloads: [u64; 3],
    /// When the first of the reloads was refused that all were since.
    pub refused_since: Option<String>,
    /// Pools to rebuild at the next publication.
    pub touched: HashSet<String>,
    /// Upstreams that joined by a reload and were not healthy yet: their slow start begins when they are.
    pub joined: HashSet<UpstreamKey>,
    /// Addresses that left the configuration, until each worker has closed its socket.
    pub closing: Vec<(SocketKey, oneshot::Receiver<()>)>,
    /// Files of the UNIX sockets that are served; dropped, a file is removed.
    pub socket_files: HashMap<SocketKey, SocketFile>,
    /// The next address to be bound gets this number.
    pub next_slot: usize,
    /// Upstreams that seem to reject their header.
    pub suspicions: BTreeMap<UpstreamKey, Suspicion>,
    /// Upstreams that have slowed.
    pub slow: SlowUpstreams,
    /// What listeners lack of this machine's.
    pub shortages: BTreeMap<String, Shortage>,
    /// What is logged.
    pub log_level: LogLevel,
    /// What was measured, by time.
    pub history: History,
    /// Names as upstreams.
    pub names: Names,
    /// Emptied, for the workers to fill.
    pub spare: Vec<Measured>,
    /// Workers that did not answer in time.
    pub unresponsive: u64,
    /// Lines to stdout.
    pub log: Log,
    /// For checkers and workers.
    pub handle: control::Handle,
    /// Who may ask what of the admin API.
    pub access: Arc<ArcSwap<Access>>,
    /// What `/livez` and `/readyz` say.
    pub probes: Arc<Probes>,
    /// Open connections of the process.
    pub open: Arc<OpenConnections>,
    /// Descriptors that the machine grants.
    pub descriptors: usize,
    /// When the process started.
    pub started: SystemTime,
    /// Has a stop been ordered?
    pub stopping: bool,
    /// The admin API's sockets and tasks.
    pub admin: AdminSide,
    /// What an upgrade starts; `None`: this process cannot be upgraded.
    pub program: Option<Program>,
    /// While a new process starts.
    pub upgrade: Option<Upgrade>,
    /// While this process takes over from another one.
    pub predecessor: Option<Predecessor>,
    /// Until that one speaks for the service no more.
    pub speaks_after: Option<JoinHandle<()>>,
    /// To systemd.
    pub notifier: Notifier,
}

impl State {
    /// Stores the next snapshot if something was touched: flips that came together make one.
    pub fn publish(&mut self) {
        if !self.touched.is_empty() {
            self.store_next();
        }
    }

    /// Builds the next snapshot of what the configuration in force and the inputs are now, and stores it.
    pub fn store_next(&mut self) {
        let touched = std::mem::take(&mut self.touched);
        let next =
            snapshot::build(&self.snapshot.load(), &self.config, &mut self.inputs, Some(&touched), Instant::now());
        self.snapshot.store(Arc::new(next));
    }

    /// Every upstream of the configuration in force.
    pub fn keys(&self) -> Vec<UpstreamKey> {
        upstream_keys(&self.config)
    }

    /// Ends an interval of the history.
    pub async fn sample(&mut self) {
        self.collect().await;
        let (pools, open) = (self.config.pools.keys().cloned(), self.open.count());
        self.history.sample(&self.inputs, pools, open, Instant::now());
        self.look_at_local_resources();
    }

    /// Remembers a report, newest first.
    pub fn remember(&mut self, report: Arc<ReloadReport>) {
        self.reloads[report.outcome as usize] += 1;
        let is_refused = report.outcome == ReloadOutcome::Refused;
        self.refused_since = is_refused.then(|| self.refused_since.take().unwrap_or_else(|| report.time.clone()));
        self.history.reloaded(Duration::from_secs_f64(report.duration_ms / 1000.0));
        self.reports.push_front(report);
        self.reports.truncate(REPORTS_MAX);
    }

    /// A checker decided: record it, log the flip, and do what the pool says.
    pub async fn observed(&mut self, observation: Observation) {
        let Observation { key, health, reason } = observation;
        // What a checker said before it was stopped counts no more.
        if !self.inputs.lives.contains_key(&key) || !self.checkers.contains_key(&key) {
            return;
        }
        self.set_health(key, health, reason).await;
    }

    async fn set_health(&mut self, key: UpstreamKey, health: Health, reason: String) {
        let Some(pool) = self.config.pools.get(&key.pool).cloned() else { return };
        let before = self.inputs.health.get(&key).map(|record| record.health);
        let known = before.unwrap_or(if pool.health_check.is_some() { Health::Unknown } else { Health::Healthy });
        let now = Instant::now();
        let joined = health == Health::Healthy && self.joined.remove(&key);
        let starts_slowly = !pool.slow_start.is_zero() && health == Health::Healthy;
        let slow_start = (starts_slowly && (known == Health::Unhealthy || joined)).then_some(now);
        if slow_start.is_some() {
            self.deadlines.push((now + pool.slow_start / SLOW_START_STEPS, Deadline::SlowStart(key.clone())));
        }
        if known == health && before.is_some() {
            // It goes on failing, perhaps for another reason: what to do follows the last one, the log told the first.
            self.inputs.health.entry(key).and_modify(|record| record.reason = reason);
            return;
        }
        match health {
            Health::Unhealthy => tracing::warn!(
                event = "health", pool = %key.pool, upstream = %key.address, health = health.as_str(), reason = %reason
            ),
            _ => tracing::info!(
                event = "health", pool = %key.pool, upstream = %key.address, health = health.as_str(), reason = %reason
            ),
        }
        let life = self.inputs.lives.get(&key).cloned();
        if health == Health::Healthy
            && let Some(life) = &life
        {
            match self.checkers.contains_key(&key) {
                true => life.answered(),
                // Its time is over, no more: it may well go on failing.
                false => life.failed_connects.store(0, Ordering::Relaxed),
            }
        }
        self.touched.insert(key.pool.clone());
        let record = HealthRecord { health, reason, since: SystemTime::now(), slow_start };
        self.inputs.health.insert(key, record);
        if health == Health::Unhealthy
            && pool.on_unhealthy == OnUnhealthy::Close
            && let Some(life) = life
        {
            // Nothing new goes there before what is open is ended.
            self.publish();
            self.end(Some(life), Termination::Unhealthy).await;
        }
    }

    /// Failed connects in a row: out at once, unless it is the last usable one.
    pub async fn connects_failed(&mut self, life: &Arc<UpstreamLife>) {
        let lives = &self.inputs.lives;
        let Some(key) = lives.iter().find(|(_, known)| Arc::ptr_eq(known, life)).map(|(key, _)| key.clone()) else {
            return;
        };
        let Some(pool) = self.config.pools.get(&key.pool).cloned() else { return };
        let limit = pool.unhealthy_after_failed_connects;
        // Reports of one outage arrive more than once; since the first, a check may have found it well again.
        let in_a_row = life.failed_connects.load(Ordering::Relaxed);
        if limit == 0 || in_a_row < limit || self.health_of(&key) == Health::Unhealthy || !self.has_other(&key) {
            return;
        }
        let reason = format!("{in_a_row} failed connects in a row");
        match self.checkers.get(&key) {
            Some(checker) => checker.eject(reason.clone()),
            None => self.deadlines.push((Instant::now() + UNCHECKED_EJECTION, Deadline::Readmit(key.clone()))),
        }
        self.set_health(key, Health::Unhealthy, reason).await;
    }

    /// What checks observed of an upstream, or what it starts with.
    pub fn health_of(&self, key: &UpstreamKey) -> Health {
        let checked = self.config.pools.get(&key.pool).is_some_and(|pool| pool.health_check.is_some());
        let default = if checked { Health::Unknown } else { Health::Healthy };
        self.inputs.health.get(key).map_or(default, |record| record.health)
    }

    /// Would the pools that use this upstream still have another one?
    fn has_other(&self, key: &UpstreamKey) -> bool {
        let snapshot = self.snapshot.load();
        let life = &self.inputs.lives[key];
        snapshot
            .pools
            .values()
            .filter(|pool| *pool.name == *key.pool)
            .filter(|pool| pool.upstreams.iter().any(|upstream| Arc::ptr_eq(&upstream.life, life)))
            .all(|pool| {
                pool.upstreams.iter().any(|other| {
                    let address = UpstreamKey { pool: key.pool.clone(), address: other.life.address.clone() };
                    address != *key
                        && other.candidate.weight > 0
                        && other.candidate.admin == AdminState::Enabled
                        && self.health_of(&address) != Health::Unhealthy
                })
            })
    }

    /// Carries out what is due and returns when the next is.
    pub async fn fire(&mut self, now: Instant) {
        let (due, later) = std::mem::take(&mut self.deadlines).into_iter().partition(|(at, _)| *at <= now);
        self.deadlines = later;
        let due: Vec<(Instant, Deadline)> = due;
        for (_, deadline) in due {
            match deadline {
                Deadline::DrainOver { life, order } => {
                    let still = match &order {
                        Some(key) => {
                            self.inputs.admin.get(key).is_some_and(|admin| admin.state == AdminState::Draining)
                        }
                        None => {
                            self.inputs.leaving.retain(|_, leaving| !Arc::ptr_eq(leaving, &life));
                            true
                        }
                    };
                    if still && life.open() > 0 {
                        tracing::warn!(event = "drain", upstream = %life.address, open = life.open(), "time is over: the rest is reset");
                        self.end(Some(life), Termination::DrainTimeout).await;
                    }
                }
                Deadline::Readmit(key) => {
                    let checked = self.checkers.contains_key(&key);
                    if !checked && self.inputs.lives.contains_key(&key) && self.health_of(&key) == Health::Unhealthy {
                        let seconds = UNCHECKED_EJECTION.as_secs();
                        self.set_health(key, Health::Healthy, format!("tried again after {seconds} s")).await;
                    }
                }
                Deadline::SlowStart(key) => self.slow_start_step(key, now),
            }
        }
        if self.names.deadline().is_some_and(|deadline| deadline <= now) {
            self.reload_pending().await;
        }
        self.publish();
    }

    fn slow_start_step(&mut self, key: UpstreamKey, now: Instant) {
        let Some(pool) = self.config.pools.get(&key.pool) else { return };
        let Some(record) = self.inputs.health.get_mut(&key) else { return };
        let Some(start) = record.slow_start else { return };
        self.touched.insert(key.pool.clone());
        if record.health != Health::Healthy || now.duration_since(start) >= pool.slow_start {
            record.slow_start = None;
            return;
        }
        self.deadlines.push((now + pool.slow_start / SLOW_START_STEPS, Deadline::SlowStart(key)));
    }

    /// An upstream that joined an unchecked pool by a reload starts slowly at once.
    pub fn start_slowly(&mut self, key: UpstreamKey, slow_start: Duration, now: Instant) {
        let record = HealthRecord {
            health: Health::Healthy,
            reason: "not checked".to_owned(),
            since: SystemTime::now(),
            slow_start: Some(now),
        };
        self.inputs.health.insert(key.clone(), record);
        self.deadlines.push((now + slow_start / SLOW_START_STEPS, Deadline::SlowStart(key)));
    }

    /// When the next deadline is due.
    pub fn next_deadline(&self) -> Option<Instant> {
        self.deadlines.iter().map(|(at, _)| *at).chain(self.names.deadline()).min()
    }

    /// An operator's order.
    pub async fn set_admin(&mut self, order: SetAdmin) -> Result<SetAdminReply, SetAdminError> {
        let named = self.named(&order)?;
        let (mut upstreams, mut lives) = (Vec::new(), Vec::new());
        for key in named {
            let life = Arc::clone(&self.inputs.lives[&key]);
            tracing::info!(
                event = "admin", pool = %key.pool, upstream = %key.address, admin = order.state.as_str(), by = %order.by
            );
            let record = AdminRecord { state: order.state, since: SystemTime::now(), by: order.by.clone() };
            let again = self.inputs.admin.get(&key).is_some_and(|before| before.state == order.state);
            if order.state == AdminState::Enabled {
                self.inputs.admin.remove(&key);
            } else if !again {
                self.inputs.admin.insert(key.clone(), record);
            }
            self.touched.insert(key.pool.clone());
            upstreams.push((key.address.clone(), u64::from(life.open())));
            // The last order counts, with its time or without one.
            self.deadlines.retain(|(_, deadline)| !deadline.is_ordered_for(&key));
            if let (AdminState::Draining, Some(timeout)) = (order.state, order.timeout) {
                let life = Arc::clone(&life);
                self.deadlines.push((Instant::now() + timeout, Deadline::DrainOver { life, order: Some(key) }));
            }
            lives.push(life);
        }
        // Nothing new goes there before what is open is ended.
        self.publish();
        if order.state == AdminState::Disabled {
            for life in lives {
                self.end(Some(life), Termination::Disabled).await;
            }
        }
        Ok(SetAdminReply { upstreams })
    }

    /// Logs at this level until a reload changes it.
    pub fn set_log_level(&mut self, level: &str, by: &str) -> Result<(), String> {
        if let Some(error) = config::level::errors(level).first() {
            return Err(error.to_string());
        }
        self.log.set_level(level).map_err(|error| error.to_string())?;
        self.log.level_changed(level, by);
        self.log_level = LogLevel { level: level.to_owned(), by: by.to_owned(), since: SystemTime::now() };
        Ok(())
    }

    fn named(&self, order: &SetAdmin) -> Result<Vec<UpstreamKey>, SetAdminError> {
        if !self.config.pools.contains_key(&order.pool) {
            let known: Vec<&str> = self.config.pools.keys().map(String::as_str).collect();
            return Err(SetAdminError::UnknownPool { name: order.pool.clone(), known: known.join(", ") });
        }
        let of_pool: Vec<UpstreamKey> = self.keys().into_iter().filter(|key| key.pool == order.pool).collect();
        let Some(wanted) = &order.address else { return Ok(of_pool) };
        let named = self.addresses_of(&order.pool, wanted);
        let fits = |key: &UpstreamKey| match wanted.parse::<SocketAddr>() {
            _ if named.contains(&key.address) => true,
            Ok(address) => key.address.ip() == Some(address),
            Err(_) => match key.address.ip() {
                Some(address) => wanted.trim_matches(['[', ']']).parse() == Ok(address.ip()),
                None => *wanted == key.address.to_string(),
            },
        };
        let named: Vec<UpstreamKey> = of_pool.iter().filter(|key| fits(key)).cloned().collect();
        if named.is_empty() {
            let known: Vec<String> = of_pool.iter().map(|key| key.address.to_string()).collect();
            let (pool, address) = (order.pool.clone(), wanted.clone());
            return Err(SetAdminError::UnknownUpstream { pool, address, known: known.join(", ") });
        }
        Ok(named)
    }

    /// Resets connections: those of one upstream, or all.
    pub async fn end(&self, upstream: Option<Arc<UpstreamLife>>, termination: Termination) {
        for worker in &self.workers {
            worker.send(Message::End { upstream: upstream.clone(), termination }).await;
        }
    }

    /// Has the workers add up what they carried and hand over what they measured; how many answered in time.
    pub async fn collect(&mut self) -> usize {
        let mut answers = Vec::new();
        for worker in &self.workers {
            let (sender, receiver) = oneshot::channel();
            worker.send(Message::Collect(self.spare.pop().unwrap_or_default(), sender)).await;
            answers.push(receiver);
        }
        let deadline = tokio::time::Instant::now() + COLLECT_TIMEOUT;
        let mut answered = 0;
        for (worker, answer) in answers.into_iter().enumerate() {
            match tokio::time::timeout_at(deadline, answer).await {
                Ok(Ok(mut measured)) => {
                    answered += 1;
                    self.history.add(worker, &measured, &self.inputs);
                    measured.clear();
                    self.spare.push(measured);
                }
                _ => self.unresponsive += 1,
            }
        }
        self.history.add_checks(&self.checkers);
        self.look_at_rejections();
        self.look_at_speed();
        answered
    }

    /// Starts, changes and stops checkers as the configuration says.
    pub fn check_what_is_configured(&mut self) {
        let mut targets: BTreeMap<UpstreamKey, Target> = BTreeMap::new();
        for (name, port) in snapshot::pool_keys(&self.config) {
            let pool = &self.config.pools[&name];
            let Some(check) = &pool.health_check else { continue };
            for upstream in &pool.upstreams {
                let Some(address) = snapshot::upstream_address(upstream, port) else { continue };
                let key = UpstreamKey { pool: name.clone(), address };
                let check = check.of(upstream, port);
                let header = upstream.proxy_protocol;
                let target = Target { key: key.clone(), check, header, source: pool.source.clone() };
                targets.entry(key).or_insert(target);
            }
        }
        self.checkers.retain(|key, _| targets.contains_key(key));
        for (key, target) in targets {
            match self.checkers.get_mut(&key) {
                Some(checker) => checker.retarget(target),
                None => {
                    self.checkers.insert(key, Checker::start(target, self.handle.clone()));
                }
            }
        }
    }
}

/// Every upstream of a configuration, once.
pub fn upstream_keys(config: &Config) -> Vec<UpstreamKey> {
    let mut keys = Vec::new();
    for (name, port) in snapshot::pool_keys(config) {
        for upstream in &config.pools[&name].upstreams {
            let address = snapshot::upstream_address(upstream, port);
            keys.extend(address.map(|address| UpstreamKey { pool: name.clone(), address }));
        }
    }
    keys.sort();
    keys.dedup();
    keys
}

/// Pools that were only renamed: old name by new name. The same upstreams under another name are the same upstreams.
pub fn renamed_pools(old: &Config, new: &Config) -> HashMap<String, String> {
    let addresses = |config: &Config, name: &str| -> Vec<Address> {
        upstream_keys(config).into_iter().filter(|key| key.pool == name).map(|key| key.address).collect()
    };
    let mut gone: Vec<&String> = old.pools.keys().filter(|name| !new.pools.contains_key(*name)).collect();
    let mut renamed = HashMap::new();
    for name in new.pools.keys().filter(|name| !old.pools.contains_key(*name)) {
        let addresses_now = addresses(new, name);
        // Pools whose names have no addresses have nothing to inherit.
        let is_same = |before: &&String| !addresses_now.is_empty() && addresses(old, before) == addresses_now;
        let same = gone.iter().position(is_same);
        if let Some(position) = same {
            renamed.insert(name.clone(), gone.remove(position).clone());
        }
    }
    renamed
}
