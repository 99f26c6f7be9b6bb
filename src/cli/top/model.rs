//! PURE. What `preface top` shows, out of the status as JSON. Nothing in it is required: what is missing shows as `-`.

use serde_json::Value;

use super::words::{Time, span};

/// One look at the running process.
#[derive(Clone, Debug, Default)]
pub struct Model {
    /// Version of the process.
    pub version: String,
    /// By its own clock.
    pub now: Option<Time>,
    /// When it started.
    pub started: Option<Time>,
    /// Open client connections.
    pub open: Option<u64>,
    /// And how many may be.
    pub open_max: Option<u64>,
    /// Of everything.
    pub rates: Rates,
    /// Pools by name.
    pub pools: Vec<Pool>,
    /// What is wrong, the worst first.
    pub problems: Vec<Problem>,
}

/// What an operator has to know; the server's list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// Hurts now; otherwise somebody ordered it, or it can wait.
    pub bad: bool,
    /// Empty: of the process.
    pub pool: String,
    /// Empty: of the whole pool.
    pub upstream: String,
    /// Where, what, and since when, in one line.
    pub text: String,
    /// What to do; may be empty.
    pub advice: String,
}

/// Per second; `None` where the server does not say.
#[derive(Clone, Copy, Debug, Default)]
pub struct Rates {
    /// New connections and UDP sessions.
    pub connections: Option<f64>,
    /// Failed connects; of everything: ends that are not regular.
    pub failures: Option<f64>,
    /// From clients.
    pub bytes_in: Option<f64>,
    /// To clients.
    pub bytes_out: Option<f64>,
    /// From clients.
    pub datagrams_in: Option<f64>,
    /// To clients.
    pub datagrams_out: Option<f64>,
}

/// The figures of a distribution, as the status calls them.
pub const FIGURES: [&str; 5] = ["p50", "p90", "p99", "p999", "max"];

/// One kind of duration, in milliseconds, by `FIGURES`.
#[derive(Clone, Copy, Debug, Default)]
pub struct Times {
    /// Of the last minute.
    pub last_minute: [Option<f64>; FIGURES.len()],
    /// Of all.
    pub since_start: [Option<f64>; FIGURES.len()],
}

/// Kinds of durations: in the status, and on the screen.
pub const KINDS: [(&str, &str); 5] = [
    ("connect_ms", "connect"),
    ("first_byte_ms", "first byte"),
    ("duration_ms", "connection"),
    ("round_trip_ms", "round trip"),
    ("session_ms", "session"),
];

/// Milliseconds, of the last minute where nothing else is said.
#[derive(Clone, Copy, Debug, Default)]
pub struct Latency {
    /// All that is known, by `KINDS`.
    pub times: [Times; KINDS.len()],
    /// Of connects: p50, p99.
    pub connect: [Option<f64>; 2],
    /// To the upstream's first byte: p50, p99.
    pub first_byte: [Option<f64>; 2],
    /// Of UDP, from question to reply: p50, p99.
    pub round_trip: [Option<f64>; 2],
}

impl Latency {
    /// How long clients wait for an answer: p50, p99 of the slower one, where there are connections and UDP sessions.
    pub fn answer(&self) -> [Option<f64>; 2] {
        let slower = |one: Option<f64>, other: Option<f64>| match (one, other) {
            (Some(one), Some(other)) => Some(one.max(other)),
            (one, other) => one.or(other),
        };
        [0, 1].map(|share| slower(self.first_byte[share], self.round_trip[share]))
    }
}

/// A pool.
#[derive(Clone, Debug)]
pub struct Pool {
    /// Its name.
    pub name: String,
    /// Can it take connections?
    pub usable: bool,
    /// Upstreams that are healthy and enabled.
    pub serving: usize,
    /// Of all of it.
    pub numbers: Numbers,
    /// In the status's order.
    pub upstreams: Vec<Upstream>,
}

/// The numbers of a row.
#[derive(Clone, Copy, Debug, Default)]
pub struct Numbers {
    /// Open connections.
    pub open: Option<u64>,
    /// Of the last seconds.
    pub rates: Rates,
    /// Of the last minute.
    pub latency: Latency,
    /// Since the start.
    pub connect_failures: Option<u64>,
}

/// An upstream.
#[derive(Clone, Debug)]
pub struct Upstream {
    /// As in the status.
    pub address: String,
    /// healthy, unhealthy, unknown.
    pub health: String,
    /// Why.
    pub health_reason: String,
    /// Since when.
    pub health_since: Option<Time>,
    /// enabled, draining, disabled.
    pub admin: String,
    /// Since when, if ordered.
    pub admin_since: Option<Time>,
    /// By what, if ordered.
    pub admin_by: String,
    /// off, v1, v2.
    pub header: String,
    /// Connections to it, and how they go.
    pub numbers: Numbers,
    /// connect or first_byte; empty: it is as fast as ever.
    pub slow: String,
    /// Does it seem to reject the header?
    pub is_header_rejected: bool,
}

impl Upstream {
    /// Does it take connections as it should?
    pub fn is_serving(&self) -> bool {
        self.health == "healthy" && self.admin == "enabled"
    }
}

/// Text without what could move a terminal's cursor: names come from a file that others may write.
fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

fn time(value: &Value) -> Option<Time> {
    Time::parse(value.as_str()?)
}

impl Model {
    /// Out of the answer to `GET /status`.
    pub fn of_status(status: &Value) -> Model {
        let pools = status["pools"].as_object().into_iter().flatten();
        let mut model = Model {
            version: text(&status["version"]),
            now: time(&status["time"]),
            started: time(&status["started"]),
            open: status["connections"]["open"].as_u64(),
            open_max: status["connections"]["max"].as_u64(),
            rates: rates(&status["rates"]),
            pools: pools.map(|(name, value)| pool(name, value)).collect(),
            problems: Vec::new(),
        };
        let found = status["problems"].as_array().into_iter().flatten();
        model.problems = found.map(|value| problem(&model, value)).collect();
        model
    }

    /// How many upstreams there are, and how many of them serve.
    pub fn upstreams(&self) -> (usize, usize) {
        let count = self.pools.iter().map(|pool| pool.upstreams.len()).sum();
        (self.pools.iter().map(|pool| pool.serving).sum(), count)
    }

    /// "for 12m"
    pub fn since(&self, time: Option<Time>) -> String {
        match (self.now, time) {
            (Some(now), Some(time)) => format!("for {}", span(now.seconds_since(time))),
            _ => String::new(),
        }
    }
}

fn pool(name: &str, value: &Value) -> Pool {
    let upstreams: Vec<Upstream> = value["upstreams"].as_array().into_iter().flatten().map(upstream).collect();
    let sum = |of: fn(&Numbers) -> Option<u64>| upstreams.iter().filter_map(|upstream| of(&upstream.numbers)).sum();
    let numbers = Numbers {
        open: Some(sum(|numbers| numbers.open)),
        rates: rates(&value["rates"]),
        latency: latency(&value["latency"]),
        connect_failures: Some(sum(|numbers| numbers.connect_failures)),
    };
    Pool {
        name: text(&name.into()),
        usable: value["usable"] != false,
        serving: upstreams.iter().filter(|upstream| upstream.is_serving()).count(),
        numbers,
        upstreams,
    }
}

fn upstream(value: &Value) -> Upstream {
    Upstream {
        address: text(&value["address"]),
        health: text(&value["health"]),
        health_reason: text(&value["health_reason"]),
        health_since: time(&value["health_since"]),
        admin: text(&value["admin"]),
        admin_since: time(&value["admin_since"]),
        admin_by: text(&value["admin_by"]),
        header: text(&value["header"]),
        numbers: Numbers {
            open: value["open"].as_u64(),
            rates: rates(&value["rates"]),
            latency: latency(&value["latency"]),
            connect_failures: value["connect_failures"].as_u64(),
        },
        slow: text(&value["slow"]["phase"]),
        is_header_rejected: value["header_rejected"].is_object() && value["header_rejected"]["certain"] != false,
    }
}

fn rates(value: &Value) -> Rates {
    Rates {
        connections: value["connections_per_s"].as_f64(),
        failures: value["failures_per_s"].as_f64(),
        bytes_in: value["bytes_in_per_s"].as_f64(),
        bytes_out: value["bytes_out_per_s"].as_f64(),
        datagrams_in: value["datagrams_in_per_s"].as_f64(),
        datagrams_out: value["datagrams_out_per_s"].as_f64(),
    }
}

fn latency(value: &Value) -> Latency {
    let times = KINDS.map(|(kind, _)| {
        let figures = |period: &str| FIGURES.map(|figure| value[kind][period][figure].as_f64());
        Times { last_minute: figures("last_minute"), since_start: figures("since_start") }
    });
    let [connect, first_byte, _, round_trip, _] = times.map(|Times { last_minute: [p50, _, p99, ..], .. }| [p50, p99]);
    Latency { times, connect, first_byte, round_trip }
}

fn problem(model: &Model, value: &Value) -> Problem {
    let [pool, upstream, what] = ["pool", "upstream", "what"].map(|key| text(&value[key]));
    let place = match (pool.is_empty(), upstream.is_empty()) {
        (true, _) => String::new(),
        (false, true) => format!("pool {pool}: "),
        (false, false) => format!("{pool} {upstream}: "),
    };
    let since = model.since(time(&value["since"]));
    let since = if since.is_empty() { since } else { format!(", {since}") };
    let (bad, advice) = (value["severity"] != "warn", text(&value["advice"]));
    Problem { bad, pool, upstream, text: format!("{place}{what}{since}"), advice }
}
