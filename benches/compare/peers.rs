//! The candidates: how each is configured, started, reloaded, and ended with everything it started itself.

use std::fs::{self, File};
use std::io;
use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use preface::proxy_protocol::Version;
use rustix::process::{Pid, Signal, kill_process, kill_process_group};

use super::measure::{self, Gauge};
use super::watch::Watchers;

/// What is compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// No proxy: the bound.
    Direct,
    /// Without its connection log, as the peers.
    Preface,
    /// With its connection log, as it is by default.
    PrefaceLog,
    /// The same, while a page and a `top` are open and Prometheus scrapes every second.
    Watched,
    /// The same relay without features.
    Bare,
    /// At its defaults.
    Haproxy,
    /// With splice and large pipes.
    HaproxyTuned,
    /// At its defaults.
    Nginx,
    /// With large buffers.
    NginxTuned,
    /// One worker, else at its defaults.
    Envoy,
    /// preface told to send no header: the backend must find out. Only on request.
    Headerless,
}

/// Every one that is measured unless others are asked for.
pub const ALL: [Kind; 10] = [
    Kind::Direct,
    Kind::Preface,
    Kind::PrefaceLog,
    Kind::Watched,
    Kind::Bare,
    Kind::Haproxy,
    Kind::HaproxyTuned,
    Kind::Nginx,
    Kind::NginxTuned,
    Kind::Envoy,
];

impl Kind {
    /// As in options, the table and the JSON.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Direct => "direct",
            Kind::Preface => "preface",
            Kind::PrefaceLog => "preface, log on",
            Kind::Watched => "preface, watched",
            Kind::Bare => "bare relay",
            Kind::Haproxy => "HAProxy",
            Kind::HaproxyTuned => "HAProxy tuned",
            Kind::Nginx => "nginx",
            Kind::NginxTuned => "nginx tuned",
            Kind::Envoy => "Envoy",
            Kind::Headerless => "headerless",
        }
    }

    /// From an option: letters alone count, and `haproxy` means both of them.
    pub fn matching(word: &str) -> Vec<Kind> {
        let letters = |text: &str| text.to_lowercase().chars().filter(char::is_ascii_alphabetic).collect::<String>();
        let word = letters(word);
        let mut found: Vec<Kind> = ALL.into_iter().chain([Kind::Headerless]).collect();
        found.retain(|kind| {
            let name = letters(kind.name());
            let tuned = name.strip_suffix("tuned").is_some_and(|rest| rest == word);
            name == word || tuned || word == "bare" && *kind == Kind::Bare
        });
        found
    }

    /// The header that its upstream must get: Debian's nginx only has version 1.
    pub fn header(self) -> Option<Version> {
        match self {
            Kind::Direct => None,
            Kind::Nginx | Kind::NginxTuned => Some(Version::V1),
            _ => Some(Version::V2),
        }
    }
}

/// Where things are.
#[derive(Clone, Debug)]
pub struct Setup {
    /// The program under test.
    pub preface: PathBuf,
    /// Envoy's program.
    pub envoy: PathBuf,
    /// For configurations and logs.
    pub directory: PathBuf,
    /// The backend.
    pub upstream: SocketAddr,
    /// Candidates run on these processors.
    pub cpus: Vec<usize>,
    /// Worker threads.
    pub workers: usize,
    /// Started so that it can reload: with a master process where it needs one.
    pub reloads: bool,
    /// UDP instead of TCP.
    pub datagrams: bool,
}

/// Process groups that must not survive us.
static GROUPS: Mutex<Vec<Pid>> = Mutex::new(Vec::new());

/// Where they have their files.
static DIRECTORIES: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());

/// This directory goes, too, when a signal ends us.
pub fn remove_with_signals(directory: &Path) {
    DIRECTORIES.lock().unwrap_or_else(PoisonError::into_inner).push(directory.to_owned());
}

/// Kills everything that was started, and removes its files; for signals.
pub fn clean_up() -> ! {
    // Kept locked: nothing more is started while the process ends.
    let groups = GROUPS.lock().unwrap_or_else(PoisonError::into_inner);
    for &group in groups.iter() {
        let _ = kill_process_group(group, Signal::KILL);
    }
    for directory in DIRECTORIES.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
        let _ = fs::remove_dir_all(directory);
    }
    std::process::exit(130);
}

/// A candidate that runs. Dropped, it is killed with all its processes.
pub struct Running {
    /// Which one.
    pub kind: Kind,
    /// Where clients connect.
    pub target: SocketAddr,
    setup: Setup,
    child: Option<Child>,
    reloads: u32,
    watchers: Option<Watchers>,
}

impl Running {
    /// Starts it. It may not listen yet.
    pub fn start(kind: Kind, setup: &Setup) -> Result<Running, String> {
        let target = if kind == Kind::Direct { setup.upstream } else { free_address().map_err(|e| e.to_string())? };
        let mut running = Running { kind, target, setup: setup.clone(), child: None, reloads: 0, watchers: None };
        if kind == Kind::Direct {
            return Ok(running);
        }
        let command = running.command().map_err(|error| format!("{}: {error}", setup.directory.display()))?;
        let program = command.get_program().to_owned();
        let mut groups = GROUPS.lock().unwrap_or_else(PoisonError::into_inner);
        let child = spawn(command, &setup.cpus).map_err(|error| format!("{}: {error}", program.display()))?;
        groups.extend(Pid::from_raw(child.id() as i32));
        running.child = Some(child);
        if kind == Kind::Watched {
            running.watchers = Some(Watchers::start(&running.file("sock")));
        }
        Ok(running)
    }

    fn file(&self, extension: &str) -> PathBuf {
        let name = self.kind.name().replace([' ', ','], "");
        self.setup.directory.join(format!("{name}.{extension}"))
    }

    fn command(&self) -> io::Result<Command> {
        let file = self.config_file();
        self.write_config(&file)?;
        let mut command = match self.kind {
            Kind::Direct => unreachable!("nothing to start"),
            Kind::Preface | Kind::PrefaceLog | Kind::Watched | Kind::Headerless => {
                let mut command = Command::new(&self.setup.preface);
                command.arg("run").arg("--config").arg(&file).env("RUNTIME_DIRECTORY", &self.setup.directory);
                command
            }
            Kind::Bare => {
                let mut command = Command::new(std::env::current_exe()?);
                command.args(["bare", &self.target.to_string(), &self.setup.upstream.to_string()]);
                command
            }
            Kind::Haproxy | Kind::HaproxyTuned => {
                let mut command = Command::new(find("haproxy").unwrap_or_else(|| "haproxy".into()));
                command.args(if self.setup.reloads { ["-W", "-db"] } else { ["-q", "-db"] }).arg("-f").arg(&file);
                command
            }
            Kind::Nginx | Kind::NginxTuned => {
                let mut command = Command::new(find("nginx").unwrap_or_else(|| "nginx".into()));
                command.arg("-p").arg(&self.setup.directory).arg("-c").arg(&file);
                command.arg("-e").arg(self.file("error"));
                command
            }
            Kind::Envoy => {
                let mut command = Command::new(&self.setup.envoy);
                command.arg("-c").arg(&file).args(["--concurrency", &self.setup.workers.to_string()]);
                command.args(["--disable-hot-restart", "--log-level", "error"]);
                command
            }
        };
        let log = File::create(self.file("log"))?;
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        Ok(command)
    }

    /// Envoy goes by the name's end.
    fn config_file(&self) -> PathBuf {
        self.file(if self.kind == Kind::Envoy { "yaml" } else { "conf" })
    }

    /// Written aside and moved into place: preface watches its file.
    fn write_config(&self, file: &Path) -> io::Result<()> {
        let aside = file.with_extension("new");
        fs::write(&aside, self.config())?;
        fs::rename(&aside, file)
    }

    fn config(&self) -> String {
        let Setup { upstream, workers, directory, datagrams, .. } = &self.setup;
        let target = self.target;
        // What changes from one reload to the next.
        let connect_s = 5 + self.reloads % 2;
        let directory = directory.display();
        match self.kind {
            Kind::Preface | Kind::PrefaceLog | Kind::Watched | Kind::Headerless => {
                let header = if self.kind == Kind::Headerless { "off" } else { "v2" };
                let protocol = if *datagrams { "udp" } else { "tcp" };
                let log = if self.kind == Kind::PrefaceLog { "all" } else { "off" };
                let socket = self.file("sock");
                format!(
                    "[runtime]\nworkers = {workers}\n[log]\nconnections = \"{log}\"\n[admin]\nbind = \"unix:{}\"\n\
                     [listeners.bench]\nbind = \"{target}\"\nprotocol = \"{protocol}\"\npool = \"bench\"\n\
                     [pools.bench]\nproxy_protocol = \"{header}\"\nconnect_timeout = \"{connect_s}s\"\n\
                     connect_deadline = \"10s\"\nupstreams = [\"{upstream}\"]\n",
                    socket.display()
                )
            }
            Kind::Haproxy | Kind::HaproxyTuned => {
                let tuned = self.kind == Kind::HaproxyTuned;
                // Pipes come out of the descriptor limit: a few hundred are plenty for the connections that move.
                let global = if tuned { "    tune.pipesize 262144\n    maxpipes 256\n" } else { "" };
                let defaults = if tuned { "    option splice-request\n    option splice-response\n" } else { "" };
                format!(
                    "global\n    maxconn 9700\n    nbthread {workers}\n{global}defaults\n    mode tcp\n{defaults}\
                     \x20   timeout connect {connect_s}s\n    timeout client 1h\n    timeout server 1h\n\
                     listen bench\n    bind {target}\n    server backend {upstream} send-proxy-v2\n"
                )
            }
            Kind::Nginx | Kind::NginxTuned => {
                let tuned = self.kind == Kind::NginxTuned;
                let module = Path::new(NGINX_MODULE);
                let load = if module.exists() { format!("load_module {NGINX_MODULE};\n") } else { String::new() };
                let user = if rustix::process::getuid().is_root() { "user root;\n" } else { "" };
                let (listen, header) = match (datagrams, tuned) {
                    (false, _) => ("", "proxy_protocol on; "),
                    (true, false) => (" udp", ""),
                    (true, true) => (" udp rcvbuf=4m sndbuf=4m", ""),
                };
                let (events, server) = if tuned { ("multi_accept on; ", "proxy_buffer_size 64k; ") } else { ("", "") };
                format!(
                    "{load}{user}daemon off;\nworker_processes {workers};\nworker_rlimit_nofile {};\n\
                     pid {directory}/{}.pid;\nevents {{ worker_connections 32768; {events}}}\n\
                     stream {{ server {{ listen {target}{listen}; proxy_pass {upstream}; {header}\
                     proxy_timeout 1h; proxy_connect_timeout {connect_s}s; {server}}} }}\n",
                    preface::net::limits::raise_descriptor_limit(),
                    self.kind.name().replace(' ', "")
                )
            }
            Kind::Envoy => ENVOY
                .replace("{target}", &target.port().to_string())
                .replace("{upstream}", &upstream.port().to_string()),
            Kind::Direct | Kind::Bare => String::new(),
        }
    }

    /// How often those who watch it were answered; `None`: nobody does.
    pub fn watched(&self) -> Option<u64> {
        self.watchers.as_ref().map(Watchers::answers)
    }

    /// Its processes, to be measured.
    pub fn gauge(&self) -> Gauge {
        Gauge { pids: self.group().map(measure::members).unwrap_or_default() }
    }

    fn group(&self) -> Option<Pid> {
        Pid::from_raw(self.child.as_ref()?.id() as i32)
    }

    /// Why it is no longer there, if so.
    pub fn ended(&mut self) -> Option<String> {
        let status = self.child.as_mut()?.try_wait().ok()??;
        let said = [self.file("log"), self.file("error")].map(|file| fs::read_to_string(file).unwrap_or_default());
        let lines = said.iter().flat_map(|text| text.lines().map(str::trim).filter(|line| !line.is_empty()));
        let first: Vec<&str> = lines.take(SAID_LINES_MAX).collect();
        Some(format!("ended with {status}: {}", first.join(" | ")))
    }

    /// Writes a changed configuration and has it put in force.
    pub fn reload(&mut self) -> io::Result<()> {
        self.reloads += 1;
        self.write_config(&self.config_file())?;
        let Some(pid) = self.group() else { return Ok(()) };
        let signal = if matches!(self.kind, Kind::Haproxy | Kind::HaproxyTuned) { Signal::USR2 } else { Signal::HUP };
        Ok(kill_process(pid, signal)?)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let (Some(group), Some(child)) = (self.group(), &mut self.child) {
            let _ = kill_process_group(group, Signal::KILL);
            let _ = child.wait();
            GROUPS.lock().unwrap_or_else(PoisonError::into_inner).retain(|other| *other != group);
            // The workers of a master were not ours to wait for.
            let end = Instant::now() + Duration::from_secs(5);
            while !measure::members(group).is_empty() && Instant::now() < end {
                // SLEEP: only polling can show it, and nothing is being measured.
                std::thread::sleep(Duration::from_millis(2));
            }
        }
    }
}

/// Of what a candidate that ended had said.
const SAID_LINES_MAX: usize = 4;

const NGINX_MODULE: &str = "/usr/lib/nginx/modules/ngx_stream_module.so";

const ENVOY: &str = r#"static_resources:
  listeners:
  - address: { socket_address: { address: 127.0.0.1, port_value: {target} } }
    filter_chains:
    - filters:
      - name: envoy.filters.network.tcp_proxy
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy
          stat_prefix: bench
          cluster: backend
  clusters:
  - name: backend
    type: STATIC
    connect_timeout: 5s
    circuit_breakers: { thresholds: [ { max_connections: 100000, max_pending_requests: 100000 } ] }
    load_assignment:
      cluster_name: backend
      endpoints:
      - lb_endpoints:
        - endpoint: { address: { socket_address: { address: 127.0.0.1, port_value: {upstream} } } }
    transport_socket:
      name: envoy.transport_sockets.upstream_proxy_protocol
      typed_config:
        "@type": type.googleapis.com/envoy.extensions.transport_sockets.proxy_protocol.v3.ProxyProtocolUpstreamTransport
        config: { version: V2 }
        transport_socket:
          name: envoy.transport_sockets.raw_buffer
          typed_config:
            "@type": type.googleapis.com/envoy.extensions.transport_sockets.raw_buffer.v3.RawBuffer
"#;

/// A group of its own, on the candidates' processors: a child is where the thread was that started it.
fn spawn(mut command: Command, cpus: &[usize]) -> io::Result<Child> {
    command.process_group(0);
    std::thread::scope(|scope| {
        let starter = scope.spawn(|| {
            measure::pin(cpus);
            command.spawn()
        });
        starter.join().unwrap_or_else(|_| Err(io::Error::other("the starting thread panicked")))
    })
}

/// Where the distribution has put a program.
pub fn find(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let system = ["/usr/local/sbin", "/usr/sbin", "/usr/bin", "/sbin", "/bin"].map(PathBuf::from);
    std::env::split_paths(&path).chain(system).map(|directory| directory.join(name)).find(|file| file.is_file())
}

/// From below the ports that outgoing connections get.
fn free_address() -> io::Result<SocketAddr> {
    static NEXT: Mutex<u16> = Mutex::new(0);
    const FIRST: u16 = 3000;
    const COUNT: u16 = 7000;
    let mut next = NEXT.lock().unwrap_or_else(PoisonError::into_inner);
    for _ in 0..COUNT {
        *next += 1;
        let number = (std::process::id() % u32::from(COUNT)) as u16;
        let address = SocketAddr::from(([127, 0, 0, 1], FIRST + (number + *next * 3) % COUNT));
        if TcpListener::bind(address).is_ok() && UdpSocket::bind(address).is_ok() {
            return Ok(address);
        }
    }
    Err(io::Error::other("no free port"))
}
