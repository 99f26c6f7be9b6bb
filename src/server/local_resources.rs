//! Connections that failed for want of something on this machine: said once in the log, kept while it is recent, with
//! what to do about it.

use std::collections::BTreeMap;
use std::io;
use std::sync::atomic::Ordering::Relaxed;
use std::time::SystemTime;

use serde_json::{Value, json};

use crate::net;
use crate::server::state::State;
use crate::termination::{DropReason, Termination};

/// What one listener lacks.
#[derive(Clone, Debug)]
pub struct Shortage {
    /// When it was first seen.
    since: SystemTime,
    /// Connections and sessions that it ended, and datagrams that it dropped, in the last ten minutes.
    count: u64,
    /// The last error.
    errno: i32,
    /// `source` of the pool that is no address of this machine.
    foreign: Option<std::net::IpAddr>,
}

impl Shortage {
    /// As the status shows it.
    pub fn value(&self) -> Value {
        let since = humantime::format_rfc3339_millis(self.since).to_string();
        json!({ "since": since, "count_10m": self.count, "reason": self.reason(), "change": self.change() })
    }

    /// The system's words: "too many open files".
    fn reason(&self) -> String {
        match (self.foreign, self.errno) {
            (Some(source), _) => format!("source {source} is not an address of this machine"),
            (None, 0) => "nothing more is known".to_owned(),
            (None, errno) => net::check::words(&io::Error::from_raw_os_error(errno)),
        }
    }

    fn change(&self) -> &'static str {
        if self.foreign.is_some() {
            return "`ip addr` lists this machine's: correct the pool's source, or give the machine that address";
        }
        match self.errno {
            libc::EMFILE => {
                "the descriptors are used up: raise the limit (LimitNOFILE=, ulimit -n), or lower runtime.max_connections"
            }
            libc::ENFILE => "the whole machine's descriptors are used up: `sysctl fs.file-max fs.file-nr`",
            libc::EADDRNOTAVAIL | libc::EAGAIN => {
                "no local port is free (`ss -s`): more addresses in the pool's source, or net.ipv4.ip_local_port_range"
            }
            libc::EPERM | libc::EACCES => {
                "this machine forbids the connect: its firewall (`nft list ruleset`), a route, a policy of the cgroup"
            }
            libc::ENOSPC => "no epoll watch is left: `sysctl fs.epoll.max_user_watches`",
            libc::ENOMEM | libc::ENOBUFS => "no memory for sockets is left: `free -m`, `sysctl net.ipv4.tcp_mem`",
            _ => "level=debug says more: `POST /log?level=debug`, event=connect_failed",
        }
    }
}

impl State {
    /// Compares what the history knows now with what was known, and logs what began and what is over.
    pub fn look_at_local_resources(&mut self) {
        let before = std::mem::take(&mut self.shortages);
        let mut now = BTreeMap::new();
        for (name, life) in &self.inputs.listener_lives {
            let (sessions, drops) = self.history.recent_sessions(name);
            let end = Termination::LocalResources as usize;
            let ended = self.history.recent_ends(Some(name))[end] + sessions[end];
            let count = ended + drops[DropReason::LocalResources as usize];
            if count == 0 {
                continue;
            }
            let errno = life.local_error.load(Relaxed);
            let is_address = errno == libc::EADDRNOTAVAIL;
            let pool = self.config.listeners.get(name).and_then(|listener| self.config.pools.get(&listener.pool));
            let mut sources = pool.filter(|_| is_address).into_iter().flat_map(|pool| &pool.source);
            let foreign = sources.find(|source| net::check::is_foreign(**source)).copied();
            let since = before.get(name).map_or_else(SystemTime::now, |before: &Shortage| before.since);
            let shortage = Shortage { since, count, errno, foreign };
            if !before.contains_key(name) {
                tracing::warn!(
                    event = "local_resources", listener = name, count, reason = %shortage.reason(), "{}", shortage.change()
                );
            }
            now.insert(name.clone(), shortage);
        }
        for name in before.keys().filter(|name| !now.contains_key(*name)) {
            tracing::info!(event = "local_resources", listener = name, "none for ten minutes");
        }
        self.shortages = now;
    }
}
