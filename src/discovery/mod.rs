//! Names as upstreams: looks them up again and again, as their TTLs say, and tells the control thread.
//!
//! Runs on the control thread, and never waits there: each name has a task of its own. What an answer changes is decided
//! by the control thread; here is only what was asked and said.

mod ask;
mod files;
mod lookup;
mod message;
mod resolv;
mod rules;
pub mod surroundings;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{Notify, Semaphore};
use tokio::task::AbortHandle;

use crate::config::names::{Answer, Name};
use crate::control;
use crate::control::lookups::{Answered, Lookup, LookupError, Outcome};
use files::Files;

pub use message::check_name;

/// Look-ups under way at a time; the others wait for their turn.
const LOOKUPS_MAX: usize = 32;
/// A look-up takes no longer: all servers, all of the search list, all hosts of a service.
const LOOKUP_TIME_MAX: Duration = Duration::from_secs(15);

/// All names that are looked up.
#[derive(Debug)]
pub struct Discovery {
    handle: control::Handle,
    shared: Arc<Shared>,
    tasks: BTreeMap<Name, Task>,
}

/// What all tasks use.
#[derive(Debug)]
struct Shared {
    files: Files,
    turns: Semaphore,
}

#[derive(Debug)]
struct Task {
    handle: AbortHandle,
    wanted: Arc<Notify>,
}

impl Drop for Task {
    fn drop(&mut self) {
        self.handle.abort();
    }
}

impl Discovery {
    /// Looks nothing up yet.
    pub fn new(handle: control::Handle) -> Discovery {
        let shared = Shared { files: Files::default(), turns: Semaphore::new(LOOKUPS_MAX) };
        Discovery { handle, shared: Arc::new(shared), tasks: BTreeMap::new() }
    }

    /// From now on these names: new ones are looked up at once, others no more. Within a tokio runtime.
    pub fn watch(&mut self, names: &BTreeSet<Name>) {
        self.tasks.retain(|name, _| names.contains(name));
        for name in names {
            if !self.tasks.contains_key(name) {
                let wanted = Arc::new(Notify::new());
                let run = run(name.clone(), self.handle.clone(), Arc::clone(&self.shared), Arc::clone(&wanted));
                self.tasks.insert(name.clone(), Task { handle: tokio::spawn(run).abort_handle(), wanted });
            }
        }
    }

    /// Is this name looked up?
    pub fn watches(&self, name: &Name) -> bool {
        self.tasks.contains_key(name)
    }

    /// Looks all of them up without waiting for their time.
    pub fn look_now(&self) {
        self.tasks.values().for_each(|task| task.wanted.notify_one());
    }
}

/// Looks one name up until the control thread is gone.
async fn run(name: Name, handle: control::Handle, shared: Arc<Shared>, wanted: Arc<Notify>) {
    let mut last = Answer::new();
    let mut failures = 0;
    loop {
        let result = look_up(&name, &shared, &last).await;
        let wait = match &result {
            Ok(answered) => {
                failures = 0;
                last.clone_from(&answered.found);
                rules::after_answer(answered.ttl, fastrand::f64())
            }
            Err(_) => {
                failures += 1;
                rules::after_failure(failures, fastrand::f64())
            }
        };
        let next = Instant::now() + wait;
        tracing::debug!(event = "lookup", name = %name, next_ms = wait.as_millis() as u64, result = ?result);
        if handle.looked_up(Lookup { name: name.clone(), result, next }).await.is_err() {
            return;
        }
        tokio::select! {
            () = tokio::time::sleep_until(next.into()) => {}
            () = wanted.notified() => {}
        }
    }
}

async fn look_up(name: &Name, shared: &Shared, last: &Answer) -> Result<Answered, LookupError> {
    let _turn = shared.turns.acquire().await;
    let looking = lookup::look_up(name, &shared.files, last);
    tokio::time::timeout(LOOKUP_TIME_MAX, looking).await.unwrap_or_else(|_| {
        let message = format!("no answer within {} s", LOOKUP_TIME_MAX.as_secs());
        Err(LookupError { outcome: Outcome::Timeout, message })
    })
}

/// Looks names up once, all at a time, within this long: for commands that have no control thread.
pub async fn look_up_once(names: BTreeSet<Name>, within: Duration) -> BTreeMap<Name, Result<Answered, LookupError>> {
    let shared = Arc::new(Shared { files: Files::default(), turns: Semaphore::new(LOOKUPS_MAX) });
    let mut lookups = tokio::task::JoinSet::new();
    for name in names {
        let shared = Arc::clone(&shared);
        lookups.spawn(async move {
            let nothing = Answer::new();
            let result = tokio::time::timeout(within, look_up(&name, &shared, &nothing)).await;
            let late =
                |_| Err(LookupError { outcome: Outcome::Timeout, message: format!("no answer within {within:?}") });
            (name, result.unwrap_or_else(late))
        });
    }
    lookups.join_all().await.into_iter().collect()
}
