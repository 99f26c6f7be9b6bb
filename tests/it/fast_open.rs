//! TCP Fast Open towards upstreams: header and first bytes ride on the SYN, and nothing is lost or said twice when the
//! connection fails.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};

use crate::support::client::connect;
use crate::support::netns::{Namespace, Pair};
use crate::support::receiver::echo;
use crate::support::{Balancer, Receiver, eventually, preface_in, skip};

/// Every listening socket of the namespace takes part, and every client.
const FAST_OPEN_FOR_ALL: &str = "sysctl -q -w net.ipv4.tcp_fastopen=1027";

fn config(upstreams: &[&Receiver]) -> String {
    let upstreams: Vec<String> =
        upstreams.iter().map(|upstream| format!("{:?}", upstream.address.to_string())).collect();
    format!(
        "[runtime]\nworkers = 1\n[listeners.web]\nbind = \":0\"\npool = \"p\"\n\
         [pools.p]\nproxy_protocol = \"v2\"\nfast_open = true\nconnect_timeout = \"1s\"\nretries = 2\n\
         unhealthy_after_failed_connects = 0\nupstreams = [{}]\n",
        upstreams.join(", ")
    )
}

/// How often this namespace's clients sent data in a SYN and had it acknowledged.
fn fast_opens(namespace: &Namespace) -> u64 {
    let netstat = namespace.run("cat /proc/net/netstat");
    let mut lines = netstat.lines().filter(|line| line.starts_with("TcpExt:"));
    let (names, values) = (lines.next().expect("names"), lines.next().expect("values"));
    let at = names.split(' ').position(|name| name == "TCPFastOpenActive").expect("a kernel with fast open");
    values.split(' ').nth(at).expect("as many values as names").parse().expect("a number")
}

/// Says something at once and wants it back, whole and once.
fn is_served(namespace: &Namespace, to: SocketAddr, text: &str) -> bool {
    let mut client = namespace.inside(|| connect(to)).expect("a client connects");
    exchange(&mut client, text).is_ok_and(|answer| answer == text)
}

fn exchange(client: &mut TcpStream, text: &str) -> std::io::Result<String> {
    client.write_all(text.as_bytes())?;
    client.shutdown(Shutdown::Write)?;
    let mut answer = String::new();
    client.read_to_string(&mut answer)?;
    Ok(answer)
}

fn web(lb: &Balancer) -> SocketAddr {
    lb.ipv4("web")
}

#[test]
fn header_and_first_bytes_ride_on_the_syn_once_there_is_a_cookie() {
    let namespace = match Namespace::new() {
        Ok(namespace) => namespace,
        Err(why) => return skip("fast_open::header_and_first_bytes_ride_on_the_syn_once_there_is_a_cookie", &why),
    };
    namespace.run(FAST_OPEN_FOR_ALL);
    let receiver = namespace.inside(|| Receiver::with_header(echo));
    let lb = preface_in(&namespace, &config(&[&receiver]));
    for number in 0..20 {
        assert!(is_served(&namespace, web(&lb), &format!("question {number}")));
    }
    assert_eq!(receiver.errors(), [""; 0]);
    assert_eq!(receiver.wait_for(20).len(), 20);
    // The first one asks for the cookie.
    assert!(fast_opens(&namespace) >= 18, "{}", fast_opens(&namespace));
    // A client that waits for the server to speak: the header alone rides on the SYN.
    let silent = namespace.inside(|| connect(web(&lb))).expect("a client connects");
    assert_eq!(receiver.wait_for(21)[20].client(), silent.local_addr().expect("a client has an address"));
}

#[test]
fn a_refused_upstream_costs_no_byte_of_the_client() {
    let namespace = match Namespace::new() {
        Ok(namespace) => namespace,
        Err(why) => return skip("fast_open::a_refused_upstream_costs_no_byte_of_the_client", &why),
    };
    namespace.run(FAST_OPEN_FOR_ALL);
    let (gone, stays) = namespace.inside(|| (Receiver::with_header(echo), Receiver::with_header(echo)));
    let lb = preface_in(&namespace, &config(&[&gone, &stays]));
    for number in 0..8 {
        assert!(is_served(&namespace, web(&lb), &format!("both have given a cookie by now {number}")));
    }
    drop(gone);
    for number in 0..10 {
        assert!(is_served(&namespace, web(&lb), &format!("every second one is refused first {number}")));
    }
    assert_eq!(stays.errors(), [""; 0]);
    eventually("five connections took two attempts", || {
        (lb.log().text().matches(" attempts=2 ").count() >= 5).then_some(())
    });
}

#[test]
fn bytes_that_a_silent_upstream_may_have_taken_go_to_no_other() {
    let pair = match Pair::new() {
        Ok(pair) => pair,
        Err(why) => return skip("fast_open::bytes_that_a_silent_upstream_may_have_taken_go_to_no_other", &why),
    };
    pair.left.run(FAST_OPEN_FOR_ALL);
    pair.right.run(FAST_OPEN_FOR_ALL);
    let silent = pair.right.inside(|| Receiver::at("10.231.0.2:0", true, echo));
    let lb = preface_in(&pair.left, &config(&[&silent]));
    for _ in 0..3 {
        assert!(is_served(&pair.left, web(&lb), "a cookie"));
    }
    pair.right.run("nft add table inet cut");
    pair.right.run("nft add chain inet cut input { type filter hook input priority 0 ; policy drop ; }");
    let mut client = pair.left.inside(|| connect(web(&lb))).expect("a client connects");
    assert!(exchange(&mut client, "perhaps taken").is_err(), "reset after the time-out");
    let is_its = |line: &&str| line.contains("end=upstream.connect.timeout");
    let line = eventually("its end is told", || lb.log().text().lines().find(is_its).map(str::to_owned));
    assert!(line.contains(" attempts=1 "), "{line}");
}
