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
    /// The client reset the connection, or no longer answered keepalive probes.
    ClientReset = Client.Relay."reset",
    /// Both sides closed in good order, the upstream first.
    UpstreamClosed = Upstream.Relay."closed",
    /// The upstream reset the connection, or no longer answered keepalive probes.
    UpstreamReset = Upstream.Relay."reset",
    /// The last attempt to connect was refused; those before it failed, too.
    UpstreamRefused = Upstream.Connect."refused",
    /// The last attempt to connect was not answered in time; those before it failed, too.
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
    /// Each datagram of the session's client had the number of replies that `responses` names.
    Responses = Preface.Relay."responses",
    /// The session never had a reply, and its place was given to a new client: `max_sessions` is reached.
    Displaced = Preface.Relay."displaced",
    /// The session's listener left the configuration.
    ListenerRemoved = Preface.Relay."listener_removed",
    /// The upstream was disabled by the operator.
    Disabled = Preface.Relay."disabled",
    /// The operator ended this connection (`DELETE /connections/ID`).
    Ended = Preface.Relay."ended",
    /// The upstream was removed, and `drain_timeout` or the operator's time is over.
    DrainTimeout = Preface.Relay."drain_timeout",
    /// The upstream turned unhealthy, and `on_unhealthy` is `close`.
    Unhealthy = Preface.Relay."unhealthy",
    /// The process stops, and `stop_timeout` is over, or a second signal came.
    StopTimeout = Preface.Stop."stop_timeout",
    /// An upgrade: a new process reads the session's socket now, and its client has a session there with its next datagram.
    HandedOver = Preface.Stop."handed_over",
    /// A bug: the task of this connection panicked.
    Panic = Preface.Relay."panic",
}

impl Termination {
    /// Is this a regular end of a connection, which `log.connections = "errors"` leaves out?
    pub fn is_regular(self) -> bool {
        matches!(self, Termination::ClientClosed | Termination::UpstreamClosed)
    }

    /// Is this a regular end of a UDP session? Nobody closes one: silence is how it ends.
    pub fn is_regular_for_session(self) -> bool {
        matches!(self, Termination::IdleTimeout | Termination::Responses | Termination::HandedOver)
    }
}

macro_rules! reasons {
    ($( $(#[$doc:meta])* $name:ident = $word:literal ),+ $(,)?) => {
        /// Why a datagram was not passed on.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[repr(usize)]
        pub enum DropReason { $( $(#[$doc])* $name ),+ }

        impl DropReason {
            /// All of them, in the order of their discriminants.
            pub const ALL: &[DropReason] = &[$( DropReason::$name ),+];

            /// The word in logs and metrics.
            pub fn as_str(self) -> &'static str { match self { $( DropReason::$name => $word ),+ } }
        }
    };
}

reasons! {
    /// The source is not in `allow`, or is in `deny`.
    Denied = "denied",
    /// The source is an address that this process itself takes datagrams at: the answer would be a question again, and so
    /// on for ever.
    OwnAddress = "own_address",
    /// A new client, and every session under `max_sessions` or `runtime.max_connections` has had a reply or is young.
    SessionsFull = "sessions_full",
    /// A new client, and its source is at `max_connections_per_source`.
    SourceFull = "source_full",
    /// A new client, and no upstream takes sessions.
    NoUpstream = "no_upstream",
    /// A new client, and every usable upstream is at its `max_connections`.
    UpstreamsFull = "upstreams_full",
    /// No local port, descriptor or buffer was left.
    LocalResources = "local_resources",
    /// Header and payload are longer than the path, or any datagram, can carry.
    TooBig = "too_big",
    /// Longer than what is received at once.
    Truncated = "truncated",
    /// The network's queue was full: the receiver or the link is slower than the sender.
    QueueFull = "queue_full",
    /// The upstream's host said that nobody listens there (ICMP).
    Refused = "refused",
    /// There is no route, or a router said so (ICMP).
    Unreachable = "unreachable",
    /// A new client, while this address is being closed.
    Closing = "closing",
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
    fn every_reason_has_its_own_word() {
        let words: HashSet<&str> = DropReason::ALL.iter().map(|reason| reason.as_str()).collect();
        assert_eq!(words.len(), DropReason::ALL.len());
        for (index, reason) in DropReason::ALL.iter().enumerate() {
            assert_eq!(*reason as usize, index);
        }
    }

    #[test]
    fn every_cause_has_its_own_words() {
        let words: HashSet<String> = Termination::ALL.iter().map(|t| t.to_string()).collect();
        assert_eq!(words.len(), Termination::ALL.len());
        for (index, cause) in Termination::ALL.iter().enumerate() {
            assert_eq!(*cause as usize, index);
        }
    }
}
