//! tlv.
#[derive(Clone, Debug, PartialEq, Eq)]
/// x
pub struct Tlv;
