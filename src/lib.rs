//! preface: a layer-4 load balancer that introduces every connection with a PROXY protocol header.
//!
//! The modules below stand bottom-up: a module uses only those above it in this list. `tests/it/tidy.rs` enforces
//! that, and that the files marked PURE neither do I/O nor look at a clock.

/// The admin API over HTTP.
pub mod admin;
/// The command line, one file a subcommand.
pub mod cli;
/// From a TOML file to a `Config`, and what changed between two.
pub mod config;
/// The life of one TCP connection.
pub mod connection;
/// All that may be asked of the control thread.
pub mod control;
/// The stop signal that every task holds, and the wait for them.
pub mod drain;
/// Health checks.
pub mod health;
/// The accept loop of one socket.
pub mod listener;
/// The log: one line an event, one writer thread, never blocking traffic.
pub mod log;
/// Counters and the Prometheus text format.
pub mod metrics;
/// Sockets and their options; the only place with `unsafe`.
pub mod net;
/// Upstreams, their lives, and which one is next.
pub mod pool;
/// PURE. The PROXY protocol: headers to bytes and back.
pub mod proxy_protocol;
/// Bytes both ways.
pub mod relay;
/// The control thread: reload, signals, and the start of everything.
pub mod server;
/// The immutable view of everything that the data path reads.
pub mod snapshot;
/// PURE. The one vocabulary of how connections end.
pub mod termination;
/// One thread that carries traffic.
pub mod worker;
