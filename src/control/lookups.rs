//! What a look-up of a name came to.

use std::time::{Duration, Instant};

use crate::config::names::{Answer, Name};

/// One look-up.
#[derive(Clone, Debug)]
pub struct Lookup {
    /// Of what.
    pub name: Name,
    /// What came of it.
    pub result: Result<Answered, LookupError>,
    /// When the next one begins.
    pub next: Instant,
}

/// An answer that can be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answered {
    /// Never empty.
    pub found: Answer,
    /// The whole name that the answer is about, or "/etc/hosts".
    pub from: String,
    /// How long it holds, as the server said: the smallest of all records that led to it.
    pub ttl: Duration,
    /// What of it was left out or could not be had, for people.
    pub remarks: Vec<String>,
}

/// Why there is no answer: the last good one stays in force.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LookupError {
    /// In one word.
    pub outcome: Outcome,
    /// For people: what was asked, whom, and what it said.
    pub message: String,
}

/// How a look-up ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// With addresses.
    Answered,
    /// The name does not exist.
    Nxdomain,
    /// The name exists, and has no such records, or none that can be used.
    Empty,
    /// The server could not find out.
    Servfail,
    /// No server answered in time.
    Timeout,
    /// No server to ask, or it refused, or the answer made no sense.
    Error,
}

impl Outcome {
    /// All of them, in the order of their discriminants.
    pub const ALL: [Outcome; 6] =
        [Outcome::Answered, Outcome::Nxdomain, Outcome::Empty, Outcome::Servfail, Outcome::Timeout, Outcome::Error];

    /// The word in logs, metrics and status.
    pub fn as_str(self) -> &'static str {
        match self {
            Outcome::Answered => "answered",
            Outcome::Nxdomain => "nxdomain",
            Outcome::Empty => "empty",
            Outcome::Servfail => "servfail",
            Outcome::Timeout => "timeout",
            Outcome::Error => "error",
        }
    }
}

impl Lookup {
    /// In one word.
    pub fn outcome(&self) -> Outcome {
        match &self.result {
            Ok(_) => Outcome::Answered,
            Err(error) => error.outcome,
        }
    }
}
