//! One thread that carries traffic: its runtime, its inbox, its sockets.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::io;
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use socket2::Socket;
use tokio::runtime::LocalOptions;
use tokio::sync::{Notify, mpsc, oneshot};

use crate::address::Address;
use crate::config::Protocol;
use crate::connection::Shared;
use crate::connection::measured::Measured;
use crate::control::view::{self, Filter, Tapped};
use crate::control::{self, probes::Probes};
use crate::drain::OpenConnections;
use crate::listener::udp::{Buffers, Udp};
use crate::listener::{self, Acceptor, Lent};
use crate::log;
use crate::net::{Listening, limits};
use crate::pool::UpstreamLife;
use crate::snapshot::{At, Listener, Snapshot, SocketKey};
use crate::termination::Termination;

/// Messages under way to one worker; the control thread waits when it is full.
const INBOX_MAX: usize = 1024;

/// What the control thread tells a worker.
pub enum Message {
    /// Serve this socket, which listens already or takes datagrams. An address may have several here.
    Listen {
        /// What it is, and whose.
        key: SocketKey,
        /// The socket.
        socket: Socket,
        /// What it is bound to.
        bound: Address,
        /// Where its listener stands in snapshots.
        slot: usize,
        /// Its listener now.
        listener: Arc<Listener>,
    },
    /// Serve what is queued on this address, then close it.
    Unlisten {
        /// As in `Listen`.
        slot: usize,
        /// Told when the socket is closed.
        closed: oneshot::Sender<()>,
    },
    /// Show every socket that is served: another descriptor of each.
    Lend(oneshot::Sender<io::Result<Vec<Lent>>>),
    /// Leave the sockets of these addresses to another process that has them, too, as they are.
    HandOver {
        /// As in `Listen`.
        slots: Arc<[usize]>,
        /// Told when nothing is read from them any more.
        left: oneshot::Sender<()>,
    },
    /// Connections accepted from now on use this keepalive.
    Keepalive {
        /// As in `Listen`.
        slot: usize,
        /// `None`: off.
        keepalive: Option<Duration>,
        /// Told when it is so.
        set: oneshot::Sender<()>,
    },
    /// Add what was carried to the shared counters, and exchange what was measured for this empty one: the sign of life.
    Collect(Measured, oneshot::Sender<Measured>),
    /// End connections with a reset.
    End {
        /// Those of one upstream, or `None`: all.
        upstream: Option<Arc<UpstreamLife>>,
        /// Why.
        termination: Termination,
    },
    /// About single connections.
    Look(Look),
    /// Close every listener; answers when the last queue is empty. Connections stay.
    Stop(oneshot::Sender<()>),
}

/// What the control thread asks about single connections.
pub enum Look {
    /// Show open ones, and how many there are.
    View(Filter, oneshot::Sender<(Vec<view::Connection>, usize)>),
    /// Show the last ones with the headers that their upstreams got.
    Tap(Filter, oneshot::Sender<Vec<Tapped>>),
    /// Send each one that reaches an upstream from now on.
    Follow(Filter, mpsc::Sender<Tapped>),
    /// End one with a reset; was it here?
    EndOne(Arc<str>, oneshot::Sender<bool>),
}

/// Where a worker stands among the others, and its part of what there is.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    /// From 0.
    pub number: usize,
    /// To be bound to; `None`: runs on any.
    pub processor: Option<usize>,
    /// Pipes that it may have open.
    pub pipes_max: usize,
}

/// A running worker. Its thread ends when this is dropped.
pub struct Worker {
    inbox: mpsc::Sender<Message>,
    thread: Option<JoinHandle<()>>,
}

impl Worker {
    /// Starts the thread.
    pub fn start(
        place: Place,
        snapshot: Arc<ArcSwap<Snapshot>>,
        open: Arc<OpenConnections>,
        control: control::Handle,
        log: log::Sender,
        probes: Arc<Probes>,
    ) -> io::Result<Worker> {
        let Place { number, processor, pipes_max } = place;
        let (inbox, messages) = mpsc::channel(INBOX_MAX);
        let (started, outcome) = std::sync::mpsc::channel();
        let thread = std::thread::Builder::new().name(format!("worker-{number}")).spawn(move || {
            if let Some(processor) = processor
                && let Err(error) = limits::pin_thread(processor)
            {
                tracing::warn!(event = "pin", worker = number, processor, reason = %error, "runs on any processor");
            }
            // Built on its own thread: a local runtime cannot be sent there.
            let runtime =
                tokio::runtime::Builder::new_current_thread().enable_all().build_local(LocalOptions::default());
            match runtime {
                Ok(runtime) => {
                    let _ = started.send(Ok(()));
                    let alive = || probes.worker_answered(number, Instant::now());
                    runtime.block_on(run(Shared::new(snapshot, open, control, log, pipes_max), messages, alive));
                    probes.worker_ended(number);
                }
                Err(error) => drop(started.send(Err(error))),
            }
        })?;
        outcome.recv().unwrap_or_else(|_| Err(io::Error::other("the thread ended at once")))?;
        Ok(Worker { inbox, thread: Some(thread) })
    }

    /// Sends a message; waits while the inbox is full. A worker that is gone takes none.
    pub async fn send(&self, message: Message) {
        let _ = self.inbox.send(message).await;
    }

    /// Ends the thread and waits for it; connections still open are dropped.
    pub fn join(mut self) {
        let thread = self.thread.take();
        drop(self);
        if let Some(thread) = thread {
            let _ = thread.join();
        }
    }
}

fn hand_over(shared: &Shared, emptied: Measured, reply: oneshot::Sender<Measured>) {
    let mut measured = shared.exchange_measured(emptied);
    measured.cpu = limits::thread_time();
    if let Err(measured) = reply.send(measured) {
        shared.absorb_measured(&measured);
    }
}

fn carry_out(shared: &Shared, look: Look) {
    // A reply that nobody waits for any more is no error.
    match look {
        Look::View(filter, reply) => drop(reply.send(shared.view(&filter))),
        Look::Tap(filter, reply) => drop(reply.send(shared.last_tapped(&filter))),
        Look::Follow(filter, sender) => shared.follow(filter, sender),
        Look::EndOne(id, reply) => drop(reply.send(shared.end_one(&id))),
    }
}

async fn run(shared: Rc<Shared>, mut messages: mpsc::Receiver<Message>, alive: impl Fn()) {
    let mut acceptors = Acceptors::default();
    let mut udp = UdpSockets::default();
    while let Some(message) = messages.recv().await {
        match message {
            Message::Listen { key: SocketKey { protocol: Protocol::Udp, .. }, socket, bound, slot, listener } => {
                udp.serve(&shared, socket, bound, slot, listener);
            }
            Message::Listen { key: SocketKey { at, .. }, socket, bound, slot, listener } => {
                acceptors.serve(&shared, socket, (at, bound, slot), listener);
            }
            Message::Unlisten { slot, closed } => {
                let mut tasks = acceptors.retire(slot, false);
                tasks.extend(udp.retire(slot));
                tell_when_ended(tasks, closed);
            }
            Message::Lend(reply) => drop(reply.send(acceptors.lend().chain(udp.lend()).collect())),
            Message::HandOver { slots, left } => {
                let tasks = slots.iter().flat_map(|slot| acceptors.retire(*slot, true)).collect();
                slots.iter().for_each(|slot| udp.hand_over(*slot));
                tell_when_ended(tasks, left);
            }
            Message::Keepalive { slot, keepalive, set } => {
                acceptors.set_keepalive(slot, keepalive);
                let _ = set.send(());
            }
            Message::Collect(emptied, reply) => {
                shared.fold();
                udp.each(Udp::fold);
                // Counts also when the control thread no longer waits for it.
                alive();
                hand_over(&shared, emptied, reply);
            }
            Message::End { upstream, termination } => {
                shared.end(upstream.as_ref(), termination);
                udp.each(|socket| socket.end(upstream.as_ref(), termination));
            }
            Message::Look(look) => carry_out(&shared, look),
            Message::Stop(reply) => {
                udp.each(Udp::drain);
                tell_when_ended(acceptors.retire_all(), reply);
            }
        }
    }
}

fn tell_when_ended(tasks: Vec<Task>, told: oneshot::Sender<()>) {
    tokio::task::spawn_local(async move {
        for task in tasks {
            let _ = task.await;
        }
        let _ = told.send(());
    });
}

/// What serves one socket.
type Task = tokio::task::JoinHandle<()>;

/// The listening sockets of a worker, by slot. An address has more than one here where an earlier process had more
/// workers.
#[derive(Default)]
struct Acceptors {
    served: HashMap<usize, Vec<(Rc<Acceptor>, Task)>>,
}

impl Acceptors {
    fn serve(
        &mut self,
        shared: &Rc<Shared>,
        socket: Socket,
        (at, bound, slot): (At, Address, usize),
        listener: Arc<Listener>,
    ) {
        match Listening::new(socket) {
            Ok(listening) => {
                let (retire, handed_over) = (Notify::new(), Cell::new(false));
                let acceptor = Rc::new(Acceptor { listening, at, bound, slot, retire, handed_over });
                let task = listener::run(Rc::clone(shared), Rc::clone(&acceptor), listener);
                self.served.entry(slot).or_default().push((acceptor, tokio::task::spawn_local(task)));
            }
            Err(error) => tracing::error!(event = "listen", address = %bound, reason = %error, "cannot accept here"),
        }
    }

    /// Ends those of an address; what is still to be waited for.
    fn retire(&mut self, slot: usize, handed_over: bool) -> Vec<Task> {
        let retire = |(acceptor, task): (Rc<Acceptor>, Task)| {
            acceptor.handed_over.set(handed_over);
            acceptor.retire.notify_one();
            task
        };
        self.served.remove(&slot).into_iter().flatten().map(retire).collect()
    }

    fn retire_all(&mut self) -> Vec<Task> {
        let slots: Vec<usize> = self.served.keys().copied().collect();
        slots.into_iter().flat_map(|slot| self.retire(slot, false)).collect()
    }

    fn lend(&self) -> impl Iterator<Item = io::Result<Lent>> {
        let acceptors = self.served.values().flatten();
        acceptors.map(|(acceptor, _)| acceptor.lend())
    }

    fn set_keepalive(&self, slot: usize, keepalive: Option<Duration>) {
        for (acceptor, _) in self.served.get(&slot).into_iter().flatten() {
            if let Err(error) = acceptor.listening.set_keepalive(keepalive) {
                tracing::warn!(event = "keepalive", address = %acceptor.bound, reason = %error);
            }
        }
    }
}

/// The UDP sockets of a worker by slot, until the last session of each has ended.
#[derive(Default)]
struct UdpSockets {
    buffers: Rc<RefCell<Buffers>>,
    served: HashMap<usize, Vec<(Weak<Udp>, Task)>>,
}

impl UdpSockets {
    fn serve(&mut self, shared: &Rc<Shared>, socket: Socket, bound: Address, slot: usize, listener: Arc<Listener>) {
        let Address::Ip(bound) = bound else {
            return tracing::error!(event = "listen", address = %bound, "no datagrams over a UNIX socket");
        };
        match Udp::new(shared, &self.buffers, socket, bound, slot, listener) {
            Ok(udp) => {
                let weak = Rc::downgrade(&udp);
                self.served.entry(slot).or_default().push((weak, tokio::task::spawn_local(udp.run())));
            }
            Err(error) => tracing::error!(event = "listen", address = %bound, reason = %error, "no datagrams here"),
        }
    }

    /// Ends those of an address; what is still to be waited for.
    fn retire(&mut self, slot: usize) -> Vec<Task> {
        let retire = |(udp, task): (Weak<Udp>, Task)| {
            if let Some(udp) = udp.upgrade() {
                udp.retire();
            }
            task
        };
        self.served.remove(&slot).into_iter().flatten().map(retire).collect()
    }

    /// They stay until their sessions have ended.
    fn hand_over(&mut self, slot: usize) {
        let served = self.served.get(&slot).into_iter().flatten();
        served.filter_map(|(udp, _)| udp.upgrade()).for_each(|udp| udp.hand_over());
    }

    fn lend(&self) -> impl Iterator<Item = io::Result<Lent>> {
        self.served.values().flatten().filter_map(|(udp, _)| udp.upgrade()?.lend())
    }

    fn each(&self, act: impl Fn(&Udp)) {
        self.served.values().flatten().filter_map(|(udp, _)| udp.upgrade()).for_each(|udp| act(&udp));
    }
}
