//! The bounded queue between everything that logs and the one thread that writes.
//!
//! Lines are appended to one buffer under a short lock; the writer takes the whole buffer at once, so what is queued
//! becomes one write, and a line costs its sender a copy. A channel of lines was not chosen: it wakes the writer, and
//! makes a system call, for every line.

use std::fs::File;
use std::io::{self, Write};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Lines that wait for the writer, in bytes. What comes on top is dropped and counted.
pub const QUEUE_BYTES_MAX: usize = 1024 * 1024;

/// A line that comes to an idle writer waits this long for others to join its write.
const GATHER: Duration = Duration::from_millis(10);

/// So often in a row a writer finds nothing and gathers on: to wake an idle one costs the sender a system call.
const EMPTY_ROUNDS_MAX: u32 = 10;

/// With so much queued the writer gathers no longer.
const GATHERED_BYTES_MAX: usize = QUEUE_BYTES_MAX / 4;

/// An output that is set non-blocking (a terminal shared with another program) and full is tried again after this long.
const OUTPUT_FULL_WAIT: Duration = Duration::from_millis(10);

/// The queue.
#[derive(Debug, Default)]
pub(super) struct Queue {
    inner: Mutex<Inner>,
    /// The writer waits here: for a first line, or for enough of them.
    filled: Condvar,
    /// `flush` waits here.
    written: Condvar,
    dropped: AtomicU64,
}

#[derive(Debug, Default)]
struct Inner {
    lines: Vec<u8>,
    line_count: u64,
    writer: Writer,
    /// `flush` waits: gather nothing.
    hurry: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Writer {
    /// Waits for a line.
    #[default]
    Idle,
    /// Waits for more lines.
    Gathering,
    /// Writes, perhaps to an output that nobody reads.
    Writing,
}

impl Queue {
    /// Append one line, its newline included. Never waits for the output: when the queue is full the line is dropped.
    pub(super) fn send(&self, line: &[u8]) {
        let mut inner = self.lock();
        if inner.lines.len() + line.len() > QUEUE_BYTES_MAX {
            drop(inner);
            self.dropped.fetch_add(1, Ordering::Relaxed);
            return;
        }
        inner.lines.extend_from_slice(line);
        inner.line_count += 1;
        let wake = match inner.writer {
            Writer::Idle => true,
            Writer::Gathering => inner.lines.len() >= GATHERED_BYTES_MAX,
            Writer::Writing => false,
        };
        drop(inner);
        if wake {
            self.filled.notify_one();
        }
    }

    /// Lines dropped since the start.
    pub(super) fn dropped(&self) -> u64 {
        self.dropped.load(Ordering::Relaxed)
    }

    /// Wait until everything queued is written; `false` when that takes longer.
    pub(super) fn flush(&self, timeout: Duration) -> bool {
        let mut inner = self.lock();
        inner.hurry = true;
        self.filled.notify_one();
        let is_pending = |inner: &mut Inner| !inner.lines.is_empty() || inner.writer == Writer::Writing;
        let (mut inner, waited) =
            self.written.wait_timeout_while(inner, timeout, is_pending).unwrap_or_else(PoisonError::into_inner);
        inner.hurry = false;
        !waited.timed_out()
    }

    /// The writer's thread: write until the process ends. `said` makes the line that tells how many were dropped.
    pub(super) fn write_to(&self, mut output: File, said: impl Fn(u64) -> String) {
        let mut dropped_said = 0;
        let mut batch = Vec::new();
        loop {
            let batch_lines = self.take(&mut batch);
            // A reader that went away (EPIPE), a full disk: the lines are lost, and the balancer goes on. Each batch
            // tries again, so a log that comes back is used again.
            if write_whole(&mut output, &batch).is_err() {
                self.dropped.fetch_add(batch_lines, Ordering::Relaxed);
            } else if self.has_drained() {
                let dropped = self.dropped();
                if dropped > dropped_said && write_whole(&mut output, said(dropped - dropped_said).as_bytes()).is_ok() {
                    dropped_said = dropped;
                }
            }
            batch.clear();
            // One enormous burst must not keep its memory for ever.
            batch.shrink_to(GATHERED_BYTES_MAX);
            self.lock().writer = Writer::Gathering;
            self.written.notify_all();
        }
    }

    /// Wait for lines and exchange them for the empty `batch`.
    fn take(&self, batch: &mut Vec<u8>) -> u64 {
        let mut inner = self.lock();
        let is_gathering = |inner: &mut Inner| inner.lines.len() < GATHERED_BYTES_MAX && !inner.hurry;
        for empty_rounds in 0.. {
            if empty_rounds >= EMPTY_ROUNDS_MAX {
                inner.writer = Writer::Idle;
                inner = self
                    .filled
                    .wait_while(inner, |inner| inner.lines.is_empty())
                    .unwrap_or_else(PoisonError::into_inner);
            }
            inner.writer = Writer::Gathering;
            (inner, _) =
                self.filled.wait_timeout_while(inner, GATHER, is_gathering).unwrap_or_else(PoisonError::into_inner);
            if !inner.lines.is_empty() {
                break;
            }
        }
        inner.writer = Writer::Writing;
        std::mem::swap(&mut inner.lines, batch);
        std::mem::take(&mut inner.line_count)
    }

    /// Has the output caught up?
    fn has_drained(&self) -> bool {
        self.lock().lines.len() < QUEUE_BYTES_MAX / 2
    }

    /// A panic while the lock was held leaves whole bytes at worst: the log goes on.
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn write_whole(output: &mut File, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match output.write(bytes) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(written) => bytes = &bytes[written..],
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => std::thread::sleep(OUTPUT_FULL_WAIT),
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
