//! The accept loop of one socket, and which connections it admits.

pub mod udp;

use std::cell::Cell;
use std::future::poll_fn;
use std::io;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::Poll;
use std::time::Duration;

use socket2::Socket;
use tokio::sync::Notify;
use tokio::time::sleep;

use crate::address::Address;
use crate::connection::{self, Record, Shared};
use crate::net::{self, Accepted, Listening, Stream};
use crate::snapshot::{At, Listener};
use crate::termination::Termination;

/// How long a listener rests when no descriptor is left.
const SHORTAGE_REST: Duration = Duration::from_millis(100);
/// Handshakes under way have this long to complete before a listener closes.
const HANDSHAKES_GRACE: Duration = Duration::from_millis(100);
/// Connections accepted in a row before the worker's other tasks have a turn.
const ACCEPTS_PER_TURN: usize = 64;
/// The same where all workers accept from one socket: who comes first must not take the whole queue.
const SHARED_ACCEPTS_PER_TURN: usize = 4;

/// One listening socket of one worker.
pub struct Acceptor {
    /// The socket.
    pub listening: Listening,
    /// Whose it is, besides this worker's.
    pub at: At,
    /// What the socket is bound to.
    pub bound: Address,
    /// Under which its listener stands in the snapshot.
    pub slot: usize,
    /// Notified when the address is no longer served.
    pub retire: Notify,
    /// Set before: another process goes on accepting from this very socket.
    pub handed_over: Cell<bool>,
}

/// Another descriptor of a listener's socket.
pub struct Lent {
    /// Under which its listener stands in the snapshot.
    pub slot: usize,
    /// What the socket is bound to.
    pub bound: Address,
    /// The descriptor.
    pub socket: Socket,
}

impl Acceptor {
    /// Another descriptor of the socket.
    pub fn lend(&self) -> io::Result<Lent> {
        Ok(Lent { slot: self.slot, bound: self.bound.clone(), socket: self.listening.lend()? })
    }
}

/// Accepts until retired, then serves what was queued and closes. A socket that was handed over is left as it is.
pub async fn run(shared: Rc<Shared>, acceptor: Rc<Acceptor>, mut listener: Arc<Listener>) {
    let mut is_short = false;
    loop {
        let accepted = tokio::select! {
            biased;
            () = acceptor.retire.notified() => break,
            accepted = accept_some(&shared, &acceptor, &mut listener) => accepted,
        };
        match accepted {
            Ok(()) => {
                if std::mem::take(&mut is_short) {
                    tracing::info!(event = "accept", listener = &*listener.life.name, "accepting again");
                }
                tokio::task::yield_now().await;
            }
            Err(error) => {
                if !std::mem::replace(&mut is_short, true) {
                    tracing::warn!(
                        event = "accept", listener = &*listener.life.name, reason = %error,
                        "cannot accept connections; raise the descriptor limit (LimitNOFILE, ulimit -n) or lower runtime.max_connections"
                    );
                }
                sleep(SHORTAGE_REST).await;
            }
        }
    }
    if acceptor.handed_over.get() {
        // What is queued is the other process's, and so are the handshakes.
        return;
    }
    match acceptor.at {
        At::Ip { .. } => {
            if let Err(error) = acceptor.listening.refuse_handshakes() {
                tracing::debug!(event = "retire", listener = &*listener.life.name, reason = %error, "no filter on the socket");
            }
        }
        // Its file is gone by now: nobody new finds the way here.
        At::Unix(_) => {}
        // Whoever handed the socket over still has it, and with it the queue: for the next process, without a loss.
        At::Inherited { .. } => return,
    }
    accept_queued(&shared, &acceptor, &listener);
    sleep(HANDSHAKES_GRACE).await;
    accept_queued(&shared, &acceptor, &listener);
}

async fn accept_some(shared: &Rc<Shared>, acceptor: &Acceptor, listener: &mut Arc<Listener>) -> io::Result<()> {
    // Each connection to a shared socket wakes every worker that waits for one, and one of them gets it: the event loop
    // does not offer EPOLLEXCLUSIVE. A busy worker does not wait, so the others' vain look costs idle time.
    let is_shared = !matches!(acceptor.at, At::Ip { .. });
    let accepts_max = if is_shared { SHARED_ACCEPTS_PER_TURN } else { ACCEPTS_PER_TURN };
    for count in 0..accepts_max {
        // Waits for the first one only. What was accepted is admitted in the same turn: a connection that is dropped
        // in between would look served to its client.
        let next = poll_fn(|cx| match acceptor.listening.poll_accept(cx) {
            Poll::Pending if count > 0 => Poll::Ready(None),
            accepted => accepted.map(Some),
        });
        let Some(accepted) = next.await else { break };
        shared.refresh(acceptor.slot, listener);
        admit(shared, accepted?, acceptor, listener);
    }
    Ok(())
}

fn accept_queued(shared: &Rc<Shared>, acceptor: &Acceptor, listener: &Arc<Listener>) {
    while let Ok(accepted) = acceptor.listening.try_accept() {
        admit(shared, accepted, acceptor, listener);
    }
}

/// Starts a connection, or resets it at once if a rule or a limit is against it.
fn admit(shared: &Rc<Shared>, accepted: Accepted, acceptor: &Acceptor, listener: &Arc<Listener>) {
    let (life, config) = (&listener.life, &listener.config);
    let client = accepted.client;
    life.accepted.fetch_add(1, Ordering::Relaxed);
    let others = life.open.fetch_add(1, Ordering::Relaxed) as usize;
    let open = shared.open.open(shared.with_snapshot(|snapshot| snapshot.connections_max));
    let mut in_source = false;
    let source = client.ip().map(|client| client.ip());
    let refusal = if source.is_some_and(|source| !listener.allows(source)) {
        Some(Termination::Denied)
    } else if open.is_none() {
        Some(Termination::ProcessFull)
    } else if config.max_connections > 0 && others >= config.max_connections {
        Some(Termination::ListenerFull)
    } else if let (Some(source), 1..) = (source, config.max_connections_per_source) {
        in_source = life.enter_source(source, config.max_connections_per_source);
        (!in_source).then_some(Termination::SourceFull)
    } else {
        None
    };
    let mut record = Record::new(shared, life, client, acceptor.bound.clone(), open, in_source);
    if let Some(termination) = refusal {
        net::stream::reset(accepted.fd);
        record.end(termination);
        return;
    }
    let stream = match Stream::new(accepted) {
        Ok(stream) => stream,
        Err(error) => {
            record.lacked(&error);
            return record.end(Termination::LocalResources);
        }
    };
    // A socket bound to one address has that address; only under a wildcard must the kernel be asked.
    if acceptor.bound.is_unspecified() {
        match stream.local_address() {
            Ok(local) => record.set_local(local),
            // The client is gone already, and with it the address.
            Err(_) => return record.end(Termination::ClientReset),
        }
    }
    shared.tick();
    tokio::task::spawn_local(connection::serve(stream, acceptor.slot, Arc::clone(listener), record));
}
