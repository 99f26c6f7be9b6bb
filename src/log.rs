//! The log: one line an event to standard output, by one writer thread, never blocking traffic.
//!
//! Events come from `tracing`; workers format the lines of their connections themselves (`connection_line`). Both go
//! into one bounded queue. When it is full, which takes a reader that stands still, lines are dropped, counted, and the
//! log says so once it drains again.

mod line;
mod queue;

use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::{Duration, SystemTime};

use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::layer::{Context, SubscriberExt};
use tracing_subscriber::registry::Registry;
use tracing_subscriber::{EnvFilter, Layer, reload};

pub use line::{ConnectionLine, Line, connection_line, connection_start_line, session_line, session_start_line};
pub use queue::QUEUE_BYTES_MAX;

use crate::config::LogFormat;
use queue::Queue;

/// The running log. Clones are the same log.
#[derive(Clone, Debug)]
pub struct Log {
    sender: Sender,
    filter: reload::Handle<EnvFilter, Registry>,
}

/// Sends finished lines; for workers.
#[derive(Clone, Debug)]
pub struct Sender {
    queue: Arc<Queue>,
    format: Arc<AtomicU8>,
}

/// Why there is no log, or not at this level.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Not what `EnvFilter` understands.
    #[error(
        "log level {level:?} is not understood: {reason}; try \"info\", \"debug\" or \"info,preface::health=debug\""
    )]
    Level {
        /// As configured.
        level: String,
        /// What is wrong with it.
        reason: String,
    },
    /// Standard output is closed, or no thread could be started.
    #[error("cannot start the log: {0}")]
    Io(#[from] io::Error),
    /// `init` was called before.
    #[error("this process logs already")]
    Twice,
}

/// Start the log on standard output and send every `tracing` event of the process there. Once a process.
pub fn init(format: LogFormat, level: &str) -> Result<Log, Error> {
    // A descriptor of our own: `std::io::stdout` would split batches at its line buffer and hold its lock meanwhile.
    let output = File::from(io::stdout().as_fd().try_clone_to_owned()?);
    let (log, subscriber) = start(output, format, level)?;
    tracing::subscriber::set_global_default(subscriber).map_err(|_| Error::Twice)?;
    Ok(log)
}

/// Start a log on `output`; events reach it through the subscriber.
pub fn start(output: File, format: LogFormat, level: &str) -> Result<(Log, impl Subscriber + Send + Sync), Error> {
    let (filter, handle) = reload::Layer::new(parse_level(level)?);
    let sender = Sender { queue: Arc::default(), format: Arc::default() };
    sender.set_format(format);
    let writer = sender.clone();
    std::thread::Builder::new().name("log".into()).spawn(move || {
        writer.queue.write_to(output, |dropped| dropped_line(writer.format(), dropped));
    })?;
    let subscriber = tracing_subscriber::registry().with(filter).with(Lines { sender: sender.clone() });
    Ok((Log { sender, filter: handle }, subscriber))
}

fn parse_level(level: &str) -> Result<EnvFilter, Error> {
    EnvFilter::builder()
        .parse(level)
        .map_err(|error| Error::Level { level: level.to_owned(), reason: error.to_string() })
}

fn dropped_line(format: LogFormat, dropped: u64) -> String {
    let mut line = Line::new(format, SystemTime::now(), "warn", "log_dropped");
    line.string("message", "log lines were dropped: whatever reads standard output was too slow");
    line.number("lines", dropped);
    line.finish()
}

impl Log {
    /// For workers.
    pub fn sender(&self) -> Sender {
        self.sender.clone()
    }

    /// Send one finished line.
    pub fn line(&self, line: &str) {
        self.sender.send(line.as_bytes());
    }

    /// Change the level from the next event on.
    pub fn set_level(&self, level: &str) -> Result<(), Error> {
        let filter = parse_level(level)?;
        self.filter.reload(filter).map_err(|error| Error::Level { level: level.to_owned(), reason: error.to_string() })
    }

    /// Say that somebody has ordered another level, whatever that level lets through.
    pub fn level_changed(&self, level: &str, by: &str) {
        let mut line = Line::new(self.sender.format(), SystemTime::now(), "info", "log");
        line.string("message", "the level stays until a reload changes log.level, or a restart");
        line.string("level", level);
        line.string("by", by);
        self.line(&line.finish());
    }

    /// Change the format from the next line on.
    pub fn set_format(&self, format: LogFormat) {
        self.sender.set_format(format);
    }

    /// Lines dropped since the start, for a metric.
    pub fn dropped(&self) -> u64 {
        self.sender.queue.dropped()
    }

    /// Wait until everything sent so far is written; `false` when that takes longer. Before the process ends.
    pub fn flush(&self, timeout: Duration) -> bool {
        self.sender.queue.flush(timeout)
    }
}

impl Sender {
    /// Send one finished line, its newline included. Never blocks on the output: when the queue is full it is dropped.
    pub fn send(&self, line: &[u8]) {
        self.queue.send(line);
    }

    /// What lines have to look like now.
    pub fn format(&self) -> LogFormat {
        if self.format.load(Ordering::Relaxed) == 0 { LogFormat::Text } else { LogFormat::Json }
    }

    fn set_format(&self, format: LogFormat) {
        self.format.store(u8::from(format == LogFormat::Json), Ordering::Relaxed);
    }
}

/// Turns events into lines.
struct Lines {
    sender: Sender,
}

impl<S: Subscriber> Layer<S> for Lines {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let level = match *event.metadata().level() {
            Level::ERROR => "error",
            Level::WARN => "warn",
            Level::INFO => "info",
            Level::DEBUG => "debug",
            Level::TRACE => "trace",
        };
        let mut head = Head::default();
        event.record(&mut head);
        let name = head.event.as_deref().unwrap_or("note");
        let mut line = Line::new(self.sender.format(), SystemTime::now(), level, name);
        if let Some(message) = &head.message {
            line.string("message", message);
        }
        event.record(&mut Rest(&mut line));
        self.sender.send(line.finish().as_bytes());
    }
}

/// The fields that come first, wherever the event has them.
#[derive(Default)]
struct Head {
    event: Option<String>,
    message: Option<String>,
}

impl Visit for Head {
    fn record_str(&mut self, field: &Field, value: &str) {
        match field.name() {
            "event" => self.event = Some(value.to_owned()),
            "message" => self.message = Some(value.to_owned()),
            _ => {}
        }
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        if matches!(field.name(), "event" | "message") {
            self.record_str(field, &format!("{value:?}"));
        }
    }
}

/// All other fields, in their order.
struct Rest<'a>(&'a mut Line);

impl Rest<'_> {
    fn number(&mut self, field: &Field, value: impl fmt::Display) {
        if !matches!(field.name(), "event" | "message") {
            self.0.number(field.name(), value);
        }
    }
}

impl Visit for Rest<'_> {
    fn record_i64(&mut self, field: &Field, value: i64) {
        self.number(field, value);
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.number(field, value);
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.number(field, value);
    }

    fn record_f64(&mut self, field: &Field, value: f64) {
        // JSON has no infinity and no NaN.
        if value.is_finite() {
            self.number(field, value);
        } else {
            self.record_str(field, &value.to_string());
        }
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        if !matches!(field.name(), "event" | "message") {
            self.0.string(field.name(), value);
        }
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        if !matches!(field.name(), "event" | "message") {
            self.0.string(field.name(), &format!("{value:?}"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{BufRead, BufReader, PipeReader, Read};
    use std::os::fd::OwnedFd;
    use std::sync::mpsc;

    fn on_pipe(format: LogFormat, level: &str) -> (Log, impl Subscriber + Send + Sync, PipeReader) {
        let (reader, writer) = io::pipe().unwrap();
        let (log, subscriber) = start(File::from(OwnedFd::from(writer)), format, level).unwrap();
        (log, subscriber, reader)
    }

    /// The next `count` lines, without their times.
    fn lines(reader: impl Read, count: usize) -> Vec<String> {
        let without_time = |line: String| {
            let end = line.find("level").unwrap();
            let start = if line.starts_with('{') { end - 1 } else { end };
            line[start..].to_owned()
        };
        BufReader::new(reader).lines().take(count).map(|line| without_time(line.unwrap())).collect()
    }

    fn events() {
        tracing::info!(event = "listening", listener = "web", address = %"0.0.0.0:80", "serving 1 listener");
        tracing::warn!(count = 3, share = 0.5, odd = f64::NAN, ok = true, error = ?io::ErrorKind::NotFound, "two\nlines");
        tracing::debug!(event = "hidden", "not at this level");
        tracing::error!(event = "last");
    }

    #[test]
    fn events_become_logfmt() {
        let (_log, subscriber, reader) = on_pipe(LogFormat::Text, "info");
        tracing::subscriber::with_default(subscriber, events);
        insta::assert_snapshot!(lines(reader, 3).join("\n"), @r#"
        level=info event=listening message="serving 1 listener" listener=web address=0.0.0.0:80
        level=warn event=note message="two\nlines" count=3 share=0.5 odd=NaN ok=true error=NotFound
        level=error event=last
        "#);
    }

    #[test]
    fn events_become_json() {
        let (_log, subscriber, reader) = on_pipe(LogFormat::Json, "info");
        tracing::subscriber::with_default(subscriber, events);
        insta::assert_snapshot!(lines(reader, 3).join("\n"), @r#"
        "level":"info","event":"listening","message":"serving 1 listener","listener":"web","address":"0.0.0.0:80"}
        "level":"warn","event":"note","message":"two\nlines","count":3,"share":0.5,"odd":"NaN","ok":true,"error":"NotFound"}
        "level":"error","event":"last"}
        "#);
    }

    #[test]
    fn level_and_format_change_while_it_runs() {
        let (log, subscriber, reader) = on_pipe(LogFormat::Text, "warn");
        tracing::subscriber::with_default(subscriber, || {
            tracing::info!(event = "before");
            log.set_level("warn,preface::log=info").unwrap();
            log.set_format(LogFormat::Json);
            tracing::info!(event = "after");
        });
        assert_eq!(lines(reader, 1), [r#""level":"info","event":"after"}"#]);
        let error = log.set_level("info,preface=loud").unwrap_err().to_string();
        assert!(error.contains("info,preface=loud"), "{error}");
    }

    #[test]
    fn a_pipe_that_nobody_reads_blocks_nobody_and_the_loss_is_said_once() {
        let (log, _subscriber, reader) = on_pipe(LogFormat::Text, "info");
        let line = format!("{}\n", "x".repeat(999));
        let sent = 10 * QUEUE_BYTES_MAX / line.len();
        for _ in 0..sent {
            log.line(&line);
        }
        // The pipe's 64 KiB, one batch at the writer, one queue.
        assert!(log.dropped() >= (sent - 3 * QUEUE_BYTES_MAX / line.len()) as u64, "{}", log.dropped());
        assert!(!log.flush(Duration::ZERO), "nobody reads, so nothing is flushed");

        let (ask, asked) = mpsc::channel();
        let reading = std::thread::spawn(move || {
            let mut said = Vec::new();
            let mut written = 0;
            for line in BufReader::new(reader).lines().map(Result::unwrap) {
                match line.starts_with("xxx") {
                    true => written += 1,
                    false if line.contains("marker") => break,
                    false => {
                        said.push(line);
                        let _ = ask.send(());
                    }
                }
            }
            (written, said)
        });
        asked.recv_timeout(Duration::from_secs(10)).expect("the loss is said");
        log.line("marker\n");
        assert!(log.flush(Duration::from_secs(10)));
        let (written, said) = reading.join().unwrap();
        assert_eq!(written + log.dropped(), sent as u64, "every line is written or counted");
        assert_eq!(said.len(), 1, "{said:?}");
        assert!(said[0].contains("event=log_dropped"), "{said:?}");
        assert!(said[0].ends_with(&format!(" lines={}", log.dropped())), "{said:?}");
    }

    #[test]
    fn a_reader_that_went_away_costs_lines_only() {
        let (log, _subscriber, reader) = on_pipe(LogFormat::Text, "info");
        log.line("first\n");
        assert!(log.flush(Duration::from_secs(10)));
        drop(reader);
        for batch in 1..=3 {
            log.line("lost\n");
            assert!(log.flush(Duration::from_secs(10)));
            assert_eq!(log.dropped(), batch);
        }
    }

    #[test]
    fn what_waits_is_one_write_and_flush_does_not_wait_for_more() {
        let (log, _subscriber, mut reader) = on_pipe(LogFormat::Text, "info");
        for _ in 0..100 {
            log.line("0123456789\n");
        }
        assert!(log.flush(Duration::from_secs(10)));
        let mut read = [0; 2048];
        assert_eq!(reader.read(&mut read).unwrap(), 1100);
        assert!(log.flush(Duration::ZERO), "nothing is left");
    }
}
