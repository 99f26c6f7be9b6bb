//! What the integration tests are written with. Start at `preface`; the rest are clients, receivers and places.

mod balancer;
pub mod browser;
pub mod client;
#[allow(dead_code, reason = "the unit tests of server::watch include it too, and use more of it")]
pub mod configmap;
pub mod datagrams;
pub mod dns;
pub mod http;
pub mod more_peers;
pub mod netns;
pub mod peers;
pub mod podman;
pub mod ports;
mod process;
pub mod receiver;
pub mod user;
pub mod zone;

use std::fs::OpenOptions;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

pub use balancer::{Balancer, preface, preface_as, preface_by, preface_in};
pub use process::{Output, Process};
pub use receiver::{Arrival, Receiver};

/// How long an event may take before the test fails: far longer than it should, for a busy machine.
pub const DEADLINE: Duration = Duration::from_secs(20);

/// Waits until `look` finds something. For what only polling can show; the one place in the tests that sleeps.
#[track_caller]
pub fn eventually<T>(what: &str, look: impl FnMut() -> Option<T>) -> T {
    eventually_within(DEADLINE, what, look)
}

/// `eventually` with its own time limit.
#[track_caller]
pub fn eventually_within<T>(limit: Duration, what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(start.elapsed() < limit, "waited {limit:?} in vain: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Where the distribution has put a program; a missing one fails the test, so that nothing passes unseen.
#[track_caller]
pub fn program(name: &str) -> PathBuf {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let system = ["/usr/local/sbin", "/usr/sbin", "/usr/bin", "/sbin", "/bin"].map(PathBuf::from);
    std::env::split_paths(&path)
        .chain(system)
        .map(|directory| directory.join(name))
        .find(|file| file.is_file())
        .unwrap_or_else(|| panic!("{name} is not installed: run tests/run, which installs what the tests need"))
}

/// A checker that `tests/run` has put into the build's directory; where it could not, the test is skipped.
pub fn checker(test: &str, name: &str) -> Option<Command> {
    let file = Path::new(env!("CARGO_TARGET_TMPDIR")).with_file_name("checkers").join("bin").join(name);
    if !file.is_file() {
        skip(test, &format!("{name} is not installed: tests/run gets it from PyPI, where it can"));
        return None;
    }
    Some(Command::new(file))
}

/// Says that this machine cannot run a test, on the terminal and in the file that `tests/run` prints at its end.
pub fn skip(test: &str, why: &str) {
    let why = why.split_whitespace().collect::<Vec<_>>().join(" ");
    let why = why.chars().take(200).collect::<String>();
    eprintln!("SKIP {test}: {why}");
    if let Some(file) = std::env::var_os("PREFACE_TEST_SKIPPED") {
        let mut file =
            OpenOptions::new().append(true).create(true).open(file).expect("the file of skipped tests opens");
        writeln!(file, "{test}: {why}").expect("the file of skipped tests takes a line");
    }
}

/// A file of `tests/peers` with its `{name}` marks replaced.
#[track_caller]
pub fn template(file: &str, values: &[(&str, &str)]) -> String {
    let path = peers_directory().join(file);
    let text = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    values.iter().fold(text, |text, (name, value)| text.replace(&format!("{{{name}}}"), value))
}

/// `tests/peers`: configurations and small programs of the receivers.
pub fn peers_directory() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/peers")
}
