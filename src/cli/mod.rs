//! cli.

pub mod check;
pub mod schema;
