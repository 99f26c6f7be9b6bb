//! The side of the new process: it adopts what it is offered, and begins when the old one has let go.

use std::collections::{BTreeMap, HashMap};
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, SystemTime};

use anyhow::{Context as _, bail};
use socket2::{SockRef, Type};
use tokio::task::JoinHandle;

use super::{
    INHERITED, Offer, PROTOCOL, READY_WITHIN, Ready, STANDARD_ERROR, STEP_WITHIN, Serving, Takeover, VARIABLE,
};
use crate::admin::announce;
use crate::config::{AdminBind, Config, Protocol};
use crate::net::handover::{Channel, replace_standard_error};
use crate::net::inherited::Inherited;
use crate::server::state::upstream_keys;
use crate::snapshot::{AdminRecord, HealthRecord, Inputs};

/// What the predecessor offers, and what was taken of it.
#[derive(Debug)]
pub struct Predecessor {
    channel: Channel,
    /// The predecessor's process id.
    pub from: u32,
    offered: BTreeMap<String, Vec<OwnedFd>>,
    inherited: Vec<(String, OwnedFd)>,
    adopted: Vec<String>,
    standard_error: OwnedFd,
    admin: Option<AdminBind>,
}

/// The predecessor has let go: everything is this process's.
#[derive(Debug)]
pub struct Taken {
    channel: Channel,
    standard_error: OwnedFd,
    /// The predecessor's process id.
    pub from: u32,
    /// Where its admin API was.
    pub admin: Option<AdminBind>,
}

impl Predecessor {
    /// What a process that was started to take over is offered; `None` for every other process.
    pub fn of_this_process() -> anyhow::Result<Option<Predecessor>> {
        // The variable may be left over from long ago: only a parent that says so itself hands over.
        let parent = std::os::unix::process::parent_id();
        if std::env::var(VARIABLE).ok().and_then(|id| id.parse().ok()) != Some(parent) {
            return Ok(None);
        }
        Predecessor::receive(parent).map(Some).context("cannot take over from the running process")
    }

    fn receive(from: u32) -> anyhow::Result<Predecessor> {
        let channel = Channel::of_standard_input()?;
        channel.set_timeout(STEP_WITHIN)?;
        let offer: Offer = serde_json::from_slice(&channel.receive()?).context("its offer is not understood")?;
        if offer.protocol != PROTOCOL {
            bail!(
                "preface {} hands over in another way than this one, {}: stop it and start this one",
                offer.version,
                env!("CARGO_PKG_VERSION")
            );
        }
        let mut offered = BTreeMap::new();
        for (key, count) in offer.descriptors {
            offered.insert(key, channel.receive_descriptors(count)?);
        }
        let standard_error = offered.remove(STANDARD_ERROR).and_then(|mut one| one.pop());
        let standard_error = standard_error.context("its offer has no standard error")?;
        let admin = offered.keys().find_map(|key| key.strip_prefix("admin "));
        let admin = admin.and_then(announce::parse);
        let sockets = offered.remove(INHERITED).unwrap_or_default();
        let inherited = offer.inherited.into_iter().zip(sockets).collect();
        Ok(Predecessor { channel, from, offered, inherited, adopted: Vec::new(), standard_error, admin })
    }

    /// The sockets that the first of all predecessors was started with.
    pub fn take_inherited(&mut self) -> Inherited {
        Inherited::of(std::mem::take(&mut self.inherited))
    }

    /// The sockets of one key, from now on this process's.
    pub fn take(&mut self, key: &str) -> Option<Vec<OwnedFd>> {
        let sockets = self.offered.remove(key)?;
        self.adopted.push(key.to_owned());
        Some(sockets)
    }

    /// Has the predecessor this port, under an address that is not taken?
    pub fn has_port(&self, protocol: Protocol, port: u16) -> bool {
        let kind = if protocol == Protocol::Tcp { Type::STREAM } else { Type::DGRAM };
        self.offered.values().flatten().any(|socket| {
            let socket = SockRef::from(socket);
            let local = socket.local_addr().ok().and_then(|address| address.as_socket());
            socket.r#type().is_ok_and(|own| own == kind) && local.is_some_and(|local| local.port() == port)
        })
    }

    /// Says that all is ready and waits until the predecessor has let go; what it hands over beside sockets.
    ///
    /// What was not taken is closed here and stays the predecessor's, which serves what is queued before it closes it.
    pub fn take_over(self) -> anyhow::Result<(Taken, Takeover)> {
        let Predecessor { channel, from, offered, adopted, standard_error, admin, .. } = self;
        drop(offered);
        let ready = Ready { version: env!("CARGO_PKG_VERSION").to_owned(), adopted };
        let gone = "the running process does not hand over after all; see its log";
        channel.send(&serde_json::to_vec(&ready)?).context(gone)?;
        channel.set_timeout(READY_WITHIN)?;
        let takeover =
            serde_json::from_slice(&channel.receive().context(gone)?).context("its state is not understood")?;
        Ok((Taken { channel, standard_error, from, admin }, takeover))
    }
}

impl Taken {
    /// Says that this process serves. What it writes to its standard error goes where the predecessor's went.
    pub fn serving(&self) -> anyhow::Result<()> {
        replace_standard_error(self.standard_error.as_fd())?;
        self.channel.send(&serde_json::to_vec(&Serving {})?).context("the running process is gone")?;
        Ok(())
    }

    /// Waits until the predecessor has told whoever supervises it; at most a few seconds.
    pub fn wait_for_predecessor(self) {
        if self.channel.set_timeout(STEP_WITHIN).is_ok() {
            let _ = self.channel.wait_for_close();
        }
    }
}

/// Completes when the predecessor speaks for the service no more, if there is one.
pub async fn released(waiting: &mut Option<JoinHandle<()>>) {
    match waiting {
        Some(handle) => drop(handle.await),
        None => std::future::pending().await,
    }
}

impl Takeover {
    /// Puts the predecessor's orders, and what it knew of upstreams that are still checked, where the first snapshot is
    /// built from.
    pub fn apply(self, config: &Config, inputs: &mut Inputs) {
        let keys = upstream_keys(config).into_iter();
        let keys: HashMap<(String, String), _> =
            keys.map(|key| ((key.pool.clone(), key.address.to_string()), key)).collect();
        let time = |since_ms| SystemTime::UNIX_EPOCH + Duration::from_millis(since_ms);
        for order in self.orders {
            if let Some(key) = keys.get(&(order.pool, order.address)) {
                let record = AdminRecord { state: order.admin, since: time(order.since_ms), by: order.by };
                inputs.admin.insert(key.clone(), record);
            }
        }
        for seen in self.health {
            if let Some(key) = keys.get(&(seen.pool, seen.address))
                && config.pools[&key.pool].health_check.is_some()
            {
                let (health, reason, since) = (seen.health, seen.reason, time(seen.since_ms));
                inputs.health.insert(key.clone(), HealthRecord { health, reason, since, slow_start: None });
            }
        }
    }
}
