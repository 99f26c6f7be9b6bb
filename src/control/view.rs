//! Connections as the admin API shows them, and which of them are asked for.

use std::net::IpAddr;

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

/// One connection.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Connection {
    /// Its ULID, which sorts by the time of the accept.
    pub id: String,
    /// When it was accepted: RFC 3339, UTC.
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
    /// From accept to the upstream's first byte.
    pub first_byte_ms: Option<f64>,
    /// `None`: it is open.
    pub end: Option<String>,
}

/// One connection, and the header that its upstream got.
#[derive(Clone, Debug)]
pub struct Tapped {
    /// Whose.
    pub connection: Connection,
    /// As it was written; empty: none.
    pub header: Vec<u8>,
    /// Connections before this one that the reader was too slow for.
    pub missed: u64,
}
