//! The way back: replies of many upstream sockets, gathered and sent to their clients from the address each wrote to.

use std::ops::Range;
use std::task::{Context, Poll};
use std::time::Instant;

use super::group::{Piece, pieces, run};
use super::session::{OUT, lower_segment_max, reason_of};
use super::{Buffers, Core, Udp, of_number};
use crate::net::datagram::BATCH_MAX;
use crate::net::datagram::outbox::{Next, Route};
use crate::net::datagram::poll::{READY_MAX, Ready};
use crate::termination::{DropReason, Termination};

/// Replies received of one session at once, while it has had one at a time: the second place says that there is no more.
pub const BURST_MIN: usize = 2;

/// Replies of one batch, by session. Used again from batch to batch.
pub struct Replies {
    ready: Ready,
    /// Slot and datagrams.
    owners: Vec<Owner>,
    pieces: Vec<Piece>,
    failures: Vec<(usize, DropReason)>,
}

struct Owner {
    slot: usize,
    pieces: Range<usize>,
    lost: usize,
    lost_bytes: usize,
}

impl Default for Replies {
    fn default() -> Replies {
        Replies { ready: Vec::with_capacity(READY_MAX), owners: Vec::new(), pieces: Vec::new(), failures: Vec::new() }
    }
}

impl Udp {
    /// One round of sessions that have replies, if there are any.
    pub(super) fn pass_replies(&self, cx: &mut Context<'_>) -> bool {
        let buffers = &mut *self.buffers.borrow_mut();
        let Poll::Ready(Ok(())) = self.upstreams.poll_ready(cx, &mut buffers.replies.ready) else { return false };
        let core = &mut *self.core.borrow_mut();
        let now = Instant::now();
        buffers.batch.clear();
        buffers.replies.clear();
        for index in 0..buffers.replies.ready.len() {
            let (slot, generation) = of_number(buffers.replies.ready[index].data.u64());
            if buffers.batch.len() == BATCH_MAX {
                self.send_replies(core, buffers, now);
            }
            self.receive_replies(core, buffers, (slot, generation), now);
        }
        self.send_replies(core, buffers, now);
        if !buffers.replies.failures.is_empty() {
            self.refresh(core);
        }
        while let Some((slot, reason)) = buffers.replies.failures.pop() {
            self.upstream_failed(core, slot, reason, &mut buffers.outbox, now);
        }
        true
    }

    fn receive_replies(&self, core: &mut Core, buffers: &mut Buffers, (slot, generation): (usize, u32), now: Instant) {
        let Some(session) = core.sessions.get_mut(slot).and_then(Option::as_mut) else { return };
        if session.generation != generation {
            return;
        }
        let Buffers { batch, replies, .. } = buffers;
        let first = batch.len();
        match batch.receive(&session.link.socket, session.burst) {
            Ok(count) => {
                session.burst = if count == session.burst { BATCH_MAX } else { BURST_MIN };
                session.replied(&self.shared, now);
                let start = replies.pieces.len();
                for place in first..batch.len() {
                    replies.pieces.extend(pieces(place, batch.bytes(place).len(), batch.segment(place)));
                }
                let pieces = start..replies.pieces.len();
                replies.owners.push(Owner { slot, pieces, lost: 0, lost_bytes: 0 });
                if session.failed.take().is_some() || session.first_reply.is_none() {
                    session.link.life().answered();
                    core.forget_retained(slot);
                }
                core.table.answered(slot, now);
            }
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
            Err(error) => replies.failures.push((slot, reason_of(&error))),
        }
    }

    /// Sends what was gathered to the clients, and ends sessions that are answered.
    fn send_replies(&self, core: &mut Core, buffers: &mut Buffers, now: Instant) {
        let Buffers { batch, outbox, replies, .. } = buffers;
        let Replies { owners, pieces, .. } = replies;
        if owners.is_empty() {
            return batch.clear();
        }
        let mut sending = outbox.begin();
        for owner in owners.iter() {
            let session = core.sessions[owner.slot].as_ref().expect("no session ends while its replies are gathered");
            let route = Route { to: Some(session.ends.client), from: session.answer_from };
            let mut at = owner.pieces.start;
            while at < owner.pieces.end {
                let lengths = pieces[at..owner.pieces.end].iter().map(|piece| piece.length);
                let count = run(lengths, 0, session.reply_segment_max);
                let bytes = |piece: &Piece| &batch.bytes(piece.place)[piece.start..piece.start + piece.length];
                sending.push(route, &[], pieces[at..at + count].iter().map(bytes));
                at += count;
            }
        }
        let mut drops = [0; DropReason::ALL.len()];
        sending.send(&self.socket, |refused| {
            let at = owners.partition_point(|owner| owner.pieces.end <= refused.first);
            let owner = &mut owners[at];
            if let Some(lower) = lower_segment_max(&refused) {
                let session = core.sessions[owner.slot].as_mut().expect("as above");
                session.reply_segment_max = session.reply_segment_max.min(lower);
                return Next::Plain;
            }
            let lost = &pieces[refused.first..refused.first + refused.datagrams];
            owner.lost += lost.len();
            owner.lost_bytes += lost.iter().map(|piece| piece.length).sum::<usize>();
            drops[reason_of(&refused.error) as usize] += lost.len();
            Next::Skip
        });
        core.segmented[OUT] += outbox.take_segmented();
        for reason in DropReason::ALL {
            core.dropped(*reason, drops[*reason as usize], now);
        }
        for owner in owners.iter() {
            let session = core.sessions[owner.slot].as_mut().expect("as above");
            let bytes: usize = pieces[owner.pieces.clone()].iter().map(|piece| piece.length).sum();
            let count = owner.pieces.len() - owner.lost;
            session.count_replies(count as u64, (bytes - owner.lost_bytes) as u64, now);
            if session.is_answered() {
                core.close(&self.shared, owner.slot, Termination::Responses);
            }
        }
        batch.clear();
        replies.owners.clear();
        replies.pieces.clear();
    }
}

impl Replies {
    fn clear(&mut self) {
        self.owners.clear();
        self.pieces.clear();
        self.failures.clear();
    }
}
