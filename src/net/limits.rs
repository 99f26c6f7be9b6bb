//! What the machine grants this process: descriptors and processors.

use std::io;
use std::time::Duration;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use rustix::time::{ClockId, clock_gettime};

/// Raises the soft descriptor limit to the hard one and returns what is in force then.
pub fn raise_descriptor_limit() -> usize {
    let limit = getrlimit(Resource::Nofile);
    if limit.current != limit.maximum {
        let raised = Rlimit { current: limit.maximum, maximum: limit.maximum };
        if setrlimit(Resource::Nofile, raised).is_ok() {
            return descriptors(limit.maximum);
        }
    }
    descriptors(limit.current)
}

fn descriptors(limit: Option<u64>) -> usize {
    // "unlimited" is bounded by the kernel's fs.nr_open, whose default this is.
    limit.and_then(|limit| usize::try_from(limit).ok()).unwrap_or(1 << 20)
}

/// Local ports that the kernel gives to sockets which do not name one.
pub fn local_ports() -> usize {
    /// What Linux comes with: 32768 to 60999.
    const USUAL: usize = 28_232;
    let Ok(text) = std::fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range") else { return USUAL };
    let mut ends = text.split_whitespace().map(str::parse::<usize>);
    match (ends.next(), ends.next()) {
        (Some(Ok(first)), Some(Ok(last))) if first <= last => last - first + 1,
        _ => USUAL,
    }
}

/// Worker threads when the configuration leaves the number to us: one per processor available (the cgroup's quota and
/// the affinity mask are honoured), 16 at most.
pub fn default_workers() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from).min(WORKERS_MAX)
}

/// The processors that this process may run on, by number.
pub fn processors() -> Vec<usize> {
    let Ok(allowed) = sched_getaffinity(None) else { return Vec::new() };
    (0..CpuSet::MAX_CPU).filter(|processor| allowed.is_set(*processor)).collect()
}

/// Binds the calling thread to one processor.
pub fn pin_thread(processor: usize) -> io::Result<()> {
    let mut set = CpuSet::new();
    set.set(processor);
    Ok(sched_setaffinity(None, &set)?)
}

/// Pipes that each worker may have open: an eighth of the descriptors at most, two for each pipe.
pub fn pipes_max(descriptors: usize, workers: usize) -> usize {
    (descriptors / 16 / workers.max(1)).min(PIPES_MAX)
}

/// Bounds what slow receivers of bulk hold in the kernel: 32 MiB a worker. Beyond it bytes are copied.
const PIPES_MAX: usize = 128;

/// More workers than this bring nothing to one address's accept queue.
pub const WORKERS_MAX: usize = 16;

/// Processor time of the calling thread since it started.
pub fn thread_time() -> Duration {
    clock(ClockId::ThreadCPUTime)
}

/// Processor time of the process since it started.
pub fn process_time() -> Duration {
    clock(ClockId::ProcessCPUTime)
}

/// What `CLOCK_MONOTONIC` shows.
pub fn monotonic_time() -> Duration {
    clock(ClockId::Monotonic)
}

fn clock(id: ClockId) -> Duration {
    let time = clock_gettime(id);
    Duration::new(time.tv_sec.unsigned_abs(), time.tv_nsec as u32)
}
