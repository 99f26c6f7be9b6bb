//! cli.

pub mod explain;
