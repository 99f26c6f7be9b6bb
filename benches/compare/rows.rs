//! What is measured, for whom, in which units, and what it should come to.

use preface::proxy_protocol::Version;

use super::datagrams::Kept;
use super::load::Way;
use super::peers::Kind::{self, *};

/// One line-up of candidates on one kind of work.
#[derive(Clone, Debug)]
pub struct Row {
    /// In options and JSON.
    pub name: String,
    /// In table and plot.
    pub title: String,
    /// What is done.
    pub work: Work,
    /// Who does it.
    pub contestants: Vec<Contestant>,
    /// What it should come to.
    pub targets: Vec<Target>,
    /// So many times the usual amount: what happens once a second needs seconds to be seen.
    pub times: u64,
}

/// A candidate as it takes part in a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Contestant {
    /// Which one.
    pub kind: Kind,
    /// Worker threads.
    pub workers: usize,
    /// Compared with itself with more or fewer workers.
    pub scaling: bool,
}

impl Contestant {
    /// In table, plot and JSON.
    pub fn label(&self) -> String {
        match (self.scaling, self.workers) {
            (false, _) => self.kind.name().to_owned(),
            (true, 1) => "1 worker".to_owned(),
            (true, workers) => format!("{workers} workers"),
        }
    }
}

/// The work of a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// As many bytes as fit.
    Bulk {
        /// At the same time.
        connections: usize,
        /// One of both.
        way: Way,
    },
    /// Messages there and back.
    PingPong {
        /// At the same time.
        connections: usize,
        /// Bytes of a message.
        size: usize,
    },
    /// Connect, ask, be answered, close.
    Short {
        /// How many at the same time.
        at_a_time: usize,
    },
    /// Datagrams, each with a header of its own.
    Datagrams {
        /// At the same time.
        sessions: usize,
        /// One way or both.
        kept: Kept,
        /// Does something else want the candidate's processor all the time? Then queues form: with a processor of its own
        /// a quick candidate is woken for every few datagrams.
        crowded: bool,
    },
    /// Connections that were used once.
    Idle,
    /// New connections while the configuration changes.
    Reload,
}

/// A figure of a row.
#[derive(Clone, Copy, Debug)]
pub struct Metric {
    /// In samples and JSON.
    pub key: &'static str,
    /// The head of its column.
    pub title: &'static str,
}

const fn metric(key: &'static str, title: &'static str) -> Metric {
    Metric { key, title }
}

const BUSY: Metric = metric("busy", "cores the candidate kept busy");
const GENERATOR: Metric = metric("generator", "cores generator and backend kept busy");
const WORKERS: Metric = metric("workers", "its workers");
const SPREAD: Metric = metric("spread", "busiest / least busy worker");

const ONE_WAY: [Metric; 6] = of_datagrams("CPU-s per 100k datagrams");
const THERE_AND_BACK: [Metric; 6] = of_datagrams("CPU-s per 100k there and back");

const fn of_datagrams(cpu: &'static str) -> [Metric; 6] {
    let (machine, rate) = (metric("machine", "whole machine"), metric("rate", "1000/s"));
    [metric("cpu", cpu), rate, metric("lost", "lost"), BUSY, GENERATOR, machine]
}

/// Beyond the candidate it would say what the other program uses, which is a thread of the generator.
const fn of_its_own(metrics: &'static [Metric; 6]) -> &'static [Metric] {
    metrics.split_at(4).0
}

impl Work {
    /// The header that the candidate's upstream must get: nginx has none for datagrams.
    pub fn header(self, kind: Kind) -> Option<Version> {
        match (self, kind) {
            (Work::Datagrams { .. }, Nginx | NginxTuned) => None,
            _ => kind.header(),
        }
    }

    /// Does the candidate share its processor?
    pub fn is_crowded(self) -> bool {
        matches!(self, Work::Datagrams { crowded: true, .. })
    }

    /// The first one is compared and drawn.
    pub fn metrics(self) -> &'static [Metric] {
        match self {
            Work::Bulk { .. } => {
                const {
                    &[
                        metric("cpu", "CPU-s per GB"),
                        metric("machine", "whole machine"),
                        metric("rate", "GB/s"),
                        BUSY,
                        GENERATOR,
                        SPREAD,
                    ]
                }
            }
            Work::PingPong { .. } => {
                const {
                    &[
                        metric("cpu", "CPU-s per 100k round trips"),
                        WORKERS,
                        metric("machine", "whole machine"),
                        metric("rate", "1000/s"),
                        metric("p50", "p50 µs"),
                        metric("p99", "p99 µs"),
                        BUSY,
                        GENERATOR,
                        SPREAD,
                    ]
                }
            }
            Work::Short { .. } => {
                const {
                    &[
                        metric("cpu", "CPU-s per 10k connections"),
                        WORKERS,
                        metric("machine", "whole machine"),
                        metric("rate", "1000/s"),
                        metric("p50", "p50 µs"),
                        metric("p99", "p99 µs"),
                        BUSY,
                        GENERATOR,
                    ]
                }
            }
            Work::Datagrams { kept: Kept::OneWay, crowded: false, .. } => &ONE_WAY,
            Work::Datagrams { kept: Kept::Echo, crowded: false, .. } => &THERE_AND_BACK,
            Work::Datagrams { kept: Kept::OneWay, .. } => of_its_own(&ONE_WAY),
            Work::Datagrams { kept: Kept::Echo, .. } => of_its_own(&THERE_AND_BACK),
            Work::Idle => const { &[metric("memory", "KiB of user memory per connection")] },
            Work::Reload => {
                const {
                    &[
                        metric("during_p99", "connect to first byte: p99 µs during reloads"),
                        metric("before_p99", "before"),
                        metric("after_p99", "after"),
                        metric("during_p50", "p50 during"),
                        metric("before_p50", "before"),
                        metric("after_p50", "after"),
                        metric("during_p999", "p999 during"),
                        metric("before_p999", "before"),
                        metric("after_p999", "after"),
                        metric("failed", "failed"),
                    ]
                }
            }
        }
    }
}

/// A figure of one candidate and its limit.
#[derive(Clone, Debug)]
pub struct Target {
    /// What is compared, in words.
    pub text: &'static str,
    /// Whose figure.
    pub of: Kind,
    /// Which figure.
    pub key: &'static str,
    /// The best of these is 1; none: the figure itself counts.
    pub against: &'static [Kind],
    /// Which figure of theirs.
    pub against_key: &'static str,
    /// As much at most.
    pub max: f64,
}

const fn ratio(text: &'static str, key: &'static str, against: &'static [Kind], max: f64) -> Target {
    Target { text, of: Preface, key, against, against_key: key, max }
}

const DEFAULTS: &[Kind] = &[Haproxy, Nginx, Envoy];
const NGINX: &[Kind] = &[Nginx, NginxTuned];
const FEATURES: &str = "preface / the same relay without features";

/// Everyone who does what preface does with its log off.
const PEERS: [Kind; 8] = [Direct, Preface, Bare, Haproxy, HaproxyTuned, Nginx, NginxTuned, Envoy];

fn row(name: &str, title: &str, work: Work, kinds: &[Kind], targets: Vec<Target>) -> Row {
    let contestants = kinds.iter().map(|&kind| Contestant { kind, workers: 1, scaling: false }).collect();
    Row { name: name.to_owned(), title: title.to_owned(), work, contestants, targets, times: 1 }
}

/// All rows, for a machine with so many processors.
pub fn all(cpus: usize) -> Vec<Row> {
    let mut rows = Vec::new();
    for (name, way, words) in [("up", Way::Up, "client to upstream"), ("down", Way::Down, "upstream to client")] {
        for (connections, tuned, default) in [(1, 1.0, 0.75), (16, 0.85, 0.45)] {
            let targets = vec![
                ratio("preface / HAProxy tuned", "cpu", &[HaproxyTuned], tuned),
                ratio("preface / best peer at its defaults", "cpu", DEFAULTS, default),
                ratio(FEATURES, "cpu", &[Bare], 1.05),
            ];
            let plural = if connections == 1 { "1 connection" } else { "16 connections" };
            let work = Work::Bulk { connections, way };
            rows.push(row(
                &format!("bulk-{connections}-{name}"),
                &format!("Bulk, {plural}, {words}"),
                work,
                &PEERS,
                targets,
            ));
        }
    }
    for (size, words) in [(64, "64 B"), (1024, "1 KiB")] {
        for connections in [1, 64] {
            let mut targets = vec![];
            if connections == 64 {
                targets.push(ratio("preface / nginx", "cpu", NGINX, 0.95));
                targets.push(ratio(FEATURES, "cpu", &[Bare], 1.05));
            }
            let plural = if connections == 1 { "1 connection" } else { "64 connections" };
            rows.push(row(
                &format!("pingpong-{connections}-{size}"),
                &format!("Ping-pong of {words}, {plural}"),
                Work::PingPong { connections, size },
                &PEERS,
                targets,
            ));
        }
    }
    for at_a_time in [1, 16] {
        let logged = Target { of: PrefaceLog, ..ratio("connection log on / off", "cpu", &[Preface], 1.10) };
        let targets = vec![ratio("preface / nginx", "cpu", NGINX, 0.93), ratio(FEATURES, "cpu", &[Bare], 1.05), logged];
        let kinds = [&PEERS[..2], &[PrefaceLog], &PEERS[2..]].concat();
        let title = format!("Short connections, {at_a_time} at a time");
        rows.push(row(&format!("short-{at_a_time}"), &title, Work::Short { at_a_time }, &kinds, targets));
    }
    rows.extend(watched());
    let targets = vec![ratio("preface / HAProxy", "memory", &[Haproxy, HaproxyTuned], 0.5)];
    rows.push(row("idle", "Idle connections", Work::Idle, &PEERS[1..], targets));
    rows.push(reload());
    // After the idle connections: the clients of these keep their descriptors.
    rows.extend(datagrams());
    rows.extend(scaling(cpus));
    rows
}

/// What it costs to be looked at: a page, a `top` and a scrape, each every second.
fn watched() -> [Row; 2] {
    let works = [
        ("pingpong-64-64", "ping-pong of 64 B, 64 connections", Work::PingPong { connections: 64, size: 64 }),
        ("short-16", "short connections, 16 at a time", Work::Short { at_a_time: 16 }),
    ];
    works.map(|(name, words, work)| {
        let against = |text, key, max| Target { of: Watched, ..ratio(text, key, &[Preface], max) };
        let targets = vec![
            against("watched / not watched: the workers", "workers", 1.02),
            against("watched / not watched: the whole process", "cpu", 1.05),
        ];
        let row = row(&format!("watched-{name}"), &format!("Watched: {words}"), work, &[Preface, Watched], targets);
        Row { times: WATCHED_TIMES, ..row }
    })
}

/// A run of these takes seconds, and each of them has its page, `top` and scrape.
const WATCHED_TIMES: u64 = 3;

/// nginx is the only peer that balances UDP, and has no header for it.
fn datagrams() -> Vec<Row> {
    let mut rows = Vec::new();
    for (name, words, kept, max) in
        [("oneway", "one way", Kept::OneWay, 0.60), ("echo", "there and back", Kept::Echo, 0.65)]
    {
        for (sessions, crowded, number) in [
            (16, false, "16 sessions"),
            (1000, false, "1,000 sessions"),
            (16, true, "16 sessions, processor shared with a busy program"),
        ] {
            let kinds = [Direct, Preface, Nginx, NginxTuned];
            rows.push(row(
                &format!("udp-{}{name}-{sessions}", if crowded { "crowded-" } else { "" }),
                &format!("UDP, datagrams of 100 B {words}, {number}"),
                Work::Datagrams { sessions, kept, crowded },
                // Without a candidate nothing shares its processor.
                &kinds[usize::from(crowded)..],
                vec![ratio("preface with a header on each / nginx with none", "cpu", NGINX, max)],
            ));
        }
    }
    rows
}

fn reload() -> Row {
    let targets = vec![
        Target { against_key: "before_p99", ..ratio("p99 during a reload / before", "during_p99", &[Preface], 1.5) },
        ratio("failed connections", "failed", &[], 0.0),
    ];
    row("reload", "New connections while reloading", Work::Reload, &[Preface, Haproxy, Nginx], targets)
}

fn scaling(cpus: usize) -> Vec<Row> {
    let works = [
        ("pingpong-16", "ping-pong of 64 B, 16 connections", Work::PingPong { connections: 16, size: 64 }),
        ("pingpong-64", "ping-pong of 64 B, 64 connections", Work::PingPong { connections: 64, size: 64 }),
        ("bulk-16", "bulk, 16 connections", Work::Bulk { connections: 16, way: Way::Down }),
    ];
    let steps: Vec<usize> = [1, 2, 4, 8, 16].into_iter().filter(|&workers| workers <= cpus).collect();
    let contestants = || steps.iter().map(|&workers| Contestant { kind: Preface, workers, scaling: true }).collect();
    let row = |(name, title, work)| Row {
        name: format!("scaling-{name}"),
        title: format!("preface with more workers: {title}"),
        work,
        contestants: contestants(),
        targets: vec![],
        times: 1,
    };
    works.map(row).into()
}

/// How much work a run is.
#[derive(Clone, Copy, Debug)]
pub struct Amounts {
    /// Of a bulk run.
    pub bytes: u64,
    /// Of a ping-pong run with many connections; with one a sixth.
    pub round_trips: u64,
    /// Of a run of short connections; one at a time half.
    pub connections: u64,
    /// Of a run with datagrams one way; there and back half.
    pub datagrams: u64,
    /// That are idle.
    pub idle: usize,
    /// How long new connections are watched before, during (after each reload), and after.
    pub phase_ms: u64,
    /// Reloads in a run.
    pub reloads: u32,
}

impl Amounts {
    /// A second or two each.
    pub const FULL: Amounts = Amounts {
        bytes: 2_000_000_000,
        round_trips: 100_000,
        connections: 15_000,
        datagrams: 400_000,
        idle: 9_500,
        phase_ms: 1500,
        reloads: 3,
    };
    /// All rows in under three minutes.
    pub const QUICK: Amounts = Amounts {
        bytes: 400_000_000,
        round_trips: 24_000,
        connections: 3_000,
        datagrams: 40_000,
        idle: 2_000,
        phase_ms: 800,
        reloads: 1,
    };
    /// To see whether it works at all.
    pub const SMOKE: Amounts = Amounts {
        bytes: 1_000_000,
        round_trips: 300,
        connections: 60,
        datagrams: 1_000,
        idle: 50,
        phase_ms: 100,
        reloads: 1,
    };
}
