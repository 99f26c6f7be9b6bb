//! UNIX stream sockets.

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

use socket2::{Domain, SockAddr, Socket, Type};

/// A non-blocking connection; it is there at once, or not at all. A full backlog is a refusal: the one thing that
/// EAGAIN means here, while for TCP it is a want of local ports.
pub fn connect(path: &Path) -> io::Result<OwnedFd> {
    let socket = Socket::new(Domain::UNIX, Type::STREAM.nonblocking().cloexec(), None)?;
    match socket.connect(&SockAddr::unix(path)?) {
        Ok(()) => Ok(socket.into()),
        Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => {
            Err(io::Error::new(io::ErrorKind::ConnectionRefused, "its queue of connections is full"))
        }
        Err(error) => Err(error),
    }
}
