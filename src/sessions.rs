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

/// A session whose client has shown that it is there gives way after so long without a datagram, where all others stay:
/// gateways on the way forget a client no later, so who wants to be heard sends more often.
pub const GIVES_WAY_QUIET: Duration = Duration::from_secs(30);

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
    /// Each session is in one of them, by its `Standing`, oldest first.
    queues: [Queue; 3],
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
    place: Place,
}

/// What speaks for a session's client being where it says that it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Standing {
    /// Nothing: no reply yet.
    Unanswered,
    /// Nothing, but the upstream has taken it for a client.
    Answered,
    /// It has sent something since it had a reply. Who forges addresses can do that, too, but not at no cost.
    Proven,
}

/// A place in one of the queues.
#[derive(Debug)]
struct Place {
    standing: Standing,
    since: Instant,
    /// Did the client send again since then? Of one without a reply only.
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
            match entry.place.standing {
                Standing::Unanswered => entry.place.sent_again = true,
                Standing::Answered => self.requeue(slot, now, Standing::Proven),
                Standing::Proven => {}
            }
            return Admission::Known(slot as usize);
        }
        match has_room {
            true => Admission::New,
            false => {
                let slot = self.oldest_unanswered(now).or_else(|| self.oldest_answered(now));
                let slot = slot.or_else(|| self.oldest_quiet(now));
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
        let place = Place { standing: Standing::Unanswered, since: now, sent_again: false, before: None, after: None };
        self.slots[slot as usize].session = Some(Entry { ends, last: now, timeout, place });
        let known = self.index.insert(ends, slot);
        assert!(known.is_none(), "admit has said that it is new");
        self.enqueue(slot, now, Standing::Unanswered);
        self.look(slot, now + timeout);
        slot as usize
    }

    /// When a session had its last datagram, from either side.
    pub fn last(&self, slot: usize) -> Instant {
        self.slots[slot].session.as_ref().expect("the slot is of an open session").last
    }

    /// Takes note of replies. After the first one a session gives way later, and hardly once its client sends again.
    pub fn answered(&mut self, slot: usize, now: Instant) {
        let entry = self.entry(slot as u32);
        entry.last = now;
        if entry.place.standing != Standing::Unanswered {
            return;
        }
        let time = now.duration_since(entry.place.since);
        self.reply_time = Some(self.reply_time.map_or(time, |usual| time.max((usual * 7 + time) / 8)));
        self.requeue(slot as u32, now, Standing::Answered);
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
            let slot = self.first(Standing::Unanswered)?;
            let place = self.place(slot);
            if now.duration_since(place.since) < old {
                return None;
            }
            if !place.sent_again {
                return Some(slot);
            }
            self.requeue(slot, now, Standing::Unanswered);
        }
        None
    }

    /// The session that gives way where most have had a reply: servers answer forged questions, too. While more have
    /// had none, the place is theirs to give. A client that is there may be far away, so it has the longest time to send
    /// again.
    fn oldest_answered(&mut self, now: Instant) -> Option<u32> {
        let len = |standing: Standing| self.queues[standing as usize].len;
        if len(Standing::Answered) <= len(Standing::Unanswered) {
            return None;
        }
        let slot = self.first(Standing::Answered)?;
        (now.duration_since(self.place(slot).since) >= GIVES_WAY_AFTER_MAX).then_some(slot)
    }

    /// The session that gives way where no other does: a flood that sends twice for each forged address must not lock
    /// everybody out for as long as a timeout.
    fn oldest_quiet(&mut self, now: Instant) -> Option<u32> {
        for _ in 0..SPARED_MAX {
            let slot = self.first(Standing::Proven)?;
            let Entry { last, place, .. } = self.entry(slot);
            if now.duration_since(*last) >= GIVES_WAY_QUIET {
                return Some(slot);
            }
            // Those behind it stand there since later, and have sent since then.
            if now.duration_since(place.since) < GIVES_WAY_QUIET {
                return None;
            }
            self.requeue(slot, now, Standing::Proven);
        }
        None
    }

    fn first(&self, standing: Standing) -> Option<u32> {
        self.queues[standing as usize].first
    }

    fn requeue(&mut self, slot: u32, now: Instant, standing: Standing) {
        self.dequeue(slot);
        self.enqueue(slot, now, standing);
    }

    fn enqueue(&mut self, slot: u32, now: Instant, standing: Standing) {
        let queue = &mut self.queues[standing as usize];
        queue.len += 1;
        let before = queue.last.replace(slot);
        match before {
            Some(before) => self.place(before).after = Some(slot),
            None => queue.first = Some(slot),
        }
        *self.place(slot) = Place { standing, since: now, sent_again: false, before, after: None };
    }

    fn dequeue(&mut self, slot: u32) {
        let Place { standing, before, after, .. } = *self.place(slot);
        let queue = standing as usize;
        self.queues[queue].len -= 1;
        match before {
            Some(before) => self.place(before).after = after,
            None => self.queues[queue].first = after,
        }
        match after {
            Some(after) => self.place(after).before = before,
            None => self.queues[queue].last = before,
        }
    }

    fn place(&mut self, slot: u32) -> &mut Place {
        &mut self.entry(slot).place
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
        assert_eq!(
            sessions.admit(&ends(9), old + SECOND * 5, false),
            Admission::Full,
            "whose client was there a moment ago stays"
        );
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

    /// Forged addresses that send once more after the reply look like clients that are there.
    #[test]
    fn who_was_there_gives_way_when_it_is_quiet_and_nobody_else_does() {
        let (mut sessions, start) = (Sessions::default(), Instant::now());
        // As many as are spared in a row, and more: none of them may be lost on the way.
        let slots: Vec<usize> = (0..40).map(|port| open(&mut sessions, port, start)).collect();
        for (port, slot) in slots.iter().enumerate() {
            sessions.answered(*slot, start);
            sessions.admit(&ends(port as u16), start + SECOND, true);
        }
        let young = start + SECOND + GIVES_WAY_QUIET - Duration::from_millis(1);
        assert_eq!(sessions.admit(&ends(99), young, false), Admission::Full);
        // All but the last two go on talking, one of them by replies alone.
        sessions.answered(slots[0], young);
        for port in 1..38 {
            assert_eq!(sessions.admit(&ends(port), young, true), Admission::Known(slots[usize::from(port)]));
        }
        let old = young + SECOND;
        let displaced: Vec<usize> = (0..8)
            .filter_map(|_| match sessions.admit(&ends(99), old, false) {
                Admission::Displace(slot) => {
                    sessions.close(slot);
                    Some(slot)
                }
                other => (other != Admission::Full).then(|| panic!("{other:?}")),
            })
            .collect();
        assert_eq!(displaced, slots[38..], "those who talk stay");
        let unanswered = open(&mut sessions, 50, old);
        let all_quiet = old + GIVES_WAY_QUIET * 2;
        assert_eq!(sessions.admit(&ends(99), all_quiet, false), Admission::Displace(unanswered), "the others go first");
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
                prop_assert_eq!(sessions.queues.iter().map(|queue| queue.len).sum::<usize>(), model.len());
                prop_assert!(sessions.looks.len() <= 2 * sessions.slots.len());
            }
        }
    }
}
