//! net.
pub mod check;
