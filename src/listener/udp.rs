//! The datagrams of one bound UDP socket: received in batches, admitted to sessions, passed on; and the way back.

mod group;
mod replies;
mod session;
mod upstream;

use std::cell::RefCell;
use std::future::poll_fn;
use std::io;
use std::net::SocketAddr;
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::task::{Context, Poll};
use std::time::{Duration, Instant, SystemTime};

use socket2::Socket;
use tokio::sync::Notify;
use tokio::time::{Sleep, sleep_until};
use ulid::Ulid;

use self::group::{Groups, Piece, pieces};
use self::replies::Replies;
use self::session::{IN, Retained, Session};
use super::Lent;
use crate::config::{Bind, IpBind, LogConnections, Protocol};
use crate::connection::session::SessionEntry;
use crate::connection::{Shared, new_id};
use crate::control::view::{self, Filter};
use crate::log;
use crate::net::canonical;
use crate::net::datagram::outbox::Outbox;
use crate::net::datagram::poll::{Bound, Sockets};
use crate::net::datagram::{Batch, Destination, Source, is_local};
use crate::pool::UpstreamLife;
use crate::sessions::{Admission, Ends, Sessions};
use crate::snapshot::Listener;
use crate::termination::{DropReason, Termination};

/// A socket that is no longer wanted goes on for this long: requests under way get their answers.
const CLOSING_GRACE: Duration = Duration::from_millis(300);
/// Sessions whose socket another process reads now still get replies for this long.
const HANDED_OVER_GRACE: Duration = Duration::from_secs(10);
/// First datagrams up to this length are kept until the upstream has answered.
const RETAINED_BYTES_MAX: usize = 2_048;
/// All of them together, of one socket.
const RETAINED_TOTAL_MAX: usize = 4 << 20;
/// At a stop a session is over after so long without a datagram if its client has a reply to all that it asked ...
const QUIET_ANSWERED: Duration = Duration::from_secs(1);
/// ... and after so long if not: by then clients have asked again, or given up.
const QUIET_UNANSWERED: Duration = Duration::from_secs(10);
/// From look to look at which of them are.
const QUIET_LOOK: Duration = Duration::from_millis(250);
/// Turns in a row before the worker's other tasks have one.
const TURNS_MAX: usize = 8;
/// Drops of one reason that are this far apart are told one by one.
const DROP_QUIET: Duration = Duration::from_secs(60);
/// While there is nothing to expire.
const FAR: Duration = Duration::from_secs(3600);

/// What the UDP sockets of one worker share: memory for one batch each way, used by one of them at a time.
#[derive(Default)]
pub struct Buffers {
    batch: Batch,
    outbox: Outbox,
    groups: Groups,
    replies: Replies,
}

/// One UDP socket of one worker, and its sessions.
pub struct Udp {
    shared: Rc<Shared>,
    buffers: Rc<RefCell<Buffers>>,
    socket: Bound,
    upstreams: Sockets,
    bound: SocketAddr,
    slot: usize,
    core: RefCell<Core>,
    /// Something changed that the loop must look at.
    changed: Notify,
}

/// What changes while it runs.
struct Core {
    listener: Arc<Listener>,
    table: Sessions,
    /// By the table's slots.
    sessions: Vec<Option<Session>>,
    /// Counts sessions and their moves: what epoll reported of an earlier one must not reach a later one.
    generation: u32,
    /// Counts the pools seen.
    pool_seen: u64,
    /// Counts batches.
    batch: u64,
    retained_bytes: usize,
    /// Datagrams that left as segments, in and out, since they were counted last.
    segmented: [u64; 2],
    closing: Closing,
    last_drops: [Option<Instant>; DropReason::ALL.len()],
}

/// How far a socket has come on its way out.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Closing {
    /// It serves.
    No,
    /// No new sessions; those that are open end by themselves, or when nothing more is to be expected: it is looked at
    /// then.
    Draining(Instant),
    /// No new sessions, and those still open end then.
    Until(Instant),
    /// Another process reads the socket. Replies still leave through it, until then.
    HandedOver(Instant),
}

impl Udp {
    /// Registers with the current runtime.
    pub fn new(
        shared: &Rc<Shared>,
        buffers: &Rc<RefCell<Buffers>>,
        socket: Socket,
        bound: SocketAddr,
        slot: usize,
        listener: Arc<Listener>,
    ) -> io::Result<Rc<Udp>> {
        let core = Core {
            listener,
            table: Sessions::default(),
            sessions: Vec::new(),
            generation: 0,
            pool_seen: 0,
            batch: 0,
            retained_bytes: 0,
            segmented: [0; 2],
            closing: Closing::No,
            last_drops: [None; DropReason::ALL.len()],
        };
        Ok(Rc::new(Udp {
            shared: Rc::clone(shared),
            buffers: Rc::clone(buffers),
            socket: Bound::new(socket)?,
            upstreams: Sockets::new()?,
            bound,
            slot,
            core: RefCell::new(core),
            changed: Notify::new(),
        }))
    }

    /// Serves until it is retired or drained. A panic costs the sessions that were open, not the socket.
    pub async fn run(self: Rc<Self>) {
        loop {
            match tokio::task::spawn_local(Rc::clone(&self).serve()).await {
                Err(error) if error.is_panic() => self.core.borrow_mut().begin_anew(&self.shared),
                _ => return self.fold(),
            }
        }
    }

    /// Answers what is under way for a moment, then ends.
    pub fn retire(&self) {
        self.close(Closing::Until(Instant::now() + CLOSING_GRACE));
    }

    /// Opens no session any more, and ends with the last one.
    pub fn drain(&self) {
        self.close(Closing::Draining(Instant::now()));
    }

    /// Reads nothing any more, from now on: another process does. Replies are passed on for a while.
    pub fn hand_over(&self) {
        self.close(Closing::HandedOver(Instant::now() + HANDED_OVER_GRACE));
    }

    /// Another descriptor of the socket; `None`: it is on its way out.
    pub fn lend(&self) -> Option<io::Result<Lent>> {
        let serves = self.core.borrow().closing == Closing::No;
        serves.then(|| Ok(Lent { slot: self.slot, bound: self.bound.into(), socket: self.socket.lend()? }))
    }

    fn close(&self, closing: Closing) {
        let core = &mut *self.core.borrow_mut();
        if !matches!(core.closing, Closing::HandedOver(_)) {
            core.closing = closing;
            self.changed.notify_one();
        }
    }

    /// Ends sessions: those of one upstream, or all.
    pub fn end(&self, upstream: Option<&Arc<UpstreamLife>>, termination: Termination) {
        let core = &mut *self.core.borrow_mut();
        let meant = |session: &Session| upstream.is_none_or(|life| Arc::ptr_eq(life, session.link.life()));
        for slot in 0..core.sessions.len() {
            if core.sessions[slot].as_ref().is_some_and(meant) {
                core.close(&self.shared, slot, termination);
            }
        }
        self.changed.notify_one();
    }

    /// Ends the session of this id; is it here?
    pub fn end_one(&self, id: &str) -> bool {
        let Ok(id) = Ulid::from_string(id) else { return false };
        let core = &mut *self.core.borrow_mut();
        let is_meant = |session: &Option<Session>| session.as_ref().is_some_and(|session| session.entry.id == id);
        let Some(slot) = core.sessions.iter().position(is_meant) else { return false };
        core.close(&self.shared, slot, Termination::Ended);
        self.changed.notify_one();
        true
    }

    /// Open sessions, the oldest ones if there are more than wanted, and how many there are.
    pub fn view(&self, filter: &Filter) -> (Vec<view::Connection>, usize) {
        let core = self.core.borrow();
        let sessions = core.sessions.iter().flatten().inspect(|session| session.publish());
        let wanted = filter.oldest(sessions.filter(|session| session.entry.fits(filter)), |session| session.entry.id);
        (wanted.into_iter().map(|session| session.entry.view()).collect(), core.table.len())
    }

    /// Has open sessions show what they have carried until now.
    pub fn publish(&self) {
        self.core.borrow().sessions.iter().flatten().for_each(Session::publish);
    }

    /// Adds what was carried since the last call to the shared counters.
    pub fn fold(&self) {
        let core = &mut *self.core.borrow_mut();
        core.sessions.iter_mut().flatten().for_each(Session::fold);
        for (sum, more) in core.listener.life.sessions.segmented.iter().zip(&mut core.segmented) {
            sum.fetch_add(std::mem::take(more), Relaxed);
        }
    }

    async fn serve(self: Rc<Self>) {
        let mut expiry = pin!(sleep_until((Instant::now() + FAR).into()));
        let mut turns = 0;
        loop {
            let mut changed = pin!(self.changed.notified());
            let over = poll_fn(|cx| {
                let received = self.receive(cx);
                let answered = self.pass_replies(cx);
                let over = self.look_at_time(cx, expiry.as_mut());
                let has_changed = changed.as_mut().poll(cx).is_ready();
                match over || received || answered || has_changed {
                    true => Poll::Ready(over),
                    false => Poll::Pending,
                }
            });
            if over.await {
                let is_handed_over = matches!(self.core.borrow().closing, Closing::HandedOver(_));
                let why = if is_handed_over { Termination::HandedOver } else { Termination::ListenerRemoved };
                return self.end(None, why);
            }
            turns += 1;
            if turns % TURNS_MAX == 0 {
                tokio::task::yield_now().await;
            }
        }
    }

    /// Ends sessions whose time is over. Is the socket's?
    fn look_at_time(&self, cx: &mut Context<'_>, mut expiry: std::pin::Pin<&mut Sleep>) -> bool {
        let core = &mut *self.core.borrow_mut();
        loop {
            let closes = match core.closing {
                Closing::Until(at) | Closing::HandedOver(at) if at <= Instant::now() => return true,
                Closing::Until(at) | Closing::HandedOver(at) => Some(at),
                Closing::Draining(at) if at <= Instant::now() => Some(core.end_quiet(&self.shared, Instant::now())),
                Closing::Draining(at) => Some(at),
                Closing::No => None,
            };
            if core.closing != Closing::No && core.table.is_empty() {
                return true;
            }
            let next = core.table.next_look().into_iter().chain(closes).min();
            let next = next.unwrap_or_else(|| Instant::now() + FAR);
            // An earlier time than armed comes with a new, shorter timeout; later ones are found out when it fires.
            if next < expiry.deadline().into_std() {
                expiry.as_mut().reset(next.into());
            }
            if expiry.as_mut().poll(cx).is_pending() {
                return false;
            }
            let now = Instant::now();
            while let Some(slot) = core.table.expired(now) {
                core.close_silent(&self.shared, slot);
            }
            let next = core.table.next_look().unwrap_or(now + FAR);
            expiry.as_mut().reset(next.max(now + Duration::from_millis(1)).into());
        }
    }

    /// One batch of clients' datagrams, if there are any.
    fn receive(&self, cx: &mut Context<'_>) -> bool {
        if matches!(self.core.borrow().closing, Closing::HandedOver(_)) {
            return false;
        }
        let buffers = &mut *self.buffers.borrow_mut();
        match self.socket.poll_receive(cx, &mut buffers.batch) {
            Poll::Ready(Ok(())) => {
                let core = &mut *self.core.borrow_mut();
                self.refresh(core);
                let now = Instant::now();
                self.gather(core, buffers, now);
                self.pass_on(core, buffers, now);
                true
            }
            // An error of an earlier send: it was counted, or is nobody's.
            Poll::Ready(Err(_)) => true,
            Poll::Pending => false,
        }
    }

    fn refresh(&self, core: &mut Core) {
        let pool = Arc::as_ptr(&core.listener.pool);
        self.shared.refresh(self.slot, &mut core.listener);
        if Arc::as_ptr(&core.listener.pool) != pool {
            core.pool_seen += 1;
        }
    }

    /// Sorts a batch by session; opens those that are new.
    fn gather(&self, core: &mut Core, buffers: &mut Buffers, now: Instant) {
        core.batch += 1;
        let Buffers { batch, outbox, groups, .. } = buffers;
        groups.clear();
        let mut last: Option<(Ends, usize)> = None;
        for place in 0..batch.len() {
            let Some(received) = batch.received(place) else { continue };
            if received.truncated {
                core.dropped(DropReason::Truncated, 1, now);
                continue;
            }
            let ends = Ends { client: received.from, local: received.to.map_or(self.bound.ip(), |to| to.ip) };
            let (length, segment) = (received.bytes.len(), received.segment);
            let group = match last {
                Some((known, group)) if known == ends => group,
                _ => {
                    let first = pieces(place, length, segment).next().expect("there is at least one");
                    let slot = match self.session(core, ends, received.to, (batch, first), now) {
                        Ok(slot) => slot,
                        Err(reason) => {
                            core.dropped(reason, pieces(place, length, segment).count(), now);
                            continue;
                        }
                    };
                    self.look_at_upstream(core, slot, outbox, now);
                    let number = core.batch;
                    let session = core.sessions[slot].as_mut().expect("a session that was just found");
                    if session.gathered.0 != number {
                        session.gathered = (number, groups.group(slot));
                    }
                    session.gathered.1
                }
            };
            last = Some((ends, group));
            pieces(place, length, segment).for_each(|piece| groups.add(group, piece));
        }
    }

    /// The session of a datagram: the one that it has, or a new one; or why it has none.
    fn session(
        &self,
        core: &mut Core,
        ends: Ends,
        to: Option<Destination>,
        first: (&Batch, Piece),
        now: Instant,
    ) -> Result<usize, DropReason> {
        let counters = &core.listener.life.sessions;
        let room = self.shared.with_snapshot(|snapshot| snapshot.connections_max) > self.shared.open.count()
            && core.listener.sessions_max > counters.open.load(Relaxed) as usize;
        match core.table.admit(&ends, now, room) {
            Admission::Known(slot) => return Ok(slot),
            _ if core.closing != Closing::No => return Err(DropReason::Closing),
            _ if !core.listener.allows(canonical(ends.client).ip()) => return Err(DropReason::Denied),
            _ if self.is_own(canonical(ends.client)) => return Err(DropReason::OwnAddress),
            Admission::New => {}
            Admission::Displace(oldest) => core.close(&self.shared, oldest, Termination::Displaced),
            Admission::Full => return Err(DropReason::SessionsFull),
        }
        self.open(core, ends, to.map(|to| to.answer_from), first, now)
    }

    /// Does this process take datagrams at that address? Nobody else can send from it, but forge it.
    fn is_own(&self, client: SocketAddr) -> bool {
        let is_at = |bind: &IpBind| {
            let (ip, port) = (canonical(bind.address).ip(), bind.address.port());
            port == client.port() && (ip == client.ip() || ip.is_unspecified() && is_local(client.ip()))
        };
        self.shared.with_snapshot(|snapshot| {
            let mut listeners = snapshot.slots.values().filter(|listener| listener.config.serves(Protocol::Udp));
            listeners.any(|listener| listener.config.binds.iter().filter_map(Bind::ip).any(is_at))
        })
    }

    fn open(
        &self,
        core: &mut Core,
        ends: Ends,
        answer_from: Option<Source>,
        first: (&Batch, Piece),
        now: Instant,
    ) -> Result<usize, DropReason> {
        let (shared, listener) = (&self.shared, Arc::clone(&core.listener));
        let life = &listener.life;
        let open = shared.open.open(shared.with_snapshot(|snapshot| snapshot.connections_max));
        let open = open.ok_or(DropReason::SessionsFull)?;
        let client = canonical(ends.client);
        let in_source = listener.config.max_connections_per_source > 0;
        listener.enter_session(client.ip())?;
        let id = new_id();
        let local = canonical(SocketAddr::new(ends.local, self.bound.port()));
        let linked = self.link(&listener, (client, local, &id), &mut Vec::new());
        let (link, attempts) = linked.inspect_err(|_| {
            life.leave_session(in_source.then_some(client.ip()));
        })?;
        life.sessions.begun.fetch_add(1, Relaxed);
        core.generation = core.generation.wrapping_add(1);
        let (batch, piece) = first;
        let retained = core.retain(&batch.bytes(piece.place)[piece.start..piece.start + piece.length]);
        self.log_start(&id, &life.name, client);
        tracing::debug!(event = "accept", %id, listener = &*life.name, %client);
        let session = Session {
            entry: Rc::new(SessionEntry::new(id, Arc::clone(life), (client, local), now)),
            generation: core.generation,
            ends,
            answer_from,
            link,
            retained,
            failed: None,
            pool_seen: core.pool_seen,
            responses: listener.config.responses,
            gathered: (0, 0),
            burst: replies::BURST_MIN,
            reply_segment_max: usize::MAX,
            datagrams: [0; 2],
            bytes: [0; 2],
            attempts,
            first_reply: None,
            asked: None,
            in_source,
            folded: ([0; 2], [0; 2], 0),
            open,
        };
        let slot = core.table.open(ends, now, listener.config.idle_timeout_udp);
        if core.sessions.len() <= slot {
            core.sessions.resize_with(slot + 1, || None);
        }
        session.attempted(None);
        let watched = self.upstreams.add(&session.link.socket, number(slot, session.generation));
        core.sessions[slot] = Some(session);
        if let Err(error) = watched {
            listener.life.lacked(&error);
            core.close(shared, slot, Termination::LocalResources);
            return Err(DropReason::LocalResources);
        }
        Ok(slot)
    }

    fn log_start(&self, id: &Ulid, listener: &str, client: SocketAddr) {
        if self.shared.with_snapshot(|snapshot| snapshot.log_connections == Some(LogConnections::StartAndEnd)) {
            let (format, now) = (self.shared.log.format(), SystemTime::now());
            let line = log::session_start_line(format, now, &id.to_string(), listener, client);
            self.shared.log.send(line.as_bytes());
        }
    }

    /// Sends what was gathered, session by session.
    fn pass_on(&self, core: &mut Core, buffers: &mut Buffers, now: Instant) {
        /// An upstream that fails in the middle is left for another; then that one may fail.
        const ROUNDS_MAX: usize = 3;
        let Buffers { batch, outbox, groups, .. } = buffers;
        for number in 0..groups.sort() {
            let (group, pieces) = groups.get(number);
            let slot = group.owner;
            let mut rest = pieces;
            let mut reason = DropReason::Refused;
            for _ in 0..ROUNDS_MAX {
                let Some(session) = core.sessions[slot].as_mut() else { break };
                if session.gathered != (core.batch, number) {
                    // Its session gave way to a later datagram of this very batch.
                    break;
                }
                let mut drops = [0; DropReason::ALL.len()];
                let before = session.datagrams[IN];
                let sent = session.send(rest, batch, outbox, |reason, count| drops[reason as usize] += count);
                if session.datagrams[IN] > before {
                    session.passed_on(&self.shared, now);
                }
                core.segmented[IN] += outbox.take_segmented();
                for reason in DropReason::ALL {
                    core.dropped(*reason, drops[*reason as usize], now);
                }
                rest = &rest[sent.done..];
                match (sent.failure, sent.unintroduced) {
                    (Some(failure), _) => {
                        reason = session::reason_of(&failure);
                        self.upstream_failed(core, slot, reason, outbox, now);
                    }
                    (None, Some(why)) if !rest.is_empty() => reason = why,
                    _ => break,
                }
            }
            core.dropped(reason, rest.len(), now);
        }
    }
}

impl Core {
    /// Keeps a first datagram for another upstream, if there is one to try and it is not too long.
    fn retain(&mut self, datagram: &[u8]) -> Option<Box<Retained>> {
        let total = self.retained_bytes + datagram.len();
        if self.listener.pool.config.retries == 0 || datagram.len() > RETAINED_BYTES_MAX || total > RETAINED_TOTAL_MAX {
            return None;
        }
        self.retained_bytes = total;
        Some(Box::new(Retained { datagram: datagram.to_vec(), tried: Vec::new() }))
    }

    /// Ends a session.
    fn close(&mut self, shared: &Shared, slot: usize, termination: Termination) {
        let Some(session) = self.sessions[slot].take() else { return };
        self.table.close(slot);
        self.retained_bytes -= session.retained.as_ref().map_or(0, |retained| retained.datagram.len());
        session.end(shared, termination);
    }

    /// Ends a session because nothing more is heard.
    fn close_silent(&mut self, shared: &Shared, slot: usize) {
        let silence = self.sessions[slot].as_ref().map(Session::silence);
        self.close(shared, slot, silence.unwrap_or(Termination::IdleTimeout));
    }

    /// At a stop: ends sessions that need not be waited for. When to look again.
    fn end_quiet(&mut self, shared: &Shared, now: Instant) -> Instant {
        for slot in 0..self.sessions.len() {
            let Some(session) = &self.sessions[slot] else { continue };
            let quiet = if session.asked.is_none() { QUIET_ANSWERED } else { QUIET_UNANSWERED };
            if now.duration_since(self.table.last(slot)) >= quiet {
                self.close_silent(shared, slot);
            }
        }
        self.closing = Closing::Draining(now + QUIET_LOOK);
        now + QUIET_LOOK
    }

    /// After a panic: nothing that was known of sessions is believed any more, the table least of all.
    fn begin_anew(&mut self, shared: &Shared) {
        self.table = Sessions::default();
        self.retained_bytes = 0;
        for session in std::mem::take(&mut self.sessions).into_iter().flatten() {
            session.end(shared, Termination::Panic);
        }
    }

    /// Counts datagrams that were not passed on; says so when it begins.
    fn dropped(&mut self, reason: DropReason, count: usize, now: Instant) {
        if count == 0 {
            return;
        }
        let life = &self.listener.life;
        life.sessions.dropped(reason, count as u64);
        let last = self.last_drops[reason as usize].replace(now);
        if last.is_none_or(|last| now.duration_since(last) > DROP_QUIET) {
            tracing::warn!(
                event = "datagrams_dropped",
                listener = &*life.name,
                reason = reason.as_str(),
                "datagrams are dropped; how many is in preface_datagrams_dropped_total"
            );
        }
    }
}

/// What stands for a session among the sockets that are waited for.
fn number(slot: usize, generation: u32) -> u64 {
    (slot as u64) << 32 | u64::from(generation)
}

/// Slot and generation.
fn of_number(number: u64) -> (usize, u32) {
    ((number >> 32) as usize, number as u32)
}

#[cfg(test)]
mod tests;
