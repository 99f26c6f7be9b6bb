//! Clients and upstreams that behave badly, limits, and what the machine runs out of: others are served, and every end
//! has its cause counted.

use std::collections::BTreeMap;
use std::io::{self, ErrorKind, PipeReader, Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Resource, Rlimit, getrlimit, prlimit, setrlimit};

use crate::support::client::{self, connect_from, loopback};
use crate::support::netns::Namespace;
use crate::support::ports::free_port;
use crate::support::{Arrival, Balancer, DEADLINE, Process, Receiver, eventually, http, preface, preface_in, skip};
use crate::traffic::{Lane, accept, flood, listen, reset, take_header, while_stopped};

const MIB: usize = 1024 * 1024;

/// As many descriptors as this process may have.
pub fn raise_descriptor_limit() {
    let maximum = getrlimit(Resource::Nofile).maximum;
    setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }).expect("the soft limit rises to the hard one");
}

/// Resident memory of a process.
pub fn resident_bytes(id: u32) -> usize {
    let status = std::fs::read_to_string(format!("/proc/{id}/status")).expect("the process is there");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("Linux says VmRSS");
    line.trim().trim_end_matches(" kB").parse::<usize>().expect("a number") * 1024
}

/// An upstream for crowds: its accept queue is as long as the kernel allows. The usual 128 overflow in a burst, and then
/// the kernel drops handshakes, or resets connections that came by SYN cookies.
pub struct Crowded {
    pub address: SocketAddr,
    listener: Arc<TcpListener>,
    thread: Option<JoinHandle<()>>,
}

impl Crowded {
    /// Keeps connections open and says nothing.
    pub fn silent() -> Crowded {
        let mut kept = Vec::new();
        Crowded::start(move |stream| kept.push(stream))
    }

    /// Takes the header off and sends back what follows it.
    pub fn echoing() -> Crowded {
        Crowded::start(|mut stream| {
            // A client that went away in between is its own affair.
            std::thread::spawn(move || {
                take_header(&mut stream)?;
                io::copy(&mut stream.try_clone()?, &mut stream)?;
                stream.shutdown(Shutdown::Write)
            });
        })
    }

    fn start(mut serve: impl FnMut(TcpStream) + Send + 'static) -> Crowded {
        raise_descriptor_limit();
        let listener = Arc::new(TcpListener::bind("127.0.0.1:0").unwrap());
        rustix::net::listen(&listener, 4096).unwrap();
        let accepting = listener.clone();
        let thread = std::thread::spawn(move || {
            while let Ok((stream, _)) = accepting.accept() {
                serve(stream);
            }
        });
        Crowded { address: listener.local_addr().unwrap(), listener, thread: Some(thread) }
    }
}

impl Drop for Crowded {
    fn drop(&mut self) {
        // Wakes the thread, which closes all that it kept.
        let _ = rustix::net::shutdown(&self.listener, rustix::net::Shutdown::Both);
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

/// An upstream's work: sends back what comes, to the end.
pub fn echo(mut stream: TcpStream, arrival: &Arrival) -> io::Result<()> {
    stream.write_all(&arrival.behind)?;
    io::copy(&mut stream.try_clone()?, &mut stream)?;
    stream.shutdown(Shutdown::Write)
}

/// Ends by their cause, as `/metrics` counts them.
pub fn ends(balancer: &Balancer) -> BTreeMap<String, u64> {
    ends_of(&balancer.metrics())
}

fn ends_of(metrics: &str) -> BTreeMap<String, u64> {
    let mut ends = BTreeMap::new();
    for line in metrics.lines().filter(|line| line.starts_with("preface_connections_ended_total{")) {
        let label = |name: &str| {
            let rest = line.split_once(&format!(" {name}=")).or_else(|| line.split_once(&format!(",{name}=")));
            rest.and_then(|(_, rest)| rest.split('"').nth(1)).expect("the label").to_owned()
        };
        let count: u64 = line.rsplit_once(' ').expect("a value").1.parse().expect("a number");
        *ends.entry([label("who"), label("phase"), label("why")].join(".")).or_insert(0) += count;
    }
    ends
}

fn value_of(metrics: &str, name: &str) -> u64 {
    let samples = metrics.lines().filter(|line| !line.starts_with('#')).filter_map(|line| line.rsplit_once(' '));
    let samples = samples.filter(|(sample, _)| sample.split('{').next() == Some(name));
    samples.map(|(_, value)| value.parse::<f64>().expect("a number") as u64).sum()
}

/// Waits until nothing is open, and returns the ends: as many as connections were accepted.
#[track_caller]
pub fn all_accounted(metrics: impl Fn() -> String) -> BTreeMap<String, u64> {
    let metrics = eventually("no connection is open", || {
        let metrics = metrics();
        (value_of(&metrics, "preface_connections_open") == 0).then_some(metrics)
    });
    let ends = ends_of(&metrics);
    assert_eq!(ends.values().sum::<u64>(), value_of(&metrics, "preface_connections_accepted_total"), "{ends:?}");
    assert_eq!(value_of(&metrics, "preface_listener_connections_open"), 0);
    assert_eq!(value_of(&metrics, "preface_upstream_connections_open"), 0);
    assert_eq!(ends.get("preface.relay.panic"), None);
    ends
}

/// Was this client reset before it got a byte? That may be so early that its `connect` already says it.
pub fn is_refused(client: io::Result<TcpStream>) -> bool {
    let outcome = client.and_then(|mut client| client.read(&mut [0]));
    outcome.is_err_and(|error| error.kind() == ErrorKind::ConnectionReset)
}

/// Is this client served?
pub fn is_answered(client: &io::Result<TcpStream>) -> bool {
    let Ok(mut client) = client.as_ref() else { return false };
    let mut answer = [0; 4];
    client.write_all(b"ping").is_ok() && client.read_exact(&mut answer).is_ok() && &answer == b"ping"
}

fn config_with(listener: &str, pool: &str, upstreams: &[SocketAddr]) -> String {
    let upstreams: Vec<String> = upstreams.iter().map(|address| format!("\"{address}\"")).collect();
    let upstreams = upstreams.join(", ");
    format!(
        "[listeners.web]\nbind = \"127.0.0.1:0\"\npool = \"test\"\n{listener}\n\
         [pools.test]\nproxy_protocol = \"v2\"\nupstreams = [{upstreams}]\n{pool}\n"
    )
}

#[test]
fn rude_clients_cost_the_others_nothing() {
    const RUDE: usize = 250;
    const POLITE: usize = 100;
    let receiver = Crowded::echoing();
    let balancer = preface(&config_with("", "", &[receiver.address]));
    let address = balancer.ipv4("web");
    std::thread::scope(|scope| {
        let rude: [fn(TcpStream); 6] = [
            drop,
            reset,
            |client| client.shutdown(Shutdown::Write).unwrap(),
            |mut client| drop(client.write_all(b"GET / HT")),
            |mut client| {
                client.write_all(&[0; 1000]).unwrap();
                reset(client);
            },
            |client| {
                client.shutdown(Shutdown::Write).unwrap();
                reset(client);
            },
        ];
        for behave in rude {
            scope.spawn(move || (0..RUDE).for_each(|_| behave(client::connect(address).unwrap())));
        }
        scope.spawn(move || {
            // One byte a second, each of many clients.
            let mut slow: Vec<_> = (0..20).map(|_| client::connect(address).unwrap()).collect();
            for _ in 0..2 {
                slow.iter_mut().for_each(|client| client.write_all(b"x").unwrap());
                // SLEEP: a client this slow is what is tested.
                std::thread::sleep(Duration::from_secs(1));
            }
        });
        for count in 0..POLITE {
            assert!(is_answered(&client::connect(address)), "client {count}");
        }
    });
    let ends = all_accounted(|| balancer.metrics());
    let (closed, reset) = (ends["client.relay.closed"], ends["client.relay.reset"]);
    assert_eq!(closed + reset, (6 * RUDE + 20 + POLITE) as u64, "{ends:?}");
    // Whether a client that closes with unread bytes, or resets behind its FIN, is seen as reset depends on the moment.
    assert!(closed >= (2 * RUDE + POLITE) as u64, "{ends:?}");
    assert!(reset >= (2 * RUDE) as u64, "{ends:?}");
}

#[test]
fn a_burst_is_served_to_the_last_connection() {
    let receiver = Crowded::echoing();
    let balancer = preface(&config_with("", "", &[receiver.address]));
    let connect = || client::connect(balancer.ipv4("web"));
    // All of them are in the accept queues before the first one is accepted.
    let clients: Vec<_> = while_stopped(&balancer, || (0..500).map(|_| connect()).collect());
    for (index, client) in clients.iter().enumerate() {
        assert!(is_answered(client), "client {index}");
    }
    drop(clients);
    assert_eq!(all_accounted(|| balancer.metrics())["client.relay.closed"], 500);
}

#[test]
fn five_thousand_idle_connections_leave_room_for_others() {
    const IDLE: usize = 5000;
    raise_descriptor_limit();
    let (silent, receiver) = (Crowded::silent(), Receiver::with_header(echo));
    let balancer = preface(&format!(
        "{}[listeners.busy]\nbind = \"127.0.0.1:0\"\npool = \"busy\"\n[pools.busy]\nproxy_protocol = \"v1\"\nupstreams = [\"{}\"]\n",
        config_with("", "", &[silent.address]),
        receiver.address
    ));
    let clients: Vec<_> = (0..IDLE).map(|_| balancer.connect("web")).collect();
    eventually("all of them are connected through", || {
        (balancer.metric("preface_headers_sent_total", &[("listener", "web")]) == IDLE as f64).then_some(())
    });
    for _ in 0..20 {
        assert!(is_answered(&client::connect(balancer.ipv4("busy"))));
    }
    drop(silent);
    drop(clients);
    let ends = all_accounted(|| balancer.metrics());
    assert_eq!(ends.values().sum::<u64>(), IDLE as u64 + 20);
}

/// The most that one socket's buffer may grow to.
fn buffer_bytes_max(file: &str) -> usize {
    let sizes = std::fs::read_to_string(format!("/proc/sys/net/ipv4/{file}")).expect("the kernel says its limits");
    sizes.split_whitespace().last().expect("three sizes").parse().expect("a number")
}

/// What all TCP sockets of this machine hold.
fn tcp_memory_bytes() -> usize {
    let sockets = std::fs::read_to_string("/proc/net/sockstat").expect("the kernel says what sockets hold");
    let line = sockets.lines().find(|line| line.starts_with("TCP:")).expect("a line for TCP");
    let pages = line.split_once(" mem ").expect("its memory").1.trim();
    // Some machines have larger pages; then this is less than there is, and the test sees less.
    pages.parse::<usize>().expect("a number of pages") * 4096
}

/// Floods all at once, until nothing is taken any more; how much each took.
fn flood_all(speakers: &[&TcpStream]) -> Vec<usize> {
    std::thread::scope(|scope| {
        let floods: Vec<_> = speakers.iter().map(|speaker| scope.spawn(|| flood(speaker))).collect();
        floods.into_iter().map(|flood| flood.join().unwrap()).collect()
    })
}

#[test]
fn a_flood_towards_a_side_that_never_reads_costs_bounded_memory() {
    const CLIENTS: usize = 16;
    // Ours: one scratch buffer's worth, or a pipe. The kernel's: two buffers on each of two ways.
    let held_max = 256 * 1024 + 2 * (buffer_bytes_max("tcp_rmem") + buffer_bytes_max("tcp_wmem"));
    let lane = Lane::new();
    // The first connection warms everything up.
    let warm = lane.open();
    for by_clients in [true, false] {
        let (before, before_tcp) = (resident_bytes(lane.balancer.id()), tcp_memory_bytes());
        let connections: Vec<_> = (0..CLIENTS).map(|_| lane.open()).collect();
        let (speakers, silent): (Vec<_>, Vec<_>) = connections
            .iter()
            .map(|(client, server)| if by_clients { (client, server) } else { (server, client) })
            .unzip();
        let taken = flood_all(&speakers);
        let grown = resident_bytes(lane.balancer.id()).saturating_sub(before);
        let grown_tcp = tcp_memory_bytes().saturating_sub(before_tcp);
        println!(
            "by clients {by_clients}: {} bytes taken, {grown} resident, {grown_tcp} TCP",
            taken.iter().sum::<usize>()
        );
        assert!(grown < CLIENTS * 128 * 1024 + 2 * MIB, "{grown} bytes for {CLIENTS} connections");
        assert!(taken.iter().all(|taken| *taken <= held_max), "{taken:?}");
        // Buffers have a price beyond the bytes in them, and other tests have sockets too.
        assert!(
            grown_tcp <= 3 * taken.iter().sum::<usize>() + 256 * MIB,
            "{grown_tcp} bytes for {CLIENTS} connections"
        );
        // They stay where they are: the speakers were stopped, not slowed.
        let more = flood_all(&speakers);
        assert!(more.iter().all(|more| *more < MIB), "{more:?}");
        // The other direction of the same connections still works.
        for (mut speaker, mut silent) in speakers.into_iter().zip(silent) {
            silent.write_all(b"still here").unwrap();
            let mut heard = [0; 10];
            speaker.read_exact(&mut heard).unwrap();
            assert_eq!(&heard, b"still here");
        }
    }
    drop(warm);
    all_accounted(|| lane.balancer.metrics());
}

/// preface with a standard output that nobody reads. Killed on drop.
struct Unheard {
    child: Child,
    directory: tempfile::TempDir,
    _stdout: PipeReader,
}

impl Unheard {
    fn start(config: &str) -> Unheard {
        let directory = tempfile::tempdir().unwrap();
        let admin = format!("[admin]\nbind = \"unix:{}\"\n", directory.path().join("admin.sock").display());
        std::fs::write(directory.path().join("preface.toml"), format!("{config}{admin}")).unwrap();
        let (reader, writer) = io::pipe().unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_preface"));
        command.arg("run").arg("--config").arg(directory.path().join("preface.toml"));
        command.env("RUNTIME_DIRECTORY", directory.path()).stdin(Stdio::null()).stdout(writer);
        let child = command.spawn().unwrap();
        let unheard = Unheard { child, directory, _stdout: reader };
        eventually("preface is ready", || unheard.try_ask("/readyz").ok());
        unheard
    }

    fn try_ask(&self, path: &str) -> io::Result<String> {
        let mut stream = std::os::unix::net::UnixStream::connect(self.directory.path().join("admin.sock"))?;
        stream.set_read_timeout(Some(DEADLINE))?;
        Ok(http::get(&mut stream, path)?.text())
    }
}

impl Drop for Unheard {
    fn drop(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

#[test]
fn an_output_that_nobody_reads_holds_up_no_connection() {
    const THREADS: usize = 4;
    const EACH: usize = 5050;
    // The upstream speaks and closes first, so that no local port of the balancer waits for two minutes.
    let upstream = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = upstream.local_addr().unwrap();
    let upstream = Arc::new(upstream);
    let servers: Vec<_> = (0..THREADS)
        .map(|_| {
            let upstream = upstream.clone();
            std::thread::spawn(move || {
                while let Ok((mut server, _)) = upstream.accept() {
                    let _ = server.read_exact(&mut [0; 28]);
                    let _ = server.write_all(b"hello").and_then(|()| server.shutdown(Shutdown::Write));
                    let _ = server.read(&mut [0]);
                }
            })
        })
        .collect();
    let port = free_port();
    let unheard = Unheard::start(&config_with("", "", &[address]).replace(":0\"", &format!(":{port}\"")));
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            scope.spawn(move || {
                for count in 0..EACH {
                    let mut client = connect_from(loopback(thread), ([127, 0, 0, 1], port).into()).unwrap();
                    let mut answer = Vec::new();
                    client.read_to_end(&mut answer).unwrap_or_else(|error| panic!("client {count}: {error}"));
                    assert_eq!(answer, b"hello");
                }
            });
        }
    });
    let ends = all_accounted(|| unheard.try_ask("/metrics").unwrap());
    assert_eq!(ends, BTreeMap::from([("upstream.relay.closed".to_owned(), (THREADS * EACH) as u64)]));
    let dropped = value_of(&unheard.try_ask("/metrics").unwrap(), "preface_log_lines_dropped_total");
    // The pipe and the queue hold some thousands of lines; the rest is dropped.
    assert!((5000..(THREADS * EACH) as u64).contains(&dropped), "{dropped}");
    let _ = rustix::net::shutdown(&upstream, rustix::net::Shutdown::Both);
    servers.into_iter().for_each(|server| server.join().unwrap());
}

/// Holds `held` connections open, then sees the next ones refused with this cause, and room again when one is gone.
#[track_caller]
fn assert_limit(balancer: &Balancer, held: usize, cause: &str) {
    let connect = || client::connect(balancer.ipv4("web"));
    let mut clients: Vec<_> = (0..held).map(|_| connect()).collect();
    assert!(clients.iter().all(is_answered));
    for _ in 0..10 {
        assert!(is_refused(connect()));
    }
    assert_eq!(ends(balancer), BTreeMap::from([(cause.to_owned(), 10)]));
    drop(clients.pop());
    eventually("the place is free", || ends(balancer).contains_key("client.relay.closed").then_some(()));
    clients.push(connect());
    assert!(clients.iter().all(is_answered));
    drop(clients);
    let ends = all_accounted(|| balancer.metrics());
    assert_eq!(ends, BTreeMap::from([(cause.to_owned(), 10), ("client.relay.closed".to_owned(), held as u64 + 1)]));
}

#[test]
fn limits_refuse_what_is_above_them_and_count_it() {
    let receiver = Receiver::with_header(echo);
    let upstreams = [receiver.address];
    let process = preface(&format!("[runtime]\nmax_connections = 7\n{}", config_with("", "", &upstreams)));
    assert_limit(&process, 7, "preface.accept.process_full");
    let listener = preface(&config_with("max_connections = 5", "", &upstreams));
    assert_limit(&listener, 5, "preface.accept.listener_full");
    let upstream = preface(&config_with("", "max_connections = 4", &upstreams));
    assert_limit(&upstream, 4, "preface.connect.upstreams_full");
    let source = preface(&config_with("max_connections_per_source = 3", "", &upstreams));
    assert_limit(&source, 3, "preface.accept.source_full");
}

#[test]
fn each_source_has_a_limit_of_its_own() {
    let receiver = Receiver::with_header(echo);
    let config = config_with("max_connections_per_source = 3", "", &[receiver.address]);
    let balancer = preface(&config.replace("\"127.0.0.1:0\"", "[\"127.0.0.1:0\", \"[::1]:0\"]"));
    let from = |source| {
        let address = if IpAddr::is_ipv4(&source) { balancer.ipv4("web") } else { balancer.ipv6("web") };
        connect_from(source, address)
    };
    let sources: Vec<IpAddr> = (0..10).map(loopback).chain(["::1".parse().unwrap()]).collect();
    let clients: Vec<_> = sources.iter().flat_map(|source| [from(*source), from(*source), from(*source)]).collect();
    assert!(clients.iter().all(is_answered));
    assert!(sources.iter().all(|source| is_refused(from(*source))));
    drop(clients);
    assert_eq!(all_accounted(|| balancer.metrics())["preface.accept.source_full"], 11);
}

#[test]
fn an_ipv6_source_is_its_64_bit_network() {
    let Ok(namespace) = Namespace::new().map_err(|why| skip("an_ipv6_source_is_its_64_bit_network", &why)) else {
        return;
    };
    for address in ["fd00:64:0:1::1", "fd00:64:0:1::2", "fd00:64:0:1:ffff::3", "fd00:64:0:2::1"] {
        namespace.run(&format!("ip addr add {address}/128 dev lo nodad"));
    }
    let receiver = namespace.inside(|| Receiver::with_header(echo));
    let config = config_with("max_connections_per_source = 2", "", &[receiver.address]);
    let balancer = preface_in(&namespace, &config.replace("127.0.0.1:0", "[::1]:0"));
    let address = balancer.ipv6("web");
    namespace.inside(|| {
        let from = |source: &str| connect_from(source.parse().unwrap(), address);
        let clients = ["fd00:64:0:1::1", "fd00:64:0:1::2", "fd00:64:0:2::1"].map(from);
        assert!(clients.iter().all(is_answered));
        assert!(is_refused(from("fd00:64:0:1:ffff::3")));
        assert!(is_answered(&from("fd00:64:0:2::1")));
    });
}

#[test]
fn limits_are_exact_when_many_come_at_once() {
    let receiver = Receiver::with_header(echo);
    let upstreams = [receiver.address];
    for (config, limit) in [
        (format!("[runtime]\nmax_connections = 41\n{}", config_with("", "", &upstreams)), 41),
        (config_with("max_connections = 42", "", &upstreams), 42),
        (config_with("max_connections_per_source = 43", "", &upstreams), 43),
        (config_with("", "max_connections = 44", &upstreams), 44),
    ] {
        let balancer = preface(&config);
        let address = balancer.ipv4("web");
        let connect = || (0..20).map(|_| client::connect(address)).collect::<Vec<_>>();
        let clients: Vec<_> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..10).map(|_| scope.spawn(connect)).collect();
            threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
        });
        let served = clients.iter().filter(|client| is_answered(client)).count();
        assert_eq!(served, limit, "{config}");
        // A client may see its reset before it is counted.
        eventually("the others are counted", || {
            (ends(&balancer).values().sum::<u64>() == (200 - limit) as u64).then_some(())
        });
    }
}

#[test]
fn allow_and_deny_reset_at_once_and_deny_comes_first() {
    let receiver = Receiver::with_header(echo);
    let listener = "allow = [\"127.1.0.0/24\", \"127.0.0.1/32\"]\ndeny = \"127.1.0.7/32\"";
    let balancer = preface(&config_with(listener, "", &[receiver.address]));
    let from = |index| connect_from(loopback(index), balancer.ipv4("web"));
    for (index, allowed) in [(0, true), (5, true), (6, false), (7, true), (256, false)] {
        let client = from(index);
        assert!(if allowed { is_answered(&client) } else { is_refused(client) }, "{}", loopback(index));
    }
    let ends = all_accounted(|| balancer.metrics());
    assert_eq!(ends["preface.accept.denied"], 2);
    // An address that is refused never reached an upstream.
    assert_eq!(receiver.arrivals().len(), 3);
}

#[test]
fn a_shortage_of_descriptors_is_said_once_and_passes() {
    let receiver = Receiver::with_header(echo);
    let config = config_with("", "", &[receiver.address]);
    let balancer = preface(&format!("[runtime]\nworkers = 2\nmax_connections = 10000\n{config}"));
    let connect = || client::connect(balancer.ipv4("web"));
    assert!(is_answered(&connect()));
    let set = |current: u64| {
        let id = Pid::from_raw(balancer.id() as i32).unwrap();
        let maximum = getrlimit(Resource::Nofile).maximum;
        let before = prlimit(Some(id), Resource::Nofile, Rlimit { current: Some(current), maximum });
        before.expect("a child's limit may be lowered and raised").current.unwrap()
    };
    let open = std::fs::read_dir(format!("/proc/{}/fd", balancer.id())).unwrap().count() as u64;
    let before = set(open + 21);
    // Twice as many as there are descriptors for: the rest waits in the accept queues, or is reset because no socket
    // was left for its upstream.
    let clients: Vec<_> = (0..40).map(|_| connect()).collect();
    let is_told = |line: &str| line.contains("event=accept") && line.contains("cannot accept");
    balancer.log().wait_for("the shortage", is_told);
    set(before);
    // Those that waited are served now. By itself: nobody told the listener.
    let served = clients.iter().filter(|client| is_answered(client)).count();
    assert!((10..=40).contains(&served), "{served}");
    for _ in 0..50 {
        assert!(is_answered(&connect()));
    }
    balancer.log().wait_for("the recovery", |line| line.contains("event=accept") && line.contains("accepting again"));
    assert!(balancer.log().lines().iter().filter(|line| is_told(line)).count() <= 2, "once for each worker's socket");
    drop(clients);
    let ends = all_accounted(|| balancer.metrics());
    let known = ["client.relay.closed", "preface.connect.local_resources"];
    assert!(ends.keys().all(|end| known.contains(&end.as_str())), "{ends:?}");
    assert_eq!(ends["client.relay.closed"], served as u64 + 51);
    // Our own shortage is not the upstream's failure.
    assert_eq!(balancer.metric("preface_upstream_connect_failures_total", &[]), 0.0);
}

/// Runs preface on a configuration that it must refuse; what it says.
fn refused_start(directory: &Path, config: &str) -> String {
    let file = directory.join("refused.toml");
    let admin = format!("[admin]\nbind = \"unix:{}\"\n", directory.join("refused.sock").display());
    std::fs::write(&file, format!("{config}{admin}")).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_preface"));
    command.arg("run").arg("--config").arg(&file).env("RUNTIME_DIRECTORY", directory);
    let (status, output) = Process::run(&mut command);
    assert_eq!(status.code(), Some(1), "{output}");
    output
}

#[test]
fn a_port_already_taken_is_an_error_at_start() {
    let lane = Lane::new();
    let directory = tempfile::tempdir().unwrap();
    let config = |bind: &str| {
        format!("[listeners.web]\nbind = \"{bind}\"\npool = \"test\"\n[pools.test]\nupstreams = [\"127.0.0.1:9\"]\n")
    };
    // Another preface, whose sockets have SO_REUSEPORT and would share in silence.
    let port = lane.balancer.port("web");
    for bind in [format!("127.0.0.1:{port}"), format!(":{port}"), format!("0.0.0.0:{port}")] {
        let output = refused_start(directory.path(), &config(&bind));
        assert!(output.contains("listener \"web\" cannot bind"), "{output}");
        assert!(output.contains(&format!("ss -ltnp 'sport = :{port}'")), "{output}");
    }
    // Somebody else.
    let other = listen();
    let output = refused_start(directory.path(), &config(&other.local_addr().unwrap().to_string()));
    assert!(output.contains("Address already in use"), "{output}");
    // The first one has noticed nothing.
    let (mut client, mut server) = lane.open();
    client.write_all(b"x").unwrap();
    server.read_exact(&mut [0]).unwrap();
}

#[test]
fn an_upstream_that_resets_at_once_is_the_upstreams_end() {
    let upstream = listen();
    let balancer = preface(&config_with("", "", &[upstream.local_addr().unwrap()]));
    for _ in 0..20 {
        let client = balancer.connect("web");
        let (server, _) = accept(&upstream);
        reset(server);
        let begun = Instant::now();
        assert!(is_refused(Ok(client)));
        assert!(begun.elapsed() < Duration::from_secs(1));
    }
    assert_eq!(all_accounted(|| balancer.metrics()), BTreeMap::from([("upstream.relay.reset".to_owned(), 20)]));
}
