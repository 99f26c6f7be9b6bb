//! What the machine grants this process: descriptors and processors.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

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

/// More workers than this bring nothing to one address's accept queue.
pub const WORKERS_MAX: usize = 16;
