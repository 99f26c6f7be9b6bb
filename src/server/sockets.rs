//! Listening sockets that all workers share: UNIX sockets with their files, and those that the process was started with.

use std::collections::BTreeSet;
use std::io;
use std::path::Path;

use socket2::Socket;

use crate::address::Address;
use crate::config::{Bind, Config, Listener, Protocol};
use crate::net::inherited::{InheritedSocket, Kind};
use crate::net::unix::{self, SocketFile};
use crate::net::{datagram, listen};
use crate::server::state::State;
use crate::snapshot::{self, At, SocketKey};

impl State {
    /// Binds a path once, and gives each worker a descriptor of that one socket.
    pub fn bind_unix(&self, path: &Path) -> io::Result<(Vec<Socket>, SocketFile)> {
        let (socket, file) = unix::bind(path)?;
        Ok((self.for_each_worker(&socket)?, file))
    }

    /// Descriptors of an inherited socket for those that serve it: all workers accept from one, because a socket of ours
    /// could not join it under SO_REUSEPORT if another user has bound it. Datagrams go to one worker: a client's session
    /// is with the worker that has its first one.
    pub fn adopt(&self, listener: &Listener, index: usize) -> io::Result<(Vec<Socket>, Address)> {
        let inherited = &self.inputs.inherited.sockets()[index];
        let socket = inherited.duplicate()?;
        match &inherited.kind {
            Kind::Connections(address) => {
                listen::adopt(&socket, listener.keepalive)?;
                Ok((self.for_each_worker(&socket)?, address.clone()))
            }
            Kind::Datagrams(address) => {
                datagram::prepare(&socket, *address)?;
                Ok((vec![socket], Address::Ip(*address)))
            }
            Kind::Neither(why) => Err(io::Error::new(io::ErrorKind::InvalidInput, why.clone())),
        }
    }

    fn for_each_worker(&self, socket: &Socket) -> io::Result<Vec<Socket>> {
        self.workers.iter().map(|_| socket.try_clone()).collect()
    }

    /// What is wrong with the inherited sockets that a configuration names; `check` cannot know.
    pub fn inherited_errors(&self, new: &Config) -> Vec<String> {
        let mut errors = Vec::new();
        for listener in new.listeners.values() {
            let names = listener.binds.iter().filter_map(|bind| match bind {
                Bind::Inherited(name) => Some(name),
                Bind::Ip(_) | Bind::Unix(_) => None,
            });
            for name in names {
                let what = format!("error: listener {:?} wants fd:{name}", listener.name);
                let sockets: Vec<_> = self.inputs.inherited.named(name).collect();
                if sockets.is_empty() {
                    let list = self.inputs.inherited.list();
                    errors.push(format!("{what}, and no socket of that name was handed over; handed over: {list}; in a socket unit the name is FileDescriptorName={name}"));
                }
                errors.extend(unfit(listener, &sockets).into_iter().map(|why| format!("{what}, {why}")));
            }
        }
        errors
    }

    /// Says which sockets were handed over for nothing.
    pub fn tell_of_unused_sockets(&self) {
        let index = |key: &SocketKey| match key.at {
            At::Inherited { index, .. } => Some(index),
            At::Ip { .. } | At::Unix(_) => None,
        };
        let used: BTreeSet<usize> = self.inputs.slots.keys().filter_map(index).collect();
        for (index, socket) in self.inputs.inherited.sockets().iter().enumerate() {
            let (name, kind) = (&socket.name, &socket.kind);
            match used.contains(&index) {
                true => {
                    tracing::info!(event = "inherited", name, socket = %kind, "serving a socket that was handed over")
                }
                false => tracing::warn!(
                    event = "inherited", name, socket = %kind,
                    "handed over, and no listener uses it: its clients wait in vain; write bind = \"fd:{name}\""
                ),
            }
        }
    }
}

/// Why a listener cannot use the sockets of one name.
fn unfit(listener: &Listener, sockets: &[&InheritedSocket]) -> Vec<String> {
    let mut reasons = Vec::new();
    for socket in sockets {
        match &socket.kind {
            Kind::Neither(why) => reasons.push(format!("which is {why}")),
            Kind::Connections(address @ Address::Unix(_)) if limits_sources(listener) => reasons.push(format!(
                "which is {address}: its clients have no addresses, so \"allow\", \"deny\" and \"max_connections_per_source\" cannot stand there"
            )),
            Kind::Connections(_) | Kind::Datagrams(_) => {}
        }
    }
    let kinds: Vec<String> = sockets.iter().map(|socket| socket.kind.to_string()).collect();
    for protocol in &listener.protocols {
        let fits = |socket: &&InheritedSocket| {
            matches!(socket.kind, Kind::Neither(_)) || snapshot::serves(&socket.kind, *protocol)
        };
        if sockets.is_empty() || sockets.iter().any(|socket| fits(socket)) {
            continue;
        }
        let (key, other) = match protocol {
            Protocol::Tcp => ("ListenStream=", "udp"),
            Protocol::Udp => ("ListenDatagram=", "tcp"),
        };
        let kinds = kinds.join(", ");
        reasons.push(format!(
            "which is {kinds}, and serves {protocol}: write {key} in the socket unit, or protocol = \"{other}\" here"
        ));
    }
    reasons
}

/// Does it look at the addresses of its clients?
fn limits_sources(listener: &Listener) -> bool {
    let everyone = |network: &ipnet::IpNet| network.prefix_len() == 0;
    !listener.allow.iter().all(everyone) || !listener.deny.is_empty() || listener.max_connections_per_source > 0
}
