//! The one vocabulary of how a connection ends: who ended it, in which phase, and why. The log field `end`, the metric
//! labels and the tests use the same words.

use std::fmt;

/// Who ended the connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Who {
    /// The client, by closing or resetting.
    Client,
    /// The upstream, by closing, resetting or refusing.
    Upstream,
    /// This balancer: a limit, a timeout, an operator's order.
    Preface,
}

/// How far the connection had come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Phase {
    /// Accepted, no upstream picked yet.
    Accept,
    /// Trying to reach an upstream.
    Connect,
    /// Sending the PROXY header.
    Header,
    /// Carrying bytes.
    Relay,
    /// The process is stopping.
    Stop,
}

macro_rules! causes {
    ($( $(#[$doc:meta])* $name:ident = $who:ident . $phase:ident . $why:literal ),+ $(,)?) => {
        /// Every way a connection can end. The text form is `who.phase.why`.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[repr(usize)]
        pub enum Termination { $( $(#[$doc])* $name ),+ }

        impl Termination {
            /// All of them, in the order of their discriminants.
            pub const ALL: &[Termination] = &[$( Termination::$name ),+];

            /// Who ended it.
            pub fn who(self) -> Who { match self { $( Termination::$name => Who::$who ),+ } }

            /// In which phase.
            pub fn phase(self) -> Phase { match self { $( Termination::$name => Phase::$phase ),+ } }

            /// Why: a word or two in snake case.
            pub fn why(self) -> &'static str { match self { $( Termination::$name => $why ),+ } }
        }
    };
}

causes! {
    /// Both sides closed in good order, the client first.
    ClientClosed = Client.Relay."closed",
    /// The client reset the connection while bytes were carried.
    ClientReset = Client.Relay."reset",
    /// Both sides closed in good order, the upstream first.
    UpstreamClosed = Upstream.Relay."closed",
    /// The upstream reset the connection while bytes were carried.
    UpstreamReset = Upstream.Relay."reset",
    /// Every attempt to connect was refused.
    UpstreamRefused = Upstream.Connect."refused",
    /// No attempt to connect was answered in time.
    UpstreamTimeout = Upstream.Connect."timeout",
    /// No route to the upstream.
    UpstreamUnreachable = Upstream.Connect."unreachable",
    /// The upstream reset before it took the header.
    UpstreamResetHeader = Upstream.Header."reset",
    /// The source is not in `allow`, or is in `deny`.
    Denied = Preface.Accept."denied",
    /// The listener's `max_connections` is reached.
    ListenerFull = Preface.Accept."listener_full",
    /// The process's `runtime.max_connections` is reached.
    ProcessFull = Preface.Accept."process_full",
    /// The listener's `max_connections_per_source` is reached.
    SourceFull = Preface.Accept."source_full",
    /// No upstream of the pool takes connections: none is enabled, or none is healthy under `refuse`.
    NoUpstream = Preface.Connect."no_upstream",
    /// Every upstream that could be picked is at its `max_connections`.
    UpstreamsFull = Preface.Connect."upstreams_full",
    /// No local port, descriptor or buffer was left: nobody's fault but ours.
    LocalResources = Preface.Connect."local_resources",
    /// Nothing was heard from either side for `idle_timeout`.
    IdleTimeout = Preface.Relay."idle_timeout",
    /// The upstream was disabled by the operator.
    Disabled = Preface.Relay."disabled",
    /// The operator ended this connection (`DELETE /connections/ID`).
    Ended = Preface.Relay."ended",
    /// The upstream was removed, and `drain_timeout` or the operator's time is over.
    DrainTimeout = Preface.Relay."drain_timeout",
    /// The upstream turned unhealthy, and `on_unhealthy` is `close`.
    Unhealthy = Preface.Relay."unhealthy",
    /// `stop_timeout` is over.
    StopTimeout = Preface.Stop."stop_timeout",
    /// A bug: the task of this connection panicked.
    Panic = Preface.Relay."panic",
}

impl Termination {
    /// Is this a regular end, which `log.connections = "errors"` leaves out?
    pub fn is_regular(self) -> bool {
        matches!(self, Termination::ClientClosed | Termination::UpstreamClosed)
    }
}

impl Who {
    /// The word in logs and metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Who::Client => "client",
            Who::Upstream => "upstream",
            Who::Preface => "preface",
        }
    }
}

impl Phase {
    /// The word in logs and metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Phase::Accept => "accept",
            Phase::Connect => "connect",
            Phase::Header => "header",
            Phase::Relay => "relay",
            Phase::Stop => "stop",
        }
    }
}

impl fmt::Display for Termination {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.who().as_str(), self.phase().as_str(), self.why())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn every_cause_has_its_own_words() {
        let words: HashSet<String> = Termination::ALL.iter().map(|t| t.to_string()).collect();
        assert_eq!(words.len(), Termination::ALL.len());
        for (index, cause) in Termination::ALL.iter().enumerate() {
            assert_eq!(*cause as usize, index);
        }
    }
}
