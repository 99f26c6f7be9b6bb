//! What others may see of a UDP session, also for a while after its end.

use std::cell::{Cell, RefCell};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use ulid::Ulid;

use crate::address::Address;
use crate::config::Protocol;
use crate::control::view::{self, Filter};
use crate::snapshot::ListenerLife;
use crate::termination::Termination;

/// Who and since when. What it has carried is written here when somebody looks, and at its end.
#[derive(Debug)]
pub struct SessionEntry {
    /// Its ULID.
    pub id: Ulid,
    /// Where it counts.
    pub listener: Arc<ListenerLife>,
    /// Who sends.
    pub client: SocketAddr,
    /// The address that the client writes to.
    pub local: SocketAddr,
    /// When it began.
    pub started: Instant,
    way: RefCell<Option<(Arc<str>, Address)>>,
    carried: Cell<Carried>,
    ended: Cell<Option<(Termination, Duration)>>,
}

/// What a session has carried; the first of two is of the client, the second of the upstream.
#[derive(Clone, Copy, Debug, Default)]
pub struct Carried {
    /// Passed on.
    pub datagrams: [u64; 2],
    /// Their payload.
    pub bytes: [u64; 2],
    /// From the begin to the first reply.
    pub first_reply: Option<Duration>,
}

impl SessionEntry {
    /// A session that begins.
    pub fn new(
        id: Ulid,
        listener: Arc<ListenerLife>,
        (client, local): (SocketAddr, SocketAddr),
        started: Instant,
    ) -> SessionEntry {
        let (way, carried, ended) = Default::default();
        SessionEntry { id, listener, client, local, started, way, carried, ended }
    }

    /// Takes note of the pool, the upstream, and what was carried until now.
    pub fn publish(&self, pool: Arc<str>, upstream: Address, carried: Carried) {
        *self.way.borrow_mut() = Some((pool, upstream));
        self.carried.set(carried);
    }

    /// It is over.
    pub fn ended(&self, termination: Termination, duration: Duration) {
        self.ended.set(Some((termination, duration)));
    }

    /// Is it one that the filter means? Its pool is known once it was published.
    pub fn fits(&self, filter: &Filter) -> bool {
        let way = self.way.borrow();
        filter.fits(&self.listener.name, way.as_ref().map(|(pool, _)| &**pool), Some(self.client.ip()))
            && filter.id.as_ref().is_none_or(|id| *id == self.id.to_string())
    }

    /// As it was published.
    pub fn view(&self) -> view::Connection {
        let (way, carried, ended) = (self.way.borrow(), self.carried.get(), self.ended.get());
        let age = ended.map_or_else(|| self.started.elapsed(), |(_, duration)| duration);
        let accepted = SystemTime::UNIX_EPOCH + Duration::from_millis(self.id.timestamp_ms());
        view::Connection {
            id: self.id.to_string(),
            protocol: Protocol::Udp.as_str(),
            accepted: humantime::format_rfc3339_millis(accepted).to_string(),
            listener: self.listener.name.to_string(),
            client: self.client.into(),
            local: Address::Ip(self.local),
            pool: way.as_ref().map(|(pool, _)| pool.to_string()),
            upstream: way.as_ref().map(|(_, upstream)| upstream.clone()),
            age_ms: view::milliseconds(age),
            bytes_in: carried.bytes[0],
            bytes_out: carried.bytes[1],
            datagrams_in: Some(carried.datagrams[0]),
            datagrams_out: Some(carried.datagrams[1]),
            first_byte_ms: carried.first_reply.map(view::milliseconds),
            end: ended.map(|(termination, _)| termination.to_string()),
        }
    }
}
