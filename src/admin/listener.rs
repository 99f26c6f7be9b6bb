//! Where the admin API listens: a TCP address or a UNIX socket.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener};

use crate::config::AdminBind;
use crate::net::unix::{self, SocketFile};

/// Connections waiting to be accepted.
const BACKLOG: i32 = 128;

/// A bound admin address. A UNIX socket's file goes away with it.
#[derive(Debug)]
pub struct Listener {
    socket: Socket,
    reach: Reach,
}

#[derive(Debug)]
enum Socket {
    Tcp(TcpListener),
    Unix(UnixListener, SocketFile),
}

/// From where a listener can be reached, which decides what its callers have to show.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reach {
    /// Whoever the file's mode lets in; a browser only where somebody forwards a port to it.
    Unix,
    /// Everyone on this machine, also the web pages in its browsers.
    Loopback,
    /// The network.
    Network,
}

/// Bind the address, inside a tokio runtime. A UNIX socket's stale file is replaced, one that answers is not.
pub fn bind(bind: &AdminBind) -> io::Result<Listener> {
    match bind {
        AdminBind::Tcp(address) => bind_tcp(*address)
            .map_err(|error| explain(error, &address.to_string(), "`ss -ltnp` shows who has the port")),
        AdminBind::Unix(path) => {
            bind_unix(path).map_err(|error| explain(error, &format!("unix:{}", path.display()), "choose another path"))
        }
    }
}

fn explain(error: io::Error, what: &str, when_in_use: &str) -> io::Error {
    let next = match error.kind() {
        io::ErrorKind::AddrInUse | io::ErrorKind::AlreadyExists => when_in_use,
        io::ErrorKind::PermissionDenied => "choose a place where this user may bind",
        io::ErrorKind::NotFound => "make its directory first",
        io::ErrorKind::AddrNotAvailable => "use an address of this machine",
        _ => return io::Error::new(error.kind(), format!("cannot bind [admin] {what}: {error}")),
    };
    io::Error::new(error.kind(), format!("cannot bind [admin] {what}: {error}; {next}"))
}

/// The socket of another process at the same address. A UNIX socket's file stays that one's until `own`. `None`: the file
/// is gone, and nobody could arrive.
pub fn adopt(bind: &AdminBind, descriptor: OwnedFd) -> io::Result<Option<Listener>> {
    match bind {
        AdminBind::Tcp(address) => listen_tcp(*address, descriptor.into()).map(Some),
        AdminBind::Unix(path) if !unix::is_socket(path) => Ok(None),
        AdminBind::Unix(path) => {
            let file = SocketFile::of(path)?;
            file.set_owned(false);
            let socket = UnixListener::from_std(descriptor.into())?;
            Ok(Some(Listener { socket: Socket::Unix(socket, file), reach: Reach::Unix }))
        }
    }
}

fn bind_tcp(address: SocketAddr) -> io::Result<Listener> {
    let socket = std::net::TcpListener::bind(address)?;
    socket.set_nonblocking(true)?;
    listen_tcp(address, socket)
}

fn listen_tcp(address: SocketAddr, socket: std::net::TcpListener) -> io::Result<Listener> {
    let reach = if address.ip().to_canonical().is_loopback() { Reach::Loopback } else { Reach::Network };
    Ok(Listener { socket: Socket::Tcp(TcpListener::from_std(socket)?), reach })
}

fn bind_unix(path: &Path) -> io::Result<Listener> {
    let (socket, file) = unix::bind(path)?;
    socket.listen(BACKLOG)?;
    let socket = UnixListener::from_std(socket.into())?;
    Ok(Listener { socket: Socket::Unix(socket, file), reach: Reach::Unix })
}

impl Listener {
    /// What was bound; with port 0 the port that the kernel chose.
    pub fn address(&self) -> io::Result<AdminBind> {
        match &self.socket {
            Socket::Tcp(socket) => socket.local_addr().map(AdminBind::Tcp),
            Socket::Unix(_, file) => Ok(AdminBind::Unix(file.path().to_owned())),
        }
    }

    /// For a process that takes this one's place.
    pub fn descriptor(&self) -> BorrowedFd<'_> {
        match &self.socket {
            Socket::Tcp(socket) => socket.as_fd(),
            Socket::Unix(socket, _) => socket.as_fd(),
        }
    }

    /// Does a UNIX socket's file go away with this, or is it another process's, which has the socket, too?
    pub fn set_owned(&self, owned: bool) {
        if let Socket::Unix(_, file) = &self.socket {
            file.set_owned(owned);
        }
    }

    pub(super) fn reach(&self) -> Reach {
        self.reach
    }

    pub(super) async fn accept(&self) -> io::Result<Box<dyn Stream>> {
        match &self.socket {
            Socket::Tcp(socket) => socket.accept().await.map(|(stream, _)| Box::new(stream) as Box<dyn Stream>),
            Socket::Unix(socket, _) => socket.accept().await.map(|(stream, _)| Box::new(stream) as Box<dyn Stream>),
        }
    }
}

/// A connection of either kind.
pub(super) trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<S: AsyncRead + AsyncWrite + Send + Unpin> Stream for S {}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    #[tokio::test]
    async fn a_stale_socket_is_replaced_and_the_file_goes_away_with_the_listener() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("admin.sock");
        // A std listener leaves its file behind, as a killed process does.
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        assert!(path.exists());

        let listener = bind(&AdminBind::Unix(path.clone())).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o660);
        assert_eq!(listener.reach(), Reach::Unix);
        let error = bind(&AdminBind::Unix(path.clone())).unwrap_err().to_string();
        assert!(error.ends_with("another process listens there; choose another path"), "{error}");

        drop(listener);
        assert!(!path.exists());
    }

    #[tokio::test]
    async fn an_adopted_socket_goes_on_and_its_file_is_the_new_listener_s() {
        let directory = tempfile::tempdir().unwrap();
        let unix = AdminBind::Unix(directory.path().join("admin.sock"));
        for bind_at in [unix.clone(), AdminBind::Tcp("127.0.0.1:0".parse().unwrap())] {
            let old = bind(&bind_at).unwrap();
            let address = old.address().unwrap();
            let new = adopt(&bind_at, old.descriptor().try_clone_to_owned().unwrap()).unwrap().unwrap();
            assert_eq!((new.address().unwrap(), new.reach()), (address.clone(), old.reach()));
            new.set_owned(true);
            old.set_owned(false);
            drop(old);
            let connected = match &address {
                AdminBind::Tcp(address) => std::net::TcpStream::connect(address).map(drop),
                AdminBind::Unix(path) => std::os::unix::net::UnixStream::connect(path).map(drop),
            };
            connected.unwrap();
            new.accept().await.unwrap();
        }
        let AdminBind::Unix(path) = &unix else { unreachable!() };
        assert!(!path.exists(), "it went away with the new listener");
        let old = bind(&unix).unwrap();
        drop(adopt(&unix, old.descriptor().try_clone_to_owned().unwrap()).unwrap());
        assert!(path.exists(), "it is still the old one's");
        fs::remove_file(path).unwrap();
        assert!(adopt(&unix, old.descriptor().try_clone_to_owned().unwrap()).unwrap().is_none());
    }

    #[tokio::test]
    async fn a_file_that_is_not_ours_stays() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("admin.sock");
        fs::write(&path, "precious").unwrap();
        let error = bind(&AdminBind::Unix(path.clone())).unwrap_err().to_string();
        assert!(error.contains("the file exists and is not a socket"), "{error}");
        assert_eq!(fs::read_to_string(&path).unwrap(), "precious");

        fs::remove_file(&path).unwrap();
        let listener = bind(&AdminBind::Unix(path.clone())).unwrap();
        fs::remove_file(&path).unwrap();
        let successor = std::os::unix::net::UnixListener::bind(&path).unwrap();
        drop(listener);
        assert!(path.exists(), "the successor's socket stays");
        drop(successor);
    }

    #[tokio::test]
    async fn errors_say_what_to_do() {
        let first = bind(&AdminBind::Tcp("127.0.0.1:0".parse().unwrap())).unwrap();
        let address = first.address().unwrap();
        let error = bind(&address).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
        assert!(error.to_string().ends_with("`ss -ltnp` shows who has the port"), "{error}");
        let error = bind(&AdminBind::Unix("/nonexistent/admin.sock".into())).unwrap_err().to_string();
        assert!(error.starts_with("cannot bind [admin] unix:/nonexistent/admin.sock: "), "{error}");
        assert!(error.ends_with("; make its directory first"), "{error}");
        let error = bind(&AdminBind::Tcp("192.0.2.1:0".parse().unwrap())).unwrap_err().to_string();
        assert!(error.ends_with("; use an address of this machine"), "{error}");
    }

    #[tokio::test]
    async fn reach_follows_the_address() {
        for (address, reach) in [("127.0.0.2:0", Reach::Loopback), ("0.0.0.0:0", Reach::Network)] {
            assert_eq!(bind(&AdminBind::Tcp(address.parse().unwrap())).unwrap().reach(), reach, "{address}");
        }
    }
}
