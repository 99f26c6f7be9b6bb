//! The configuration as the rest of preface sees it: names resolved, defaults applied, nothing that can be wrong.
//!
//! `keys` lists every table and key with its default, `file` reads the TOML as written by that list, `validate` and the
//! file of each table turn it into a `Config` or into all of its errors, `diff` says what changed between two, `error`
//! renders for people, `words` names values as the file does, `level` knows the log's levels, `load` reads the file. Only `parse` makes a `Config`; defaults are applied there and nowhere else.

mod address;
pub mod diff;
pub mod error;
mod file;
mod health_check;
pub mod hints;
pub mod keys;
pub mod level;
mod listener;
pub mod load;
pub mod names;
mod pool;
pub mod schema;
mod tlvs;
mod validate;
mod words;

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;

pub use self::diff::{diff, reuse};
pub use self::error::{Diagnostics, Errors, LoadError, Style};
use self::hints::Surroundings;
pub use self::load::load;
use self::names::{Name, Records};
use crate::address::Address;
pub use crate::proxy_protocol::Version;

/// The whole configuration. Equal content means equal values, so an unchanged listener or pool can keep its `Arc`.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// `[runtime]`
    pub runtime: Runtime,
    /// `[log]`
    pub log: Log,
    /// `[admin]`
    pub admin: Admin,
    /// `[listeners.NAME]`
    pub listeners: BTreeMap<String, Arc<Listener>>,
    /// `[pools.NAME]`
    pub pools: BTreeMap<String, Arc<Pool>>,
}

/// `[runtime]`: the process.
#[derive(Clone, Debug, PartialEq)]
pub struct Runtime {
    /// Threads that carry traffic; 0: one per CPU available, 16 at most. Read at start only.
    pub workers: usize,
    /// Each worker on a processor of its own. Read at start only.
    pub pin_workers: bool,
    /// All listeners together; 0: from the descriptor limit.
    pub max_connections: usize,
    /// After a stop signal: still accepting, this long.
    pub stop_delay: Duration,
    /// Then open connections have this long to finish.
    pub stop_timeout: Duration,
}

/// `[log]`
#[derive(Clone, Debug, PartialEq)]
pub struct Log {
    /// An `EnvFilter` directive: "info", "preface::health=debug" ...
    pub level: String,
    /// Text or JSON lines on stdout.
    pub format: LogFormat,
    /// Which connections get a line when they end.
    pub connections: LogConnections,
}

/// `log.format`
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    /// `key=value` pairs.
    Text,
    /// One JSON object a line.
    Json,
}

/// `log.connections`
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogConnections {
    /// Every connection, one line at its end.
    All,
    /// Only those that did not end regularly.
    Errors,
    /// None.
    Off,
    /// Every connection, one line at its start and one at its end.
    StartAndEnd,
}

/// `[admin]`
#[derive(Clone, Debug, PartialEq)]
pub struct Admin {
    /// Where the admin API listens.
    pub bind: AdminBind,
    /// Where `/livez`, `/readyz` and `/metrics` are served to everyone, for a pod's address. Read at start only.
    pub probe_bind: Option<SocketAddr>,
    /// File with the bearer token of commands, read at each of them.
    pub token_file: Option<PathBuf>,
}

/// `admin.bind`
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AdminBind {
    /// `"127.0.0.1:9900"`
    Tcp(SocketAddr),
    /// `"unix:/path"`, mode 0660.
    Unix(PathBuf),
}

/// `[listeners.NAME]`
#[derive(Clone, Debug, PartialEq)]
pub struct Listener {
    /// The table's name.
    pub name: String,
    /// At least one; no address twice in the whole configuration for one protocol.
    pub binds: Vec<Bind>,
    /// What clients speak: at least one, each once, in this order.
    pub protocols: Vec<Protocol>,
    /// Name of an existing pool.
    pub pool: String,
    /// Nothing from either side for this long ends a TCP connection.
    pub idle_timeout: Duration,
    /// Nothing from either side for this long ends a UDP session.
    pub idle_timeout_udp: Duration,
    /// TCP keepalive towards client and upstream; `None`: off.
    pub keepalive: Option<Duration>,
    /// 0: no limit of its own.
    pub max_connections: usize,
    /// 0: none. IPv6 is counted per /64.
    pub max_connections_per_source: usize,
    /// UDP sessions of this listener; 0: as many as this machine has room for.
    pub max_sessions: usize,
    /// A UDP session ends when each of its client's datagrams had this many replies; 0: by `idle_timeout` alone.
    pub responses: u32,
    /// Sources that may connect; never empty.
    pub allow: Vec<IpNet>,
    /// Sources that may not; looked at before `allow`.
    pub deny: Vec<IpNet>,
    /// Overrides the pool's, key by key.
    pub tlvs: Tlvs,
}

impl Listener {
    /// Is this one of its protocols?
    pub fn serves(&self, protocol: Protocol) -> bool {
        self.protocols.contains(&protocol)
    }
}

/// `listeners.NAME.protocol`
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Protocol {
    /// Connections.
    Tcp,
    /// Datagrams, grouped into sessions.
    Udp,
}

/// One element of `listeners.NAME.bind`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Bind {
    /// An IP address and port.
    Ip(IpBind),
    /// `"unix:/path"`: a UNIX socket of mode 0660.
    Unix(Arc<Path>),
    /// `"fd:NAME"`: the sockets of this name that the process was started with.
    Inherited(String),
}

impl Bind {
    /// The IP address and port, if the file says them.
    pub fn ip(&self) -> Option<&IpBind> {
        match self {
            Bind::Ip(bind) => Some(bind),
            Bind::Unix(_) | Bind::Inherited(_) => None,
        }
    }

    /// The port, if the file says it.
    pub fn port(&self) -> Option<u16> {
        self.ip().map(|bind| bind.address.port())
    }
}

/// One bound IP address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct IpBind {
    /// For `":80"` the address is `[::]` with `any` set.
    pub address: SocketAddr,
    /// Written as `":80"`: dual stack, or IPv4 alone where the machine has no IPv6.
    pub any: bool,
    /// IPV6_V6ONLY: set for `[::]:P` when the file also binds an IPv4 address on port P. Never with `any`.
    pub v6only: bool,
}

/// `[pools.NAME]`
#[derive(Clone, Debug, PartialEq)]
pub struct Pool {
    /// The table's name.
    pub name: String,
    /// How the next upstream is chosen.
    pub balance: Balance,
    /// On which datagrams of a UDP session the header stands.
    pub udp_header: UdpHeader,
    /// Local addresses for upstream connections, used in turn; empty: the kernel's choice.
    pub source: Vec<IpAddr>,
    /// One attempt.
    pub connect_timeout: Duration,
    /// All attempts together.
    pub connect_deadline: Duration,
    /// Further attempts after a failed one.
    pub retries: u32,
    /// Effective weight rises over this time; zero: off.
    pub slow_start: Duration,
    /// This many failed connects in a row eject an upstream; 0: never.
    pub unhealthy_after_failed_connects: u32,
    /// Connections of a removed upstream have this long.
    pub drain_timeout: Duration,
    /// What becomes of connections to an upstream that turned unhealthy.
    pub on_unhealthy: OnUnhealthy,
    /// What a new connection gets when no upstream is healthy.
    pub when_none_healthy: WhenNoneHealthy,
    /// TCP Fast Open towards the upstreams.
    pub fast_open: bool,
    /// `None`: not checked.
    pub health_check: Option<HealthCheck>,
    /// TLVs of the pool; a listener's and an upstream's override them key by key.
    pub tlvs: Tlvs,
    /// In file order; at least one. Behind each name the addresses that it stands for now; see `names`.
    pub upstreams: Vec<Upstream>,
}

/// `proxy_protocol` of pools and upstreams, where it is not "off".
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HeaderFormat {
    /// PROXY protocol version 1; TCP only.
    V1,
    /// PROXY protocol version 2.
    V2,
    /// Simple Proxy Protocol; UDP only.
    Spp,
}

impl HeaderFormat {
    /// All of them, in the order of their discriminants.
    pub const ALL: [HeaderFormat; 3] = [HeaderFormat::V1, HeaderFormat::V2, HeaderFormat::Spp];

    /// The version of the PROXY protocol, if it is one.
    pub fn version(self) -> Option<Version> {
        match self {
            HeaderFormat::V1 => Some(Version::V1),
            HeaderFormat::V2 => Some(Version::V2),
            HeaderFormat::Spp => None,
        }
    }
}

/// `udp_header`
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UdpHeader {
    /// On each.
    EveryDatagram,
    /// On the first one to an upstream.
    FirstDatagram,
    /// In a datagram of its own, before the first one to an upstream.
    FirstAlone,
}

/// `balance`
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Balance {
    /// Smooth weighted turn.
    RoundRobin,
    /// Smallest open connections / weight.
    LeastConnections,
    /// The less loaded of two at random.
    RandomTwo,
    /// By the client's address: Maglev.
    SourceHash,
}

/// `on_unhealthy`
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnUnhealthy {
    /// Connections stay.
    Keep,
    /// Connections are reset.
    Close,
}

/// `when_none_healthy`
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WhenNoneHealthy {
    /// Fail open: every enabled upstream of weight > 0, backups included.
    UseAll,
    /// Reset new connections.
    Refuse,
}

/// `[[pools.NAME.upstreams]]`, the pool's defaults already applied.
#[derive(Clone, Debug, PartialEq)]
pub struct Upstream {
    /// Where it is.
    pub address: UpstreamAddress,
    /// The name that this address came from; `None`: it is written so.
    pub name: Option<Arc<UpstreamAddress>>,
    /// 0..=256; 0 takes no new connections.
    pub weight: u32,
    /// Used when no other is healthy, or every other is full.
    pub backup: bool,
    /// `None`: no header.
    pub proxy_protocol: Option<HeaderFormat>,
    /// 0: no limit.
    pub max_connections: usize,
    /// The upstream's own; see `Tlvs::merge`.
    pub tlvs: Tlvs,
}

/// `address` of an upstream, as the file says it.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum UpstreamAddress {
    /// An IP address; without a port the listener's.
    Ip(IpAddr, Option<u16>),
    /// `"unix:/path"`: a UNIX stream socket.
    Unix(Arc<Path>),
    /// A name; without a port the listener's, or that of SRV records.
    Name(Name, Option<u16>),
}

impl UpstreamAddress {
    /// The IP address, if it is one.
    pub fn ip(&self) -> Option<IpAddr> {
        match self {
            UpstreamAddress::Ip(ip, _) => Some(*ip),
            UpstreamAddress::Unix(_) | UpstreamAddress::Name(..) => None,
        }
    }

    /// The name, if it is one.
    pub fn name(&self) -> Option<&Name> {
        match self {
            UpstreamAddress::Name(name, _) => Some(name),
            UpstreamAddress::Ip(..) | UpstreamAddress::Unix(_) => None,
        }
    }

    /// Is the port the listener's?
    pub fn takes_port(&self) -> bool {
        match self {
            UpstreamAddress::Ip(_, port) => port.is_none(),
            UpstreamAddress::Name(name, port) => port.is_none() && name.records == Records::Addresses,
            UpstreamAddress::Unix(_) => false,
        }
    }

    /// Where that is for a listener on this port; a name is nowhere, its addresses are.
    pub fn at(&self, port: Option<u16>) -> Option<Address> {
        match self {
            UpstreamAddress::Ip(ip, own) => Some(SocketAddr::new(*ip, own.or(port).unwrap_or_default()).into()),
            UpstreamAddress::Unix(path) => Some(Address::Unix(Arc::clone(path))),
            UpstreamAddress::Name(..) => None,
        }
    }
}

/// A `tlvs` table. `None` means "not set here".
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Tlvs {
    /// AWS VPC endpoint ID (0xEA, sub-type 0x01).
    pub vpce_id: Option<String>,
    /// By the client's network, longest prefix first (sorted so); else `vpce_id`.
    pub vpce_id_by_source: Option<Vec<(IpNet, String)>>,
    /// Azure LINKID (0xEE, sub-type 0x01).
    pub azure_link_id: Option<u32>,
    /// GCP Private Service Connect connection id (0xE0).
    pub gcp_psc_id: Option<u64>,
    /// Checksum of the header (0x03).
    pub crc32c: Option<bool>,
    /// The connection's ULID (0x05).
    pub unique_id: Option<bool>,
    /// A fixed host name (0x02).
    pub authority: Option<String>,
    /// Network namespace (0x30).
    pub netns: Option<String>,
    /// Type and value, in file order.
    pub custom: Option<Vec<(u8, Vec<u8>)>>,
}

impl Tlvs {
    /// Key by key: the upstream's, else the listener's, else the pool's.
    pub fn merge(upstream: &Tlvs, listener: &Tlvs, pool: &Tlvs) -> Tlvs {
        macro_rules! first {
            ($($key:ident),+) => {
                Tlvs { $( $key: upstream.$key.clone().or_else(|| listener.$key.clone()).or_else(|| pool.$key.clone()) ),+ }
            };
        }
        first!(vpce_id, vpce_id_by_source, azure_link_id, gcp_psc_id, crc32c, unique_id, authority, netns, custom)
    }
}

/// `[pools.NAME.health_check]`
#[derive(Clone, Debug, PartialEq)]
pub struct HealthCheck {
    /// What is asked and what counts as an answer.
    pub probe: Probe,
    /// From the start of one check to the start of the next.
    pub interval: Duration,
    /// Connect, ask and answer together.
    pub timeout: Duration,
    /// Successes in a row that turn an unhealthy upstream healthy.
    pub healthy_threshold: u32,
    /// Failures in a row that turn a healthy upstream unhealthy.
    pub unhealthy_threshold: u32,
    /// `None`: the traffic port.
    pub port: Option<u16>,
    /// The header of the check.
    pub proxy_protocol: CheckHeader,
    /// v2: LOCAL, or PROXY with the check's own addresses.
    pub proxy_command: CheckCommand,
}

impl HealthCheck {
    /// As it is for one upstream: the host that HTTP names is the upstream's name, where it has one, and not its address.
    pub fn of(&self, upstream: &Upstream, port: Option<u16>) -> HealthCheck {
        let mut check = self.clone();
        if let Probe::Http { host: host @ None, .. } = &mut check.probe
            && let Some(UpstreamAddress::Name(name, own)) = upstream.name.as_deref()
            && name.records == Records::Addresses
        {
            let name = name.host.trim_end_matches('.');
            *host = Some(match self.port.or(*own).or(port) {
                Some(80) | None => name.to_owned(),
                Some(port) => format!("{name}:{port}"),
            });
        }
        check
    }
}

/// `health_check.protocol` and the keys that belong to it.
#[derive(Clone, Debug, PartialEq)]
pub enum Probe {
    /// Connect; then send and expect where they are set.
    Tcp {
        /// Bytes to send; empty: none.
        send: Vec<u8>,
        /// A substring of the answer; empty: the connect alone decides.
        expect: Vec<u8>,
    },
    /// Send a datagram; then expect an answer, or, without one, that it is not refused.
    Udp {
        /// Bytes to send; empty: an empty datagram, or the header alone.
        send: Vec<u8>,
        /// A substring of the answer; empty: silence passes.
        expect: Vec<u8>,
    },
    /// `GET path`.
    Http {
        /// Request target.
        path: String,
        /// `Host`; `None`: the upstream's address.
        host: Option<String>,
        /// Ranges of status codes that pass, both ends included.
        expect_status: Vec<(u16, u16)>,
    },
}

/// `health_check.proxy_protocol`, "same" already resolved where a port of its own makes it "off".
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CheckHeader {
    /// What that upstream's traffic gets.
    Same,
    /// None.
    Off,
    /// Always this one.
    Format(HeaderFormat),
}

/// `health_check.proxy_command`
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CheckCommand {
    /// v2 LOCAL. v1 always gives the check's own addresses.
    Local,
    /// PROXY with the check's own addresses.
    Proxy,
    /// v1 `PROXY UNKNOWN`.
    Unknown,
}

/// What came of parsing one file.
#[derive(Debug)]
pub struct Parsed {
    /// The configuration.
    pub config: Config,
    /// What is allowed but deserves a look; rendered like errors.
    pub warnings: Diagnostics,
}

/// A `Config` out of the text of a file, or every error that it has. `file_name` is shown in messages only.
pub fn parse(file_name: &str, text: &str) -> Result<Parsed, Errors> {
    parse_in(file_name, text, &Surroundings::default())
}

/// The same, with warnings about what is probably not meant in these surroundings.
pub fn parse_in(file_name: &str, text: &str, around: &Surroundings) -> Result<Parsed, Errors> {
    validate::parse(file_name, text, around)
}

/// `admin.bind` alone, of a file that may be broken in every other respect; `None`: not written, or not readable.
pub fn lenient_admin_bind(text: &str) -> Option<AdminBind> {
    validate::lenient_admin_bind(text)
}
