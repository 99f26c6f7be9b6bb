//! UNIX stream sockets: listening ones with the file that they leave, and connections.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::Mode;
use socket2::{Domain, SockAddr, Socket, Type};

/// The owner and the group may connect.
const MODE: u32 = 0o660;

/// The file of a listening socket. Removed in the end, if it is still the one that was made.
#[derive(Debug)]
pub struct SocketFile {
    path: PathBuf,
    device_and_inode: (u64, u64),
    owned: AtomicBool,
}

impl SocketFile {
    /// The file that stands at this path now.
    pub fn of(path: &Path) -> io::Result<SocketFile> {
        let metadata = fs::symlink_metadata(path)?;
        let device_and_inode = (metadata.dev(), metadata.ino());
        Ok(SocketFile { path: path.to_owned(), device_and_inode, owned: AtomicBool::new(true) })
    }

    /// Does the file go away with this, or is it another process's, which has the socket, too?
    pub fn set_owned(&self, owned: bool) {
        self.owned.store(owned, Ordering::Relaxed);
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if !self.owned.load(Ordering::Relaxed) {
            return;
        }
        // The next process may have put its own socket there already.
        let is_ours = |metadata: fs::Metadata| (metadata.dev(), metadata.ino()) == self.device_and_inode;
        if fs::symlink_metadata(&self.path).is_ok_and(is_ours) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Binds a path, for its owner and group alone. Nobody can connect before the socket listens. A stale file is replaced;
/// one that somebody listens on is an error of the kind `AddrInUse`, and what is no socket one of `AlreadyExists`.
pub fn bind(path: &Path) -> io::Result<(Socket, SocketFile)> {
    let socket = Socket::new(Domain::UNIX, Type::STREAM.nonblocking().cloexec(), None)?;
    // The file inherits the socket's own mode, less the umask: so it never has more than it should.
    rustix::fs::fchmod(&socket, Mode::from_raw_mode(MODE))?;
    let address = SockAddr::unix(path)?;
    match socket.bind(&address) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
            remove_stale(path)?;
            socket.bind(&address)?;
        }
        bound => bound?,
    }
    let file = SocketFile::of(path)?;
    fs::set_permissions(path, fs::Permissions::from_mode(MODE))?;
    Ok((socket, file))
}

/// Is there a socket's file?
pub fn is_socket(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok_and(|file| file.file_type().is_socket())
}

/// Removes the file of a process that is gone. Only a refused connection proves that; what is no socket is never removed.
fn remove_stale(path: &Path) -> io::Result<()> {
    let other = |what| Err(io::Error::new(io::ErrorKind::AlreadyExists, what));
    let kind = fs::symlink_metadata(path)?.file_type();
    match () {
        () if kind.is_socket() => {}
        () if kind.is_dir() => return other("it is a directory"),
        () => return other("the file exists and is not a socket"),
    }
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    // A live listener with a full backlog would block us; like this it says EAGAIN.
    socket.set_nonblocking(true)?;
    match socket.connect(&SockAddr::unix(path)?) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => fs::remove_file(path),
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Err(error),
        _ => Err(io::Error::new(io::ErrorKind::AddrInUse, "another process listens there")),
    }
}

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

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().mode() & 0o777
    }

    #[test]
    fn the_file_has_its_mode_from_the_first_instant() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("x.sock");
        let socket = Socket::new(Domain::UNIX, Type::STREAM, None).unwrap();
        rustix::fs::fchmod(&socket, Mode::from_raw_mode(MODE)).unwrap();
        socket.bind(&SockAddr::unix(&path).unwrap()).unwrap();
        assert_eq!(mode(&path) & !MODE, 0, "{:o}, before anything else is done", mode(&path));
        drop(socket);
        let _bound = bind(&path).unwrap();
        assert_eq!(mode(&path), MODE);
    }

    #[test]
    fn a_stale_file_is_replaced_and_one_that_answers_is_not() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("x.sock");
        drop(UnixListener::bind(&path).unwrap());
        let (socket, file) = bind(&path).unwrap();
        socket.listen(1).unwrap();
        assert_eq!(bind(&path).unwrap_err().to_string(), "another process listens there");
        drop((socket, file));
        assert!(!path.exists(), "the file goes with its socket");
        fs::write(&path, "data").unwrap();
        assert_eq!(bind(&path).unwrap_err().to_string(), "the file exists and is not a socket");
        assert_eq!(fs::read_to_string(&path).unwrap(), "data");
        assert_eq!(bind(directory.path()).unwrap_err().to_string(), "it is a directory");
    }

    #[test]
    fn a_successors_file_stays() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("x.sock");
        let first = bind(&path).unwrap();
        fs::remove_file(&path).unwrap();
        // An open socket keeps its inode: the second file has another one.
        let _second = UnixListener::bind(&path).unwrap();
        drop(first);
        assert!(path.exists());
    }

    #[test]
    fn a_full_queue_refuses() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("x.sock");
        assert_eq!(connect(&path).unwrap_err().kind(), io::ErrorKind::NotFound);
        let (socket, _file) = bind(&path).unwrap();
        assert_eq!(connect(&path).unwrap_err().kind(), io::ErrorKind::ConnectionRefused, "nobody listens yet");
        socket.listen(0).unwrap();
        let _queued = connect(&path).unwrap();
        let full = connect(&path).unwrap_err();
        assert_eq!((full.kind(), full.raw_os_error()), (io::ErrorKind::ConnectionRefused, None));
        assert!(!crate::net::check::is_local(&full), "{full}: it says something about the upstream");
    }
}
