//! The integration tests: one binary, real sockets on port 0.

mod cli;
mod codec;
