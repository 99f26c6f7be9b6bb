//! Who gets a connection: turns, weights, limits, backups, failures, and the header that each upstream has for itself.

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use preface::proxy_protocol::{Tlv, Version};
use socket2::{Domain, SockRef, Socket, Type};

use crate::hostile::{all_accounted, echo, ends, is_answered, is_refused, raise_descriptor_limit};
use crate::support::{Balancer, Receiver, client, eventually, preface};
use crate::traffic::noise;

fn receivers<const COUNT: usize>() -> [Receiver; COUNT] {
    raise_descriptor_limit();
    std::array::from_fn(|_| Receiver::with_header(echo))
}

/// A listener, and a pool with these lines and these upstreams: addresses with further keys.
fn start(pool: &str, upstreams: &[(SocketAddr, &str)]) -> Balancer {
    let upstreams: Vec<String> = upstreams
        .iter()
        .map(|(address, keys)| format!("[[pools.test.upstreams]]\naddress = \"{address}\"\n{keys}\n"))
        .collect();
    preface(&format!(
        "[listeners.web]\nbind = \"127.0.0.1:0\"\npool = \"test\"\n[pools.test]\nproxy_protocol = \"v2\"\n{pool}\n{}",
        upstreams.concat()
    ))
}

fn connect(balancer: &Balancer) -> io::Result<TcpStream> {
    client::connect(balancer.ipv4("web"))
}

/// Opens connections one after the other, each of them served, and keeps them open.
#[track_caller]
fn hold(balancer: &Balancer, count: usize) -> Vec<io::Result<TcpStream>> {
    let clients: Vec<_> = (0..count)
        .map(|index| {
            let client = connect(balancer);
            assert!(is_answered(&client), "client {index}");
            client
        })
        .collect();
    clients
}

/// The same from many threads at once.
fn hold_at_once(balancer: &Balancer, count: usize) -> Vec<io::Result<TcpStream>> {
    const THREADS: usize = 10;
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..THREADS).map(|_| scope.spawn(|| hold(balancer, count / THREADS))).collect();
        threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
    })
}

fn arrivals(receivers: &[Receiver]) -> Vec<usize> {
    receivers.iter().map(|receiver| receiver.arrivals().len()).collect()
}

/// A port that refuses: bound, and nobody listens.
fn refusing() -> (Socket, SocketAddr) {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    socket.bind(&SocketAddr::from((Ipv4Addr::LOCALHOST, 0)).into()).unwrap();
    let address = socket.local_addr().unwrap().as_socket().unwrap();
    (socket, address)
}

/// A port that never answers: its accept queue is full, so the kernel drops every SYN.
fn blackhole() -> (TcpListener, TcpStream, SocketAddr) {
    let (socket, address) = refusing();
    socket.listen(0).unwrap();
    let queued = TcpStream::connect(address).unwrap();
    assert!(TcpStream::connect_timeout(&address, Duration::from_millis(50)).is_err(), "the queue is full");
    (socket.into(), queued, address)
}

#[test]
fn round_robin_gives_each_its_weight_exactly() {
    for at_once in [false, true] {
        let receivers = receivers::<4>();
        let weights = [5, 2, 1, 0];
        let keys = weights.map(|weight| format!("weight = {weight}"));
        let upstreams: Vec<_> = receivers.iter().zip(&keys).map(|(one, keys)| (one.address, keys.as_str())).collect();
        let balancer = start("", &upstreams);
        let clients = if at_once { hold_at_once(&balancer, 160) } else { hold(&balancer, 160) };
        assert_eq!(arrivals(&receivers), [100, 40, 20, 0], "at once: {at_once}");
        drop(clients);
        all_accounted(|| balancer.metrics());
    }
}

#[test]
fn round_robin_is_spread_evenly_within_a_round() {
    let receivers = receivers::<2>();
    let balancer = start("", &[(receivers[0].address, "weight = 3"), (receivers[1].address, "")]);
    // In every four connections in a row the light one has one, wherever they begin.
    let mut of_light = vec![0];
    for _ in 0..40 {
        drop(hold(&balancer, 1));
        of_light.push(receivers[1].arrivals().len());
    }
    assert!(of_light.windows(5).all(|four| four[4] - four[0] == 1), "{of_light:?}");
}

#[test]
fn least_connections_fills_the_emptiest_for_its_weight() {
    for at_once in [false, true] {
        let receivers = receivers::<3>();
        let upstreams = [(receivers[0].address, "weight = 2"), (receivers[1].address, ""), (receivers[2].address, "")];
        let balancer = start("balance = \"least_connections\"", &upstreams);
        let clients = if at_once { hold_at_once(&balancer, 80) } else { hold(&balancer, 80) };
        assert_eq!(arrivals(&receivers), [40, 20, 20], "at once: {at_once}");
        // Those of one upstream leave: it gets all of the next ones until it has as many as the others.
        let of_second: Vec<_> = receivers[1].arrivals().iter().map(|arrival| arrival.client()).collect();
        let stay =
            |client: &io::Result<TcpStream>| !of_second.contains(&client.as_ref().unwrap().local_addr().unwrap());
        let clients: Vec<_> = clients.into_iter().filter(stay).collect();
        let open = || balancer.metric("preface_upstream_connections_open", &[]);
        eventually("they have left", || (open() == 60.0).then_some(()));
        let more = if at_once { hold_at_once(&balancer, 20) } else { hold(&balancer, 20) };
        assert_eq!(arrivals(&receivers), [40, 40, 20], "at once: {at_once}");
        drop((clients, more));
    }
}

#[test]
fn random_two_is_roughly_even_and_prefers_the_idle() {
    let receivers = receivers::<4>();
    let upstreams: Vec<_> = receivers.iter().map(|receiver| (receiver.address, "")).collect();
    let balancer = start("balance = \"random_two\"", &upstreams);
    let clients = hold(&balancer, 200);
    let counts = arrivals(&receivers);
    assert_eq!(counts.iter().sum::<usize>(), 200);
    // The lesser of two, drawn at random: far closer together than one draw would be.
    assert!(counts.iter().all(|count| (40..=60).contains(count)), "{counts:?}");
    drop(clients);
}

#[test]
fn a_backup_takes_what_the_others_have_no_room_for() {
    let receivers = receivers::<3>();
    let upstreams = [
        (receivers[0].address, "max_connections = 3"),
        (receivers[1].address, ""),
        (receivers[2].address, "backup = true"),
    ];
    for balance in ["round_robin", "least_connections", "random_two"] {
        let before = arrivals(&receivers);
        let balancer = start(&format!("balance = \"{balance}\"\nmax_connections = 5"), &upstreams);
        let clients = hold(&balancer, 8);
        let since = |before: &[usize]| -> Vec<usize> {
            arrivals(&receivers).iter().zip(before).map(|(now, before)| now - before).collect()
        };
        assert_eq!(since(&before), [3, 5, 0], "{balance}");
        let overflow = hold(&balancer, 5);
        assert_eq!(since(&before), [3, 5, 5], "{balance}");
        assert!(is_refused(connect(&balancer)));
        assert_eq!(ends(&balancer), BTreeMap::from([("preface.connect.upstreams_full".to_owned(), 1)]));
        drop((clients, overflow));
        all_accounted(|| balancer.metrics());
    }
}

#[test]
fn a_dead_upstream_costs_no_client_a_failure() {
    let receivers = receivers::<2>();
    let (_socket, dead) = refusing();
    for balance in ["round_robin", "least_connections", "random_two"] {
        let upstreams = [(dead, ""), (receivers[0].address, ""), (receivers[1].address, "")];
        let balancer = start(&format!("balance = \"{balance}\""), &upstreams);
        drop(hold_at_once(&balancer, 200));
        let ends = all_accounted(|| balancer.metrics());
        assert_eq!(ends, BTreeMap::from([("client.relay.closed".to_owned(), 200)]), "{balance}");
        // Three in a row, and it is left alone; some were on their way to it already.
        let failures = balancer.metric("preface_upstream_connect_failures_total", &[("upstream", &dead.to_string())]);
        assert!((3.0..=30.0).contains(&failures), "{balance}: {failures}");
        balancer.log().wait_for("the ejection", |line| {
            line.contains("event=health") && line.contains(&format!("upstream={dead} health=unhealthy"))
        });
    }
}

#[test]
fn when_all_are_dead_the_client_is_reset_and_the_last_one_stays_in() {
    let (dead, other) = (refusing(), refusing());
    let balancer = start("", &[(dead.1, ""), (other.1, "")]);
    for _ in 0..5 {
        assert!(is_refused(connect(&balancer)));
    }
    let ends = all_accounted(|| balancer.metrics());
    assert_eq!(ends, BTreeMap::from([("upstream.connect.refused".to_owned(), 5)]));
    // One was ejected; the last usable one never is.
    let unhealthy = balancer.metric("preface_upstream_health", &[("health", "unhealthy")]);
    assert!(unhealthy <= 1.0, "{unhealthy}");
}

#[test]
fn the_only_upstream_is_tried_again_after_100_ms() {
    let (socket, address) = refusing();
    let balancer = start("retries = 10\nconnect_deadline = \"20s\"", &[(address, "")]);
    let begun = Instant::now();
    let mut client = connect(&balancer).unwrap();
    client.write_all(b"early").unwrap();
    eventually("it was refused", || {
        (balancer.metric("preface_upstream_connect_failures_total", &[]) >= 1.0).then_some(())
    });
    socket.listen(16).unwrap();
    let (mut server, header) = crate::traffic::accept(&socket.into());
    assert!(begun.elapsed() >= Duration::from_millis(100));
    assert_eq!(header.addresses.ends().unwrap().0, client.local_addr().unwrap());
    let mut heard = [0; 5];
    server.read_exact(&mut heard).unwrap();
    assert_eq!(&heard, b"early");
    // Without a happy end: as many attempts as `retries` says, 100 ms apart.
    let (_socket, address) = refusing();
    let balancer = start("retries = 3", &[(address, "")]);
    let begun = Instant::now();
    assert!(is_refused(connect(&balancer)));
    assert!(begun.elapsed() >= Duration::from_millis(300));
    balancer.log().wait_for("its line", |line| line.ends_with("attempts=4 end=upstream.connect.refused"));
}

#[test]
fn a_retry_carries_the_next_upstreams_own_header_and_the_clients_early_bytes() {
    let (_listening, _queued, nobody) = blackhole();
    let (_socket, dead) = refusing();
    let receivers = receivers::<2>();
    let said = noise(1, 100_000);
    for first in [nobody, dead] {
        let upstreams = [
            (first, "proxy_protocol = \"v1\""),
            (receivers[0].address, "proxy_protocol = \"v2\"\ntlvs = { vpce_id = \"vpce-0a\", crc32c = true }"),
            (receivers[1].address, "proxy_protocol = \"v1\""),
        ];
        let pool = "connect_timeout = \"250ms\"\nunhealthy_after_failed_connects = 0";
        let before = arrivals(&receivers);
        let balancer = start(pool, &upstreams);
        for _ in 0..6 {
            let mut client = connect(&balancer).unwrap();
            let answer = std::thread::scope(|scope| {
                let mut writer = client.try_clone().unwrap();
                let said = &said;
                scope.spawn(move || {
                    writer.write_all(said).unwrap();
                    writer.shutdown(std::net::Shutdown::Write).unwrap();
                });
                let mut answer = Vec::new();
                client.read_to_end(&mut answer).unwrap();
                answer
            });
            assert!(answer == said, "the echo differs");
        }
        let retried = balancer.log().wait_for_count("lines", 6, |line| line.contains("event=connection"));
        assert!(retried.iter().any(|line| line.contains(" attempts=2 ")), "{retried:?}");
        assert!(receivers.iter().all(|receiver| receiver.errors().is_empty()));
        for (receiver, (version, before)) in receivers.iter().zip([Version::V2, Version::V1].into_iter().zip(before)) {
            let arrivals = receiver.arrivals().split_off(before);
            assert!(!arrivals.is_empty());
            for arrival in arrivals {
                let header = arrival.header.unwrap();
                assert_eq!(header.version, version);
                let has_endpoint = header.tlvs.contains(&Tlv::AwsVpcEndpoint("vpce-0a".into()));
                assert_eq!(has_endpoint, version == Version::V2);
                assert!(said.starts_with(&arrival.behind));
            }
        }
    }
}

#[test]
fn an_upstream_that_never_answers_costs_connect_timeout_once() {
    let (_listening, _queued, nobody) = blackhole();
    let receivers = receivers::<1>();
    let alone = start("connect_timeout = \"200ms\"\nretries = 1", &[(nobody, "")]);
    let begun = Instant::now();
    assert!(is_refused(connect(&alone)));
    assert!(begun.elapsed() >= Duration::from_millis(500), "two attempts, and 100 ms between them");
    assert_eq!(all_accounted(|| alone.metrics()), BTreeMap::from([("upstream.connect.timeout".to_owned(), 1)]));
    let deadline = start("connect_timeout = \"300ms\"\nconnect_deadline = \"300ms\"", &[(nobody, "")]);
    let begun = Instant::now();
    assert!(is_refused(connect(&deadline)));
    assert!((300..2000).contains(&begun.elapsed().as_millis()), "{:?}", begun.elapsed());
    assert_eq!(all_accounted(|| deadline.metrics()), BTreeMap::from([("upstream.connect.timeout".to_owned(), 1)]));
    let pair = start("connect_timeout = \"200ms\"", &[(nobody, ""), (receivers[0].address, "")]);
    drop(hold_at_once(&pair, 20));
    assert_eq!(all_accounted(|| pair.metrics()), BTreeMap::from([("client.relay.closed".to_owned(), 20)]));
}

#[test]
fn a_retry_goes_by_the_orders_of_now() {
    let (_listening, _queued, nobody) = blackhole();
    let [receiver] = receivers::<1>();
    let balancer = start("connect_timeout = \"1s\"\nretries = 1", &[(nobody, ""), (receiver.address, "")]);
    let client = connect(&balancer);
    let upstream = nobody.to_string();
    eventually("the client's connection is on its way to nobody", || {
        (balancer.metric("preface_upstream_connections_open", &[("upstream", &upstream)]) == 1.0).then_some(())
    });
    let order = format!("/pools/test/upstreams/{}/disable", receiver.address);
    assert_eq!(balancer.ask("POST", &order).status, 200);
    assert!(is_refused(client));
    balancer.log().wait_for("its line", |line| line.ends_with(" end=upstream.connect.timeout"));
    assert_eq!(receiver.arrivals().len(), 0);
}

#[test]
fn a_client_that_resets_while_its_upstream_is_connected_to_gives_its_place_back() {
    let (_listening, _queued, nobody) = blackhole();
    let balancer = start("connect_timeout = \"60s\"\nconnect_deadline = \"60s\"", &[(nobody, "")]);
    let client = connect(&balancer).unwrap();
    let open = || balancer.metric("preface_upstream_connections_open", &[("upstream", &nobody.to_string())]);
    eventually("the client's connection is on its way to nobody", || (open() == 1.0).then_some(()));
    SockRef::from(&client).set_linger(Some(Duration::ZERO)).unwrap();
    drop(client);
    balancer.log().wait_for("its line", |line| line.ends_with(" end=client.relay.reset"));
    assert_eq!(open(), 0.0);
    assert_eq!(balancer.metric("preface_upstream_connect_failures_total", &[]), 0.0, "it was not the upstream");
}

#[test]
fn a_client_that_half_closes_while_its_upstream_is_connected_to_still_gets_its_answer() {
    let (listening, _queued, upstream) = blackhole();
    let balancer = start("connect_timeout = \"15s\"\nconnect_deadline = \"15s\"", &[(upstream, "")]);
    let mut client = connect(&balancer).unwrap();
    client.write_all(b"question").and_then(|()| client.shutdown(Shutdown::Write)).unwrap();
    let open = || balancer.metric("preface_upstream_connections_open", &[("upstream", &upstream.to_string())]);
    eventually("the client's connection is on its way", || (open() == 1.0).then_some(()));
    // Room for the SYN when it comes once more.
    drop(listening.accept().unwrap());
    let (mut server, _) = listening.accept().unwrap();
    let mut asked = Vec::new();
    server.read_to_end(&mut asked).unwrap();
    assert!(asked.ends_with(b"question"), "{asked:?}");
    server.write_all(b"answer").unwrap();
    drop(server);
    let mut answer = String::new();
    client.read_to_string(&mut answer).unwrap();
    assert_eq!(answer, "answer");
}

#[test]
fn a_deadline_as_short_as_one_attempt_still_ejects_who_never_answers() {
    let (_listening, _queued, nobody) = blackhole();
    let [receiver] = receivers::<1>();
    let pool = "connect_timeout = \"200ms\"\nconnect_deadline = \"200ms\"";
    let balancer = start(pool, &[(nobody, ""), (receiver.address, "")]);
    let clients: Vec<_> = (0..6).map(|_| connect(&balancer)).collect();
    assert_eq!(clients.into_iter().filter_map(|client| is_answered(&client).then_some(())).count(), 3);
    let upstream = nobody.to_string();
    eventually("nobody is out", || {
        let labels = [("upstream", upstream.as_str()), ("health", "unhealthy")];
        (balancer.metric("preface_upstream_health", &labels) == 1.0).then_some(())
    });
}

#[test]
fn when_none_is_healthy_the_pool_refuses_or_uses_all() {
    const CHECK: &str = "[pools.test.health_check]\ninterval = \"100ms\"\nunhealthy_threshold = 1\n";
    let healthy = |balancer: &Balancer, health: &str| balancer.metric("preface_upstream_health", &[("health", health)]);
    for (when, end) in [("refuse", "preface.connect.no_upstream"), ("use_all", "upstream.connect.refused")] {
        let (dead, other) = (refusing(), refusing());
        let pool = format!("when_none_healthy = \"{when}\"\n{CHECK}");
        let balancer = start(&pool, &[(dead.1, ""), (other.1, "backup = true")]);
        eventually("both are unhealthy", || (healthy(&balancer, "unhealthy") == 2.0).then_some(()));
        assert!(is_refused(connect(&balancer)));
        assert_eq!(all_accounted(|| balancer.metrics()), BTreeMap::from([(end.to_owned(), 1)]));
        // One comes back, and is used as soon as the check has seen it.
        other.0.listen(16).unwrap();
        eventually("it is healthy", || (healthy(&balancer, "healthy") == 1.0).then_some(()));
        let client = connect(&balancer).unwrap();
        let upstream = other.0.into();
        // Checks come with the command LOCAL.
        let ends = std::iter::repeat_with(|| crate::traffic::accept(&upstream))
            .find_map(|(_, header)| header.addresses.ends());
        assert_eq!(ends.unwrap().0, client.local_addr().unwrap());
    }
}

#[test]
fn a_source_address_that_is_not_ours_is_our_own_failure() {
    let receivers = receivers::<1>();
    let balancer = start("source = \"198.51.100.1\"", &[(receivers[0].address, "")]);
    for _ in 0..5 {
        assert!(is_refused(connect(&balancer)));
    }
    let ends = all_accounted(|| balancer.metrics());
    assert_eq!(ends, BTreeMap::from([("preface.connect.local_resources".to_owned(), 5)]));
    assert_eq!(balancer.metric("preface_upstream_connect_failures_total", &[]), 0.0);
    assert_eq!(balancer.metric("preface_upstream_health", &[("health", "healthy")]), 1.0);
}

#[test]
fn source_addresses_are_used_in_turn() {
    let receivers = receivers::<1>();
    let balancer = start("source = [\"127.0.0.21\", \"127.0.0.22\"]", &[(receivers[0].address, "")]);
    drop(hold(&balancer, 40));
    let mut count = BTreeMap::new();
    receivers[0].arrivals().iter().for_each(|arrival| *count.entry(arrival.peer.ip()).or_insert(0) += 1);
    // In turn on each worker, so at most one apart for each.
    assert_eq!(count.keys().map(ToString::to_string).collect::<Vec<_>>(), ["127.0.0.21", "127.0.0.22"]);
    assert!(count.values().all(|count| (19..=21).contains(count)), "{count:?}");
}
