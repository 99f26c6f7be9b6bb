//! `preface demo`: two receivers, a balancer in front of them, and two first connections, without a file or any rights.

use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, anyhow, bail};

use super::explain::{explain, summary};
use super::whoami::{self, First, Seen};

/// The balancer serves within this long, or something is wrong.
const START_TIMEOUT: Duration = Duration::from_secs(10);

/// Between two looks whether it serves.
const LOOK_EVERY: Duration = Duration::from_millis(5);

/// A first connection takes milliseconds.
const CONNECTION_TIMEOUT: Duration = Duration::from_secs(5);

/// Show headers from real connections through a balancer; needs no file and no rights
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Starts two receivers and a balancer in front of them on 127.0.0.1, makes a connection with a v1 and
one with a v2 header, shows what the receivers read, and serves until Ctrl-C.")]
pub struct Args {}

/// Everything that was started.
struct Demo {
    /// Holds the configuration file; removed in the end.
    directory: PathBuf,
    v1: SocketAddr,
    v2: SocketAddr,
    admin: SocketAddr,
    receivers: [SocketAddr; 2],
}

/// Shows, then serves.
pub fn run(_: Args) -> anyhow::Result<()> {
    let (seen, sightings) = mpsc::channel();
    let receivers = [start_receiver(seen.clone())?, start_receiver(seen)?];
    let [v1, v2, admin] = free_addresses([8081, 8082, 9900])?;
    let directory = std::env::temp_dir().join(format!("preface-demo-{}", std::process::id()));
    let demo = Demo { directory, v1, v2, admin, receivers };
    fs::create_dir(&demo.directory).with_context(|| format!("cannot make {}", demo.directory.display()))?;
    let outcome = show_and_serve(&demo, sightings);
    let _ = fs::remove_dir_all(&demo.directory);
    outcome
}

fn show_and_serve(demo: &Demo, sightings: mpsc::Receiver<Seen>) -> anyhow::Result<()> {
    let file = demo.directory.join("preface.toml");
    fs::write(&file, demo.configuration()).with_context(|| format!("cannot write {}", file.display()))?;
    let server = {
        let file = file.clone();
        thread::Builder::new().name("control".into()).spawn(move || crate::server::run(file))?
    };
    let start = Instant::now();
    while TcpStream::connect(demo.admin).is_err() {
        if server.is_finished() {
            let outcome = server.join().map_err(|_| anyhow!("the balancer panicked"))?;
            return outcome.context("the balancer did not start");
        }
        if start.elapsed() > START_TIMEOUT {
            bail!("the balancer has not started within {} s", START_TIMEOUT.as_secs());
        }
        thread::sleep(LOOK_EVERY);
    }
    super::print(&demo.introduction())?;
    for (version, address) in [("v1", demo.v1), ("v2", demo.v2)] {
        super::print(&first_connection(version, address, &sightings)?)?;
    }
    super::print(&demo.what_to_try(&file))?;
    thread::spawn(move || {
        for seen in sightings {
            if super::print(&one_line(&seen)).is_err() {
                break;
            }
        }
    });
    server.join().map_err(|_| anyhow!("the balancer panicked"))?
}

/// A receiver on a port of its own, with a thread of its own.
fn start_receiver(seen: mpsc::Sender<Seen>) -> anyhow::Result<SocketAddr> {
    let listener = TcpListener::bind("127.0.0.1:0").context("cannot bind a receiver on 127.0.0.1")?;
    listener.set_nonblocking(true)?;
    let address = listener.local_addr()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    // The channel's sender is not Sync; the receiver's callback has to be.
    let seen = std::sync::Mutex::new(seen);
    thread::Builder::new().name("receiver".into()).spawn(move || {
        runtime.block_on(async {
            let Ok(listener) = tokio::net::TcpListener::from_std(listener) else { return };
            let on_header = move |sight| {
                if let Ok(seen) = seen.lock() {
                    let _ = seen.send(sight);
                }
            };
            match whoami::serve(listener, on_header).await {}
        });
    })?;
    Ok(address)
}

/// Loopback addresses that nobody listens on, with these ports where they are free.
fn free_addresses<const N: usize>(ports: [u16; N]) -> anyhow::Result<[SocketAddr; N]> {
    let bind = |port: u16| TcpListener::bind(("127.0.0.1", port)).or_else(|_| TcpListener::bind("127.0.0.1:0"));
    // All are held until each has its own.
    let held = ports.map(bind);
    let mut addresses = [SocketAddr::from(([127, 0, 0, 1], 0)); N];
    for (address, held) in addresses.iter_mut().zip(held) {
        *address = held.and_then(|held| held.local_addr()).context("no free port on 127.0.0.1")?;
    }
    Ok(addresses)
}

impl Demo {
    fn configuration(&self) -> String {
        let Demo { v1, v2, admin, receivers: [first, second], .. } = self;
        format!(
            r#"# The demo's configuration. Change it and save: preface applies it at once.

[runtime]
workers = 1
stop_timeout = "1s"

[log]
level = "warn"
connections = "off"             # "all": a line for each connection

[admin]
bind = "{admin}"

[listeners.version1]
bind = "{v1}"
pool = "version1"

[listeners.version2]
bind = "{v2}"
pool = "version2"

[pools.version1]
proxy_protocol = "v1"
upstreams = ["{first}", "{second}"]

[pools.version2]
proxy_protocol = "v2"
upstreams = ["{first}", "{second}"]

[pools.version2.tlvs]
vpce_id = "vpce-08d2bf15fac5001c9"
unique_id = true
crc32c = true
"#
        )
    }

    fn introduction(&self) -> String {
        let Demo { v1, v2, receivers: [first, second], .. } = self;
        format!(
            "  client --> preface {v1} --- v1 header --.\n  {:46}+--> receivers {first}, {second}\n  \
             client --> preface {v2} --- v2 header --'\n",
            ""
        )
    }

    fn what_to_try(&self, file: &Path) -> String {
        let Demo { v1, v2, admin, receivers: [first, _], .. } = self;
        let file = file.display();
        format!(
            "
Now you; every connection is shown here. Ctrl-C ends the demo.

  # what the receiver read, as it decodes it; and past the balancer: no header
  curl http://{v1}/
  curl http://{v2}/
  curl http://{first}/

  # another VPC endpoint, in force with the next connection
  sed -i 's/vpce-[0-9a-f]*/vpce-0123456789abcdef0/' {file}
  curl http://{v2}/

  # one receiver takes no new connections, until: preface enable ...
  preface drain version2 {first} --admin {admin}

  # what an operator sees
  curl http://{admin}/status
  curl http://{admin}/metrics

"
        )
    }
}

/// Connect as a client, and show what the receiver read before the client's first byte.
fn first_connection(version: &str, address: SocketAddr, sightings: &mpsc::Receiver<Seen>) -> anyhow::Result<String> {
    let failed = || format!("the first connection to {address} failed");
    let mut stream = TcpStream::connect_timeout(&address, CONNECTION_TIMEOUT).with_context(failed)?;
    stream.set_read_timeout(Some(CONNECTION_TIMEOUT))?;
    let client = stream.local_addr()?;
    stream.write_all(b"GET / HTTP/1.0\r\n\r\n").with_context(failed)?;
    stream.read_to_end(&mut Vec::new()).with_context(failed)?;
    let seen = sightings.recv_timeout(CONNECTION_TIMEOUT).with_context(failed)?;
    let First::Header { header, raw } = &seen.first else {
        bail!("the receiver read no header:\n{}", seen.text());
    };
    let text: String = explain(header, raw).trim_end().lines().map(|line| format!("  {line}\n")).collect();
    Ok(format!(
        "\n{version}: {client} connected to {address}. Before its first byte the receiver {} read:\n\n{text}",
        seen.local
    ))
}

fn one_line(seen: &Seen) -> String {
    match &seen.first {
        First::Header { header, .. } => {
            let facts: Vec<String> = summary(header).lines().map(squeezed).collect();
            format!("{} read {}\n", seen.local, facts.join(", "))
        }
        _ => format!("{} read no header: {} connected past the balancer\n", seen.local, seen.peer),
    }
}

fn squeezed(line: &str) -> String {
    line.split_whitespace().collect::<Vec<_>>().join(" ")
}
