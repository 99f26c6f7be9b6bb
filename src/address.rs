//! PURE. Where a connection goes and where it comes from: an IP address and port, or a UNIX socket.

use std::fmt;
use std::net::SocketAddr;
use std::path::Path;
use std::str::FromStr;
use std::sync::Arc;

use serde::{Serialize, Serializer};

/// Where something listens. One text for it everywhere: `10.0.0.30:80`, `unix:/run/app.sock`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Address {
    /// An IP address and port.
    Ip(SocketAddr),
    /// The path of a UNIX stream socket.
    Unix(Arc<Path>),
}

impl Address {
    /// The IP address and port, if it has one.
    pub fn ip(&self) -> Option<SocketAddr> {
        match self {
            Address::Ip(address) => Some(*address),
            Address::Unix(_) => None,
        }
    }

    /// Its port, if it has one.
    pub fn port(&self) -> Option<u16> {
        self.ip().map(|address| address.port())
    }

    /// Does it stand for every address of this machine?
    pub fn is_unspecified(&self) -> bool {
        self.ip().is_some_and(|address| address.ip().is_unspecified())
    }
}

impl From<SocketAddr> for Address {
    fn from(address: SocketAddr) -> Address {
        Address::Ip(address)
    }
}

/// A text is not an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not an address; write 127.0.0.1:8080, [::1]:8080 or unix:/path")]
pub struct NotAnAddress;

impl FromStr for Address {
    type Err = NotAnAddress;

    fn from_str(text: &str) -> Result<Address, NotAnAddress> {
        match text.strip_prefix("unix:") {
            Some(path) if path.starts_with('/') && !path.ends_with('/') => Ok(Address::Unix(Path::new(path).into())),
            Some(_) => Err(NotAnAddress),
            None => text.parse().map(Address::Ip).map_err(|_| NotAnAddress),
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Address::Ip(address) => address.fmt(f),
            Address::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

impl Serialize for Address {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// Who connected.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Client {
    /// From an IP address and port.
    Ip(SocketAddr),
    /// Over a UNIX socket: a program of this machine, which has no address to tell it by.
    Unix,
}

impl Client {
    /// The IP address and port, if it has one.
    pub fn ip(self) -> Option<SocketAddr> {
        match self {
            Client::Ip(address) => Some(address),
            Client::Unix => None,
        }
    }
}

impl From<SocketAddr> for Client {
    fn from(address: SocketAddr) -> Client {
        Client::Ip(address)
    }
}

impl fmt::Display for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Client::Ip(address) => address.fmt(f),
            Client::Unix => f.write_str("unix"),
        }
    }
}

impl Serialize for Client {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_text_for_logs_status_and_metrics() {
        let ip = Address::from(SocketAddr::from(([10, 0, 0, 30], 80)));
        let unix = Address::Unix(Path::new("/run/a b.sock").into());
        assert_eq!((ip.to_string(), ip.port()), ("10.0.0.30:80".to_owned(), Some(80)));
        assert_eq!((unix.to_string(), unix.port()), ("unix:/run/a b.sock".to_owned(), None));
        assert_eq!(serde_json::to_string(&unix).unwrap(), "\"unix:/run/a b.sock\"");
        assert_eq!(serde_json::to_string(&Client::Unix).unwrap(), "\"unix\"");
        assert!(ip < unix, "IP addresses come first");
        for address in [ip, unix] {
            assert_eq!(address.to_string().parse(), Ok(address));
        }
        for wrong in ["", "10.0.0.30", "unix:", "unix:x.sock", "unix:/run/", "/run/x.sock"] {
            assert_eq!(wrong.parse::<Address>(), Err(NotAnAddress), "{wrong:?}");
        }
    }

    #[test]
    fn a_path_costs_no_more_room_than_an_ip_address() {
        assert_eq!(size_of::<Address>(), size_of::<SocketAddr>());
        assert_eq!(size_of::<Client>(), size_of::<SocketAddr>());
    }
}
