//! Which upstream a session has: the first one, and the next when that one refuses, turned unhealthy or was removed.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Instant;

use ulid::Ulid;

use super::session::{Link, Session, reason_of};
use super::{Core, Udp, number};
use crate::address::Address;
use crate::connection::{count_failure, next_source};
use crate::net::check::is_local;
use crate::net::datagram::{self, outbox::Outbox};
use crate::pool::{Health, PickError, UpstreamLife};
use crate::proxy_protocol::Transport;
use crate::snapshot::{Listener, Moved};
use crate::termination::DropReason;

/// Client, local address and id: what a header says.
type Introduced<'a> = (SocketAddr, SocketAddr, &'a Ulid);

impl Udp {
    /// A socket to an upstream that is not among those tried, and how many it took to get one. An upstream that cannot
    /// be connected to is added to them.
    pub(super) fn link(
        &self,
        listener: &Listener,
        (client, local, id): Introduced<'_>,
        tried: &mut Vec<Arc<UpstreamLife>>,
    ) -> Result<(Link, u32), DropReason> {
        let pool = &listener.pool;
        let mut attempts = 0;
        let mut reason = None;
        loop {
            let indices = pool.upstreams.iter().enumerate();
            let indices = indices.filter(|(_, upstream)| tried.iter().any(|life| Arc::ptr_eq(life, &upstream.life)));
            let indices: Vec<usize> = if tried.is_empty() { Vec::new() } else { indices.map(|(at, _)| at).collect() };
            let picked = pool.pick(Some(client.ip()), &indices).map_err(|error| match error {
                PickError::None => DropReason::NoUpstream,
                PickError::Full => DropReason::UpstreamsFull,
                PickError::Tried => reason.unwrap_or(DropReason::NoUpstream),
            })?;
            let life = Arc::clone(picked.lease.life());
            attempts += 1;
            let source = next_source(&self.shared, &pool.config.source, &life.address);
            // Validation keeps upstreams that take no datagrams away from UDP.
            let connected = match &life.address {
                Address::Ip(address) => datagram::connect(*address, source),
                Address::Unix(_) => Err(io::ErrorKind::Unsupported.into()),
            };
            match connected {
                Ok(socket) => {
                    let plan = &listener.headers[pool.upstreams[picked.index].entry];
                    let mut header = Vec::new();
                    plan.encode(Some((client, local)), Transport::Dgram, &id.to_string(), &mut header)
                        .map_err(|_| DropReason::TooBig)?;
                    life.session_begun();
                    let link = Link {
                        socket,
                        lease: picked.lease,
                        pool: Arc::clone(&pool.name),
                        format: plan.format,
                        header: header.into(),
                        mode: pool.config.udp_header,
                        first: true,
                        headers: 0,
                        packet_max: None,
                        tapped: false,
                        place: 0,
                    };
                    return Ok((link, attempts));
                }
                Err(error) if is_local(&error) => {
                    listener.life.lacked(&error);
                    let forbidden = reason_of(&error) == DropReason::Forbidden;
                    return Err(if forbidden { DropReason::Forbidden } else { DropReason::LocalResources });
                }
                Err(error) => {
                    tracing::debug!(event = "connect_failed", %id, pool = &*pool.name, upstream = %life.address, reason = %error);
                    count_failure(&self.shared, pool, &life);
                    reason = Some(DropReason::Unreachable);
                    tried.push(life);
                    if attempts > pool.config.retries {
                        return Err(DropReason::Unreachable);
                    }
                }
            }
        }
    }

    /// Gives a session another upstream if the pool has changed since it was last looked at, and that asks for it.
    pub(super) fn look_at_upstream(&self, core: &mut Core, slot: usize, outbox: &mut Outbox, now: Instant) {
        let pool_seen = core.pool_seen;
        let Some(session) = core.sessions[slot].as_mut() else { return };
        if std::mem::replace(&mut session.pool_seen, pool_seen) == pool_seen {
            return;
        }
        let pool = &core.listener.pool;
        let life = session.link.life();
        let why = match pool.upstreams.iter().position(|upstream| Arc::ptr_eq(&upstream.life, life)) {
            None => Moved::Removed,
            Some(index) if pool.upstreams[index].candidate.health == Health::Unhealthy && !pool.takes(index) => {
                Moved::Unhealthy
            }
            Some(_) => return,
        };
        let mut tried = vec![Arc::clone(life)];
        self.move_session(core, slot, why, &mut tried, outbox, now);
    }

    /// The upstream of a session has failed: another one, if there is one. What was on its way to the first is lost,
    /// unless it was kept and goes to the other.
    pub(super) fn upstream_failed(
        &self,
        core: &mut Core,
        slot: usize,
        reason: DropReason,
        outbox: &mut Outbox,
        now: Instant,
    ) {
        let Some(session) = core.sessions[slot].as_mut() else { return };
        let pool = Arc::clone(&core.listener.pool);
        let life = Arc::clone(session.link.life());
        session.failed = Some(reason);
        // Whatever it knew of this session, it may know no more.
        session.link.first = true;
        count_failure(&self.shared, &pool, &life);
        let mut tried = match &mut session.retained {
            Some(retained) => std::mem::take(&mut retained.tried),
            None => Vec::new(),
        };
        tried.push(life);
        let was_kept = session.retained.is_some();
        let may = session.retained.is_none() || tried.len() <= pool.config.retries as usize;
        if !may || !self.move_session(core, slot, Moved::Refused, &mut tried, outbox, now) {
            // What was kept has had its chances.
            core.forget_retained(slot);
            return core.dropped(reason, 1, now);
        }
        if !was_kept {
            core.dropped(reason, 1, now);
        }
        if let Some(retained) = core.sessions[slot].as_mut().and_then(|session| session.retained.as_mut()) {
            retained.tried = tried;
        }
    }

    /// Gives a session another upstream than those tried; `false`: there is none. What was kept of the client is sent
    /// there, as the new upstream's first datagram.
    fn move_session(
        &self,
        core: &mut Core,
        slot: usize,
        why: Moved,
        tried: &mut Vec<Arc<UpstreamLife>>,
        outbox: &mut Outbox,
        now: Instant,
    ) -> bool {
        let listener = Arc::clone(&core.listener);
        let Some(session) = core.sessions[slot].as_mut() else { return false };
        let entry = &session.entry;
        let (link, attempts) = match self.link(&listener, (entry.client, entry.local, &entry.id), tried) {
            Ok(linked) => linked,
            Err(reason @ (DropReason::LocalResources | DropReason::Forbidden)) => {
                core.dropped(reason, 1, now);
                return false;
            }
            Err(_) => return false,
        };
        core.generation = core.generation.wrapping_add(1);
        if self.upstreams.add(&link.socket, number(slot, core.generation)).is_err() {
            core.dropped(DropReason::LocalResources, 1, now);
            return false;
        }
        session.replace_link(link, core.generation, attempts);
        session.attempted(Some(why));
        session.entry.listener.sessions.moved[why as usize].fetch_add(1, Relaxed);
        // An error that comes back at once is found by the next send.
        if session.retained.is_some() && session.send_retained(outbox).is_ok() {
            session.tap(&self.shared);
        }
        true
    }
}

impl Session {
    fn replace_link(&mut self, link: Link, generation: u32, attempts: u32) {
        self.fold();
        self.link = link;
        self.folded.2 = 0;
        self.generation = generation;
        self.attempts += attempts;
    }
}

impl Core {
    /// Frees what was kept of a session's first datagram.
    pub(super) fn forget_retained(&mut self, slot: usize) {
        if let Some(retained) = self.sessions[slot].as_mut().and_then(|session| session.retained.take()) {
            self.retained_bytes -= retained.datagram.len();
        }
    }
}
