//! The program under test, as its user runs it: a configuration file, a process, an admin socket.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};

use rustix::process::Signal;
use tempfile::TempDir;

use super::http::{self, Response};
use super::netns::Namespace;
use super::ports::free_port;
use super::user::User;
use super::{DEADLINE, Output, Process, client, eventually};

/// A running preface. Killed on drop.
pub struct Balancer {
    process: Process,
    directory: TempDir,
    ports: BTreeMap<String, u16>,
}

/// Starts preface with this configuration and waits until `/readyz` says yes.
///
/// `:0` in a listener's `bind` becomes a free port, which `port` names; all binds of a listener get the same one, and
/// keep it over `rewrite_config`. The admin API is on a UNIX socket; the text may hold an `[admin]` table without `bind`.
#[track_caller]
pub fn preface(config: &str) -> Balancer {
    Balancer::start(|_| Command::new(env!("CARGO_BIN_EXE_preface")), config)
}

/// `preface` in a network namespace.
#[track_caller]
pub fn preface_in(namespace: &Namespace, config: &str) -> Balancer {
    Balancer::start(|_| namespace.command(env!("CARGO_BIN_EXE_preface")), config)
}

/// `preface` as another user.
#[track_caller]
pub fn preface_as(user: &User, config: &str) -> Balancer {
    Balancer::start(|directory| user.command(Path::new(env!("CARGO_BIN_EXE_preface")), directory), config)
}

/// `preface` by a command that is made for its directory.
#[track_caller]
pub fn preface_by(command: impl FnOnce(&Path) -> Command, config: &str) -> Balancer {
    Balancer::start(command, config)
}

impl Balancer {
    #[track_caller]
    fn start(command: impl FnOnce(&Path) -> Command, config: &str) -> Balancer {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let mut command = command(directory.path());
        let mut ports = BTreeMap::new();
        let file = directory.path().join("preface.toml");
        let config = complete(config, directory.path(), &mut ports);
        std::fs::write(&file, config).expect("the configuration is written");
        command.arg("run").arg("--config").arg(&file).env("RUNTIME_DIRECTORY", directory.path());
        // What the test itself sets, stays.
        let set: Vec<OsString> =
            command.get_envs().filter_map(|(name, value)| value.map(|_| name.to_owned())).collect();
        for variable in [
            "PREFACE_CONFIG",
            "PREFACE_ADMIN",
            "NOTIFY_SOCKET",
            "LISTEN_FDS",
            "LISTEN_PID",
            "LISTEN_FDNAMES",
            "WATCHDOG_USEC",
        ] {
            if !set.iter().any(|name| name == variable) {
                command.env_remove(variable);
            }
        }
        let process = Process::start(&mut command);
        let mut balancer = Balancer { process, directory, ports };
        eventually("preface is ready", || {
            assert!(balancer.process.is_running(), "preface ended at its start: {}", balancer.process.stderr.text());
            balancer.try_ask("GET", "/readyz").is_ok_and(|response| response.status == 200).then_some(())
        });
        balancer
    }

    /// The port of a listener.
    #[track_caller]
    pub fn port(&self, listener: &str) -> u16 {
        *self.ports.get(listener).unwrap_or_else(|| panic!("no listener {listener:?} with port 0 in its bind"))
    }

    /// A listener's port on 127.0.0.1.
    #[track_caller]
    pub fn ipv4(&self, listener: &str) -> SocketAddr {
        (Ipv4Addr::LOCALHOST, self.port(listener)).into()
    }

    /// A listener's port on ::1.
    #[track_caller]
    pub fn ipv6(&self, listener: &str) -> SocketAddr {
        (Ipv6Addr::LOCALHOST, self.port(listener)).into()
    }

    /// Connects to a listener on 127.0.0.1.
    #[track_caller]
    pub fn connect(&self, listener: &str) -> TcpStream {
        client::connect(self.ipv4(listener)).unwrap_or_else(|error| panic!("listener {listener}: {error}"))
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.process.id()
    }

    /// Its log.
    pub fn log(&self) -> &Output {
        &self.process.stdout
    }

    /// Its directory: configuration, admin socket, runtime files.
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// Its configuration file.
    pub fn config_file(&self) -> PathBuf {
        self.directory.path().join("preface.toml")
    }

    /// What the file must hold for this text: free ports instead of `:0`, and the admin socket.
    pub fn complete_config(&mut self, config: &str) -> String {
        complete(config, self.directory.path(), &mut self.ports)
    }

    /// Puts another configuration in the file's place, in one step. The running one sees it by itself.
    pub fn rewrite_config(&mut self, config: &str) {
        let config = self.complete_config(config);
        let new = self.directory.path().join("preface.toml.new");
        std::fs::write(&new, config).expect("the configuration is written");
        std::fs::rename(&new, self.config_file()).expect("the configuration is replaced");
    }

    /// `POST /reload`: 200 with the report, or 422 with the errors.
    #[track_caller]
    pub fn reload(&self) -> Response {
        self.ask("POST", "/reload")
    }

    /// `rewrite_config`, and waits until it is in force.
    #[track_caller]
    pub fn apply(&mut self, config: &str) {
        self.rewrite_config(config);
        let response = self.reload();
        assert_eq!(response.status, 200, "{}", response.text());
    }

    /// A request to the admin API; a POST is allowed to change things.
    #[track_caller]
    pub fn ask(&self, method: &str, path: &str) -> Response {
        self.try_ask(method, path).unwrap_or_else(|error| panic!("{method} {path}: {error}"))
    }

    fn try_ask(&self, method: &str, path: &str) -> io::Result<Response> {
        let mut stream = UnixStream::connect(self.admin_socket())?;
        stream.set_read_timeout(Some(DEADLINE))?;
        http::send(&mut stream, method, path, &[("X-Preface", "1"), ("Content-Length", "0")])?;
        http::receive(&mut stream)
    }

    /// Path of the admin socket.
    pub fn admin_socket(&self) -> PathBuf {
        self.directory.path().join("admin.sock")
    }

    /// `/status`
    #[track_caller]
    pub fn status(&self) -> serde_json::Value {
        self.ask("GET", "/status").json()
    }

    /// `/metrics`
    #[track_caller]
    pub fn metrics(&self) -> String {
        self.ask("GET", "/metrics").text()
    }

    /// The sum of a metric's samples that carry all of these labels.
    #[track_caller]
    pub fn metric(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        let metrics = self.metrics();
        let labels: Vec<String> = labels.iter().map(|(key, value)| format!("{key}=\"{value}\"")).collect();
        let samples = metrics.lines().filter_map(|line| {
            let (sample, value) = line.rsplit_once(' ')?;
            let (family, set) = sample.split_once('{').unwrap_or((sample, ""));
            let all = labels.iter().all(|label| set.trim_end_matches('}').split(',').any(|one| one == label));
            (family == name && all).then(|| value.parse::<f64>().expect("a sample is a number"))
        });
        samples.sum()
    }

    /// An upstream as `/status` shows it.
    #[track_caller]
    pub fn upstream(&self, pool: &str, address: SocketAddr) -> serde_json::Value {
        let status = self.status();
        let upstreams = status["pools"][pool]["upstreams"].as_array().unwrap_or_else(|| panic!("no pool {pool:?}"));
        let address = address.to_string();
        let found = upstreams.iter().find(|upstream| upstream["address"] == address.as_str());
        found.unwrap_or_else(|| panic!("no upstream {address} in pool {pool:?}: {upstreams:?}")).clone()
    }

    /// Waits until checks have observed this health of an upstream.
    #[track_caller]
    pub fn wait_health(&self, pool: &str, address: SocketAddr, health: &str) -> serde_json::Value {
        eventually(&format!("upstream {address} is {health}"), || {
            Some(self.upstream(pool, address)).filter(|upstream| upstream["health"] == health)
        })
    }

    /// Sends a signal.
    #[track_caller]
    pub fn signal(&self, signal: Signal) {
        self.process.signal(signal);
    }

    /// Is it still there?
    pub fn is_running(&mut self) -> bool {
        self.process.is_running()
    }

    /// Waits for its end.
    #[track_caller]
    pub fn wait_exit(&mut self) -> ExitStatus {
        self.process.wait_exit()
    }
}

/// Free ports for `:0` in the binds of listeners, and the admin socket where the text names none.
fn complete(config: &str, directory: &Path, ports: &mut BTreeMap<String, u16>) -> String {
    let admin = format!("bind = \"unix:{}\"", directory.join("admin.sock").display());
    let mut text = String::new();
    let mut listener = None;
    for line in config.lines() {
        if let Some(table) = line.trim().strip_prefix('[') {
            listener = table.strip_prefix("listeners.").and_then(|name| name.strip_suffix(']')).map(str::to_owned);
        }
        match &listener {
            Some(name) if line.trim().starts_with("bind") && line.contains(":0\"") => {
                let port = *ports.entry(name.clone()).or_insert_with(free_port);
                text += &line.replace(":0\"", &format!(":{port}\""));
            }
            _ => text += line,
        }
        text.push('\n');
        if line.trim() == "[admin]" {
            text += &format!("{admin}\n");
        }
    }
    if !config.lines().any(|line| line.trim() == "[admin]") {
        text += &format!("\n[admin]\n{admin}\n");
    }
    text
}

#[test]
fn a_listener_keeps_its_port() {
    let mut ports = BTreeMap::new();
    let config = "[listeners.web]\nbind = [\"127.0.0.1:0\", \"[::1]:0\"]\n[admin]\ntoken_file = \"x\"\n";
    let text = complete(config, Path::new("/d"), &mut ports);
    let port = ports["web"];
    let bind = format!("bind = [\"127.0.0.1:{port}\", \"[::1]:{port}\"]");
    assert_eq!(text, format!("[listeners.web]\n{bind}\n[admin]\nbind = \"unix:/d/admin.sock\"\ntoken_file = \"x\"\n"));
    assert_eq!(complete(config, Path::new("/d"), &mut ports), text);
}
