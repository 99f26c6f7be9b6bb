//! The last connections and UDP sessions of one worker with the headers that their upstreams got, and who follows new
//! ones.
//!
//! To remember one is a pointer and a copy of some fifty bytes into memory that is there already. So it is always done:
//! what just went wrong can be looked at afterwards. It takes 160 of the 24,900 instructions of a short connection's
//! user time (callgrind).

use std::rc::Rc;

use tokio::sync::mpsc;
use tokio::sync::mpsc::error::TrySendError;

use super::record::Entry;
use super::session::SessionEntry;
use crate::control::view::{self, Filter, Tapped};

/// Connections that one worker remembers, and sessions as many.
pub const REMEMBERED_MAX: usize = 256;
/// Readers of new connections; one more takes the place of the oldest.
const FOLLOWERS_MAX: usize = 16;
/// A longer header's memory isn't kept for the next one.
const KEPT_BYTES_MAX: usize = 4096;

/// What is remembered, and the followers.
#[derive(Default)]
pub(super) struct Tap {
    connections: Ring,
    /// Apart from the connections: a second of DNS would leave none of those.
    sessions: Ring,
    followers: Vec<Follower>,
}

#[derive(Default)]
struct Ring {
    seen: Vec<Seen>,
    /// The oldest, once it is full.
    next: usize,
}

struct Seen {
    whose: Whose,
    header: Vec<u8>,
}

/// Whose header it was.
#[derive(Clone)]
pub(super) enum Whose {
    Connection(Rc<Entry>),
    Session(Rc<SessionEntry>),
}

struct Follower {
    filter: Filter,
    sender: mpsc::Sender<Tapped>,
    missed: u64,
}

impl Whose {
    fn fits(&self, filter: &Filter) -> bool {
        match self {
            Whose::Connection(entry) => entry.fits(filter),
            Whose::Session(entry) => entry.fits(filter),
        }
    }

    fn view(&self) -> view::Connection {
        match self {
            Whose::Connection(entry) => entry.view(),
            Whose::Session(entry) => entry.view(),
        }
    }
}

impl Ring {
    fn push(&mut self, whose: Whose, header: &[u8]) {
        if self.seen.len() < REMEMBERED_MAX {
            return self.seen.push(Seen { whose, header: header.to_vec() });
        }
        let seen = &mut self.seen[self.next];
        seen.whose = whose;
        seen.header.clear();
        seen.header.shrink_to(KEPT_BYTES_MAX);
        seen.header.extend_from_slice(header);
        self.next = (self.next + 1) % REMEMBERED_MAX;
    }

    fn last<'a>(&'a self, filter: &'a Filter) -> impl Iterator<Item = Tapped> + 'a {
        let (newer, older) = self.seen.split_at(self.next);
        let newest_first = newer.iter().rev().chain(older.iter().rev());
        let wanted = newest_first.filter(|seen| seen.whose.fits(filter)).take(filter.limit);
        wanted.map(|seen| Tapped { connection: seen.whose.view(), header: seen.header.clone(), missed: 0 })
    }
}

impl Tap {
    /// An upstream took this header. Of a session it has the first datagram.
    pub(super) fn push(&mut self, whose: Whose, header: &[u8]) {
        if self.is_followed() {
            self.tell(&whose, header);
        }
        match whose {
            Whose::Connection(_) => self.connections.push(whose, header),
            Whose::Session(_) => self.sessions.push(whose, header),
        }
    }

    /// Is there somebody to tell?
    pub(super) fn is_followed(&self) -> bool {
        !self.followers.is_empty()
    }

    fn tell(&mut self, whose: &Whose, header: &[u8]) {
        self.followers.retain_mut(|follower| {
            if !whose.fits(&follower.filter) {
                return !follower.sender.is_closed();
            }
            let tapped = Tapped { connection: whose.view(), header: header.to_vec(), missed: follower.missed };
            match follower.sender.try_send(tapped) {
                Ok(()) => follower.missed = 0,
                Err(TrySendError::Full(_)) => follower.missed += 1,
                Err(TrySendError::Closed(_)) => return false,
            }
            true
        });
    }

    /// The last ones: connections, then sessions, the newest first of each.
    pub(super) fn last(&self, filter: &Filter) -> Vec<Tapped> {
        self.connections.last(filter).chain(self.sessions.last(filter)).collect()
    }

    /// Sends new ones from now on, as long as somebody receives them.
    pub(super) fn follow(&mut self, filter: Filter, sender: mpsc::Sender<Tapped>) {
        self.followers.retain(|follower| !follower.sender.is_closed());
        if self.followers.len() >= FOLLOWERS_MAX {
            self.followers.remove(0);
        }
        self.followers.push(Follower { filter, sender, missed: 0 });
    }
}
