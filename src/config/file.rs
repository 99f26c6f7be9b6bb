//! The configuration as written in TOML, with the position of every value.
