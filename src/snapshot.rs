//! The immutable view of everything that the data path reads.
