//! Upstreams and how to choose among them: what outlives a reload, what does not, and the tables that a pick walks.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU32, AtomicU64};

/// What of an upstream outlives every change but its removal. Shared by all workers; key: pool and address.
#[derive(Debug)]
pub struct UpstreamLife {
    /// Name of the pool when it was made.
    pub pool: String,
    /// Where connections go.
    pub address: SocketAddr,
    /// Connections open now, connecting ones included.
    pub open: AtomicU32,
    /// Failed connects in a row, over all workers.
    pub failed_connects: AtomicU32,
    /// Connections that reached this upstream.
    pub connections_total: AtomicU64,
}

/// What checks observed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Health {
    /// Not checked yet.
    Unknown,
    /// Takes traffic.
    Healthy,
    /// Does not.
    Unhealthy,
}

/// What the operator ordered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum AdminState {
    /// As configured.
    Enabled,
    /// Nothing new; open connections stay.
    Draining,
    /// Nothing new; open connections are reset.
    Disabled,
}

/// The name under which health and admin state are kept.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct UpstreamKey {
    /// Name of the pool.
    pub pool: String,
    /// Address of the upstream.
    pub address: SocketAddr,
}

/// A change of health that a checker decided on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Observation {
    /// Which upstream.
    pub key: UpstreamKey,
    /// What it is now.
    pub health: Health,
    /// "connected in 1 ms", "connection refused", "status 503, expected 200-399" ...
    pub reason: String,
}
