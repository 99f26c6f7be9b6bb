//! PURE. From the file as written to a `Config`, or to every error that it has.
