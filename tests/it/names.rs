//! Names as upstreams, with Debian's Knot DNS as the name server, in a network of their own.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::support::receiver::echo;
use crate::support::zone::{Network, Zone};
use crate::support::{Balancer, Receiver, eventually, skip};

fn network(test: &str) -> Option<Network> {
    Network::new().map_err(|why| skip(&format!("names::{test}"), &why)).ok()
}

/// One listener on 127.0.0.1:8000 with these upstreams.
fn config(upstreams: &str, pool: &str) -> String {
    format!(
        "[listeners.web]\nbind = \"127.0.0.1:8000\"\npool = \"web\"\n[pools.web]\nupstreams = [{upstreams}]\n{pool}\n"
    )
}

/// Asks one question through the balancer; the answer must be the same.
#[track_caller]
fn ask(network: &Network) {
    let mut stream = network.connect("127.0.0.1:8000").expect("a client connects");
    let answer = exchange(&mut stream).unwrap_or_else(|error| panic!("a client failed: {error}"));
    assert_eq!(answer, "hello");
}

fn exchange(stream: &mut TcpStream) -> std::io::Result<String> {
    stream.write_all(b"hello")?;
    stream.shutdown(Shutdown::Write)?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).map(|_| answer)
}

/// As soon as it is accepted, or a moment later.
#[track_caller]
fn assert_accepted_and_reset(network: &Network, to: &str) {
    let error = network.connect(to).and_then(|mut stream| exchange(&mut stream)).expect_err("it has no upstream");
    assert_ne!(error.kind(), std::io::ErrorKind::ConnectionRefused, "{error}");
}

/// The first name of pool "web" in the status.
fn name(lb: &Balancer) -> Value {
    lb.status()["pools"]["web"]["names"][0].clone()
}

/// Waits until the first name of pool "web" stands for these.
#[track_caller]
fn wait_addresses(lb: &Balancer, addresses: &[&str]) -> Value {
    eventually(&format!("{addresses:?}"), || {
        let name = name(lb);
        let found: Vec<&str> = name["addresses"].as_array()?.iter().filter_map(Value::as_str).collect();
        (found == addresses).then_some(name)
    })
}

#[track_caller]
fn wait_outcome(lb: &Balancer, outcome: &str) -> Value {
    eventually(outcome, || Some(name(lb)).filter(|name| name["outcome"] == outcome))
}

fn addresses_in_upstreams(lb: &Balancer) -> Vec<String> {
    let status = lb.status();
    let upstreams = status["pools"]["web"]["upstreams"].as_array().expect("a list").clone();
    upstreams.iter().filter_map(|upstream| Some(upstream["address"].as_str()?.to_owned())).collect()
}

#[test]
fn addresses_come_and_go_under_traffic() {
    let Some(network) = network("addresses_come_and_go_under_traffic") else { return };
    let [first, second] = ["127.0.0.2:8080", "127.0.0.3:8080"].map(|address| network.receiver(address, echo));
    let v6 = network.receiver("[::1]:8080", echo);
    let mut zone = Zone::serve(&network, &["web 1 A 127.0.0.2", "web 1 AAAA ::1"]);
    let lb = network.preface(&config("\"web.test.:8080\"", "health_check = { interval = \"1s\" }"));
    wait_addresses(&lb, &["127.0.0.2:8080", "[::1]:8080"]);
    lb.wait_health("web", first.address, "healthy");
    lb.wait_health("web", v6.address, "healthy");
    // One that stays while its upstream leaves.
    let mut staying = loop {
        let mut stream = network.connect("127.0.0.1:8000").expect("a client connects");
        let seen = first.arrivals().len();
        stream.write_all(b"hel").expect("it is open");
        let mut answer = [0; 3];
        stream.read_exact(&mut answer).expect("it is served");
        if first.arrivals().len() > seen {
            break stream;
        }
    };

    let done = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        let client = || {
            let mut count = 0;
            while !done.load(std::sync::atomic::Ordering::Relaxed) {
                ask(&network);
                count += 1;
            }
            count
        };
        let clients = [scope.spawn(client), scope.spawn(client)];
        zone.change(&["web 1 A 127.0.0.3", "web 1 AAAA ::1"]);
        wait_addresses(&lb, &["127.0.0.3:8080", "[::1]:8080"]);
        lb.wait_health("web", second.address, "healthy");
        let (gone, here) = (first.arrivals().len(), second.arrivals().len());
        eventually("the new one is used", || (second.arrivals().len() > here + 20).then_some(()));
        // Checks and clients that were on their way may still have come; now nobody does.
        let late = first.arrivals().len();
        assert!(late <= gone + 2, "{gone} {late}");
        // One that nobody answers at is not used before it was checked, and so no client meets it.
        zone.change(&["web 1 A 127.0.0.3", "web 1 A 127.0.0.4", "web 1 AAAA ::1"]);
        wait_addresses(&lb, &["127.0.0.3:8080", "127.0.0.4:8080", "[::1]:8080"]);
        lb.wait_health("web", "127.0.0.4:8080".parse().expect("an address"), "unhealthy");
        done.store(true, std::sync::atomic::Ordering::Relaxed);
        let served: usize = clients.map(|client| client.join().expect("no client failed")).iter().sum();
        assert!(served > 50, "{served}");
    });
    staying.write_all(b"lo").expect("it is open");
    staying.shutdown(Shutdown::Write).expect("it is open");
    let mut rest = String::new();
    staying.read_to_string(&mut rest).expect("it is served to its end");
    assert_eq!(rest, "lo");
    let line = lb
        .log()
        .wait_for("the change", |line| line.contains("event=upstreams_changed") && line.contains("removed=127"));
    assert!(line.contains("pool=web name=web.test.:8080 added=127.0.0.3:8080 removed=127.0.0.2:8080"), "{line}");
    // The order of an answer is no change, and neither is asking again.
    let changes = || lb.log().lines().iter().filter(|line| line.contains("event=upstreams_changed")).count();
    let (before, looked) = (changes(), lb.metric("preface_dns_lookups_total", &[("outcome", "answered")]));
    eventually("it is looked up again", || {
        (lb.metric("preface_dns_lookups_total", &[("outcome", "answered")]) >= looked + 2.0).then_some(())
    });
    assert_eq!((before, changes()), (3, 3), "at the start, and twice");
    assert_eq!(lb.upstream("web", second.address)["name"], "web.test.:8080");
}

#[test]
fn the_last_good_answer_stays_whatever_the_server_says() {
    let Some(network) = network("the_last_good_answer_stays_whatever_the_server_says") else { return };
    let receiver = network.receiver("127.0.0.2:8080", echo);
    let mut zone = Zone::serve(&network, &["web 1 A 127.0.0.2"]);
    let lb = network.preface(&config("\"web.test.:8080\"", ""));
    wait_addresses(&lb, &["127.0.0.2:8080"]);
    let kept = |outcome: &str, error: &str| {
        let name = wait_outcome(&lb, outcome);
        assert_eq!(name["addresses"], serde_json::json!(["127.0.0.2:8080"]), "{outcome}");
        assert!(name["failing_since"].is_string() && name["answered"].is_string(), "{name}");
        assert!(name["error"].as_str().is_some_and(|said| said.contains(error)), "{name}");
        ask(&network);
        assert!(lb.metric("preface_dns_lookups_total", &[("outcome", outcome)]) >= 1.0);
        assert_eq!(lb.metric("preface_dns_addresses", &[("name", "web.test.")]), 1.0);
    };
    let failed = |count: usize| {
        let lines = lb
            .log()
            .wait_for_count("the failure", count, |line| line.contains("event=lookup") && line.contains("level=warn"));
        assert_eq!(lines.len(), count, "once each time: {lines:?}");
        lines[count - 1].clone()
    };
    let recovered = |count| {
        lb.log().wait_for_count("the recovery", count, |line| line.contains("answered again"));
    };
    zone.change(&["other 1 A 127.0.0.9"]);
    kept("nxdomain", "web.test. does not exist (NXDOMAIN)");
    let line = failed(1);
    assert!(line.contains("name=web.test. outcome=nxdomain") && line.contains("addresses=1"), "{line}");
    // Without a good answer in between this is the same failure, and is not logged again.
    zone.change(&["web 1 TXT empty"]);
    kept("empty", "web.test. exists, but has no A or AAAA records");
    zone.change(&["web 1 A 127.0.0.2"]);
    recovered(1);
    zone.fail();
    kept("servfail", "A of web.test. from 127.0.0.1: SERVFAIL");
    failed(2);
    zone.change(&["web 1 A 127.0.0.2"]);
    recovered(2);
    drop(zone);
    kept("error", "from 127.0.0.1: Connection refused");
    let deaf = network.namespace.inside(|| UdpSocket::bind("127.0.0.1:53")).expect("the port is free now");
    kept("timeout", "from 127.0.0.1: timed out");
    drop(deaf);
    let _zone = Zone::serve(&network, &["web 1 A 127.0.0.2"]);
    recovered(3);
    assert!(lb.metric("preface_dns_answer_age_seconds", &[]) < 60.0);
    assert!(receiver.arrivals().len() >= 5);
}

#[test]
fn a_long_answer_comes_by_tcp_and_its_order_does_not_matter() {
    let Some(network) = network("a_long_answer_comes_by_tcp_and_its_order_does_not_matter") else { return };
    let records: Vec<String> = (1..=100).map(|last| format!("web 1 A 127.0.1.{last}")).collect();
    let _zone = Zone::serve(&network, &records.iter().map(String::as_str).collect::<Vec<_>>());
    let _receivers: Vec<Receiver> =
        (1..=100).map(|last| network.receiver(&format!("127.0.1.{last}:8080"), echo)).collect();
    let lb = network.preface(&config("\"web.test.:8080\"", ""));
    assert_eq!(name(&lb)["addresses"].as_array().map(Vec::len), Some(100), "{}", name(&lb));
    assert_eq!(addresses_in_upstreams(&lb).len(), 100);
    ask(&network);
}

#[test]
fn srv_records_say_ports_weights_and_backups() {
    let Some(network) = network("srv_records_say_ports_weights_and_backups") else { return };
    let mut zone = Zone::serve(
        &network,
        &[
            "_http._tcp.web 1 SRV 10 20 8081 a",
            "_http._tcp.web 1 SRV 10 60 8082 b",
            "_http._tcp.web 1 SRV 20 0 8083 c",
            "_http._tcp.web 1 SRV 10 0 8084 nowhere",
            "a 1 A 127.0.0.2",
            "b 1 A 127.0.0.3",
            "b 1 AAAA ::1",
            "c 1 A 127.0.0.4",
        ],
    );
    let receiver = network.receiver("127.0.0.2:8081", echo);
    let lb = network.preface(&config("\"srv:_http._tcp.web.test.\"", ""));
    let upstreams = || -> Vec<(String, u64, bool)> {
        let status = lb.status();
        let upstreams = status["pools"]["web"]["upstreams"].as_array().expect("a list").clone();
        let of = |one: &Value| {
            Some((one["address"].as_str()?.to_owned(), one["weight"].as_u64()?, one["backup"].as_bool()?))
        };
        upstreams.iter().filter_map(of).collect()
    };
    let expected = [
        ("127.0.0.2:8081".to_owned(), 1, false),
        ("127.0.0.3:8082".to_owned(), 3, false),
        ("127.0.0.4:8083".to_owned(), 1, true),
        ("[::1]:8082".to_owned(), 3, false),
    ];
    assert_eq!(upstreams(), expected);
    lb.log().wait_for("a host without an address", |line| {
        line.contains("host nowhere.test. of the service has no address")
    });
    zone.change(&["_http._tcp.web 1 SRV 0 0 8081 a", "a 1 A 127.0.0.2"]);
    wait_addresses(&lb, &["127.0.0.2:8081"]);
    ask(&network);
    assert_eq!(receiver.arrivals().len(), 1);
    // RFC 2782: a target of "." says that there is decidedly no such service; the last good answer stays.
    zone.change(&["_http._tcp.web 1 SRV 0 0 0 ."]);
    wait_outcome(&lb, "empty");
    ask(&network);
}

#[test]
fn resolv_conf_and_hosts_are_followed_also_when_they_change() {
    let Some(network) = network("resolv_conf_and_hosts_are_followed_also_when_they_change") else { return };
    let _receivers =
        ["127.0.0.2:8080", "127.0.0.3:8080", "127.0.0.5:8080"].map(|address| network.receiver(address, echo));
    let _zone = Zone::serve(&network, &["web.prod.svc 1 A 127.0.0.2", "web.prod 1 A 127.0.0.3"]);
    // The first server is dead: the second one is asked.
    network.write_etc(
        "resolv.conf",
        "nameserver 127.0.0.99\nnameserver 127.0.0.1\nsearch none.test svc.test test\noptions ndots:2\n",
    );
    let lb = network.preface(&config("\"web.prod:8080\"", ""));
    let found = wait_addresses(&lb, &["127.0.0.2:8080"]);
    assert_eq!(found["from"], "web.prod.svc.test.");
    ask(&network);
    network.write_etc("resolv.conf", "nameserver 127.0.0.1\nsearch test\noptions ndots:2\n");
    let found = wait_addresses(&lb, &["127.0.0.3:8080"]);
    assert_eq!(found["from"], "web.prod.test.");
    network.write_etc("hosts", "127.0.0.1 localhost\n127.0.0.5 web.prod # moved\n");
    let found = wait_addresses(&lb, &["127.0.0.5:8080"]);
    assert_eq!(found["from"], "/etc/hosts");
    ask(&network);
    network.remove_etc("resolv.conf");
    network.remove_etc("hosts");
    let name = wait_outcome(&lb, "error");
    assert!(name["error"].as_str().is_some_and(|said| said.starts_with("cannot read /etc/resolv.conf: ")), "{name}");
    assert_eq!(name["addresses"], serde_json::json!(["127.0.0.5:8080"]));
    network.write_etc("resolv.conf", "nameserver 127.0.0.1\nsearch test\noptions ndots:2\n");
    wait_addresses(&lb, &["127.0.0.3:8080"]);
}

#[test]
fn a_missing_resolv_conf_matters_to_names_alone() {
    let Some(network) = network("a_missing_resolv_conf_matters_to_names_alone") else { return };
    network.remove_etc("resolv.conf");
    let receiver = network.receiver("127.0.0.2:8080", echo);
    let other = "[listeners.plain]\nbind = \"127.0.0.1:8001\"\npool = \"plain\"\n[pools.plain]\nupstreams = [\"127.0.0.2:8080\"]";
    let lb = network.preface(&config("\"web.test.:8080\"", other));
    let mut plain = network.connect("127.0.0.1:8001").expect("the other pool serves");
    assert_eq!(exchange(&mut plain).expect("it serves"), "hello");
    assert_accepted_and_reset(&network, "127.0.0.1:8000");
    lb.log().wait_for("its end", |line| {
        line.contains("event=connection") && line.contains("end=preface.connect.no_upstream")
    });
    assert_eq!(lb.status()["pools"]["web"]["usable"], false);
    assert_eq!(lb.metric("preface_pool_usable", &[("pool", "web")]), 0.0);
    let line = lb.log().wait_for("what is missing", |line| line.contains("event=lookup"));
    assert!(line.contains("cannot read /etc/resolv.conf") && line.contains("it has no addresses yet"), "{line}");
    let _zone = Zone::serve(&network, &["web 1 A 127.0.0.2"]);
    network.write_etc("resolv.conf", "nameserver 127.0.0.1\n");
    wait_addresses(&lb, &["127.0.0.2:8080"]);
    ask(&network);
    assert_eq!(receiver.arrivals().len(), 2);
}

#[test]
fn a_name_server_that_says_nothing_holds_up_nobody_else() {
    let Some(network) = network("a_name_server_that_says_nothing_holds_up_nobody_else") else { return };
    let _deaf = network.namespace.inside(|| UdpSocket::bind("127.0.0.1:53")).expect("a socket");
    let _receiver = network.receiver("127.0.0.2:8080", echo);
    let other = "[listeners.plain]\nbind = \"127.0.0.1:8001\"\npool = \"plain\"\n[pools.plain]\nupstreams = [\"127.0.0.2:8080\"]";
    let mut lb = network.preface(&config("\"web.test.:8080\"", other));
    // Every look-up is under way or being waited for all the time now.
    for _ in 0..200 {
        let begun = Instant::now();
        let mut plain = network.connect("127.0.0.1:8001").expect("the other pool serves");
        assert_eq!(exchange(&mut plain).expect("it serves"), "hello");
        assert!(begun.elapsed() < Duration::from_secs(1), "{:?}", begun.elapsed());
    }
    // A reload that brings a name waits for it, and the control loop does not.
    let more =
        "[pools.more]\nupstreams = [\"more.test.:80\"]\n[listeners.more]\nbind = \"127.0.0.1:8002\"\npool = \"more\"";
    lb.rewrite_config(&config("\"web.test.:8080\"", &format!("{other}\n{more}")));
    let socket = lb.admin_socket();
    std::thread::scope(|scope| {
        let lb = &lb;
        let reload = scope.spawn(move || lb.reload());
        let begun = Instant::now();
        while !reload.is_finished() {
            let asked = Instant::now();
            assert_eq!(lb.ask("GET", "/readyz").status, 200, "{}", socket.display());
            lb.status();
            assert!(asked.elapsed() < Duration::from_secs(2), "{:?}", asked.elapsed());
        }
        let report = reload.join().expect("it answers");
        assert_eq!(report.status, 200, "{}", report.text());
        assert!(begun.elapsed() > Duration::from_secs(2), "it waits for the name: {:?}", begun.elapsed());
    });
    // Its time is over: it is in force without an answer.
    assert_accepted_and_reset(&network, "127.0.0.1:8002");
}

#[test]
fn a_reload_that_brings_a_name_lets_nobody_meet_an_empty_pool() {
    let Some(network) = network("a_reload_that_brings_a_name_lets_nobody_meet_an_empty_pool") else { return };
    let [first, second] = ["127.0.0.2:8080", "127.0.0.3:8080"].map(|address| network.receiver(address, echo));
    let _zone = Zone::serve(&network, &["web 1 A 127.0.0.3"]);
    let mut lb = network.preface(&config("\"127.0.0.2:8080\"", ""));
    let done = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        let client = scope.spawn(|| {
            while !done.load(std::sync::atomic::Ordering::Relaxed) {
                ask(&network);
            }
        });
        lb.apply(&config("\"web.test.:8080\"", ""));
        second.wait_for(5);
        done.store(true, std::sync::atomic::Ordering::Relaxed);
        client.join().expect("no client failed");
    });
    assert!(!first.arrivals().is_empty());
    let report = lb.status()["reloads"][0].clone();
    let changes: Vec<&str> = report["changes"].as_array().expect("a list").iter().filter_map(Value::as_str).collect();
    assert_eq!(
        changes,
        ["pool \"web\": upstream 127.0.0.2:8080 removed", "pool \"web\": upstream web.test.:8080 added"],
        "what the file says, and not what it stands for"
    );
    let drained = lb.ask("POST", "/pools/web/upstreams/web.test./drain");
    assert_eq!(drained.status, 200, "{}", drained.text());
    assert_eq!(lb.upstream("web", second.address)["admin"], "draining");
}

#[test]
fn addresses_that_cannot_be_used_are_left_out_and_said() {
    let Some(network) = network("addresses_that_cannot_be_used_are_left_out_and_said") else { return };
    let _receiver = network.receiver("127.0.0.2:8080", echo);
    let records =
        ["web 1 A 127.0.0.2", "web 1 A 0.0.0.0", "web 1 A 224.0.0.1", "web 1 AAAA fe80::1", "web 1 AAAA 2001:db8::1"];
    let _zone = Zone::serve(&network, &records);
    let lb = network.preface(&config("\"web.test.:8080\", \"127.0.0.2:8080\"", ""));
    assert_eq!(addresses_in_upstreams(&lb), ["127.0.0.2:8080"]);
    for said in [
        "0.0.0.0 left out: an unspecified address",
        "224.0.0.1 left out: a multicast or broadcast address",
        "fe80::1 left out: a link-local address",
        "2001:db8::1 left out: no route to it from here",
        "address 127.0.0.2 left out: it is an upstream of this pool already",
    ] {
        let lines = lb.log().wait_for_count(said, 1, |line| line.contains(said));
        assert_eq!(lines.len(), 1, "{lines:?}");
    }
    ask(&network);
}

/// A server that takes nothing but requests for the name, as a virtual host does.
fn virtual_host(mut stream: TcpStream, _: &crate::support::Arrival) -> std::io::Result<()> {
    let mut request = [0; 1024];
    let count = stream.read(&mut request)?;
    let request = String::from_utf8_lossy(&request[..count]).into_owned();
    let status = if request.contains("Host: web.test:8080\r\n") { "200 OK" } else { "421 Misdirected" };
    stream.write_all(format!("HTTP/1.1 {status}\r\nConnection: close\r\n\r\n").as_bytes())
}

#[test]
fn an_http_check_of_a_name_asks_for_that_host() {
    let Some(network) = network("an_http_check_of_a_name_asks_for_that_host") else { return };
    let receiver = network.receiver("127.0.0.2:8080", virtual_host);
    let _zone = Zone::serve(&network, &["web 1 A 127.0.0.2"]);
    let lb = network.preface(&config("\"web.test.:8080\"", "health_check = { protocol = \"http\" }"));
    lb.wait_health("web", receiver.address, "healthy");
}
