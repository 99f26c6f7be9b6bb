//! The side of the old process: it starts the new one, shows it every socket, and lets go when that one is ready.

use std::collections::BTreeMap;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::process::{Child, ChildStderr, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use socket2::Socket;
use tokio::sync::oneshot;
use tokio::task::{JoinHandle, spawn_blocking};
use tokio::time::timeout_at;

use super::{
    INHERITED, Observed, Offer, Order, PROTOCOL, Program, READY_WITHIN, Ready, STANDARD_ERROR, STEP_WITHIN, Serving,
    Takeover, VARIABLE, released,
};
use crate::address::Address;
use crate::config::Protocol;
use crate::control::{UpgradeOutcome, UpgradeReport};
use crate::listener::Lent;
use crate::net::handover::{Channel, socket_number};
use crate::server::state::State;
use crate::snapshot::SocketKey;
use crate::worker::Message;

/// A worker that has not answered within this long makes the upgrade fail.
const LEND_WITHIN: Duration = Duration::from_secs(1);
/// Of what a new process says before it is ready; the rest is left out.
const ERRORS_BYTES_MAX: usize = 64 << 10;
/// A process that has closed the stream is gone by then.
const EXIT_WITHIN: Duration = Duration::from_secs(1);

/// An upgrade under way: the new process starts. It is ended with this.
pub struct Upgrade {
    child: Successor,
    errors: Errors,
    ready: JoinHandle<Result<(Channel, Ready), String>>,
    offered: Arc<Vec<Offered>>,
    begun: Instant,
    reply: Option<oneshot::Sender<UpgradeReport>>,
}

/// What one key stands for.
struct Offered {
    key: String,
    /// For an address of a listener.
    place: Option<Place>,
    sockets: Vec<OwnedFd>,
}

/// Where a listener's sockets stand here.
struct Place {
    key: SocketKey,
    slot: usize,
    bound: Address,
}

/// The new process; it is ended with this unless it took over.
struct Successor(Option<Child>);

impl Successor {
    fn id(&self) -> u32 {
        self.0.as_ref().map_or(0, Child::id)
    }

    /// How it ended by itself, if it does so soon.
    fn wait(&mut self) -> Option<String> {
        let child = self.0.as_mut()?;
        let end = Instant::now() + EXIT_WITHIN;
        while Instant::now() < end {
            match child.try_wait() {
                Ok(Some(status)) => return Some(status.to_string()),
                Ok(None) => std::thread::sleep(Duration::from_millis(5)),
                Err(_) => return None,
            }
        }
        None
    }
}

impl Drop for Successor {
    fn drop(&mut self) {
        if let Some(mut child) = self.0.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// What the new process writes to its standard error, read by a thread until it is closed.
struct Errors {
    text: Arc<Mutex<Vec<u8>>>,
    thread: std::thread::JoinHandle<()>,
}

impl Errors {
    fn of(mut pipe: ChildStderr) -> io::Result<Errors> {
        let text = Arc::<Mutex<Vec<u8>>>::default();
        let shared = Arc::clone(&text);
        let thread = std::thread::Builder::new().name("upgrade".into()).spawn(move || {
            let mut chunk = [0; 4096];
            while let Ok(count @ 1..) = pipe.read(&mut chunk) {
                let mut text = shared.lock().unwrap_or_else(PoisonError::into_inner);
                let room = ERRORS_BYTES_MAX.saturating_sub(text.len());
                text.extend_from_slice(&chunk[..count.min(room)]);
            }
        })?;
        Ok(Errors { text, thread })
    }

    /// All of it; the process has ended. One that it has started and left behind may still hold the pipe.
    fn into_text(self) -> String {
        let end = Instant::now() + EXIT_WITHIN;
        while !self.thread.is_finished() && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(5));
        }
        let text = self.text.lock().unwrap_or_else(PoisonError::into_inner);
        let text = String::from_utf8_lossy(&text);
        text.trim().trim_start_matches("preface: ").to_owned()
    }
}

impl Program {
    /// Starts the program again, with this as its standard input.
    fn start(&self, input: OwnedFd) -> io::Result<(Successor, Errors)> {
        let mut command = Command::new(&self.path);
        command.args(&self.arguments).stdin(input).stderr(Stdio::piped()).env(VARIABLE, std::process::id().to_string());
        // It names this process.
        command.env_remove("WATCHDOG_PID");
        let mut child = command.spawn()?;
        let pipe = child.stderr.take();
        let child = Successor(Some(child));
        let pipe = pipe.ok_or_else(|| io::Error::other("no pipe for its errors"))?;
        Ok((child, Errors::of(pipe)?))
    }
}

impl Upgrade {
    /// Waits until the new process is ready, or will not be. May be dropped and called again.
    pub async fn ready(&mut self) -> Result<(Channel, Ready), String> {
        (&mut self.ready).await.unwrap_or_else(|error| Err(format!("the upgrade broke off: {error}")))
    }
}

/// The next event of an upgrade, if one is under way.
pub async fn ready(upgrade: &mut Option<Upgrade>) -> Result<(Channel, Ready), String> {
    match upgrade {
        Some(upgrade) => upgrade.ready().await,
        None => std::future::pending().await,
    }
}

impl State {
    /// Starts the new process. What comes of it is told by `finish_upgrade`, or at once if nothing does.
    pub async fn begin_upgrade(&mut self, reply: Option<oneshot::Sender<UpgradeReport>>) {
        let begun = Instant::now();
        match self.start_upgrade().await {
            Ok((child, errors, channel, offered)) => {
                tracing::info!(event = "upgrade", pid = child.id(), "a new process starts");
                let offered = Arc::new(offered);
                let offering = Arc::clone(&offered);
                let inherited = self.inputs.inherited.sockets().iter().map(|socket| socket.name.clone()).collect();
                let ready = spawn_blocking(move || offer(channel, &offering, inherited));
                self.upgrade = Some(Upgrade { child, errors, ready, offered, begun, reply });
            }
            Err(error) => self.tell_upgrade(reply, failed(vec![error], begun)),
        }
    }

    async fn start_upgrade(&mut self) -> Result<(Successor, Errors, Channel, Vec<Offered>), String> {
        if self.stopping {
            return Err("this process is stopping already, and hands nothing over any more".to_owned());
        }
        if let Some(upgrade) = &self.upgrade {
            return Err(format!("an upgrade is under way already, to process {}", upgrade.child.id()));
        }
        if self.speaks_after.is_some() {
            // The last upgrade is not yet told to the end: a matter of a millisecond.
            released(&mut self.speaks_after).await;
            self.speaks_after = None;
            self.notify_main_process();
        }
        let program = self.program.clone().ok_or("this process cannot be upgraded: it is not `preface run`")?;
        may_upgrade(std::process::id())?;
        let offered = self.offered().await?;
        let (channel, theirs) = Channel::pair().map_err(|error| format!("no socket pair: {error}"))?;
        let (child, errors) =
            program.start(theirs).map_err(|error| format!("cannot start {}: {error}", program.path.display()))?;
        Ok((child, errors, channel, offered))
    }

    /// Every listening socket of this process, and its standard error.
    async fn offered(&self) -> Result<Vec<Offered>, String> {
        let failed = |error: io::Error| format!("cannot duplicate a socket: {error}; see ulimit -n");
        let mut by_slot: BTreeMap<usize, (Address, Vec<Socket>)> = BTreeMap::new();
        let mut answers = Vec::new();
        for worker in &self.workers {
            let (sender, receiver) = oneshot::channel();
            worker.send(Message::Lend(sender)).await;
            answers.push(receiver);
        }
        let deadline = tokio::time::Instant::now() + LEND_WITHIN;
        for answer in answers {
            let lent = timeout_at(deadline, answer).await.ok().and_then(Result::ok);
            let lent = lent.ok_or("a worker does not answer; see /livez")?;
            for Lent { slot, bound, socket } in lent.map_err(failed)? {
                by_slot.entry(slot).or_insert((bound, Vec::new())).1.push(socket);
            }
        }
        let mut offered = Vec::new();
        for (key, slot) in &self.inputs.slots {
            let Some((bound, sockets)) = by_slot.remove(slot) else { continue };
            let sockets = distinct(sockets).map_err(failed)?.into_iter().map(OwnedFd::from).collect();
            let place = Some(Place { key: key.clone(), slot: *slot, bound });
            offered.push(Offered { key: key.to_string(), place, sockets });
        }
        for (key, socket) in self.admin.sockets() {
            let sockets = vec![socket.try_clone_to_owned().map_err(failed)?];
            offered.push(Offered { key, place: None, sockets });
        }
        let inherited = self.inputs.inherited.sockets().iter();
        let sockets: io::Result<Vec<_>> = inherited.map(|socket| socket.duplicate().map(OwnedFd::from)).collect();
        offered.push(Offered { key: INHERITED.to_owned(), place: None, sockets: sockets.map_err(failed)? });
        let sockets = vec![io::stderr().as_fd().try_clone_to_owned().map_err(failed)?];
        offered.push(Offered { key: STANDARD_ERROR.to_owned(), place: None, sockets });
        Ok(offered)
    }

    /// Lets go if the new process is ready. Has it taken over?
    pub async fn finish_upgrade(&mut self, ready: Result<(Channel, Ready), String>) -> bool {
        let Some(upgrade) = self.upgrade.take() else { return false };
        let Upgrade { mut child, errors, offered, begun, reply, .. } = upgrade;
        let pid = child.id();
        let stage = if ready.is_ok() { "it took over" } else { "it was ready" };
        let taken = match ready {
            Ok((channel, ready)) => self.let_go(channel, &ready, &offered).await.map(|channel| (channel, ready)),
            Err(error) => Err(error),
        };
        match taken {
            Ok((channel, ready)) => {
                child.0 = None;
                self.stopping = true;
                self.probes.set_stopping();
                self.admin.leave(&ready.adopted);
                for (key, file) in &self.socket_files {
                    file.set_owned(!ready.adopted.contains(&key.to_string()));
                }
                let report = UpgradeReport {
                    outcome: UpgradeOutcome::Upgraded,
                    pid,
                    version: ready.version,
                    open: self.open.count(),
                    errors: Vec::new(),
                    duration_ms: begun.elapsed().as_secs_f64() * 1000.0,
                };
                self.notifier.hand_over(pid);
                self.tell_upgrade(reply, report);
                // From here on the new process speaks for the service.
                drop(channel);
                true
            }
            Err(error) => {
                // Waiting for its end is no work for this thread.
                let told = spawn_blocking(move || {
                    let ended = child.wait();
                    drop(child);
                    (ended, errors.into_text())
                });
                let (ended, text) = told.await.unwrap_or_default();
                let error = match ended {
                    Some(status) => format!("the new process ended before {stage}: {status}"),
                    None => error,
                };
                let errors = [error, text].into_iter().filter(|text| !text.is_empty()).collect();
                self.tell_upgrade(reply, failed(errors, begun));
                false
            }
        }
    }

    /// Stops reading from the adopted sockets, and waits until the new process serves them; or reads from them again.
    async fn let_go(&mut self, channel: Channel, ready: &Ready, offered: &[Offered]) -> Result<Channel, String> {
        let is_adopted = |offered: &&Offered| ready.adopted.contains(&offered.key);
        let adopted: Vec<&Offered> = offered.iter().filter(is_adopted).collect();
        let slots: Arc<[usize]> = adopted.iter().filter_map(|one| Some(one.place.as_ref()?.slot)).collect();
        let mut leaving = Vec::new();
        for worker in &self.workers {
            let (left, is_left) = oneshot::channel();
            worker.send(Message::HandOver { slots: Arc::clone(&slots), left }).await;
            leaving.push(is_left);
        }
        let deadline = tokio::time::Instant::now() + LEND_WITHIN;
        for is_left in leaving {
            // A worker that is late reads beside the new process for a moment.
            let _ = timeout_at(deadline, is_left).await;
        }
        let takeover = self.takeover();
        let served = spawn_blocking(move || {
            let serving = channel
                .set_timeout(STEP_WITHIN)
                .and_then(|()| channel.send(&serde_json::to_vec(&takeover)?))
                .and_then(|()| Ok(serde_json::from_slice::<Serving>(&channel.receive()?)?));
            serving.map(|_| channel).map_err(|error| format!("the new process did not take over: {error}"))
        });
        let served = served.await.unwrap_or_else(|error| Err(error.to_string()));
        if served.is_err() {
            for one in adopted {
                self.listen_again(one).await;
            }
        }
        served
    }

    fn takeover(&self) -> Takeover {
        let millis = |time: SystemTime| {
            let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
            u64::try_from(since.as_millis()).unwrap_or_default()
        };
        let orders = self.inputs.admin.iter().map(|(key, record)| Order {
            pool: key.pool.clone(),
            address: key.address.to_string(),
            admin: record.state,
            since_ms: millis(record.since),
            by: record.by.clone(),
        });
        let checked = self.inputs.health.iter().filter(|(key, _)| self.checkers.contains_key(key));
        let health = checked.map(|(key, record)| Observed {
            pool: key.pool.clone(),
            address: key.address.to_string(),
            health: record.health,
            since_ms: millis(record.since),
            reason: record.reason.clone(),
        });
        Takeover { orders: orders.collect(), health: health.collect() }
    }

    /// Serves the sockets of an address again. Of those that workers share one descriptor each was offered, and every
    /// worker gets its own of it; a UDP socket has one reader, as ever.
    async fn listen_again(&self, offered: &Offered) {
        let Some(Place { key, slot, bound }) = &offered.place else { return };
        let Some(listener) = self.snapshot.load().slots.get(slot).cloned() else { return };
        let count = match key.protocol {
            Protocol::Tcp => offered.sockets.len().max(self.workers.len()),
            Protocol::Udp => offered.sockets.len(),
        };
        for (index, socket) in offered.sockets.iter().cycle().take(count).enumerate() {
            let Ok(socket) = socket.try_clone() else { continue };
            let worker = &self.workers[index % self.workers.len()];
            let (key, bound, listener) = (key.clone(), bound.clone(), Arc::clone(&listener));
            let listen = Message::Listen { key, socket: socket.into(), bound, slot: *slot, listener };
            worker.send(listen).await;
        }
    }

    fn tell_upgrade(&self, reply: Option<oneshot::Sender<UpgradeReport>>, report: UpgradeReport) {
        match report.outcome {
            UpgradeOutcome::Upgraded => tracing::info!(
                event = "upgrade", outcome = "upgraded", pid = report.pid, version = %report.version, open = report.open,
                "the new process serves; this one ends with its last connection"
            ),
            UpgradeOutcome::Failed => tracing::error!(
                event = "upgrade", outcome = "failed", errors = %report.errors.join("\n"), "this process goes on serving"
            ),
        }
        // A caller that does not wait any more is no error.
        let _ = reply.map(|reply| reply.send(report));
    }
}

fn failed(errors: Vec<String>, begun: Instant) -> UpgradeReport {
    UpgradeReport {
        outcome: UpgradeOutcome::Failed,
        pid: std::process::id(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        open: 0,
        errors,
        duration_ms: begun.elapsed().as_secs_f64() * 1000.0,
    }
}

/// The first process of a container, or of a machine, takes everything with it when it ends.
fn may_upgrade(own_id: u32) -> Result<(), String> {
    match own_id {
        1 => Err("this is process 1 of its container, which ends with it: roll out a new container instead".to_owned()),
        _ => Ok(()),
    }
}

/// Workers may share a socket: one descriptor of each is enough.
fn distinct(sockets: Vec<Socket>) -> io::Result<Vec<Socket>> {
    let mut kept: BTreeMap<u64, usize> = BTreeMap::new();
    let mut distinct = Vec::new();
    for socket in sockets {
        let number = socket_number(&socket)?;
        if kept.insert(number, distinct.len()).is_none() {
            distinct.push(socket);
        }
    }
    Ok(distinct)
}

/// Shows the new process what there is, and waits until it is ready.
fn offer(channel: Channel, offered: &[Offered], inherited: Vec<String>) -> Result<(Channel, Ready), String> {
    let descriptors = offered.iter().map(|one| (one.key.clone(), one.sockets.len())).collect();
    let offer = Offer { protocol: PROTOCOL, version: env!("CARGO_PKG_VERSION").to_owned(), descriptors, inherited };
    let exchange = || -> io::Result<Ready> {
        channel.set_timeout(READY_WITHIN)?;
        channel.send(&serde_json::to_vec(&offer)?)?;
        for one in offered {
            channel.send_descriptors(&one.sockets.iter().map(AsFd::as_fd).collect::<Vec<BorrowedFd<'_>>>())?;
        }
        Ok(serde_json::from_slice(&channel.receive()?)?)
    };
    match exchange() {
        Ok(ready) => Ok((channel, ready)),
        Err(error) => Err(not_ready(&error)),
    }
}

fn not_ready(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => {
            format!("the new process was not ready within {} s, and was ended", READY_WITHIN.as_secs())
        }
        _ => format!("the new process does not take over: {error}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn process_1_is_not_upgraded() {
        assert!(may_upgrade(1).unwrap_err().contains("roll out a new container"));
        assert_eq!(may_upgrade(2), Ok(()));
    }

    #[test]
    fn a_socket_that_workers_share_is_shown_once() {
        let [one, other] = [(); 2].map(|()| Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap());
        let sockets = vec![one.try_clone().unwrap(), other.try_clone().unwrap(), one.try_clone().unwrap()];
        let numbers = [&one, &other].map(|socket| socket_number(socket).unwrap());
        let distinct = distinct(sockets).unwrap();
        assert_eq!(distinct.iter().map(|socket| socket_number(socket).unwrap()).collect::<Vec<_>>(), numbers);
    }
}
