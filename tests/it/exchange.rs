//! Both ends of a connection through the balancer in one thread's hands, each with a script: what it sends and when,
//! how it reads, how it ends. Every byte is compared as it comes, and the end with what the scripts say.

use std::collections::VecDeque;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use preface::net::stream::unacknowledged;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::support::{Balancer, DEADLINE};
use crate::traffic::{Lane, accept, noise, reset};

/// What one end does, one after the other; it reads all the time.
#[derive(Clone, Copy, Debug)]
pub enum Step {
    /// Sends so many bytes, at most `piece` of them in one write.
    Send { bytes: usize, piece: usize },
    /// Waits until the other end has read all that was sent.
    Delivered,
    /// Waits until this end has read so many bytes in all.
    Heard(usize),
    /// Waits until the other end has finished speaking.
    HeardEnd,
    /// Says nothing for a while.
    Pause(Duration),
    /// Finishes speaking.
    Shut,
    /// Closes with RST; if `taken`, after the balancer's machine has all that was sent.
    Reset { taken: bool },
}

/// How an end reads.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    /// Size of one read.
    pub piece: usize,
    /// Before the first read.
    pub first: Duration,
    /// After each read.
    pub pause: Duration,
}

impl Pace {
    /// As fast as it comes.
    pub const FAST: Pace = Pace { piece: BUFFER_BYTES, first: Duration::ZERO, pause: Duration::ZERO };
}

/// One end's script.
#[derive(Clone, Debug)]
pub struct Script {
    pub steps: Vec<Step>,
    pub pace: Pace,
}

/// What happens on one connection.
#[derive(Clone, Debug)]
pub struct Exchange {
    /// Where in the noise each direction begins; told when something is wrong.
    pub seed: u64,
    pub client: Script,
    pub server: Script,
    /// Does the client speak before its connection was accepted?
    pub early: bool,
}

/// Between looks at what the kernel has still to send.
const LOOK_AGAIN: Duration = Duration::from_millis(2);

const BUFFER_BYTES: usize = 256 * 1024;

/// No size of a buffer, page or pipe divides it: what is lost, repeated or out of order shows as a wrong byte.
const NOISE_BYTES: usize = 1_048_583;

fn noise_block() -> &'static [u8] {
    static BLOCK: OnceLock<Vec<u8>> = OnceLock::new();
    BLOCK.get_or_init(|| noise(1, NOISE_BYTES))
}

/// The bytes of one direction, from `position` on: some of them, in one piece.
fn bytes_at(start: usize, position: usize) -> &'static [u8] {
    &noise_block()[(start + position) % NOISE_BYTES..]
}

/// One connection's two ends, and how far they are.
pub struct Driver {
    exchange: Exchange,
    client: End,
    server: End,
}

struct End {
    /// Gone when it was closed by RST.
    stream: Option<TcpStream>,
    steps: VecDeque<Step>,
    pace: Pace,
    /// Where the noise begins that is sent.
    speaks_from: usize,
    /// And where the noise begins that is read.
    hears_from: usize,
    sent: usize,
    sent_in_step: usize,
    heard: usize,
    reads_again: Instant,
    pause_ends: Option<Instant>,
    /// The socket took nothing more.
    is_full: bool,
    has_shut: bool,
    /// Nothing more is to be read.
    ended: bool,
    error: Option<ErrorKind>,
}

impl Driver {
    /// Connects, and takes the header off. One at a time on a lane.
    #[track_caller]
    pub fn open(lane: &Lane, exchange: Exchange) -> Driver {
        static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
        let (up, down) = (exchange.seed as usize % NOISE_BYTES, (exchange.seed >> 32) as usize % NOISE_BYTES);
        let turn = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
        let mut client = End::new(lane.balancer.connect("web"), &exchange.client, up, down);
        if exchange.early {
            client.speak(0);
        }
        let (stream, header) = accept(&lane.upstream);
        drop(turn);
        assert_eq!(header.addresses.ends().map(|ends| ends.0), client.local_address(), "seed {}", exchange.seed);
        let server = End::new(stream, &exchange.server, down, up);
        Driver { exchange, client, server }
    }

    /// Plays both scripts to their end.
    #[track_caller]
    pub fn run(mut self) {
        let mut moved_at = Instant::now();
        let mut buffer = vec![0; BUFFER_BYTES];
        while !(self.client.is_over() && self.server.is_over()) {
            let mut moved = self.client.speak(self.server.heard) | self.server.speak(self.client.heard);
            let read = self.client.listen(&mut buffer).and_then(|read| Ok(read | self.server.listen(&mut buffer)?));
            moved |= read.unwrap_or_else(|wrong| panic!("{wrong}: {}", self.state()));
            if moved {
                moved_at = Instant::now();
            } else {
                assert!(moved_at.elapsed() < DEADLINE, "nothing moves: {}", self.state());
                self.wait();
            }
        }
        self.check();
    }

    /// Until one of the sockets or one of the clocks has something.
    fn wait(&self) {
        let now = Instant::now();
        let mut watched = Vec::new();
        let mut until = now + Duration::from_secs(1);
        for end in [&self.client, &self.server] {
            let Some(stream) = &end.stream else { continue };
            let mut flags = PollFlags::empty();
            if !end.ended && end.reads_again > now {
                until = until.min(end.reads_again);
            } else if !end.ended {
                flags |= PollFlags::IN;
            }
            match end.steps.front() {
                Some(Step::Send { .. }) if end.is_full => flags |= PollFlags::OUT,
                Some(Step::Pause(_) | Step::Reset { .. }) => until = until.min(end.pause_ends.unwrap_or(now)),
                _ => {}
            }
            if !flags.is_empty() {
                watched.push(PollFd::new(stream, flags));
            }
        }
        let timeout = Timespec::try_from(until.saturating_duration_since(now)).expect("a short time");
        // A signal may end the wait early: the next round waits again.
        let _ = poll(&mut watched, Some(&timeout));
    }

    #[track_caller]
    fn check(&self) {
        let resets = |script: &Script| {
            script.steps.iter().find_map(|step| if let Step::Reset { taken } = step { Some(*taken) } else { None })
        };
        for (end, script, other, others_script) in [
            (&self.client, &self.exchange.client, &self.server, &self.exchange.server),
            (&self.server, &self.exchange.server, &self.client, &self.exchange.client),
        ] {
            match (resets(script), resets(others_script)) {
                (None, None) => {
                    assert_eq!(end.error, None, "{}", self.state());
                    assert_eq!(
                        (end.heard, other.sent),
                        (others_script.bytes(), others_script.bytes()),
                        "{}",
                        self.state()
                    );
                }
                (None, Some(taken)) => {
                    let is_reset = matches!(end.error, Some(ErrorKind::ConnectionReset | ErrorKind::BrokenPipe));
                    assert!(is_reset, "a clean end although the other side was reset: {}", self.state());
                    assert_eq!(other.sent, others_script.bytes(), "{}", self.state());
                    assert!(end.heard == other.sent || !taken, "not every byte before the reset: {}", self.state());
                }
                // The one that resets: what it read was compared, and how much that is does not matter.
                (Some(_), _) => {}
            }
        }
    }

    fn state(&self) -> String {
        format!(
            "PREFACE_TEST_SEED={}\nclient: {}\nserver: {}\n{:?}",
            self.exchange.seed,
            self.client.state(),
            self.server.state(),
            self.exchange
        )
    }
}

impl Script {
    /// All that it sends.
    pub fn bytes(&self) -> usize {
        self.steps.iter().map(|step| if let Step::Send { bytes, .. } = step { *bytes } else { 0 }).sum()
    }
}

impl End {
    fn new(stream: TcpStream, script: &Script, speaks_from: usize, hears_from: usize) -> End {
        stream.set_nonblocking(true).expect("a socket can be non-blocking");
        stream.set_nodelay(true).expect("a TCP socket");
        End {
            stream: Some(stream),
            steps: script.steps.iter().copied().collect(),
            pace: script.pace,
            speaks_from,
            hears_from,
            sent: 0,
            sent_in_step: 0,
            heard: 0,
            reads_again: Instant::now() + script.pace.first,
            pause_ends: None,
            is_full: false,
            has_shut: false,
            ended: false,
            error: None,
        }
    }

    fn local_address(&self) -> Option<std::net::SocketAddr> {
        self.stream.as_ref()?.local_addr().ok()
    }

    fn is_over(&self) -> bool {
        self.stream.is_none() || (self.ended && self.steps.is_empty())
    }

    fn state(&self) -> String {
        format!(
            "sent {}, heard {}, ended {}, shut {}, error {:?}, next {:?}",
            self.sent,
            self.heard,
            self.ended,
            self.has_shut,
            self.error,
            self.steps.front()
        )
    }

    /// Goes on with its script as far as it can; did it?
    fn speak(&mut self, other_heard: usize) -> bool {
        let mut moved = false;
        // One write at a time: the other end has its turn in between.
        while let (Some(step), Some(stream)) = (self.steps.front().copied(), &mut self.stream) {
            let done = match step {
                Step::Send { bytes, piece } => {
                    let left = bytes - self.sent_in_step;
                    let next = bytes_at(self.speaks_from, self.sent);
                    let next = &next[..next.len().min(left).min(piece)];
                    if !next.is_empty() {
                        match stream.write(next) {
                            Ok(count) => {
                                self.sent += count;
                                self.sent_in_step += count;
                                self.is_full = false;
                                moved = true;
                            }
                            Err(error) if error.kind() == ErrorKind::WouldBlock => self.is_full = true,
                            Err(error) => {
                                self.fail(&error);
                                return true;
                            }
                        }
                    }
                    if self.sent_in_step < bytes {
                        return moved;
                    }
                    self.sent_in_step = 0;
                    true
                }
                Step::Delivered => other_heard == self.sent,
                Step::Heard(bytes) => self.heard >= bytes,
                Step::HeardEnd => self.ended,
                Step::Pause(time) => *self.pause_ends.get_or_insert_with(|| Instant::now() + time) <= Instant::now(),
                Step::Shut => {
                    self.has_shut = true;
                    match stream.shutdown(Shutdown::Write) {
                        Err(error) if error.kind() != ErrorKind::NotConnected => self.fail(&error),
                        _ => {}
                    }
                    true
                }
                Step::Reset { taken } => {
                    if taken && self.looks_again_later() {
                        return moved;
                    }
                    reset(self.stream.take().expect("it is there"));
                    true
                }
            };
            if !done {
                break;
            }
            self.pause_ends = None;
            self.steps.pop_front();
            moved = true;
        }
        moved
    }

    /// Is something that was sent still on its way? Asked again only after a while.
    fn looks_again_later(&mut self) -> bool {
        if self.pause_ends.is_some_and(|end| end > Instant::now()) {
            return true;
        }
        self.pause_ends = Some(Instant::now() + LOOK_AGAIN);
        self.stream.as_ref().and_then(unacknowledged).is_some_and(|bytes| bytes > 0)
    }

    /// The first error is the one that counts; nothing more is said after it.
    fn fail(&mut self, error: &io::Error) {
        self.error.get_or_insert(error.kind());
        self.steps.clear();
    }

    /// Reads once, if it is time to; was there something?
    fn listen(&mut self, buffer: &mut [u8]) -> Result<bool, String> {
        let Some(stream) = &mut self.stream else { return Ok(false) };
        if self.ended || (self.reads_again > Instant::now()) {
            return Ok(false);
        }
        match stream.read(&mut buffer[..self.pace.piece]) {
            Ok(0) => self.ended = true,
            Ok(count) => {
                let mut compared = 0;
                while compared < count {
                    let expected = bytes_at(self.hears_from, self.heard + compared);
                    let got = &buffer[compared..count];
                    let length = got.len().min(expected.len());
                    if got[..length] != expected[..length] {
                        let same = got.iter().zip(expected).take_while(|(got, expected)| got == expected).count();
                        return Err(format!("byte {} is wrong", self.heard + compared + same));
                    }
                    compared += length;
                }
                self.heard += count;
                if !self.pace.pause.is_zero() {
                    self.reads_again = Instant::now() + self.pace.pause;
                }
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(false),
            Err(error) => {
                self.fail(&error);
                self.ended = true;
            }
        }
        Ok(true)
    }
}

/// Plays all of them on one lane, `at_once` at a time.
#[track_caller]
pub fn play(lane: &Lane, exchanges: &[Exchange], at_once: usize) {
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..at_once {
            scope.spawn(|| {
                while let Some(exchange) = exchanges.get(next.fetch_add(1, Ordering::Relaxed)) {
                    Driver::open(lane, exchange.clone()).run();
                }
            });
        }
    });
}

/// Opens all of them, then does `before`, then plays them all at once.
#[track_caller]
pub fn play_opened(lane: &Lane, exchanges: &[Exchange], before: impl FnOnce(&Balancer)) {
    let drivers: Vec<Driver> = exchanges.iter().map(|exchange| Driver::open(lane, exchange.clone())).collect();
    before(&lane.balancer);
    std::thread::scope(|scope| {
        for driver in drivers {
            scope.spawn(|| driver.run());
        }
    });
}
