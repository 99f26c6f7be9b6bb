//! Sockets that the process was started with, as systemd and its like hand them over (sd_listen_fds(3)).

use std::fmt::{self, Write as _};
use std::io;
use std::net::SocketAddr;
use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::path::Path;

use rustix::io::{FdFlags, fcntl_getfd, fcntl_setfd};
use rustix::net::SocketType;
use socket2::{SockAddr, SockRef, Socket};

use crate::address::Address;

/// The first descriptor that is handed over.
const FIRST: RawFd = 3;
/// More than anybody hands over.
const SOCKETS_MAX: usize = 1_024;
/// What systemd calls sockets that came without a name.
const NAMELESS: &str = "unknown";

/// The sockets that were handed over, open until the process ends.
#[derive(Debug, Default)]
pub struct Inherited {
    sockets: Vec<InheritedSocket>,
    /// Why there are none, if somebody seems to have meant to hand over some.
    reason: Option<String>,
}

/// One socket that was handed over.
#[derive(Debug)]
pub struct InheritedSocket {
    /// Several may have one name.
    pub name: String,
    /// What it is good for.
    pub kind: Kind,
    fd: OwnedFd,
}

/// What an inherited socket is good for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    /// It takes connections.
    Connections(Address),
    /// It takes datagrams.
    Datagrams(SocketAddr),
    /// Nothing that preface could serve, and why.
    Neither(String),
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Kind::Connections(Address::Ip(address)) => write!(f, "tcp {address}"),
            Kind::Connections(address) => address.fmt(f),
            Kind::Datagrams(address) => write!(f, "udp {address}"),
            Kind::Neither(why) => f.write_str(why),
        }
    }
}

/// Takes what was handed over, and the variables that tell of it, so that no child mistakes them for its own. Called once,
/// before the process has a second thread.
pub fn take() -> Inherited {
    let [pid, count, names] = ["LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"].map(|variable| {
        let value = std::env::var_os(variable).map(|value| value.to_string_lossy().into_owned());
        // SAFETY: the process has one thread, as the doc comment asks: nobody reads the environment meanwhile.
        unsafe { std::env::remove_var(variable) };
        value
    });
    let names = match names_of(pid.as_deref(), count.as_deref(), names.as_deref(), std::process::id()) {
        Ok(names) => names,
        Err(reason) => return Inherited { sockets: Vec::new(), reason: Some(reason) },
    };
    let mut inherited = Inherited::default();
    for (name, number) in names.into_iter().zip(FIRST..) {
        match claim(number) {
            Ok(fd) => {
                let kind = kind_of(&fd);
                inherited.sockets.push(InheritedSocket { name, kind, fd });
            }
            Err(error) => inherited.reason = Some(format!("descriptor {number} of LISTEN_FDS: {error}")),
        }
    }
    inherited
}

/// The name of each descriptor; none if the variables are not there.
fn names_of(pid: Option<&str>, count: Option<&str>, names: Option<&str>, own_pid: u32) -> Result<Vec<String>, String> {
    let (Some(pid), Some(count)) = (pid, count) else { return Ok(Vec::new()) };
    if pid.parse() != Ok(own_pid) {
        return Err(format!("LISTEN_PID is {pid:?}, and this process is {own_pid}: a shell or wrapper in between?"));
    }
    let count = match count.parse::<usize>() {
        Ok(count) if count <= SOCKETS_MAX => count,
        _ => return Err(format!("LISTEN_FDS is {count:?}, not a number up to {SOCKETS_MAX}")),
    };
    let mut given = names.filter(|names| !names.is_empty()).into_iter().flat_map(|names| names.split(':'));
    Ok((0..count).map(|_| given.next().filter(|name| !name.is_empty()).unwrap_or(NAMELESS).to_owned()).collect())
}

/// Makes a descriptor ours, if there is one of this number. No child inherits it.
fn claim(number: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: borrowed for two calls, which say EBADF where nothing is open.
    let borrowed = unsafe { BorrowedFd::borrow_raw(number) };
    let flags = fcntl_getfd(borrowed)?;
    fcntl_setfd(borrowed, flags | FdFlags::CLOEXEC)?;
    // SAFETY: it is open, and whoever started this process left it to us: LISTEN_PID names us. `take` is called once.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

fn kind_of(fd: &OwnedFd) -> Kind {
    let socket = SockRef::from(fd);
    let Ok(kind) = rustix::net::sockopt::socket_type(fd) else { return Kind::Neither("not a socket".to_owned()) };
    let address = socket.local_addr().ok().and_then(|address| address_of(&address));
    let is_listening = rustix::net::sockopt::socket_acceptconn(fd).unwrap_or(false);
    match (kind, address) {
        (_, None) => Kind::Neither("a socket of another family than IP and UNIX".to_owned()),
        (SocketType::STREAM, Some(address)) if is_listening => Kind::Connections(address),
        (SocketType::STREAM, Some(address)) => {
            let help = "in a socket unit, Accept=yes hands over connections: remove it";
            Kind::Neither(format!("a stream socket of {address} that does not listen; {help}"))
        }
        (SocketType::DGRAM, Some(Address::Ip(address))) => Kind::Datagrams(address),
        (SocketType::DGRAM, Some(address)) => Kind::Neither(format!("a datagram socket at {address}")),
        (_, Some(address)) => Kind::Neither(format!("neither a stream nor a datagram socket, at {address}")),
    }
}

fn address_of(address: &SockAddr) -> Option<Address> {
    if let Some(address) = address.as_socket() {
        return Some(Address::Ip(address));
    }
    if !address.is_unix() {
        return None;
    }
    // As `ss` shows them: abstract ones begin with "@", and some have no name at all.
    let name = address.as_abstract_namespace().map(|name| format!("@{}", name.escape_ascii()));
    let path = address.as_pathname().map(Path::to_owned).or(name.map(Into::into));
    Some(Address::Unix(path.unwrap_or_else(|| "*".into()).into()))
}

impl Inherited {
    /// Sockets that came in another way, in their order.
    pub fn of(sockets: Vec<(String, OwnedFd)>) -> Inherited {
        let inherited = |(name, fd)| InheritedSocket { name, kind: kind_of(&fd), fd };
        Inherited { sockets: sockets.into_iter().map(inherited).collect(), reason: None }
    }

    /// All, in the order in which they were handed over.
    pub fn sockets(&self) -> &[InheritedSocket] {
        &self.sockets
    }

    /// Those of this name.
    pub fn named<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a InheritedSocket> {
        self.sockets.iter().filter(move |socket| socket.name == name)
    }

    /// What was handed over, for a message: `"web" (tcp 0.0.0.0:80), "app" (unix:/run/app.sock)`, or why nothing was.
    pub fn list(&self) -> String {
        let mut text = String::new();
        for InheritedSocket { name, kind, .. } in &self.sockets {
            let comma = if text.is_empty() { "" } else { ", " };
            let _ = write!(text, "{comma}\"{name}\" ({kind})");
        }
        match (&self.reason, text.is_empty()) {
            (None, true) => "nothing was".to_owned(),
            (None, false) => text,
            (Some(reason), true) => format!("nothing was ({reason})"),
            (Some(reason), false) => format!("{text} ({reason})"),
        }
    }
}

impl InheritedSocket {
    /// Another descriptor of the same socket, non-blocking: whoever else holds the socket has to bear that.
    pub fn duplicate(&self) -> io::Result<Socket> {
        let socket = Socket::from(self.fd.try_clone()?);
        socket.set_nonblocking(true)?;
        Ok(socket)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{TcpListener, TcpStream, UdpSocket};
    use std::os::unix::net::{UnixDatagram, UnixListener};

    #[test]
    fn names_follow_the_variables() {
        let names = |pid, count, names| names_of(pid, count, names, 42);
        assert_eq!(names(None, None, None), Ok(vec![]));
        assert_eq!(names(None, Some("1"), Some("web")), Ok(vec![]), "without LISTEN_PID they are for somebody else");
        assert_eq!(names(Some("42"), Some("2"), Some("web:app")), Ok(vec!["web".to_owned(), "app".to_owned()]));
        assert_eq!(names(Some("42"), Some("2"), Some("web")), Ok(vec!["web".to_owned(), "unknown".to_owned()]));
        assert_eq!(names(Some("42"), Some("1"), None), Ok(vec!["unknown".to_owned()]));
        assert_eq!(names(Some("42"), Some("0"), Some("")), Ok(vec![]));
        for (pid, count) in [("41", "1"), ("", "1"), ("42", "-1"), ("42", "x"), ("42", "1025")] {
            assert!(names(Some(pid), Some(count), None).is_err(), "{pid} {count}");
        }
    }

    #[test]
    fn a_descriptor_is_known_for_what_it_is() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = tcp.local_addr().unwrap();
        let connected = TcpStream::connect(address).unwrap();
        assert_eq!(kind_of(&tcp.into()), Kind::Connections(Address::Ip(address)));
        let udp = UdpSocket::bind("[::1]:0").unwrap();
        let address = udp.local_addr().unwrap();
        assert_eq!(kind_of(&udp.into()), Kind::Datagrams(address));
        let unix = kind_of(&UnixListener::bind(at("x")).unwrap().into());
        assert_eq!(unix, Kind::Connections(Address::Unix(at("x").into())));
        let neither = [
            (OwnedFd::from(connected), "that does not listen"),
            (UnixDatagram::bind(at("d")).unwrap().into(), "a datagram socket at unix:/"),
            (std::fs::File::open("/dev/null").unwrap().into(), "not a socket"),
        ];
        for (fd, expected) in neither {
            let kind = kind_of(&fd);
            assert!(matches!(&kind, Kind::Neither(why) if why.contains(expected)), "{kind:?}");
        }
    }
}
