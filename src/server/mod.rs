//! server.

pub mod watch;
