//! The admin API of this process: its sockets, what serves them, and the file by which the command line finds it.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinHandle;

use crate::admin::announce::{self, Announcement, address_text};
use crate::admin::{self, Listener, Scope};
use crate::config::{self, AdminBind};
use crate::drain::{Stop, StopSource};
use crate::server::upgrade::{Predecessor, admin_key, probe_key};

/// Bound from the start of the process until its end, or until another one takes its place.
pub struct AdminSide {
    served: Vec<Served>,
    stop: (StopSource, Stop),
    tasks: Vec<JoinHandle<()>>,
    announcement: Option<Announcement>,
}

struct Served {
    /// Under which a successor asks for the socket.
    key: String,
    scope: Scope,
    listener: Arc<Listener>,
}

impl AdminSide {
    /// Binds what `[admin]` names, or takes over what a predecessor has bound for it.
    pub fn bind(config: &config::Admin, mut predecessor: Option<&mut Predecessor>) -> io::Result<AdminSide> {
        let mut served = Vec::new();
        let probe_bind = config.probe_bind.map(AdminBind::Tcp);
        let all = [(Some(&config.bind), Scope::All), (probe_bind.as_ref(), Scope::Probes)];
        for (bind, scope) in all.into_iter().filter_map(|(bind, scope)| Some((bind?, scope))) {
            let text = address_text(bind);
            let key = if scope == Scope::All { admin_key(&text) } else { probe_key(&text) };
            let taken =
                predecessor.as_mut().and_then(|predecessor| predecessor.take(&key)).and_then(|mut one| one.pop());
            let adopted = taken.map(|socket| admin::adopt(bind, socket)).transpose()?.flatten();
            let listener = Arc::new(adopted.map_or_else(|| admin::bind(bind), Ok)?);
            served.push(Served { key, scope, listener });
        }
        Ok(AdminSide { served, stop: StopSource::new(), tasks: Vec::new(), announcement: None })
    }

    /// Where the whole of it listens.
    pub fn address(&self) -> io::Result<AdminBind> {
        self.served[0].listener.address()
    }

    /// Answers from now on. `state` gives what is answered from, for each scope.
    pub fn start(&mut self, state: impl Fn(Scope) -> admin::State) {
        for Served { scope, listener, .. } in &self.served {
            let mut stop = self.stop.1.clone();
            let serving = admin::serve(Arc::clone(listener), state(*scope), async move { stop.stopped().await });
            self.tasks.push(tokio::spawn(serving));
        }
    }

    /// Takes over the files of the sockets, and lets the command line find this process: in the place of the one at
    /// `predecessor`, if there is one.
    pub fn announce(&mut self, address: &AdminBind, predecessor: Option<&AdminBind>) {
        self.served.iter().for_each(|one| one.listener.set_owned(true));
        let directory = announce::runtime_directory(std::env::var("RUNTIME_DIRECTORY").ok().as_deref());
        self.announcement = announce::announce(&directory, address, predecessor);
    }

    /// The sockets, each with the key under which a successor asks for it.
    pub fn sockets(&self) -> impl Iterator<Item = (String, BorrowedFd<'_>)> {
        self.served.iter().map(|one| (one.key.clone(), one.listener.descriptor()))
    }

    /// A successor has taken these: nobody is accepted here any more, and answers under way are still given.
    pub fn leave(&mut self, adopted: &[String]) {
        for one in self.served.drain(..).filter(|one| adopted.contains(&one.key)) {
            one.listener.set_owned(false);
        }
        if let Some(announcement) = self.announcement.take() {
            announcement.leave();
        }
        self.stop.0.stop();
    }

    /// Ends answers under way, at most so much later, and takes back the announcement.
    pub async fn end(mut self, within: Duration) {
        self.stop.0.stop();
        let _ = tokio::time::timeout(within, async {
            for task in self.tasks.drain(..) {
                let _ = task.await;
            }
        })
        .await;
    }
}
