//! Bytes both ways between two sockets: half-close kept, resets passed on after what was read before them, nothing
//! buffered while both sides keep up. Small messages are copied through the worker's scratch buffer, bulk is spliced
//! through a pipe; each direction changes between the two as its traffic does.

use std::cell::RefCell;
use std::future::poll_fn;
use std::io;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::time::{Instant, Sleep, sleep, sleep_until};

use crate::net::Stream;
use crate::net::splice::{self, Pipe, Pipes};
use crate::net::stream::{ErrorWatch, Read};
use crate::pool::rejection::HEAD_BYTES;
use crate::termination::Termination;

/// The worker's buffers, shared by all its connections; never held across an await.
pub type Scratch = Rc<RefCell<Buffers>>;

/// What a worker moves bytes with.
pub struct Buffers {
    /// For one read.
    pub bytes: Box<[u8]>,
    /// For bulk.
    pub pipes: Pipes,
}

impl Buffers {
    /// With room for `pipes_max` pipes: none, and all bytes are copied.
    pub fn new(pipes_max: usize) -> Scratch {
        let bytes = vec![0; SCRATCH_BYTES].into_boxed_slice();
        Rc::new(RefCell::new(Buffers { bytes, pipes: Pipes::new(pipes_max) }))
    }
}

/// Size of the scratch buffer: what one read can take, and the most that a connection holds back per direction.
pub const SCRATCH_BYTES: usize = 64 * 1024;

/// Bytes that one direction moves before the worker's other tasks have a turn.
const BYTES_PER_POLL: usize = 1024 * 1024;
/// The same for messages.
const READS_PER_POLL: usize = 16;

/// A read of at least this many bytes is bulk.
const BULK_BYTES: usize = 32 * 1024;
/// Bulk reads in a row before a direction splices.
const BULK_READS: u8 = 2;
/// Less than this through a pipe is not worth it.
const SMALL_BYTES: usize = 16 * 1024;
/// Small transfers in a row before a direction copies again.
const SMALL_TRANSFERS: u8 = 4;

/// A connection that lives for this long gets keepalive probes towards its upstream.
const KEEPALIVE_AFTER: Duration = Duration::from_secs(5);

/// A reset is passed on at the latest when the other side took nothing for this long.
const RESET_STALL_MAX: Duration = Duration::from_secs(1);
/// Between looks at what the other side has not acknowledged yet.
const RESET_POLL: Duration = Duration::from_millis(10);

/// What the outside may see and say while bytes flow.
pub trait Observer {
    /// `count` more bytes were written to the upstream.
    fn to_upstream(&self, count: usize);
    /// `count` more bytes were written to the client.
    fn to_client(&self, count: usize);
    /// Is nothing known yet of what the upstream answered?
    fn awaits_answer(&self) -> bool;
    /// The first bytes of the answer, zeros after them; once.
    fn answered(&self, head: &[u8; HEAD_BYTES]);
    /// Ordered to end; called at each wake-up, keeps the waker for the order.
    fn poll_ordered(&self, cx: &mut Context<'_>) -> Option<Termination>;
}

/// One direction: what was read and did not fit yet, and how far the close has come.
#[derive(Debug, Default)]
struct Direction {
    pending: Vec<u8>,
    written: usize,
    mode: Mode,
    /// Lent while it holds bytes, or while there are more to come.
    pipe: Option<Box<Pipe>>,
    eof: bool,
    /// The end was passed on, or never will be.
    is_shut: bool,
}

/// How the next bytes are moved.
#[derive(Clone, Copy, Debug)]
enum Mode {
    /// Through the scratch buffer, after so many bulk reads in a row.
    Copy(u8),
    /// Through a pipe, after so many small transfers in a row.
    Splice(u8),
}

impl Default for Mode {
    fn default() -> Mode {
        Mode::Copy(0)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Side {
    Client,
    Upstream,
}

/// Why bytes stopped flowing.
enum Stopped {
    /// Both directions came to their end in good order.
    Finished,
    /// A side was reset; what it sent before is still to be delivered.
    Reset(Side),
    /// Idle for too long, or ordered to end.
    Ended(Termination),
}

/// What was already taken from the client and could not be written with the header, and whether it closed since.
#[derive(Debug, Default)]
pub struct Early {
    /// For the upstream, before anything read from now on.
    pub pending: Vec<u8>,
    /// The client has sent its FIN.
    pub client_eof: bool,
    /// The client was reset.
    pub client_reset: bool,
}

/// Carries bytes until both sides are done, one is reset, or it is ordered to end. Whatever end is not a regular one
/// leaves both to be reset when they are dropped: neither may take what it has for the whole.
///
/// Not an `async fn`: those keep a second copy of their arguments, and this future waits for as long as its connection.
pub fn run<'a, O: Observer>(
    client: &'a Stream,
    upstream: &'a Stream,
    early: Early,
    idle_timeout: Duration,
    scratch: &'a Scratch,
    observer: &'a O,
) -> impl Future<Output = Termination> + use<'a, O> {
    let mut relay = Relay {
        client,
        upstream,
        up: Direction { pending: early.pending, eof: early.client_eof, ..Direction::default() },
        down: Direction::default(),
        first_eof: early.client_eof.then_some(Side::Client),
        is_reset: early.client_reset,
        client_watch: None,
        upstream_watch: None,
        last_active: Instant::now(),
        idle_timeout,
        scratch,
        observer,
    };
    async move {
        let stopped = if relay.is_reset {
            Stopped::Reset(Side::Client)
        } else {
            let mut idle = pin!(sleep_until(relay.last_active + relay.idle_timeout.min(KEEPALIVE_AFTER)));
            poll_fn(|cx| relay.poll(cx, idle.as_mut())).await
        };
        let termination = match stopped {
            Stopped::Finished if relay.first_eof == Some(Side::Client) => return Termination::ClientClosed,
            Stopped::Finished => return Termination::UpstreamClosed,
            Stopped::Reset(side) => {
                // Boxed, because it is rare, and as large as all the rest.
                Box::pin(relay.deliver_rest(side)).await;
                match side {
                    Side::Client => Termination::ClientReset,
                    Side::Upstream => Termination::UpstreamReset,
                }
            }
            Stopped::Ended(termination) => termination,
        };
        relay.client.reset_when_closed();
        relay.upstream.reset_when_closed();
        termination
    }
}

struct Relay<'a, O> {
    client: &'a Stream,
    upstream: &'a Stream,
    up: Direction,
    down: Direction,
    first_eof: Option<Side>,
    /// Was the client reset before there was anything to relay?
    is_reset: bool,
    /// Kept once made: a side that isn't being read would not tell of its reset otherwise.
    client_watch: Option<ErrorWatch<'a>>,
    upstream_watch: Option<ErrorWatch<'a>>,
    last_active: Instant,
    idle_timeout: Duration,
    scratch: &'a Scratch,
    observer: &'a O,
}

/// What one look at a direction brought.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Progress {
    /// Nothing more to do now.
    Waiting,
    /// The budget is used up: more may be there.
    Busy,
    /// Everything was delivered; the end may be passed on.
    Done,
}

impl<'a, O: Observer> Relay<'a, O> {
    fn poll(&mut self, cx: &mut Context<'_>, mut idle: Pin<&mut Sleep>) -> Poll<Stopped> {
        if let Some(termination) = self.observer.poll_ordered(cx) {
            return Poll::Ready(Stopped::Ended(termination));
        }
        let buffers = &mut *self.scratch.borrow_mut();
        let mut up_moved = Moved::default();
        let up = self.up.poll(cx, self.client, self.upstream, buffers, &mut up_moved);
        self.observer.to_upstream(up_moved.bytes);
        let up = match up {
            Ok(progress) => progress,
            Err(End::Read) => return Poll::Ready(Stopped::Reset(Side::Client)),
            Err(End::Write) => return Poll::Ready(Stopped::Reset(Side::Upstream)),
        };
        let mut down_moved = Moved { bytes: 0, head: self.observer.awaits_answer().then(Head::default) };
        let down = self.down.poll(cx, self.upstream, self.client, buffers, &mut down_moved);
        self.observer.to_client(down_moved.bytes);
        if let Some(head) = down_moved.head.filter(|head| head.is_read) {
            self.observer.answered(&head.bytes);
        }
        let down = match down {
            Ok(progress) => progress,
            Err(End::Read) => return Poll::Ready(Stopped::Reset(Side::Upstream)),
            Err(End::Write) => return Poll::Ready(Stopped::Reset(Side::Client)),
        };
        if self.first_eof.is_none() {
            self.first_eof = match (self.up.eof, self.down.eof) {
                (true, _) => Some(Side::Client),
                (_, true) => Some(Side::Upstream),
                _ => None,
            };
        }
        if (up, down) == (Progress::Done, Progress::Done) {
            // Closing the sockets passes on the last end.
            return Poll::Ready(Stopped::Finished);
        }
        if up == Progress::Done {
            self.up.shut(self.upstream);
        }
        if down == Progress::Done {
            self.down.shut(self.client);
        }
        if up_moved.bytes + down_moved.bytes > 0 {
            self.last_active = Instant::now();
        }
        if up == Progress::Busy || down == Progress::Busy {
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        if !self.up.is_reading() && watch(&mut self.client_watch, self.client, cx) {
            return Poll::Ready(Stopped::Reset(Side::Client));
        }
        if !self.down.is_reading() && watch(&mut self.upstream_watch, self.upstream, cx) {
            return Poll::Ready(Stopped::Reset(Side::Upstream));
        }
        while idle.as_mut().poll(cx).is_ready() {
            // Should it fail, a peer that vanished is noticed by the idle timeout alone.
            let _ = self.upstream.keep_alive();
            let deadline = self.last_active + self.idle_timeout;
            if deadline <= Instant::now() {
                return Poll::Ready(Stopped::Ended(Termination::IdleTimeout));
            }
            idle.as_mut().reset(deadline);
        }
        Poll::Pending
    }

    /// `side` was reset. What it had sent before still goes to the other side, as long as that one takes it.
    async fn deliver_rest(&mut self, side: Side) {
        let (from, to) = match side {
            Side::Client => (self.client, self.upstream),
            Side::Upstream => (self.upstream, self.client),
        };
        let (mut is_read, mut least, mut since) = (false, usize::MAX, Instant::now());
        // No FIN follows: no bytes wait for it.
        (self.up.is_shut, self.down.is_shut) = (true, true);
        loop {
            let mut moved = Moved::default();
            let (progress, ordered) = poll_fn(|cx| {
                let direction = if side == Side::Client { &mut self.up } else { &mut self.down };
                let progress = direction.poll(cx, from, to, &mut self.scratch.borrow_mut(), &mut moved);
                if matches!(progress, Err(End::Read)) {
                    // All that it sent was read; what is pending still has to go.
                    direction.eof = true;
                }
                Poll::Ready((progress, self.observer.poll_ordered(cx)))
            })
            .await;
            match side {
                Side::Client => self.observer.to_upstream(moved.bytes),
                Side::Upstream => self.observer.to_client(moved.bytes),
            }
            match progress {
                Ok(Progress::Done) => is_read = true,
                Ok(Progress::Waiting) => {}
                Ok(Progress::Busy) | Err(End::Read) => {
                    (least, since) = (usize::MAX, Instant::now());
                    tokio::task::yield_now().await;
                    continue;
                }
                Err(End::Write) => return,
            }
            let unacknowledged = to.unacknowledged().unwrap_or(0);
            if ordered.is_some() || is_read && unacknowledged == 0 {
                return;
            }
            // One clock for what could not be written and for what was not acknowledged: the other side takes it, or
            // it does not.
            if moved.bytes > 0 || unacknowledged < least {
                (least, since) = (unacknowledged, Instant::now());
            } else if since.elapsed() >= RESET_STALL_MAX {
                return;
            }
            sleep(RESET_POLL).await;
        }
    }
}

fn watch<'a>(watch: &mut Option<ErrorWatch<'a>>, stream: &'a Stream, cx: &mut Context<'_>) -> bool {
    watch.get_or_insert_with(|| stream.error_watch()).as_mut().poll(cx).is_ready()
}

/// What one look at a direction moved.
#[derive(Debug, Default)]
struct Moved {
    bytes: usize,
    /// Filled in, if it is wanted.
    head: Option<Head>,
}

/// The beginning of a first read.
#[derive(Debug, Default)]
struct Head {
    bytes: [u8; HEAD_BYTES],
    is_read: bool,
}

/// Which end of a direction failed.
enum End {
    Read,
    Write,
}

impl Direction {
    fn is_reading(&self) -> bool {
        self.pending.is_empty() && self.pipe.is_none() && !self.eof
    }

    /// Moves what can be moved. Never reads while something is pending: back-pressure is the kernel's buffers.
    /// `moved` grows by what was written, also before an error.
    fn poll(
        &mut self,
        cx: &mut Context<'_>,
        from: &Stream,
        to: &Stream,
        buffers: &mut Buffers,
        moved: &mut Moved,
    ) -> Result<Progress, End> {
        for _ in 0..READS_PER_POLL {
            match self.poll_flush(cx, to, &mut buffers.pipes, moved) {
                Poll::Pending => return Ok(Progress::Waiting),
                Poll::Ready(Err(_)) => return Err(End::Write),
                Poll::Ready(Ok(())) => {}
            }
            if self.eof {
                self.give_back(&mut buffers.pipes);
                return Ok(Progress::Done);
            }
            if moved.bytes >= BYTES_PER_POLL {
                break;
            }
            let read = match self.mode {
                Mode::Copy(bulk) => self.poll_copy(cx, from, to, &mut buffers.bytes, bulk, moved)?,
                Mode::Splice(small) => self.poll_fill(cx, from, &mut buffers.pipes, small)?,
            };
            if read.is_pending() {
                self.give_back(&mut buffers.pipes);
                return Ok(Progress::Waiting);
            }
        }
        Ok(Progress::Busy)
    }

    /// Reads once, and writes at once what was read.
    fn poll_copy(
        &mut self,
        cx: &mut Context<'_>,
        from: &Stream,
        to: &Stream,
        bytes: &mut [u8],
        bulk: u8,
        moved: &mut Moved,
    ) -> Result<Poll<()>, End> {
        let count = match from.poll_read(cx, bytes) {
            Poll::Pending => return Ok(Poll::Pending),
            Poll::Ready(Err(_)) => return Err(End::Read),
            Poll::Ready(Ok(Read { count, is_last })) => {
                self.eof = is_last;
                count
            }
        };
        if count == 0 {
            return Ok(Poll::Ready(()));
        }
        if let Some(head) = moved.head.as_mut().filter(|head| !head.is_read) {
            let seen = count.min(HEAD_BYTES);
            head.bytes[..seen].copy_from_slice(&bytes[..seen]);
            head.is_read = true;
        }
        self.mode = match bulk + 1 {
            _ if count < BULK_BYTES => Mode::Copy(0),
            BULK_READS if !from.has_urgent_data() => Mode::Splice(0),
            reads => Mode::Copy(reads.min(BULK_READS - 1)),
        };
        let bytes = &bytes[..count];
        let with_fin = self.eof && !self.is_shut;
        let written = match if with_fin { to.poll_write_last(cx, bytes) } else { to.poll_write(cx, bytes) } {
            Poll::Pending => 0,
            Poll::Ready(Err(_)) => return Err(End::Write),
            Poll::Ready(Ok(written)) => written,
        };
        moved.bytes += written;
        if written < count {
            self.pending = bytes[written..].to_vec();
            self.written = 0;
        }
        Ok(Poll::Ready(()))
    }

    /// Fills the empty pipe; changes to copying where a pipe does not help.
    fn poll_fill(
        &mut self,
        cx: &mut Context<'_>,
        from: &Stream,
        pipes: &mut Pipes,
        small: u8,
    ) -> Result<Poll<()>, End> {
        let Some(mut pipe) = self.pipe.take().or_else(|| pipes.lend()) else {
            self.mode = Mode::Copy(0);
            return Ok(Poll::Ready(()));
        };
        let filled = from.poll_fill(cx, &mut pipe);
        self.pipe = Some(pipe);
        match filled {
            // The pipe never gets past an urgent mark, a read does.
            Poll::Pending if from.has_urgent_data() => self.mode = Mode::Copy(0),
            Poll::Pending => return Ok(Poll::Pending),
            Poll::Ready(Ok(0)) => self.eof = true,
            Poll::Ready(Ok(SMALL_BYTES..)) => self.mode = Mode::Splice(0),
            Poll::Ready(Ok(_)) if small + 1 == SMALL_TRANSFERS => self.mode = Mode::Copy(0),
            Poll::Ready(Ok(_)) => self.mode = Mode::Splice(small + 1),
            Poll::Ready(Err(error)) if !splice::is_trouble(&error) => return Err(End::Read),
            // Whatever the pipe's trouble is, a read can do without one.
            Poll::Ready(Err(_)) => {
                self.pipe = None;
                self.mode = Mode::Copy(0);
            }
        }
        Ok(Poll::Ready(()))
    }

    /// Writes all that was read and did not fit yet.
    fn poll_flush(
        &mut self,
        cx: &mut Context<'_>,
        to: &Stream,
        pipes: &mut Pipes,
        moved: &mut Moved,
    ) -> Poll<io::Result<()>> {
        while let Some(pipe) = &mut self.pipe
            && pipe.held() > 0
        {
            match ready!(to.poll_drain(cx, pipe)) {
                Ok(count) => moved.bytes += count,
                Err(error) if !splice::is_trouble(&error) => return Poll::Ready(Err(error)),
                Err(_) => {
                    (self.pending, self.written) = (pipe.take()?, 0);
                    self.mode = Mode::Copy(0);
                }
            }
        }
        if matches!(self.mode, Mode::Copy(_)) {
            self.give_back(pipes);
        }
        if self.pending.is_empty() {
            return Poll::Ready(Ok(()));
        }
        while self.written < self.pending.len() {
            let count = ready!(to.poll_write(cx, &self.pending[self.written..]))?;
            self.written += count;
            moved.bytes += count;
        }
        (self.pending, self.written) = (Vec::new(), 0);
        Poll::Ready(Ok(()))
    }

    /// Passes on the end of the stream, once.
    fn shut(&mut self, to: &Stream) {
        if !std::mem::replace(&mut self.is_shut, true) {
            // A peer that is gone answers the next call on its socket; here there is nobody to tell.
            let _ = to.shutdown_write();
        }
    }

    fn give_back(&mut self, pipes: &mut Pipes) {
        if let Some(pipe) = self.pipe.take() {
            pipes.give_back(pipe);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};

    use super::*;
    use crate::net::stream::tests::{pair, segments};

    struct Nobody;

    impl Observer for Nobody {
        fn to_upstream(&self, _: usize) {}

        fn to_client(&self, _: usize) {}

        fn awaits_answer(&self) -> bool {
            false
        }

        fn answered(&self, _: &[u8; HEAD_BYTES]) {}

        fn poll_ordered(&self, _: &mut Context<'_>) -> Option<Termination> {
            None
        }
    }

    #[tokio::test(flavor = "current_thread")]
    async fn an_answer_and_the_end_after_it_reach_the_client_in_one_segment() {
        let (client, mut client_peer) = pair(true).await;
        let (upstream, mut upstream_peer) = pair(true).await;
        let before = segments(&client_peer);
        upstream_peer.write_all(b"answer").unwrap();
        upstream_peer.shutdown(std::net::Shutdown::Write).unwrap();
        let asking = std::thread::spawn(move || {
            let mut answer = Vec::new();
            client_peer.read_to_end(&mut answer).unwrap();
            let segments = segments(&client_peer) - before;
            // The client has the last word, after the end of the answer.
            client_peer.write_all(b"thanks").unwrap();
            (answer, segments)
        });
        let scratch = Buffers::new(1);
        let ended = run(&client, &upstream, Early::default(), Duration::from_secs(60), &scratch, &Nobody).await;
        assert_eq!(ended, Termination::UpstreamClosed);
        assert_eq!(asking.join().unwrap(), (b"answer".to_vec(), 1));
        drop((client, upstream));
        let mut thanks = Vec::new();
        upstream_peer.read_to_end(&mut thanks).unwrap();
        assert_eq!(thanks, b"thanks");
    }
}
