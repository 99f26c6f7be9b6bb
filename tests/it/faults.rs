//! Three faults that an operator meets at night: an upstream that has slowed, one that resets after the header, one that
//! answers 400 to it. Each is named within ten seconds, with what to do; and nobody else is.

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering::SeqCst};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use preface::proxy_protocol::{self, Decoded};
use serde_json::Value;

use crate::reload::list;
use crate::support::browser::{Browser, forward_to};
use crate::support::peers::nginx;
use crate::support::{Balancer, DEADLINE, Process, client, eventually, http, preface};

/// Between two connections of one client.
const PACE: Duration = Duration::from_millis(20);
/// What the issue says.
const NAMED_WITHIN: Duration = Duration::from_secs(10);

const OK: &[u8] = b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nConnection: close\r\n\r\nok\n";

/// How a server behaves.
#[derive(Clone, Copy)]
#[repr(u8)]
enum Manner {
    /// Answers at once to who comes with a header.
    Well,
    /// The same 100 ms later.
    Slow,
    /// Resets who comes with a header, and answers who comes without.
    Resets,
}

/// An HTTP server that may be told to misbehave.
struct Server {
    address: SocketAddr,
    manner: Arc<AtomicU8>,
}

impl Server {
    fn start(manner: Manner) -> Server {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a free port");
        let address = listener.local_addr().expect("it is bound");
        let manner = Arc::new(AtomicU8::new(manner as u8));
        let told = Arc::clone(&manner);
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let manner = told.load(SeqCst);
                // What a client does wrong is its own affair.
                std::thread::spawn(move || drop(answer(stream, manner)));
            }
        });
        Server { address, manner }
    }

    fn turn(&self, manner: Manner) {
        self.manner.store(manner as u8, SeqCst);
    }
}

fn answer(mut stream: TcpStream, manner: u8) -> io::Result<()> {
    stream.set_read_timeout(Some(DEADLINE))?;
    let (mut bytes, mut part) = (Vec::new(), [0; 4096]);
    let header = loop {
        let count = stream.read(&mut part)?;
        bytes.extend_from_slice(&part[..count]);
        let header = match proxy_protocol::decode(&bytes) {
            Ok(Decoded::Complete { len, .. }) => Some(len),
            Ok(Decoded::Incomplete { .. }) if count > 0 => continue,
            _ => None,
        };
        if count == 0 || bytes[header.unwrap_or_default()..].ends_with(b"\r\n\r\n") {
            break header;
        }
    };
    let resets = manner == Manner::Resets as u8;
    match header {
        Some(_) if resets => socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO)),
        None if !resets => Ok(()),
        _ => {
            if manner == Manner::Slow as u8 {
                // SLEEP: this is the fault.
                std::thread::sleep(Duration::from_millis(100));
            }
            stream.write_all(OK)
        }
    }
}

/// Clients of a listener, one connection after the other, until dropped.
struct Clients {
    stop: Option<mpsc::Sender<()>>,
    threads: Vec<JoinHandle<()>>,
}

impl Clients {
    fn start(address: SocketAddr, count: usize) -> Clients {
        let mut threads = Vec::new();
        let (stop, stopped) = mpsc::channel::<()>();
        let stopped = Arc::new(std::sync::Mutex::new(stopped));
        for _ in 0..count {
            let stopped = Arc::clone(&stopped);
            threads.push(std::thread::spawn(move || {
                let is_over = || stopped.lock().map(|stopped| stopped.recv_timeout(PACE));
                while let Ok(Err(RecvTimeoutError::Timeout)) = is_over() {
                    // A fault may reset it, or answer 400.
                    let _ = client::connect(address).and_then(|mut stream| {
                        stream.set_read_timeout(Some(DEADLINE))?;
                        http::get(&mut stream, "/")
                    });
                }
            }));
        }
        Clients { stop: Some(stop), threads }
    }
}

impl Drop for Clients {
    fn drop(&mut self) {
        self.stop.take();
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

fn pool(name: &str, upstreams: &[SocketAddr]) -> String {
    format!(
        "[listeners.{name}]\nbind = \"127.0.0.1:0\"\npool = \"{name}\"\n\
         [pools.{name}]\nproxy_protocol = \"v2\"\nupstreams = {}\n",
        list(upstreams.iter().copied())
    )
}

/// Waits until each upstream has answered this often, and for two points of the history: something to compare with.
fn wait_for_a_past(balancer: &Balancer, answers: u64) {
    eventually("each upstream has answered often enough", || {
        let status = balancer.status();
        let count = |upstream: &Value| upstream["latency"]["first_byte_ms"]["since_start"]["count"].as_u64();
        let pools = status["pools"].as_object().expect("pools");
        let mut all = pools.values().flat_map(|pool| pool["upstreams"].as_array().expect("upstreams"));
        let history: Value = balancer.ask("GET", "/history").json();
        let points = history["times"].as_array().map_or(0, Vec::len);
        (points >= 2 && all.all(|upstream| count(upstream) >= Some(answers))).then_some(())
    });
}

fn top(balancer: &Balancer) -> String {
    let mut command = Command::new(env!("CARGO_BIN_EXE_preface"));
    let socket = format!("unix:{}", balancer.admin_socket().display());
    let (status, text) = Process::run(command.args(["top", "--once", "--admin", &socket]));
    assert!(status.success(), "{text}");
    text
}

/// `doctor --config` names each and exits with 1; `doctor ADDR` of the slow one says which part of it is slow.
#[track_caller]
fn doctor_names(balancer: &Balancer, [slow, resets, takes_none]: [SocketAddr; 3]) {
    let file = balancer.config_file().display().to_string();
    let doctor = |arguments: &[&str]| {
        let (status, output) = Process::run(Command::new(env!("CARGO_BIN_EXE_preface")).arg("doctor").args(arguments));
        (status.code(), output)
    };
    let (code, text) = doctor(&["--config", &file]);
    assert_eq!(code, Some(1), "{text}");
    for (address, what) in [
        (slow, "slow to answer: "),
        (resets, "it expects no header and gets v2: every connection fails (reset without a byte)"),
        (takes_none, "it expects no header and gets v2: every connection fails (refused: HTTP 400)"),
    ] {
        assert!(text.contains(&format!("pool web, {address}: {what}")), "no {address}: {what} in {text}");
    }
    assert!(text.contains(&format!("{{ address = \"{takes_none}\", proxy_protocol = \"off\" }}")), "{text}");
    assert!(
        text.ends_with(
            "of 7 upstreams and checks: 2 do not match {file}, 1 slower than the siblings"
                .replace("{file}", &file)
                .as_str()
        ),
        "{text}"
    );
    let (code, text) = doctor(&[&slow.to_string()]);
    assert!(code == Some(0) && text.contains("so it is the application there that takes long"), "{text}");
}

#[track_caller]
fn accuses_only(status: &Value, upstreams: [SocketAddr; 3]) {
    let problems = status["problems"].as_array().expect("problems").iter();
    let mut accused: Vec<&str> = problems.map(|problem| problem["upstream"].as_str().unwrap_or("-")).collect();
    let mut expected = upstreams.map(|address| address.to_string());
    accused.sort_unstable();
    expected.sort_unstable();
    assert_eq!(accused, expected, "{:#}", status["problems"]);
}

#[test]
fn three_faults_are_named_within_ten_seconds_and_nobody_else_is() {
    let nginx = nginx();
    let takes_none = SocketAddr::from((Ipv4Addr::LOCALHOST, nginx.headers));
    let servers: Vec<Server> = (0..6).map(|_| Server::start(Manner::Well)).collect();
    let [slow, resets, well, uniform_one, uniform_two, alone] = servers.as_slice() else { unreachable!("six") };
    let config = [
        pool("web", &[slow.address, resets.address, takes_none, well.address]),
        pool("uniform", &[uniform_one.address, uniform_two.address]),
        pool("alone", &[alone.address]),
    ];
    let balancer = preface(&config.concat());
    let browser = Browser::start();
    browser.open(&format!("http://localhost:{}/", forward_to(balancer.admin_socket())));
    browser.wait_for("#live", "live", |text| text.starts_with("live "));
    let clients = [("web", 4), ("uniform", 2), ("alone", 1)];
    let clients = clients.map(|(listener, count)| Clients::start(balancer.ipv4(listener), count));
    wait_for_a_past(&balancer, 60);
    assert_eq!(balancer.status()["problems"], serde_json::json!([]));

    let begun = Instant::now();
    slow.turn(Manner::Slow);
    resets.turn(Manner::Resets);
    nginx.take_no_header();
    for server in [uniform_one, uniform_two, alone] {
        server.turn(Manner::Slow);
    }
    let named = |text: &str| {
        let parts = [
            (slow.address, "slow to first byte: "),
            (resets.address, "connections were reset without an answer, right after the v2 header that it took before"),
            (takes_none, "connections were answered HTTP 400, right after the v2 header that it took before"),
        ];
        let words = text.split_whitespace().collect::<Vec<_>>().join(" ");
        parts.iter().all(|(address, what)| {
            let of_it = words.split("web ").find(|part| part.starts_with(&address.to_string()));
            of_it.is_some_and(|part| part.contains(what))
        })
    };
    let problems = browser.wait_for("#problems", "the three faults", named);
    let took = begun.elapsed();
    assert!(took < NAMED_WITHIN, "named after {took:?}: {problems}");
    eprintln!("named after {took:?}:\n{problems}");
    for part in [
        "so it is the application there",
        &format!("preface drain web {}", slow.address),
        &format!("in the [[pools.web.upstreams]] of {takes_none}: proxy_protocol = \"off\""),
        &format!("preface doctor {}", resets.address),
        "since ",
    ] {
        assert!(problems.contains(part), "no {part:?} in {problems}");
    }
    let text = top(&balancer);
    assert!(named(&text), "{text}");
    assert_eq!(balancer.metric("preface_upstream_slow", &[("pool", "web"), ("phase", "first_byte")]), 1.0);

    // Those that are all as slow, and the one that nobody stands beside, are no fault of an upstream.
    let status = balancer.status();
    accuses_only(&status, [slow.address, resets.address, takes_none]);
    for pool in ["uniform", "alone"] {
        let upstreams = status["pools"][pool]["upstreams"].as_array().expect("upstreams");
        let max = |upstream: &Value| upstream["latency"]["first_byte_ms"]["last_minute"]["max"].as_f64();
        assert!(upstreams.iter().all(|upstream| max(upstream) > Some(100.0)), "{pool}: nothing to be wrong about");
    }

    doctor_names(&balancer, [slow.address, resets.address, takes_none]);

    slow.turn(Manner::Well);
    browser.wait_for("#problems", "that the slow one is as fast as ever", |text| !text.contains("slow to"));
    drop(clients);
}
