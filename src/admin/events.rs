//! `/events`: the status once a second as Server-Sent Events, asked of the control thread once for all who follow.

use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use http_body_util::channel::{Channel, Sender};
use hyper::body::Bytes;
use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until, timeout};

use super::guard::Refusal;
use crate::control::Handle;

/// Between two events.
const PERIOD: Duration = Duration::from_secs(1);

/// Pages that follow at once. Well below `CONNECTIONS_MAX`, so that they leave room for probes and orders.
pub const FOLLOWERS_MAX: usize = 16;

/// A stream ends after this long, in good order; the page asks for the next one. Below the age at which the server
/// takes no further request on a connection.
const STREAM_AGE_MAX: Duration = Duration::from_secs(240);

/// A follower that has taken nothing for this long is gone.
const SEND_TIMEOUT: Duration = Duration::from_secs(10);

/// One event, ready to be sent. Empty: none was built yet.
type Event = Bytes;

/// Builds the events while anyone follows, and at no other time.
#[derive(Clone, Debug)]
pub struct Events {
    control: Handle,
    current: Arc<Mutex<Weak<watch::Sender<Event>>>>,
    stopping: watch::Sender<bool>,
}

impl Events {
    /// Nobody follows yet.
    pub fn new(control: Handle) -> Events {
        Events { control, current: Arc::default(), stopping: watch::Sender::new(false) }
    }

    /// Ends every stream, now and from now on: the server stops.
    pub fn stop(&self) {
        self.stopping.send_replace(true);
    }

    /// A stream that begins with the newest event.
    pub(super) fn follow(&self) -> Result<Response, Refusal> {
        let events = self.receiver()?;
        let (sender, body) = Channel::<Bytes>::new(1);
        tokio::spawn(feed(sender, events, self.stopping.subscribe()));
        let headers = [(header::CONTENT_TYPE, "text/event-stream"), (header::CACHE_CONTROL, "no-store")];
        Ok((headers, axum::body::Body::new(body)).into_response())
    }

    fn receiver(&self) -> Result<watch::Receiver<Event>, Refusal> {
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(sender) = current.upgrade() {
            if sender.receiver_count() >= FOLLOWERS_MAX {
                let error = format!("{FOLLOWERS_MAX} pages follow already; close one, or read /status");
                return Err(Refusal::new(StatusCode::SERVICE_UNAVAILABLE, error));
            }
            return Ok(sender.subscribe());
        }
        let (sender, receiver) = watch::channel(Event::new());
        let sender = Arc::new(sender);
        *current = Arc::downgrade(&sender);
        tokio::spawn(build(self.control.clone(), sender));
        Ok(receiver)
    }
}

/// Asks once a second, until nobody follows or the control thread has ended.
async fn build(control: Handle, sender: Arc<watch::Sender<Event>>) {
    let mut ticks = interval(PERIOD);
    // A control thread that is slow to answer must not be asked faster afterwards.
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            () = sender.closed() => return,
        }
        let Ok(status) = control.status().await else { return };
        sender.send_replace(format!("event: status\ndata: {status}\n\n").into());
    }
}

/// Sends what is newest whenever the follower has taken the one before: whoever is slow misses some.
async fn feed(mut body: Sender<Bytes>, mut events: watch::Receiver<Event>, mut stopping: watch::Receiver<bool>) {
    let end = Instant::now() + STREAM_AGE_MAX;
    loop {
        let event = events.borrow_and_update().clone();
        if !event.is_empty() && !matches!(timeout(SEND_TIMEOUT, body.send_data(event)).await, Ok(Ok(()))) {
            return;
        }
        tokio::select! {
            changed = events.changed() => if changed.is_err() { return },
            _ = stopping.wait_for(|&stopping| stopping) => return,
            () = sleep_until(end) => return,
        }
    }
}
