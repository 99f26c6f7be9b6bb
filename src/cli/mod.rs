//! cli.

pub mod capture;
pub mod decode;
pub mod explain;
pub mod whoami;
