//! Who watches a preface at work: an open page, a `preface top`, a Prometheus that scrapes every second.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread::JoinHandle;
use std::time::Duration;

/// Between two questions of `top` and of Prometheus.
const PERIOD: Duration = Duration::from_secs(1);
/// Between two looks of the page at the last connections.
const TAP_PERIOD: Duration = Duration::from_secs(3);
/// While it does not listen yet.
const RETRY: Duration = Duration::from_millis(20);

/// The watchers of one process, until dropped.
pub struct Watchers {
    stop: Arc<AtomicBool>,
    /// Dropped, they tell the threads to stop waiting.
    wakers: Vec<Sender<()>>,
    threads: Vec<JoinHandle<()>>,
    answers: Arc<AtomicU64>,
}

impl Watchers {
    /// Of the process whose admin API is at this socket; it may not be there yet.
    pub fn start(socket: &Path) -> Watchers {
        let mut watchers = Watchers { stop: Arc::default(), wakers: vec![], threads: vec![], answers: Arc::default() };
        watchers.spawn(socket, |asker, _| asker.follow());
        for (path, period) in [("/status", PERIOD), ("/metrics", PERIOD), ("/tap?limit=25", TAP_PERIOD)] {
            watchers.spawn(socket, move |asker, woken| asker.ask_every(path, period, woken));
        }
        watchers
    }

    fn spawn(&mut self, socket: &Path, work: impl FnOnce(Asker, &Receiver<()>) + Send + 'static) {
        let (waker, woken) = mpsc::channel();
        let (stop, answers) = (Arc::clone(&self.stop), Arc::clone(&self.answers));
        let asker = Asker { socket: socket.to_owned(), stop, answers };
        self.wakers.push(waker);
        self.threads.push(std::thread::spawn(move || work(asker, &woken)));
    }

    /// Answers and parts of the page's stream that came so far.
    pub fn answers(&self) -> u64 {
        self.answers.load(Relaxed)
    }
}

impl Drop for Watchers {
    fn drop(&mut self) {
        self.stop.store(true, Relaxed);
        self.wakers.clear();
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

/// One of them.
struct Asker {
    socket: PathBuf,
    stop: Arc<AtomicBool>,
    answers: Arc<AtomicU64>,
}

impl Asker {
    fn request(&self, path: &str, more: &str) -> io::Result<UnixStream> {
        let mut stream = UnixStream::connect(&self.socket)?;
        stream.set_read_timeout(Some(PERIOD))?;
        stream.write_all(format!("GET {path} HTTP/1.1\r\nHost: localhost\r\n{more}\r\n").as_bytes())?;
        Ok(stream)
    }

    /// As the page does: it stays and takes what comes.
    fn follow(&self) {
        let mut part = [0; 64 * 1024];
        while !self.stop.load(Relaxed) {
            let Ok(mut stream) = self.request("/events", "") else {
                // SLEEP: it is starting, and nothing is being measured.
                std::thread::sleep(RETRY);
                continue;
            };
            while let Ok(1..) = stream.read(&mut part) {
                self.answers.fetch_add(1, Relaxed);
                if self.stop.load(Relaxed) {
                    return;
                }
            }
        }
    }

    fn ask_every(&self, path: &str, period: Duration, woken: &Receiver<()>) {
        loop {
            let answer = self.request(path, "Connection: close\r\n").and_then(|mut stream| {
                let mut answer = Vec::new();
                stream.read_to_end(&mut answer).map(|_| answer)
            });
            let is_good = answer.is_ok_and(|answer| answer.starts_with(b"HTTP/1.1 200"));
            self.answers.fetch_add(u64::from(is_good), Relaxed);
            if woken.recv_timeout(if is_good { period } else { RETRY }) != Err(RecvTimeoutError::Timeout) {
                return;
            }
        }
    }
}
