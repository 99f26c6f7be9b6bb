//! What systemd is told, over the socket that it names in `$NOTIFY_SOCKET`: sd_notify(3) without its library.
//!
//! Written here because a message must never wait: a service manager that hangs would otherwise stop the control thread,
//! and with it checks, reloads and orders, once its queue is full of signs of life.

use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::{Duration, Instant};

use tokio::time::{Interval, MissedTickBehavior, interval};

use crate::control::ReloadOutcome;
use crate::net::limits;
use crate::pool::Health;
use crate::server::state::State;

/// A new main process must become known, or the service ends with this one: that message may wait, this long.
const MAIN_PID_WITHIN: Duration = Duration::from_secs(2);

/// The way to the service manager, if there is one.
#[derive(Debug, Default)]
pub struct Notifier {
    to: Option<(UnixDatagram, SocketAddr)>,
    /// Another process of the service speaks for it now, or still.
    is_silent: bool,
    /// The last one sent.
    status: String,
    has_failed: bool,
}

impl Notifier {
    /// To whoever started this process, if they asked for it.
    pub fn from_environment() -> Notifier {
        let Some(name) = std::env::var_os("NOTIFY_SOCKET").filter(|name| !name.is_empty()) else {
            return Notifier::default();
        };
        let to = address(name.as_bytes()).and_then(|address| {
            let socket = UnixDatagram::unbound()?;
            socket.set_nonblocking(true)?;
            Ok((socket, address))
        });
        match to {
            Ok(to) => Notifier { to: Some(to), ..Notifier::default() },
            Err(error) => {
                tracing::warn!(event = "notify", socket = ?name, reason = %error, "nobody is told that this process is ready");
                Notifier::default()
            }
        }
    }

    /// Another process speaks for the service until `speak`.
    pub fn be_silent(&mut self) {
        self.is_silent = true;
    }

    /// This process speaks for the service from now on.
    pub fn speak(&mut self) {
        self.is_silent = false;
    }

    /// Everything is bound and served, or a reload has come to its end.
    fn ready(&mut self, status: String) {
        self.send(&format!("READY=1\nSTATUS={status}"));
        self.status = status;
    }

    /// A reload begins.
    pub fn reloading(&mut self) {
        // With the time it also serves units of Type=notify-reload, systemd 253 and later.
        self.send(&format!("RELOADING=1\nMONOTONIC_USEC={}", limits::monotonic_time().as_micros()));
    }

    /// The process is on its way out.
    fn stopping(&mut self, status: String) {
        self.send(&format!("STOPPING=1\nSTATUS={status}"));
        self.status = status;
    }

    /// What `systemctl status` shows, if it is another than before.
    fn status(&mut self, status: String) {
        if status != self.status {
            self.send(&format!("STATUS={status}"));
            self.status = status;
        }
    }

    /// A sign of life.
    pub fn alive(&mut self) {
        self.send("WATCHDOG=1");
    }

    /// The service's main process is another one from now on, and speaks for it.
    pub fn hand_over(&mut self, main_pid: u32) {
        if let Some((socket, _)) = &self.to {
            let waiting = socket.set_nonblocking(false).and_then(|()| socket.set_write_timeout(Some(MAIN_PID_WITHIN)));
            drop(waiting);
        }
        if !self.send(&format!("MAINPID={main_pid}")) {
            tracing::error!(
                event = "notify",
                pid = main_pid,
                "the service manager does not know of the new process, and may end it with this one"
            );
        }
        self.is_silent = true;
    }

    fn send(&mut self, message: &str) -> bool {
        let Some((socket, address)) = self.to.as_ref().filter(|_| !self.is_silent) else { return true };
        match socket.send_to_addr(message.as_bytes(), address) {
            Ok(_) => {
                self.has_failed = false;
                true
            }
            Err(error) => {
                if !std::mem::replace(&mut self.has_failed, true) {
                    tracing::warn!(event = "notify", message = %message.replace('\n', " "), reason = %error, "not told");
                }
                false
            }
        }
    }
}

/// A path, or a name without a file (`@name`).
fn address(name: &[u8]) -> io::Result<SocketAddr> {
    match name.split_first() {
        Some((b'@', name)) => SocketAddr::from_abstract_name(name),
        Some((b'/', _)) => SocketAddr::from_pathname(std::ffi::OsStr::from_bytes(name)),
        _ => Err(io::Error::new(io::ErrorKind::InvalidInput, "neither a path nor @ and a name")),
    }
}

/// Ticks twice in the time after which this process counts as hung; `None`: nobody asked for signs of life.
pub fn watchdog() -> Option<Interval> {
    let number = |name| std::env::var(name).ok()?.parse::<u64>().ok();
    let for_another = number("WATCHDOG_PID").is_some_and(|id| id != u64::from(std::process::id()));
    let within = Duration::from_micros(number("WATCHDOG_USEC").filter(|micros| *micros > 1 && !for_another)?);
    let mut ticks = interval(within / 2);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    Some(ticks)
}

/// The next tick, if there is one.
pub async fn tick(watchdog: &mut Option<Interval>) {
    match watchdog {
        Some(watchdog) => drop(watchdog.tick().await),
        None => std::future::pending().await,
    }
}

impl State {
    /// Tells that everything is bound and served, or that a reload has come to its end.
    pub fn notify_ready(&mut self) {
        let summary = self.summary();
        self.notifier.ready(summary);
    }

    /// The process whose place this one took has said who speaks for the service now.
    pub fn notify_main_process(&mut self) {
        self.notifier.speak();
        if self.stopping { self.notify_stopping() } else { self.notify_ready() }
    }

    /// Tells that the process is on its way out.
    pub fn notify_stopping(&mut self) {
        let summary = self.summary();
        self.notifier.stopping(summary);
    }

    /// Tells what has changed.
    pub fn notify_status(&mut self) {
        let summary = self.summary();
        self.notifier.status(summary);
    }

    /// A sign of life, if there is one: as `/livez`.
    pub fn notify_alive(&mut self) {
        match self.probes.live(Instant::now()) {
            Ok(()) => self.notifier.alive(),
            Err(reason) => tracing::error!(event = "watchdog", reason, "no sign of life for the service manager"),
        }
    }

    /// One line for `systemctl status`.
    fn summary(&self) -> String {
        if self.stopping {
            return format!("stopping, {} open", count(self.open.count(), "connection"));
        }
        let keys = self.keys();
        let healthy = keys.iter().filter(|key| self.health_of(key) == Health::Healthy).count();
        let is_refused = self.reports.front().is_some_and(|report| report.outcome == ReloadOutcome::Refused);
        format!(
            "serving {}, {}, {healthy} of {} healthy{}",
            count(self.config.listeners.len(), "listener"),
            count(self.config.pools.len(), "pool"),
            count(keys.len(), "upstream"),
            if is_refused { "; the last reload was refused, see the log" } else { "" }
        )
    }
}

fn count(number: usize, what: &str) -> String {
    format!("{number} {what}{}", if number == 1 { "" } else { "s" })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn notifier(to: &UnixDatagram) -> Notifier {
        let socket = UnixDatagram::unbound().unwrap();
        socket.set_nonblocking(true).unwrap();
        Notifier { to: Some((socket, to.local_addr().unwrap())), ..Notifier::default() }
    }

    #[test]
    fn an_address_is_a_path_or_a_name_behind_an_at_sign() {
        assert_eq!(
            address(b"/run/systemd/notify").unwrap().as_pathname().unwrap().to_str(),
            Some("/run/systemd/notify")
        );
        assert_eq!(address(b"@preface/test").unwrap().as_abstract_name(), Some(&b"preface/test"[..]));
        assert!(address(b"vsock:2:1234").is_err());
    }

    #[test]
    fn a_manager_that_reads_nothing_keeps_nobody_waiting() {
        let directory = tempfile::tempdir().unwrap();
        let manager = UnixDatagram::bind(directory.path().join("notify")).unwrap();
        let mut notifier = notifier(&manager);
        let begun = Instant::now();
        while notifier.send("WATCHDOG=1") {}
        assert!(notifier.has_failed && begun.elapsed() < Duration::from_secs(10), "its queue is full");
        // Who reads again is told again.
        assert!(manager.recv(&mut [0; 100]).is_ok());
        assert!(notifier.send("WATCHDOG=1") && !notifier.has_failed);
        let begun = Instant::now();
        notifier.hand_over(4711);
        assert!(begun.elapsed() >= MAIN_PID_WITHIN, "this one matters: it waits");
    }

    #[test]
    fn who_does_not_speak_for_the_service_is_silent() {
        let directory = tempfile::tempdir().unwrap();
        let manager = UnixDatagram::bind(directory.path().join("notify")).unwrap();
        manager.set_nonblocking(true).unwrap();
        let mut notifier = notifier(&manager);
        let mut buffer = [0; 100];
        let mut received = || manager.recv(&mut buffer).map(|length| buffer[..length].to_vec()).ok();
        notifier.be_silent();
        notifier.alive();
        assert_eq!(received(), None);
        notifier.speak();
        notifier.status("one".to_owned());
        notifier.status("one".to_owned());
        assert_eq!(received().unwrap(), b"STATUS=one");
        assert_eq!(received(), None);
        notifier.hand_over(4711);
        assert_eq!(received().unwrap(), b"MAINPID=4711");
        notifier.alive();
        assert_eq!(received(), None);
    }
}
