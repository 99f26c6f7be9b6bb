//! PURE. What changed between two configurations.
