//! Connections and UDP sessions as the admin API shows them, and which of them are asked for.

use std::net::IpAddr;
use std::time::Duration;

use ipnet::IpNet;

use crate::address::{Address, Client};

/// Which connections are meant; what is `None` does not matter.
#[derive(Clone, Debug, Default)]
pub struct Filter {
    /// Name of the listener.
    pub listener: Option<String>,
    /// Name of the pool.
    pub pool: Option<String>,
    /// Where the client is.
    pub client: Option<IpNet>,
    /// This one alone.
    pub id: Option<String>,
    /// So many at most.
    pub limit: usize,
}

impl Filter {
    /// Is this one meant, as far as these go?
    pub fn fits(&self, listener: &str, pool: Option<&str>, client: Option<IpAddr>) -> bool {
        self.listener.as_deref().is_none_or(|wanted| wanted == listener)
            && self.pool.as_deref().is_none_or(|wanted| pool == Some(wanted))
            && self.client.is_none_or(|network| client.is_some_and(|client| network.contains(&client)))
    }
}

impl Filter {
    /// The oldest of these, as many as are wanted: those of the lowest ids.
    pub fn oldest<T, K: Ord>(&self, all: impl Iterator<Item = T>, id: impl Fn(&T) -> K) -> Vec<T> {
        let mut all: Vec<T> = all.collect();
        if all.len() > self.limit {
            all.select_nth_unstable_by_key(self.limit, id);
            all.truncate(self.limit);
        }
        all
    }
}

/// With microseconds as the fraction.
pub fn milliseconds(duration: Duration) -> f64 {
    duration.as_micros() as f64 / 1000.0
}

/// One connection, or one UDP session.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Connection {
    /// Its ULID, which sorts by the time of the accept.
    pub id: String,
    /// tcp or udp.
    pub protocol: &'static str,
    /// When it was accepted, or its first datagram came: RFC 3339, UTC.
    pub accepted: String,
    /// Name of the listener.
    pub listener: String,
    /// Who connected.
    pub client: Client,
    /// What it connected to.
    pub local: Address,
    /// Name of the pool; `None` before the first attempt.
    pub pool: Option<String>,
    /// The last one tried.
    pub upstream: Option<Address>,
    /// From the accept to now, or to its end.
    pub age_ms: f64,
    /// From the client.
    pub bytes_in: u64,
    /// To the client.
    pub bytes_out: u64,
    /// From the client; of a session only.
    pub datagrams_in: Option<u64>,
    /// To the client; of a session only.
    pub datagrams_out: Option<u64>,
    /// From accept to the upstream's first byte.
    pub first_byte_ms: Option<f64>,
    /// `None`: it is open.
    pub end: Option<String>,
}

/// One connection or session, and the header that its upstream got first.
#[derive(Clone, Debug)]
pub struct Tapped {
    /// Whose.
    pub connection: Connection,
    /// As it was written; empty: none.
    pub header: Vec<u8>,
    /// Connections before this one that the reader was too slow for.
    pub missed: u64,
}
