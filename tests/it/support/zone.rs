//! A network with its own /etc and a name server whose records the test writes: Debian's Knot DNS, on port 53.

use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;

use super::netns::Namespace;
use super::receiver::{Receiver, Serve};
use super::{Balancer, Process, client, eventually, program, template};

/// A namespace whose programs see this directory as /etc.
pub struct Network {
    /// Where everything runs.
    pub namespace: Namespace,
    etc: TempDir,
}

impl Network {
    /// With a resolv.conf that names the server of `Zone`; or why this machine has none.
    pub fn new() -> Result<Network, String> {
        let network = Network { namespace: Namespace::new()?, etc: tempfile::tempdir().expect("a directory") };
        network.write_etc("resolv.conf", "nameserver 127.0.0.1\n");
        Ok(network)
    }

    /// Puts a file into its /etc, in one step.
    pub fn write_etc(&self, file: &str, text: &str) {
        let new = self.etc.path().join("new");
        std::fs::write(&new, text).expect("a file is written");
        std::fs::rename(&new, self.etc.path().join(file)).expect("a file is renamed");
    }

    /// Takes a file from its /etc.
    pub fn remove_etc(&self, file: &str) {
        std::fs::remove_file(self.etc.path().join(file)).expect("the file is there");
    }

    /// preface inside.
    #[track_caller]
    pub fn preface(&self, config: &str) -> Balancer {
        super::balancer::preface_by(|_| self.command(Path::new(env!("CARGO_BIN_EXE_preface"))), config)
    }

    /// A program inside, with its /etc.
    pub fn command(&self, program: &Path) -> Command {
        let mut command = self.namespace.command("sh");
        command.args(["-c", "mount --bind \"$0\" /etc && exec \"$@\""]).arg(self.etc.path()).arg(program);
        command
    }

    /// A receiver without headers at this address inside.
    #[track_caller]
    pub fn receiver(&self, address: &str, serve: Serve) -> Receiver {
        self.namespace.inside(|| Receiver::at(address, false, serve))
    }

    /// Connects from inside.
    pub fn connect(&self, to: &str) -> std::io::Result<TcpStream> {
        let to: SocketAddr = to.parse().expect("an address");
        self.namespace.inside(|| client::connect(to))
    }
}

/// The zone `test.` and its server.
pub struct Zone {
    process: Process,
    directory: TempDir,
    serial: u32,
}

impl Zone {
    /// Serves these records (`web 1 A 127.0.0.2`) on 127.0.0.1 and ::1 of the network.
    #[track_caller]
    pub fn serve(network: &Network, records: &[&str]) -> Zone {
        let directory = tempfile::tempdir().expect("a directory");
        let dir = directory.path().display().to_string();
        std::fs::write(directory.path().join("knot.conf"), template("knot.conf", &[("dir", &dir)])).expect("written");
        write(directory.path(), 1, records);
        let mut command = network.namespace.command("knotd");
        let process = Process::start(command.arg("-c").arg(directory.path().join("knot.conf")));
        let mut zone = Zone { process, directory, serial: 1 };
        eventually("Knot serves the zone", || {
            assert!(zone.process.is_running(), "Knot ended at its start: {}", zone.process.stderr.text());
            zone.control(&["-b", "zone-status", "test"]).is_ok_and(|said| said.contains("serial: 1")).then_some(())
        });
        zone
    }

    /// From now on these records, and no others.
    #[track_caller]
    pub fn change(&mut self, records: &[&str]) {
        self.serial += 1;
        write(self.directory.path(), self.serial, records);
        self.control(&["-b", "zone-reload", "test"]).expect("Knot reads the zone");
        let serial = format!("serial: {}", self.serial);
        let said = self.control(&["zone-status", "test"]).expect("Knot says its serial");
        assert!(said.contains(&serial), "{said}");
    }

    /// From now on it answers SERVFAIL, until the records change.
    #[track_caller]
    pub fn fail(&mut self) {
        self.control(&["-b", "-f", "zone-purge", "test"]).expect("Knot forgets the zone");
        self.serial = 0;
    }

    fn control(&self, words: &[&str]) -> Result<String, String> {
        let mut command = Command::new(program("knotc"));
        command.arg("-s").arg(self.directory.path().join("knot.sock")).args(words);
        match Process::run(&mut command) {
            (status, said) if status.success() => Ok(said),
            (_, said) => Err(said),
        }
    }
}

fn write(directory: &Path, serial: u32, records: &[&str]) {
    let file: PathBuf = directory.join("test.zone");
    let mut text =
        format!("$ORIGIN test.\n@ 60 SOA ns admin {serial} 3600 600 86400 1\n@ 60 NS ns\nns 60 A 127.0.0.1\n");
    records.iter().for_each(|record| text += &format!("{record}\n"));
    std::fs::write(file, text).expect("the zone is written");
}
