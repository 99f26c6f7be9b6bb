//! PURE. What `preface top` shows, out of the status as JSON. Nothing in it is required: what is missing shows as `-`.

use serde_json::Value;

use super::words::{Time, count, span};

/// One look at the running process.
#[derive(Clone, Debug, Default)]
pub struct Model {
    /// Version of the process.
    pub version: String,
    /// running or stopping.
    pub state: String,
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

/// What an operator has to know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// Hurts now; otherwise somebody ordered it, or it can wait.
    pub bad: bool,
    /// One line.
    pub text: String,
}

/// Per second; `None` where the server does not say.
#[derive(Clone, Copy, Debug, Default)]
pub struct Rates {
    /// New connections.
    pub connections: Option<f64>,
    /// Failed connects; of everything: ends that are not regular.
    pub failures: Option<f64>,
    /// From clients.
    pub bytes_in: Option<f64>,
    /// To clients.
    pub bytes_out: Option<f64>,
}

/// Milliseconds, of the last minute.
#[derive(Clone, Copy, Debug, Default)]
pub struct Latency {
    /// Of connects: p50, p99.
    pub connect: [Option<f64>; 2],
    /// To the upstream's first byte: p50, p99.
    pub first_byte: [Option<f64>; 2],
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
    /// Names whose look-ups fail, and why.
    pub unknown_names: Vec<(String, String)>,
    /// Has it names at all? Then it may be without upstreams.
    pub has_names: bool,
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
    /// Why it seems to refuse the header, and what to change; empty: it takes it.
    pub header_rejected: String,
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
            state: text(&status["state"]),
            now: time(&status["time"]),
            started: time(&status["started"]),
            open: status["connections"]["open"].as_u64(),
            open_max: status["connections"]["max"].as_u64(),
            rates: rates(&status["rates"]),
            pools: pools.map(|(name, value)| pool(name, value)).collect(),
            problems: Vec::new(),
        };
        model.problems = problems(&model, status);
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
    let names = value["names"].as_array().map_or(&[][..], Vec::as_slice);
    let failing = names.iter().filter(|name| name["error"].is_string());
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
        unknown_names: failing.map(|name| (text(&name["name"]), text(&name["error"]))).collect(),
        has_names: !names.is_empty(),
    }
}

fn upstream(value: &Value) -> Upstream {
    let rejected = ["reason", "change"].map(|part| text(&value["header_rejected"][part])).join("; ");
    let rejected = rejected.trim_end_matches("; ").to_owned();
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
        header_rejected: rejected,
    }
}

fn rates(value: &Value) -> Rates {
    Rates {
        connections: value["connections_per_s"].as_f64(),
        failures: value["failures_per_s"].as_f64(),
        bytes_in: value["bytes_in_per_s"].as_f64(),
        bytes_out: value["bytes_out_per_s"].as_f64(),
    }
}

fn latency(value: &Value) -> Latency {
    let both = |kind: &str| ["p50", "p99"].map(|name| value[kind]["last_minute"][name].as_f64());
    Latency { connect: both("connect_ms"), first_byte: both("first_byte_ms") }
}

fn problems(model: &Model, status: &Value) -> Vec<Problem> {
    let mut found = Vec::new();
    let mut tell = |bad: bool, text: String| found.push(Problem { bad, text });
    for pool in model.pools.iter().filter(|pool| !pool.upstreams.is_empty() || pool.has_names) {
        let name = &pool.name;
        for (unknown, error) in &pool.unknown_names {
            tell(pool.upstreams.is_empty(), format!("pool {name}: look-ups of {unknown} fail: {error}"));
        }
        if !pool.usable {
            tell(true, format!("pool {name} takes no connections: no upstream is usable"));
        } else if pool.serving == 0 {
            tell(true, format!("pool {name}: no upstream is healthy and enabled"));
        }
    }
    let last = &status["reloads"][0];
    if last["outcome"] == "refused" {
        let error = last["errors"][0].as_str().unwrap_or_default();
        let first = error.lines().next().unwrap_or_default().trim_start_matches("error: ");
        tell(true, format!("the last reload was refused: {}", text(&first.into())));
    }
    for (pool, upstream) in model.pools.iter().flat_map(|pool| pool.upstreams.iter().map(move |one| (pool, one))) {
        let Upstream { address, admin, .. } = upstream;
        let name = format!("{} {address}", pool.name);
        if upstream.health == "unhealthy" && admin != "disabled" {
            tell(true, format!("{name} unhealthy {}: {}", model.since(upstream.health_since), upstream.health_reason));
        }
        if !admin.is_empty() && admin != "enabled" {
            let open = count(upstream.numbers.open);
            tell(
                false,
                format!("{name} {admin} {} by {}, {open} open", model.since(upstream.admin_since), upstream.admin_by),
            );
        }
        if !upstream.header_rejected.is_empty() {
            tell(true, format!("{name} refuses the header: {}", upstream.header_rejected));
        }
    }
    if let (Some(open), Some(max)) = (model.open, model.open_max)
        && max > 0
        && open > max / 5 * 4
    {
        tell(true, format!("{} of at most {} connections are open", count(Some(open)), count(Some(max))));
    }
    if model.state == "stopping" {
        tell(false, "the process is stopping".to_owned());
    }
    if let Some(lines) = status["log_lines_dropped"].as_u64().filter(|lines| *lines > 0) {
        tell(false, format!("{} log lines dropped: nobody reads standard output fast enough", count(Some(lines))));
    }
    found.sort_by_key(|problem| !problem.bad);
    found
}
