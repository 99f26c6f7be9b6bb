//! PURE. What changed between two configurations.

use super::Config;

/// One line a change.
pub fn diff(_old: &Config, _new: &Config) -> Vec<String> {
    Vec::new()
}

/// x
pub fn reuse(_old: &Config, new: Config) -> Config {
    new
}
