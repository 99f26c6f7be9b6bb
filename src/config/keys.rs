//! PURE. Every table and key of the configuration: type, limits, default, meaning. Parser, JSON Schema and the test of
//! the reference file all read this one list.

use std::time::Duration;

/// One kind of table.
#[derive(Debug)]
pub struct Table {
    /// As an operator writes it: `listeners.NAME`.
    pub name: &'static str,
    /// What it is for.
    pub doc: &'static str,
    /// Every key that may stand in it.
    pub keys: &'static [Key],
}

/// One key.
#[derive(Debug)]
pub struct Key {
    /// As written in the file.
    pub name: &'static str,
    /// What its value may be.
    pub kind: Kind,
    /// What holds without it.
    pub default: Default,
    /// One or two sentences for editors.
    pub doc: &'static str,
}

/// The value of a key.
#[derive(Debug)]
pub enum Kind {
    /// `true` or `false`.
    Boolean,
    /// A whole number, both ends included.
    Integer(u64, u64),
    /// A string such as "1m 30s", both ends included.
    Duration(Duration, Duration),
    /// The same, or "off".
    DurationOrOff(Duration, Duration),
    /// One of `now`; those in `later` are known but not supported yet.
    Word {
        /// What may be written today.
        now: &'static [&'static str],
        /// What may be written one day.
        later: &'static [&'static str],
    },
    /// One of these, or a list of them.
    Words {
        /// What may be written today.
        now: &'static [&'static str],
        /// What may be written one day.
        later: &'static [&'static str],
    },
    /// Any string; the words say which, as in `must be ...`.
    Text(&'static str),
    /// A string or a list of them.
    Texts(&'static str),
    /// A table.
    Table(&'static Table),
    /// Tables by name.
    Named(&'static Table),
    /// A list of tables.
    List(&'static Table),
    /// A list whose elements are tables, or strings that stand for the table's first key.
    ListOrTexts(&'static Table),
    /// Known, and not supported yet.
    Later,
}

/// What holds where a key is not written.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Default {
    /// Nothing: the feature is off, or said in the key's description.
    None,
    /// It must be written.
    Required,
    /// A boolean.
    Boolean(bool),
    /// A number.
    Integer(u64),
    /// A string.
    Text(&'static str),
    /// A list of strings.
    Texts(&'static [&'static str]),
}

impl Table {
    /// The key of that name.
    pub fn key(&self, name: &str) -> Option<&'static Key> {
        self.keys.iter().find(|key| key.name == name)
    }
}

impl Kind {
    /// The table that a value of this kind leads to.
    pub fn table(&self) -> Option<&'static Table> {
        match self {
            Kind::Table(table) | Kind::Named(table) | Kind::List(table) | Kind::ListOrTexts(table) => Some(table),
            _ => None,
        }
    }
}

const fn key(name: &'static str, kind: Kind, default: Default, doc: &'static str) -> Key {
    Key { name, kind, default, doc }
}

const fn later(name: &'static str) -> Key {
    Key { name, kind: Kind::Later, default: Default::None, doc: "" }
}

const NONE: Duration = Duration::ZERO;
const MILLISECOND: Duration = Duration::from_millis(1);
const SECOND: Duration = Duration::from_secs(1);
const HOUR: Duration = Duration::from_secs(3_600);
const DAY: Duration = Duration::from_secs(86_400);
const YEAR: Duration = Duration::from_secs(365 * 86_400);
/// What TCP_KEEPIDLE takes.
const KEEPALIVE_MAX: Duration = Duration::from_secs(32_767);
/// Beyond what one machine has descriptors for.
const CONNECTIONS_MAX: u64 = 10_000_000;
/// More threads than any machine that a balancer of this kind needs.
const WORKERS_MAX: u64 = 256;
/// A client waits for all of them.
const RETRIES_MAX: u64 = 10;
const THRESHOLD_MAX: u64 = 100;
/// HAProxy's limit, too.
const WEIGHT_MAX: u64 = 256;

/// The whole file.
pub static FILE: Table = Table {
    name: "",
    doc: "Configuration of preface.",
    keys: &[
        key("runtime", Kind::Table(&RUNTIME), Default::None, RUNTIME.doc),
        key("log", Kind::Table(&LOG), Default::None, LOG.doc),
        key("admin", Kind::Table(&ADMIN), Default::None, ADMIN.doc),
        key("listeners", Kind::Named(&LISTENER), Default::Required, LISTENER.doc),
        key("pools", Kind::Named(&POOL), Default::Required, POOL.doc),
    ],
};

static RUNTIME: Table = Table {
    name: "runtime",
    doc: "The process.",
    keys: &[
        key(
            "workers",
            Kind::Integer(0, WORKERS_MAX),
            Default::Integer(0),
            "Threads that carry traffic; 0: one per CPU available, 16 at most. Read at start only.",
        ),
        key(
            "pin_workers",
            Kind::Boolean,
            Default::Boolean(false),
            "Each worker on a processor of its own; for machines that do nothing else. Read at start only.",
        ),
        key(
            "max_connections",
            Kind::Integer(0, CONNECTIONS_MAX),
            Default::Integer(0),
            "Limit of all listeners together; 0: as many as the descriptor limit has room for, and never more than that.",
        ),
        key(
            "stop_delay",
            Kind::Duration(NONE, HOUR),
            Default::Text("0s"),
            "After a stop signal /readyz answers 503 and connections are still accepted, this long. Kubernetes: 5s.",
        ),
        key(
            "stop_timeout",
            Kind::Duration(NONE, DAY),
            Default::Text("80s"),
            "Then the listeners close, and open connections have this long to finish.",
        ),
    ],
};

static LOG: Table = Table {
    name: "log",
    doc: "The log, on standard output.",
    keys: &[
        key(
            "level",
            Kind::Text("a level such as \"info\", or levels by module such as \"info,preface::health=debug\""),
            Default::Text("info"),
            "error, warn, info, debug, trace or off; by module: \"info,preface::health=debug\".",
        ),
        key("format", Kind::Word { now: &["text", "json"], later: &[] }, Default::Text("text"), "Form of a log line."),
        key(
            "connections",
            Kind::Word { now: &["all", "errors", "off", "start_and_end"], later: &[] },
            Default::Text("all"),
            "Which connections get a line when they end; start_and_end: all, and one more when they begin.",
        ),
    ],
};

static ADMIN: Table = Table {
    name: "admin",
    doc: "Status, metrics, probes and commands over HTTP.",
    keys: &[
        key(
            "bind",
            Kind::Text("an address such as \"127.0.0.1:9900\", or \"unix:/path\""),
            Default::Text("127.0.0.1:9900"),
            "IP address and port, or \"unix:/path\" (mode 0660).",
        ),
        key(
            "probe_bind",
            Kind::Text("an address such as \"0.0.0.0:9901\""),
            Default::None,
            "IP address and port for /livez, /readyz and /metrics alone, open to everyone who can reach it; read at start only.",
        ),
        key(
            "token_file",
            Kind::Text("the path of a file"),
            Default::None,
            "File with the bearer token of commands; required unless bind is a loopback address or a UNIX socket.",
        ),
    ],
};

static LISTENER: Table = Table {
    name: "listeners.NAME",
    doc: "An address that clients connect to.",
    keys: &[
        key(
            "bind",
            Kind::Texts("an address such as \":80\" or \"192.0.2.1:80\", or a list of them"),
            Default::Required,
            "\":80\" (every address, IPv4 and IPv6), \"192.0.2.1:80\", \"[::]:80\", \"unix:/path\" (mode 0660), \"fd:NAME\" (a socket handed over by systemd), or a list of them.",
        ),
        key(
            "protocol",
            Kind::Words { now: &["tcp", "udp"], later: &["tls"] },
            Default::Text("tcp"),
            "What clients speak: \"tcp\", \"udp\", or [\"tcp\", \"udp\"] for services such as DNS.",
        ),
        key("pool", Kind::Text("the name of a pool"), Default::Required, "Name of the pool that serves it."),
        key(
            "idle_timeout",
            Kind::Duration(MILLISECOND, YEAR),
            Default::Text("1h"),
            "A connection or session without a byte from either side for this long is ended; udp: 120s where it is not written.",
        ),
        key(
            "keepalive",
            Kind::DurationOrOff(SECOND, KEEPALIVE_MAX),
            Default::Text("60s"),
            "TCP keepalive towards client and upstream, or \"off\".",
        ),
        key(
            "max_connections",
            Kind::Integer(0, CONNECTIONS_MAX),
            Default::Integer(0),
            "Open connections of this listener; 0: no limit of its own.",
        ),
        key(
            "max_connections_per_source",
            Kind::Integer(0, CONNECTIONS_MAX),
            Default::Integer(0),
            "Open connections of one client address; IPv6 is counted per /64. 0: no limit.",
        ),
        key(
            "allow",
            Kind::Texts("a network such as \"10.0.0.0/8\", or a list of them"),
            Default::Texts(&["0.0.0.0/0", "::/0"]),
            "Client networks that may connect.",
        ),
        key(
            "deny",
            Kind::Texts("a network such as \"10.0.0.0/8\", or a list of them"),
            Default::Texts(&[]),
            "Client networks that may not; looked at before allow.",
        ),
        key(
            "max_sessions",
            Kind::Integer(0, CONNECTIONS_MAX),
            Default::Integer(0),
            "udp: open sessions of this listener; 0: 16,384, or fewer where ports or descriptors are short.",
        ),
        key(
            "responses",
            Kind::Integer(0, 1_000_000),
            Default::Integer(0),
            "udp: a session ends when each datagram of its client has had this many replies (DNS: 1); 0: by idle_timeout alone.",
        ),
        key("tlvs", Kind::Table(&TLVS), Default::None, TLVS.doc),
        later("accept_proxy_protocol"),
    ],
};

static POOL: Table = Table {
    name: "pools.NAME",
    doc: "A set of upstreams and how to choose among them.",
    keys: &[
        key(
            "balance",
            Kind::Word { now: &["round_robin", "least_connections", "random_two", "source_hash"], later: &[] },
            Default::Text("round_robin"),
            "How the upstream of a new connection is chosen.",
        ),
        key(
            "proxy_protocol",
            Kind::Word { now: &["off", "v1", "v2", "spp"], later: &[] },
            Default::Text("off"),
            "Version of the PROXY protocol header that upstreams are sent. They must expect it. udp: v2, or spp (Simple Proxy Protocol).",
        ),
        key(
            "udp_header",
            Kind::Word { now: &["every_datagram", "first_datagram", "first_alone"], later: &[] },
            Default::Text("every_datagram"),
            "udp: on which datagrams of a session the header stands; first_alone: in a datagram of its own, before the first.",
        ),
        key(
            "source",
            Kind::Texts("an IP address of this machine, or a list of them"),
            Default::Texts(&[]),
            "Local addresses for connections to upstreams, used in turn; empty: the system's choice.",
        ),
        key(
            "connect_timeout",
            Kind::Duration(MILLISECOND, HOUR),
            Default::Text("3s"),
            "One attempt to connect to an upstream.",
        ),
        key(
            "connect_deadline",
            Kind::Duration(MILLISECOND, HOUR),
            Default::Text("5s"),
            "All attempts for one client together.",
        ),
        key(
            "retries",
            Kind::Integer(0, RETRIES_MAX),
            Default::Integer(2),
            "Attempts after a failed one: at another upstream, or at the same one after 100 ms if there is no other.",
        ),
        key(
            "max_connections",
            Kind::Integer(0, CONNECTIONS_MAX),
            Default::Integer(0),
            "Open connections of each upstream; 0: no limit.",
        ),
        key(
            "slow_start",
            Kind::Duration(NONE, DAY),
            Default::Text("0s"),
            "An upstream that joins or turns healthy reaches its full weight after this time.",
        ),
        key(
            "unhealthy_after_failed_connects",
            Kind::Integer(0, 1_000_000),
            Default::Integer(3),
            "Failed connects in a row that make an upstream unhealthy without waiting for a check; 0: off.",
        ),
        key(
            "drain_timeout",
            Kind::Duration(NONE, YEAR),
            Default::Text("300s"),
            "Connections of an upstream that the configuration no longer has are reset after this time.",
        ),
        key(
            "on_unhealthy",
            Kind::Word { now: &["keep", "close"], later: &[] },
            Default::Text("keep"),
            "What becomes of the open connections of an upstream that turned unhealthy.",
        ),
        key(
            "when_none_healthy",
            Kind::Word { now: &["use_all", "refuse"], later: &[] },
            Default::Text("use_all"),
            "When no upstream is healthy, new connections go to all of them, or are reset.",
        ),
        key(
            "fast_open",
            Kind::Boolean,
            Default::Boolean(false),
            "TCP Fast Open: the header and the client's first bytes go out with the SYN once an upstream gave a cookie. \
             An upstream must bear to get a SYN's bytes twice; its listening sockets need fast open, too.",
        ),
        key("tlvs", Kind::Table(&TLVS), Default::None, TLVS.doc),
        key("health_check", Kind::Table(&HEALTH_CHECK), Default::None, HEALTH_CHECK.doc),
        key("upstreams", Kind::ListOrTexts(&UPSTREAM), Default::Required, UPSTREAM.doc),
    ],
};

static UPSTREAM: Table = Table {
    name: "pools.NAME.upstreams",
    doc: "The addresses that serve the pool: strings, or tables with further keys.",
    keys: &[
        key(
            "address",
            Kind::Text("an address such as \"10.0.0.30:80\", or a name such as \"web.example.com.:80\""),
            Default::Required,
            "IP address and port, or a name and port: each of its addresses is an upstream, looked up again as its TTLs \
             say; without a port: the listener's. \"srv:_http._tcp.example.com.\" takes ports and weights from SRV records. \
             \"unix:/path\" is a UNIX socket.",
        ),
        key(
            "weight",
            Kind::Integer(0, WEIGHT_MAX),
            Default::Integer(1),
            "Share of the new connections; 0 takes no new ones.",
        ),
        key(
            "backup",
            Kind::Boolean,
            Default::Boolean(false),
            "Used when no other is healthy, or every other is at its max_connections.",
        ),
        key(
            "proxy_protocol",
            Kind::Word { now: &["off", "v1", "v2", "spp"], later: &[] },
            Default::None,
            "Overrides the pool's.",
        ),
        key("max_connections", Kind::Integer(0, CONNECTIONS_MAX), Default::None, "Overrides the pool's."),
        key("tlvs", Kind::Table(&TLVS), Default::None, TLVS.doc),
    ],
};

static TLVS: Table = Table {
    name: "tlvs",
    doc: "What a v2 header says besides the addresses. Key by key the upstream's, else the listener's, else the pool's.",
    keys: &[
        key(
            "vpce_id",
            Kind::Text("a VPC endpoint's ID such as \"vpce-08d2bf15fac5001c9\""),
            Default::None,
            "AWS VPC endpoint ID: type 0xEA, sub-type 0x01.",
        ),
        key(
            "vpce_id_by_source",
            Kind::List(&VPCE_ID_BY_SOURCE),
            Default::None,
            "VPC endpoint ID by the client's network; the longest prefix wins, else vpce_id.",
        ),
        key(
            "azure_link_id",
            Kind::Integer(0, u32::MAX as u64),
            Default::None,
            "Azure Private Link LINKID: type 0xEE, sub-type 0x01.",
        ),
        key(
            "gcp_psc_id",
            Kind::Integer(0, u64::MAX),
            Default::None,
            "Google Cloud Private Service Connect connection ID: type 0xE0.",
        ),
        key("crc32c", Kind::Boolean, Default::Boolean(false), "Checksum of the header: type 0x03."),
        key(
            "unique_id",
            Kind::Boolean,
            Default::Boolean(false),
            "The connection's id as in the log, 26 characters: type 0x05.",
        ),
        key("authority", Kind::Text("a host name"), Default::None, "A fixed host name: type 0x02."),
        key("netns", Kind::Text("the name of a network namespace"), Default::None, "Network namespace: type 0x30."),
        key("custom", Kind::List(&CUSTOM), Default::None, "TLVs of your own, in this order."),
        later("pass_through"),
    ],
};

static VPCE_ID_BY_SOURCE: Table = Table {
    name: "vpce_id_by_source",
    doc: "One client network and its endpoint.",
    keys: &[
        key("from", Kind::Text("a network such as \"10.1.0.0/16\""), Default::Required, "Network of the client."),
        key(
            "id",
            Kind::Text("a VPC endpoint's ID such as \"vpce-08d2bf15fac5001c9\""),
            Default::Required,
            "The VPC endpoint's ID.",
        ),
    ],
};

static CUSTOM: Table = Table {
    name: "custom",
    doc: "One TLV; either text or hex.",
    keys: &[
        key("type", Kind::Integer(0, 255), Default::Required, "0xE0-0xEF, or 0xF0-0xF7 (experiments)."),
        key("text", Kind::Text("a string"), Default::None, "The value as UTF-8."),
        key(
            "hex",
            Kind::Text("hexadecimal digits such as \"0a0b\""),
            Default::None,
            "The value as hexadecimal digits.",
        ),
    ],
};

static HEALTH_CHECK: Table = Table {
    name: "pools.NAME.health_check",
    doc: "Health checks. Without this table the upstreams are not checked and taken for healthy.",
    keys: &[
        key(
            "protocol",
            Kind::Word { now: &["tcp", "http", "udp"], later: &["https", "tls"] },
            Default::Text("tcp"),
            "tcp: connect, then send and expect where they are set. http: GET, and look at the status. udp: send, then expect; without expect only a refusal (ICMP) fails.",
        ),
        key(
            "interval",
            Kind::Duration(Duration::from_millis(10), DAY),
            Default::Text("5s"),
            "From the start of one check to the start of the next.",
        ),
        key(
            "timeout",
            Kind::Duration(MILLISECOND, HOUR),
            Default::Text("2s"),
            "Connect, question and answer together.",
        ),
        key(
            "healthy_threshold",
            Kind::Integer(1, THRESHOLD_MAX),
            Default::Integer(2),
            "Successes in a row that make an unhealthy upstream healthy.",
        ),
        key(
            "unhealthy_threshold",
            Kind::Integer(1, THRESHOLD_MAX),
            Default::Integer(2),
            "Failures in a row that make a healthy upstream unhealthy.",
        ),
        key("port", Kind::Integer(1, 65_535), Default::None, "Where checks connect; default: the traffic port."),
        key("path", Kind::Text("a path such as \"/healthz\""), Default::Text("/"), "http: what is asked for."),
        key(
            "host",
            Kind::Text("a host name"),
            Default::None,
            "http: the Host header; default: the upstream's address.",
        ),
        key(
            "expect_status",
            Kind::Text("status codes such as \"200-399\" or \"200,204\""),
            Default::Text("200-399"),
            "http: the status codes that pass.",
        ),
        key("send", Kind::Text("a string"), Default::None, "tcp: what is sent after connecting; udp: the datagram."),
        key("expect", Kind::Text("a string"), Default::None, "tcp, udp: what the answer must contain."),
        key(
            "proxy_protocol",
            Kind::Word { now: &["same", "off", "v1", "v2", "spp"], later: &[] },
            Default::None,
            "Header of the check; default: \"same\" as the traffic on the traffic port, \"off\" on another one.",
        ),
        key(
            "proxy_command",
            Kind::Word { now: &["local", "proxy", "unknown"], later: &[] },
            Default::None,
            "v2: LOCAL (the default of tcp and http), or PROXY with the check's own addresses (the default of udp), which v1 always gives; unknown: v1 PROXY UNKNOWN.",
        ),
    ],
};
