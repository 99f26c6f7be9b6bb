//! What needs a network of its own: an upstream that falls silent, and go-mmproxy, which answers from spoofed addresses.

use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::support::client::connect;
use crate::support::netns::Pair;
use crate::support::ports::free_port;
use crate::support::receiver::say_who;
use crate::support::{Balancer, Process, Receiver, eventually, preface_in, skip};

/// A pair of namespaces, or `None` with the reason told to `tests/run`.
fn namespaces(test: &str) -> Option<Pair> {
    Pair::new().map_err(|why| skip(&format!("netns::{test}"), &why)).ok()
}

/// Packets to one of two upstreams vanish. The clients that were on their way wait for `connect_timeout` and are served
/// by the other; those that begin later than `connect_timeout` + 1 s after the cut never try it.
#[test]
fn a_blackholed_upstream_gets_no_connection_after_its_timeout() {
    let Some(pair) = namespaces("a_blackholed_upstream_gets_no_connection_after_its_timeout") else { return };
    let live = pair.left.inside(|| Receiver::at("10.231.0.1:0", true, say_who));
    let silent = pair.right.inside(|| Receiver::at("10.231.0.2:0", true, say_who));
    let config = format!(
        r#"
[listeners.web]
bind = "10.231.0.1:0"
pool = "p"
[pools.p]
proxy_protocol = "v2"
connect_timeout = "1s"
upstreams = ["{}", "{}"]
[pools.p.health_check]
"#,
        live.address, silent.address
    );
    let lb = preface_in(&pair.left, &config);
    let web = SocketAddr::new("10.231.0.1".parse().expect("an address"), lb.port("web"));
    lb.wait_health("p", silent.address, "healthy");
    // Ports come again: the how-manieth use of its address a client is tells which line is its own.
    let mut uses: HashMap<SocketAddr, usize> = HashMap::new();
    let mut client = || {
        let stream = pair.left.inside(|| connect(web)).expect("a client connects");
        let use_of_address = uses.entry(stream.local_addr().expect("a client has an address")).or_default();
        *use_of_address += 1;
        (stream, *use_of_address)
    };
    for _ in 0..10 {
        assert!(is_served(client().0));
    }
    assert!(silent.arrivals().iter().any(|arrival| arrival.is_client()));

    pair.right.run("nft add table inet cut");
    pair.right.run("nft add chain inet cut input { type filter hook input priority 0 ; policy drop ; }");
    let cut = Instant::now();
    // One client after the other, each on a thread of its own because the first ones have to wait.
    let (mut early, mut late) = (Vec::new(), Vec::new());
    eventually("a second of clients after the limit", || {
        let begun = cut.elapsed();
        let (stream, use_of_address) = client();
        let address = (stream.local_addr().expect("a client has an address"), use_of_address);
        let answered = std::thread::spawn(move || is_served(stream));
        let clients = if begun <= Duration::from_secs(2) { &mut early } else { &mut late };
        clients.push((address, answered));
        (begun > Duration::from_secs(4)).then_some(())
    });
    let [early, late] = [early, late].map(|clients| {
        let served = |(address, answered): ((SocketAddr, usize), JoinHandle<bool>)| {
            assert!(answered.join().expect("a client ends"), "client {address:?} was not served");
            address
        };
        clients.into_iter().map(served).collect::<Vec<_>>()
    });
    // Health checks go on reaching for it, so its side cannot tell; the line of each connection says how often it tried.
    let met_the_cut = |client: &&(SocketAddr, usize)| !connection_line(&lb, **client).contains(" attempts=1 ");
    assert!(early.iter().filter(met_the_cut).count() > 0, "this proves nothing");
    assert!(late.len() > 10, "this proves nothing");
    for client in late {
        let line = connection_line(&lb, client);
        assert!(line.contains(" attempts=1 ") && line.contains(&format!("upstream={}", live.address)), "{line}");
    }
    assert_eq!(lb.upstream("p", silent.address)["health"], "unhealthy");
}

/// Does the receiver answer with this client's own address?
fn is_served(mut stream: TcpStream) -> bool {
    let own = stream.local_addr().expect("a client has an address").to_string();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).is_ok() && answer.trim() == own
}

/// The line of the connection that was this address's n-th.
fn connection_line(lb: &Balancer, (client, nth): (SocketAddr, usize)) -> String {
    let client = format!(" client={client} ");
    let is_its = |line: &str| line.contains("event=connection") && line.contains(&client);
    lb.log().wait_for_count("the line of a connection", nth, is_its).remove(nth - 1)
}

/// go-mmproxy on `right` with a program behind it that has never heard of headers; preface before it; clients on `left`.
struct Mmproxy {
    pair: Pair,
    lb: Balancer,
    _mmproxy: Process,
    _directory: tempfile::TempDir,
    /// Where clients of `left` connect.
    web: SocketAddr,
}

fn mmproxy(pair: Pair, version: &str, behind: u16) -> Mmproxy {
    // What comes back from the program to a spoofed address must stay here; see go-mmproxy's README.
    for line in ["ip rule add from 127.0.0.1/8 iif lo table 123", "ip route add local 0.0.0.0/0 dev lo table 123"] {
        pair.right.run(line);
    }
    let directory = tempfile::tempdir().expect("a temporary directory");
    let allowed = directory.path().join("allowed");
    std::fs::write(&allowed, "127.0.0.1/32\n").expect("the file is written");
    let port = free_port();
    let mut command = pair.right.command("go-mmproxy");
    command.args(["-l", &format!("127.0.0.1:{port}"), "-4", &format!("127.0.0.1:{behind}"), "-v", "2"]);
    let mmproxy = Process::start(command.arg("-allowed-subnets").arg(&allowed));
    eventually("go-mmproxy listens", || pair.right.inside(|| connect(([127, 0, 0, 1], port).into())).ok());
    let config = format!(
        "[listeners.web]\nbind = \"10.231.0.2:0\"\npool = \"p\"\n\
         [pools.p]\nproxy_protocol = \"{version}\"\nupstreams = [\"127.0.0.1:{port}\"]\n"
    );
    let lb = preface_in(&pair.right, &config);
    let web = SocketAddr::new("10.231.0.2".parse().expect("an address"), lb.port("web"));
    Mmproxy { pair, lb, _mmproxy: mmproxy, _directory: directory, web }
}

#[test]
fn ncat_behind_go_mmproxy_reports_the_client() {
    for version in ["v1", "v2"] {
        let Some(pair) = namespaces("ncat_behind_go_mmproxy_reports_the_client") else { return };
        let behind = free_port();
        let mut ncat = pair.right.command("ncat");
        ncat.args(["-k", "-l", "-v", "-n", "127.0.0.1", &behind.to_string()]);
        // The end of its input would make it hang up, and `--recv-only` says at once that it will not speak.
        let ncat = Process::start_at_terminal(&mut ncat);
        ncat.stderr.wait_for("ncat listens", |line| line.contains("Listening on 127.0.0.1"));
        let lab = mmproxy(pair, version, behind);
        for number in 0..10 {
            let mut client = lab.pair.left.inside(|| connect(lab.web)).expect("a client connects");
            let own = client.local_addr().expect("a client has an address");
            assert_eq!(own.ip().to_string(), "10.231.0.1");
            let words = format!("hello {number} over {version}");
            client.write_all(format!("{words}\n").as_bytes()).expect("the client speaks");
            ncat.stdout.wait_for("what the client said", |line| line == words);
            ncat.stderr.wait_for("the client's address", |line| line.contains(&own.to_string()));
        }
        assert_eq!(lab.lb.metric("preface_headers_sent_total", &[("version", version)]), 10.0);
    }
}

#[test]
fn iperf_behind_go_mmproxy_reports_the_client() {
    for version in ["v1", "v2"] {
        let Some(pair) = namespaces("iperf_behind_go_mmproxy_reports_the_client") else { return };
        let behind = free_port();
        let mut server = pair.right.command("iperf");
        let server = Process::start(server.args(["-s", "-B", "127.0.0.1", "-p", &behind.to_string()]));
        let lab = mmproxy(pair, version, behind);
        let mut client = lab.pair.left.command("iperf");
        client.args(["-c", "10.231.0.2", "-p", &lab.web.port().to_string(), "-t", "1", "-P", "2"]);
        let (status, report) = Process::run(&mut client);
        assert!(status.success(), "{report}");
        server
            .stdout
            .wait_for_count("iperf names the client", 2, |line| line.contains("connected with 10.231.0.1 port"));
    }
}
