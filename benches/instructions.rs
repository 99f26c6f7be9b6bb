//! Instructions that the program itself executes for a unit of traffic, the kernel's left out:
//! `cargo bench --bench instructions`. Needs valgrind.
//!
//! Times vary with the machine and its load, these hardly: compare two versions by them. The program runs under
//! callgrind with one worker, once with few units and once with many; the difference of the two counts, by thread,
//! is divided by the difference of the units. What starting and stopping cost is thus not in it. A round trip repeats to
//! 0.1 %, a short connection to 4 %. Bulk is not here: how much each read finds is the moment's. The bare relay is the
//! same loop without features: what preface needs beyond it is what they cost.

#[path = "compare/bare.rs"]
mod bare;

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

/// What is measured, and how often: in the first run, in the second.
const WORK: [(&str, Unit, usize, usize); 2] =
    [("round trip of 64 bytes", round_trips, 200, 2200), ("short connection", short_connections, 50, 550)];

/// Does so many units against this address.
type Unit = fn(SocketAddr, usize) -> io::Result<()>;

const MESSAGE_BYTES: usize = 64;

/// Who carries the traffic.
#[derive(Clone, Copy, PartialEq)]
enum Candidate {
    /// This program itself, as a relay without features.
    Bare,
    /// With what `[log]` says of connections.
    Preface(&'static str),
}

const CANDIDATES: [(&str, Candidate); 3] = [
    ("bare relay", Candidate::Bare),
    ("preface, log off", Candidate::Preface("off")),
    ("preface", Candidate::Preface("all")),
];

#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    if let [_, word, address, upstream] = &arguments[..]
        && word == "bare"
    {
        let parsed = |text: &str| text.parse().expect("an address");
        return bare::run(parsed(address), parsed(upstream)).expect("the bare relay serves");
    }
    // Under `cargo test --benches` nothing is measured.
    if std::env::args().any(|argument| argument == "--test") {
        return;
    }
    println!("{:<24} {:<18} {:>14} {:>14}", "instructions per", "by", "worker thread", "all threads");
    let work = WORK.iter().flat_map(|work| CANDIDATES.iter().map(move |candidate| (work, candidate)));
    for (&(name, unit, few, many), &(who, candidate)) in work {
        let (less, more) = (measure(candidate, unit, few), measure(candidate, unit, many));
        let each = |thread: &u32, count: &u64| {
            count.saturating_sub(less.get(thread).copied().unwrap_or(0)) / (many - few) as u64
        };
        let by_thread: Vec<u64> = more.iter().map(|(thread, count)| each(thread, count)).collect();
        // The one that carries traffic does most.
        let worker = by_thread.iter().max().copied().unwrap_or(0);
        println!("{name:<24} {who:<18} {worker:>14} {:>14}", by_thread.iter().sum::<u64>());
    }
}

/// One run; instructions by the number of the thread.
fn measure(candidate: Candidate, unit: Unit, count: usize) -> BTreeMap<u32, u64> {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let upstream = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port");
    let upstream_address = upstream.local_addr().expect("a listener has an address");
    std::thread::spawn(move || {
        while let Ok((stream, _)) = upstream.accept() {
            std::thread::spawn(move || echo(stream));
        }
    });
    let address = free_address();
    let mut program = start(candidate, directory.path(), address, upstream_address);
    unit(address, count).expect("traffic passes");
    let id = rustix::process::Pid::from_child(&program);
    rustix::process::kill_process(id, rustix::process::Signal::TERM).expect("it runs");
    let status = program.wait().expect("a child can be waited for");
    // The bare relay knows no other end than the signal.
    let ended = status.success() || candidate == Candidate::Bare && status.signal().is_some();
    assert!(ended, "valgrind or the program failed: {status}");
    counts(directory.path())
}

/// A port that was free a moment ago.
fn free_address() -> SocketAddr {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port");
    listener.local_addr().expect("a listener has an address")
}

/// A candidate under callgrind, accepting.
fn start(candidate: Candidate, directory: &Path, address: SocketAddr, upstream: SocketAddr) -> Child {
    let log = if let Candidate::Preface(log) = candidate { log } else { "off" };
    let config = format!(
        "[runtime]\nworkers = 1\n[log]\nconnections = \"{log}\"\n[listeners.test]\nbind = \"{address}\"\npool = \"test\"\n\
         [pools.test]\nproxy_protocol = \"v2\"\nupstreams = [\"{upstream}\"]\n\
         [admin]\nbind = \"unix:{}\"\n",
        directory.join("admin.sock").display()
    );
    let file = directory.join("preface.toml");
    std::fs::write(&file, config).expect("the configuration is written");
    let mut command = Command::new("valgrind");
    command.args(["--tool=callgrind", "--separate-threads=yes", "--quiet"]);
    command.arg(format!("--callgrind-out-file={}", directory.join("counts").display()));
    match candidate {
        Candidate::Bare => {
            let own = std::env::current_exe().expect("this program has a path");
            command.arg(own).args(["bare", &address.to_string(), &upstream.to_string()]);
        }
        Candidate::Preface(_) => {
            command.arg(env!("CARGO_BIN_EXE_preface")).args(["run", "--config"]).arg(&file);
        }
    }
    command.env("RUNTIME_DIRECTORY", directory).stdin(Stdio::null()).stdout(Stdio::null());
    let mut child = command.spawn().unwrap_or_else(|error| panic!("valgrind: {error}; is it installed?"));
    while TcpStream::connect(address).is_err() {
        let exit = child.try_wait().expect("a child can be waited for");
        assert!(exit.is_none(), "it ended at its start");
        // SLEEP: only trying shows when a program has come so far.
        std::thread::sleep(Duration::from_millis(20));
    }
    child
}

/// Reads callgrind's files, one a thread: `counts-03` ends in `totals: 123456`.
fn counts(directory: &Path) -> BTreeMap<u32, u64> {
    let mut counts = BTreeMap::new();
    for entry in std::fs::read_dir(directory).expect("the directory is there") {
        let entry = entry.expect("the directory can be read");
        let name = entry.file_name().to_string_lossy().into_owned();
        let Some(thread) = name.strip_prefix("counts-").and_then(|thread| thread.parse().ok()) else { continue };
        let text = std::fs::read_to_string(entry.path()).expect("callgrind wrote text");
        let total = text.lines().rev().find_map(|line| line.strip_prefix("totals: "));
        counts.insert(thread, total.and_then(|total| total.trim().parse().ok()).expect("a total"));
    }
    assert!(!counts.is_empty(), "callgrind wrote no counts by thread into {}", directory.display());
    counts
}

fn echo(mut stream: TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut header = [0; 28];
    stream.read_exact(&mut header)?;
    let mut buffer = [0; MESSAGE_BYTES];
    loop {
        match stream.read(&mut buffer)? {
            // What a short connection says asks for an answer and the end.
            count if buffer[..count].ends_with(b"end") => {
                stream.write_all(b"end")?;
                return stream.shutdown(Shutdown::Both);
            }
            0 => return Ok(()),
            count => stream.write_all(&buffer[..count])?,
        }
    }
}

fn connect(address: SocketAddr) -> io::Result<TcpStream> {
    let stream = TcpStream::connect(address)?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

fn round_trips(address: SocketAddr, count: usize) -> io::Result<()> {
    let mut stream = connect(address)?;
    let mut message = [b'm'; MESSAGE_BYTES];
    for _ in 0..count {
        stream.write_all(&message)?;
        stream.read_exact(&mut message)?;
    }
    Ok(())
}

fn short_connections(address: SocketAddr, count: usize) -> io::Result<()> {
    for _ in 0..count {
        let mut stream = connect(address)?;
        stream.write_all(b"end")?;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer)?;
        assert_eq!(answer, b"end");
    }
    Ok(())
}
