//! resolv.conf and hosts, read again when they have changed: the kubelet, NetworkManager and DHCP clients rewrite them.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use super::resolv::{self, Resolv};

/// Where resolv.conf is.
pub const RESOLV_CONF: &str = "/etc/resolv.conf";
/// Where hosts is.
pub const HOSTS: &str = "/etc/hosts";
/// The part of a file that is read; lists of blocked hosts are long.
const FILE_BYTES_MAX: u64 = 8 << 20;

/// Both files as they are now.
#[derive(Debug, Default)]
pub struct Files {
    resolv: Mutex<Cached<Result<Resolv, String>>>,
    hosts: Mutex<Cached<String>>,
}

/// What was made of a file, and which file it was.
#[derive(Debug)]
struct Cached<T> {
    mark: Option<Mark>,
    value: Option<Arc<T>>,
}

impl<T> Default for Cached<T> {
    fn default() -> Cached<T> {
        Cached { mark: None, value: None }
    }
}

/// Device, inode, size, and when it was changed: a file with the same ones has the same content.
type Mark = (u64, u64, u64, i64, i64);

impl Files {
    /// resolv.conf, or why it cannot be read.
    pub fn resolv(&self) -> Arc<Result<Resolv, String>> {
        read(&self.resolv, RESOLV_CONF, |text| text.map(|text| resolv::parse(&text)).map_err(|error| error.to_string()))
    }

    /// The text of hosts; empty where there is none.
    pub fn hosts(&self) -> Arc<String> {
        read(&self.hosts, HOSTS, Result::unwrap_or_default)
    }
}

fn read<T>(cached: &Mutex<Cached<T>>, path: &str, make: impl FnOnce(io::Result<String>) -> T) -> Arc<T> {
    let mark = mark(Path::new(path));
    let mut cached = cached.lock().unwrap_or_else(PoisonError::into_inner);
    match &cached.value {
        Some(value) if mark.is_some() && cached.mark == mark => Arc::clone(value),
        _ => {
            let value = Arc::new(make(content(path)));
            *cached = Cached { mark, value: Some(Arc::clone(&value)) };
            value
        }
    }
}

fn mark(path: &Path) -> Option<Mark> {
    let data = fs::metadata(path).ok()?;
    Some((data.dev(), data.ino(), data.size(), data.ctime(), data.ctime_nsec()))
}

fn content(path: &str) -> io::Result<String> {
    let mut bytes = Vec::new();
    File::open(path)?.take(FILE_BYTES_MAX).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}
