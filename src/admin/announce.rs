//! The file `preface.admin`, by which the command line finds the running process.

use std::fs;
use std::io;
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::config::AdminBind;

/// Name of the file in the runtime directory. It holds one line: the address as in `[admin] bind`.
pub const FILE_NAME: &str = "preface.admin";

/// The runtime directory where systemd gives none.
pub const DIRECTORY: &str = "/run/preface";

/// Another process that is alive on this machine has answered by then.
const ALIVE_WITHIN: Duration = Duration::from_millis(200);

/// The written file; removed in the end, if it still says the same.
#[derive(Debug)]
pub struct Announcement {
    path: PathBuf,
    content: String,
    left: bool,
}

/// `$RUNTIME_DIRECTORY`, of which systemd may give several, or `/run/preface`.
pub fn runtime_directory(variable: Option<&str>) -> PathBuf {
    let first = variable.and_then(|list| list.split(':').next()).filter(|first| !first.is_empty());
    PathBuf::from(first.unwrap_or(DIRECTORY))
}

/// Write the file into an existing directory. `None` where that cannot be, or where another running process already
/// announced itself: a second one, started for a test, must not catch the orders meant for the first. `predecessor`:
/// the process of that address is the one whose place is taken.
pub fn announce(directory: &Path, bind: &AdminBind, predecessor: Option<&AdminBind>) -> Option<Announcement> {
    let path = directory.join(FILE_NAME);
    let content = format!("{}\n", address_text(bind));
    let other = fs::read_to_string(&path).ok().filter(|other| *other != content).and_then(|other| parse(&other));
    if other.is_some_and(|other| Some(&other) != predecessor && is_alive(&other)) {
        return None;
    }
    // Renamed into place, so that a reader never sees half of it.
    let temporary = directory.join(format!(".{FILE_NAME}.{}", std::process::id()));
    let written = fs::write(&temporary, &content).and_then(|()| fs::rename(&temporary, &path));
    if written.is_err() {
        let _ = fs::remove_file(&temporary);
        return None;
    }
    Some(Announcement { path, content, left: false })
}

/// The address that a running process announced in this directory.
pub fn announced(directory: &Path) -> io::Result<Option<AdminBind>> {
    match fs::read_to_string(directory.join(FILE_NAME)) {
        Ok(content) => Ok(parse(&content)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// An address as in `[admin] bind`, `--admin` and the file: `127.0.0.1:9900` or `unix:/path`.
pub fn parse(text: &str) -> Option<AdminBind> {
    let text = text.trim();
    match text.strip_prefix("unix:") {
        Some(path) => path.starts_with('/').then(|| AdminBind::Unix(path.into())),
        None => text.parse().ok().map(AdminBind::Tcp),
    }
}

/// The other way round.
pub fn address_text(bind: &AdminBind) -> String {
    match bind {
        AdminBind::Tcp(address) => address.to_string(),
        AdminBind::Unix(path) => format!("unix:{}", path.display()),
    }
}

fn is_alive(bind: &AdminBind) -> bool {
    match bind {
        AdminBind::Tcp(address) => TcpStream::connect_timeout(address, ALIVE_WITHIN).is_ok(),
        AdminBind::Unix(path) => UnixStream::connect(path).is_ok(),
    }
}

impl Announcement {
    /// Leaves the file to the process that has written it again.
    pub fn leave(mut self) {
        self.left = true;
    }
}

impl Drop for Announcement {
    fn drop(&mut self) {
        if !self.left && fs::read_to_string(&self.path).is_ok_and(|content| content == self.content) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    #[test]
    fn announces_in_a_directory_and_takes_it_back() {
        let directory = tempfile::tempdir().unwrap();
        assert_eq!(announced(directory.path()).unwrap(), None);
        for bind in [AdminBind::Tcp("[::1]:9900".parse().unwrap()), AdminBind::Unix("/run/x.sock".into())] {
            let announcement = announce(directory.path(), &bind, None).unwrap();
            assert_eq!(announced(directory.path()).unwrap(), Some(bind));
            drop(announcement);
            assert_eq!(announced(directory.path()).unwrap(), None);
        }
        assert!(announce(Path::new("/nonexistent"), &AdminBind::Unix("/run/x.sock".into()), None).is_none());
    }

    #[test]
    fn a_living_process_keeps_its_announcement_and_a_dead_one_does_not() {
        let directory = tempfile::tempdir().unwrap();
        let alive = TcpListener::bind("127.0.0.1:0").unwrap();
        let first = AdminBind::Tcp(alive.local_addr().unwrap());
        let second = AdminBind::Unix("/run/second.sock".into());
        let announcement = announce(directory.path(), &first, None).unwrap();
        assert!(announce(directory.path(), &second, None).is_none());
        assert!(announce(directory.path(), &second, Some(&second)).is_none());
        drop(alive);
        let successor = announce(directory.path(), &second, None).unwrap();
        drop(announcement);
        assert_eq!(announced(directory.path()).unwrap(), Some(second), "what is another's is not removed");
        drop(successor);
    }

    #[test]
    fn who_takes_a_living_process_s_place_is_announced_in_its_place() {
        let directory = tempfile::tempdir().unwrap();
        let alive = TcpListener::bind("127.0.0.1:0").unwrap();
        let old = AdminBind::Tcp(alive.local_addr().unwrap());
        for new in [AdminBind::Unix("/run/new.sock".into()), old.clone()] {
            let before = announce(directory.path(), &old, Some(&new)).unwrap();
            let after = announce(directory.path(), &new, Some(&old)).unwrap();
            before.leave();
            assert_eq!(announced(directory.path()).unwrap(), Some(new));
            drop(after);
            assert_eq!(announced(directory.path()).unwrap(), None);
        }
    }

    #[test]
    fn the_first_of_several_runtime_directories_counts() {
        assert_eq!(runtime_directory(Some("/run/a:/run/b")), Path::new("/run/a"));
        assert_eq!(runtime_directory(Some("")), Path::new(DIRECTORY));
        assert_eq!(runtime_directory(None), Path::new(DIRECTORY));
    }
}
