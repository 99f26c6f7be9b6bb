//! Health checks: one `Checker` asks one upstream at its interval and tells the control thread when its health changes.

pub mod checker;
pub mod probe;
pub mod state;

pub use checker::{CheckStats, Checker, LastCheck, Target};
pub use state::Verdict;
