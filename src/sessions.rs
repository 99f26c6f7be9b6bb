//! PURE. The UDP session table: which datagrams belong together, when a session is over, and who gives way.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

/// A session without a reply gives way to a new client at this age, whatever the upstreams' usual time to answer: it
/// takes longer only where the client has given up.
pub const GIVES_WAY_AFTER_MAX: Duration = Duration::from_secs(1);
/// And never before this age.
pub const GIVES_WAY_AFTER_MIN: Duration = Duration::from_millis(20);
/// In between: at so many times the usual time to the first reply. In a flood of R new sources a second a table of N
/// places has one for everybody who comes if N is more than R times this age.
const GIVES_WAY_AFTER_TIMES: u32 = 4;

/// Sessions that are spared in a row because their client still sends: it bounds the search.
const SPARED_MAX: usize = 16;

/// What makes two datagrams belong to one session.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Ends {
    /// Who sends.
    pub client: SocketAddr,
    /// The address that the client writes to.
    pub local: IpAddr,
}

/// What is to become of a datagram.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Admission {
    /// It belongs to the session in this slot.
    Known(usize),
    /// It begins a session, which `open` enters.
    New,
    /// It begins a session once the one in this slot has ended.
    Displace(usize),
    /// There is no place for it.
    Full,
}

/// Sessions by number. A slot's number is free again after its session, and the lowest free ones are not preferred:
/// the one that was freed last is in the cache.
#[derive(Debug, Default)]
pub struct Sessions {
    index: HashMap<Ends, u32>,
    slots: Vec<Slot>,
    free: Vec<u32>,
    /// When to look at a slot again. At most one entry of each slot is believed: the one of `Slot::look_at`.
    looks: BinaryHeap<Reverse<(Instant, u32)>>,
    /// Sessions whose client has shown in no way that it is there, oldest first: without a reply, and with one.
    unproven: [Queue; 2],
    /// From begin to first reply: rises at once, falls slowly; `None`: there was no reply yet.
    reply_time: Option<Duration>,
}

#[derive(Debug)]
struct Slot {
    /// `None`: free.
    session: Option<Entry>,
    look_at: Option<Instant>,
}

#[derive(Debug)]
struct Entry {
    ends: Ends,
    last: Instant,
    timeout: Duration,
    /// `None`: the client has sent something since it had a reply, so its address is not forged.
    unproven: Option<Unproven>,
}

/// A place in one of the queues.
#[derive(Debug)]
struct Unproven {
    since: Instant,
    /// Was there a reply? It chooses the queue.
    answered: bool,
    /// Did the client send again since then?
    sent_again: bool,
    before: Option<u32>,
    after: Option<u32>,
}

#[derive(Debug, Default)]
struct Queue {
    first: Option<u32>,
    last: Option<u32>,
    len: usize,
}

impl Sessions {
    /// Open now.
    pub fn len(&self) -> usize {
        self.index.len()
    }

    /// Is none open?
    pub fn is_empty(&self) -> bool {
        self.index.is_empty()
    }

    /// Takes note of a datagram. `has_room`: may one more session be opened?
    pub fn admit(&mut self, ends: &Ends, now: Instant, has_room: bool) -> Admission {
        if let Some(slot) = self.index.get(ends).copied() {
            let entry = self.entry(slot);
            entry.last = now;
            match &mut entry.unproven {
                Some(unproven) if unproven.answered => self.dequeue(slot),
                Some(unproven) => unproven.sent_again = true,
                None => {}
            }
            return Admission::Known(slot as usize);
        }
        match has_room {
            true => Admission::New,
            false => {
                let slot = self.oldest_unanswered(now).or_else(|| self.oldest_answered(now));
                slot.map_or(Admission::Full, |slot| Admission::Displace(slot as usize))
            }
        }
    }

    /// Enters a session that `admit` called new; returns its slot. It is over after `timeout` without a datagram.
    pub fn open(&mut self, ends: Ends, now: Instant, timeout: Duration) -> usize {
        let slot = self.free.pop().unwrap_or_else(|| {
            self.slots.push(Slot { session: None, look_at: None });
            (self.slots.len() - 1) as u32
        });
        self.slots[slot as usize].session = Some(Entry { ends, last: now, timeout, unproven: None });
        let known = self.index.insert(ends, slot);
        assert!(known.is_none(), "admit has said that it is new");
        self.enqueue(slot, now, false);
        self.look(slot, now + timeout);
        slot as usize
    }

    /// Takes note of replies. After the first one a session gives way later, and not at all once its client sends again.
    pub fn answered(&mut self, slot: usize, now: Instant) {
        let entry = self.entry(slot as u32);
        entry.last = now;
        let Some(unproven) = entry.unproven.as_ref().filter(|unproven| !unproven.answered) else { return };
        let time = now.duration_since(unproven.since);
        self.reply_time = Some(self.reply_time.map_or(time, |usual| time.max((usual * 7 + time) / 8)));
        self.dequeue(slot as u32);
        self.enqueue(slot as u32, now, true);
    }

    /// The age at which a session without a reply gives way.
    fn gives_way_after(&self) -> Duration {
        let usual = self.reply_time.unwrap_or(GIVES_WAY_AFTER_MAX);
        (usual * GIVES_WAY_AFTER_TIMES).clamp(GIVES_WAY_AFTER_MIN, GIVES_WAY_AFTER_MAX)
    }

    /// Ends a session.
    pub fn close(&mut self, slot: usize) {
        self.dequeue(slot as u32);
        let entry = self.slots[slot].session.take().expect("only open sessions are closed");
        self.index.remove(&entry.ends);
        self.free.push(slot as u32);
    }

    /// A session that is over at this time, which the caller then closes; `None`: no other.
    pub fn expired(&mut self, now: Instant) -> Option<usize> {
        while let Some(Reverse((at, number))) = self.looks.peek().copied() {
            if at > now {
                return None;
            }
            self.looks.pop();
            let slot = &mut self.slots[number as usize];
            if slot.look_at != Some(at) {
                continue;
            }
            slot.look_at = None;
            let Some(entry) = &slot.session else { continue };
            let over = entry.last + entry.timeout;
            if over <= now {
                return Some(number as usize);
            }
            self.look(number, over);
        }
        None
    }

    /// When `expired` should be asked again.
    pub fn next_look(&self) -> Option<Instant> {
        self.looks.peek().map(|Reverse((at, _))| *at)
    }

    fn entry(&mut self, slot: u32) -> &mut Entry {
        self.slots[slot as usize].session.as_mut().expect("the slot is of an open session")
    }

    /// Sees to a look no later than this. A slot that is used again keeps the look of the session before.
    fn look(&mut self, slot: u32, at: Instant) {
        let look_at = &mut self.slots[slot as usize].look_at;
        if look_at.is_none_or(|known| at < known) {
            *look_at = Some(at);
            self.looks.push(Reverse((at, slot)));
        }
    }

    /// The session that gives way, if one is old enough. Those whose client goes on sending are spared while others are
    /// there: syslog has no replies.
    fn oldest_unanswered(&mut self, now: Instant) -> Option<u32> {
        let old = self.gives_way_after();
        for _ in 0..SPARED_MAX {
            let slot = self.unproven[0].first?;
            let unproven = self.neighbour(slot);
            if now.duration_since(unproven.since) < old {
                return None;
            }
            if !unproven.sent_again {
                return Some(slot);
            }
            self.dequeue(slot);
            self.enqueue(slot, now, false);
        }
        None
    }

    /// The session that gives way where most have had a reply: servers answer forged questions, too. While more have
    /// had none, the place is theirs to give. A client that is there may be far away, so it has the longest time to send
    /// again.
    fn oldest_answered(&mut self, now: Instant) -> Option<u32> {
        if self.unproven[1].len <= self.unproven[0].len {
            return None;
        }
        let slot = self.unproven[1].first?;
        (now.duration_since(self.neighbour(slot).since) >= GIVES_WAY_AFTER_MAX).then_some(slot)
    }

    fn enqueue(&mut self, slot: u32, now: Instant, answered: bool) {
        let queue = &mut self.unproven[usize::from(answered)];
        queue.len += 1;
        let before = queue.last.replace(slot);
        match before {
            Some(before) => self.neighbour(before).after = Some(slot),
            None => queue.first = Some(slot),
        }
        let unproven = Unproven { since: now, answered, sent_again: false, before, after: None };
        self.entry(slot).unproven = Some(unproven);
    }

    fn dequeue(&mut self, slot: u32) {
        let Some(Unproven { before, after, answered, .. }) = self.entry(slot).unproven.take() else { return };
        self.unproven[usize::from(answered)].len -= 1;
        match before {
            Some(before) => self.neighbour(before).after = after,
            None => self.unproven[usize::from(answered)].first = after,
        }
        match after {
            Some(after) => self.neighbour(after).before = before,
            None => self.unproven[usize::from(answered)].last = before,
        }
    }

    fn neighbour(&mut self, slot: u32) -> &mut Unproven {
        self.entry(slot).unproven.as_mut().expect("it stands in a queue")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const TIMEOUT: Duration = Duration::from_secs(10);
    const SECOND: Duration = Duration::from_secs(1);

    fn ends(port: u16) -> Ends {
        Ends { client: SocketAddr::from(([192, 0, 2, 1], port)), local: IpAddr::from([203, 0, 113, 7]) }
    }

    /// Opens a session for this port.
    fn open(sessions: &mut Sessions, port: u16, now: Instant) -> usize {
        assert_eq!(sessions.admit(&ends(port), now, true), Admission::New);
        sessions.open(ends(port), now, TIMEOUT)
    }

    fn close_expired(sessions: &mut Sessions, now: Instant) -> Vec<usize> {
        let mut closed = Vec::new();
        while let Some(slot) = sessions.expired(now) {
            sessions.close(slot);
            closed.push(slot);
        }
        closed
    }

    #[test]
    fn a_client_that_writes_to_two_addresses_has_two_sessions() {
        let (mut sessions, now) = (Sessions::default(), Instant::now());
        let first = open(&mut sessions, 1, now);
        let other = Ends { local: IpAddr::from([203, 0, 113, 8]), ..ends(1) };
        assert_eq!(sessions.admit(&other, now, true), Admission::New);
        let second = sessions.open(other, now, TIMEOUT);
        assert_ne!(first, second);
        assert_eq!(sessions.admit(&ends(1), now, false), Admission::Known(first));
        assert_eq!(sessions.admit(&other, now, false), Admission::Known(second));
    }

    #[test]
    fn a_session_is_over_after_its_timeout_without_a_datagram_from_either_side() {
        let (mut sessions, start) = (Sessions::default(), Instant::now());
        let slots: Vec<usize> = (0..3).map(|port| open(&mut sessions, port, start)).collect();
        assert_eq!(sessions.next_look(), Some(start + TIMEOUT));
        sessions.admit(&ends(1), start + SECOND * 4, true);
        sessions.answered(slots[2], start + SECOND * 7);
        assert!(close_expired(&mut sessions, start + TIMEOUT - Duration::from_nanos(1)).is_empty());
        assert_eq!(close_expired(&mut sessions, start + TIMEOUT), [slots[0]]);
        assert_eq!(sessions.next_look(), Some(start + SECOND * 14));
        assert_eq!(close_expired(&mut sessions, start + SECOND * 14), [slots[1]]);
        assert_eq!(close_expired(&mut sessions, start + SECOND * 17), [slots[2]]);
        assert!(sessions.is_empty());
        assert_eq!(sessions.next_look(), None);
    }

    #[test]
    fn a_slot_that_is_used_again_expires_by_its_new_session() {
        let (mut sessions, start) = (Sessions::default(), Instant::now());
        let slot = open(&mut sessions, 1, start);
        sessions.close(slot);
        assert_eq!(open(&mut sessions, 2, start + SECOND * 5), slot);
        assert!(close_expired(&mut sessions, start + TIMEOUT).is_empty());
        assert_eq!(close_expired(&mut sessions, start + SECOND * 15), [slot]);
        // A shorter timeout than that of the session before is not held up by it.
        let slot = open(&mut sessions, 3, start + SECOND * 20);
        sessions.close(slot);
        sessions.open(ends(4), start + SECOND * 21, SECOND);
        assert_eq!(close_expired(&mut sessions, start + SECOND * 22), [slot]);
    }

    #[test]
    fn many_short_sessions_leave_nothing_behind() {
        let (mut sessions, now) = (Sessions::default(), Instant::now());
        for round in 0..10_000 {
            let slot = open(&mut sessions, round as u16, now);
            sessions.answered(slot, now);
            sessions.close(slot);
        }
        assert_eq!((sessions.slots.len(), sessions.looks.len(), sessions.len()), (1, 1, 0));
    }

    #[test]
    fn how_old_depends_on_how_fast_replies_usually_come() {
        let (mut sessions, start) = (Sessions::default(), Instant::now());
        assert_eq!(sessions.gives_way_after(), GIVES_WAY_AFTER_MAX, "nothing is known yet");
        for (reply_millis, expected_millis) in [(1, 20), (50, 200), (1, 175), (2_000, 1_000)] {
            let slot = open(&mut sessions, 1, start);
            sessions.answered(slot, start + Duration::from_millis(reply_millis));
            sessions.answered(slot, start + SECOND * 5);
            sessions.close(slot);
            assert_eq!(sessions.gives_way_after().as_millis(), expected_millis, "after {reply_millis} ms");
        }
        for _ in 0..100 {
            let slot = open(&mut sessions, 1, start);
            sessions.answered(slot, start);
            sessions.close(slot);
        }
        assert_eq!(sessions.gives_way_after(), GIVES_WAY_AFTER_MIN, "one slow reply is forgotten");
    }

    #[test]
    fn the_oldest_without_a_reply_gives_way_once_it_is_old_enough() {
        let (mut sessions, start) = (Sessions::default(), Instant::now());
        let slots: Vec<usize> = (0..3).map(|port| open(&mut sessions, port, start)).collect();
        sessions.answered(slots[0], start + SECOND);
        let young = start + GIVES_WAY_AFTER_MAX - Duration::from_millis(1);
        assert_eq!(sessions.admit(&ends(9), young, false), Admission::Full);
        let old = start + GIVES_WAY_AFTER_MAX;
        assert_eq!(sessions.admit(&ends(9), old, false), Admission::Displace(slots[1]));
        assert_eq!(sessions.admit(&ends(9), old, true), Admission::New, "nobody gives way while there is room");
        sessions.close(slots[1]);
        let new = open(&mut sessions, 9, old);
        assert_eq!(sessions.admit(&ends(10), old, false), Admission::Displace(slots[2]));
        sessions.close(slots[2]);
        assert_eq!(sessions.admit(&ends(10), old, false), Admission::Full, "one has a reply, one is young");
        assert_eq!(sessions.admit(&ends(10), old + SECOND, false), Admission::Displace(new));
    }

    #[test]
    fn an_answer_proves_nothing_until_the_client_sends_again() {
        let (mut sessions, start) = (Sessions::default(), Instant::now());
        let slots: Vec<usize> = (0..3).map(|port| open(&mut sessions, port, start)).collect();
        for slot in &slots {
            sessions.answered(*slot, start);
        }
        // The first one sends again, the second one only has another reply.
        assert_eq!(sessions.admit(&ends(0), start, false), Admission::Known(slots[0]));
        sessions.answered(slots[1], start + SECOND / 2);
        let young = start + GIVES_WAY_AFTER_MAX - Duration::from_millis(1);
        assert_eq!(sessions.admit(&ends(9), young, false), Admission::Full, "the reply took no time, and still");
        let old = start + GIVES_WAY_AFTER_MAX;
        for slot in &slots[1..] {
            assert_eq!(sessions.admit(&ends(9), old, false), Admission::Displace(*slot));
            sessions.close(*slot);
        }
        assert_eq!(sessions.admit(&ends(9), old + SECOND * 5, false), Admission::Full, "whose client is there stays");
    }

    #[test]
    fn who_has_no_answer_gives_way_before_who_has_one() {
        let (mut sessions, start) = (Sessions::default(), Instant::now());
        let answered = open(&mut sessions, 1, start);
        sessions.answered(answered, start);
        let silent = open(&mut sessions, 2, start + SECOND);
        let old = start + SECOND * 3;
        assert_eq!(sessions.admit(&ends(3), old, false), Admission::Displace(silent));
        sessions.close(silent);
        let young = open(&mut sessions, 4, old);
        assert_eq!(sessions.admit(&ends(3), old, false), Admission::Full, "half of them have none");
        sessions.close(young);
        assert_eq!(sessions.admit(&ends(3), old, false), Admission::Displace(answered));
    }

    #[test]
    fn who_goes_on_sending_is_spared_while_others_are_there() {
        let (mut sessions, start) = (Sessions::default(), Instant::now());
        let (syslog, once) = (open(&mut sessions, 1, start), open(&mut sessions, 2, start));
        sessions.admit(&ends(1), start + SECOND, true);
        assert_eq!(sessions.admit(&ends(3), start + SECOND * 2, false), Admission::Displace(once));
        sessions.close(once);
        assert_eq!(sessions.admit(&ends(3), start + SECOND * 2, false), Admission::Full);
        // It has not sent since it was spared.
        assert_eq!(sessions.admit(&ends(3), start + SECOND * 3, false), Admission::Displace(syslog));
    }

    proptest! {
        /// Whatever happens, in whatever order: the table agrees with a simple model of it.
        #[test]
        fn agrees_with_a_simple_model(steps in proptest::collection::vec((0_u8..4, 0_u16..12, 0_u64..4_000), 1..200)) {
            let (mut sessions, mut now) = (Sessions::default(), Instant::now());
            let mut model: HashMap<u16, (usize, Instant)> = HashMap::new();
            for (action, port, millis) in steps {
                now += Duration::from_millis(millis);
                match (action, model.get(&port).copied()) {
                    (0, None) => {
                        let slot = open(&mut sessions, port, now);
                        prop_assert!(model.values().all(|(used, _)| *used != slot));
                        model.insert(port, (slot, now));
                    }
                    (0, Some((slot, _))) => {
                        prop_assert_eq!(sessions.admit(&ends(port), now, true), Admission::Known(slot));
                        model.insert(port, (slot, now));
                    }
                    (1, Some((slot, _))) => {
                        sessions.answered(slot, now);
                        model.insert(port, (slot, now));
                    }
                    (2, Some((slot, _))) => {
                        sessions.close(slot);
                        model.remove(&port);
                    }
                    _ => {
                        let mut closed = close_expired(&mut sessions, now);
                        let mut expected: Vec<usize> =
                            model.values().filter(|(_, last)| *last + TIMEOUT <= now).map(|(slot, _)| *slot).collect();
                        closed.sort_unstable();
                        expected.sort_unstable();
                        prop_assert_eq!(closed, expected);
                        model.retain(|_, (_, last)| *last + TIMEOUT > now);
                    }
                }
                prop_assert_eq!(sessions.len(), model.len());
                prop_assert!(sessions.looks.len() <= 2 * sessions.slots.len());
            }
        }
    }
}
