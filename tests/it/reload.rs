//! Reloads of the running program: what stays, what changes, and that nobody notices. Behaviours 6, 7 and 9.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::Command;

use rustix::process::Signal;
use socket2::{Domain, Socket, Type};

use crate::load::{Budget, Clients, Echo, Refused, Transfer, connect_and_exchange, exchange};
use crate::support::ports::free_port;
use crate::support::receiver::echo;
use crate::support::{Balancer, Process, Receiver, client, configmap::configmap_swap, eventually, preface, program};

/// One line of /proc/PID/net/tcp or tcp6.
struct SocketLine {
    inode: u64,
    local_port: u16,
    remote_port: u16,
    listens: bool,
    /// Kind of the timer that runs (2: keepalive) and its rest in hundredths of a second.
    timer: (u8, u64),
}

impl SocketLine {
    fn parse(line: &str) -> SocketLine {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let port = |field: &str| u16::from_str_radix(field.rsplit_once(':').unwrap().1, 16).unwrap();
        let (kind, rest) = fields[5].split_once(':').unwrap();
        SocketLine {
            inode: fields[9].parse().unwrap(),
            local_port: port(fields[1]),
            remote_port: port(fields[2]),
            listens: fields[3] == "0A",
            timer: (u8::from_str_radix(kind, 16).unwrap(), u64::from_str_radix(rest, 16).unwrap()),
        }
    }
}

fn sockets(process: &str) -> impl Iterator<Item = impl Iterator<Item = SocketLine>> {
    ["tcp", "tcp6"].into_iter().map(move |file| {
        let table = BufReader::new(File::open(format!("/proc/{process}/net/{file}")).unwrap());
        table.lines().skip(1).map(|line| SocketLine::parse(&line.unwrap()))
    })
}

/// The sockets that listen on each of these ports, by their inodes.
pub fn listening<const N: usize>(balancer: &Balancer, ports: [u16; N]) -> [BTreeSet<u64>; N] {
    listening_beside(&balancer.id().to_string(), ports)
}

/// The same where this process is (`self`), or another one.
pub fn listening_beside<const N: usize>(process: &str, ports: [u16; N]) -> [BTreeSet<u64>; N] {
    let mut inodes = [const { BTreeSet::new() }; N];
    for table in sockets(process) {
        // They come first; behind them stand thousands of closed connections.
        for socket in table.take_while(|socket| socket.listens) {
            if let Some(index) = ports.iter().position(|port| *port == socket.local_port) {
                inodes[index].insert(socket.inode);
            }
        }
    }
    inodes
}

fn descriptors(balancer: &Balancer) -> usize {
    std::fs::read_dir(format!("/proc/{}/fd", balancer.id())).unwrap().count()
}

fn loopback(port: u16) -> SocketAddr {
    (Ipv4Addr::LOCALHOST, port).into()
}

fn resident_kib(balancer: &Balancer) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", balancer.id())).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

/// Reloads so far, whatever came of them.
fn reloads(balancer: &Balancer) -> f64 {
    balancer.metric("preface_reloads_total", &[])
}

/// The newest report in `/status`.
fn last_report(balancer: &Balancer) -> serde_json::Value {
    balancer.status()["reloads"][0].clone()
}

/// These addresses as a TOML list.
pub fn list(addresses: impl IntoIterator<Item = SocketAddr>) -> String {
    let quoted: Vec<String> = addresses.into_iter().map(|address| format!("{:?}", address.to_string())).collect();
    format!("[{}]", quoted.join(", "))
}

/// What the 200 reloads are made of.
struct Scene {
    web: u16,
    api: u16,
    probe: u16,
    extra: Vec<u16>,
    echoes: Vec<Echo>,
    target: Receiver,
}

impl Scene {
    fn new() -> Scene {
        Scene {
            web: free_port(),
            api: free_port(),
            probe: free_port(),
            extra: (0..4).map(|_| free_port()).collect(),
            echoes: (0..4).map(|_| Echo::start()).collect(),
            target: Receiver::with_header(echo),
        }
    }

    /// The endpoint ID that the probe's connections carry after this reload.
    fn endpoint(step: usize) -> String {
        format!("vpce-{step:08x}")
    }

    /// Another configuration for each step: listeners, pools, upstreams, TLVs come and go; three addresses stay.
    fn config(&self, step: usize) -> String {
        let mut config = String::from("[runtime]\nworkers = 3\n[log]\nconnections = \"errors\"\n");
        // The addresses that stay change their listener's name now and then, and swap their pools.
        let names = if step % 10 < 5 { ["web", "api"] } else { ["api", "web-2"] };
        for (name, port, pool) in [(names[0], self.web, step % 2), (names[1], self.api, (step + 1) % 2)] {
            let keepalive = ["60s", "off", "15s"][step % 3];
            writeln!(
                config,
                "[listeners.{name}]\nbind = \"127.0.0.1:{port}\"\npool = \"pool-{pool}\"\nkeepalive = {keepalive:?}"
            )
            .unwrap();
        }
        let extras = self.extra.iter().enumerate().filter(|(index, _)| (step >> index) & 1 == 1);
        for (index, port) in extras {
            let pool = if step.is_multiple_of(3) { "extra" } else { "pool-0" };
            writeln!(config, "[listeners.extra-{index}]\nbind = \"127.0.0.1:{port}\"\npool = {pool:?}").unwrap();
        }
        let version = ["v1", "v2"][step / 2 % 2];
        let balance = ["round_robin", "least_connections", "random_two"][step % 3];
        for pool in 0..2 {
            let upstreams = self.echoes.iter().enumerate().filter(|(index, _)| (step + pool) % 4 != *index);
            let upstreams = list(upstreams.map(|(_, echo)| echo.address));
            writeln!(
                config,
                "[pools.pool-{pool}]\nproxy_protocol = {version:?}\nbalance = {balance:?}\nupstreams = {upstreams}"
            )
            .unwrap();
            if version == "v2" {
                writeln!(config, "[pools.pool-{pool}.tlvs]\ncrc32c = {}\nunique_id = true", step.is_multiple_of(3))
                    .unwrap();
            }
        }
        if step.is_multiple_of(3) {
            let upstreams = list([self.echoes[0].address]);
            writeln!(
                config,
                "[pools.extra]\nproxy_protocol = \"v2\"\nupstreams = {upstreams}\n[pools.extra.health_check]"
            )
            .unwrap();
        }
        let (port, endpoint, upstreams) = (self.probe, Scene::endpoint(step), list([self.target.address]));
        writeln!(config, "[listeners.probe]\nbind = \"127.0.0.1:{port}\"\npool = \"probe\"").unwrap();
        writeln!(config, "[pools.probe]\nproxy_protocol = \"v2\"\nupstreams = {upstreams}").unwrap();
        writeln!(config, "[pools.probe.tlvs]\nvpce_id = {endpoint:?}").unwrap();
        config
    }

    /// A new connection shows what is in force: its header carries the endpoint ID of that step.
    #[track_caller]
    fn assert_in_force(&self, step: usize) {
        let seen = self.target.arrivals().len();
        connect_and_exchange(loopback(self.probe), step as u64).unwrap();
        let arrival = self.target.wait_for(seen + 1).pop().unwrap();
        let raw = String::from_utf8_lossy(&arrival.raw).into_owned();
        assert!(raw.contains(&Scene::endpoint(step)), "after reload {step}: {raw:?}");
    }
}

#[test]
fn two_hundred_reloads_under_traffic_are_not_noticed() {
    let scene = Scene::new();
    let mut balancer = preface(&scene.config(0));
    let ports = [scene.web, scene.api, scene.probe];
    let inodes = listening(&balancer, ports);
    assert!(inodes.iter().all(|inodes| inodes.len() == 3), "one socket a worker: {inodes:?}");
    let (connections, chunks) = (Budget::default(), Budget::default());
    let transfers: Vec<Transfer> =
        (0..4).map(|seed| Transfer::start(loopback(ports[seed % 2]), seed as u64, &chunks)).collect();
    let clients =
        Clients::start(&[ports[0], ports[1], ports[0], ports[1]].map(loopback), Refused::IsFailure, &connections);
    let [mut files, mut refused] = [0; 2];
    for step in 1..=200 {
        connections.release(20);
        chunks.release(40);
        if step % 20 == 0 {
            refused += 1;
            refuse(&mut balancer, &scene, step);
            continue;
        }
        let before = reloads(&balancer);
        if step % 4 == 0 {
            files += 1;
            balancer.rewrite_config(&scene.config(step));
            eventually("the file is seen", || (reloads(&balancer) > before).then_some(()));
        } else {
            balancer.apply(&scene.config(step));
        }
        assert_applied_once(&balancer, before, step);
        scene.assert_in_force(step);
        assert_eq!(listening(&balancer, ports), inodes, "{step}: addresses that stay keep their sockets");
    }
    let carried: u64 = transfers.into_iter().map(Transfer::finish).sum();
    let served = clients.stop();
    println!("{files} reloads by file, {refused} refused; {served} connections, {carried} bytes of long transfers");
    assert!(served > 1_000, "{served} connections are no traffic");
    let errors: Vec<String> = scene.echoes.iter().flat_map(Echo::errors).chain(scene.target.errors()).collect();
    assert!(errors.is_empty(), "{errors:?}");
    let log = balancer.log().lines();
    let bad = |line: &&String| line.contains("event=connection") || line.contains("panic");
    let bad: Vec<&String> = log.iter().filter(bad).collect();
    assert!(bad.is_empty(), "{bad:#?}");
}

/// Since `before` one reload changed something. On a slow machine the file is seen before the order to reload comes:
/// then there is a second one, which finds nothing to do.
#[track_caller]
fn assert_applied_once(balancer: &Balancer, before: f64, step: usize) {
    let reports = balancer.status()["reloads"].as_array().unwrap().clone();
    let outcomes: Vec<_> =
        reports[..(reloads(balancer) - before) as usize].iter().map(|report| &report["outcome"]).collect();
    let applied = outcomes.iter().filter(|outcome| **outcome == "applied").count();
    assert!(applied == 1 && outcomes.iter().all(|outcome| *outcome != "refused"), "{step}: {reports:#?}");
}

/// An invalid file changes nothing, and everyone who asks hears why.
#[track_caller]
fn refuse(balancer: &mut Balancer, scene: &Scene, step: usize) {
    let config = scene.config(step).replacen("pool = \"pool-", "pool = \"pol-", 1);
    let (before, snapshot) = (balancer.metric("preface_reloads_total", &[("outcome", "refused")]), balancer.status());
    balancer.rewrite_config(&config);
    let response = balancer.reload();
    assert_eq!(response.status, 422, "{}", response.text());
    assert!(response.text().contains("no pool named"), "{}", response.text());
    assert!(balancer.metric("preface_reloads_total", &[("outcome", "refused")]) > before);
    assert_eq!(balancer.metric("preface_config_last_reload_successful", &[]), 0.0);
    let status = balancer.status();
    assert_eq!(status["snapshot"], snapshot["snapshot"], "the snapshot is the same");
    let report = &status["reloads"][0];
    assert_eq!(report["outcome"], "refused");
    assert!(report["errors"][0].as_str().unwrap().contains("no pool named"), "{report}");
    assert!(report["changes"].as_array().unwrap().is_empty(), "{report}");
    balancer.log().wait_for_count("the refusals", before as usize + 1, |line| {
        line.contains("outcome=refused") && line.contains("no pool named")
    });
    scene.assert_in_force(step - 1);
}

/// A configuration with one listener and a number to tell versions of it apart.
fn numbered(port: u16, receiver: &Receiver, number: usize) -> String {
    let upstreams = list([receiver.address]);
    format!(
        "[listeners.web]\nbind = \"127.0.0.1:{port}\"\npool = \"web\"\nmax_connections = {number}\n\
         [pools.web]\nproxy_protocol = \"v2\"\nupstreams = {upstreams}\n"
    )
}

/// Saves with `save`, and proves by another change that followed that it was one reload and no more.
#[track_caller]
fn assert_one_reload(balancer: &mut Balancer, number: usize, what: &str, mv: impl Fn(&str), save: impl Fn(&str)) {
    let receiver_free = |config: &str, number: usize| {
        let (before, rest) = config.split_once("max_connections = ").unwrap();
        format!("{before}max_connections = {number}\n{}", rest.split_once('\n').unwrap().1)
    };
    let before = reloads(balancer);
    let config = std::fs::read_to_string(balancer.config_file()).unwrap();
    save(&receiver_free(&config, number));
    for (expected, number) in [(before + 1.0, number), (before + 2.0, number + 1)] {
        if expected > before + 1.0 {
            mv(&receiver_free(&config, number));
        }
        let toml = format!("max_connections = {number}\n");
        eventually(what, || {
            let running = balancer.ask("GET", "/config").json();
            running["toml"].as_str().unwrap().contains(&toml).then_some(())
        });
        assert_eq!(reloads(balancer), expected, "{what}: {}", balancer.status()["reloads"]);
        let report = last_report(balancer);
        assert_eq!((&report["trigger"], &report["outcome"]), (&"file".into(), &"applied".into()), "{what}: {report}");
    }
    let applied = |line: &str| line.contains("event=reload") && line.contains(&format!("-> {number}"));
    assert_eq!(balancer.log().lines().iter().filter(|line| applied(line)).count(), 1, "{what}");
}

fn shell(directory: &Path, script: &str) {
    let status = Command::new("sh").args(["-euc", script]).current_dir(directory).status().unwrap();
    assert!(status.success(), "{script}");
}

#[test]
fn every_way_of_saving_is_one_reload() {
    let receiver = Receiver::with_header(echo);
    let port = free_port();
    let mut balancer = preface(&numbered(port, &receiver, 1));
    let directory = balancer.directory().to_owned();
    let put = |name: &str, content: &str| std::fs::write(directory.join(name), content).unwrap();
    let mv = |content: &str| {
        put("new", content);
        shell(&directory, "mv new preface.toml");
    };
    let vim = program("vim");
    let vim = |content: &str, options: &str| {
        let number = content.split_once("max_connections = ").unwrap().1.split_once('\n').unwrap().0;
        let replace = format!("%s/max_connections = .*/max_connections = {number}/");
        let set = format!("set {options}");
        let mut command = Command::new(&vim);
        command.args(["-Nu", "NONE", "-es", "-c", &set, "-c", &replace, "-c", "wq", "preface.toml"]);
        assert!(command.current_dir(&directory).stdin(std::process::Stdio::null()).status().unwrap().success());
    };
    let sed = |content: &str| {
        let number = content.split_once("max_connections = ").unwrap().1.split_once('\n').unwrap().0;
        shell(&directory, &format!("sed -i 's/max_connections = .*/max_connections = {number}/' preface.toml"));
    };
    let echo_into = |content: &str| {
        put("new", content);
        shell(&directory, "cat new > preface.toml; rm new");
    };
    let copy = |content: &str| {
        put("new", content);
        shell(&directory, "cp new preface.toml; rm new");
    };
    let install = |content: &str| {
        put("new", content);
        shell(&directory, "install -m 644 new preface.toml; rm new");
    };
    type Save<'a> = &'a dyn Fn(&str);
    let ways: [(&str, Save); 7] = [
        ("mv", &mv),
        ("sed -i", &sed),
        ("vim, its own choice of backup", &|content| vim(content, "backup")),
        ("vim that renames", &|content| vim(content, "writebackup backupcopy=no")),
        ("vim that writes in place", &|content| vim(content, "writebackup backupcopy=yes")),
        ("cat > and cp", &|content| if content.len().is_multiple_of(2) { echo_into(content) } else { copy(content) }),
        ("install", &install),
    ];
    for (index, (what, save)) in ways.iter().enumerate() {
        assert_one_reload(&mut balancer, 10 + 2 * index, what, mv, save);
    }
    // The file moves to a ConfigMap volume and is linked from there, with the same content: no reload.
    let content = std::fs::read_to_string(balancer.config_file()).unwrap();
    let volume = directory.join("volume");
    std::fs::create_dir(&volume).unwrap();
    configmap_swap(&volume, &content);
    shell(&directory, "ln -s volume/preface.toml link; mv -T link preface.toml");
    let swap = |content: &str| configmap_swap(&volume, content);
    for index in 0..3 {
        assert_one_reload(&mut balancer, 50 + 2 * index, "a ConfigMap swap", swap, swap);
    }
    assert_eq!(balancer.metric("preface_reloads_total", &[("outcome", "applied")]), 20.0);
    assert_eq!(reloads(&balancer), 20.0);
    connect_and_exchange(loopback(port), 1).unwrap();
}

#[test]
fn an_address_that_left_may_come_back_at_once() {
    let (stays, moves) = (free_port(), free_port());
    let echo = Echo::start();
    let config = |moves: Option<String>| {
        let mut config = format!("[listeners.stays]\nbind = \"127.0.0.1:{stays}\"\npool = \"web\"\n");
        if let Some(bind) = moves {
            write!(config, "[listeners.moves]\nbind = {bind:?}\npool = \"web\"\n").unwrap();
        }
        config + &format!("[pools.web]\nproxy_protocol = \"v2\"\nupstreams = {}\n", list([echo.address]))
    };
    let mut balancer = preface(&config(None));
    for turn in 0..10 {
        let bind = [format!("127.0.0.1:{moves}"), format!("0.0.0.0:{moves}"), format!(":{moves}")];
        balancer.apply(&config(Some(bind[turn % 3].clone())));
        connect_and_exchange(loopback(moves), turn as u64).unwrap();
        balancer.apply(&config(None));
    }
    assert_eq!(balancer.metric("preface_reloads_total", &[("outcome", "refused")]), 0.0);
}

#[test]
fn connections_to_a_listener_that_leaves_are_served() {
    let (stays, leaves) = (free_port(), free_port());
    let echo = Echo::start();
    let upstreams = format!("[pools.web]\nproxy_protocol = \"v2\"\nupstreams = {}\n", list([echo.address]));
    let without = format!("[listeners.stays]\nbind = \"127.0.0.1:{stays}\"\npool = \"web\"\n{upstreams}");
    let with = format!("[listeners.leaves]\nbind = \"127.0.0.1:{leaves}\"\npool = \"web\"\n{without}");
    let mut balancer = preface(&with);
    for _ in 0..10 {
        let clients = Clients::start(&[loopback(leaves); 6], Refused::IsFine, &Budget::unlimited());
        clients.wait_for_more(30);
        balancer.apply(&without);
        eventually("the listener is gone", || (clients.refused() > 0).then_some(()));
        clients.stop();
        balancer.apply(&with);
    }
    assert!(echo.errors().is_empty(), "{:?}", echo.errors());
}

#[test]
fn a_listener_moves_between_all_addresses_and_one_under_traffic() {
    let port = free_port();
    let echo = Echo::start();
    let config = |bind: &str| {
        let upstreams = list([echo.address]);
        format!(
            "[listeners.web]\nbind = {bind}\npool = \"web\"\n[pools.web]\nproxy_protocol = \"v2\"\nupstreams = {upstreams}\n"
        )
    };
    let binds = [
        format!("\":{port}\""),
        format!("\"127.0.0.1:{port}\""),
        format!("\"0.0.0.0:{port}\""),
        format!("[\"127.0.0.1:{port}\", \"[::1]:{port}\"]"),
    ];
    let mut balancer = preface(&config(&binds[0]));
    let clients = Clients::start(&[loopback(port); 3], Refused::IsFailure, &Budget::unlimited());
    for turn in 1..=12 {
        clients.wait_for_more(10);
        balancer.apply(&config(&binds[turn % binds.len()]));
    }
    clients.wait_for_more(10);
    clients.stop();
}

#[test]
fn listeners_swap_addresses_and_names_and_keep_their_sockets() {
    let ports = [free_port(), free_port()];
    let echoes = [Receiver::with_header(echo), Receiver::with_header(echo)];
    let config = |names: [&str; 2], pools: [usize; 2]| {
        let mut config = String::new();
        for index in 0..2 {
            let (name, port, pool, upstreams) =
                (names[index], ports[index], pools[index], list([echoes[index].address]));
            write!(config, "[listeners.{name}]\nbind = \"127.0.0.1:{port}\"\npool = \"pool-{pool}\"\n").unwrap();
            write!(config, "[pools.pool-{index}]\nproxy_protocol = \"v1\"\nupstreams = {upstreams}\n").unwrap();
        }
        config
    };
    let mut balancer = preface(&config(["a", "b"], [0, 1]));
    let inodes = listening(&balancer, ports);
    let mut arrivals = [0, 0];
    for (names, pools) in [(["b", "a"], [0, 1]), (["a", "b"], [1, 0]), (["c", "a"], [0, 0]), (["a", "b"], [0, 1])] {
        balancer.apply(&config(names, pools));
        for (port, pool) in ports.into_iter().zip(pools) {
            connect_and_exchange(loopback(port), 7).unwrap();
            arrivals[pool] += 1;
            assert_eq!(echoes[pool].wait_for(arrivals[pool]).len(), arrivals[pool]);
        }
        assert_eq!(listening(&balancer, ports), inodes, "{names:?}");
        let log = balancer.log();
        for name in names {
            log.wait_for(name, |line| line.contains(&format!("listener={name} ")) && line.contains("event=connection"));
        }
    }
}

/// Binds without SO_REUSEADDR: that fails beside any other socket, also beside one that does not listen.
fn is_bound(port: u16) -> bool {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    socket.bind(&loopback(port).into()).is_err()
}

#[test]
fn a_port_already_taken_refuses_the_whole_reload() {
    let receiver = Receiver::with_header(echo);
    let (port, free) = (free_port(), free_port());
    let taken = TcpListener::bind(loopback(free_port())).unwrap();
    let taken = taken.local_addr().map(|address| (taken, address.port())).unwrap();
    let mut balancer = preface(&numbered(port, &receiver, 1));
    let (status, descriptors_before) = (balancer.status(), descriptors(&balancer));
    let more = |names: [(&str, u16); 2]| {
        let mut config = numbered(port, &receiver, 2);
        for (name, port) in names {
            write!(config, "[listeners.{name}]\nbind = \"127.0.0.1:{port}\"\npool = \"web\"\n").unwrap();
        }
        config
    };
    // Whichever is bound first, the other is not left behind.
    for names in [[("a-free", free), ("b-taken", taken.1)], [("a-taken", taken.1), ("b-free", free)]] {
        balancer.rewrite_config(&more(names));
        let response = balancer.reload();
        assert_eq!(response.status, 422);
        let name = names.iter().find(|(_, port)| *port == taken.1).unwrap().0;
        let (address, next) = (format!("127.0.0.1:{}", taken.1), format!("ss -ltnp 'sport = :{}'", taken.1));
        for part in ["already in use", name, address.as_str(), next.as_str()] {
            let text = response.text().to_lowercase();
            assert!(text.contains(part), "{part} in {text}");
        }
        assert!(!is_bound(free), "nothing is left bound");
        eventually("no descriptor is left open", || (descriptors(&balancer) <= descriptors_before).then_some(()));
        let now = balancer.status();
        for part in ["snapshot", "listeners", "pools"] {
            assert_eq!(now[part], status[part]);
        }
        let running = balancer.ask("GET", "/config").json();
        assert!(running["toml"].as_str().unwrap().contains("max_connections = 1\n"), "{running}");
        assert_eq!(balancer.metric("preface_config_last_reload_successful", &[]), 0.0);
        balancer.log().wait_for("the refusal", |line| line.contains("outcome=refused") && line.contains(&next));
        assert_eq!(balancer.ask("GET", "/readyz").status, 200);
    }
    drop(taken.0);
    balancer.apply(&more([("a-free", free), ("b-taken", taken.1)]));
    assert_eq!(balancer.metric("preface_config_last_reload_successful", &[]), 1.0);
    connect_and_exchange(loopback(taken.1), 1).unwrap();
}

#[test]
fn a_changed_keepalive_is_that_of_new_connections() {
    let receiver = Receiver::with_header(echo);
    let port = free_port();
    let config = |keepalive: &str| numbered(port, &receiver, 1).replace("max_connections = 1", keepalive);
    let mut balancer = preface(&config("keepalive = \"600s\""));
    let inodes = listening(&balancer, [port]);
    let connect = || {
        let mut stream = client::connect(loopback(port)).unwrap();
        exchange(&mut stream, 1, 10).unwrap();
        stream
    };
    let keepalive = |balancer: &Balancer, stream: &TcpStream| {
        let client = stream.local_addr().unwrap().port();
        let ours = |socket: &SocketLine| socket.local_port == port && socket.remote_port == client;
        // A retransmission timer may run for a moment in its place.
        eventually("data is acknowledged", || {
            let socket = sockets(&balancer.id().to_string()).flatten().find(ours).expect("the connection is open");
            (socket.timer.0 != 1).then_some(socket.timer)
        })
    };
    let first = connect();
    assert!(
        keepalive(&balancer, &first).0 == 2 && keepalive(&balancer, &first).1 > 55_000,
        "{:?}",
        keepalive(&balancer, &first)
    );
    balancer.rewrite_config(&config("keepalive = \"off\""));
    assert_eq!(balancer.reload().status, 200);
    let second = connect();
    assert_eq!(keepalive(&balancer, &second).0, 0);
    balancer.rewrite_config(&config("keepalive = \"60s\""));
    assert_eq!(balancer.reload().status, 200);
    let third = connect();
    assert!(
        keepalive(&balancer, &third).0 == 2 && keepalive(&balancer, &third).1 <= 6_000,
        "{:?}",
        keepalive(&balancer, &third)
    );
    assert!(
        keepalive(&balancer, &first).1 > 50_000 && keepalive(&balancer, &second).0 == 0,
        "open connections keep theirs"
    );
    assert_eq!(listening(&balancer, [port]), inodes);
}

#[test]
fn a_thousand_reloads_with_an_open_connection_leave_memory_where_it_was() {
    // Without addresses that come and go: a reload would wait for their sockets to close.
    let scene = Scene { extra: Vec::new(), ..Scene::new() };
    let mut balancer = preface(&scene.config(0));
    let mut open = client::connect(loopback(scene.web)).unwrap();
    exchange(&mut open, 1, 1_000).unwrap();
    let mut reload = |range: std::ops::Range<usize>| {
        for step in range {
            balancer.apply(&scene.config(step));
        }
        (resident_kib(&balancer), descriptors(&balancer))
    };
    let before = reload(1..200);
    let after = reload(200..1_200);
    println!(
        "resident after 200 reloads: {} KiB, after 1,200: {} KiB; descriptors {} and {}",
        before.0, after.0, before.1, after.1
    );
    assert!(after.0 < before.0 + 1_024, "memory grew from {} to {} KiB", before.0, after.0);
    eventually("descriptors are where they were", || (descriptors(&balancer) <= before.1 + 2).then_some(()));
    exchange(&mut open, 2, 1_000).unwrap();
}

/// Holds a lease on a file until it is ended: whoever opens the file waits for that.
const LEASE: &str = r#"
import fcntl, os, signal, sys
signal.signal(signal.SIGIO, lambda *_: print("wanted", flush=True))
fcntl.fcntl(os.open(sys.argv[1], os.O_RDONLY), fcntl.F_SETLEASE, fcntl.F_WRLCK)
print("held", flush=True)
while True:
    signal.pause()
"#;

/// A file that cannot be read for now, as on a network file system whose server is away.
fn hold(file: &Path) -> Process {
    let holder = Process::start(Command::new("/usr/bin/python3").arg("-c").arg(LEASE).arg(file));
    holder.stdout.wait_for("nobody else has it open (leases need a file system that has them)", |line| line == "held");
    holder
}

#[test]
fn while_the_file_cannot_be_read_everything_else_goes_on() {
    let receiver = Receiver::with_header(echo);
    let mut balancer = preface(&format!(
        "[listeners.web]\nbind = \"127.0.0.1:0\"\npool = \"web\"\n\
         [pools.web]\nproxy_protocol = \"v2\"\nupstreams = [\"{}\"]\n",
        receiver.address
    ));
    let mut open = balancer.connect("web");
    exchange(&mut open, 1, 1_000).unwrap();
    let goes_on = |balancer: &Balancer| {
        assert_eq!(balancer.ask("GET", "/livez").status, 200);
        assert_eq!(balancer.status()["state"], "running");
        let path = format!("/pools/web/upstreams/{}/enable", receiver.address);
        assert_eq!(balancer.ask("POST", &path).status, 200);
    };
    let holder = hold(&balancer.config_file());
    balancer.signal(Signal::HUP);
    holder.stdout.wait_for("it is being read", |line| line == "wanted");
    goes_on(&balancer);
    std::thread::scope(|scope| {
        let asks = scope.spawn(|| balancer.reload());
        goes_on(&balancer);
        assert!(!asks.is_finished() && reloads(&balancer) == 0.0, "nothing was reloaded");
        drop(holder);
        let response = asks.join().unwrap();
        assert_eq!((response.status, response.json()["trigger"].as_str()), (200, Some("admin")));
    });
    let by_signal = |line: &str| line.contains("event=reload trigger=signal outcome=unchanged");
    balancer.log().wait_for("the reload by the signal", by_signal);
    assert_eq!(reloads(&balancer), 2.0);
    // A stop waits for no file, and whoever waits for a reload is told.
    let holder = hold(&balancer.config_file());
    std::thread::scope(|scope| {
        let asks = scope.spawn(|| balancer.reload());
        holder.stdout.wait_for("it is being read", |line| line == "wanted");
        goes_on(&balancer);
        balancer.signal(Signal::TERM);
        let response = asks.join().unwrap();
        assert_eq!(response.status, 422);
        assert!(response.text().contains("the process is stopping"), "{}", response.text());
    });
    drop(open);
    assert_eq!(balancer.wait_exit().code(), Some(0));
}
