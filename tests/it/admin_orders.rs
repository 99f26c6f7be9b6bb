//! What becomes of connections when an upstream leaves, by configuration, order or health; and what outlives a reload.

use std::io::{self, Read};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};

use crate::load::{connect_and_exchange, exchange};
use crate::reload::list;
use crate::support::ports::free_port;
use crate::support::receiver::{echo, say_who};
use crate::support::{Balancer, Receiver, client, eventually, preface};

/// One listener, one pool "web", and what the test adds to both.
fn config(port: u16, pool: &str, settings: &str, upstreams: &[SocketAddr]) -> String {
    let upstreams = list(upstreams.iter().copied());
    format!(
        "[listeners.web]\nbind = \"127.0.0.1:{port}\"\npool = {pool:?}\n\
         [pools.{pool}]\nproxy_protocol = \"v2\"\nupstreams = {upstreams}\n{settings}\n"
    )
}

fn loopback(port: u16) -> SocketAddr {
    (Ipv4Addr::LOCALHOST, port).into()
}

/// Two echoes behind one listener, and a connection to each, in their order.
struct Scene {
    port: u16,
    echoes: [Receiver; 2],
    balancer: Balancer,
    streams: [TcpStream; 2],
}

impl Scene {
    #[track_caller]
    fn new(settings: &str) -> Scene {
        let echoes = [Receiver::with_header(echo), Receiver::with_header(echo)];
        let port = free_port();
        let balancer = preface(&config(port, "web", settings, &[echoes[0].address, echoes[1].address]));
        let streams = [(); 2].map(|()| {
            let mut stream = client::connect(loopback(port)).unwrap();
            exchange(&mut stream, 1, 100).unwrap();
            stream
        });
        assert_eq!(echoes.each_ref().map(|echo| echo.wait_for(1).len()), [1, 1], "round robin");
        let first = echoes[0].arrivals()[0].client();
        let [a, b] = streams;
        let streams = if a.local_addr().unwrap() == first { [a, b] } else { [b, a] };
        Scene { port, echoes, balancer, streams }
    }

    fn addresses(&self) -> [SocketAddr; 2] {
        self.echoes.each_ref().map(|echo| echo.address)
    }

    #[track_caller]
    fn order(&self, path: &str) -> String {
        let [first, _] = self.addresses();
        let response = self.balancer.ask("POST", &format!("/pools/web/upstreams/{first}/{path}"));
        assert_eq!(response.status, 200, "{}", response.text());
        response.text()
    }

    /// Makes new connections: how many went to each.
    #[track_caller]
    fn spread(&self, count: usize) -> [usize; 2] {
        let before = self.echoes.each_ref().map(|echo| echo.arrivals().len());
        for seed in 0..count {
            connect_and_exchange(loopback(self.port), seed as u64).unwrap();
        }
        let after = self.echoes.each_ref().map(|echo| echo.arrivals().len());
        [after[0] - before[0], after[1] - before[1]]
    }

    #[track_caller]
    fn assert_open(&mut self, index: usize) {
        exchange(&mut self.streams[index], 2, 1_000).unwrap_or_else(|error| panic!("connection {index}: {error}"));
    }

    /// The connection to that upstream is reset, with this cause in log and metric.
    #[track_caller]
    fn assert_reset(&mut self, index: usize, why: &str) {
        assert_eq!(self.streams[index].read(&mut [0; 1]).unwrap_err().kind(), io::ErrorKind::ConnectionReset);
        let client = format!("client={} ", self.streams[index].local_addr().unwrap());
        let line = self.balancer.log().wait_for("the end", |line| line.contains(&client));
        assert!(line.ends_with(&format!("end=preface.relay.{why}")), "{line}");
        assert!(self.balancer.metric("preface_connections_ended_total", &[("phase", "relay"), ("why", why)]) >= 1.0);
    }

    fn upstream(&self, pool: &str, index: usize) -> serde_json::Value {
        let address = self.addresses()[index].to_string();
        let status = self.balancer.status();
        let upstreams = status["pools"][pool]["upstreams"].as_array().expect("a pool of that name");
        upstreams.iter().find(|upstream| upstream["address"] == address).expect("an upstream of that address").clone()
    }
}

#[test]
fn connections_to_a_removed_upstream_have_their_drain_timeout() {
    let mut scene = Scene::new("drain_timeout = \"300ms\"");
    let [_, second] = scene.addresses();
    let upstreams = [second];
    scene.balancer.apply(&config(scene.port, "web", "drain_timeout = \"1h\"", &upstreams));
    // What counts is the time that stood in the pool while the upstream was in it.
    assert_eq!(scene.spread(4), [0, 4]);
    scene.assert_reset(0, "drain_timeout");
    scene.assert_open(1);
}

#[test]
fn an_upstream_that_comes_back_in_time_keeps_its_connections() {
    let mut scene = Scene::new("drain_timeout = \"700ms\"");
    let [first, second] = scene.addresses();
    let settings = "drain_timeout = \"700ms\"";
    scene.balancer.apply(&config(scene.port, "web", settings, &[second]));
    scene.balancer.apply(&config(scene.port, "web", settings, &[first, second]));
    let before = scene.upstream("web", 0);
    assert_eq!((&before["open"], &before["connections"]), (&1.into(), &1.into()), "it is the same upstream");
    // What is removed after it has come to its end by the time that it would have been reset.
    scene.balancer.apply(&config(scene.port, "web", settings, &[first]));
    scene.assert_reset(1, "drain_timeout");
    scene.assert_open(0);
}

#[test]
fn a_renamed_pool_has_the_same_upstreams() {
    let probes = Receiver::plain(say_who);
    let settings =
        |pool: &str| format!("[pools.{pool}.health_check]\nport = {}\ninterval = \"50ms\"", probes.address.port());
    let mut scene = Scene::new(&settings("web"));
    eventually("both are checked", || {
        (0..2).all(|index| scene.upstream("web", index)["health"] == "healthy").then_some(())
    });
    scene.order("drain?timeout=1s");
    let since = scene.upstream("web", 0);
    let addresses = scene.addresses();
    scene.balancer.apply(&config(scene.port, "other", &settings("other"), &addresses));
    let now = scene.upstream("other", 0);
    for key in ["open", "connections", "admin", "admin_since", "admin_by", "health", "health_since"] {
        assert_eq!(now[key], since[key], "{key}");
    }
    assert_eq!(scene.spread(4), [0, 4]);
    // The operator's time goes on under the new name.
    scene.assert_reset(0, "drain_timeout");
    scene.assert_open(1);
}

#[test]
fn a_drained_upstream_gets_nothing_new_and_keeps_what_it_has() {
    let mut scene = Scene::new("");
    assert!(scene.order("drain").contains(&scene.addresses()[0].to_string()));
    assert_eq!(scene.spread(6), [0, 6]);
    let drained = scene.upstream("web", 0);
    assert_eq!((&drained["admin"], &drained["open"]), (&"draining".into(), &1.into()));
    assert_eq!(drained["health"], "healthy", "health and admin state are two things");
    // Whatever the reload changes, the order stands, and says since when.
    let addresses = scene.addresses();
    for retries in 3..6 {
        scene.balancer.apply(&config(scene.port, "web", &format!("retries = {retries}"), &addresses));
        let now = scene.upstream("web", 0);
        assert_eq!((&now["admin"], &now["admin_since"]), (&drained["admin"], &drained["admin_since"]));
    }
    assert_eq!(scene.spread(6), [0, 6]);
    scene.assert_open(0);
    scene.order("enable");
    assert_eq!(scene.spread(6), [3, 3]);
    assert!(scene.upstream("web", 0)["admin_since"].is_null());
    scene.assert_open(0);
}

#[test]
fn the_last_order_counts() {
    let mut scene = Scene::new("");
    // Its time would be over first; but it was called off, and the drain that follows has no end.
    scene.order("drain?timeout=200ms");
    scene.order("enable");
    scene.order("drain");
    scene.order("drain?timeout=300ms");
    scene.order("drain?timeout=1h");
    // A second upstream measures the time.
    let second = scene.addresses()[1];
    let response = scene.balancer.ask("POST", &format!("/pools/web/upstreams/{second}/drain?timeout=600ms"));
    assert_eq!(response.status, 200);
    scene.assert_reset(1, "drain_timeout");
    scene.assert_open(0);
}

#[test]
fn a_drain_with_a_time_ends_in_a_reset() {
    let mut scene = Scene::new("");
    scene.order("drain?timeout=200ms");
    scene.assert_reset(0, "drain_timeout");
    scene.assert_open(1);
    assert_eq!(scene.upstream("web", 0)["admin"], "draining");
}

#[test]
fn disabling_resets_at_once_and_survives_reloads() {
    let mut scene = Scene::new("");
    scene.order("disable");
    scene.assert_reset(0, "disabled");
    scene.assert_open(1);
    let addresses = scene.addresses();
    scene.balancer.apply(&config(scene.port, "web", "retries = 3", &addresses));
    assert_eq!(scene.upstream("web", 0)["admin"], "disabled");
    assert_eq!(scene.spread(4), [0, 4]);
    scene.order("enable");
    assert_eq!(scene.spread(4), [2, 2]);
}

#[test]
fn unhealthy_upstreams_lose_their_connections_only_if_the_pool_says_so() {
    for (on_unhealthy, other) in [("close", "keep"), ("keep", "close")] {
        let probes = Receiver::plain(say_who);
        let settings = |on_unhealthy: &str| {
            format!(
                "on_unhealthy = {on_unhealthy:?}\n[pools.web.health_check]\nport = {}\ninterval = \"50ms\"",
                probes.address.port()
            )
        };
        // What counts is what is in force when it turns unhealthy.
        let mut scene = Scene::new(&settings(other));
        let addresses = scene.addresses();
        scene.balancer.apply(&config(scene.port, "web", &settings(on_unhealthy), &addresses));
        eventually("both are healthy", || {
            (0..2).all(|index| scene.upstream("web", index)["health"] == "healthy").then_some(())
        });
        drop(probes);
        eventually("both are unhealthy", || {
            (0..2).all(|index| scene.upstream("web", index)["health"] == "unhealthy").then_some(())
        });
        for index in 0..2 {
            match on_unhealthy {
                "close" => scene.assert_reset(index, "unhealthy"),
                _ => scene.assert_open(index),
            }
        }
    }
}

#[test]
fn health_outlives_reloads() {
    let dead = loopback(free_port());
    let alive = Receiver::with_header(echo);
    let port = free_port();
    let config = |step: usize| {
        let check = format!("retries = {}\n[pools.web.health_check]\ninterval = \"100ms\"", step % 10);
        config(port, "web", &check, &[dead, alive.address])
    };
    let mut balancer = preface(&config(0));
    let state = |balancer: &Balancer| {
        let status = balancer.status();
        let upstreams = status["pools"]["web"]["upstreams"].as_array().unwrap().clone();
        let both = |upstream: &serde_json::Value| {
            (upstream["health"].as_str().unwrap().to_owned(), upstream["health_since"].clone())
        };
        let of = |address: SocketAddr| {
            both(upstreams.iter().find(|upstream| upstream["address"] == address.to_string()).unwrap())
        };
        [of(dead), of(alive.address)]
    };
    let checked = eventually("both are checked", || {
        let state = state(&balancer);
        (state[0].0 == "unhealthy" && state[1].0 == "healthy").then_some(state)
    });
    for step in 1..=50 {
        balancer.apply(&config(step));
        assert_eq!(state(&balancer), checked, "after reload {step}");
    }
    for seed in 0..10 {
        connect_and_exchange(loopback(port), seed).unwrap();
    }
    assert_eq!(balancer.metric("preface_upstream_connect_failures_total", &[]), 0.0, "the dead one is not tried");
}

#[test]
fn an_upstream_that_joins_starts_slowly() {
    let mut scene = Scene::new("slow_start = \"1h\"");
    let [first, second] = scene.addresses();
    assert_eq!(scene.spread(34), [17, 17], "at the start of the process nobody is spared");
    let slowly = |scene: &Scene, time: &str, upstreams: &[SocketAddr]| {
        config(scene.port, "web", &format!("slow_start = {time:?}"), upstreams)
    };
    let alone = slowly(&scene, "1h", &[second]);
    scene.balancer.apply(&alone);
    let joined = slowly(&scene, "1h", &[first, second]);
    scene.balancer.apply(&joined);
    // One of sixteen steps of the weight in the first 1/16 of the hour.
    assert_eq!(scene.spread(34), [2, 32]);
    // Other reloads do not begin it anew, nor end it.
    scene.balancer.apply(&(joined + "retries = 5\n"));
    assert_eq!(scene.spread(34), [2, 32]);
    let off = slowly(&scene, "0s", &[first, second]);
    scene.balancer.apply(&off);
    assert_eq!(scene.spread(34), [17, 17]);
    // And a short one comes to its end by itself.
    let alone = slowly(&scene, "200ms", &[second]);
    scene.balancer.apply(&alone);
    let joined = slowly(&scene, "200ms", &[first, second]);
    scene.balancer.apply(&joined);
    eventually("full weight", || (scene.spread(34) == [17, 17]).then_some(()));
}
