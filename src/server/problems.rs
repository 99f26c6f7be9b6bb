//! PURE. What is wrong, out of what the status says. The one list: the page, `preface top` and scripts show it.

use serde_json::Value;

/// Of one kind in one pool this many are named, and the rest is counted: a whole pool that is down must not hide others.
const NAMED_MAX: usize = 5;

/// Failed connects in an interval of five seconds that are worth a word, if they are at least `FAILED_SHARE` of the
/// attempts; and so many in a row, however long that takes.
const FAILED_MIN: f64 = 3.0;
/// See `FAILED_MIN`.
const FAILED_SHARE: f64 = 0.1;
/// Seconds that rates are of.
const RATE_SECONDS: f64 = 5.0;

/// Open connections beyond this share of what may be are said.
const NEARLY_FULL: f64 = 0.8;

/// Drops of datagrams that the file orders, or that harm nobody.
const INTENDED_DROPS: [&str; 3] = ["denied", "own_address", "closing"];

/// The drops that are said with the connections that failed for the same reason.
const LOCAL_DROPS: &str = "local_resources";

/// How bad it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Severity {
    /// It hurts clients now, or soon.
    Bad,
    /// Somebody ordered it, or it can wait.
    Warn,
}

/// What is wrong; in the order in which they are shown, the worst first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// A pool takes no connections.
    PoolUnusable,
    /// A pool goes on without a healthy upstream.
    PoolUnhealthy,
    /// The last reload was refused.
    ReloadRefused,
    /// Nearly as many connections as there may be.
    NearlyFull,
    /// Look-ups of a name fail.
    LookupsFail,
    /// Connections fail for want of this machine's resources.
    LocalResources,
    /// An upstream rejects its header, or misses one.
    HeaderRejected,
    /// An upstream failed its checks, or connects to it.
    Unhealthy,
    /// Connects to an upstream fail.
    ConnectsFail,
    /// An upstream has slowed.
    Slow,
    /// An upstream has answered nobody: it rejects its header, or misses one, or it takes messages and never answers.
    NeverAnswers,
    /// A listener drops datagrams that it should pass on.
    DatagramsDropped,
    /// An operator has taken an upstream out.
    TakenOut,
    /// The process is stopping.
    Stopping,
    /// Log lines were dropped.
    LogLinesDropped,
    /// The configuration has a warning.
    Configuration,
}

/// Something that an operator has to know.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Problem {
    /// How bad it is.
    pub severity: Severity,
    /// What it is, for programs.
    pub kind: Kind,
    /// In which pool; `None`: it is of the whole process.
    pub pool: Option<String>,
    /// Of which upstream; `None`: of the whole pool, or process.
    pub upstream: Option<String>,
    /// What it is, in one line.
    pub what: String,
    /// Since when: RFC 3339, UTC; `None`: nobody knows, or it needs no saying.
    pub since: Option<String>,
    /// What to do about it, in one line; empty: `what` says it.
    pub advice: String,
}

impl Problem {
    fn new(severity: Severity, kind: Kind, what: impl Into<String>, advice: impl Into<String>) -> Problem {
        let (what, advice) = (what.into(), advice.into());
        Problem { severity, kind, pool: None, upstream: None, what, since: None, advice }
    }

    fn of_pool(self, pool: &str) -> Problem {
        Problem { pool: Some(pool.to_owned()), ..self }
    }

    fn of(self, pool: &str, upstream: &Value) -> Problem {
        Problem { upstream: Some(text(&upstream["address"]).to_owned()), ..self.of_pool(pool) }
    }

    fn since(self, time: &Value) -> Problem {
        Problem { since: time.as_str().map(str::to_owned), ..self }
    }
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

/// Out of `GET /status`, the worst first.
pub fn problems(status: &Value) -> Vec<Problem> {
    let mut found = of_process(status);
    for (name, pool) in status["pools"].as_object().into_iter().flatten() {
        found.extend(of_pool(name, pool, text(&status["config"])));
        found.extend(of_names(name, pool));
        let of_each = |upstream| of_upstream(name, upstream, has_another(pool, upstream));
        let mut of_upstreams: Vec<Problem> = upstreams(pool).flat_map(of_each).collect();
        of_upstreams.sort_by_key(|problem| (problem.severity, problem.kind));
        for alike in of_upstreams.chunk_by(|one, other| one.kind == other.kind) {
            found.extend(alike.iter().take(NAMED_MAX).cloned());
            if let Some(rest) = alike.get(NAMED_MAX..).filter(|rest| !rest.is_empty()) {
                let what = format!("{} more are like the {NAMED_MAX} named here", rest.len());
                found.push(Problem::new(rest[0].severity, rest[0].kind, what, "").of_pool(name));
            }
        }
    }
    found.sort_by_key(|problem| (problem.severity, problem.kind));
    found
}

fn upstreams(pool: &Value) -> impl Iterator<Item = &Value> {
    pool["upstreams"].as_array().into_iter().flatten()
}

/// Would clients that this upstream is spared have another one?
fn has_another(pool: &Value, upstream: &Value) -> bool {
    let takes = |other: &Value| other["health"] != "unhealthy" && other["admin"] == "enabled" && other["weight"] != 0;
    upstreams(pool).any(|other| other["address"] != upstream["address"] && takes(other) && !all_fail(other))
}

/// Did the last connects to it all fail?
fn all_fail(upstream: &Value) -> bool {
    upstream["failing"]["in_a_row"].as_f64().unwrap_or_default() >= FAILED_MIN
}

fn of_process(status: &Value) -> Vec<Problem> {
    let mut found = Vec::new();
    let last = &status["reloads"][0];
    if last["outcome"] == "refused" {
        let what = format!("the last reload was refused, what ran before goes on: {}", first_error(&last["errors"]));
        let advice =
            format!("correct the file and save it; `preface check {}` shows every error", text(&status["config"]));
        found.push(
            Problem::new(Severity::Bad, Kind::ReloadRefused, what, advice).since(&status["reloads_refused_since"]),
        );
    }
    let [open, max] = ["open", "max"].map(|key| status["connections"][key].as_f64().unwrap_or_default());
    if max > 0.0 && open > max * NEARLY_FULL {
        let what = format!("{open} of at most {max} connections are open");
        let advice = "beyond that new ones are reset: raise runtime.max_connections, and the descriptor limit (ulimit -n, \
                      LimitNOFILE=), or see in /connections who holds them";
        found.push(Problem::new(Severity::Bad, Kind::NearlyFull, what, advice));
    }
    if status["state"] == "stopping" {
        let what = "this process is stopping: it ends with its last connection, or at stop_timeout";
        let advice = "if nobody meant to: event=stop in the log names the signal";
        found.push(Problem::new(Severity::Warn, Kind::Stopping, what, advice));
    }
    found.extend(status["listeners"].as_object().into_iter().flatten().filter_map(|(name, listener)| {
        let dropped = listener["sessions"]["dropped_10m"].as_object().into_iter().flatten();
        let told: Vec<String> = dropped
            .filter(|(reason, _)| !INTENDED_DROPS.contains(&reason.as_str()) && *reason != LOCAL_DROPS)
            .map(|(reason, count)| format!("{reason} {count}"))
            .collect();
        let what = format!("listener {name} dropped datagrams in the last ten minutes: {}", told.join(", "));
        let advice = "queue_full, sessions_full: more than it, or an upstream, takes; refused, unreachable: see the pool; \
                      forbidden: this machine's own firewall; too_big: payload and header together";
        (!told.is_empty()).then(|| Problem::new(Severity::Warn, Kind::DatagramsDropped, what, advice))
    }));
    found.extend(status["listeners"].as_object().into_iter().flatten().filter_map(|(name, listener)| {
        let lack = Some(&listener["local_resources"]).filter(|lack| lack.is_object())?;
        let what = format!(
            "{} connections of listener {name} failed here in the last ten minutes, the last one: {}",
            lack["count_10m"],
            text(&lack["reason"])
        );
        let problem = Problem::new(Severity::Bad, Kind::LocalResources, what, text(&lack["change"]));
        Some(problem.since(&lack["since"]))
    }));
    if let Some(lines) = status["log_lines_dropped"].as_u64().filter(|lines| *lines > 0) {
        let what = format!("{lines} log lines dropped since the start: nobody reads standard output fast enough");
        let advice =
            "look at what reads it (journald's rate limit, a full disk); log.connections = \"errors\" writes less";
        found.push(Problem::new(Severity::Warn, Kind::LogLinesDropped, what, advice));
    }
    for pending in status["pending"].as_array().into_iter().flatten() {
        let what = format!("not in force: {}", text(pending));
        let advice =
            "`preface upgrade` puts it in force without losing a connection, so does a restart; or take it back";
        found.push(Problem::new(Severity::Warn, Kind::Configuration, what, advice));
    }
    for warning in status["warnings"].as_array().into_iter().flatten() {
        found.push(Problem::new(Severity::Warn, Kind::Configuration, headline(text(warning)), ""));
    }
    found
}

fn first_error(errors: &Value) -> String {
    let errors: Vec<&str> = errors.as_array().into_iter().flatten().map(text).collect();
    let first = headline(errors.first().copied().unwrap_or_default());
    match errors.len() {
        0 | 1 => first,
        count => format!("{first}, and {} more", count - 1),
    }
}

/// Of a rendered error or warning: what is wrong, and where.
fn headline(rendered: &str) -> String {
    let mut lines = rendered.lines().map(str::trim);
    let first = lines.next().unwrap_or_default();
    let first = ["error: ", "warning: "].iter().find_map(|prefix| first.strip_prefix(prefix)).unwrap_or(first);
    match lines.find_map(|line| line.strip_prefix("--> ")) {
        Some(place) => format!("{first} ({place})"),
        None => first.to_owned(),
    }
}

/// Names that cannot be looked up: worse where nothing is known of an earlier time.
fn of_names<'a>(pool_name: &'a str, pool: &'a Value) -> impl Iterator<Item = Problem> + 'a {
    let failing = pool["names"].as_array().into_iter().flatten().filter(|name| name["error"].is_string());
    failing.map(move |name| {
        let kept = name["addresses"].as_array().map_or(0, Vec::len);
        let (severity, then) = match kept {
            0 => (Severity::Bad, "it has no addresses".to_owned()),
            kept => (Severity::Warn, format!("its last addresses stay in use ({kept})")),
        };
        let what = format!("look-ups of {} fail, {then}: {}", text(&name["name"]), text(&name["error"]));
        let advice = "ask yourself, where preface runs: `getent ahosts NAME`; /etc/resolv.conf says whom it asks";
        Problem::new(severity, Kind::LookupsFail, what, advice).of_pool(pool_name).since(&name["failing_since"])
    })
}

fn of_pool(name: &str, pool: &Value, file: &str) -> Option<Problem> {
    let enabled = |upstream: &&Value| upstream["admin"] == "enabled" && upstream["weight"] != 0;
    let serves = |upstream: &Value| upstream["health"] == "healthy";
    // Whoever was not checked yet will be in a moment.
    let may_serve = |upstream: &Value| serves(upstream) || upstream["health"] == "unknown";
    upstreams(pool).next()?;
    let is_ordered = upstreams(pool).all(|upstream| !enabled(&upstream));
    let advice = match is_ordered {
        true => format!("`preface enable {name}`, or give one of its upstreams a weight"),
        false => format!("mend one of its upstreams, see below; `preface doctor --config {file}` asks all of them"),
    };
    // Since the last one left.
    let left = upstreams(pool).filter_map(|upstream| {
        let unhealthy = Some(&upstream["health_since"]).filter(|_| upstream["health"] == "unhealthy");
        [unhealthy, Some(&upstream["admin_since"])].into_iter().flatten().filter_map(Value::as_str).min()
    });
    let since = left.max().map_or(Value::Null, Value::from);
    if pool["usable"] == false {
        let what = "takes no connections, new ones are reset: no upstream is usable";
        return Some(Problem::new(Severity::Bad, Kind::PoolUnusable, what, advice).of_pool(name).since(&since));
    }
    if upstreams(pool).filter(enabled).any(may_serve) {
        return None;
    }
    let what = "no upstream is healthy and enabled: connections go to those that are not";
    Some(Problem::new(Severity::Bad, Kind::PoolUnhealthy, what, advice).of_pool(name).since(&since))
}

fn of_upstream(pool: &str, upstream: &Value, has_another: bool) -> Vec<Problem> {
    let mut found = Vec::new();
    let (address, admin) = (text(&upstream["address"]), text(&upstream["admin"]));
    let bad = |kind, what: String, advice: String| Problem::new(Severity::Bad, kind, what, advice).of(pool, upstream);
    let drain = match has_another && admin == "enabled" {
        false => String::new(),
        true => format!("; meanwhile `preface drain {pool} {address}` spares clients"),
    };
    let rejected = &upstream["header_rejected"];
    if !rejected.is_null() {
        let (reason, advice) = (text(&rejected["reason"]), text(&rejected["change"]));
        let problem = match rejected["certain"] == false {
            true => Problem::new(Severity::Warn, Kind::NeverAnswers, format!("never answers: {reason}"), advice)
                .of(pool, upstream),
            false => bad(Kind::HeaderRejected, format!("header rejected: {reason}"), advice.to_owned()),
        };
        found.push(problem.since(&rejected["since"]));
    }
    let is_unhealthy = upstream["health"] == "unhealthy";
    if is_unhealthy && admin != "disabled" {
        let reason = text(&upstream["health_reason"]).split("; header rejected?").next().unwrap_or_default();
        let what = format!("unhealthy: {reason}");
        found.push(bad(Kind::Unhealthy, what, of_reason(reason, address)).since(&upstream["health_since"]));
    }
    found
        .extend(failing_connects(upstream, &drain).filter(|_| !is_unhealthy).map(|problem| problem.of(pool, upstream)));
    let slow = &upstream["slow"];
    if !slow.is_null() {
        let (what, advice) = slowed(slow);
        found.push(bad(Kind::Slow, what, advice + &drain).since(&slow["since"]));
    }
    if ["draining", "disabled"].contains(&admin) {
        let open = upstream["open"].as_u64().unwrap_or_default();
        let what = format!("{admin} by {}, {open} open", text(&upstream["admin_by"]));
        let advice = format!("`preface enable {pool} {address}` when it may serve again");
        let problem = Problem::new(Severity::Warn, Kind::TakenOut, what, advice).of(pool, upstream);
        found.push(problem.since(&upstream["admin_since"]));
    }
    found
}

/// Connects that fail: all of the last ones, or many of the last seconds.
fn failing_connects(upstream: &Value, drain: &str) -> Option<Problem> {
    let rate = |key: &str| upstream["rates"][key].as_f64().unwrap_or_default() * RATE_SECONDS;
    let (failed, made) = (rate("failures_per_s"), rate("connections_per_s"));
    let (what, since) = if all_fail(upstream) {
        let failing = &upstream["failing"];
        (format!("its last {} connects all failed", failing["in_a_row"]), &failing["since"])
    } else if failed.round() >= FAILED_MIN && failed >= (failed + made) * FAILED_SHARE {
        let what = format!("{failed:.0} of {:.0} connects failed in the last 5 s", failed + made);
        (what, &upstream["failures_since"])
    } else {
        return None;
    };
    let advice = "refused at once: does it listen on that address and port? only after connect_timeout: firewall, or its \
                  accept queue is full (`ss -ltn` there)";
    Some(Problem::new(Severity::Bad, Kind::ConnectsFail, what, advice.to_owned() + drain).since(since))
}

/// What has slowed, and where to look.
fn slowed(slow: &Value) -> (String, String) {
    let [now, before, siblings] =
        ["now_ms", "before_ms", "siblings_ms"].map(|key| milliseconds(slow[key].as_f64().unwrap_or_default()));
    let (phase, advice) = match text(&slow["phase"]) {
        "connect" => (
            "connect",
            "the network on the way to it, or its machine: ping and mtr from here, `ss -ltn` there (Recv-Q near Send-Q: its accept \
             queue is full)",
        ),
        _ => (
            "first byte",
            "its connects are as quick as ever, so it is the application there: its load, its log, what it waits for \
             (database, disk, DNS)",
        ),
    };
    (format!("slow to {phase}: {now}, its siblings {siblings}, itself {before} before"), advice.to_owned())
}

/// Where to look, by the first words of what a check or a connect met.
fn of_reason(reason: &str, address: &str) -> String {
    const REFUSED: &str = "nothing listens on that address and port: does the service run there?";
    const SILENT: &str = "machine down, firewall, or too busy to answer";
    const OTHER: &str = "it answers, but not what the check wants: path, host, expect_status, send, expect";
    let says = |words: &[&str]| words.iter().any(|word| reason.contains(word));
    let probably = if says(&["refused", "unreachable"]) {
        REFUSED
    } else if says(&["within"]) {
        SILENT
    } else if says(&["status", "does not contain"]) {
        OTHER
    } else if says(&["failed connects"]) {
        "clients' connects fail, whatever the checks say: does it listen there, is its accept queue full (`ss -ltn`)?"
    } else {
        "does the check meet the port and the header that it should?"
    };
    let joint = if probably.ends_with('?') { "" } else { ";" };
    format!("{probably}{joint} `preface doctor {address}` shows what it does")
}

/// Three figures at most.
fn milliseconds(value: f64) -> String {
    match value {
        value if value >= 10_000.0 => format!("{:.0} s", value / 1000.0),
        value if value >= 1000.0 => format!("{:.1} s", value / 1000.0),
        value if value >= 10.0 => format!("{value:.0} ms"),
        value if value >= 1.0 => format!("{value:.1} ms"),
        value => format!("{value:.2} ms"),
    }
}

#[cfg(test)]
mod tests {
    use std::fmt::Write as _;

    use serde_json::json;

    use super::*;

    fn upstream(port: u16, more: Value) -> Value {
        let mut upstream = json!({
            "address": format!("10.0.0.1:{port}"), "health": "healthy", "health_reason": "connected in 0.3 ms",
            "health_since": "2026-11-21T04:26:00.000Z", "admin": "enabled", "admin_since": null, "admin_by": null,
            "weight": 1, "open": 3, "header_rejected": null, "slow": null,
            "rates": { "connections_per_s": 40.0, "failures_per_s": 0.0 },
        });
        upstream.as_object_mut().unwrap().extend(more.as_object().cloned().unwrap());
        upstream
    }

    fn status(upstreams: Vec<Value>) -> Value {
        json!({
            "config": "/etc/preface/preface.toml", "state": "running", "connections": { "open": 10, "max": 1000 },
            "log_lines_dropped": 0, "warnings": [], "reloads": [],
            "pools": { "web": { "usable": true, "upstreams": upstreams } },
        })
    }

    fn unhealthy(port: u16, reason: &str) -> Value {
        upstream(port, json!({ "health": "unhealthy", "health_reason": reason }))
    }

    fn slow(phase: &str) -> Value {
        json!({ "slow": {
            "phase": phase, "since": "2026-11-21T04:37:00.000Z", "now_ms": 101.2, "before_ms": 1.24, "siblings_ms": 0.9
        } })
    }

    fn said(status: &Value) -> String {
        let mut text = String::new();
        for Problem { severity, pool, upstream, what, since, advice, .. } in problems(status) {
            let name: Vec<String> = [pool, upstream].into_iter().flatten().collect();
            let since = since.map(|since| format!(" [{since}]")).unwrap_or_default();
            let _ = writeln!(text, "{severity:?} {}: {what}{since}\n    {advice}", name.join(" "));
        }
        text
    }

    #[test]
    fn datagrams_that_nobody_ordered_dropped_are_said() {
        let mut status = status(vec![upstream(1, json!({}))]);
        status["listeners"]["dns"]["sessions"]["dropped_10m"] = json!({ "denied": 7, "closing": 1 });
        assert!(problems(&status).is_empty());
        status["listeners"]["dns"]["sessions"]["dropped_10m"] = json!({ "denied": 7, "queue_full": 3, "too_big": 1 });
        let found = problems(&status);
        assert_eq!((found.len(), found[0].severity, found[0].kind), (1, Severity::Warn, Kind::DatagramsDropped));
        assert_eq!(found[0].what, "listener dns dropped datagrams in the last ten minutes: queue_full 3, too_big 1");
    }

    #[test]
    fn what_this_machine_lacks_is_said_once_with_what_to_do() {
        let mut status = status(vec![upstream(1, json!({}))]);
        status["listeners"]["dns"]["sessions"]["dropped_10m"] = json!({ "local_resources": 7 });
        status["listeners"]["dns"]["local_resources"] = json!({
            "since": "2026-11-21T04:26:00.000Z", "count_10m": 7, "reason": "too many open files", "change": "raise it",
        });
        let what =
            "7 connections of listener dns failed here in the last ten minutes, the last one: too many open files";
        assert_eq!(said(&status), format!("Bad : {what} [2026-11-21T04:26:00.000Z]\n    raise it\n"));
    }

    #[test]
    fn each_problem_says_what_to_do() {
        let pools = vec![
            upstream(1, slow("connect")),
            upstream(2, slow("first_byte")),
            upstream(
                3,
                json!({ "header_rejected": {
                "how": "http_400", "since": "2026-11-21T04:37:00.000Z", "reason": "the last 3 were ...", "change": "write ..."
            } }),
            ),
            upstream(
                11,
                json!({ "header_rejected": {
                "how": "closed", "since": "2026-11-21T04:38:00.000Z", "reason": "the last 3 were ...", "change": "write ...",
                "certain": false
            } }),
            ),
            upstream(4, json!({ "rates": { "connections_per_s": 7.0, "failures_per_s": 1.0 } })),
            upstream(
                5,
                json!({
                    "admin": "draining", "admin_by": "command line", "admin_since": "2026-11-21T04:30:00.000Z"
                }),
            ),
            unhealthy(6, "connection refused"),
            unhealthy(7, "no answer within 2s; header rejected? the last 3"),
            unhealthy(8, "status 503, expected 200-399"),
            unhealthy(9, "3 failed connects in a row"),
            unhealthy(10, "closed"),
        ];
        let mut status = status(pools);
        status["state"] = "stopping".into();
        status["connections"]["open"] = 900.into();
        status["log_lines_dropped"] = 7.into();
        status["warnings"] = json!(["warning: the header is larger\n  --> preface.toml:7:1\n  |\n7 | x"]);
        status["reloads_refused_since"] = "2026-11-21T04:36:00.000Z".into();
        status["reloads"] = json!([{
            "outcome": "refused", "time": "2026-11-21T04:36:00.000Z",
            "errors": ["error: no pool named \"ingres\"\n  --> preface.toml:3:8\n  |", "error: another"],
        }]);
        insta::assert_snapshot!(said(&status));
    }

    #[test]
    fn where_all_is_well_nothing_is_said() {
        for upstreams in [
            vec![],
            vec![upstream(1, json!({})), upstream(2, json!({}))],
            // Checked in a moment.
            vec![upstream(1, json!({ "health": "unknown" }))],
            // Two of two thousand, and one alone.
            vec![upstream(1, json!({ "rates": { "connections_per_s": 400.0, "failures_per_s": 0.6 } }))],
            vec![upstream(1, json!({ "rates": { "connections_per_s": 0.0, "failures_per_s": 0.2 } }))],
        ] {
            assert_eq!(said(&status(upstreams)), "");
        }
        assert_eq!(problems(&json!({})), []);
        assert_eq!(problems(&json!({ "pools": { "p": 7 }, "reloads": "none" })), []);
    }

    #[test]
    fn a_pool_without_a_healthy_upstream_comes_first() {
        let mut none = status(vec![unhealthy(1, "connection refused"), upstream(2, json!({ "admin": "disabled" }))]);
        assert!(said(&none).starts_with("Bad web: no upstream is healthy and enabled"), "{}", said(&none));
        none["pools"]["web"]["usable"] = false.into();
        assert!(said(&none).starts_with("Bad web: takes no connections"), "{}", said(&none));
        let mut ordered = status(vec![upstream(1, json!({ "admin": "disabled" }))]);
        ordered["pools"]["web"]["usable"] = false.into();
        assert!(said(&ordered).contains("`preface enable web`"), "{}", said(&ordered));
    }

    #[test]
    fn connects_that_all_fail_are_said_however_few_come_and_since_the_first() {
        let since = "2026-11-21T04:26:00.000Z";
        let failing = |count: u32| json!({ "failing": { "in_a_row": count, "since": since, "last": since } });
        assert_eq!(said(&status(vec![upstream(1, failing(2))])), "");
        let found = problems(&status(vec![upstream(1, failing(3))]));
        assert_eq!((found.len(), found[0].kind, found[0].since.as_deref()), (1, Kind::ConnectsFail, Some(since)));
        assert_eq!(found[0].what, "its last 3 connects all failed");
        assert!(!found[0].advice.contains("preface drain"), "{}", found[0].advice);
    }

    #[test]
    fn nobody_is_told_to_drain_the_last_one_that_works() {
        let advice = |other: Value| {
            let found = problems(&status(vec![upstream(1, slow("connect")), upstream(2, other)]));
            let of_first = found.into_iter().find(|problem| problem.upstream.as_deref() == Some("10.0.0.1:1"));
            of_first.expect("it is slow").advice
        };
        for other in [
            json!({ "health": "unhealthy" }),
            json!({ "admin": "disabled" }),
            json!({ "admin": "draining" }),
            json!({ "weight": 0 }),
            json!({ "failing": { "in_a_row": 3 } }),
        ] {
            assert!(!advice(other.clone()).contains("preface drain"), "{other}");
        }
        assert!(advice(json!({})).contains("preface drain web 10.0.0.1:1"));
        let mut drained = slow("connect");
        drained["admin"] = "draining".into();
        assert!(!said(&status(vec![upstream(1, drained), upstream(2, json!({}))])).contains("preface drain"));
    }

    #[test]
    fn a_problem_is_as_old_as_what_began_it() {
        let at = |minute: u32| format!("2026-11-21T04:{minute:02}:00.000Z");
        let unhealthy = |port, minute| upstream(port, json!({ "health": "unhealthy", "health_since": at(minute) }));
        let taken_out = upstream(3, json!({ "admin": "draining", "admin_since": at(50) }));
        let since = |status: &Value| problems(status)[0].since.clone();
        let mut none = status(vec![unhealthy(1, 20), unhealthy(2, 30)]);
        assert_eq!(since(&none), Some(at(30)));
        none["pools"]["web"]["usable"] = false.into();
        assert_eq!(since(&none), Some(at(30)));
        assert_eq!(since(&status(vec![unhealthy(1, 20), taken_out])), Some(at(50)));
        let mut refused = status(vec![]);
        refused["reloads"] = json!([{ "outcome": "refused", "time": at(9), "errors": ["x"] }]);
        refused["reloads_refused_since"] = at(3).into();
        assert_eq!(since(&refused), Some(at(3)));
        let rates = json!({ "rates": { "connections_per_s": 1.0, "failures_per_s": 1.0 }, "failures_since": at(7) });
        assert_eq!(since(&status(vec![upstream(1, rates)])), Some(at(7)));
    }

    #[test]
    fn of_many_alike_five_are_named() {
        let mut upstreams: Vec<Value> = (1..=300).map(|port| unhealthy(port, "connection refused")).collect();
        upstreams.push(upstream(400, slow("first_byte")));
        let found = problems(&status(upstreams));
        assert_eq!(found.len(), NAMED_MAX + 1 + 1);
        assert_eq!(found[NAMED_MAX].what, "295 more are like the 5 named here");
        assert_eq!(found[found.len() - 1].kind, Kind::Slow);
    }
}
