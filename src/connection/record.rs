//! What is kept of an open connection: what others may see of it and say to it, and the record of how it ended.

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, SystemTime};

use tokio::time::Instant;
use ulid::Ulid;

use super::Shared;
use super::measured::{Measured, Times};
use crate::address::{Address, Client};
use crate::config::{HeaderFormat, LogConnections, Protocol};
use crate::control::view::{self, Filter};
use crate::drain::OpenConnection;
use crate::log::{self, ConnectionLine};
use crate::pool::UpstreamLife;
use crate::pool::rejection::{HEAD_BYTES, Rejection};
use crate::relay::Observer;
use crate::snapshot::ListenerLife;
use crate::termination::Termination;

/// The open connections of a worker.
#[derive(Default)]
pub(super) struct Registry {
    entries: Vec<Option<Rc<Entry>>>,
    free: Vec<usize>,
}

impl Registry {
    pub(super) fn insert(&mut self, entry: Rc<Entry>) -> usize {
        match self.free.pop() {
            Some(index) => {
                self.entries[index] = Some(entry);
                index
            }
            None => {
                self.entries.push(Some(entry));
                self.entries.len() - 1
            }
        }
    }

    fn remove(&mut self, index: usize) {
        self.entries[index] = None;
        self.free.push(index);
    }

    /// Open ones, and how many there are.
    pub(super) fn view(&self, filter: &Filter) -> (Vec<view::Connection>, usize) {
        let entries = self.entries.iter().flatten();
        let wanted = filter.oldest(entries.filter(|entry| entry.fits(filter)), |entry| entry.id);
        (wanted.into_iter().map(|entry| entry.view()).collect(), self.entries.len() - self.free.len())
    }

    /// Orders the connection of this id to end; is it there?
    pub(super) fn end_one(&self, id: &str) -> bool {
        let Ok(id) = Ulid::from_string(id) else { return false };
        let found = self.entries.iter().flatten().find(|entry| entry.id == id.to_bytes());
        found.inspect(|entry| entry.order(Termination::Ended)).is_some()
    }

    pub(super) fn each(&self, mut visit: impl FnMut(&Entry)) {
        self.entries.iter().flatten().for_each(|entry| visit(entry));
    }
}

/// What others may see of a connection, and say to it.
pub(super) struct Entry {
    /// As bytes: a `Ulid` would be aligned to 16.
    id: [u8; 16],
    listener: Arc<ListenerLife>,
    client: Client,
    local: RefCell<Address>,
    pool: RefCell<Option<Arc<str>>>,
    pub(super) upstream: RefCell<Option<Arc<UpstreamLife>>>,
    bytes_in: Cell<u64>,
    bytes_out: Cell<u64>,
    folded_in: Cell<u64>,
    folded_out: Cell<u64>,
    started: Instant,
    first_byte: Cell<Option<Duration>>,
    is_first_byte_measured: Cell<bool>,
    answer: Cell<Answer>,
    has_header: Cell<bool>,
    ended: Cell<Option<(Termination, Duration)>>,
    pub(super) ordered: Cell<Option<Termination>>,
    waker: RefCell<Option<Waker>>,
}

/// What the upstream answered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Answer {
    /// Nothing yet.
    #[default]
    None,
    /// Something.
    Good,
    /// Too little to tell.
    Unclear,
    /// What looks as if it did not take the header.
    Rejected(Rejection),
}

impl Entry {
    /// Is it one that the filter means?
    pub(super) fn fits(&self, filter: &Filter) -> bool {
        filter.fits(&self.listener.name, self.pool.borrow().as_deref(), self.client.ip().map(|client| client.ip()))
            && filter.id.as_ref().is_none_or(|id| *id == Ulid::from_bytes(self.id).to_string())
    }

    /// As others see it now.
    pub(super) fn view(&self) -> view::Connection {
        let id = Ulid::from_bytes(self.id);
        let accepted = SystemTime::UNIX_EPOCH + Duration::from_millis(id.timestamp_ms());
        let ended = self.ended.get();
        view::Connection {
            id: id.to_string(),
            protocol: Protocol::Tcp.as_str(),
            accepted: humantime::format_rfc3339_millis(accepted).to_string(),
            listener: self.listener.name.to_string(),
            client: self.client,
            local: self.local.borrow().clone(),
            pool: self.pool.borrow().as_deref().map(str::to_owned),
            upstream: self.upstream.borrow().as_ref().map(|life| life.address.clone()),
            age_ms: view::milliseconds(ended.map_or_else(|| self.started.elapsed(), |(_, duration)| duration)),
            bytes_in: self.bytes_in.get(),
            bytes_out: self.bytes_out.get(),
            datagrams_in: None,
            datagrams_out: None,
            first_byte_ms: self.first_byte.get().map(view::milliseconds),
            end: ended.map(|(termination, _)| termination.to_string()),
        }
    }

    pub(super) fn fold(&self) {
        let bytes_in = self.bytes_in.get() - self.folded_in.replace(self.bytes_in.get());
        let bytes_out = self.bytes_out.get() - self.folded_out.replace(self.bytes_out.get());
        if bytes_in + bytes_out == 0 {
            return;
        }
        self.listener.bytes_in.fetch_add(bytes_in, Ordering::Relaxed);
        self.listener.bytes_out.fetch_add(bytes_out, Ordering::Relaxed);
        if let Some(upstream) = &*self.upstream.borrow() {
            upstream.counters.bytes_in.fetch_add(bytes_in, Ordering::Relaxed);
            upstream.counters.bytes_out.fetch_add(bytes_out, Ordering::Relaxed);
        }
    }

    /// Not in the moment it comes: that one belongs to the client.
    pub(super) fn measure_first_byte(&self, measured: &mut Measured) {
        if self.first_byte.get().is_none() || self.is_first_byte_measured.replace(true) {
            return;
        }
        let times = Times { first_byte: self.first_byte.get(), ..Times::default() };
        self.measure(measured, times);
    }

    fn measure(&self, measured: &mut Measured, times: Times) {
        if let (Some(pool), Some(life)) = (&*self.pool.borrow(), &*self.upstream.borrow()) {
            measured.record(pool, life, times);
        }
    }

    pub(super) fn order(&self, termination: Termination) {
        self.ordered.set(Some(termination));
        if let Some(waker) = self.waker.take() {
            waker.wake();
        }
    }
}

impl Entry {
    /// Completes when it is ordered to end.
    pub(super) async fn ordered(&self) -> Termination {
        poll_fn(|cx| self.poll_ordered(cx).map_or(Poll::Pending, Poll::Ready)).await
    }
}

impl Observer for Entry {
    fn to_upstream(&self, count: usize) {
        self.bytes_in.set(self.bytes_in.get() + count as u64);
    }

    fn to_client(&self, count: usize) {
        if count > 0 && self.first_byte.get().is_none() {
            self.first_byte.set(Some(self.started.elapsed()));
        }
        self.bytes_out.set(self.bytes_out.get() + count as u64);
    }

    fn awaits_answer(&self) -> bool {
        self.answer.get() == Answer::None
    }

    fn answered(&self, head: &[u8; HEAD_BYTES]) {
        if Rejection::is_unclear(head) {
            return self.answer.set(Answer::Unclear);
        }
        // Without a header a 400 is an answer to the client.
        let rejection = Rejection::of_answer(head).filter(|_| self.has_header.get());
        self.answer.set(rejection.map_or(Answer::Good, Answer::Rejected));
        if let (None, Some(life)) = (rejection, &*self.upstream.borrow()) {
            life.header_taken();
        }
    }

    fn poll_ordered(&self, cx: &mut Context<'_>) -> Option<Termination> {
        let mut waker = self.waker.borrow_mut();
        if waker.as_ref().is_none_or(|waker| !waker.will_wake(cx.waker())) {
            *waker = Some(cx.waker().clone());
        }
        self.ordered.get()
    }
}

/// A connection from its admission to its end. Dropped without `end`, it counts as a panic.
pub struct Record {
    pub(super) shared: Rc<Shared>,
    pub(super) entry: Rc<Entry>,
    index: usize,
    header: Option<&'static str>,
    connect: Option<Duration>,
    attempts: u32,
    in_source: bool,
    ended: bool,
    open: Option<OpenConnection>,
}

impl Record {
    /// Takes over what the connection counts as: one among the listener's, `open` among the process's, and with
    /// `in_source` one among its source's. All are given back at its end. `local` is what the client connected to, or the
    /// wildcard where that isn't known yet.
    pub fn new(
        shared: &Rc<Shared>,
        listener: &Arc<ListenerLife>,
        client: Client,
        local: Address,
        open: Option<OpenConnection>,
        in_source: bool,
    ) -> Record {
        let entry = Rc::new(Entry {
            id: new_id().to_bytes(),
            listener: Arc::clone(listener),
            client,
            local: RefCell::new(local),
            pool: RefCell::default(),
            upstream: RefCell::default(),
            bytes_in: Cell::default(),
            bytes_out: Cell::default(),
            folded_in: Cell::default(),
            folded_out: Cell::default(),
            started: Instant::now(),
            first_byte: Cell::default(),
            is_first_byte_measured: Cell::default(),
            answer: Cell::default(),
            has_header: Cell::default(),
            ended: Cell::default(),
            ordered: Cell::default(),
            waker: RefCell::default(),
        });
        let index = shared.registry.borrow_mut().insert(Rc::clone(&entry));
        let record = Record {
            shared: Rc::clone(shared),
            entry,
            index,
            header: None,
            connect: None,
            attempts: 0,
            in_source,
            ended: false,
            open,
        };
        if shared.with_snapshot(|snapshot| snapshot.log_connections == Some(LogConnections::StartAndEnd)) {
            let (format, now, mut id) = (shared.log.format(), SystemTime::now(), [0; ulid::ULID_LEN]);
            let line = log::connection_start_line(format, now, record.id(&mut id), &listener.name, client);
            shared.log.send(line.as_bytes());
        }
        tracing::debug!(event = "accept", id = %record.ulid(), listener = &*listener.name, %client);
        record
    }

    /// Who connected.
    pub(super) fn client(&self) -> Client {
        self.entry.client
    }

    /// Replaces a wildcard by the address that the client connected to.
    pub fn set_local(&mut self, local: SocketAddr) {
        *self.entry.local.borrow_mut() = local.into();
    }

    /// Who connected, and to what, where both are IP addresses.
    pub(super) fn ends(&self) -> Option<(SocketAddr, SocketAddr)> {
        Some((self.entry.client.ip()?, self.entry.local.borrow().ip()?))
    }

    fn ulid(&self) -> Ulid {
        Ulid::from_bytes(self.entry.id)
    }

    /// This machine could not.
    pub fn lacked(&self, error: &io::Error) {
        self.entry.listener.lacked(error);
    }

    /// Another attempt begins, at this upstream.
    pub(super) fn attempt(&mut self, pool: &Arc<str>, life: &Arc<UpstreamLife>) {
        self.attempts += 1;
        *self.entry.pool.borrow_mut() = Some(Arc::clone(pool));
        *self.entry.upstream.borrow_mut() = Some(Arc::clone(life));
        tracing::debug!(
            event = "attempt", id = %self.ulid(), pool = &**pool, upstream = %life.address, attempt = self.attempts
        );
    }

    /// The attempt came to nothing.
    pub(super) fn attempt_failed(&self, termination: Termination) {
        tracing::debug!(event = "attempt_failed", id = %self.ulid(), attempt = self.attempts, reason = %termination);
    }

    /// The upstream was connected to in this time, and has the header.
    pub(super) fn introduced(&mut self, connect_time: Duration, format: Option<HeaderFormat>) {
        self.connect = Some(connect_time);
        let times = Times { connect: self.connect, ..Times::default() };
        self.entry.measure(&mut self.shared.measured.borrow_mut(), times);
        self.header = Some(format.map_or("off", HeaderFormat::as_str));
        if let Some(format) = format {
            self.entry.has_header.set(true);
            self.entry.listener.headers[format as usize].fetch_add(1, Ordering::Relaxed);
        }
        tracing::debug!(
            event = "introduced", id = %self.ulid(), header = self.header, connect_ms = connect_time.as_secs_f64() * 1000.0
        );
    }

    /// The connection's ULID as text, in `buffer`.
    pub(super) fn id<'a>(&self, buffer: &'a mut [u8; ulid::ULID_LEN]) -> &'a str {
        self.ulid().array_to_str(buffer)
    }

    /// Counts and logs the end.
    pub fn end(mut self, termination: Termination) {
        self.finish(termination);
    }

    fn finish(&mut self, termination: Termination) {
        self.ended = true;
        let listener = &self.entry.listener;
        let duration = self.entry.started.elapsed();
        if self.connect.is_some() {
            let is_measured = self.entry.is_first_byte_measured.replace(true);
            let first_byte = self.entry.first_byte.get().filter(|_| !is_measured);
            let times = Times { connect: None, first_byte, duration: Some(duration) };
            self.entry.measure(&mut self.shared.measured.borrow_mut(), times);
        }
        self.judge(termination, duration);
        // It may be looked at for a while, but nobody wakes it any more.
        self.entry.ended.set(Some((termination, duration)));
        self.entry.waker.take();
        self.entry.fold();
        self.shared.registry.borrow_mut().remove(self.index);
        listener.ended(termination);
        listener.open.fetch_sub(1, Ordering::Relaxed);
        if self.in_source
            && let Some(client) = self.entry.client.ip()
        {
            listener.leave_source(client.ip());
        }
        let wanted = self.shared.with_snapshot(|snapshot| match snapshot.log_connections {
            Some(LogConnections::Off) => false,
            Some(LogConnections::Errors) => !termination.is_regular(),
            _ => true,
        });
        if wanted {
            self.log(termination, duration);
        }
        tracing::debug!(event = "end", id = %self.ulid(), end = %termination);
        self.open = None;
    }

    /// Did the upstream take the header?
    fn judge(&self, termination: Termination, duration: Duration) {
        let rejection = match (self.header, self.entry.answer.get()) {
            (None, _) | (_, Answer::Good | Answer::Unclear) => None,
            (_, Answer::Rejected(rejection)) => Some(rejection),
            (_, Answer::None) => Rejection::of_end(termination, self.entry.bytes_in.get(), duration.as_secs())
                .filter(|_| self.entry.bytes_out.get() == 0),
        };
        if let (Some(rejection), Some(life)) = (rejection, &*self.entry.upstream.borrow()) {
            life.rejected(rejection);
        }
    }

    fn log(&self, termination: Termination, duration: Duration) {
        let (pool, local, upstream) =
            (self.entry.pool.borrow(), self.entry.local.borrow(), self.entry.upstream.borrow());
        let mut id = [0; ulid::ULID_LEN];
        let line = ConnectionLine {
            time: SystemTime::now(),
            id: self.id(&mut id),
            listener: &self.entry.listener.name,
            client: self.entry.client,
            local: (!local.is_unspecified()).then_some(&*local),
            pool: pool.as_deref(),
            upstream: upstream.as_ref().map(|life| &life.address),
            header: self.header,
            bytes_in: self.entry.bytes_in.get(),
            bytes_out: self.entry.bytes_out.get(),
            connect: self.connect,
            first_byte: self.entry.first_byte.get(),
            duration,
            attempts: self.attempts,
            end: termination,
        };
        self.shared.log.send(log::connection_line(self.shared.log.format(), &line).as_bytes());
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        if !self.ended {
            self.finish(Termination::Panic);
        }
    }
}

/// An id that sorts by time; as text 26 ASCII characters.
pub fn new_id() -> Ulid {
    let since_epoch = SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default();
    Ulid::from_parts(since_epoch.as_millis() as u64, fastrand::u128(..))
}
