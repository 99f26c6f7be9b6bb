//! The last connections of one worker with the headers that their upstreams got, and who follows new ones.
//!
//! To remember one is a pointer and a copy of some fifty bytes into memory that is there already. So it is always done:
//! the connection that just went wrong can be looked at afterwards.

use std::rc::Rc;

use tokio::sync::mpsc;
use tokio::sync::mpsc::error::TrySendError;

use super::record::Entry;
use crate::control::view::{Filter, Tapped};

/// Connections that one worker remembers.
pub const REMEMBERED_MAX: usize = 256;
/// Readers of new connections; one more takes the place of the oldest.
const FOLLOWERS_MAX: usize = 16;
/// A longer header's memory isn't kept for the next one.
const KEPT_BYTES_MAX: usize = 4096;

/// The ring and its followers.
#[derive(Default)]
pub(super) struct Tap {
    seen: Vec<Seen>,
    /// The oldest, once the ring is full.
    next: usize,
    followers: Vec<Follower>,
}

struct Seen {
    entry: Rc<Entry>,
    header: Vec<u8>,
}

struct Follower {
    filter: Filter,
    sender: mpsc::Sender<Tapped>,
    missed: u64,
}

impl Tap {
    /// An upstream took this header.
    pub(super) fn push(&mut self, entry: &Rc<Entry>, header: &[u8]) {
        if self.seen.len() < REMEMBERED_MAX {
            self.seen.push(Seen { entry: Rc::clone(entry), header: header.to_vec() });
        } else {
            let seen = &mut self.seen[self.next];
            seen.entry = Rc::clone(entry);
            seen.header.clear();
            seen.header.shrink_to(KEPT_BYTES_MAX);
            seen.header.extend_from_slice(header);
            self.next = (self.next + 1) % REMEMBERED_MAX;
        }
        if !self.followers.is_empty() {
            self.tell(entry, header);
        }
    }

    fn tell(&mut self, entry: &Entry, header: &[u8]) {
        self.followers.retain_mut(|follower| {
            if !entry.fits(&follower.filter) {
                return !follower.sender.is_closed();
            }
            let tapped = Tapped { connection: entry.view(), header: header.to_vec(), missed: follower.missed };
            match follower.sender.try_send(tapped) {
                Ok(()) => follower.missed = 0,
                Err(TrySendError::Full(_)) => follower.missed += 1,
                Err(TrySendError::Closed(_)) => return false,
            }
            true
        });
    }

    /// The last ones, the newest first.
    pub(super) fn last(&self, filter: &Filter) -> Vec<Tapped> {
        let (newer, older) = self.seen.split_at(self.next);
        let newest_first = newer.iter().rev().chain(older.iter().rev());
        let wanted = newest_first.filter(|seen| seen.entry.fits(filter)).take(filter.limit);
        wanted.map(|seen| Tapped { connection: seen.entry.view(), header: seen.header.clone(), missed: 0 }).collect()
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
