//! Questions that the workers answer: open connections, the last ones with their headers; and the end of a single one.

use std::collections::BTreeSet;
use std::sync::Arc;

use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, timeout_at};

use crate::control::view::{Connection, Filter, Tapped};
use crate::server::state::{COLLECT_TIMEOUT, State};
use crate::worker::{Look, Message};

impl State {
    /// What each worker answers. One that doesn't in time is left out, and counted.
    async fn ask_workers<T>(&mut self, look: impl Fn(oneshot::Sender<T>) -> Look) -> Vec<T> {
        let mut answers = Vec::new();
        for worker in &self.workers {
            let (sender, receiver) = oneshot::channel();
            worker.send(Message::Look(look(sender))).await;
            answers.push(receiver);
        }
        let deadline = Instant::now() + COLLECT_TIMEOUT;
        let mut answered = Vec::new();
        for answer in answers {
            match timeout_at(deadline, answer).await {
                Ok(Ok(answer)) => answered.push(answer),
                _ => self.unresponsive += 1,
            }
        }
        answered
    }

    /// Open connections, the oldest first, and how many there are.
    pub async fn connections(&mut self, filter: Filter) -> (Vec<Connection>, usize) {
        let answers = self.ask_workers(|reply| Look::View(filter.clone(), reply)).await;
        let open = answers.iter().map(|(_, open)| open).sum();
        let mut all: Vec<Connection> = answers.into_iter().flat_map(|(connections, _)| connections).collect();
        all.sort_by(|one, other| one.id.cmp(&other.id));
        all.truncate(filter.limit);
        (all, open)
    }

    /// The last connections with the headers that their upstreams got, the newest first.
    pub async fn tapped(&mut self, filter: Filter) -> Vec<Tapped> {
        let answers = self.ask_workers(|reply| Look::Tap(filter.clone(), reply)).await;
        let mut all: Vec<Tapped> = answers.into_iter().flatten().collect();
        all.sort_by(|one, other| other.connection.id.cmp(&one.connection.id));
        all.truncate(filter.limit);
        all
    }

    /// Are these a listener and a pool of the file, or ones that left it and are still in use?
    pub fn knows(&self, (listener, pool): (Option<String>, Option<String>)) -> Result<(), String> {
        let (config, inputs) = (&self.config, &self.inputs);
        let listeners = config.listeners.keys().chain(inputs.listener_lives.keys()).map(String::as_str).collect();
        let leaving = inputs.leaving.keys().map(|key| key.pool.as_str());
        let pools = config.pools.keys().map(String::as_str).chain(leaving).collect();
        is_among("listener", listener.as_deref(), &listeners)?;
        is_among("pool", pool.as_deref(), &pools)
    }

    /// Sends each connection that reaches an upstream from now on, as long as somebody receives.
    pub async fn follow(&self, filter: Filter, sender: mpsc::Sender<Tapped>) {
        for worker in &self.workers {
            worker.send(Message::Look(Look::Follow(filter.clone(), sender.clone()))).await;
        }
    }

    /// Resets one connection; was it there?
    pub async fn end_connection(&mut self, id: &str, by: &str) -> bool {
        let id: Arc<str> = Arc::from(id);
        let found = self.ask_workers(|reply| Look::EndOne(Arc::clone(&id), reply)).await.contains(&true);
        if found {
            tracing::info!(event = "admin", id = &*id, order = "end", by);
        }
        found
    }
}

fn is_among(what: &str, wanted: Option<&str>, known: &BTreeSet<&str>) -> Result<(), String> {
    match wanted {
        Some(name) if !known.contains(name) => {
            let known: Vec<&str> = known.iter().copied().collect();
            Err(format!("no {what} named {name:?}; {what}s: {}", known.join(", ")))
        }
        _ => Ok(()),
    }
}
