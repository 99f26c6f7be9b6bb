//! Where listening sockets come from: bound, also UNIX sockets with their files; handed over to the process when it was
//! started; or taken over from its predecessor.

use std::collections::BTreeSet;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use socket2::Socket;

use crate::address::Address;
use crate::config::{Bind, Config, Listener, Protocol};
use crate::net::inherited::{InheritedSocket, Kind};
use crate::net::listen::BindOptions;
use crate::net::unix::{self, SocketFile};
use crate::net::{datagram, listen};
use crate::server::state::State;
use crate::snapshot::{self, At, SocketKey};

/// Sockets for the workers, what they are bound to, and the file that one of them left.
type Made = (Vec<Socket>, Address, Option<SocketFile>);

impl State {
    /// The sockets of an address: those of the predecessor that has it, or new ones. Where the address is `shared` with
    /// one of our own, a probe would see ourselves.
    pub fn make_sockets(&mut self, key: &SocketKey, listener: &Listener, shared: bool) -> io::Result<Made> {
        let taken = self.predecessor.as_mut().and_then(|predecessor| predecessor.take(&key.to_string()));
        match (&key.at, taken) {
            (At::Ip { address, .. }, Some(taken)) => {
                Ok((self.adopt_ip(taken, key.protocol, listener.keepalive)?, Address::Ip(*address), None))
            }
            (At::Ip { address, v6only }, None) => {
                let predecessor = self.predecessor.as_ref();
                let is_there_too = predecessor.is_some_and(|one| one.has_port(key.protocol, address.port()));
                let options = BindOptions { address: *address, v6only: *v6only, keepalive: listener.keepalive };
                Ok((self.bind_ip(key.protocol, &options, shared || is_there_too)?, Address::Ip(*address), None))
            }
            // The file becomes ours when the predecessor is out of the way.
            (At::Unix(path), Some(taken)) if unix::is_socket(path) && taken.len() == 1 => {
                let socket = Socket::from(taken.into_iter().next().expect("there is one"));
                Ok((self.for_each_worker(&socket)?, Address::Unix(Arc::clone(path)), None))
            }
            (At::Unix(path), _) => {
                let (sockets, file) = self.bind_unix(path)?;
                Ok((sockets, Address::Unix(Arc::clone(path)), Some(file)))
            }
            // They came by their name, from whoever started the first process.
            (At::Inherited { index, .. }, _) => {
                let (sockets, address) = self.adopt(listener, *index)?;
                Ok((sockets, address, None))
            }
        }
    }

    /// A socket for each worker.
    fn bind_ip(&self, protocol: Protocol, options: &BindOptions, shared: bool) -> io::Result<Vec<Socket>> {
        match protocol {
            Protocol::Tcp => {
                if !shared {
                    listen::probe(options)?;
                }
                listen::bind(options, self.workers.len())
            }
            Protocol::Udp => {
                if !shared {
                    datagram::probe(options)?;
                }
                datagram::bind(options, self.workers.len())
            }
        }
    }

    /// The sockets of a predecessor. None is made; where there are too few, workers share those of TCP. Two readers of
    /// one UDP socket would tear its sessions apart: there some workers have none.
    fn adopt_ip(
        &self,
        taken: Vec<OwnedFd>,
        protocol: Protocol,
        keepalive: Option<Duration>,
    ) -> io::Result<Vec<Socket>> {
        let mut sockets: Vec<Socket> = taken.into_iter().map(Socket::from).collect();
        if protocol == Protocol::Tcp {
            for socket in &sockets {
                listen::adopt(socket, keepalive)?;
            }
            for index in sockets.len()..self.workers.len() {
                sockets.push(sockets[index - sockets.len()].try_clone()?);
            }
        }
        Ok(sockets)
    }

    /// The files of UNIX sockets that were a predecessor's until now.
    pub fn own_socket_files(&mut self) {
        for key in self.inputs.slots.keys() {
            if let At::Unix(path) = &key.at
                && !self.socket_files.contains_key(key)
                && let Ok(file) = SocketFile::of(path)
            {
                self.socket_files.insert(key.clone(), file);
            }
        }
    }

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
        if sockets.is_empty() || sockets.iter().any(fits) {
            continue;
        }
        let (key, other) = match protocol {
            Protocol::Tcp => ("ListenStream=", "udp"),
            Protocol::Udp => ("ListenDatagram=", "tcp"),
        };
        let kinds = kinds.join(", ");
        reasons.push(format!(
            "which is {kinds}, and the listener serves {protocol}: write {key} in the socket unit, or protocol = \"{other}\" here"
        ));
    }
    reasons
}

/// Does it look at the addresses of its clients?
fn limits_sources(listener: &Listener) -> bool {
    let everyone = |network: &ipnet::IpNet| network.prefix_len() == 0;
    !listener.allow.iter().all(everyone) || !listener.deny.is_empty() || listener.max_connections_per_source > 0
}
