//! Network namespaces of the tests' own: named with this process's id, deleted on drop, also after a failure.

use std::fs::File;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use super::{Process, program};
use std::os::fd::AsFd;

static NAMED: AtomicU32 = AtomicU32::new(0);

/// One network namespace with its loopback up.
pub struct Namespace {
    name: String,
}

/// Two namespaces joined by a cable: `left` has 10.231.0.1 and fd00:231::1, `right` the addresses that end in 2.
pub struct Pair {
    /// 10.231.0.1
    pub left: Namespace,
    /// 10.231.0.2
    pub right: Namespace,
}

impl Namespace {
    /// A new one, or why this machine has none.
    pub fn new() -> Result<Namespace, String> {
        let number = NAMED.fetch_add(1, Ordering::Relaxed);
        let name = format!("preface-{}-{number}", std::process::id());
        let (status, output) = Process::run(Command::new(program("ip")).args(["netns", "add", &name]));
        if !status.success() {
            return Err(format!("no network namespaces here: {output}"));
        }
        let namespace = Namespace { name };
        namespace.run("ip link set lo up");
        Ok(namespace)
    }

    /// Joins it to another by a cable whose ends have these addresses, each with its prefix length.
    #[track_caller]
    pub fn cable(&self, address: &str, other: &Namespace, others_address: &str) {
        let number = NAMED.fetch_add(1, Ordering::Relaxed);
        self.run(&format!("ip link add cable{number} type veth peer name cable{number} netns {}", other.name));
        for (namespace, address) in [(self, address), (other, others_address)] {
            namespace.run(&format!("ip addr add {address} dev cable{number}"));
            namespace.run(&format!("ip link set cable{number} up"));
        }
    }

    /// A command that runs inside; `ip` replaces itself by it, so its process id is the program's.
    pub fn command(&self, name: &str) -> Command {
        let mut command = Command::new(program("ip"));
        command.args(["netns", "exec", &self.name]).arg(program(name));
        command
    }

    /// Runs a command line inside, split at spaces; it must succeed.
    #[track_caller]
    pub fn run(&self, line: &str) -> String {
        let mut words = line.split(' ');
        let mut command = self.command(words.next().expect("a command"));
        let (status, output) = Process::run(command.args(words));
        assert!(status.success(), "{line}: {output}");
        output
    }

    /// Runs `work` on a thread inside; sockets that it makes stay inside, wherever they are used.
    pub fn inside<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        let file = File::open(format!("/run/netns/{}", self.name)).expect("the namespace has a file");
        let enter = move || {
            move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network))
                .expect("a thread may move inside");
            work()
        };
        std::thread::scope(|scope| scope.spawn(enter).join()).unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let (status, output) = Process::run(Command::new(program("ip")).args(["netns", "del", &self.name]));
        if !status.success() {
            eprintln!("namespace {} stays behind: {output}", self.name);
        }
    }
}

impl Pair {
    /// A new pair, or why this machine has none.
    pub fn new() -> Result<Pair, String> {
        let pair = Pair { left: Namespace::new()?, right: Namespace::new()? };
        pair.left.run(&format!("ip link add cable type veth peer name cable netns {}", pair.right.name));
        for (namespace, last) in [(&pair.left, 1), (&pair.right, 2)] {
            namespace.run(&format!("ip addr add 10.231.0.{last}/24 dev cable"));
            namespace.run(&format!("ip addr add fd00:231::{last}/64 dev cable nodad"));
            namespace.run("ip link set cable up");
        }
        Ok(pair)
    }
}
