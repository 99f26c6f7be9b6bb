//! What `/livez` and `/readyz` answer from: atomics that the control loop and the workers set, readable even while they
//! are stuck.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// The control loop and every worker must have given a sign of life within this long.
pub const LIVE_WITHIN: Duration = Duration::from_secs(10);

/// A worker that has ended in good order gives no more signs, and none are missed.
const ENDED: u64 = u64::MAX;

/// Shared by the control loop, the workers and the admin server.
#[derive(Debug)]
pub struct Probes {
    /// Signs of life are milliseconds since this.
    start: Instant,
    configured: AtomicBool,
    listening: AtomicBool,
    stopping: AtomicBool,
    control_turned_ms: AtomicU64,
    workers_answered_ms: Vec<AtomicU64>,
}

impl Probes {
    /// Nothing is ready; the control loop and all workers count as alive now.
    pub fn new(workers: usize, now: Instant) -> Probes {
        Probes {
            start: now,
            configured: AtomicBool::new(false),
            listening: AtomicBool::new(false),
            stopping: AtomicBool::new(false),
            control_turned_ms: AtomicU64::new(0),
            workers_answered_ms: (0..workers).map(|_| AtomicU64::new(0)).collect(),
        }
    }

    /// A configuration is in force.
    pub fn set_configured(&self) {
        self.configured.store(true, Ordering::Release);
    }

    /// Every listener is bound. A refused reload changes nothing about that.
    pub fn set_listening(&self) {
        self.listening.store(true, Ordering::Release);
    }

    /// A stop signal came: not ready from now on.
    pub fn set_stopping(&self) {
        self.stopping.store(true, Ordering::Release);
    }

    /// The control loop turned.
    pub fn control_turned(&self, now: Instant) {
        self.control_turned_ms.store(self.since_start(now), Ordering::Relaxed);
    }

    /// The worker of that number looked into its inbox.
    pub fn worker_answered(&self, worker: usize, now: Instant) {
        self.workers_answered_ms[worker].store(self.since_start(now), Ordering::Relaxed);
    }

    /// The worker of that number has ended because it was told to.
    pub fn worker_ended(&self, worker: usize) {
        self.workers_answered_ms[worker].store(ENDED, Ordering::Relaxed);
    }

    /// Does everything turn? If not, what doesn't.
    pub fn live(&self, now: Instant) -> Result<(), String> {
        let now_ms = self.since_start(now);
        let silent = |what: &str, sign: &AtomicU64| {
            let silence = Duration::from_millis(now_ms.saturating_sub(sign.load(Ordering::Relaxed)));
            (silence > LIVE_WITHIN).then(|| format!("{what} has been silent for {} s", silence.as_secs()))
        };
        let control = silent("the control loop", &self.control_turned_ms);
        let workers = self.workers_answered_ms.iter().enumerate();
        let problems: Vec<String> =
            control.into_iter().chain(workers.filter_map(|(n, sign)| silent(&format!("worker {n}"), sign))).collect();
        if problems.is_empty() { Ok(()) } else { Err(problems.join("; ")) }
    }

    /// May a load balancer in front send connections? If not, why not. Never asks about upstreams: all balancers of a
    /// deployment would leave together.
    pub fn ready(&self) -> Result<(), &'static str> {
        if self.stopping.load(Ordering::Acquire) {
            Err("stopping")
        } else if !self.configured.load(Ordering::Acquire) {
            Err("no configuration is loaded yet")
        } else if !self.listening.load(Ordering::Acquire) {
            Err("not every listener is bound yet")
        } else {
            Ok(())
        }
    }

    fn since_start(&self, now: Instant) -> u64 {
        now.saturating_duration_since(self.start).as_millis() as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_ready_between_bound_and_stopping() {
        let probes = Probes::new(1, Instant::now());
        assert_eq!(probes.ready(), Err("no configuration is loaded yet"));
        probes.set_configured();
        assert_eq!(probes.ready(), Err("not every listener is bound yet"));
        probes.set_listening();
        assert_eq!(probes.ready(), Ok(()));
        probes.set_stopping();
        assert_eq!(probes.ready(), Err("stopping"));
    }

    #[test]
    fn is_live_while_everyone_gives_signs() {
        let start = Instant::now();
        let after = |seconds| start + Duration::from_secs(seconds);
        let probes = Probes::new(2, start);
        assert_eq!(probes.live(after(10)), Ok(()));
        assert_eq!(
            probes.live(after(11)),
            Err("the control loop has been silent for 11 s; worker 0 has been silent for 11 s; \
                 worker 1 has been silent for 11 s"
                .to_owned())
        );
        probes.control_turned(after(20));
        probes.worker_answered(0, after(20));
        assert_eq!(probes.live(after(25)), Err("worker 1 has been silent for 25 s".to_owned()));
        probes.worker_ended(1);
        assert_eq!(probes.live(after(30)), Ok(()));
        probes.control_turned(after(3600));
        probes.worker_answered(0, after(3600));
        assert_eq!(probes.live(after(3600)), Ok(()), "a worker that ended is never missed");
    }
}
