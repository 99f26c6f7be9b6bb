//! preface: a layer-4 load balancer that introduces every connection with a PROXY protocol header.
//!
//! The modules below stand bottom-up: a module uses only those above it in this list. `tests/it/tidy.rs` enforces
//! that, and that the files marked PURE neither do I/O nor look at a clock.

/// PURE. The PROXY protocol: headers to bytes and back.
pub mod proxy_protocol;
/// PURE. The one vocabulary of how connections end.
pub mod termination;
/// PURE. Where a connection goes and where it comes from.
pub mod address;
/// Sockets and their options; the only place with `unsafe`.
pub mod net;
/// Counters and the Prometheus text format.
pub mod metrics;
/// The stop signal that every task holds, and the wait for them.
pub mod drain;
/// From a TOML file to a `Config`, and what changed between two.
pub mod config;
/// The log: one line an event, one writer thread, never blocking traffic.
pub mod log;
/// Upstreams, their lives, and which one is next.
pub mod pool;
/// The immutable view of everything that the data path reads.
pub mod snapshot;
/// All that may be asked of the control thread.
pub mod control;
/// Bytes both ways.
pub mod relay;
/// PURE. The UDP session table.
pub mod sessions;
/// The life of one TCP connection.
pub mod connection;
/// The accept loop of one socket, which connections it admits, and the datagrams of a UDP socket both ways.
pub mod listener;
/// One thread that carries traffic.
pub mod worker;
/// Health checks.
pub mod health;
/// Names as upstreams: DNS look-ups.
pub mod discovery;
/// The admin API over HTTP.
pub mod admin;
/// The control thread: reload, signals, and the start of everything.
pub mod server;
/// The command line, one file a subcommand.
pub mod cli;
