//! In front of the distribution's nginx and HAProxy: what their own logs say about who came.

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Read};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};
use std::process::Command;

use preface::proxy_protocol::{Tlv, Version};

use crate::support::client::{connect, connect_from, loopback};
use crate::support::peers::{Seen, haproxy, nginx};
use crate::support::receiver::say_who;
use crate::support::{Balancer, Process, Receiver, eventually, http, preface, program};

const CLIENTS: usize = 200;

/// Listeners `v1to4`, `v1to6`, `v2to4`, `v2to6`, each on IPv4 and IPv6, in front of one receiver's port.
fn every_family(port: u16) -> String {
    let mut config = String::new();
    for version in ["v1", "v2"] {
        for (family, upstream) in [("4", "127.0.0.1"), ("6", "[::1]")] {
            let name = format!("{version}to{family}");
            config += &format!(
                r#"
                [listeners.{name}]
                bind = ["127.0.0.1:0", "[::1]:0"]
                pool = "{name}"
                [pools.{name}]
                proxy_protocol = "{version}"
                upstreams = ["{upstream}:{port}"]
                "#
            );
        }
    }
    config.lines().map(|line| line.trim().to_owned() + "\n").collect()
}

/// 200 clients at once, each from an address or at least a port of its own; each gets its own address back, and what
/// it asks for is its address, so that a line of the receiver's log can be held against itself.
fn introduce_many(to: SocketAddr) -> BTreeSet<SocketAddr> {
    let source = |index| if to.is_ipv4() { loopback(index) } else { IpAddr::V6(Ipv6Addr::LOCALHOST) };
    let mut clients: Vec<TcpStream> =
        (0..CLIENTS).map(|index| connect_from(source(index), to).expect("a client connects")).collect();
    let own = |client: &TcpStream| client.local_addr().expect("a client has an address");
    for client in &mut clients {
        let path = format!("/{}", own(client));
        http::send(client, "GET", &path, &[]).expect("a client asks");
    }
    for client in &mut clients {
        let address = own(client);
        let answer = http::receive(client).unwrap_or_else(|error| panic!("client {address}: {error}"));
        assert_eq!(answer.text(), format!("{} {}\n", address.ip(), address.port()));
    }
    clients.iter().map(own).collect()
}

fn assert_names_every_client(lb: &Balancer, wait_for: impl Fn(usize) -> Vec<Seen>) {
    let mut clients = BTreeSet::new();
    for listener in ["v1to4", "v1to6", "v2to4", "v2to6"] {
        for to in [lb.ipv4(listener), lb.ipv6(listener)] {
            clients.append(&mut introduce_many(to));
        }
    }
    // Ports of one address may have been used twice, by connections through different listeners.
    let seen = wait_for(CLIENTS * 8);
    assert_eq!(seen.len(), CLIENTS * 8);
    for seen in &seen {
        assert_eq!(seen.path, format!("/{}", seen.client));
    }
    assert_eq!(seen.into_iter().map(|seen| seen.client).collect::<BTreeSet<_>>(), clients);
    assert_eq!(lb.metric("preface_headers_sent_total", &[("version", "v1")]), CLIENTS as f64 * 4.0);
    assert_eq!(lb.metric("preface_headers_sent_total", &[("version", "v2")]), CLIENTS as f64 * 4.0);
}

#[test]
fn nginx_names_every_client() {
    let nginx = nginx();
    let lb = preface(&every_family(nginx.headers));
    assert_names_every_client(&lb, |count| nginx.wait_for(count));
    assert_eq!(nginx.errors(), [""; 0]);
}

#[test]
fn haproxy_names_every_client() {
    let haproxy = haproxy();
    let lb = preface(&every_family(haproxy.headers));
    assert_names_every_client(&lb, |count| haproxy.wait_for(count));
    assert_eq!(haproxy.errors(), [""; 0]);
}

/// HAProxy itself writes `::ffff:127.0.0.1` here.
#[test]
fn an_ipv4_client_of_a_dual_stack_listener_is_ipv4() {
    let receiver = Receiver::with_header(say_who);
    let config = format!(
        "[listeners.web]\nbind = \":0\"\npool = \"p\"\n[pools.p]\nproxy_protocol = \"v1\"\nupstreams = [\"{}\"]\n",
        receiver.address
    );
    let lb = preface(&config);
    let client = lb.connect("web");
    let arrival = receiver.wait_for(1).remove(0);
    let (own, to) = (client.local_addr().unwrap(), lb.ipv4("web"));
    let line = format!("PROXY TCP4 127.0.0.1 127.0.0.1 {} {}\r\n", own.port(), to.port());
    assert_eq!(String::from_utf8_lossy(&arrival.raw), line);
}

fn one_pool(port: u16, version: &str) -> String {
    format!(
        "[log]\nconnections = \"errors\"\n[listeners.web]\nbind = \"127.0.0.1:0\"\npool = \"p\"\n\
         [pools.p]\nproxy_protocol = \"{version}\"\nupstreams = [\"127.0.0.1:{port}\"]\n"
    )
}

/// `wrk` for 10 s; not one error of any kind, on its side and on the balancer's.
fn assert_wrk_without_errors(lb: &Balancer, headers: &[&str]) {
    let mut wrk = Command::new(program("wrk"));
    wrk.args(["-t2", "-c64", "-d10s", "--timeout", "5s"]);
    for header in headers {
        wrk.args(["-H", header]);
    }
    let (status, report) = Process::run(wrk.arg(format!("http://{}/quiet", lb.ipv4("web"))));
    assert!(status.success(), "{report}");
    assert!(!report.contains("Socket errors") && !report.contains("Non-2xx"), "{report}");
    let requests = report.lines().find_map(|line| line.trim().split_once(" requests in ")?.0.parse::<u64>().ok());
    assert!(requests.is_some_and(|requests| requests > 1_000), "{report}");
    eventually("every connection has ended", || (lb.status()["connections"]["open"] == 0).then_some(()));
    let ends = &lb.status()["listeners"]["web"]["ends"];
    let irregular: Vec<_> = ends.as_object().into_iter().flatten().filter(|(end, _)| !is_regular(end)).collect();
    assert!(irregular.is_empty(), "{ends}\n{report}");
}

/// `wrk` leaves at its end, with answers under way, by closing or by a reset.
fn is_regular(end: &str) -> bool {
    ["client.relay.closed", "upstream.relay.closed", "client.relay.reset"].contains(&end)
}

#[test]
fn wrk_sees_no_error_in_front_of_nginx() {
    let nginx = nginx();
    let lb = preface(&one_pool(nginx.headers, "v2"));
    assert_wrk_without_errors(&lb, &[]);
    assert_eq!(nginx.errors(), [""; 0]);
}

#[test]
fn wrk_sees_no_error_on_a_connection_for_each_request() {
    let haproxy = haproxy();
    let lb = preface(&one_pool(haproxy.headers, "v1"));
    assert_wrk_without_errors(&lb, &["Connection: close"]);
}

#[test]
fn each_upstream_of_a_pool_gets_its_own_header() {
    let (nginx, haproxy) = (nginx(), haproxy());
    let config = format!(
        r#"
[listeners.web]
bind = "127.0.0.1:0"
pool = "p"
[pools.p]
proxy_protocol = "v2"
[[pools.p.upstreams]]
address = "127.0.0.1:{}"
proxy_protocol = "v1"
[[pools.p.upstreams]]
address = "127.0.0.1:{}"
"#,
        nginx.headers, haproxy.headers
    );
    let lb = preface(&config);
    let clients = introduce_many(lb.ipv4("web"));
    let (by_nginx, by_haproxy) = (nginx.wait_for(CLIENTS / 2), haproxy.wait_for(CLIENTS / 2));
    assert_eq!((by_nginx.len(), by_haproxy.len()), (CLIENTS / 2, CLIENTS / 2));
    assert_eq!(by_nginx.into_iter().chain(by_haproxy).map(|seen| seen.client).collect::<BTreeSet<_>>(), clients);
    // Both take either version: what was written says which one each got.
    for (port, version) in [(nginx.headers, "v1"), (haproxy.headers, "v2")] {
        assert_eq!(lb.upstream("p", (Ipv4Addr::LOCALHOST, port).into())["header"], version);
    }
    assert_eq!(lb.metric("preface_headers_sent_total", &[("version", "v1")]), CLIENTS as f64 / 2.0);
}

#[test]
fn each_upstream_of_a_pool_gets_its_own_bytes() {
    let (first, second) = (Receiver::with_header(say_who), Receiver::with_header(say_who));
    let config = format!(
        "[listeners.web]\nbind = \"127.0.0.1:0\"\npool = \"p\"\n[pools.p]\nproxy_protocol = \"v2\"\nupstreams = [\
         {{ address = \"{}\", proxy_protocol = \"v1\" }}, {{ address = \"{}\" }}]\n",
        first.address, second.address
    );
    let lb = preface(&config);
    for _ in 0..20 {
        let mut client = lb.connect("web");
        let mut line = String::new();
        BufReader::new(&mut client).read_line(&mut line).expect("a receiver speaks first");
        assert_eq!(line.trim(), client.local_addr().unwrap().to_string());
    }
    for (receiver, version) in [(&first, Version::V1), (&second, Version::V2)] {
        let arrivals = receiver.wait_for(10);
        assert_eq!(arrivals.len(), 10);
        assert!(arrivals.iter().all(|arrival| arrival.header.as_ref().is_some_and(|header| header.version == version)));
    }
}

/// Two listeners share a pool and differ in their endpoint; a third tells two source networks apart.
#[test]
fn each_listener_and_source_names_its_vpc_endpoint() {
    let receiver = Receiver::with_header(say_who);
    let config = format!(
        r#"
[listeners.blue]
bind = "127.0.0.1:0"
pool = "p"
tlvs = {{ vpce_id = "vpce-blue" }}
[listeners.green]
bind = "127.0.0.1:0"
pool = "p"
tlvs = {{ vpce_id = "vpce-green" }}
[listeners.sources]
bind = "127.0.0.1:0"
pool = "p"
[listeners.sources.tlvs]
vpce_id = "vpce-elsewhere"
vpce_id_by_source = [
    {{ from = "127.2.0.0/16", id = "vpce-two" }},
    {{ from = "127.3.0.0/16", id = "vpce-three" }},
    {{ from = "127.3.3.0/24", id = "vpce-three-three" }},
]
[pools.p]
proxy_protocol = "v2"
upstreams = ["{}"]
"#,
        receiver.address
    );
    let lb = preface(&config);
    let expected = [
        ("blue", "127.0.0.1", "vpce-blue"),
        ("green", "127.0.0.1", "vpce-green"),
        ("sources", "127.2.0.9", "vpce-two"),
        ("sources", "127.3.0.9", "vpce-three"),
        ("sources", "127.3.3.9", "vpce-three-three"),
        ("sources", "127.4.0.9", "vpce-elsewhere"),
    ];
    for (count, (listener, source, id)) in expected.into_iter().enumerate() {
        let source: IpAddr = source.parse().expect("an address");
        let client = connect_from(source, lb.ipv4(listener)).expect("a client connects");
        let arrival = receiver.wait_for(count + 1).remove(count);
        assert_eq!(arrival.client(), client.local_addr().unwrap());
        assert_eq!(arrival.header.unwrap().tlvs, [Tlv::AwsVpcEndpoint(id.to_owned())], "{listener} from {source}");
    }
}

/// A pool of a live and a dead upstream, checked every 100 ms.
fn checked_pool(addresses: &[SocketAddr]) -> String {
    let upstreams: Vec<String> = addresses.iter().map(|address| format!("\"{address}\"")).collect();
    format!(
        r#"
[listeners.web]
bind = "127.0.0.1:0"
pool = "p"
[pools.p]
proxy_protocol = "v2"
unhealthy_after_failed_connects = 0
upstreams = [{}]
[pools.p.health_check]
interval = "100ms"
timeout = "2s"
healthy_threshold = 3
unhealthy_threshold = 4
"#,
        upstreams.join(", ")
    )
}

/// One client: what the receiver says must be its own address.
fn ask_who(lb: &Balancer) {
    let mut client = connect(lb.ipv4("web")).expect("a client connects");
    let mut answer = String::new();
    client.read_to_string(&mut answer).expect("a client is answered");
    assert_eq!(answer.trim(), client.local_addr().unwrap().to_string());
}

#[test]
fn a_dead_upstream_costs_no_client_a_failure() {
    let live = Receiver::with_header(say_who);
    let dying = Receiver::with_header(say_who);
    let address = dying.address;
    let lb = preface(&checked_pool(&[live.address, address]));
    lb.wait_health("p", address, "healthy");
    let failed = |lb: &Balancer| lb.metric("preface_health_checks_total", &[("result", "failed")]);
    let passed = |lb: &Balancer| {
        let labels = [("result", "passed"), ("upstream", &address.to_string())];
        lb.metric("preface_health_checks_total", &labels)
    };
    for _ in 0..20 {
        ask_who(&lb);
    }
    assert_eq!(failed(&lb), 0.0);

    drop(dying);
    let unhealthy = eventually("the dead upstream is out", || {
        ask_who(&lb);
        Some(lb.upstream("p", address)).filter(|upstream| upstream["health"] == "unhealthy")
    });
    assert!(unhealthy["checks"]["failed"].as_u64() >= Some(4), "{unhealthy}");
    let attempts = unhealthy["connect_failures"].as_u64();
    for _ in 0..20 {
        ask_who(&lb);
    }
    assert_eq!(lb.upstream("p", address)["connect_failures"].as_u64(), attempts, "it is still tried");

    let passed_before = passed(&lb);
    let back = Receiver::at(&address.to_string(), true, say_who);
    eventually("it is back", || {
        ask_who(&lb);
        Some(lb.upstream("p", address)).filter(|upstream| upstream["health"] == "healthy")
    });
    assert!(passed(&lb) >= passed_before + 3.0);
    let clients = || back.arrivals().iter().filter(|arrival| arrival.is_client()).count();
    let before = clients();
    for _ in 0..20 {
        ask_who(&lb);
    }
    assert_eq!(clients() - before, 10);
}

/// Listeners, pools and checks in every form; each check runs every 100 ms.
fn checks(port: u16, forms: &[(&str, &str)]) -> String {
    let mut config = String::new();
    for (index, (version, check)) in forms.iter().enumerate() {
        config += &format!(
            "[listeners.l{index}]\nbind = \"127.0.0.1:0\"\npool = \"p{index}\"\n[pools.p{index}]\nproxy_protocol = \"{version}\"\n\
             upstreams = [\"127.0.0.1:{port}\"]\n[pools.p{index}.health_check]\ninterval = \"100ms\"\ntimeout = \"2s\"\n{check}\n"
        );
    }
    config
}

const WITH_HEADER: [(&str, &str); 6] = [
    ("v1", "protocol = \"tcp\""),
    ("v2", "protocol = \"tcp\""),
    ("v2", "protocol = \"tcp\"\nproxy_command = \"proxy\""),
    ("v1", "protocol = \"http\"\npath = \"/quiet\""),
    ("v2", "protocol = \"http\"\npath = \"/quiet\""),
    ("v2", "protocol = \"http\"\npath = \"/quiet\"\nproxy_command = \"proxy\""),
];

/// Waits until every upstream has passed ten checks; none may have failed.
fn wait_for_ten_checks(lb: &Balancer) {
    eventually("ten checks of each upstream", || {
        let status = lb.status();
        let pools = status["pools"].as_object().expect("pools");
        let checks: Vec<_> = pools.values().map(|pool| &pool["upstreams"][0]["checks"]).collect();
        assert!(checks.iter().all(|checks| checks["failed"] == 0), "{status:#}");
        checks.iter().all(|checks| checks["passed"].as_u64() >= Some(10)).then_some(())
    });
}

/// Ten checks of each kind reach this port, all of them pass, and the receiver has nothing to complain of.
#[track_caller]
fn assert_no_error(port: u16, kinds: &[(&str, &str)], errors: impl Fn() -> Vec<String>) {
    let lb = preface(&checks(port, kinds));
    wait_for_ten_checks(&lb);
    drop(lb);
    assert_eq!(errors(), [""; 0]);
}

#[test]
fn checks_with_a_header_leave_no_error_in_nginx() {
    let nginx = nginx();
    assert_no_error(nginx.headers, &WITH_HEADER, || nginx.errors());
}

#[test]
fn checks_with_a_header_leave_no_error_in_nginx_stream() {
    let nginx = nginx();
    assert_no_error(nginx.stream, &WITH_HEADER[..3], || nginx.errors());
}

#[test]
fn checks_with_a_header_leave_no_error_in_haproxy() {
    let haproxy = haproxy();
    assert_no_error(haproxy.headers, &WITH_HEADER, || haproxy.errors());
}

/// The other side of the tests above: what they look for is there when a header is broken or missing.
#[test]
fn receivers_log_a_broken_header() {
    let (nginx, haproxy) = (nginx(), haproxy());
    for port in [nginx.headers, nginx.stream, haproxy.headers] {
        let mut stream = connect((Ipv4Addr::LOCALHOST, port).into()).expect("the receiver listens");
        http::send(&mut stream, "GET", "/", &[]).expect("the receiver reads");
        let mut nothing = Vec::new();
        // Closed with our bytes unread, so by a reset or not.
        let _ = stream.read_to_end(&mut nothing);
        assert!(nothing.is_empty());
    }
    let broken = || nginx.errors().iter().filter(|line| line.contains("broken header")).count();
    eventually("nginx says so twice", || (broken() == 2).then_some(()));
    eventually("HAProxy says so", || (haproxy.errors().len() == 1).then_some(()));
}

/// Not even the accepted connection: it is reset before the upstream takes it.
#[test]
fn a_tcp_check_without_a_header_leaves_no_trace() {
    let (nginx, haproxy) = (nginx(), haproxy());
    for port in [nginx.plain, nginx.headers, haproxy.plain] {
        let before = nginx.accepted();
        let lb = preface(&checks(port, &[("off", "protocol = \"tcp\"")]));
        wait_for_ten_checks(&lb);
        drop(lb);
        assert_eq!(nginx.accepted(), before + 1, "nginx accepted checks");
    }
    assert_eq!((nginx.errors(), haproxy.errors()), (vec![], vec![]));
    assert_eq!((nginx.plain_requests(), haproxy.plain_requests()), (vec![], vec![]));
}
