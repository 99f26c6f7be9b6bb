//! cli.

pub mod capture;
pub mod check;
pub mod decode;
pub mod explain;
pub mod schema;
pub mod whoami;
