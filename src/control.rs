//! All that may be asked of the control thread: the messages, their answers, and the handle that carries them.

pub mod lookups;
pub mod probes;
pub mod view;

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};

use crate::address::Address;
use crate::pool::{AdminState, Observation, UpstreamLife};
use lookups::Lookup;
use view::{Filter, Tapped};

/// Requests under way to the control thread; a sender waits when it is full.
pub const COMMANDS_MAX: usize = 256;

/// Connections that wait for a reader of `follow`; it misses those beyond.
const FOLLOWED_MAX: usize = 256;

/// Who asked for a reload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReloadTrigger {
    /// The file or one of its directories changed.
    File,
    /// SIGHUP.
    Signal,
    /// `POST /reload`.
    Admin,
}

impl ReloadTrigger {
    /// The word in logs and status.
    pub fn as_str(self) -> &'static str {
        match self {
            ReloadTrigger::File => "file",
            ReloadTrigger::Signal => "signal",
            ReloadTrigger::Admin => "admin",
        }
    }
}

/// What came of one reload.
#[derive(Clone, Debug, serde::Serialize)]
pub struct ReloadReport {
    /// RFC 3339, UTC.
    pub time: String,
    /// file, signal or admin.
    pub trigger: &'static str,
    /// applied, unchanged or refused.
    pub outcome: ReloadOutcome,
    /// One line a change, for people; empty when nothing changed.
    pub changes: Vec<String>,
    /// What of the file applies at the next start only, one line each; said again by each reload.
    pub pending: Vec<String>,
    /// Rendered, one element an error; empty unless refused.
    pub errors: Vec<String>,
    /// Rendered warnings of the file.
    pub warnings: Vec<String>,
    /// How long load, validation, binding and building took.
    pub duration_ms: f64,
}

/// How a reload ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ReloadOutcome {
    /// In force now.
    Applied,
    /// The content is what already runs.
    Unchanged,
    /// Nothing changed; see the errors.
    Refused,
}

/// What came of one upgrade.
#[derive(Clone, Debug, serde::Serialize)]
pub struct UpgradeReport {
    /// upgraded or failed.
    pub outcome: UpgradeOutcome,
    /// The process that serves now.
    pub pid: u32,
    /// Its version.
    pub version: String,
    /// Connections and sessions that the old process still carries; 0 if it goes on serving.
    pub open: usize,
    /// Why the old process goes on serving; empty unless failed.
    pub errors: Vec<String>,
    /// From the order to its outcome.
    pub duration_ms: f64,
}

/// How an upgrade ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum UpgradeOutcome {
    /// Another process serves now.
    Upgraded,
    /// This one goes on; see the errors.
    Failed,
}

/// One request.
#[derive(Debug)]
pub enum Command {
    /// Start the program again and hand it every listening socket.
    Upgrade(oneshot::Sender<UpgradeReport>),
    /// Load the file again.
    Reload(ReloadTrigger, oneshot::Sender<Arc<ReloadReport>>),
    /// Set the admin state of upstreams of a pool: of one address, or of all.
    SetAdmin(SetAdmin, oneshot::Sender<Result<SetAdminReply, SetAdminError>>),
    /// What a health check observed.
    Observed(Vec<Observation>),
    /// What a look-up of a name came to.
    LookedUp(Lookup),
    /// Failed connects in a row reached the pool's limit.
    ConnectsFailed(Arc<UpstreamLife>),
    /// The status as JSON.
    Status(oneshot::Sender<serde_json::Value>),
    /// The last ten minutes as JSON.
    History(oneshot::Sender<serde_json::Value>),
    /// The configuration in force as JSON.
    Config(oneshot::Sender<serde_json::Value>),
    /// Open connections, the oldest first, and how many there are.
    Connections(Filter, oneshot::Sender<(Vec<view::Connection>, usize)>),
    /// The last connections with the headers that their upstreams got, the newest first.
    Tap(Filter, oneshot::Sender<Vec<Tapped>>),
    /// Names of a listener and of a pool: is there one?
    Knows((Option<String>, Option<String>), oneshot::Sender<Result<(), String>>),
    /// Send each connection that reaches an upstream from now on.
    Follow(Filter, mpsc::Sender<Tapped>),
    /// Reset the connection of this id, by order of ...; was it there?
    EndConnection(String, String, oneshot::Sender<bool>),
    /// Log at this level, by order of ..., until a reload changes it.
    SetLogLevel(String, String, oneshot::Sender<Result<(), String>>),
    /// The metrics in the Prometheus text format.
    Metrics(oneshot::Sender<String>),
}

/// An operator's order.
#[derive(Clone, Debug)]
pub struct SetAdmin {
    /// Name of the pool.
    pub pool: String,
    /// An address as in the configuration or in `/status` (`10.0.0.1:80`; `10.0.0.1` means every port), or a name of the
    /// configuration, which means each of its addresses; `None`: all of the pool.
    pub address: Option<String>,
    /// What they become.
    pub state: AdminState,
    /// With `Draining`: reset what is still open after this long.
    pub timeout: Option<Duration>,
    /// Shown in `/status`: "admin api", "command line".
    pub by: String,
}

/// What an order did.
#[derive(Clone, Debug, serde::Serialize)]
pub struct SetAdminReply {
    /// The upstreams it named, and the connections still open on each.
    pub upstreams: Vec<(Address, u64)>,
}

/// Why an order was not carried out.
#[derive(Clone, Debug, thiserror::Error)]
pub enum SetAdminError {
    /// No such pool.
    #[error("no pool named {name:?}; pools: {known}")]
    UnknownPool {
        /// As asked.
        name: String,
        /// Comma separated.
        known: String,
    },
    /// No such upstream.
    #[error("no upstream {address:?} in pool {pool:?}; upstreams: {known}")]
    UnknownUpstream {
        /// Where it was looked for.
        pool: String,
        /// As asked.
        address: String,
        /// Comma separated.
        known: String,
    },
}

/// Sends requests to the control thread.
#[derive(Clone, Debug)]
pub struct Handle {
    sender: mpsc::Sender<Command>,
}

/// The control thread has ended.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("the control thread has stopped")]
pub struct Stopped;

/// A handle and the receiving end for the control thread.
pub fn channel() -> (Handle, mpsc::Receiver<Command>) {
    let (sender, receiver) = mpsc::channel(COMMANDS_MAX);
    (Handle { sender }, receiver)
}

impl Handle {
    /// Ask for a reload and wait for its outcome.
    pub async fn reload(&self, trigger: ReloadTrigger) -> Result<Arc<ReloadReport>, Stopped> {
        self.ask(|reply| Command::Reload(trigger, reply)).await
    }

    /// Ask for an upgrade and wait for its outcome.
    pub async fn upgrade(&self) -> Result<UpgradeReport, Stopped> {
        self.ask(Command::Upgrade).await
    }

    /// Change the admin state of upstreams.
    pub async fn set_admin(&self, order: SetAdmin) -> Result<Result<SetAdminReply, SetAdminError>, Stopped> {
        self.ask(|reply| Command::SetAdmin(order, reply)).await
    }

    /// Report what health checks saw.
    pub async fn observed(&self, observations: Vec<Observation>) -> Result<(), Stopped> {
        self.sender.send(Command::Observed(observations)).await.map_err(|_| Stopped)
    }

    /// Report what a look-up of a name came to.
    pub async fn looked_up(&self, lookup: Lookup) -> Result<(), Stopped> {
        self.sender.send(Command::LookedUp(lookup)).await.map_err(|_| Stopped)
    }

    /// Report failed connects; called by workers, never waits. Lost when the queue is full: the next failure reports again.
    pub fn connects_failed(&self, life: Arc<UpstreamLife>) {
        let _ = self.sender.try_send(Command::ConnectsFailed(life));
    }

    /// Everything that the status shows. `preface drain --wait` reads `pools.NAME.upstreams[]` in it, each with its
    /// `address` and the number of its `open` connections.
    pub async fn status(&self) -> Result<serde_json::Value, Stopped> {
        self.ask(Command::Status).await
    }

    /// Rates and latencies of the last ten minutes.
    pub async fn history(&self) -> Result<serde_json::Value, Stopped> {
        self.ask(Command::History).await
    }

    /// Open connections, the oldest first, and how many there are.
    pub async fn connections(&self, filter: Filter) -> Result<(Vec<view::Connection>, usize), Stopped> {
        self.ask(|reply| Command::Connections(filter, reply)).await
    }

    /// The last connections with the headers that their upstreams got, the newest first.
    pub async fn tap(&self, filter: Filter) -> Result<Vec<Tapped>, Stopped> {
        self.ask(|reply| Command::Tap(filter, reply)).await
    }

    /// Are these a listener and a pool? An error names those that there are.
    pub async fn knows(&self, names: (Option<String>, Option<String>)) -> Result<Result<(), String>, Stopped> {
        self.ask(|reply| Command::Knows(names, reply)).await
    }

    /// Receive each connection that reaches an upstream from now on.
    pub async fn follow(&self, filter: Filter) -> Result<mpsc::Receiver<Tapped>, Stopped> {
        let (sender, receiver) = mpsc::channel(FOLLOWED_MAX);
        self.sender.send(Command::Follow(filter, sender)).await.map_err(|_| Stopped)?;
        Ok(receiver)
    }

    /// Reset one connection; was it there?
    pub async fn end_connection(&self, id: String, by: String) -> Result<bool, Stopped> {
        self.ask(|reply| Command::EndConnection(id, by, reply)).await
    }

    /// Log at this level until a reload changes it.
    pub async fn set_log_level(&self, level: String, by: String) -> Result<Result<(), String>, Stopped> {
        self.ask(|reply| Command::SetLogLevel(level, by, reply)).await
    }

    /// The configuration in force.
    pub async fn config(&self) -> Result<serde_json::Value, Stopped> {
        self.ask(Command::Config).await
    }

    /// The metrics as text.
    pub async fn metrics(&self) -> Result<String, Stopped> {
        self.ask(Command::Metrics).await
    }

    async fn ask<T>(&self, command: impl FnOnce(oneshot::Sender<T>) -> Command) -> Result<T, Stopped> {
        let (sender, receiver) = oneshot::channel();
        self.sender.send(command(sender)).await.map_err(|_| Stopped)?;
        receiver.await.map_err(|_| Stopped)
    }
}
