//! The stop signal that every task holds, and the wait for open connections.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::sync::{Notify, watch};

/// Raises the stop signal; dropping it raises it too.
#[derive(Debug)]
pub struct StopSource {
    sender: watch::Sender<bool>,
}

/// Held by every task that must end when the process does.
#[derive(Clone, Debug)]
pub struct Stop {
    receiver: watch::Receiver<bool>,
}

impl StopSource {
    /// A source and its first holder; more by `Stop::clone`.
    pub fn new() -> (StopSource, Stop) {
        let (sender, receiver) = watch::channel(false);
        (StopSource { sender }, Stop { receiver })
    }

    /// Tells every holder to stop.
    pub fn stop(&self) {
        self.sender.send_replace(true);
    }
}

impl Stop {
    /// Completes once the process should stop.
    pub async fn stopped(&mut self) {
        // An error means that the source is gone, which is a stop as well.
        let _ = self.receiver.wait_for(|stop| *stop).await;
    }
}

/// How many connections are open in the whole process, with a limit.
#[derive(Debug, Default)]
pub struct OpenConnections {
    count: AtomicUsize,
    emptied: Notify,
}

/// One open connection; given back on drop.
#[derive(Debug)]
pub struct OpenConnection(Arc<OpenConnections>);

impl OpenConnections {
    /// Counts one more, or `None` when `limit` are open.
    pub fn open(self: &Arc<Self>, limit: usize) -> Option<OpenConnection> {
        if self.count.fetch_add(1, Ordering::Relaxed) >= limit {
            self.close();
            return None;
        }
        Some(OpenConnection(Arc::clone(self)))
    }

    /// Open now.
    pub fn count(&self) -> usize {
        self.count.load(Ordering::Relaxed)
    }

    /// Completes when none is open.
    pub async fn empty(&self) {
        loop {
            let emptied = self.emptied.notified();
            tokio::pin!(emptied);
            emptied.as_mut().enable();
            if self.count() == 0 {
                return;
            }
            emptied.await;
        }
    }

    fn close(&self) {
        if self.count.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.emptied.notify_waiters();
        }
    }
}

impl Drop for OpenConnection {
    fn drop(&mut self) {
        self.0.close();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn empty_waits_for_the_last_connection() {
        let open = Arc::new(OpenConnections::default());
        let (first, second) = (open.open(2).unwrap(), open.open(2).unwrap());
        assert!(open.open(2).is_none());
        assert_eq!(open.count(), 2);
        drop(first);
        let waiting = open.empty();
        tokio::pin!(waiting);
        assert!(std::future::poll_fn(|cx| std::task::Poll::Ready(waiting.as_mut().poll(cx).is_pending())).await);
        drop(second);
        waiting.await;
    }
}
