//! What the kernel says: processor time of processes and of the machine, memory, and who this machine is.

use std::fs;
use std::io;
use std::process::Command;
use std::time::Instant;

use rustix::process::Pid;
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

/// Ticks a second in /proc/stat, on every Linux.
const TICKS_PER_SECOND: f64 = 100.0;

/// The processors this process may use.
pub fn cpus() -> Vec<usize> {
    let set = sched_getaffinity(None).unwrap_or_else(|_| CpuSet::new());
    let found: Vec<usize> = (0..CpuSet::MAX_CPU).filter(|&cpu| set.is_set(cpu)).collect();
    if found.is_empty() { vec![0] } else { found }
}

/// Keeps the calling thread, and what it starts from now on, to these processors.
pub fn pin(cpus: &[usize]) {
    let mut set = CpuSet::new();
    cpus.iter().for_each(|&cpu| set.set(cpu));
    // Where it is not allowed the figures are noisier, and nothing else.
    let _ = sched_setaffinity(None, &set);
}

/// Whose processor time is measured.
pub struct Gauge {
    /// All processes of the candidate; none for the direct run.
    pub pids: Vec<u32>,
}

/// A measurement under way.
pub struct Meter<'a> {
    gauge: &'a Gauge,
    begun: Instant,
    candidate: u64,
    workers: u64,
    own: u64,
    machine: f64,
}

/// What a run used.
#[derive(Clone, Copy, Debug, Default)]
pub struct Usage {
    /// Seconds from its start to its end.
    pub wall: f64,
    /// CPU seconds of the candidate, all threads.
    pub candidate: f64,
    /// Of these, what its threads named "worker-" used: those of preface that carry traffic.
    pub workers: f64,
    /// CPU seconds of generator and backend.
    pub own: f64,
    /// CPU seconds of the whole machine, in steps of 10 ms.
    pub machine: f64,
}

impl Gauge {
    /// Begins to measure.
    pub fn start(&self) -> io::Result<Meter<'_>> {
        let (candidate, workers) = (self.nanoseconds()?, self.worker_nanoseconds()?);
        let (own, machine) = (run_time(std::process::id())?, machine_seconds()?);
        Ok(Meter { gauge: self, begun: Instant::now(), candidate, workers, own, machine })
    }

    fn nanoseconds(&self) -> io::Result<u64> {
        self.pids.iter().map(|&pid| run_time(pid)).sum()
    }

    fn worker_nanoseconds(&self) -> io::Result<u64> {
        Ok(self.threads("worker-")?.iter().sum())
    }

    /// Proportional memory of user space, in KiB.
    pub fn memory_kib(&self) -> io::Result<f64> {
        let mut sum = 0.0;
        for pid in &self.pids {
            let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
            let line = text.lines().find_map(|line| line.strip_prefix("Pss:"));
            let number = line.and_then(|line| line.split_whitespace().next()).and_then(|number| number.parse().ok());
            sum += number.unwrap_or(0.0);
        }
        Ok(sum)
    }

    /// Run time of each thread whose name begins so, in nanoseconds.
    pub fn threads(&self, name: &str) -> io::Result<Vec<u64>> {
        let mut found = Vec::new();
        for pid in &self.pids {
            for task in fs::read_dir(format!("/proc/{pid}/task"))? {
                let task = task?.path();
                if fs::read_to_string(task.join("comm"))?.starts_with(name) {
                    found.push(first_number(&fs::read_to_string(task.join("schedstat"))?));
                }
            }
        }
        Ok(found)
    }
}

impl Meter<'_> {
    /// What was used since the start.
    pub fn stop(self) -> io::Result<Usage> {
        let wall = self.begun.elapsed().as_secs_f64();
        let seconds = |now: u64, then: u64| now.saturating_sub(then) as f64 / 1e9;
        Ok(Usage {
            wall,
            candidate: seconds(self.gauge.nanoseconds()?, self.candidate),
            workers: seconds(self.gauge.worker_nanoseconds()?, self.workers),
            own: seconds(run_time(std::process::id())?, self.own),
            machine: machine_seconds()? - self.machine,
        })
    }
}

/// All threads of a process.
fn run_time(pid: u32) -> io::Result<u64> {
    let mut sum = 0;
    for task in fs::read_dir(format!("/proc/{pid}/task"))? {
        // A thread may end between the two calls.
        let text = fs::read_to_string(task?.path().join("schedstat")).unwrap_or_default();
        sum += first_number(&text);
    }
    Ok(sum)
}

fn first_number(text: &str) -> u64 {
    text.split_whitespace().next().and_then(|number| number.parse().ok()).unwrap_or(0)
}

/// Everything but idle and waiting for disks: also what is hidden in kernel threads and interrupts.
fn machine_seconds() -> io::Result<f64> {
    let text = fs::read_to_string("/proc/stat")?;
    let fields = text.lines().next().unwrap_or("").split_whitespace().skip(1);
    let ticks: Vec<f64> = fields.map(|field| field.parse().unwrap_or(0.0)).collect();
    // user nice system idle iowait irq softirq; steal is another machine's.
    let busy: f64 = [0, 1, 2, 5, 6].iter().filter_map(|&at| ticks.get(at)).sum();
    Ok(busy / TICKS_PER_SECOND)
}

/// The processes of a group.
pub fn members(group: Pid) -> Vec<u32> {
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    let pids = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<u32>().ok());
    let of_group = |pid: &u32| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        // After the name in parentheses: state, parent, group.
        let mut after = stat.rsplit_once(')').map_or("", |(_, after)| after).split_whitespace();
        // One that has ended, and is only not waited for yet by a slow init, is none any more.
        !matches!(after.next(), None | Some("Z" | "X")) && after.nth(1) == Some(&group.as_raw_nonzero().to_string())
    };
    pids.filter(of_group).collect()
}

/// Where the figures come from.
#[derive(Clone, Debug, Default)]
pub struct Machine {
    /// Model of the processor.
    pub cpu: String,
    /// Processors that may be used.
    pub cpus: usize,
    /// Release of the kernel.
    pub kernel: String,
    /// Distribution.
    pub system: String,
}

/// This one; to be asked before a thread is pinned.
pub fn machine() -> Machine {
    let line = |path: &str, key: &str, separator: &str| {
        let text = fs::read_to_string(path).unwrap_or_default();
        let found = text.lines().find_map(|line| line.strip_prefix(key)?.split_once(separator).map(|(_, value)| value));
        found.unwrap_or("?").trim().trim_matches('"').to_owned()
    };
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim().to_owned();
    Machine {
        cpu: line("/proc/cpuinfo", "model name", ":"),
        cpus: cpus().len(),
        kernel,
        system: line("/etc/os-release", "PRETTY_NAME", "="),
    }
}

/// What a program says about its version: the first thing in its output that looks like one.
pub fn version(program: &std::path::Path, argument: &str) -> Option<String> {
    let output = Command::new(program).arg(argument).output().ok()?;
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&text).into_owned();
    let parts = text.split(|char: char| char.is_whitespace() || char == '/');
    let mut numbers = parts.filter(|part| part.contains('.') && part.starts_with(|char: char| char.is_ascii_digit()));
    numbers.next().map(|number| number.trim_end_matches(',').to_owned())
}

/// A value below which this share of all lies; sorts them.
pub fn quantile(values: &mut [u64], share: f64) -> f64 {
    if values.is_empty() {
        return f64::NAN;
    }
    values.sort_unstable();
    let index = (values.len() as f64 * share).ceil() as usize;
    values[index.clamp(1, values.len()) - 1] as f64
}
