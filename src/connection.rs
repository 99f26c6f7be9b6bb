//! The life of one TCP connection: pick, connect, introduce, relay, and the record of how it ended.

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, SystemTime};

use arc_swap::ArcSwap;
use tokio::time::{Instant, sleep, timeout};
use ulid::Ulid;

use crate::config::{HeaderFormat, LogConnections};
use crate::control;
use crate::drain::{OpenConnection, OpenConnections};
use crate::log::{self, ConnectionLine};
use crate::net::{self, Stream};
use crate::pool::header::HeaderPlan;
use crate::pool::{Lease, PickError, Picked, Pool, UpstreamLife};
use crate::proxy_protocol::Transport;
use crate::relay::{self, Early, Observer, Scratch};
use crate::snapshot::{Listener, ListenerLife, Snapshot};
use crate::termination::Termination;

/// Before the only upstream there is gets another try.
const RETRY_SAME_DELAY: Duration = Duration::from_millis(100);

/// An attempt that has this much less than `connect_timeout` counts as a whole one.
const DEADLINE_SLACK: Duration = Duration::from_millis(50);

/// What all connections of one worker share.
pub struct Shared {
    cache: RefCell<arc_swap::Cache<Arc<ArcSwap<Snapshot>>, Arc<Snapshot>>>,
    scratch: Scratch,
    header: RefCell<Vec<u8>>,
    registry: RefCell<Registry>,
    sources: Cell<usize>,
    control: control::Handle,
    /// Lines to standard output.
    pub log: log::Sender,
    /// Open connections of the process.
    pub open: Arc<OpenConnections>,
}

impl Shared {
    /// For one worker, on its own thread.
    pub fn new(
        snapshot: Arc<ArcSwap<Snapshot>>,
        open: Arc<OpenConnections>,
        control: control::Handle,
        log: log::Sender,
    ) -> Rc<Shared> {
        Rc::new(Shared {
            cache: RefCell::new(arc_swap::Cache::new(snapshot)),
            scratch: Rc::new(RefCell::new(vec![0; relay::SCRATCH_BYTES])),
            header: RefCell::default(),
            registry: RefCell::default(),
            sources: Cell::new(0),
            control,
            log,
            open,
        })
    }

    /// Reads the snapshot in force.
    pub fn with_snapshot<T>(&self, read: impl FnOnce(&Snapshot) -> T) -> T {
        read(self.cache.borrow_mut().load())
    }

    /// Takes the listener that stands in this slot now. An address that just left the configuration is served as it
    /// last was until it is closed.
    pub fn refresh(&self, slot: usize, listener: &mut Arc<Listener>) {
        self.with_snapshot(|snapshot| {
            if let Some(current) = snapshot.slots.get(&slot)
                && !Arc::ptr_eq(current, listener)
            {
                *listener = Arc::clone(current);
            }
        });
    }

    /// Adds what was carried since the last call to the counters of listeners and upstreams.
    pub fn fold(&self) {
        self.registry.borrow().each(Entry::fold);
    }

    /// Orders connections to end: those of one upstream, or all.
    pub fn end(&self, upstream: Option<&Arc<UpstreamLife>>, termination: Termination) {
        self.registry.borrow().each(|entry| {
            let meant = upstream.is_none_or(|life| {
                entry.upstream.borrow().as_ref().is_some_and(|upstream| Arc::ptr_eq(upstream, life))
            });
            if meant {
                entry.order(termination);
            }
        });
    }
}

/// The open connections of a worker.
#[derive(Default)]
struct Registry {
    entries: Vec<Option<Rc<Entry>>>,
    free: Vec<usize>,
}

impl Registry {
    fn insert(&mut self, entry: Rc<Entry>) -> usize {
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

    fn each(&self, mut visit: impl FnMut(&Entry)) {
        self.entries.iter().flatten().for_each(|entry| visit(entry));
    }
}

/// What others may see of a connection, and say to it.
struct Entry {
    listener: Arc<ListenerLife>,
    upstream: RefCell<Option<Arc<UpstreamLife>>>,
    bytes_in: Cell<u64>,
    bytes_out: Cell<u64>,
    folded_in: Cell<u64>,
    folded_out: Cell<u64>,
    started: Instant,
    first_byte: Cell<Option<Duration>>,
    ordered: Cell<Option<Termination>>,
    waker: RefCell<Option<Waker>>,
}

impl Entry {
    fn fold(&self) {
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

    fn order(&self, termination: Termination) {
        self.ordered.set(Some(termination));
        if let Some(waker) = self.waker.take() {
            waker.wake();
        }
    }
}

impl Entry {
    /// Completes when it is ordered to end.
    async fn ordered(&self) -> Termination {
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
    shared: Rc<Shared>,
    entry: Rc<Entry>,
    index: usize,
    id: String,
    client: SocketAddr,
    local: Option<SocketAddr>,
    pool: Option<Arc<str>>,
    header: Option<&'static str>,
    connect: Option<Duration>,
    attempts: u32,
    in_source: bool,
    ended: bool,
    open: Option<OpenConnection>,
}

impl Record {
    /// Takes over what the connection counts as: one among the listener's, `open` among the process's, and with
    /// `in_source` one among its source's. All are given back at its end.
    pub fn new(
        shared: &Rc<Shared>,
        listener: &Arc<ListenerLife>,
        client: SocketAddr,
        open: Option<OpenConnection>,
        in_source: bool,
    ) -> Record {
        let entry = Rc::new(Entry {
            listener: Arc::clone(listener),
            upstream: RefCell::default(),
            bytes_in: Cell::default(),
            bytes_out: Cell::default(),
            folded_in: Cell::default(),
            folded_out: Cell::default(),
            started: Instant::now(),
            first_byte: Cell::default(),
            ordered: Cell::default(),
            waker: RefCell::default(),
        });
        let index = shared.registry.borrow_mut().insert(Rc::clone(&entry));
        let record = Record {
            shared: Rc::clone(shared),
            entry,
            index,
            id: new_id().to_string(),
            client,
            local: None,
            pool: None,
            header: None,
            connect: None,
            attempts: 0,
            in_source,
            ended: false,
            open,
        };
        if shared.with_snapshot(|snapshot| snapshot.log_connections == Some(LogConnections::StartAndEnd)) {
            let (format, now) = (shared.log.format(), SystemTime::now());
            let line = log::connection_start_line(format, now, &record.id, &listener.name, client);
            shared.log.send(line.as_bytes());
        }
        record
    }

    /// Counts and logs the end.
    pub fn end(mut self, termination: Termination) {
        self.finish(termination);
    }

    fn finish(&mut self, termination: Termination) {
        self.ended = true;
        let listener = &self.entry.listener;
        self.entry.fold();
        self.shared.registry.borrow_mut().remove(self.index);
        listener.ended(termination);
        listener.open.fetch_sub(1, Ordering::Relaxed);
        if self.in_source {
            listener.leave_source(self.client.ip());
        }
        let wanted = self.shared.with_snapshot(|snapshot| match snapshot.log_connections {
            Some(LogConnections::Off) => false,
            Some(LogConnections::Errors) => !termination.is_regular(),
            _ => true,
        });
        if wanted {
            self.log(termination);
        }
        self.open = None;
    }

    fn log(&self, termination: Termination) {
        let line = ConnectionLine {
            time: SystemTime::now(),
            id: &self.id,
            listener: &self.entry.listener.name,
            client: self.client,
            local: self.local,
            pool: self.pool.as_deref(),
            upstream: self.entry.upstream.borrow().as_ref().map(|life| life.address),
            header: self.header,
            bytes_in: self.entry.bytes_in.get(),
            bytes_out: self.entry.bytes_out.get(),
            connect: self.connect,
            first_byte: self.entry.first_byte.get(),
            duration: self.entry.started.elapsed(),
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

/// Serves one admitted connection to its end.
pub async fn serve(client: Stream, bound: SocketAddr, slot: usize, listener: Arc<Listener>, mut record: Record) {
    // A socket bound to one address has that address; only under a wildcard must the kernel be asked.
    let local = if bound.ip().is_unspecified() { client.local_address() } else { Ok(bound) };
    let Ok(local) = local else {
        // The client is gone already, and with it the address.
        record.end(Termination::ClientReset);
        return;
    };
    record.local = Some(local);
    let idle_timeout = listener.config.idle_timeout;
    let mut early = Early::default();
    // Nothing of the snapshot is held after this: it may be replaced a thousand times while bytes flow.
    let reached = reach(&client, local, slot, listener, &mut record, &mut early).await;
    let (upstream, _lease) = match reached {
        Ok(reached) => reached,
        Err(termination) => {
            client.reset();
            record.end(termination);
            return;
        }
    };
    let scratch = Rc::clone(&record.shared.scratch);
    let termination = relay::run(client, upstream, early, idle_timeout, &scratch, &*record.entry).await;
    record.end(termination);
}

/// Connects to an upstream and introduces the client to it; tries others while that may help.
async fn reach(
    client: &Stream,
    local: SocketAddr,
    slot: usize,
    mut listener: Arc<Listener>,
    record: &mut Record,
    early: &mut Early,
) -> Result<(Stream, Lease), Termination> {
    let deadline = Instant::now() + listener.pool.config.connect_deadline;
    let mut attempts = Attempts::default();
    for _ in 0..=listener.pool.config.retries {
        // An attempt may come seconds after the accept: what was taken out since then must not get it.
        record.shared.refresh(slot, &mut listener);
        let mut picked = attempts.pick(&listener.pool);
        if matches!(picked, Err(PickError::Tried)) {
            if Instant::now() + RETRY_SAME_DELAY >= deadline {
                break;
            }
            sleep(RETRY_SAME_DELAY).await;
            record.shared.refresh(slot, &mut listener);
            attempts.tried.clear();
            picked = attempts.pick(&listener.pool);
        }
        let picked = match picked {
            Ok(picked) => picked,
            Err(PickError::None) => return Err(attempts.failure.unwrap_or(Termination::NoUpstream)),
            Err(_) => return Err(attempts.failure.unwrap_or(Termination::UpstreamsFull)),
        };
        match attempt(client, local, &listener, &picked, deadline, record, early).await {
            Ok(upstream) => return Ok((upstream, picked.lease)),
            Err(Termination::StopTimeout) => return Err(Termination::StopTimeout),
            Err(termination) => {
                let life = Arc::clone(picked.lease.life());
                // An order is about this upstream: it is not tried again, but another one may have the connection.
                if record.entry.ordered.take().is_some() {
                    attempts.barred.push(Arc::clone(&life));
                }
                attempts.tried.push(life);
                attempts.failure = Some(termination);
            }
        }
        if Instant::now() >= deadline {
            break;
        }
    }
    Err(attempts.failure.unwrap_or(Termination::UpstreamTimeout))
}

/// Where a connection has been refused so far.
#[derive(Default)]
struct Attempts {
    /// Tried in this round: others come first.
    tried: Vec<Arc<UpstreamLife>>,
    /// Not tried again at all.
    barred: Vec<Arc<UpstreamLife>>,
    /// How the last one failed.
    failure: Option<Termination>,
}

impl Attempts {
    fn pick(&self, pool: &Pool) -> Result<Picked, PickError> {
        if self.tried.is_empty() && self.barred.is_empty() {
            return pool.pick(&[]);
        }
        // By their lives: a reload in between may have moved their indices.
        let excluded =
            |life: &Arc<UpstreamLife>| self.tried.iter().chain(&self.barred).any(|tried| Arc::ptr_eq(tried, life));
        let upstreams = pool.upstreams.iter().enumerate();
        let tried: Vec<usize> =
            upstreams.filter(|(_, upstream)| excluded(&upstream.life)).map(|(index, _)| index).collect();
        pool.pick(&tried)
    }
}

/// One attempt: connect, then introduce.
async fn attempt(
    client: &Stream,
    local: SocketAddr,
    listener: &Listener,
    picked: &Picked,
    deadline: Instant,
    record: &mut Record,
    early: &mut Early,
) -> Result<Stream, Termination> {
    let (pool, life) = (&listener.pool, picked.lease.life());
    record.attempts += 1;
    record.pool = Some(Arc::clone(&pool.name));
    *record.entry.upstream.borrow_mut() = Some(Arc::clone(life));
    let begun = Instant::now();
    let attempt_timeout = pool.config.connect_timeout.min(deadline.duration_since(begun));
    let entry = Rc::clone(&record.entry);
    let upstream = tokio::select! {
        biased;
        termination = entry.ordered() => return Err(termination),
        connected = connect(&record.shared, pool, life, listener.config.keepalive, attempt_timeout) => connected?,
    };
    let connect_time = begun.elapsed();
    let plan = &listener.headers[pool.upstreams[picked.index].entry];
    if introduce(client, &upstream, local, plan, record, early).await.is_err() {
        // Not a byte was taken: another upstream may have the whole.
        count_failure(&record.shared, pool, life);
        return Err(Termination::UpstreamResetHeader);
    }
    life.connect_succeeded();
    record.connect = Some(connect_time);
    record.header = Some(plan.format.map_or("off", HeaderFormat::as_str));
    if let Some(format) = plan.format {
        record.entry.listener.headers[format as usize].fetch_add(1, Ordering::Relaxed);
    }
    Ok(upstream)
}

/// One attempt to connect. Counts its failure against the upstream, unless it was ours.
async fn connect(
    shared: &Shared,
    pool: &Pool,
    life: &Arc<UpstreamLife>,
    keepalive: Option<Duration>,
    attempt_timeout: Duration,
) -> Result<Stream, Termination> {
    let source = next_source(shared, &pool.config.source, life.address);
    let connecting = async {
        let stream = Stream::connect(life.address, source, keepalive)?;
        stream.connected().await?;
        Ok::<Stream, io::Error>(stream)
    };
    let termination = match timeout(attempt_timeout, connecting).await {
        Ok(Ok(stream)) => return Ok(stream),
        Ok(Err(error)) if net::check::is_local(&error) => {
            tracing::debug!(event = "connect_failed", pool = &*pool.name, upstream = %life.address, reason = %error);
            return Err(Termination::LocalResources);
        }
        Ok(Err(error)) => {
            tracing::debug!(event = "connect_failed", pool = &*pool.name, upstream = %life.address, reason = %error);
            match error.kind() {
                io::ErrorKind::TimedOut => Termination::UpstreamTimeout,
                io::ErrorKind::ConnectionRefused | io::ErrorKind::ConnectionReset => Termination::UpstreamRefused,
                _ => Termination::UpstreamUnreachable,
            }
        }
        Err(_) => {
            tracing::debug!(event = "connect_failed", pool = &*pool.name, upstream = %life.address, reason = "timeout");
            // What the deadline cut short says nothing about the upstream. The slack is for an attempt that had all the
            // time there is: connect_timeout may equal connect_deadline.
            if attempt_timeout + DEADLINE_SLACK < pool.config.connect_timeout {
                return Err(Termination::UpstreamTimeout);
            }
            Termination::UpstreamTimeout
        }
    };
    count_failure(shared, pool, life);
    Err(termination)
}

/// Counts it against the upstream, and tells the control thread when there were too many in a row.
pub fn count_failure(shared: &Shared, pool: &Pool, life: &Arc<UpstreamLife>) {
    let in_a_row = life.connect_failed();
    let limit = pool.config.unhealthy_after_failed_connects;
    // At every multiple, not once: a report that found the queue full is repeated soon.
    if limit > 0 && in_a_row.is_multiple_of(limit) {
        shared.control.connects_failed(Arc::clone(life));
    }
}

/// Source addresses of the upstream's family in turn.
pub fn next_source(shared: &Shared, sources: &[IpAddr], upstream: SocketAddr) -> Option<IpAddr> {
    if sources.is_empty() {
        return None;
    }
    let turn = shared.sources.replace(shared.sources.get().wrapping_add(1));
    let fitting = || sources.iter().filter(|source| source.is_ipv4() == upstream.is_ipv4());
    fitting().nth(turn % fitting().count().max(1)).copied()
}

/// Sends the header, and with it what the client has said already, in one write. An error means that the upstream took
/// nothing; what was read of the client is then in `early` for the next one.
async fn introduce(
    client: &Stream,
    upstream: &Stream,
    local: SocketAddr,
    plan: &HeaderPlan,
    record: &Record,
    early: &mut Early,
) -> io::Result<()> {
    let shared = &record.shared;
    poll_fn(|cx| {
        let bytes = &mut *shared.header.borrow_mut();
        bytes.clear();
        plan.encode(record.client, local, Transport::Stream, &record.id, bytes).map_err(io::Error::other)?;
        let header = bytes.len();
        if early.pending.is_empty() && !early.client_eof && !early.client_reset {
            let scratch = &mut *shared.scratch.borrow_mut();
            match client.poll_read(cx, scratch) {
                Poll::Pending => {}
                Poll::Ready(Ok(0)) => early.client_eof = true,
                Poll::Ready(Ok(count)) => bytes.extend_from_slice(&scratch[..count]),
                Poll::Ready(Err(_)) => early.client_reset = true,
            }
        } else {
            bytes.append(&mut early.pending);
        }
        if bytes.is_empty() {
            return Poll::Ready(Ok(()));
        }
        let (written, outcome) = match upstream.poll_write(cx, bytes) {
            Poll::Pending => (0, Ok(())),
            Poll::Ready(Ok(written)) => (written, Ok(())),
            // Only the client's bytes are kept: the next upstream has a header of its own.
            Poll::Ready(Err(error)) => (header, Err(error)),
        };
        if written < bytes.len() {
            early.pending = bytes[written..].to_vec();
        }
        if outcome.is_ok() {
            record.entry.to_upstream(written.saturating_sub(header));
        }
        if bytes.capacity() > relay::SCRATCH_BYTES * 2 {
            *bytes = Vec::new();
        }
        Poll::Ready(outcome)
    })
    .await
}
