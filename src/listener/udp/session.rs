//! One UDP session: its socket to the upstream, its header, what it has carried, and the record of its end.

use std::io;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant, SystemTime};

use super::group::{Piece, run};
use crate::address::Address;
use crate::config::{HeaderFormat, LogConnections, UdpHeader};
use crate::connection::Shared;
use crate::connection::measured::{ROUND_TRIP, SESSION};
use crate::connection::session::{Carried, SessionEntry};
use crate::drain::OpenConnection;
use crate::log::{self, ConnectionLine};
use crate::net::datagram::outbox::{Failure, Next, Outbox, Route};
use crate::net::datagram::{self, Batch, Source};
use crate::pool::{Lease, UpstreamLife};
use crate::sessions::Ends;
use crate::snapshot::Moved;
use crate::termination::{DropReason, Termination};

/// From the client to the upstream.
pub const IN: usize = 0;
/// From the upstream to the client.
pub const OUT: usize = 1;

/// One client's exchange with one upstream at a time.
pub struct Session {
    /// Who it is, and what others may see of it.
    pub entry: Rc<SessionEntry>,
    /// Tells it from others that had its slot.
    pub generation: u32,
    /// Who, and where to.
    pub ends: Ends,
    /// From where replies come; `None`: the listening socket has one address.
    pub answer_from: Option<Source>,
    /// Its upstream.
    pub link: Link,
    /// The first datagram, until the upstream has answered.
    pub retained: Option<Box<Retained>>,
    /// Did the upstream fail since its last reply?
    pub failed: Option<DropReason>,
    /// When its upstream was last compared with the pool.
    pub pool_seen: u64,
    /// A session ends after this many replies to each datagram; 0: never.
    pub responses: u32,
    /// Where in the batch of this number its datagrams are gathered.
    pub gathered: (u64, usize),
    /// How many replies are received at once.
    pub burst: usize,
    /// The longest reply that may leave as a segment.
    pub reply_segment_max: usize,
    /// Datagrams carried, in and out.
    pub datagrams: [u64; 2],
    /// Their payload.
    pub bytes: [u64; 2],
    /// Sockets opened for it: more than 1 if it was moved.
    pub attempts: u32,
    /// From its begin to the first reply.
    pub first_reply: Option<Duration>,
    /// When the first datagram was passed on that has no reply yet.
    pub asked: Option<Instant>,
    /// Where it counts as one of its source's.
    pub in_source: bool,
    /// What of the above the shared counters have already: datagrams, bytes, headers.
    pub folded: ([u64; 2], [u64; 2], u64),
    /// One of the process's open connections.
    pub open: OpenConnection,
}

/// A session's way to its upstream.
pub struct Link {
    /// Connected to it.
    pub socket: OwnedFd,
    /// A place among what is open there.
    pub lease: Lease,
    /// The pool's name.
    pub pool: Arc<str>,
    /// What the header is; `None`: there is none.
    pub format: Option<HeaderFormat>,
    /// Its bytes.
    pub header: Box<[u8]>,
    /// Where it stands.
    pub mode: UdpHeader,
    /// Has the upstream still to get its first datagram?
    pub first: bool,
    /// Headers sent.
    pub headers: u64,
    /// The longest payload that the path takes in one packet, once it was asked for.
    pub packet_max: Option<usize>,
    /// Does the tap have its header?
    pub tapped: bool,
    /// Where its durations were measured last.
    pub place: usize,
}

/// What is needed to begin again with another upstream.
pub struct Retained {
    /// The first datagram.
    pub datagram: Vec<u8>,
    /// Who had it.
    pub tried: Vec<Arc<UpstreamLife>>,
}

/// How far a send came.
pub struct Sent {
    /// Datagrams sent or counted as dropped.
    pub done: usize,
    /// The upstream's failure that stopped it.
    pub failure: Option<io::Error>,
    /// Why the header that comes once did not leave: what follows has to wait for it, or its receiver would take a
    /// client's bytes for one.
    pub unintroduced: Option<DropReason>,
}

impl Link {
    /// The upstream.
    pub fn life(&self) -> &Arc<UpstreamLife> {
        self.lease.life()
    }

    /// What may be a segment: what fits into one packet, and was not refused before.
    fn segment_max(&mut self) -> usize {
        let (socket, address) = (&self.socket, self.lease.life().address.ip());
        let packet_max = *self.packet_max.get_or_insert_with(|| {
            address.and_then(|address| datagram::packet_payload_max(socket, address).ok()).unwrap_or(0)
        });
        packet_max.min(self.lease.life().segment_max.load(Relaxed) as usize)
    }
}

/// What a datagram that the kernel refused counts as.
pub fn reason_of(error: &io::Error) -> DropReason {
    match error.raw_os_error() {
        Some(libc::EMSGSIZE) => DropReason::TooBig,
        Some(libc::EAGAIN | libc::ENOBUFS) => DropReason::QueueFull,
        Some(libc::ECONNREFUSED) => DropReason::Refused,
        Some(libc::ENOMEM) => DropReason::LocalResources,
        Some(libc::EPERM | libc::EACCES) => DropReason::Forbidden,
        _ => DropReason::Unreachable,
    }
}

/// What segments may be from now on, if it was segmentation that the kernel refused.
pub fn lower_segment_max(failure: &Failure) -> Option<usize> {
    let segment = failure.segment?;
    match failure.error.raw_os_error()? {
        libc::EINVAL | libc::EMSGSIZE => Some(segment - 1),
        // The device, or the socket, cannot compute their checksums.
        libc::EIO => Some(0),
        _ => None,
    }
}

impl Session {
    /// Sends datagrams of a batch to the upstream.
    pub fn send(
        &mut self,
        pieces: &[Piece],
        batch: &Batch,
        outbox: &mut Outbox,
        mut dropped: impl FnMut(DropReason, usize),
    ) -> Sent {
        let bytes = |piece: &Piece| &batch.bytes(piece.place)[piece.start..piece.start + piece.length];
        let route = Route::default();
        let segment_max = if pieces.len() > 1 { self.link.segment_max() } else { 0 };
        let link = &self.link;
        let header: &[u8] = &link.header;
        let first = link.first && !header.is_empty();
        let alone = first && link.mode == UdpHeader::FirstAlone;
        let mut sending = outbox.begin();
        let mut at = 0;
        if alone {
            sending.push(route, &[], std::iter::once(header));
        } else if first && link.mode == UdpHeader::FirstDatagram {
            sending.push(route, header, pieces.iter().take(1).map(bytes));
            at = 1;
        }
        let prefix = if link.mode == UdpHeader::EveryDatagram { header } else { &[] };
        while at < pieces.len() {
            let count = run(pieces[at..].iter().map(|piece| piece.length), prefix.len(), segment_max);
            sending.push(route, prefix, pieces[at..at + count].iter().map(bytes));
            at += count;
        }
        let life = Arc::clone(self.link.life());
        let (mut failure, mut unintroduced, mut lost, mut lost_bytes) = (None, None, 0, 0);
        let comes_once = first && link.mode != UdpHeader::EveryDatagram;
        let sent = sending.send(&self.link.socket, |refused| {
            if let Some(lower) = lower_segment_max(&refused) {
                life.segment_max.fetch_min(lower as u32, Relaxed);
                return Next::Plain;
            }
            let reason = reason_of(&refused.error);
            if matches!(reason, DropReason::Refused | DropReason::Unreachable) {
                failure = Some(refused.error);
                return Next::Stop;
            }
            if comes_once && refused.first == 0 {
                unintroduced = Some(reason);
                return Next::Stop;
            }
            let first = refused.first.saturating_sub(usize::from(alone));
            let those = &pieces[first.min(pieces.len())..(first + refused.datagrams).min(pieces.len())];
            dropped(reason, those.len());
            lost += those.len();
            lost_bytes += those.iter().map(|piece| piece.length).sum::<usize>();
            Next::Skip
        });
        if let Some(reason) = unintroduced {
            dropped(reason, 1);
            return Sent { done: 1, failure, unintroduced };
        }
        let alone = usize::from(alone);
        let done = sent.saturating_sub(alone);
        self.count_sent(&pieces[..done], lost, lost_bytes, sent);
        Sent { done, failure, unintroduced }
    }

    fn count_sent(&mut self, pieces: &[Piece], lost: usize, lost_bytes: usize, sends: usize) {
        let length: usize = pieces.iter().map(|piece| piece.length).sum();
        self.datagrams[IN] += (pieces.len() - lost) as u64;
        self.bytes[IN] += (length - lost_bytes) as u64;
        if sends > 0 && !self.link.header.is_empty() {
            let every = self.link.mode == UdpHeader::EveryDatagram;
            self.link.headers += if every { (pieces.len() - lost) as u64 } else { u64::from(self.link.first) };
        }
        if sends > 0 {
            self.link.first = false;
        }
    }

    /// Sends the first datagram once more, to an upstream that has not had it.
    pub fn send_retained(&mut self, outbox: &mut Outbox) -> io::Result<()> {
        let Some(retained) = &self.retained else { return Ok(()) };
        let link = &mut self.link;
        let mut sending = outbox.begin();
        let route = Route::default();
        if link.mode == UdpHeader::FirstAlone && !link.header.is_empty() {
            sending.push(route, &[], std::iter::once(&*link.header));
            sending.push(route, &[], std::iter::once(&retained.datagram[..]));
        } else {
            sending.push(route, &link.header, std::iter::once(&retained.datagram[..]));
        }
        let mut failure = None;
        sending.send(&link.socket, |refused| {
            failure = Some(refused.error);
            Next::Stop
        });
        link.headers += u64::from(failure.is_none() && !link.header.is_empty());
        link.first = failure.is_some();
        failure.map_or(Ok(()), Err)
    }

    /// Takes note of datagrams that the upstream was sent just now.
    pub fn passed_on(&mut self, shared: &Shared, now: Instant) {
        self.asked.get_or_insert(now);
        if !self.link.tapped {
            self.tap(shared);
        }
    }

    /// Says which upstream it has now, and why no longer the one before.
    pub fn attempted(&self, moved: Option<Moved>) {
        tracing::debug!(
            event = "attempt", id = %self.entry.id, pool = &*self.link.pool, upstream = %self.link.life().address,
            attempt = self.attempts, moved = moved.map(Moved::as_str)
        );
    }

    fn header_word(&self) -> &'static str {
        self.link.format.map_or("off", HeaderFormat::as_str)
    }

    /// Remembers the header that the upstream was sent.
    pub fn tap(&mut self, shared: &Shared) {
        self.link.tapped = true;
        tracing::debug!(event = "introduced", id = %self.entry.id, header = self.header_word());
        if shared.is_followed() {
            self.publish();
        }
        shared.tap_session(&self.entry, &self.link.header);
    }

    /// Takes note of a reply of the upstream: how long the client has waited for it.
    pub fn replied(&mut self, shared: &Shared, now: Instant) {
        let Some(asked) = self.asked.take() else { return };
        let Link { lease, pool, place, .. } = &mut self.link;
        shared.measure(place, pool, lease.life(), ROUND_TRIP, now.duration_since(asked));
    }

    /// Takes note of replies that reached the client's side.
    pub fn count_replies(&mut self, count: u64, bytes: u64, now: Instant) {
        self.datagrams[OUT] += count;
        self.bytes[OUT] += bytes;
        self.first_reply.get_or_insert_with(|| now.duration_since(self.entry.started));
    }

    /// Shows others what it has carried until now.
    pub fn publish(&self) {
        let carried = Carried { datagrams: self.datagrams, bytes: self.bytes, first_reply: self.first_reply };
        self.entry.publish(Arc::clone(&self.link.pool), self.link.life().address.clone(), carried);
    }

    /// The cause of its end if it ends because nothing more is heard.
    pub fn silence(&self) -> Termination {
        match self.failed {
            Some(DropReason::Refused) => Termination::UpstreamRefused,
            Some(_) => Termination::UpstreamUnreachable,
            None => Termination::IdleTimeout,
        }
    }

    /// Has each datagram of the client had its replies?
    pub fn is_answered(&self) -> bool {
        let due = self.datagrams[IN].saturating_mul(u64::from(self.responses));
        self.responses > 0 && self.datagrams[OUT] >= due
    }

    /// Adds what was carried since the last call to the counters of listener and upstream.
    pub fn fold(&mut self) {
        let (datagrams, bytes, headers) = &mut self.folded;
        let counters = &self.entry.listener.sessions;
        for direction in [IN, OUT] {
            let more =
                self.datagrams[direction] - std::mem::replace(&mut datagrams[direction], self.datagrams[direction]);
            if more == 0 {
                continue;
            }
            let upstream = &self.link.lease.life().counters;
            counters.datagrams[direction].fetch_add(more, Relaxed);
            upstream.datagrams[direction].fetch_add(more, Relaxed);
            let more = self.bytes[direction] - std::mem::replace(&mut bytes[direction], self.bytes[direction]);
            counters.bytes[direction].fetch_add(more, Relaxed);
            [&upstream.bytes_in, &upstream.bytes_out][direction].fetch_add(more, Relaxed);
        }
        if let Some(format) = self.link.format {
            let more = self.link.headers - std::mem::replace(headers, self.link.headers);
            self.entry.listener.headers[format as usize].fetch_add(more, Relaxed);
        }
    }

    /// Counts and logs the end.
    pub fn end(mut self, shared: &Shared, termination: Termination) {
        self.fold();
        let listener = &self.entry.listener;
        let duration = self.entry.started.elapsed();
        listener.sessions.ends[termination as usize].fetch_add(1, Relaxed);
        listener.leave_session(self.in_source.then_some(self.entry.client.ip()));
        if Rc::strong_count(&self.entry) > 1 {
            // The tap has it.
            self.publish();
            self.entry.ended(termination, duration);
        }
        let Link { lease, pool, place, .. } = &mut self.link;
        shared.measure(place, pool, lease.life(), SESSION, duration);
        let wanted = shared.with_snapshot(|snapshot| match snapshot.log_connections {
            Some(LogConnections::Off) => false,
            Some(LogConnections::Errors) => !termination.is_regular_for_session(),
            _ => true,
        });
        // Who gives way in a flood had one datagram: a line for each would be a line for each packet.
        if wanted && termination != Termination::Displaced {
            self.log(shared, duration, termination);
        }
        tracing::debug!(event = "end", id = %self.entry.id, end = %termination);
        // The process may end with the last one: only after its line.
        drop(self.open);
    }

    fn log(&self, shared: &Shared, duration: Duration, end: Termination) {
        let entry = &self.entry;
        let line = ConnectionLine {
            time: SystemTime::now(),
            id: &entry.id.to_string(),
            listener: &entry.listener.name,
            client: entry.client.into(),
            local: Some(&Address::Ip(entry.local)),
            pool: Some(&self.link.pool),
            upstream: Some(&self.link.life().address),
            header: Some(self.header_word()),
            bytes_in: self.bytes[IN],
            bytes_out: self.bytes[OUT],
            connect: None,
            first_byte: self.first_reply,
            duration,
            attempts: self.attempts,
            end,
        };
        shared.log.send(log::session_line(shared.log.format(), &line, self.datagrams).as_bytes());
    }
}
