//! The immutable view of everything that the data path reads, and how the next one is built from the last.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::Path;
use std::sync::atomic::{AtomicI32, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Instant, SystemTime};

use crate::address::Address;
use crate::config::{self, Bind, Config, HeaderFormat, LogConnections, Protocol, Tlvs};
use crate::net::inherited::{Inherited, Kind};
use crate::pool::balance::{Candidate, SLOW_START_STEPS};
use crate::pool::header::HeaderPlan;
use crate::pool::source_hash::Tables;
use crate::pool::{AdminState, Health, Pool, Upstream, UpstreamKey, UpstreamLife};
use crate::termination::{DropReason, Termination};

/// What a worker reads, loaded once per connection.
#[derive(Debug, Default)]
pub struct Snapshot {
    /// Counts up with each one stored.
    pub generation: u64,
    /// All listeners together.
    pub connections_max: usize,
    /// Which connections are logged.
    pub log_connections: Option<LogConnections>,
    /// By slot: the number that a bound address keeps while it stays, and that no other ever gets.
    pub slots: BTreeMap<usize, Arc<Listener>>,
    /// One a pool, and one a port where upstreams take the listener's.
    pub pools: BTreeMap<PoolKey, Arc<Pool>>,
}

/// A pool's name, and the listener's port where upstreams have none of their own.
pub type PoolKey = (String, Option<u16>);

/// A listener as a snapshot sees it, for one of its ports.
#[derive(Debug)]
pub struct Listener {
    /// The configuration in force.
    pub config: Arc<config::Listener>,
    /// Counts that outlive reloads.
    pub life: Arc<ListenerLife>,
    /// Where its connections go.
    pub pool: Arc<Pool>,
    /// By the configured pool's `upstreams`.
    pub headers: Arc<Vec<HeaderPlan>>,
    /// UDP sessions of all its addresses together.
    pub sessions_max: usize,
}

/// What of a listener outlives a reload; key: its name.
#[derive(Debug)]
pub struct ListenerLife {
    /// The listener's name.
    pub name: Arc<str>,
    /// Open now.
    pub open: AtomicU32,
    /// Accepted, refused ones included.
    pub accepted: AtomicU64,
    /// Ended connections by `Termination`.
    pub ends: [AtomicU64; Termination::ALL.len()],
    /// The error of the last of them that was for want of this machine's resources; 0: there was none.
    pub local_error: AtomicI32,
    /// Bytes from clients.
    pub bytes_in: AtomicU64,
    /// Bytes to clients.
    pub bytes_out: AtomicU64,
    /// Headers sent, by `HeaderFormat`.
    pub headers: [AtomicU64; HeaderFormat::ALL.len()],
    /// What is counted of UDP.
    pub sessions: SessionCounters,
    sources: Vec<Mutex<HashMap<IpAddr, u32>>>,
}

/// What is counted of a listener's UDP sessions and datagrams.
#[derive(Debug)]
pub struct SessionCounters {
    /// Open now.
    pub open: AtomicU32,
    /// Begun.
    pub begun: AtomicU64,
    /// Ended sessions by `Termination`.
    pub ends: [AtomicU64; Termination::ALL.len()],
    /// Datagrams passed on to upstreams, and to clients.
    pub datagrams: [AtomicU64; 2],
    /// Their payload.
    pub bytes: [AtomicU64; 2],
    /// Those of the datagrams that left as segments of a larger send.
    pub segmented: [AtomicU64; 2],
    /// Datagrams not passed on, by `DropReason`.
    pub dropped: [AtomicU64; DropReason::ALL.len()],
    /// Sessions that went on with another upstream, by `Moved`.
    pub moved: [AtomicU64; Moved::ALL.len()],
}

impl Default for SessionCounters {
    fn default() -> SessionCounters {
        SessionCounters {
            open: AtomicU32::new(0),
            begun: AtomicU64::new(0),
            ends: [const { AtomicU64::new(0) }; Termination::ALL.len()],
            datagrams: Default::default(),
            bytes: Default::default(),
            segmented: Default::default(),
            dropped: Default::default(),
            moved: Default::default(),
        }
    }
}

impl SessionCounters {
    /// Counts datagrams that were not passed on.
    pub fn dropped(&self, reason: DropReason, count: u64) {
        self.dropped[reason as usize].fetch_add(count, Ordering::Relaxed);
    }
}

/// Why a session went on with another upstream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Moved {
    /// The upstream turned unhealthy.
    Unhealthy,
    /// The upstream left the configuration.
    Removed,
    /// The upstream's host said that nobody listens there (ICMP), or there was no way to it.
    Refused,
}

impl Moved {
    /// All of them, in the order of their discriminants.
    pub const ALL: [Moved; 3] = [Moved::Unhealthy, Moved::Removed, Moved::Refused];

    /// The word in logs and metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Moved::Unhealthy => "unhealthy",
            Moved::Removed => "removed",
            Moved::Refused => "refused",
        }
    }
}

/// Locks among which sources are spread.
const SOURCE_SHARDS: usize = 64;

impl ListenerLife {
    /// Nothing open, nothing counted.
    pub fn new(name: &str) -> Arc<ListenerLife> {
        Arc::new(ListenerLife {
            name: Arc::from(name),
            open: AtomicU32::new(0),
            accepted: AtomicU64::new(0),
            ends: [const { AtomicU64::new(0) }; Termination::ALL.len()],
            local_error: AtomicI32::new(0),
            bytes_in: AtomicU64::new(0),
            bytes_out: AtomicU64::new(0),
            headers: [const { AtomicU64::new(0) }; HeaderFormat::ALL.len()],
            sessions: SessionCounters::default(),
            sources: (0..SOURCE_SHARDS).map(|_| Mutex::default()).collect(),
        })
    }

    /// Is a connection or session open?
    pub fn is_used(&self) -> bool {
        self.open.load(Ordering::Relaxed) > 0 || self.sessions.open.load(Ordering::Relaxed) > 0
    }

    /// Keeps why this machine could not.
    pub fn lacked(&self, error: &io::Error) {
        self.local_error.store(error.raw_os_error().unwrap_or_default(), Ordering::Relaxed);
    }

    /// Counts an end.
    pub fn ended(&self, termination: Termination) {
        self.ends[termination as usize].fetch_add(1, Ordering::Relaxed);
    }

    /// Takes a place among this source's connections unless `limit` are open. IPv6 is counted per /64.
    pub fn enter_source(&self, client: IpAddr, limit: usize) -> bool {
        let source = source_of(client);
        let mut shard = self.shard(source).lock().unwrap_or_else(PoisonError::into_inner);
        let open = shard.entry(source).or_insert(0);
        let has_room = (*open as usize) < limit;
        if has_room {
            *open += 1;
        }
        has_room
    }

    /// Gives back what `enter_source` took.
    pub fn leave_source(&self, client: IpAddr) {
        let source = source_of(client);
        let mut shard = self.shard(source).lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(open) = shard.get_mut(&source) {
            *open -= 1;
            if *open == 0 {
                shard.remove(&source);
            }
        }
    }

    /// Gives back a session's place, and that among its source's if it had one.
    pub fn leave_session(&self, source: Option<IpAddr>) {
        self.sessions.open.fetch_sub(1, Ordering::Relaxed);
        if let Some(source) = source {
            self.leave_source(source);
        }
    }

    fn shard(&self, source: IpAddr) -> &Mutex<HashMap<IpAddr, u32>> {
        let bytes = match source {
            IpAddr::V4(v4) => u64::from(v4.to_bits()),
            IpAddr::V6(v6) => (v6.to_bits() >> 64) as u64,
        };
        // Fibonacci hashing: neighbouring addresses spread over all shards.
        &self.sources[(bytes.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 58) as usize % SOURCE_SHARDS]
    }
}

fn source_of(client: IpAddr) -> IpAddr {
    match client {
        IpAddr::V4(_) => client,
        IpAddr::V6(v6) => IpAddr::V6((v6.to_bits() >> 64 << 64).into()),
    }
}

impl Listener {
    /// May this source connect? `deny` is looked at first.
    pub fn allows(&self, client: IpAddr) -> bool {
        !self.config.deny.iter().any(|network| network.contains(&client))
            && self.config.allow.iter().any(|network| network.contains(&client))
    }
}

impl Listener {
    /// Takes a place among the listener's sessions, and among its source's where they are limited. Exact over all workers.
    pub fn enter_session(&self, client: IpAddr) -> Result<(), DropReason> {
        let more = |open: u32| ((open as usize) < self.sessions_max).then_some(open + 1);
        let open = &self.life.sessions.open;
        open.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more).map_err(|_| DropReason::SessionsFull)?;
        let limit = self.config.max_connections_per_source;
        if limit > 0 && !self.life.enter_source(client, limit) {
            open.fetch_sub(1, Ordering::Relaxed);
            return Err(DropReason::SourceFull);
        }
        Ok(())
    }
}

/// What checks observed of an upstream, and since when.
#[derive(Clone, Debug)]
pub struct HealthRecord {
    /// Now.
    pub health: Health,
    /// Why.
    pub reason: String,
    /// When it became so.
    pub since: SystemTime,
    /// Start of its slow start, while that lasts.
    pub slow_start: Option<Instant>,
}

/// What the operator ordered for an upstream.
#[derive(Clone, Debug)]
pub struct AdminRecord {
    /// Now.
    pub state: AdminState,
    /// Since when.
    pub since: SystemTime,
    /// By what: "admin api", "command line" ...
    pub by: String,
}

/// All that a snapshot is made of beside the configuration. The control thread's alone.
#[derive(Debug, Default)]
pub struct Inputs {
    /// By upstream; one without a record takes the default of its pool.
    pub health: HashMap<UpstreamKey, HealthRecord>,
    /// By upstream; one without a record is enabled.
    pub admin: HashMap<UpstreamKey, AdminRecord>,
    /// Lives of upstreams.
    pub lives: HashMap<UpstreamKey, Arc<UpstreamLife>>,
    /// Lives of upstreams that were removed and still have connections, or might come back before their time is over.
    pub leaving: HashMap<UpstreamKey, Arc<UpstreamLife>>,
    /// Lives of listeners.
    pub listener_lives: HashMap<String, Arc<ListenerLife>>,
    /// Where each pool's round robin stands.
    pub turns: HashMap<PoolKey, Arc<AtomicUsize>>,
    /// The tables of `source_hash`, which stay while the sets of upstreams do.
    pub tables: Tables,
    /// The slot of each bound address.
    pub slots: HashMap<SocketKey, usize>,
    /// The sockets that the process was started with.
    pub inherited: Arc<Inherited>,
    /// Has this machine IPv6? Without it `":80"` is IPv4 alone.
    pub has_ipv6: bool,
    /// The limit in force for the whole process.
    pub connections_max: usize,
    /// Local ports that the kernel gives to sockets which do not name one.
    pub ports: usize,
}

/// Builds the next snapshot. Pools not named in `touched` (`None`: all are) keep their `Arc`s if their configuration did.
pub fn build(
    previous: &Snapshot,
    config: &Config,
    inputs: &mut Inputs,
    touched: Option<&HashSet<String>>,
    now: Instant,
) -> Snapshot {
    let mut pools = BTreeMap::new();
    for key in pool_keys(config) {
        let pool = &config.pools[&key.0];
        let kept = previous
            .pools
            .get(&key)
            .filter(|kept| Arc::ptr_eq(&kept.config, pool) && touched.is_some_and(|names| !names.contains(&key.0)));
        let built = match kept {
            Some(kept) => Arc::clone(kept),
            None => Arc::new(build_pool(pool, key.1, inputs, now)),
        };
        pools.insert(key, built);
    }
    inputs.tables.forget_unused();
    let share = sessions_share(config, inputs.connections_max);
    let mut slots = BTreeMap::new();
    for listener in config.listeners.values() {
        for key in socket_keys(listener, inputs) {
            let Some(slot) = inputs.slots.get(&key).copied() else { continue };
            let pool_config = &config.pools[&listener.pool];
            let pool = &pools[&pool_key(pool_config, key.port())];
            slots.insert(slot, build_listener(previous.slots.get(&slot), listener, pool, share, inputs));
        }
    }
    Snapshot {
        generation: previous.generation + 1,
        connections_max: inputs.connections_max,
        log_connections: Some(config.log.connections),
        slots,
        pools,
    }
}

/// What makes a listening socket the same one over a reload.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SocketKey {
    /// TCP or UDP: the two may share a port.
    pub protocol: Protocol,
    /// What it is bound to, or where it comes from.
    pub at: At,
}

/// What a listening socket is bound to, or where it comes from.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum At {
    /// An IP address and port: a socket for each worker.
    Ip {
        /// As bound.
        address: SocketAddr,
        /// IPV6_V6ONLY.
        v6only: bool,
    },
    /// A UNIX socket, which all workers share.
    Unix(Arc<Path>),
    /// A socket that the process was started with.
    Inherited {
        /// Under which it was handed over.
        name: String,
        /// Among all that were handed over, from 0.
        index: usize,
    },
}

impl SocketKey {
    /// The address, if it is an IP address that we bind.
    pub fn ip(&self) -> Option<SocketAddr> {
        match &self.at {
            At::Ip { address, .. } => Some(*address),
            At::Unix(_) | At::Inherited { .. } => None,
        }
    }

    /// The port of that address.
    pub fn port(&self) -> Option<u16> {
        self.ip().map(|address| address.port())
    }
}

impl fmt::Display for SocketKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let protocol = self.protocol.as_str();
        match &self.at {
            At::Ip { address, v6only } => write!(f, "{protocol} {address}{}", if *v6only { " v6only" } else { "" }),
            At::Unix(path) => write!(f, "{protocol} unix:{}", path.display()),
            At::Inherited { name, index } => write!(f, "{protocol} fd:{name} {index}"),
        }
    }
}

/// The sockets that a listener asks for. The name of inherited ones stands for all that have it and fit.
pub fn socket_keys(listener: &config::Listener, inputs: &Inputs) -> Vec<SocketKey> {
    let mut keys = Vec::new();
    for (protocol, bind) in
        listener.protocols.iter().flat_map(|one| listener.binds.iter().map(move |bind| (*one, bind)))
    {
        let mut add = |at| keys.push(SocketKey { protocol, at });
        match bind {
            Bind::Ip(bind) if bind.any && !inputs.has_ipv6 => {
                let address = SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), bind.address.port());
                add(At::Ip { address, v6only: false });
            }
            Bind::Ip(bind) => add(At::Ip { address: bind.address, v6only: bind.v6only }),
            Bind::Unix(path) => add(At::Unix(Arc::clone(path))),
            Bind::Inherited(name) => {
                let sockets = inputs.inherited.sockets().iter().enumerate();
                let fitting = sockets.filter(|(_, socket)| socket.name == *name && serves(&socket.kind, protocol));
                fitting.for_each(|(index, _)| add(At::Inherited { name: name.clone(), index }));
            }
        }
    }
    keys
}

/// Is this inherited socket one for the protocol?
pub fn serves(kind: &Kind, protocol: Protocol) -> bool {
    match kind {
        Kind::Connections(_) => protocol == Protocol::Tcp,
        Kind::Datagrams(_) => protocol == Protocol::Udp,
        Kind::Neither(_) => false,
    }
}

/// Which instance of a pool a listener's port uses.
pub fn pool_key(pool: &config::Pool, port: Option<u16>) -> PoolKey {
    let takes_port = pool.upstreams.iter().any(|upstream| upstream.address.takes_port());
    (pool.name.clone(), port.filter(|_| takes_port))
}

/// Every instance of every pool. A pool without a listener stands for itself, so that it is checked and shown, unless
/// its upstreams need a listener's port.
pub fn pool_keys(config: &Config) -> Vec<PoolKey> {
    let mut keys: Vec<PoolKey> = Vec::new();
    for listener in config.listeners.values() {
        for bind in &listener.binds {
            keys.push(pool_key(&config.pools[&listener.pool], bind.port()));
        }
    }
    for pool in config.pools.values() {
        if !pool.upstreams.iter().any(|upstream| upstream.address.takes_port()) {
            keys.push((pool.name.clone(), None));
        }
    }
    keys.sort();
    keys.dedup();
    keys
}

/// The address of an upstream in one instance of its pool; a name has none.
pub fn upstream_address(upstream: &config::Upstream, port: Option<u16>) -> Option<Address> {
    upstream.address.at(port)
}

fn build_pool(pool: &Arc<config::Pool>, port: Option<u16>, inputs: &mut Inputs, now: Instant) -> Pool {
    let mut upstreams = Vec::with_capacity(pool.upstreams.len());
    for (entry, upstream) in pool.upstreams.iter().enumerate() {
        let Some(address) = upstream_address(upstream, port) else { continue };
        // A name without a port, and the same address with the listener's: the first one counts.
        if upstream.name.is_some() && upstreams.iter().any(|known: &Upstream| known.life.address == address) {
            continue;
        }
        let key = UpstreamKey { pool: pool.name.clone(), address };
        let life = inputs.lives.entry(key.clone()).or_insert_with(|| UpstreamLife::new(key.address.clone()));
        let record = inputs.health.get(&key);
        let default = if pool.health_check.is_some() { Health::Unknown } else { Health::Healthy };
        let slow_start = record.and_then(|record| record.slow_start).filter(|_| !pool.slow_start.is_zero());
        let step = slow_start.map_or(SLOW_START_STEPS, |start| {
            let share = now.duration_since(start).as_secs_f64() / pool.slow_start.as_secs_f64();
            (share * f64::from(SLOW_START_STEPS)) as u32
        });
        upstreams.push(Upstream {
            life: Arc::clone(life),
            entry,
            connections_max: u32::try_from(upstream.max_connections).unwrap_or(u32::MAX),
            candidate: Candidate {
                health: record.map_or(default, |record| record.health),
                admin: inputs.admin.get(&key).map_or(AdminState::Enabled, |record| record.state),
                weight: upstream.weight,
                backup: upstream.backup,
            },
            slow_start_step: step.min(SLOW_START_STEPS),
        });
    }
    let turn = inputs.turns.entry((pool.name.clone(), port)).or_default();
    Pool::new(Arc::clone(pool), upstreams, Arc::clone(turn), &mut inputs.tables)
}

fn build_listener(
    before: Option<&Arc<Listener>>,
    config: &Arc<config::Listener>,
    pool: &Arc<Pool>,
    share: usize,
    inputs: &mut Inputs,
) -> Arc<Listener> {
    let unchanged = before.filter(|before| Arc::ptr_eq(&before.config, config));
    let sessions_max = sessions_max(config, &pool.config, share, inputs.ports);
    if let Some(before) = unchanged
        && Arc::ptr_eq(&before.pool, pool)
        && before.sessions_max == sessions_max
    {
        return Arc::clone(before);
    }
    let headers = match unchanged.filter(|before| Arc::ptr_eq(&before.pool.config, &pool.config)) {
        Some(before) => Arc::clone(&before.headers),
        None => Arc::new(plan_headers(config, &pool.config)),
    };
    let life = inputs.listener_lives.entry(config.name.clone()).or_insert_with(|| ListenerLife::new(&config.name));
    let (config, life, pool) = (Arc::clone(config), Arc::clone(life), Arc::clone(pool));
    Arc::new(Listener { config, life, pool, headers, sessions_max })
}

/// Sessions of one listener where it sets no limit of its own.
const SESSIONS_MAX: usize = 16_384;

/// Each session takes a local port, for the whole machine and whatever the upstream, and a descriptor.
fn sessions_max(listener: &config::Listener, pool: &config::Pool, share: usize, ports: usize) -> usize {
    match listener.max_sessions {
        0 => SESSIONS_MAX.min(ports / 2 * pool.source.len().max(1)).min(share).max(1),
        limit => limit,
    }
}

/// What one UDP listener may have of the process's connections: sources are easily forged, and must not take the places
/// of TCP's clients, or of another UDP listener's.
fn sessions_share(config: &Config, connections_max: usize) -> usize {
    let serving = |protocol| config.listeners.values().filter(|listener| listener.serves(protocol)).count();
    let for_udp = if serving(Protocol::Tcp) > 0 { connections_max / 2 } else { connections_max };
    for_udp / serving(Protocol::Udp).max(1)
}

fn plan_headers(listener: &config::Listener, pool: &config::Pool) -> Vec<HeaderPlan> {
    let plan = |upstream: &config::Upstream| {
        let tlvs = Tlvs::merge(&upstream.tlvs, &listener.tlvs, &pool.tlvs);
        HeaderPlan::new(upstream.proxy_protocol, &tlvs).expect("validation bounds every TLV")
    };
    pool.upstreams.iter().map(plan).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::diff;

    const TWO_POOLS: &str = r#"
        [listeners.web]
        bind = ["127.0.0.1:80", "127.0.0.1:443"]
        pool = "ingress"
        [listeners.other]
        bind = "127.0.0.1:81"
        pool = "other"
        [pools.ingress]
        upstreams = ["10.0.0.30", "10.0.0.31"]
        [pools.ingress.health_check]
        port = 10254
        protocol = "http"
        [pools.other]
        upstreams = ["10.0.0.40:80"]
    "#;

    fn parse(text: &str) -> Config {
        config::parse("test.toml", text).unwrap().config
    }

    fn inputs(config: &Config) -> Inputs {
        let mut inputs = Inputs { has_ipv6: true, ..Inputs::default() };
        let keys = config.listeners.values().flat_map(|listener| socket_keys(listener, &inputs));
        inputs.slots = keys.enumerate().map(|(slot, key)| (key, slot)).collect();
        inputs
    }

    #[test]
    fn upstreams_without_a_port_take_the_listeners() {
        let config = parse(TWO_POOLS);
        let mut inputs = inputs(&config);
        let snapshot = build(&Snapshot::default(), &config, &mut inputs, None, Instant::now());
        for listener in snapshot.slots.values() {
            let ports: Vec<u16> = listener.pool.upstreams.iter().filter_map(|up| up.life.address.port()).collect();
            match &*listener.life.name {
                "web" => assert!(ports == [80, 80] || ports == [443, 443], "{ports:?}"),
                _ => assert_eq!(ports, [80]),
            }
        }
        assert_eq!(inputs.lives.len(), 5);
    }

    #[test]
    fn what_did_not_change_is_carried_over() {
        let config = parse(TWO_POOLS);
        let mut inputs = inputs(&config);
        let first = build(&Snapshot::default(), &config, &mut inputs, None, Instant::now());
        let touched = HashSet::from(["other".to_owned()]);
        let second = build(&first, &config, &mut inputs, Some(&touched), Instant::now());
        for (slot, listener) in &second.slots {
            let same = Arc::ptr_eq(listener, &first.slots[slot]);
            assert_eq!(same, &*listener.life.name == "web");
            assert!(Arc::ptr_eq(&listener.headers, &first.slots[slot].headers));
        }
        let changed = diff::reuse(&config, parse(&TWO_POOLS.replace("10.0.0.40:80", "10.0.0.41:80")));
        let third = build(&second, &changed, &mut inputs, Some(&HashSet::new()), Instant::now());
        let of = |snapshot: &Snapshot, pool: &str| Arc::clone(&snapshot.pools[&(pool.to_owned(), None)]);
        assert!(!Arc::ptr_eq(&of(&third, "other"), &of(&second, "other")));
        for key in second.pools.keys().filter(|(name, _)| name == "ingress") {
            assert!(Arc::ptr_eq(&third.pools[key], &second.pools[key]));
        }
    }

    #[test]
    fn health_and_admin_state_reach_the_pool_apart() {
        let config = parse(TWO_POOLS);
        let mut inputs = inputs(&config);
        let key = UpstreamKey { pool: "ingress".to_owned(), address: Address::Ip("10.0.0.30:80".parse().unwrap()) };
        let (health, since) = (Health::Healthy, SystemTime::now());
        let record = HealthRecord { health, reason: "status 200".to_owned(), since, slow_start: None };
        inputs.health.insert(key.clone(), record);
        let admin = AdminRecord { state: AdminState::Draining, since, by: "test".to_owned() };
        inputs.admin.insert(key, admin);
        let snapshot = build(&Snapshot::default(), &config, &mut inputs, None, Instant::now());
        let pool = &snapshot.pools[&("ingress".to_owned(), Some(80))];
        assert_eq!(pool.upstreams[0].candidate.health, Health::Healthy);
        assert_eq!(pool.upstreams[0].candidate.admin, AdminState::Draining);
        assert_eq!(pool.pick(None, &[]).unwrap().index, 1, "the other is unknown, and the only one enabled");
    }

    #[test]
    fn a_clients_upstream_is_the_same_one_on_all_ports_of_a_listener() {
        let config = parse(&TWO_POOLS.replace("[pools.ingress]", "[pools.ingress]\nbalance = \"source_hash\""));
        let mut inputs = inputs(&config);
        let snapshot = build(&Snapshot::default(), &config, &mut inputs, None, Instant::now());
        let [http, https] = [80, 443].map(|port| &snapshot.pools[&("ingress".to_owned(), Some(port))]);
        let mut counts = [0; 2];
        for last in 1..=200 {
            let client = Some(IpAddr::from([192, 0, 2, last]));
            let picked = http.pick(client, &[]).unwrap();
            assert_eq!(picked.index, https.pick(client, &[]).unwrap().index);
            counts[picked.index] += 1;
        }
        assert!(counts.iter().all(|count| *count > 50), "{counts:?}");
    }

    #[test]
    fn a_source_has_its_own_limit_and_ipv6_is_counted_per_64() {
        let life = ListenerLife::new("web");
        let [a, b, other]: [IpAddr; 3] =
            ["2001:db8::1", "2001:db8::2", "2001:db8:0:1::1"].map(|text| text.parse().unwrap());
        assert!(life.enter_source(a, 2) && life.enter_source(b, 2));
        assert!(!life.enter_source(a, 2));
        assert!(life.enter_source(other, 2));
        life.leave_source(b);
        assert!(life.enter_source(a, 2));
    }
}
