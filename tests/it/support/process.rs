//! A child process with its output read as it comes; killed, by its own id, when the test is done with it.

use std::io::{BufRead, BufReader, Read};
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Instant;

use rustix::process::Signal;

use super::DEADLINE;

/// The lines of one stream so far.
#[derive(Clone, Default)]
pub struct Output {
    shared: Arc<(Mutex<Lines>, Condvar)>,
}

#[derive(Default)]
struct Lines {
    lines: Vec<String>,
    ended: bool,
}

impl Output {
    fn read(stream: impl Read + AsFd + Send + 'static) -> Output {
        // As large as goes without privilege: HAProxy drops lines that find its pipe full.
        let _ = rustix::pipe::fcntl_setpipe_size(&stream, 1 << 20);
        let output = Output::default();
        let writer = output.clone();
        std::thread::spawn(move || {
            let mut stream = BufReader::new(stream);
            let mut line = Vec::new();
            while stream.read_until(b'\n', &mut line).is_ok_and(|count| count > 0) {
                let text = String::from_utf8_lossy(&line).trim_end().to_owned();
                line.clear();
                writer.change(|lines| lines.lines.push(text));
            }
            writer.change(|lines| lines.ended = true);
        });
        output
    }

    fn change(&self, change: impl FnOnce(&mut Lines)) {
        change(&mut self.shared.0.lock().unwrap_or_else(PoisonError::into_inner));
        self.shared.1.notify_all();
    }

    /// All lines so far.
    pub fn lines(&self) -> Vec<String> {
        self.shared.0.lock().unwrap_or_else(PoisonError::into_inner).lines.clone()
    }

    /// All lines so far as one text.
    pub fn text(&self) -> String {
        self.lines().join("\n")
    }

    /// Waits for a line; the ones that are there already count.
    #[track_caller]
    pub fn wait_for(&self, what: &str, found: impl Fn(&str) -> bool) -> String {
        self.wait_for_count(what, 1, found).remove(0)
    }

    /// Waits until so many lines are there, and returns them.
    #[track_caller]
    pub fn wait_for_count(&self, what: &str, count: usize, found: impl Fn(&str) -> bool) -> Vec<String> {
        let end = Instant::now() + DEADLINE;
        let mut lines = self.shared.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (mut matching, mut looked_at) = (Vec::new(), 0);
        loop {
            // Each line is looked at once: a reader that is kept waiting lets its program drop lines.
            matching.extend(lines.lines[looked_at..].iter().filter(|line| found(line)).cloned());
            looked_at = lines.lines.len();
            if matching.len() >= count {
                return matching;
            }
            let left = end.saturating_duration_since(Instant::now());
            let (seen, total) = (matching.len(), lines.lines.len());
            assert!(!left.is_zero(), "waited {DEADLINE:?} in vain for {count} lines ({what}), saw {seen} of {total}");
            assert!(!lines.ended, "the output ended before {count} lines ({what}), saw {seen} of {total}");
            lines = self.shared.1.wait_timeout(lines, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Waits until the stream has ended, and returns all of it.
    #[track_caller]
    pub fn wait_for_end(&self) -> Vec<String> {
        let lines = self.shared.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (lines, timeout) = self
            .shared
            .1
            .wait_timeout_while(lines, DEADLINE, |lines| !lines.ended)
            .unwrap_or_else(PoisonError::into_inner);
        assert!(!timeout.timed_out(), "the output did not end within {DEADLINE:?}");
        lines.lines.clone()
    }
}

/// A running program.
pub struct Process {
    name: String,
    child: Child,
    exit: Option<ExitStatus>,
    /// Its standard output.
    pub stdout: Output,
    /// Its standard error.
    pub stderr: Output,
}

impl Process {
    /// Starts `command` without input and with both outputs read.
    #[track_caller]
    pub fn start(command: &mut Command) -> Process {
        Process::start_with(command, Stdio::null())
    }

    /// As at a terminal: its input is open, and nobody types.
    #[track_caller]
    pub fn start_at_terminal(command: &mut Command) -> Process {
        Process::start_with(command, Stdio::piped())
    }

    #[track_caller]
    fn start_with(command: &mut Command, input: Stdio) -> Process {
        let name = command.get_program().to_string_lossy().into_owned();
        let mut child = command
            .stdin(input)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            // A group of its own: nginx's workers must end with their master, which cannot tell them when it is killed.
            .process_group(0)
            .spawn()
            .unwrap_or_else(|error| panic!("{name}: {error}"));
        let stdout = Output::read(child.stdout.take().expect("stdout is piped"));
        let stderr = Output::read(child.stderr.take().expect("stderr is piped"));
        Process { name, child, exit: None, stdout, stderr }
    }

    /// Runs `command` to its end and returns its exit status and all of its output, stdout first.
    #[track_caller]
    pub fn run(command: &mut Command) -> (ExitStatus, String) {
        let mut process = Process::start(command);
        let status = process.wait_exit();
        (status, [process.stdout.wait_for_end(), process.stderr.wait_for_end()].concat().join("\n"))
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Sends a signal to it.
    #[track_caller]
    pub fn signal(&self, signal: Signal) {
        let id = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(id, signal).expect("the process takes a signal");
    }

    /// Is it still there?
    pub fn is_running(&mut self) -> bool {
        if self.exit.is_none() {
            self.exit = self.child.try_wait().expect("a child can be waited for");
        }
        self.exit.is_none()
    }

    /// Waits for its end. Long-running programs (`wrk`) have their own limits; this one is for those that hang.
    #[track_caller]
    pub fn wait_exit(&mut self) -> ExitStatus {
        let what = format!("the end of {}", self.name);
        super::eventually_within(DEADLINE * 3, &what, || (!self.is_running()).then_some(()));
        self.exit.expect("it has just ended")
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if self.is_running() {
            let group = rustix::process::Pid::from_child(&self.child);
            rustix::process::kill_process_group(group, Signal::KILL).expect("a running child's group can be killed");
            self.child.wait().expect("a killed child ends");
        }
        if std::thread::panicking() {
            for (stream, output) in [("stdout", &self.stdout), ("stderr", &self.stderr)] {
                let lines = output.lines();
                let last = &lines[lines.len().saturating_sub(12)..];
                eprintln!(
                    "--- {} {stream}, last {} of {} lines\n{}",
                    self.name,
                    last.len(),
                    lines.len(),
                    last.join("\n")
                );
            }
        }
    }
}
