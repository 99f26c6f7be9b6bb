//! The life of one TCP connection: pick, connect, introduce, relay.

pub mod measured;
mod record;
pub mod session;
mod tap;

use std::cell::{Cell, RefCell};
use std::future::{Future, poll_fn};
use std::io;
use std::net::IpAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use arc_swap::ArcSwap;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, timeout};

use crate::address::Address;
use crate::control;
use crate::control::view::{self, Filter, Tapped};
use crate::drain::OpenConnections;
use crate::log;
use crate::net::stream::{ConnectOptions, Handshake, Read};
use crate::net::{self, Stream};
use crate::pool::header::HeaderPlan;
use crate::pool::{Lease, PickError, Picked, Pool, UpstreamLife};
use crate::proxy_protocol::Transport;
use crate::relay::{self, Buffers, Early, Observer, Scratch};
use crate::snapshot::{Listener, Snapshot};
use crate::termination::Termination;

use measured::Measured;
use record::Registry;
use session::SessionEntry;
use tap::{Tap, Whose};

pub use record::{Record, new_id};

/// Before the only upstream there is gets another try.
const RETRY_SAME_DELAY: Duration = Duration::from_millis(100);

/// An attempt that has this much less than `connect_timeout` counts as a whole one.
const DEADLINE_SLACK: Duration = Duration::from_millis(50);

/// Sooner than the timers of connections.
const TICK: Duration = Duration::from_millis(500);

/// What all connections of one worker share.
pub struct Shared {
    cache: RefCell<arc_swap::Cache<Arc<ArcSwap<Snapshot>>, Arc<Snapshot>>>,
    scratch: Scratch,
    header: RefCell<Vec<u8>>,
    registry: RefCell<Registry>,
    measured: RefCell<Measured>,
    tap: RefCell<Tap>,
    sources: Cell<usize>,
    accepted: Cell<u64>,
    is_ticking: Cell<bool>,
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
        pipes_max: usize,
    ) -> Rc<Shared> {
        Rc::new(Shared {
            cache: RefCell::new(arc_swap::Cache::new(snapshot)),
            scratch: Buffers::new(pipes_max),
            header: RefCell::default(),
            registry: RefCell::default(),
            measured: RefCell::default(),
            tap: RefCell::default(),
            sources: Cell::new(0),
            accepted: Cell::new(0),
            is_ticking: Cell::new(false),
            control,
            log,
            open,
        })
    }

    /// Told of each connection before its timers are set. A timer that is due before all others wakes the event loop by
    /// a system call, and sends it round once more; one timer that is always sooner spares every connection that.
    pub fn tick(self: &Rc<Shared>) {
        self.accepted.set(self.accepted.get() + 1);
        if self.is_ticking.replace(true) {
            return;
        }
        let shared = Rc::clone(self);
        tokio::task::spawn_local(async move {
            loop {
                let accepted = shared.accepted.get();
                sleep(TICK).await;
                if shared.accepted.get() == accepted {
                    break;
                }
            }
            shared.is_ticking.set(false);
        });
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

    /// Adds what was carried since the last call to the counters of listeners and upstreams, and measures whose first
    /// byte has come.
    pub fn fold(&self) {
        let measured = &mut *self.measured.borrow_mut();
        self.registry.borrow().each(|entry| {
            entry.fold();
            entry.measure_first_byte(measured);
        });
    }

    /// Hands over what was measured, for an empty one.
    pub fn exchange_measured(&self, emptied: Measured) -> Measured {
        self.measured.replace(emptied)
    }

    /// Takes back what nobody waited for.
    pub fn absorb_measured(&self, measured: &Measured) {
        self.measured.borrow_mut().absorb(measured);
    }

    /// A duration of UDP, of one kind of `measured`; `place` as there.
    pub fn measure(
        &self,
        place: &mut usize,
        pool: &Arc<str>,
        life: &Arc<UpstreamLife>,
        kind: usize,
        duration: Duration,
    ) {
        self.measured.borrow_mut().record_one(place, pool, life, kind, duration);
    }

    /// An upstream was sent this header and the first datagram of a session.
    pub fn tap_session(&self, entry: &Rc<SessionEntry>, header: &[u8]) {
        self.tap.borrow_mut().push(Whose::Session(Rc::clone(entry)), header);
    }

    /// Does somebody follow new connections? Then they should be published before they are tapped.
    pub fn is_followed(&self) -> bool {
        self.tap.borrow().is_followed()
    }

    /// Open connections, and how many there are.
    pub fn view(&self, filter: &Filter) -> (Vec<view::Connection>, usize) {
        self.registry.borrow().view(filter)
    }

    /// The last connections and sessions with their headers, the newest first of each.
    pub fn last_tapped(&self, filter: &Filter) -> Vec<Tapped> {
        self.tap.borrow().last(filter)
    }

    /// Sends each connection that reaches an upstream from now on.
    pub fn follow(&self, filter: Filter, sender: mpsc::Sender<Tapped>) {
        self.tap.borrow_mut().follow(filter, sender);
    }

    /// Orders the connection of this id to end; is it there?
    pub fn end_one(&self, id: &str) -> bool {
        self.registry.borrow().end_one(id)
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

/// Serves one admitted connection to its end.
///
/// Not an `async fn`: those keep a second copy of their arguments for as long as they run.
#[expect(clippy::manual_async_fn, reason = "said above")]
pub fn serve(client: Stream, slot: usize, listener: Arc<Listener>, mut record: Record) -> impl Future<Output = ()> {
    async move {
        // Boxed: what is needed to get through to an upstream is not carried along while bytes flow. Nothing of the
        // snapshot is held after it: it may be replaced a thousand times by then.
        let mut reached = match Box::pin(reach(&client, slot, listener, &mut record)).await {
            Ok(reached) => reached,
            Err(termination) => {
                client.reset_when_closed();
                drop(client);
                record.end(termination);
                return;
            }
        };
        let early = std::mem::take(&mut reached.early);
        let (scratch, entry) = (&record.shared.scratch, &*record.entry);
        let relayed = relay::run(&client, &reached.upstream, early, reached.idle_timeout, scratch, entry);
        let termination = relayed.await;
        // Closed before the end is told: who reads of it finds it so.
        drop((client, reached));
        record.end(termination);
    }
}

/// An upstream that knows who the client is.
struct Reached {
    upstream: Stream,
    /// Counts among the upstream's open connections until dropped.
    _lease: Lease,
    early: Early,
    idle_timeout: Duration,
}

/// Connects to an upstream and introduces the client to it; tries others while that may help.
async fn reach(
    client: &Stream,
    slot: usize,
    mut listener: Arc<Listener>,
    record: &mut Record,
) -> Result<Reached, Termination> {
    let mut early = Early::default();
    let deadline = Instant::now() + listener.pool.config.connect_deadline;
    let mut attempts = Attempts::default();
    let client_ip = record.client().ip().map(|client| client.ip());
    for _ in 0..=listener.pool.config.retries {
        // An attempt may come seconds after the accept: what was taken out since then must not get it.
        record.shared.refresh(slot, &mut listener);
        let mut picked = attempts.pick(client_ip, &listener.pool);
        if matches!(picked, Err(PickError::Tried)) {
            if Instant::now() + RETRY_SAME_DELAY >= deadline {
                break;
            }
            sleep(RETRY_SAME_DELAY).await;
            attempts.obey(record.entry.ordered.take())?;
            record.shared.refresh(slot, &mut listener);
            attempts.tried.clear();
            picked = attempts.pick(client_ip, &listener.pool);
        }
        let picked = match picked {
            Ok(picked) => picked,
            Err(PickError::None) => return Err(attempts.failure.unwrap_or(Termination::NoUpstream)),
            Err(_) => return Err(attempts.failure.unwrap_or(Termination::UpstreamsFull)),
        };
        let pool = &listener.pool;
        let attempt = Attempt {
            client,
            pool,
            life: picked.lease.life(),
            plan: &listener.headers[pool.upstreams[picked.index].entry],
            keepalive: listener.config.keepalive,
            timeout: pool.config.connect_timeout.min(deadline.duration_since(Instant::now())),
        };
        match attempt.run(record, &mut early).await {
            Ok(upstream) => {
                let idle_timeout = listener.config.idle_timeout;
                return Ok(Reached { upstream, _lease: picked.lease, early, idle_timeout });
            }
            Err(Failure { termination, may_retry: false }) => return Err(termination),
            Err(Failure { termination, .. }) => {
                record.attempt_failed(termination);
                attempts.tried.push(Arc::clone(picked.lease.life()));
                attempts.failure = Some(termination);
                attempts.obey(record.entry.ordered.take())?;
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
    /// An order ends the connection; or it is about the upstream that was tried last: that one is not tried again, but
    /// another one may have the connection.
    fn obey(&mut self, ordered: Option<Termination>) -> Result<(), Termination> {
        match ordered {
            Some(termination) if !Failure::from(termination).may_retry => Err(termination),
            Some(_) => {
                self.barred.extend(self.tried.last().cloned());
                Ok(())
            }
            None => Ok(()),
        }
    }

    fn pick(&self, client: Option<IpAddr>, pool: &Pool) -> Result<Picked, PickError> {
        if self.tried.is_empty() && self.barred.is_empty() {
            return pool.pick(client, &[]);
        }
        // By their lives: a reload in between may have moved their indices.
        let excluded =
            |life: &Arc<UpstreamLife>| self.tried.iter().chain(&self.barred).any(|tried| Arc::ptr_eq(tried, life));
        let upstreams = pool.upstreams.iter().enumerate();
        let tried: Vec<usize> =
            upstreams.filter(|(_, upstream)| excluded(&upstream.life)).map(|(index, _)| index).collect();
        pool.pick(client, &tried)
    }
}

/// One attempt at one upstream: connect, then introduce. With TCP Fast Open the introduction is what connects.
struct Attempt<'a> {
    client: &'a Stream,
    pool: &'a Pool,
    life: &'a Arc<UpstreamLife>,
    plan: &'a HeaderPlan,
    keepalive: Option<Duration>,
    timeout: Duration,
}

/// How an attempt failed.
struct Failure {
    termination: Termination,
    /// Another upstream may have the connection.
    may_retry: bool,
}

impl From<Termination> for Failure {
    fn from(termination: Termination) -> Failure {
        Failure { termination, may_retry: !matches!(termination, Termination::StopTimeout | Termination::Ended) }
    }
}

/// What went out with the SYN.
struct Sent {
    /// The client's bytes among it, kept until the connection is established.
    client_bytes: Vec<u8>,
    /// How many of them the kernel took.
    count: usize,
}

impl Attempt<'_> {
    async fn run(&self, record: &mut Record, early: &mut Early) -> Result<Stream, Failure> {
        record.attempt(&self.pool.name, self.life);
        let begun = Instant::now();
        let entry = Rc::clone(&record.entry);
        let mut sent = None;
        let connected = tokio::select! {
            biased;
            termination = entry.ordered() => Err(Failure::from(termination)),
            connected = self.connect(record, early, &mut sent) => connected,
            () = self.client.error() => Err(Failure { termination: Termination::ClientReset, may_retry: false }),
        };
        let upstream = match connected {
            Ok(upstream) => upstream,
            Err(mut failure) => {
                if let Some(sent) = sent {
                    // Only a refusal says that the client's bytes, sent along with the SYN, were not taken.
                    failure.may_retry &=
                        sent.client_bytes.is_empty() || failure.termination == Termination::UpstreamRefused;
                    // The next upstream has a header of its own.
                    early.pending = sent.client_bytes;
                }
                return Err(failure);
            }
        };
        let connect_time = begun.elapsed();
        let count = match sent {
            Some(sent) => sent.count,
            None => match self.introduce(&upstream, Handshake::Begun, record, early).await {
                Ok(sent) => sent.count,
                Err(_) => {
                    // Not a byte was taken: another upstream may have the whole.
                    count_failure(&record.shared, self.pool, self.life);
                    return Err(Termination::UpstreamResetHeader.into());
                }
            },
        };
        self.life.connect_succeeded();
        record.introduced(connect_time, self.plan.format);
        record.entry.to_upstream(count);
        Ok(upstream)
    }

    /// Counts a failure against the upstream, unless it was ours.
    async fn connect(&self, record: &Record, early: &mut Early, sent: &mut Option<Sent>) -> Result<Stream, Failure> {
        let (pool, address) = (&*self.pool.name, &self.life.address);
        let options = ConnectOptions {
            source: next_source(&record.shared, &self.pool.config.source, address),
            keepalive: self.keepalive,
            fast_open: self.pool.config.fast_open,
            writes_at_once: self.plan.format.is_some(),
        };
        let connecting = async {
            let (stream, handshake) = Stream::connect(address, &options)?;
            if handshake == Handshake::WithFirstWrite {
                *sent = Some(self.introduce(&stream, handshake, record, early).await?);
            }
            stream.connected(handshake).await?;
            Ok::<Stream, io::Error>(stream)
        };
        let termination = match timeout(self.timeout, connecting).await {
            Ok(Ok(stream)) => return Ok(stream),
            Ok(Err(error)) if net::check::is_local(&error) => {
                tracing::debug!(event = "connect_failed", pool, upstream = %address, reason = %error);
                record.lacked(&error);
                return Err(Termination::LocalResources.into());
            }
            Ok(Err(error)) => {
                tracing::debug!(event = "connect_failed", pool, upstream = %address, reason = %error);
                match error.kind() {
                    io::ErrorKind::TimedOut => Termination::UpstreamTimeout,
                    io::ErrorKind::ConnectionRefused | io::ErrorKind::ConnectionReset => Termination::UpstreamRefused,
                    _ => Termination::UpstreamUnreachable,
                }
            }
            Err(_) => {
                tracing::debug!(event = "connect_failed", pool, upstream = %address, reason = "timeout");
                Termination::UpstreamTimeout
            }
        };
        // What the deadline cut short says nothing about the upstream. The slack is for an attempt that had all the
        // time there is: connect_timeout may equal connect_deadline.
        if termination != Termination::UpstreamTimeout
            || self.timeout + DEADLINE_SLACK >= self.pool.config.connect_timeout
        {
            count_failure(&record.shared, self.pool, self.life);
        }
        Err(termination.into())
    }

    /// Sends the header, and with it what the client has said already, in one write. An error means that the upstream
    /// took nothing; what was read of the client is then in `early` for the next one.
    async fn introduce(
        &self,
        upstream: &Stream,
        handshake: Handshake,
        record: &Record,
        early: &mut Early,
    ) -> io::Result<Sent> {
        let shared = &record.shared;
        let is_first = handshake == Handshake::WithFirstWrite;
        poll_fn(|cx| {
            let bytes = &mut *shared.header.borrow_mut();
            bytes.clear();
            let mut id = [0; ulid::ULID_LEN];
            self.plan.encode(record.ends(), Transport::Stream, record.id(&mut id), bytes).map_err(io::Error::other)?;
            let header = bytes.len();
            if early.pending.is_empty() && !early.client_eof && !early.client_reset {
                let scratch = &mut shared.scratch.borrow_mut().bytes;
                let read = if is_first { self.client.read_now(scratch) } else { self.client.poll_read(cx, scratch) };
                match read {
                    Poll::Pending => {}
                    Poll::Ready(Ok(Read { count, is_last })) => {
                        bytes.extend_from_slice(&scratch[..count]);
                        early.client_eof = is_last;
                    }
                    Poll::Ready(Err(_)) => early.client_reset = true,
                }
            } else {
                bytes.append(&mut early.pending);
            }
            let client_bytes = if is_first { bytes[header..].to_vec() } else { Vec::new() };
            // The SYN goes out with an empty write, too.
            if bytes.is_empty() && !is_first {
                return Poll::Ready(Ok(Sent { client_bytes, count: 0 }));
            }
            let written = if is_first { upstream.write_now(bytes) } else { upstream.poll_write(cx, bytes) };
            let (written, outcome) = match written {
                Poll::Pending => (0, Ok(0)),
                Poll::Ready(Ok(written)) => (written, Ok(written.saturating_sub(header))),
                // Only the client's bytes are kept: the next upstream has a header of its own.
                Poll::Ready(Err(error)) => (header, Err(error)),
            };
            if written < bytes.len() {
                early.pending = bytes[written..].to_vec();
            }
            if outcome.is_ok() {
                shared.tap.borrow_mut().push(Whose::Connection(Rc::clone(&record.entry)), &bytes[..header]);
            }
            if bytes.capacity() > relay::SCRATCH_BYTES * 2 {
                *bytes = Vec::new();
            }
            Poll::Ready(outcome.map(|count| Sent { client_bytes, count }))
        })
        .await
    }
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
pub fn next_source(shared: &Shared, sources: &[IpAddr], upstream: &Address) -> Option<IpAddr> {
    let upstream = upstream.ip().filter(|_| !sources.is_empty())?;
    let turn = shared.sources.replace(shared.sources.get().wrapping_add(1));
    let fitting = || sources.iter().filter(|source| source.is_ipv4() == upstream.is_ipv4());
    fitting().nth(turn % fitting().count().max(1)).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn size_of_future<A, B, C, D, F: Future>(_: impl Fn(A, B, C, D) -> F) -> usize {
        size_of::<F>()
    }

    /// With what tokio adds, it is allocated in steps of 128 bytes: the next one begins at 632.
    #[test]
    fn an_idle_connection_is_small() {
        assert!(size_of_future(serve) <= 632, "{} bytes", size_of_future(serve));
    }
}
