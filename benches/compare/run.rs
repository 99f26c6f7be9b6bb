//! Runs rows: starts the candidates of a row, lets them work in turn, and gathers the samples.

use std::collections::BTreeMap;
use std::io::{self, IsTerminal};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::backend::Backend;
use super::datagrams::{Exchange, Exchanged, Kept, Plan};
use super::load::{Ended, Generator, Latencies, Order};
use super::measure::{self, Gauge, Usage, quantile};
use super::peers::{Kind, Running, Setup};
use super::rows::{Amounts, Contestant, Row, Work};
use super::wire::{AddressBook, Request};

/// Figures of one run, by the keys of the row's metrics.
pub type Sample = BTreeMap<&'static str, f64>;

/// How long a candidate may take until it serves.
const START_MAX: Duration = Duration::from_secs(20);
/// Connections a second while reloading.
const STEADY_PER_SECOND: u32 = 1000;
/// Idle connections that are open before memory is looked at for the first time.
const IDLE_WARM: usize = 200;

/// What a candidate did in a row.
#[derive(Clone, Debug)]
pub struct Entry {
    /// Who.
    pub contestant: Contestant,
    /// One for each repetition that went well.
    pub samples: Vec<Sample>,
    /// Why it took no further part.
    pub failure: Option<String>,
}

/// A row that was run.
#[derive(Clone, Debug)]
pub struct Result {
    /// What was asked for.
    pub row: Row,
    /// In the row's order.
    pub entries: Vec<Entry>,
}

/// Generator and backend, and where candidates run.
pub struct Arena {
    generator: Generator,
    backend: Backend,
    exchange: Exchange,
    setup: Setup,
    cpus: Vec<usize>,
    amounts: Amounts,
}

impl Arena {
    /// One processor for the candidates, the next for the generator, and, if there is one, a third for the backend.
    pub fn new(mut setup: Setup, amounts: Amounts) -> io::Result<Arena> {
        let cpus = measure::cpus();
        let book = Arc::new(AddressBook::default());
        let backend = Backend::start(Arc::clone(&book), vec![cpus[2.min(cpus.len() - 1)]])?;
        measure::pin(&[cpus[1.min(cpus.len() - 1)]]);
        setup.upstream = backend.address;
        Ok(Arena { generator: Generator::new(book), backend, exchange: Exchange::new()?, setup, cpus, amounts })
    }

    /// Runs a row; says on standard error how far it has come.
    pub fn run(&mut self, row: &Row, repetitions: usize) -> Result {
        let begun = Instant::now();
        let entry = |&contestant: &Contestant| Entry { contestant, samples: vec![], failure: None };
        let mut entries: Vec<Entry> = row.contestants.iter().map(entry).collect();
        // Memory is that of a fresh process, and workers take processors from each other: those run one by one.
        let together = !matches!(row.work, Work::Idle | Work::Reload) && !row.contestants[0].scaling;
        let mut running: Vec<Option<Running>> = entries.iter().map(|_| None).collect();
        for repetition in 0..repetitions {
            // Another one is first each time: whatever drifts over a row hits all alike.
            for turn in 0..entries.len() {
                let index = (turn + repetition) % entries.len();
                let entry = &mut entries[index];
                if entry.failure.is_some() {
                    continue;
                }
                progress(
                    &format!("{}: {}/{repetitions} {}", row.name, repetition + 1, entry.contestant.label()),
                    false,
                );
                match self.turn(row, entry.contestant, &mut running[index]) {
                    Ok(sample) => entry.samples.push(sample),
                    Err(failure) => {
                        progress(&format!("{}: {} FAILED: {failure}", row.name, entry.contestant.label()), true);
                        entry.failure = Some(failure);
                        running[index] = None;
                    }
                }
                if !together {
                    running[index] = None;
                }
            }
        }
        progress(&format!("{}: done in {:.1} s", row.name, begun.elapsed().as_secs_f64()), true);
        Result { row: row.clone(), entries }
    }

    /// One run of one candidate, started first if it isn't running.
    fn turn(
        &mut self,
        row: &Row,
        contestant: Contestant,
        slot: &mut Option<Running>,
    ) -> std::result::Result<Sample, String> {
        let work = row.work;
        let running = match slot {
            Some(running) => running,
            None => {
                self.setup.cpus = match contestant {
                    Contestant { scaling: true, workers, .. } => self.cpus[..workers.min(self.cpus.len())].to_vec(),
                    _ => vec![self.cpus[0]],
                };
                self.setup.workers = contestant.workers;
                self.setup.reloads = work == Work::Reload;
                self.setup.datagrams = matches!(work, Work::Datagrams { .. });
                self.setup.upstream = if self.setup.datagrams { self.exchange.address } else { self.backend.address };
                let running = slot.insert(Running::start(contestant.kind, &self.setup)?);
                self.await_service(work, running)?;
                running
            }
        };
        self.backend.expect(contestant.kind.header(), running.target.port());
        let outcome = self.sample(work, row.times, running);
        self.backend.hang_up();
        let faults = self.backend.faults();
        match (outcome, running.ended()) {
            (_, Some(ended)) => Err(ended),
            _ if !faults.is_empty() => Err(faults.join("; ")),
            (Err(error), None) => Err(error.to_string()),
            (Ok(_), None) if running.watched() == Some(0) => Err("nobody watches it".to_owned()),
            (Ok(sample), None) => Ok(sample),
        }
    }

    fn await_service(&mut self, work: Work, running: &mut Running) -> std::result::Result<(), String> {
        self.backend.expect(running.kind.header(), running.target.port());
        let end = Instant::now() + START_MAX;
        let nobody = Gauge { pids: vec![] };
        loop {
            let outcome = match plan(work, running) {
                Some(plan) => self.exchange.probe(&Plan { sessions: 1, ..plan }),
                None => self.generator.short(running.target, 1, 1, &nobody).map(drop),
            };
            if let Some(ended) = running.ended() {
                return Err(ended);
            }
            let faults = self.backend.faults();
            match outcome {
                _ if !faults.is_empty() => return Err(faults.join("; ")),
                Ok(()) => return Ok(()),
                Err(error) if self.setup.datagrams && error.kind() != io::ErrorKind::TimedOut => {
                    return Err(error.to_string());
                }
                Err(error) if Instant::now() > end => return Err(format!("does not serve: {error}")),
                // SLEEP: it is starting, and nothing is being measured.
                Err(_) => std::thread::sleep(Duration::from_millis(10)),
            }
        }
    }

    fn sample(&mut self, work: Work, times: u64, running: &mut Running) -> io::Result<Sample> {
        let Amounts { bytes, round_trips, connections: count, .. } = self.amounts;
        let (round_trips, count) = (round_trips * times, count * times);
        let (target, gauge) = (running.target, running.gauge());
        if let Some(plan) = plan(work, running) {
            let _busy = work.is_crowded().then(|| Busy::start(self.cpus[0]));
            return self.datagrams(&plan, &gauge);
        }
        let served = self.backend.served();
        let workers = if running.kind == Kind::Preface { gauge.threads("worker-")? } else { vec![] };
        let (mut sample, connections) = match work {
            Work::Bulk { connections, way } => {
                let usage = self.generator.bulk(target, connections, way, bytes, &gauge)?;
                (of_usage(&usage, bytes as f64 / 1e9, 1.0, &gauge), connections as u64)
            }
            Work::PingPong { connections, size } => {
                let total = if connections == 1 { round_trips / 6 } else { round_trips };
                let total = total - total % connections as u64;
                let (usage, latencies) = self.generator.ping_pong(target, connections, size, total, &gauge)?;
                let sample = of_usage(&usage, total as f64 / 1e5, 100.0, &gauge);
                (with_latencies(sample, latencies), connections as u64)
            }
            Work::Short { at_a_time } => {
                let total = if at_a_time == 1 { count / 2 } else { count };
                let (usage, latencies) = self.generator.short(target, at_a_time, total, &gauge)?;
                let sample = of_usage(&usage, total as f64 / 1e4, 10.0, &gauge);
                (with_latencies(sample, latencies), total)
            }
            Work::Datagrams { .. } => unreachable!("they have no connections"),
            Work::Idle => return self.idle(running, &gauge),
            Work::Reload => return self.reload(running),
        };
        if self.backend.served() - served != connections {
            return Err(io::Error::other("the backend did not see every connection"));
        }
        let now = if workers.len() > 1 { gauge.threads("worker-")? } else { vec![] };
        let shares: Vec<u64> = now.iter().zip(&workers).map(|(now, then)| now - then).collect();
        if let (Some(&most), Some(&least)) = (shares.iter().max(), shares.iter().min()) {
            sample.insert("spread", most as f64 / least.max(1) as f64);
        }
        Ok(sample)
    }

    fn datagrams(&mut self, plan: &Plan, gauge: &Gauge) -> io::Result<Sample> {
        let count = self.amounts.datagrams / if plan.kept == Kept::Echo { 2 } else { 1 };
        let Exchanged { usage, arrived, lost } = self.exchange.run(plan, count, gauge)?;
        let mut sample = of_usage(&usage, arrived as f64 / 1e5, 100.0, gauge);
        sample.insert("lost", lost as f64);
        Ok(sample)
    }

    fn idle(&mut self, running: &Running, gauge: &Gauge) -> io::Result<Sample> {
        // Two descriptors each, here as in the candidate, which needs some for everything else, too.
        let open = std::fs::read_dir("/proc/self/fd")?.count();
        let room = preface::net::limits::raise_descriptor_limit().saturating_sub(open.max(600)) / 2;
        let count = self.amounts.idle.min(room.saturating_sub(IDLE_WARM));
        let warm = self.generator.open(running.target, IDLE_WARM, Request::Echo)?;
        let before = gauge.memory_kib()?;
        let clients = self.generator.open(running.target, count, Request::Echo)?;
        let after = gauge.memory_kib()?;
        self.backend.hang_up();
        drop((warm, clients));
        Ok(Sample::from([("memory", (after - before) / count as f64), ("connections", count as f64)]))
    }

    fn reload(&mut self, running: &mut Running) -> io::Result<Sample> {
        let phase = Duration::from_millis(self.amounts.phase_ms);
        let (target, reloads) = (running.target, self.amounts.reloads);
        let running = std::cell::RefCell::new(running);
        let mut orders: Vec<Order> = Vec::new();
        for number in 1..=reloads {
            orders.push((phase * number, Box::new(|| running.borrow_mut().reload())));
        }
        let end = phase * (reloads + 2);
        let ended = self.generator.steady(target, STEADY_PER_SECOND, end, orders)?;
        let mut sample = Sample::from([("failed", ended.iter().filter(|one| one.outcome.is_err()).count() as f64)]);
        let within = |from: Duration, to: Duration| -> Latencies {
            let meant = |one: &&Ended| (from..to).contains(&one.begun);
            let latency = |one: &Ended| Some(one.outcome.as_ref().ok()?.as_nanos() as u64);
            ended.iter().filter(meant).filter_map(latency).collect()
        };
        let after = phase * (reloads + 1);
        let phases = [
            (["before_p50", "before_p99", "before_p999"], within(Duration::ZERO, phase)),
            (["during_p50", "during_p99", "during_p999"], within(phase, after)),
            (["after_p50", "after_p99", "after_p999"], within(after, end)),
        ];
        for (keys, mut latencies) in phases {
            for (key, share) in keys.into_iter().zip([0.5, 0.99, 0.999]) {
                sample.insert(key, quantile(&mut latencies, share) / 1e3);
            }
        }
        Ok(sample)
    }
}

/// A program that wants a processor all the time, until it is dropped.
struct Busy {
    ends: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Busy {
    fn start(cpu: usize) -> Busy {
        let ends = Arc::new(AtomicBool::new(false));
        let seen = Arc::clone(&ends);
        let thread = std::thread::spawn(move || {
            measure::pin(&[cpu]);
            while !seen.load(Relaxed) {
                std::hint::spin_loop();
            }
        });
        Busy { ends, thread: Some(thread) }
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.ends.store(true, Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// What is done with datagrams, if it is with these.
fn plan(work: Work, running: &Running) -> Option<Plan> {
    let Work::Datagrams { sessions, kept, .. } = work else { return None };
    Some(Plan { target: running.target, sessions, kept, header: work.header(running.kind) })
}

/// On a terminal each line takes the place of the one before, unless that one is to stay.
fn progress(line: &str, stays: bool) {
    match (io::stderr().is_terminal(), stays) {
        (true, false) => eprint!("\r\x1b[K{line}"),
        (true, true) => eprintln!("\r\x1b[K{line}"),
        (false, true) => eprintln!("{line}"),
        (false, false) => {}
    }
}

/// `units` of work were done; a unit is `rate_unit` of what the rate counts.
fn of_usage(usage: &Usage, units: f64, rate_unit: f64, gauge: &Gauge) -> Sample {
    let mut sample = Sample::from([
        ("machine", usage.machine / units),
        ("rate", units * rate_unit / usage.wall),
        ("generator", usage.own / usage.wall),
        ("wall", usage.wall),
    ]);
    // The direct run has no candidate.
    if !gauge.pids.is_empty() {
        sample.extend([("cpu", usage.candidate / units), ("busy", usage.candidate / usage.wall)]);
    }
    if usage.workers > 0.0 {
        sample.insert("workers", usage.workers / units);
    }
    sample
}

fn with_latencies(mut sample: Sample, mut latencies: Latencies) -> Sample {
    sample.extend([
        ("p50", quantile(&mut latencies, 0.5) / 1e3),
        ("p99", quantile(&mut latencies, 0.99) / 1e3),
        ("p999", quantile(&mut latencies, 0.999) / 1e3),
    ]);
    sample
}
