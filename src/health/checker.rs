//! The task that checks one upstream again and again, and what the control thread holds of it. Runs on the control
//! thread; reports go through `control::Handle`, and nothing that the control thread calls here ever waits.

use std::net::IpAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime};

use tokio::sync::Notify;
use tokio::task::AbortHandle;

use super::probe::{self, Attempt, Outcome};
use super::state::{State, Verdict};
use crate::address::Address;
use crate::config::{CheckHeader, HeaderFormat, HealthCheck, Probe};
use crate::control;
use crate::metrics::latency::Buckets;
use crate::pool::{Health, Observation, UpstreamKey};

/// What is checked and how. Equal targets need no new checker after a reload.
#[derive(Clone, Debug, PartialEq)]
pub struct Target {
    /// The upstream; `check.port` may put the check on another port.
    pub key: UpstreamKey,
    /// The pool's `health_check`.
    pub check: HealthCheck,
    /// The header of this upstream's traffic, for `proxy_protocol = "same"`.
    pub header: Option<HeaderFormat>,
    /// The pool's `source` addresses; those of the upstream's family are used in turn.
    pub source: Vec<IpAddr>,
}

/// Checks one upstream from `start` until it is dropped; a check that is under way is given up then.
///
/// The last observation it reported is always what it believes: so after an `eject`, and after any report that crossed
/// it on the way, both sides agree.
#[derive(Debug)]
pub struct Checker {
    target: Target,
    handle: control::Handle,
    shared: Arc<Shared>,
    task: AbortHandle,
}

/// Counts and the latest result of one checker, for `/status` and `/metrics`. They outlive changes of the check.
#[derive(Debug, Default)]
pub struct CheckStats {
    passed: AtomicU64,
    failed: AtomicU64,
    void: AtomicU64,
    last: Mutex<Option<LastCheck>>,
    /// Since they were last taken.
    durations: Mutex<Buckets>,
}

/// The latest check that came to an end.
#[derive(Clone, Debug, serde::Serialize)]
pub struct LastCheck {
    /// When it ended: RFC 3339, UTC.
    pub time: String,
    /// passed, failed or void.
    pub outcome: Verdict,
    /// "connected in 1.2 ms", "connection refused", "status 503, expected 200-399" ...
    pub reason: String,
    /// From its start to its verdict.
    pub duration_ms: f64,
}

/// What the task and its `Checker` both reach.
#[derive(Debug)]
struct Shared {
    stats: Arc<CheckStats>,
    state: Mutex<State>,
    /// The reason of an ejection that the task has yet to report.
    ejection: Mutex<Option<String>>,
    ejected: Notify,
}

impl Checker {
    /// Starts checking an upstream whose health is not known; the first check runs at once. Within a tokio runtime.
    pub fn start(target: Target, handle: control::Handle) -> Checker {
        let shared = Arc::new(Shared {
            stats: Arc::default(),
            state: Mutex::new(State::new(Health::Unknown)),
            ejection: Mutex::new(None),
            ejected: Notify::new(),
        });
        let task = spawn(&target, &handle, &shared);
        Checker { target, handle, shared, task }
    }

    /// Goes on with another check of the same upstream, at once: its health stays what it is until the new check's
    /// thresholds say otherwise. Does nothing if the target is the same.
    pub fn retarget(&mut self, target: Target) {
        if target == self.target {
            return;
        }
        assert_eq!(target.key, self.target.key, "a checker belongs to one upstream");
        self.task.abort();
        let health = self.health();
        *self.shared.state.lock().expect(NO_PANIC) = State::new(health);
        self.task = spawn(&target, &self.handle, &self.shared);
        self.target = target;
    }

    /// What it checks.
    pub fn target(&self) -> &Target {
        &self.target
    }

    /// What the checks made of the upstream so far.
    pub fn health(&self) -> Health {
        self.shared.state.lock().expect(NO_PANIC).health()
    }

    /// Counts and the latest result; readable also after the checker is gone.
    pub fn stats(&self) -> Arc<CheckStats> {
        self.shared.stats.clone()
    }

    /// Takes the upstream out because connects of the traffic failed: it is unhealthy for this reason until
    /// `healthy_threshold` checks passed. The checker reports that like any change, drops a check that is under way
    /// and checks anew at once. An upstream that is unhealthy already stays as it is.
    pub fn eject(&self, reason: String) {
        if self.health() == Health::Unhealthy {
            return;
        }
        *self.shared.ejection.lock().expect(NO_PANIC) = Some(reason);
        self.shared.ejected.notify_one();
    }
}

impl Drop for Checker {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl CheckStats {
    /// Checks that passed.
    pub fn passed(&self) -> u64 {
        self.passed.load(Ordering::Relaxed)
    }

    /// Checks that failed.
    pub fn failed(&self) -> u64 {
        self.failed.load(Ordering::Relaxed)
    }

    /// Checks that say nothing about the upstream.
    pub fn void(&self) -> u64 {
        self.void.load(Ordering::Relaxed)
    }

    /// The latest result; `None` before the first.
    pub fn last(&self) -> Option<LastCheck> {
        self.last.lock().expect(NO_PANIC).clone()
    }

    /// How long checks took that say something, since the last call.
    pub fn take_durations(&self) -> Buckets {
        std::mem::take(&mut *self.durations.lock().expect(NO_PANIC))
    }

    fn record(&self, outcome: &Outcome, duration: Duration) {
        let counter = match outcome.verdict {
            Verdict::Passed => &self.passed,
            Verdict::Failed => &self.failed,
            Verdict::Void => &self.void,
        };
        counter.fetch_add(1, Ordering::Relaxed);
        if outcome.verdict != Verdict::Void {
            self.durations.lock().expect(NO_PANIC).record(duration);
        }
        *self.last.lock().expect(NO_PANIC) = Some(LastCheck {
            time: humantime::format_rfc3339_millis(SystemTime::now()).to_string(),
            outcome: outcome.verdict,
            reason: outcome.reason.clone(),
            duration_ms: duration.as_secs_f64() * 1000.0,
        });
    }
}

const NO_PANIC: &str = "no holder of this lock panics";

fn spawn(target: &Target, handle: &control::Handle, shared: &Arc<Shared>) -> AbortHandle {
    tokio::spawn(run(target.clone(), handle.clone(), shared.clone())).abort_handle()
}

/// Checks until the control thread is gone.
async fn run(target: Target, handle: control::Handle, shared: Arc<Shared>) {
    let mut reported = None;
    for turn in 0.. {
        let attempt = attempt(&target, turn);
        let started = Instant::now();
        let outcome = tokio::select! {
            biased;
            () = shared.ejected.notified() => None,
            outcome = probe::run(&attempt, &target.check) => Some(outcome),
        };
        let (change, next) = match outcome {
            Some(outcome) => shared.take_in(outcome, &target, started, Instant::now()),
            None => (shared.take_ejection(), started),
        };
        // A report of the task before may have been lost with it: the first one says what stands, changed or not.
        let stands = || Some(shared.state.lock().expect(NO_PANIC).health()).filter(|health| *health != Health::Unknown);
        let first = || stands().filter(|_| turn == 0).map(|health| (health, "as it was before the reload".to_owned()));
        if let Some(change) = change.or_else(first).filter(|change| reported.as_ref() != Some(change)) {
            reported = Some(change.clone());
            let (health, reason) = change;
            let observation = Observation { key: target.key.clone(), health, reason };
            if handle.observed(vec![observation]).await.is_err() {
                return;
            }
        }
        shared.wait_until(next).await;
    }
}

/// The `turn`-th check of a target.
fn attempt(target: &Target, turn: usize) -> Attempt {
    let mut to = target.key.address.clone();
    let mut sources: Vec<IpAddr> = Vec::new();
    if let Address::Ip(to) = &mut to {
        to.set_port(target.check.port.unwrap_or(to.port()));
        sources.extend(target.source.iter().filter(|source| source.is_ipv4() == to.is_ipv4()));
    }
    let is_udp = matches!(target.check.probe, Probe::Udp { .. });
    let header = match target.check.proxy_protocol {
        // No connection begins with spp: what answers TCP on that port expects none.
        CheckHeader::Same if !is_udp && target.header == Some(HeaderFormat::Spp) => None,
        CheckHeader::Same => target.header,
        CheckHeader::Off => None,
        CheckHeader::Format(format) => Some(format),
    };
    Attempt {
        to,
        source: (!sources.is_empty()).then(|| sources[turn % sources.len()]),
        header,
        command: target.check.proxy_command,
        timeout: target.check.timeout,
    }
}

/// A new health and its reason, or a new reason of the same one.
type Change = (Health, String);

impl Shared {
    /// Counts a result, and says what it changed and when the next check is due. Each failed check of an unhealthy
    /// upstream says why it still is: the first one's reason may be mended long since.
    fn take_in(
        &self,
        outcome: Outcome,
        target: &Target,
        started: Instant,
        ended: Instant,
    ) -> (Option<Change>, Instant) {
        self.stats.record(&outcome, ended - started);
        tracing::debug!(
            event = "health_check",
            pool = target.key.pool,
            upstream = %target.key.address,
            outcome = outcome.verdict.as_str(),
            reason = outcome.reason
        );
        let mut state = self.state.lock().expect(NO_PANIC);
        let change = state.record(outcome.verdict, &target.check);
        let still = (outcome.verdict == Verdict::Failed).then(|| state.health());
        let told = change.or(still.filter(|health| *health == Health::Unhealthy));
        let next = state.next_check(&target.check, started, ended, fastrand::f64());
        (told.map(|health| (health, outcome.reason)), next)
    }

    /// Sets the state that an ejection asked for.
    fn take_ejection(&self) -> Option<Change> {
        let reason = self.ejection.lock().expect(NO_PANIC).take()?;
        self.state.lock().expect(NO_PANIC).eject();
        Some((Health::Unhealthy, reason))
    }

    /// Waits for the time of the next check, or for a reason to check at once.
    async fn wait_until(&self, next: Instant) {
        tokio::select! {
            () = tokio::time::sleep_until(next.into()) => {}
            () = self.ejected.notified() => self.ejected.notify_one(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::CheckCommand;
    use crate::control::Command;
    use std::sync::atomic::AtomicU16;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;
    use tokio::sync::mpsc;

    const HOUR: Duration = Duration::from_secs(3600);

    /// Answers every request with the status that is set, 0: not at all. Each connection is told to `accepted`.
    struct Upstream {
        target: Target,
        status: Arc<AtomicU16>,
        accepted: mpsc::UnboundedReceiver<()>,
    }

    async fn upstream(interval: Duration) -> Upstream {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (accept, accepted) = mpsc::unbounded_channel();
        let status = Arc::new(AtomicU16::new(200));
        let answered = status.clone();
        tokio::spawn(async move {
            let mut silent = Vec::new();
            loop {
                let (mut stream, _) = listener.accept().await.unwrap();
                let _ = accept.send(());
                let status = answered.load(Ordering::Relaxed);
                if status == 0 {
                    silent.push(stream);
                    continue;
                }
                let _ = stream.read(&mut [0; 1024]).await;
                let _ = stream.write_all(format!("HTTP/1.1 {status} X\r\n\r\n").as_bytes()).await;
            }
        });
        let probe = Probe::Http { path: "/".into(), host: None, expect_status: vec![(200, 399)] };
        let check = HealthCheck {
            probe,
            interval,
            timeout: HOUR,
            healthy_threshold: 2,
            unhealthy_threshold: 2,
            port: None,
            proxy_protocol: CheckHeader::Same,
            proxy_command: CheckCommand::Local,
        };
        let key = UpstreamKey { pool: "web".into(), address: address.into() };
        Upstream { target: Target { key, check, header: None, source: vec![] }, status, accepted }
    }

    async fn observed(commands: &mut mpsc::Receiver<Command>) -> (Health, String) {
        match commands.recv().await {
            Some(Command::Observed(mut observations)) if observations.len() == 1 => {
                let Observation { health, reason, .. } = observations.remove(0);
                (health, reason)
            }
            other => panic!("{other:?}"),
        }
    }

    async fn until(done: impl Fn() -> bool) {
        while !done() {
            tokio::task::yield_now().await;
        }
    }

    #[tokio::test]
    async fn reports_each_change_once_and_counts_every_check() {
        let upstream = upstream(Duration::from_millis(5)).await;
        let (handle, mut commands) = control::channel();
        let checker = Checker::start(upstream.target, handle);
        let (health, reason) = observed(&mut commands).await;
        assert_eq!(health, Health::Healthy);
        assert!(reason.starts_with("status 200 in "), "{reason}");
        let stats = checker.stats();
        until(|| stats.passed() >= 5).await;
        assert!(commands.is_empty(), "only changes are reported");
        upstream.status.store(503, Ordering::Relaxed);
        assert_eq!(observed(&mut commands).await, (Health::Unhealthy, "status 503, expected 200-399".into()));
        assert_eq!(checker.health(), Health::Unhealthy);
        assert_eq!(stats.failed(), 2, "the threshold");
        let last = stats.last().unwrap();
        assert_eq!((last.outcome, last.reason.as_str()), (Verdict::Failed, "status 503, expected 200-399"));
        let passed = stats.passed();
        upstream.status.store(200, Ordering::Relaxed);
        assert_eq!(observed(&mut commands).await.0, Health::Healthy);
        assert_eq!(stats.passed(), passed + 2, "the threshold");
        assert_eq!(stats.void(), 0);
    }

    #[tokio::test]
    async fn an_ejected_upstream_is_checked_at_once_and_comes_back_by_checks() {
        let mut upstream = upstream(HOUR).await;
        let (handle, mut commands) = control::channel();
        let mut checker = Checker::start(upstream.target, handle);
        assert_eq!(observed(&mut commands).await.0, Health::Healthy);
        upstream.accepted.recv().await.unwrap();
        checker.eject("3 failed connects in a row".into());
        assert_eq!(observed(&mut commands).await, (Health::Unhealthy, "3 failed connects in a row".into()));
        upstream.accepted.recv().await.unwrap();
        until(|| checker.stats().passed() == 2).await;
        checker.eject("again".into());
        let mut target = checker.target().clone();
        target.check.interval = Duration::from_millis(5);
        checker.retarget(target);
        assert_eq!(observed(&mut commands).await, (Health::Unhealthy, "as it was before the reload".into()));
        assert_eq!(observed(&mut commands).await.0, Health::Healthy, "what is out already is not ejected again");
    }

    #[tokio::test]
    async fn an_ejection_does_not_wait_for_the_check_under_way() {
        let mut upstream = upstream(HOUR).await;
        upstream.status.store(0, Ordering::Relaxed);
        let (handle, mut commands) = control::channel();
        let checker = Checker::start(upstream.target, handle);
        upstream.accepted.recv().await.unwrap();
        checker.eject("3 failed connects in a row".into());
        assert_eq!(observed(&mut commands).await.0, Health::Unhealthy);
        upstream.accepted.recv().await.unwrap();
        assert!(checker.stats().last().is_none());
    }

    #[tokio::test]
    async fn an_unchanged_target_goes_on_and_a_changed_one_keeps_its_health() {
        let upstream = upstream(HOUR).await;
        let (handle, mut commands) = control::channel();
        let mut checker = Checker::start(upstream.target.clone(), handle);
        assert_eq!(observed(&mut commands).await.0, Health::Healthy);
        let task = checker.task.id();
        checker.retarget(upstream.target.clone());
        assert_eq!(checker.task.id(), task);
        let mut target = upstream.target;
        target.check.interval = Duration::from_millis(5);
        target.check.probe = Probe::Http { path: "/".into(), host: None, expect_status: vec![(404, 404)] };
        checker.retarget(target);
        assert_eq!(checker.health(), Health::Healthy);
        // Said again, because a report of the first task may have been lost with it.
        assert_eq!(observed(&mut commands).await, (Health::Healthy, "as it was before the reload".into()));
        assert_eq!(observed(&mut commands).await, (Health::Unhealthy, "status 200, expected 404".into()));
        assert_eq!((checker.stats().passed(), checker.stats().failed()), (1, 2));
    }

    #[tokio::test]
    async fn ends_when_it_is_dropped_and_when_the_control_thread_is_gone() {
        let upstream = upstream(HOUR).await;
        let (handle, mut commands) = control::channel();
        let checker = Checker::start(upstream.target.clone(), handle.clone());
        observed(&mut commands).await;
        let task = checker.task.clone();
        drop(checker);
        until(|| task.is_finished()).await;
        drop(commands);
        let checker = Checker::start(upstream.target, handle);
        until(|| checker.task.is_finished()).await;
    }

    #[tokio::test]
    async fn an_attempt_takes_the_sources_of_its_family_in_turn_and_the_port_of_the_check() {
        let mut target = upstream(HOUR).await.target;
        target.header = Some(HeaderFormat::V1);
        target.check.port = Some(81);
        target.source = ["192.0.2.1", "2001:db8::1", "192.0.2.2"].map(|ip| ip.parse().unwrap()).to_vec();
        let sources: Vec<_> = (0..3).map(|turn| attempt(&target, turn).source.unwrap().to_string()).collect();
        assert_eq!(sources, ["192.0.2.1", "192.0.2.2", "192.0.2.1"]);
        assert_eq!(attempt(&target, 0).to, "127.0.0.1:81".parse().unwrap());
        for (header, expected) in [
            (CheckHeader::Same, Some(HeaderFormat::V1)),
            (CheckHeader::Off, None),
            (CheckHeader::Format(HeaderFormat::V2), Some(HeaderFormat::V2)),
        ] {
            target.check.proxy_protocol = header;
            assert_eq!(attempt(&target, 0).header, expected);
        }
        target.source = vec!["2001:db8::1".parse().unwrap()];
        assert_eq!(attempt(&target, 0).source, None);
        target.header = Some(HeaderFormat::Spp);
        target.check.proxy_protocol = CheckHeader::Same;
        assert_eq!(attempt(&target, 0).header, None, "no connection begins with it");
        target.check.probe = Probe::Udp { send: vec![], expect: vec![] };
        assert_eq!(attempt(&target, 0).header, Some(HeaderFormat::Spp));
    }
}
