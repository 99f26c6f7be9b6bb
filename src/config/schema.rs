//! PURE. The JSON Schema of the configuration.
