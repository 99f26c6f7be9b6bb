//! A new process takes the place of a running one, without a connection lost: what the two say to each other, and which
//! program is started.
//!
//! The old process starts its program again, with one end of a UNIX stream as its standard input, and (`give`, `take`):
//!
//! ```text
//! old                                         new
//! Offer, and every listening socket     ->
//!                                             loads the file, adopts the sockets that it asks for, binds the others
//!                                       <-    Ready: which it has adopted
//! stops reading from those
//! Takeover: orders and health           ->
//!                                             serves
//!                                       <-    Serving
//! tells systemd, closes the stream, and drains
//! ```
//!
//! They are the same kernel sockets, so what is queued in them is served by whoever reads next, and nobody is refused at
//! any time. Until `Serving` everything can fail and the old process goes on: what the new one writes to its standard
//! error until then comes back as the reason.

mod give;
mod take;

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::pool::{AdminState, Health};

pub use give::{Upgrade, ready};
pub use take::{Predecessor, Taken, released};

/// A process that was started to take over has its predecessor's process id here.
const VARIABLE: &str = "PREFACE_UPGRADE";
/// Counts up when an older process could not follow a newer one any more.
const PROTOCOL: u32 = 1;
/// A new process is ready by then, or is ended: less than a caller of the admin API waits.
const READY_WITHIN: Duration = Duration::from_secs(12);
/// Each later step takes milliseconds.
const STEP_WITHIN: Duration = Duration::from_secs(5);
/// The key of the predecessor's standard error among what is offered.
const STANDARD_ERROR: &str = "stderr";

/// The key of the sockets that the process was started with.
const INHERITED: &str = "inherited";

/// The key of the admin API's socket among what is offered.
pub fn admin_key(address: &str) -> String {
    format!("admin {address}")
}

/// The key of the socket for probes.
pub fn probe_key(address: &str) -> String {
    format!("probe {address}")
}

/// What there is to take over. The descriptors follow in this order.
#[derive(Debug, Serialize, Deserialize)]
struct Offer {
    protocol: u32,
    version: String,
    /// What they are, and how many.
    descriptors: Vec<(String, usize)>,
    /// The names of those that the first process was started with.
    inherited: Vec<String>,
}

/// The new process could serve at once.
#[derive(Debug, Serialize, Deserialize)]
pub struct Ready {
    version: String,
    /// Keys of what it has taken.
    adopted: Vec<String>,
}

/// The old process reads from the adopted sockets no more.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Takeover {
    orders: Vec<Order>,
    health: Vec<Observed>,
}

/// The new process serves.
#[derive(Debug, Serialize, Deserialize)]
struct Serving {}

/// An operator's order that goes on.
#[derive(Debug, Serialize, Deserialize)]
struct Order {
    pool: String,
    address: String,
    admin: AdminState,
    since_ms: u64,
    by: String,
}

/// What checks saw last.
#[derive(Debug, Serialize, Deserialize)]
struct Observed {
    pool: String,
    address: String,
    health: Health,
    since_ms: u64,
    reason: String,
}

/// What to start again.
#[derive(Clone, Debug)]
pub struct Program {
    path: PathBuf,
    arguments: Vec<OsString>,
}

impl Program {
    /// The program and the arguments that this process was started with. To be asked before the file can have been
    /// replaced; the name is kept, not what it leads to, so that a link that is turned to a new version counts.
    pub fn of_this_process() -> io::Result<Program> {
        let mut arguments = std::env::args_os();
        let name = arguments.next().unwrap_or_default();
        let running = fs::metadata("/proc/self/exe")?;
        let is_running = |path: &Path| {
            fs::metadata(path).is_ok_and(|file| (file.dev(), file.ino()) == (running.dev(), running.ino()))
        };
        let search = std::env::var_os("PATH").unwrap_or_default();
        let named = find(&name, &std::env::current_dir().unwrap_or_default(), &search, is_running);
        let path = match named {
            Some(path) => path,
            None => without_deleted(std::env::current_exe()?),
        };
        Ok(Program { path, arguments: arguments.collect() })
    }
}

/// Where a name was found when it was started, as an absolute path.
fn find(name: &OsStr, directory: &Path, search: &OsStr, is_running: impl Fn(&Path) -> bool) -> Option<PathBuf> {
    let has_slash = name.as_encoded_bytes().contains(&b'/');
    let candidates: Vec<PathBuf> = match has_slash {
        true => vec![directory.join(name)],
        false => std::env::split_paths(search).map(|place| directory.join(place).join(name)).collect(),
    };
    candidates.into_iter().find(|path| is_running(path))
}

/// The kernel's name of a running program whose file was removed.
fn without_deleted(path: PathBuf) -> PathBuf {
    match path.to_str().and_then(|text| text.strip_suffix(" (deleted)")) {
        Some(before) if !path.exists() => PathBuf::from(before),
        _ => path,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_name_that_was_typed_is_found_again() {
        let find = |name: &str, running: &str| {
            let is_running = |path: &Path| path == Path::new(running);
            let path =
                find(OsStr::new(name), Path::new("/home/op"), OsStr::new("/usr/local/bin:/usr/bin:bin"), is_running);
            path.map(|path| path.display().to_string())
        };
        let some = |path: &str| Some(path.to_owned());
        assert_eq!(find("/usr/bin/preface", "/usr/bin/preface"), some("/usr/bin/preface"));
        assert_eq!(find("./preface", "/home/op/./preface"), some("/home/op/./preface"));
        assert_eq!(find("preface", "/usr/bin/preface"), some("/usr/bin/preface"));
        assert_eq!(find("preface", "/home/op/bin/preface"), some("/home/op/bin/preface"));
        // Another program of that name, or a name that somebody made up.
        assert_eq!(find("/usr/bin/other", "/usr/bin/preface"), None);
        assert_eq!(find("", "/usr/bin/preface"), None);
    }

    #[test]
    fn a_removed_file_s_path_is_where_its_successor_will_be() {
        assert_eq!(without_deleted("/usr/bin/preface (deleted)".into()), Path::new("/usr/bin/preface"));
        assert_eq!(without_deleted("/usr/bin/preface".into()), Path::new("/usr/bin/preface"));
        let directory = tempfile::tempdir().unwrap();
        let odd = directory.path().join("preface (deleted)");
        fs::write(&odd, "").unwrap();
        assert_eq!(without_deleted(odd.clone()), odd);
    }
}
