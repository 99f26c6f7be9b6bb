//! Upgrades of the running program: a new process takes its place, and nobody notices.

use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, UdpSocket};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process, test_kill_process};

use crate::load::{Budget, Clients, Echo, Refused, Transfer, connect_and_exchange, exchange};
use crate::reload::{list, listening_beside};
use crate::support::datagrams::{self, DatagramServer, ask, receive};
use crate::support::peers::nginx;
use crate::support::ports::free_port;
use crate::support::receiver::echo;
use crate::support::{Balancer, Process, Receiver, client, eventually, http, preface_by, program, skip};

/// A balancer whose program lies in its own directory, where it can be replaced; and every process that came of it.
pub struct Upgraded {
    /// Whose admin socket and configuration all of them share.
    pub balancer: Balancer,
    /// The processes, the one that serves last.
    pids: Vec<u32>,
    others: Others,
}

/// Processes that no parent of theirs in this test ends: those that took over.
struct Others {
    directory: String,
    pids: Vec<u32>,
}

impl Others {
    fn of(directory: &Path) -> Others {
        Others { directory: directory.display().to_string(), pids: Vec::new() }
    }
}

impl Drop for Others {
    fn drop(&mut self) {
        for process in &self.pids {
            let command = fs::read_to_string(format!("/proc/{process}/cmdline")).unwrap_or_default();
            if command.contains(&self.directory) {
                let _ = kill_process(pid(*process), Signal::KILL);
            }
        }
    }
}

impl Upgraded {
    #[track_caller]
    fn start(config: &str) -> Upgraded {
        Upgraded::start_by(|program| Command::new(program), config)
    }

    /// Started by the command that `command` makes of the program's path.
    #[track_caller]
    pub fn start_by(command: impl FnOnce(&Path) -> Command, config: &str) -> Upgraded {
        let balancer = preface_by(|directory| command(&put_program(directory)), config);
        let (pids, others) = (vec![balancer.id()], Others::of(balancer.directory()));
        Upgraded { balancer, pids, others }
    }

    /// The process that serves.
    pub fn serving(&self) -> u32 {
        *self.pids.last().expect("there is always one")
    }

    fn program(&self) -> PathBuf {
        self.balancer.directory().join("preface")
    }

    /// Orders an upgrade and waits until it has happened.
    #[track_caller]
    pub fn upgrade(&mut self) -> serde_json::Value {
        let response = self.balancer.ask("POST", "/upgrade");
        assert_eq!(response.status, 200, "{}", response.text());
        let report = response.json();
        assert_eq!(report["outcome"], "upgraded");
        self.adopt(u32::try_from(report["pid"].as_u64().expect("a process id")).expect("a process id"));
        report
    }

    /// The same by a signal.
    #[track_caller]
    fn upgrade_by_signal(&mut self) {
        let before = self.serving();
        kill_process(pid(before), Signal::USR2).expect("it is there");
        let serving = eventually("another process serves", || {
            let now = self.balancer.status()["pid"].as_u64().expect("a process id");
            (now != u64::from(before)).then_some(now)
        });
        self.adopt(u32::try_from(serving).expect("a process id"));
    }

    #[track_caller]
    fn adopt(&mut self, serving: u32) {
        assert!(!self.pids.contains(&serving), "{serving} served before: {:?}", self.pids);
        self.pids.push(serving);
        self.others.pids.push(serving);
        assert_eq!(self.balancer.status()["pid"], serving);
    }

    /// Orders an upgrade that must fail, and changes nothing; the errors.
    #[track_caller]
    fn fail(&self) -> String {
        let response = self.balancer.ask("POST", "/upgrade");
        assert_eq!(response.status, 422, "{}", response.text());
        let report = response.json();
        assert_eq!((&report["outcome"], &report["pid"]), (&"failed".into(), &self.serving().into()));
        assert_eq!(self.balancer.status()["pid"], self.serving(), "the old one goes on");
        assert_eq!(self.balancer.status()["state"], "running");
        let errors = report["errors"].as_array().expect("errors").iter();
        errors.map(|error| error.as_str().expect("text")).collect::<Vec<_>>().join("\n")
    }

    /// Waits until this process is gone.
    #[track_caller]
    pub fn wait_end(&self, process: u32) {
        eventually(&format!("process {process} ends"), || (!is_running(process)).then_some(()));
    }

    /// Descriptors of the one that serves, once it has as few as it gets.
    fn descriptors(&self) -> Vec<String> {
        let directory = format!("/proc/{}/fd", self.serving());
        let entries = fs::read_dir(directory).expect("it runs");
        let targets = entries.filter_map(|entry| fs::read_link(entry.ok()?.path()).ok());
        let mut kinds: Vec<String> = targets
            .map(|target| target.display().to_string().split(['[', '(']).next().unwrap_or_default().to_owned())
            .collect();
        kinds.sort();
        kinds
    }
}

/// As the system calls want it.
pub fn pid(process: u32) -> Pid {
    Pid::from_raw(i32::try_from(process).expect("a process id")).expect("a process id")
}

/// Is it there, and not only waited for by its parent?
fn is_running(process: u32) -> bool {
    let state = fs::read_to_string(format!("/proc/{process}/stat")).unwrap_or_default();
    test_kill_process(pid(process)).is_ok() && !state.rsplit(") ").next().unwrap_or("Z").starts_with('Z')
}

/// The program under test as `preface` in this directory. Linked, not written: a file that is just being written cannot
/// be executed.
fn put_program(directory: &Path) -> PathBuf {
    let (original, path, new) =
        (Path::new(env!("CARGO_BIN_EXE_preface")), directory.join("preface"), directory.join("preface.new"));
    if fs::hard_link(original, &new).is_err() {
        fs::copy(original, &new).expect("the program is copied");
    }
    fs::rename(&new, &path).expect("the program is put in its place");
    path
}

/// Puts a script in the program's place.
fn put_script(directory: &Path, mode: u32, script: &str) {
    let new = directory.join("script.new");
    fs::write(&new, script).expect("a script is written");
    fs::set_permissions(&new, fs::Permissions::from_mode(mode)).expect("a script has a mode");
    fs::rename(&new, directory.join("preface")).expect("a script is put in the program's place");
}

/// Threads that ask over UDP again and again, each with one socket that it keeps and with new ones.
struct Askers {
    stop: Arc<AtomicBool>,
    answered: Arc<AtomicU64>,
    threads: Vec<JoinHandle<Vec<String>>>,
}

impl Askers {
    fn start(to: SocketAddr, count: usize) -> Askers {
        let (stop, answered) = (Arc::<AtomicBool>::default(), Arc::<AtomicU64>::default());
        let threads = (0..count).map(|number| {
            let (stop, answered) = (Arc::clone(&stop), Arc::clone(&answered));
            std::thread::spawn(move || {
                let kept = datagrams::client();
                let mut failures = Vec::new();
                for round in 0_u64.. {
                    if stop.load(Relaxed) {
                        break;
                    }
                    let new = datagrams::client();
                    for socket in [&kept, &new] {
                        match question(socket, to, (number as u64) << 32 | round) {
                            Ok(()) => drop(answered.fetch_add(1, Relaxed)),
                            Err(error) => failures.push(format!("asker {number}, round {round}: {error}")),
                        }
                    }
                }
                failures
            })
        });
        let threads = threads.collect();
        Askers { stop, answered, threads }
    }

    #[track_caller]
    fn wait_for_more(&self, count: u64) {
        let goal = self.answered.load(Relaxed) + count;
        eventually("questions are answered", || (self.answered.load(Relaxed) >= goal).then_some(()));
    }

    #[track_caller]
    fn stop(self) {
        self.stop.store(true, Relaxed);
        let failures: Vec<String> =
            self.threads.into_iter().flat_map(|thread| thread.join().expect("no asker panics")).collect();
        assert!(failures.is_empty(), "{} of {:?} failed: {failures:#?}", failures.len(), self.answered);
    }
}

fn question(socket: &UdpSocket, to: SocketAddr, number: u64) -> std::io::Result<()> {
    socket.send_to(&number.to_be_bytes(), to)?;
    let mut answer = [0; 9];
    let (length, from) = socket.recv_from(&mut answer)?;
    match answer[..length] == number.to_be_bytes() && from == to {
        true => Ok(()),
        false => Err(std::io::Error::other(format!("another answer, from {from}"))),
    }
}

fn ask_page(to: SocketAddr) -> std::io::Result<()> {
    let mut stream = client::connect(to)?;
    match http::get(&mut stream, "/")?.status {
        200 => Ok(()),
        status => Err(std::io::Error::other(format!("status {status}"))),
    }
}

#[test]
fn seven_upgrades_under_load_refuse_nobody() {
    const UPGRADES: usize = 7;
    let (echo, server, nginx, probe) = (Echo::start(), DatagramServer::start(datagrams::echo), nginx(), free_port());
    let mut lb = Upgraded::start(&format!(
        "[runtime]\nworkers = 3\n[log]\nconnections = \"errors\"\n[admin]\nprobe_bind = \"127.0.0.1:{probe}\"\n\
         [listeners.web]\nbind = \"127.0.0.1:0\"\npool = \"web\"\n\
         [listeners.page]\nbind = \":0\"\npool = \"page\"\n\
         [listeners.dns]\nbind = \"127.0.0.1:0\"\nprotocol = \"udp\"\nidle_timeout = \"2s\"\npool = \"dns\"\n\
         [pools.web]\nproxy_protocol = \"v2\"\nupstreams = [\"{}\"]\n\
         [pools.page]\nproxy_protocol = \"v2\"\nupstreams = [\"127.0.0.1:{}\"]\n\
         [pools.dns]\nproxy_protocol = \"v2\"\nupstreams = [\"{}\"]\n",
        echo.address, nginx.headers, server.address
    ));
    let (web, page, dns) = (lb.balancer.ipv4("web"), lb.balancer.ipv4("page"), lb.balancer.ipv4("dns"));
    let budget = Budget::default();
    let old = Transfer::start(web, 1, &budget);
    budget.release(20);
    old.wait_for_chunks(10);
    let clients = Clients::start(&[web; 4], Refused::IsFailure, &Budget::unlimited());
    let askers = Askers::start(dns, 2);
    let (stop, pages) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| {
        let visitor = scope.spawn(|| {
            while !stop.load(Relaxed) {
                ask_page(page).expect("nginx's page");
                pages.fetch_add(1, Relaxed);
            }
        });
        clients.wait_for_more(100);
        for number in 0..UPGRADES {
            let by_signal = number % 2 == 1;
            if by_signal {
                lb.upgrade_by_signal()
            } else {
                drop(lb.upgrade())
            }
            // Everybody is served by the new process, the probes included, before it is replaced.
            clients.wait_for_more(100);
            askers.wait_for_more(50);
            let mut ready = client::connect(([127, 0, 0, 1], probe).into()).expect("the probes have their address");
            assert_eq!(http::get(&mut ready, "/readyz").expect("an answer").status, 200);
        }
        stop.store(true, Relaxed);
        visitor.join().expect("no page failed");
    });
    askers.stop();
    assert!(clients.stop() >= 100 * UPGRADES as u64);
    assert!(pages.load(Relaxed) > UPGRADES as u64);
    // The connection that began before all of that is whole, and with it the first process ends.
    assert!(is_running(lb.pids[0]), "it carries a connection");
    budget.release(1_000);
    assert!(old.finish() > 0);
    assert_eq!(lb.balancer.wait_exit().code(), Some(0));
    assert!(echo.errors().is_empty(), "{:?}", echo.errors());
    assert!(nginx.errors().is_empty(), "{:?}", nginx.errors());
    let log = lb.balancer.log().lines();
    let odd: Vec<&String> = log.iter().filter(|line| line.contains("event=connection")).collect();
    assert!(odd.is_empty(), "only connections that ended oddly have a line: {odd:#?}");
    let refused: Vec<&String> = log.iter().filter(|line| line.contains("level=error")).collect();
    assert!(refused.is_empty(), "{refused:#?}");
}

#[test]
fn nothing_piles_up_over_upgrades_and_the_sockets_stay_the_same() {
    let echo = Echo::start();
    let config = |workers: usize| {
        format!(
            "[runtime]\nworkers = {workers}\n\
             [listeners.web]\nbind = \"127.0.0.1:0\"\nprotocol = [\"tcp\", \"udp\"]\npool = \"web\"\n\
             [pools.web]\nproxy_protocol = \"v2\"\nupstreams = [\"{}\"]\n",
            echo.address
        )
    };
    let mut lb = Upgraded::start(&config(2));
    let (web, port) = (lb.balancer.ipv4("web"), lb.balancer.port("web"));
    let sockets = listening_beside("self", [port]);
    assert_eq!(sockets[0].len(), 2);
    let mut descriptors = Vec::new();
    for _ in 0..6 {
        let old = lb.serving();
        lb.upgrade();
        lb.wait_end(old);
        connect_and_exchange(web, 1).expect("a connection");
        // What is looked at is a process at rest: its predecessor is gone, and so is the question about its status.
        descriptors.push(eventually("its predecessor's stream is closed", || {
            let descriptors = lb.descriptors();
            let again = lb.descriptors();
            (descriptors == again && (descriptors.len() <= 60)).then_some(descriptors)
        }));
    }
    let counts: Vec<usize> = descriptors.iter().map(Vec::len).collect();
    let (least, most) = (counts.iter().min().unwrap(), counts.iter().max().unwrap());
    // One connection of the admin API may still be closing.
    assert!(
        most - least <= 1 && counts[5] <= counts[0] + 1,
        "{counts:?}: {:?} and {:?}",
        descriptors[0],
        descriptors[5]
    );
    // Another number of workers: the sockets are the same, each has somebody who reads it, and nobody is left out.
    for workers in [5, 1, 3] {
        lb.balancer.rewrite_config(&config(workers));
        lb.upgrade();
        assert_eq!(lb.balancer.status()["workers"], workers);
        assert_eq!(listening_beside("self", [port]), sockets);
        for seed in 0..50 {
            connect_and_exchange(web, seed).expect("whichever socket the kernel chooses");
        }
    }
    let serving = lb.serving();
    kill_process(pid(serving), Signal::TERM).expect("it is there");
    lb.wait_end(serving);
    assert_eq!(client::connect(web).unwrap_err().kind(), ErrorKind::ConnectionRefused, "nobody holds the sockets");
    let left: Vec<_> = fs::read_dir(lb.balancer.directory()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert!(!left.iter().any(|name| name == "admin.sock" || name == "preface.admin"), "{left:?}");
}

#[test]
fn addresses_that_left_the_file_and_that_joined_it() {
    let echo = Echo::start();
    let (stays, leaves, joins, taken) = (free_port(), free_port(), free_port(), free_port());
    let config = |ports: &[u16]| {
        let addresses = list(ports.iter().map(|port| SocketAddr::from(([127, 0, 0, 1], *port))));
        format!(
            "[listeners.web]\nbind = {addresses}\npool = \"web\"\n\
             [pools.web]\nproxy_protocol = \"v2\"\nupstreams = [\"{}\"]\n",
            echo.address
        )
    };
    let mut lb = Upgraded::start(&config(&[stays, leaves]));
    let at = |port: u16| SocketAddr::from(([127, 0, 0, 1], port));
    // No event tells the running process of a file that it can only read at the next upgrade: it is another file.
    let moved = lb.balancer.directory().join("moved.toml");
    fs::rename(lb.balancer.config_file(), &moved).unwrap();
    let blocker = std::net::TcpListener::bind(at(taken)).unwrap();
    let text = lb.balancer.complete_config(&config(&[stays, joins, taken]));
    fs::write(lb.balancer.config_file(), &text).unwrap();
    let error = lb.fail();
    assert!(error.contains(&format!("cannot bind {}", at(taken))), "{error}");
    for port in [stays, leaves] {
        connect_and_exchange(at(port), 1).expect("nothing has changed");
    }
    assert_eq!(client::connect(at(joins)).unwrap_err().kind(), ErrorKind::ConnectionRefused);
    let sockets = listening_beside("self", [stays]);
    drop(blocker);
    lb.upgrade();
    for port in [stays, joins, taken] {
        connect_and_exchange(at(port), 2).expect("it is served");
    }
    assert_eq!(listening_beside("self", [stays]), sockets);
    eventually("the old one has closed what nobody wants", || client::connect(at(leaves)).err());
}

#[test]
fn what_cannot_take_over_leaves_the_old_process_as_it_was() {
    let echo = Echo::start();
    let config = format!(
        "[listeners.web]\nbind = \"127.0.0.1:0\"\nprotocol = [\"tcp\", \"udp\"]\npool = \"web\"\n\
         [pools.web]\nproxy_protocol = \"v2\"\nupstreams = [\"{}\"]\n",
        echo.address
    );
    let mut lb = Upgraded::start(&config);
    let web = lb.balancer.ipv4("web");
    let directory = lb.balancer.directory().to_owned();
    let clients = Clients::start(&[web; 2], Refused::IsFailure, &Budget::unlimited());
    clients.wait_for_more(20);
    let descriptors = lb.descriptors().len();

    fs::remove_file(lb.program()).unwrap();
    let error = lb.fail();
    assert_eq!(error, format!("cannot start {}: No such file or directory (os error 2)", lb.program().display()));
    put_script(&directory, 0o644, "#!/bin/sh\n");
    let error = lb.fail();
    assert_eq!(error, format!("cannot start {}: Permission denied (os error 13)", lb.program().display()));
    put_script(&directory, 0o755, "#!/bin/sh\necho 'error while loading shared libraries' >&2\nexit 127\n");
    let error = lb.fail();
    assert_eq!(
        error,
        "the new process ended before it was ready: exit status: 127\nerror while loading shared libraries"
    );
    // It leaves something behind that holds every pipe.
    put_script(&directory, 0o755, "#!/bin/sh\necho 'cannot find my way' >&2\nsleep 3 </dev/null &\nexit 3\n");
    let error = lb.fail();
    assert_eq!(error, "the new process ended before it was ready: exit status: 3\ncannot find my way");

    put_program(&directory);
    let broken = lb.balancer.complete_config(&config).replace("proxy_protocol", "proxy_protokoll");
    fs::write(lb.balancer.config_file(), &broken).unwrap();
    let error = lb.fail();
    assert!(error.starts_with("the new process ended before it was ready: exit status: 1\n"), "{error}");
    assert!(error.contains("unknown key") && error.contains("proxy_protokoll"), "{error}");
    let printed = Process::run(Command::new(lb.program()).arg("upgrade").env("RUNTIME_DIRECTORY", &directory));
    assert_eq!(printed.0.code(), Some(1));
    assert!(printed.1.starts_with("preface: no upgrade, and what ran goes on\n"), "{}", printed.1);
    assert!(printed.1.contains("proxy_protokoll"), "{}", printed.1);

    clients.wait_for_more(20);
    lb.balancer.apply(&config);
    eventually("nothing is left open", || (lb.descriptors().len() <= descriptors + 8).then_some(()));
    let printed = Process::run(Command::new(lb.program()).arg("upgrade").env("RUNTIME_DIRECTORY", &directory));
    assert_eq!(printed.0.code(), Some(0), "{}", printed.1);
    assert!(printed.1.starts_with("upgraded in "), "{}", printed.1);
    lb.adopt(u32::try_from(lb.balancer.status()["pid"].as_u64().unwrap()).unwrap());
    clients.wait_for_more(20);
    clients.stop();
}

#[test]
fn a_new_process_that_hangs_is_ended_and_meanwhile_everything_goes_on() {
    let echo = Echo::start();
    let config = format!(
        "[listeners.web]\nbind = \"127.0.0.1:0\"\npool = \"web\"\n\
         [pools.web]\nproxy_protocol = \"v2\"\nupstreams = [\"{}\"]\n",
        echo.address
    );
    let mut lb = Upgraded::start(&config);
    let web = lb.balancer.ipv4("web");
    let directory = lb.balancer.directory().to_owned();
    put_script(&directory, 0o755, "#!/bin/sh\necho 'waiting for a disk' >&2\nexec sleep 600\n");
    let error = std::thread::scope(|scope| {
        let failing = scope.spawn(|| lb.fail());
        lb.balancer.log().wait_for("it starts", |line| line.contains("a new process starts"));
        connect_and_exchange(web, 1).expect("a connection");
        let second = lb.balancer.ask("POST", "/upgrade");
        assert_eq!(second.status, 422);
        assert!(second.text().contains("an upgrade is under way already"), "{}", second.text());
        let reload = lb.balancer.reload();
        assert_eq!(reload.status, 422);
        assert!(reload.text().contains("an upgrade is under way"), "{}", reload.text());
        assert_eq!(lb.balancer.ask("POST", &format!("/pools/web/upstreams/{}/drain", echo.address)).status, 200);
        failing.join().expect("it fails in time")
    });
    assert_eq!(error, "the new process was not ready within 12 s, and was ended\nwaiting for a disk");
    let line = lb.balancer.log().wait_for("it starts", |line| line.contains("a new process starts"));
    let hung = line.rsplit("pid=").next().unwrap().parse().unwrap();
    assert!(!is_running(hung));
    assert_eq!(lb.balancer.reload().status, 200, "reloads are possible again");
    // A stop does not wait for it, either.
    assert_eq!(lb.balancer.ask("POST", &format!("/pools/web/upstreams/{}/enable", echo.address)).status, 200);
    kill_process(pid(lb.serving()), Signal::USR2).unwrap();
    let lines = lb.balancer.log().wait_for_count("it starts again", 2, |line| line.contains("a new process starts"));
    let hung = lines[1].rsplit("pid=").next().unwrap().parse().unwrap();
    assert!(is_running(hung));
    lb.balancer.signal(Signal::TERM);
    assert_eq!(lb.balancer.wait_exit().code(), Some(0));
    assert!(!is_running(hung));
}

#[test]
fn orders_and_health_go_on() {
    let (one, other) = (Receiver::with_header(echo), Receiver::with_header(echo));
    let nobody = SocketAddr::from(([127, 0, 0, 1], free_port()));
    let mut lb = Upgraded::start(&format!(
        "[listeners.web]\nbind = \"127.0.0.1:0\"\npool = \"web\"\n\
         [pools.web]\nproxy_protocol = \"v2\"\nupstreams = {}\n\
         [pools.web.health_check]\nprotocol = \"tcp\"\ninterval = \"1h\"\n",
        list([one.address, other.address, nobody])
    ));
    for address in [one.address, other.address] {
        lb.balancer.wait_health("web", address, "healthy");
    }
    lb.balancer.wait_health("web", nobody, "unhealthy");
    let drained = lb.balancer.ask("POST", &format!("/pools/web/upstreams/{}/drain", one.address));
    assert_eq!(drained.status, 200, "{}", drained.text());
    let known = |lb: &Upgraded| {
        [one.address, other.address, nobody].map(|address| {
            let upstream = lb.balancer.upstream("web", address);
            ["admin", "admin_by", "admin_since", "health", "health_since"].map(|key| upstream[key].clone())
        })
    };
    let before = known(&lb);
    assert_eq!(before[0][..2], ["draining".into(), serde_json::Value::from("admin api")]);
    for _ in 0..2 {
        lb.upgrade();
        assert_eq!(known(&lb), before);
        let arrived = one.arrivals().len();
        for seed in 0..4 {
            connect_and_exchange(lb.balancer.ipv4("web"), seed).expect("a connection");
        }
        assert_eq!(one.arrivals().iter().skip(arrived).filter(|arrival| arrival.is_client()).count(), 0, "it drains");
    }
}

#[test]
fn a_draining_process_serves_what_it_has_and_takes_no_further_order() {
    let receiver = Receiver::with_header(echo);
    let mut lb = Upgraded::start(&format!(
        "[listeners.web]\nbind = \"127.0.0.1:0\"\npool = \"web\"\n\
         [pools.web]\nproxy_protocol = \"v2\"\nupstreams = [\"{}\"]\n",
        receiver.address
    ));
    let mut stream = lb.balancer.connect("web");
    exchange(&mut stream, 1, 1_000).unwrap();
    let report = lb.upgrade();
    assert_eq!(report["open"], 1);
    exchange(&mut stream, 2, 100_000).expect("the old process carries it");
    lb.balancer.signal(Signal::USR2);
    lb.balancer.log().wait_for("a refusal", |line| {
        line.contains("event=upgrade outcome=failed") || line.contains("stopping already")
    });
    // Whoever stops a service signals all of its processes: the old one is stopping as it is.
    lb.balancer.signal(Signal::TERM);
    lb.balancer.log().wait_for("a signal", |line| line.contains("stopping since the upgrade"));
    exchange(&mut stream, 3, 100_000).expect("it goes on");
    lb.balancer.signal(Signal::TERM);
    assert_eq!(stream.read(&mut [0; 1]).unwrap_err().kind(), ErrorKind::ConnectionReset);
    assert_eq!(lb.balancer.wait_exit().code(), Some(0));
    connect_and_exchange(lb.balancer.ipv4("web"), 4).expect("the new process serves");
}

#[test]
fn stop_timeout_counts_from_the_upgrade() {
    let receiver = Receiver::with_header(echo);
    let mut lb = Upgraded::start(&format!(
        "[runtime]\nstop_timeout = \"300ms\"\n[listeners.web]\nbind = \"127.0.0.1:0\"\npool = \"web\"\n\
         [pools.web]\nproxy_protocol = \"v2\"\nupstreams = [\"{}\"]\n",
        receiver.address
    ));
    let mut stream = lb.balancer.connect("web");
    exchange(&mut stream, 1, 1_000).unwrap();
    lb.upgrade();
    assert_eq!(stream.read(&mut [0; 1]).unwrap_err().kind(), ErrorKind::ConnectionReset);
    lb.balancer.log().wait_for("its end", |line| line.ends_with("end=preface.stop.stop_timeout"));
    assert_eq!(lb.balancer.wait_exit().code(), Some(0));
}

#[test]
fn udp_sockets_go_over_sessions_do_not_and_late_replies_still_arrive() {
    let upstream = UdpSocket::bind("127.0.0.1:0").unwrap();
    upstream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    let mut lb = Upgraded::start(&format!(
        "[runtime]\nworkers = 2\n[listeners.dns]\nbind = \"127.0.0.1:0\"\nprotocol = \"udp\"\npool = \"dns\"\n\
         [pools.dns]\nupstreams = [\"{}\"]\n",
        upstream.local_addr().unwrap()
    ));
    let dns = lb.balancer.ipv4("dns");
    let client = datagrams::client();
    let mut buffer = [0; 100];
    client.send_to(b"one", dns).unwrap();
    let (length, first) = upstream.recv_from(&mut buffer).unwrap();
    assert_eq!(&buffer[..length], b"one");
    lb.upgrade();
    upstream.send_to(b"late", first).unwrap();
    assert_eq!(receive(&client), (b"late".to_vec(), dns), "by the old process, from the address that was asked");
    client.send_to(b"two", dns).unwrap();
    let (length, second) = upstream.recv_from(&mut buffer).unwrap();
    assert_eq!(&buffer[..length], b"two");
    assert_ne!(first, second, "it is a session of the new process");
    upstream.send_to(b"later", first).unwrap();
    assert_eq!(receive(&client).0, b"later");
    upstream.send_to(b"and the other", second).unwrap();
    assert_eq!(receive(&client).0, b"and the other");
    // The old one's time for replies is bounded, and its sessions say why they ended.
    assert_eq!(lb.balancer.wait_exit().code(), Some(0));
    lb.balancer.log().wait_for("its end", |line| line.ends_with("end=preface.stop.handed_over"));
    upstream.set_nonblocking(false).unwrap();
    client.send_to(b"three", dns).unwrap();
    assert_eq!(upstream.recv_from(&mut buffer).unwrap().1, second, "the new one's session goes on");
}

#[test]
fn a_tcp_admin_address_and_its_announcement_go_over() {
    let (directory, server) = (tempfile::tempdir().unwrap(), DatagramServer::start(datagrams::echo));
    let (admin, dns) = (free_port(), free_port());
    let file = directory.path().join("preface.toml");
    let config = |admin: &str| {
        format!(
            "[admin]\nbind = \"{admin}\"\n[listeners.dns]\nbind = \"127.0.0.1:{dns}\"\nprotocol = \"udp\"\nresponses = 1\npool = \"dns\"\n\
             [pools.dns]\nupstreams = [\"{}\"]\n",
            server.address
        )
    };
    fs::write(&file, config(&format!("127.0.0.1:{admin}"))).unwrap();
    let program = put_program(directory.path());
    let command = |name: &str| {
        let mut command = Command::new(&program);
        command.arg(name).arg("--config").arg(&file).env("RUNTIME_DIRECTORY", directory.path());
        command
    };
    let mut process = Process::start(&mut command("run"));
    let announced = directory.path().join("preface.admin");
    let run = |name: &str| Process::run(&mut command(name));
    eventually("it serves", || run("health").0.success().then_some(()));
    let said = fs::read_to_string(&announced).unwrap();
    let mut others = Others::of(directory.path());
    let mut upgrade = || -> u32 {
        let (status, output) = run("upgrade");
        assert!(status.success(), "{output}");
        let process = output.split("process ").nth(1).and_then(|rest| rest.split(' ').next()).unwrap().parse().unwrap();
        others.pids.push(process);
        process
    };
    let second = upgrade();
    assert_eq!(process.wait_exit().code(), Some(0));
    assert_eq!(fs::read_to_string(&announced).unwrap(), said, "the old one leaves it");
    assert!(run("health").0.success());
    // Another admin address: the commands find the new one there.
    let socket = directory.path().join("other.sock");
    fs::write(&file, config(&format!("unix:{}", socket.display()))).unwrap();
    let third = upgrade();
    eventually("the second process ends", || (!is_running(second)).then_some(()));
    assert_eq!(fs::read_to_string(&announced).unwrap(), format!("unix:{}\n", socket.display()));
    assert!(run("health").0.success());
    assert_eq!(client::connect(([127, 0, 0, 1], admin).into()).unwrap_err().kind(), ErrorKind::ConnectionRefused);
    let at = SocketAddr::from(([127, 0, 0, 1], dns));
    assert_eq!(ask(&datagrams::client(), at, b"still").0, b"still");
    kill_process(pid(third), Signal::TERM).unwrap();
    eventually("the third process ends", || (!is_running(third)).then_some(()));
    assert!(!announced.exists() && !socket.exists());
}

#[test]
fn unix_sockets_and_those_of_systemd_go_over() {
    let (echo, port, place) = (Echo::start(), free_port(), tempfile::tempdir().unwrap());
    let path = place.path().join("web.sock");
    let at = SocketAddr::from(([127, 0, 0, 1], port));
    let activate = |directory: &Path| {
        let mut command = Command::new(program("systemd-socket-activate"));
        command.arg("--listen").arg(at.to_string()).args(["--fdname=web", "--setenv=RUNTIME_DIRECTORY"]);
        command.arg(put_program(directory));
        command
    };
    // It starts the program with the first connection.
    let first = std::thread::spawn(move || eventually("somebody is served", || connect_and_exchange(at, 1).ok()));
    let config = format!(
        "[runtime]\nworkers = 2\n[listeners.local]\nbind = \"unix:{}\"\npool = \"web\"\n\
         [listeners.web]\nbind = \"fd:web\"\npool = \"web\"\n\
         [pools.web]\nproxy_protocol = \"v2\"\nupstreams = [\"{}\"]\n",
        path.display(),
        echo.address
    );
    let balancer = preface_by(activate, &config);
    first.join().unwrap();
    let (pids, others) = (vec![balancer.id()], Others::of(balancer.directory()));
    let mut lb = Upgraded { balancer, pids, others };
    let inode = |path: &Path| fs::symlink_metadata(path).unwrap().ino();
    let (file, sockets) = (inode(&path), listening_beside("self", [port]));
    assert_eq!(sockets[0].len(), 1);
    let clients = Clients::start(&[at; 2], Refused::IsFailure, &Budget::unlimited());
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let neighbour = scope.spawn(|| {
            let mut served = 0;
            while !stop.load(Relaxed) {
                let mut stream = UnixStream::connect(&path).expect("the socket has its file");
                exchange_at(&mut stream);
                served += 1;
            }
            served
        });
        for workers in [3, 1, 2] {
            clients.wait_for_more(50);
            lb.balancer.rewrite_config(&config.replace("workers = 2", &format!("workers = {workers}")));
            lb.upgrade();
            assert_eq!((inode(&path), listening_beside("self", [port])), (file, sockets.clone()));
        }
        clients.wait_for_more(50);
        stop.store(true, Relaxed);
        assert!(neighbour.join().expect("everyone was served") > 0);
    });
    clients.stop();
    assert!(echo.errors().is_empty(), "{:?}", echo.errors());
    // An upgrade that fails leaves the file where it is.
    put_script(lb.balancer.directory(), 0o755, "#!/bin/sh\nexit 1\n");
    lb.fail();
    fs::write(lb.balancer.config_file(), "nonsense").unwrap();
    put_program(lb.balancer.directory());
    lb.fail();
    assert_eq!(inode(&path), file);
    assert!(UnixStream::connect(&path).is_ok());
    // The last one takes it away.
    let serving = lb.serving();
    kill_process(pid(serving), Signal::TERM).unwrap();
    lb.wait_end(serving);
    assert!(!path.exists());
}

/// A stray variable, or somebody's mistake, is no reason not to start.
#[test]
fn a_variable_without_a_predecessor_means_nothing() {
    let receiver = Receiver::with_header(echo);
    let config = format!(
        "[listeners.web]\nbind = \"127.0.0.1:0\"\npool = \"web\"\n[pools.web]\nproxy_protocol = \"v2\"\nupstreams = [\"{}\"]\n",
        receiver.address
    );
    let own = std::process::id();
    let command = |_: &Path| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_preface"));
        command.env("PREFACE_UPGRADE", (own + 1).to_string());
        command
    };
    let balancer = preface_by(command, &config);
    connect_and_exchange(balancer.ipv4("web"), 1).expect("a connection");
    // With the right number but without a predecessor on standard input it says so.
    let mut command = Command::new(env!("CARGO_BIN_EXE_preface"));
    command.arg("run").arg("--config").arg(balancer.config_file()).env("PREFACE_UPGRADE", own.to_string());
    let (status, output) = Process::run(&mut command);
    assert_eq!(status.code(), Some(1));
    assert!(output.starts_with("preface: cannot take over from the running process: "), "{output}");
}

#[test]
fn process_1_is_not_upgraded() {
    let unshare = |arguments: &[&str]| {
        let mut command = Command::new(program("unshare"));
        command.args(["--pid", "--fork", "--kill-child", "--mount-proc"]).args(arguments);
        command
    };
    let (status, output) = Process::run(&mut unshare(&["true"]));
    if !status.success() {
        return skip("process_1_is_not_upgraded", &format!("no process namespaces here: {output}"));
    }
    let receiver = Receiver::with_header(echo);
    let config = format!(
        "[listeners.web]\nbind = \"127.0.0.1:0\"\npool = \"web\"\n[pools.web]\nproxy_protocol = \"v2\"\nupstreams = [\"{}\"]\n",
        receiver.address
    );
    let balancer = preface_by(|_| unshare(&[env!("CARGO_BIN_EXE_preface")]), &config);
    assert_eq!(balancer.status()["pid"], 1);
    let response = balancer.ask("POST", "/upgrade");
    assert_eq!(response.status, 422);
    let text = response.json()["errors"][0].as_str().unwrap().to_owned();
    assert_eq!(text, "this is process 1 of its container, which ends with it: roll out a new container instead");
    connect_and_exchange(balancer.ipv4("web"), 1).expect("it goes on");
}

#[test]
fn demo_is_not_upgraded() {
    let mut demo = Process::start(Command::new(env!("CARGO_BIN_EXE_preface")).arg("demo"));
    let line = demo.stdout.wait_for("the status page's address", |line| line.contains("http://127.0.0.1:"));
    drop(line);
    demo.signal(Signal::USR2);
    demo.stdout.wait_for("a refusal", |line| line.contains("it is not `preface run`"));
    demo.signal(Signal::INT);
    assert_eq!(demo.wait_exit().code(), Some(0));
}

/// The stream to the new process takes a hostile end as an error, like everything that comes from outside.
#[test]
fn a_new_process_that_answers_nonsense_is_ended() {
    let echo = Echo::start();
    let lb = Upgraded::start(&format!(
        "[listeners.web]\nbind = \"127.0.0.1:0\"\npool = \"web\"\n[pools.web]\nproxy_protocol = \"v2\"\nupstreams = [\"{}\"]\n",
        echo.address
    ));
    put_script(lb.balancer.directory(), 0o755, "#!/bin/sh\nprintf '\\0\\0\\0\\2{]' >&0\nexec sleep 600\n");
    let error = lb.fail();
    assert!(error.starts_with("the new process does not take over: "), "{error}");
    connect_and_exchange(lb.balancer.ipv4("web"), 1).expect("it goes on");
}

/// A new process that takes everything, and ends instead of serving.
const ENDS_LATE: &str = r#"#!/usr/bin/python3
import json, os, socket, struct, sys
old = socket.socket(fileno=os.dup(0))
def receive():
    length, = struct.unpack(">I", old.recv(4, socket.MSG_WAITALL))
    return json.loads(old.recv(length, socket.MSG_WAITALL))
adopted = []
for key, count in receive()["descriptors"]:
    received = []
    while len(received) < count:
        received += socket.recv_fds(old, 1, 128)[1]
    adopted += [] if key in ("stderr", "inherited") else [key]
ready = json.dumps({"version": "next", "adopted": adopted}).encode()
old.sendall(struct.pack(">I", len(ready)) + ready)
receive()
sys.exit("no memory left")
"#;

/// How often the workers of a process wait for this socket, by the descriptors of their epolls; one has several.
fn acceptors(process: u32, inode: u64) -> usize {
    let entries = fs::read_dir(format!("/proc/{process}/fdinfo")).expect("it runs");
    let texts = entries.filter_map(|entry| fs::read_to_string(entry.ok()?.path()).ok());
    let wanted = format!("ino:{inode:x}");
    texts.map(|text| text.split_whitespace().filter(|word| *word == wanted).count()).sum()
}

/// The kernel's number of the UNIX socket that listens at this path.
fn unix_listener(path: &Path) -> u64 {
    let table = fs::read_to_string("/proc/net/unix").expect("there is /proc");
    let line = table.lines().find(|line| line.ends_with(path.to_str().expect("text"))).expect("it listens");
    line.split_whitespace().nth(6).and_then(|inode| inode.parse().ok()).expect("an inode")
}

/// Where workers share a socket, one of them alone would accept from then on.
#[test]
fn after_a_new_process_that_ends_late_every_worker_accepts_again() {
    let (echo, place) = (Echo::start(), tempfile::tempdir().unwrap());
    let path = place.path().join("web.sock");
    let config = |workers: usize| {
        format!(
            "[runtime]\nworkers = {workers}\n\
             [listeners.web]\nbind = [\"127.0.0.1:0\", \"unix:{}\"]\npool = \"web\"\n\
             [pools.web]\nproxy_protocol = \"v2\"\nupstreams = [\"{}\"]\n",
            path.display(),
            echo.address
        )
    };
    let mut lb = Upgraded::start(&config(1));
    let (web, port) = (lb.balancer.ipv4("web"), lb.balancer.port("web"));
    let one_worker = acceptors(lb.serving(), unix_listener(&path));
    // From a process with one worker: the two of the next share its TCP socket, too.
    lb.balancer.rewrite_config(&config(2));
    lb.upgrade();
    let tcp = listening_beside("self", [port])[0].iter().copied().collect::<Vec<_>>();
    assert_eq!(tcp.len(), 1);
    let sockets = [tcp[0], unix_listener(&path)];
    let serving = lb.serving();
    assert_eq!(sockets.map(|inode| acceptors(serving, inode)), [2 * one_worker; 2]);
    put_script(lb.balancer.directory(), 0o755, ENDS_LATE);
    for _ in 0..3 {
        assert_eq!(lb.fail(), "the new process ended before it took over: exit status: 1\nno memory left");
        eventually("both workers accept", || {
            (sockets.map(|inode| acceptors(serving, inode)) == [2 * one_worker; 2]).then_some(())
        });
    }
    for seed in 0..20 {
        connect_and_exchange(web, seed).expect("it is served");
        let mut stream = UnixStream::connect(&path).expect("somebody accepts");
        exchange_at(&mut stream);
    }
}

#[track_caller]
fn exchange_at(stream: &mut UnixStream) {
    stream.write_all(b"question").expect("it takes it");
    stream.shutdown(Shutdown::Write).expect("it is open");
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).expect("an answer");
    assert_eq!(answer, b"question");
}
