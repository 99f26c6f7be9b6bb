//! What an operator does in a bad week, on two hosts at once, under load: an upgrade, a replica taken out and put back, an
//! upstream's name that moves, an upstream that is cut off. No client fails.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use rustix::process::{Signal, kill_process};

use crate::scaling::{Anycast, Nginx, Seen, WAYS, try_where};
use crate::support::client::connect_from;
use crate::support::zone::Zone;
use crate::support::{eventually, skip};
use crate::upgrade::{Upgraded, pid};

const PORT: u16 = 8080;
const SERVICE: ([u8; 4], u16) = ([10, 232, 9, 9], 80);
/// Each is one client, with an address of its own.
const CLIENTS: u8 = 8;

/// What clients were told, or how they failed.
type Visits = Arc<Mutex<Vec<Result<Seen, String>>>>;

/// Clients that connect again and again.
struct Load {
    stop: Arc<AtomicBool>,
    visits: Visits,
    threads: Vec<JoinHandle<()>>,
}

impl Load {
    fn start(anycast: &Anycast) -> Load {
        let (stop, visits) = (Arc::<AtomicBool>::default(), Visits::default());
        let spawn = |client: u8| {
            let (stop, visits) = (Arc::clone(&stop), Arc::clone(&visits));
            std::thread::spawn(move || {
                while !stop.load(Relaxed) {
                    let source = IpAddr::from([10, 232, 100, client]);
                    let visit = connect_from(source, SocketAddr::from(SERVICE)).and_then(try_where);
                    let visit = visit.map_err(|error| format!("{source}: {error}"));
                    visits.lock().expect("no client panics").push(visit);
                }
            })
        };
        // A thread stays where it was started.
        let threads = anycast.clients.inside(|| (1..=CLIENTS).map(spawn).collect());
        Load { stop, visits, threads }
    }

    /// Waits until there were so many more visits; those that have ended since the call, all without a failure.
    #[track_caller]
    fn more(&self, count: usize) -> Vec<(SocketAddr, IpAddr)> {
        let visits = || self.visits.lock().expect("no client panics");
        let before = visits().len();
        eventually("clients are served", || (visits().len() >= before + count).then_some(()));
        let visits = visits();
        let failed: Vec<&String> = visits.iter().filter_map(|visit| visit.as_ref().err()).collect();
        assert!(failed.is_empty(), "of {} clients failed {failed:?}", visits.len());
        visits[before..].iter().flatten().map(|seen| (seen.server, seen.peer)).collect()
    }

    /// Waits until clients reach exactly these upstreams, by exactly these hosts.
    #[track_caller]
    fn wait_for(&self, what: &str, upstreams: &[SocketAddr], hosts: &[usize]) {
        let hosts: BTreeSet<IpAddr> = hosts.iter().map(|host| WAYS[*host].1.parse().expect("an address")).collect();
        let upstreams: BTreeSet<SocketAddr> = upstreams.iter().copied().collect();
        eventually(what, || {
            let visits = self.more(50);
            let seen: (BTreeSet<_>, BTreeSet<_>) = visits.into_iter().unzip();
            (seen == (upstreams.clone(), hosts.clone())).then_some(())
        });
    }

    #[track_caller]
    fn finish(self) {
        self.more(50);
        self.stop.store(true, Relaxed);
        self.threads.into_iter().for_each(|thread| thread.join().expect("no client panics"));
        let visits = self.visits.lock().expect("no client panics");
        assert!(visits.iter().all(Result::is_ok), "{visits:?}");
    }
}

/// Sends new connections to 10.232.9.9:80 to these hosts in turn, as kube-proxy does for a Service: what is open stays where
/// it is.
fn serve_by(anycast: &Anycast, hosts: &[usize]) {
    let elements: Vec<String> =
        hosts.iter().enumerate().map(|(number, host)| format!("{number}:{}", WAYS[*host].0)).collect();
    let rule = format!("numgen inc mod {} map {{{}}}:{PORT}", hosts.len(), elements.join(","));
    anycast.clients.run("nft add table ip service");
    anycast.clients.run("nft add chain ip service output {type nat hook output priority -100;}");
    anycast.clients.run(&format!(
        "nft flush chain ip service output; add rule ip service output ip daddr 10.232.9.9 tcp dport 80 dnat to {rule}"
    ));
}

/// From now on nothing reaches this upstream, nor leaves it.
fn cut_off(anycast: &Anycast, upstream: SocketAddr) {
    anycast.upstreams.run("nft add table ip cut");
    for (hook, end) in [("input", "daddr"), ("output", "saddr")] {
        anycast.upstreams.run(&format!("nft add chain ip cut {hook} {{type filter hook {hook} priority 0;}}"));
        anycast.upstreams.run(&format!("nft add rule ip cut {hook} ip {end} {} drop", upstream.ip()));
    }
}

#[test]
fn no_client_fails_over_upgrade_drain_a_names_move_and_an_upstream_cut_off() {
    let test = "two_hosts::no_client_fails_over_upgrade_drain_a_names_move_and_an_upstream_cut_off";
    let anycast = match Anycast::new() {
        Ok(anycast) => anycast,
        Err(why) => return skip(test, &why),
    };
    let upstreams: [SocketAddr; 3] = std::array::from_fn(|index| SocketAddr::from(([10, 232, 5, index as u8 + 1], 80)));
    let [a, b, c] = upstreams;
    let _nginx = Nginx::start(Some(&anycast.upstreams), &upstreams);
    let record = |upstream: SocketAddr| format!("web 1 A {}", upstream.ip());
    let mut zones = [0, 1].map(|host| Zone::serve(&anycast.hosts[host], &[&record(a), &record(b)]));
    let config = format!(
        "[runtime]\nstop_delay = \"1s\"\n[listeners.web]\nbind = \":{PORT}\"\npool = \"web\"\n\
         [pools.web]\nproxy_protocol = \"v2\"\nupstreams = [\"web.test.:80\"]\nconnect_timeout = \"300ms\"\n\
         [pools.web.health_check]\nprotocol = \"http\"\ninterval = \"200ms\"\ntimeout = \"300ms\"\n"
    );
    let start = |host: usize| Upgraded::start_by(|program| anycast.hosts[host].command(program), &config);
    let mut replicas = [start(0), start(1)];
    for replica in &replicas {
        [a, b].iter().for_each(|upstream| drop(replica.balancer.wait_health("web", *upstream, "healthy")));
    }
    serve_by(&anycast, &[0, 1]);
    anycast.clients.run("ip route add 10.232.9.9/32 via 10.232.1.2");
    let load = Load::start(&anycast);
    load.wait_for("both hosts and both upstreams take part", &[a, b], &[0, 1]);

    // A new version, in place.
    let before = replicas[0].serving();
    replicas[0].upgrade();
    replicas[0].wait_end(before);
    load.wait_for("the upgraded one serves", &[a, b], &[0, 1]);

    // The host is taken out: it says so, the Service leaves it, it ends; and it comes back.
    let serving = replicas[0].serving();
    kill_process(pid(serving), Signal::TERM).expect("it runs");
    eventually("not ready", || (replicas[0].balancer.ask("GET", "/readyz").status == 503).then_some(()));
    serve_by(&anycast, &[1]);
    replicas[0].wait_end(serving);
    load.wait_for("the other host serves alone", &[a, b], &[1]);
    replicas[0] = start(0);
    [a, b].iter().for_each(|upstream| drop(replicas[0].balancer.wait_health("web", *upstream, "healthy")));
    serve_by(&anycast, &[0, 1]);
    load.wait_for("both hosts serve", &[a, b], &[0, 1]);

    // The name moves: one address goes, one comes.
    zones.iter_mut().for_each(|zone| zone.change(&[&record(b), &record(c)]));
    load.wait_for("the new addresses serve", &[b, c], &[0, 1]);

    // One of them is cut off. Who is connected to it waits; the next ones go elsewhere.
    cut_off(&anycast, b);
    load.wait_for("the one that is left serves", &[c], &[0, 1]);
    for replica in &replicas {
        replica.balancer.wait_health("web", b, "unhealthy");
    }
    anycast.upstreams.run("nft delete table ip cut");
    load.wait_for("both serve again", &[b, c], &[0, 1]);
    load.finish();
    drop(zones);
}
