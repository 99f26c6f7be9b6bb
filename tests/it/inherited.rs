//! Sockets that the process was started with: `systemd-socket-activate` hands them over as systemd does.

use std::fs;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::Command;

use rustix::process::Signal;
use tempfile::TempDir;

use crate::support::client::connect;
use crate::support::ports::free_port;
use crate::support::receiver::{echo, say_who};
use crate::support::{DEADLINE, Process, Receiver, eventually, http, program};

/// A preface that is started by the first client of its sockets. Killed on drop.
struct Activated {
    process: Process,
    directory: TempDir,
}

impl Activated {
    /// Hands over these sockets, in a directory of its own. `options` are systemd-socket-activate's.
    fn start(directory: TempDir, options: &[&str], config: &str) -> Activated {
        let file = directory.path().join("preface.toml");
        let admin = directory.path().join("admin.sock");
        fs::write(&file, format!("[admin]\nbind = \"unix:{}\"\n{config}", admin.display())).expect("it is written");
        let mut command = Command::new(program("systemd-socket-activate"));
        command.args(options).arg(env!("CARGO_BIN_EXE_preface")).args(["run", "--config"]).arg(&file);
        command.env("RUNTIME_DIRECTORY", directory.path());
        let process = Process::start(&mut command);
        process.stderr.wait_for("it listens", |line| line.starts_with("Listening on "));
        Activated { process, directory }
    }

    fn admin(&self) -> PathBuf {
        self.directory.path().join("admin.sock")
    }

    fn ask(&self, method: &str, path: &str) -> http::Response {
        eventually("the admin API answers", || {
            let mut stream = UnixStream::connect(self.admin()).ok()?;
            stream.set_read_timeout(Some(DEADLINE)).ok()?;
            http::send(&mut stream, method, path, &[("X-Preface", "1"), ("Content-Length", "0")]).ok()?;
            http::receive(&mut stream).ok()
        })
    }

    /// What it said at its end: it has found the configuration wanting.
    #[track_caller]
    fn refused(mut self) -> String {
        assert_eq!(self.process.wait_exit().code(), Some(1), "{}", self.process.stdout.text());
        let lines = self.process.stderr.wait_for_end();
        let said: Vec<String> = lines.into_iter().filter(|line| line.contains("error: ")).collect();
        said.join("\n").replace(&self.directory.path().display().to_string(), "DIR")
    }
}

fn directory() -> TempDir {
    tempfile::tempdir().expect("a temporary directory")
}

fn pool(upstream: SocketAddr) -> String {
    format!("pool = \"app\"\n[pools.app]\nproxy_protocol = \"v2\"\nupstreams = [\"{upstream}\"]\n")
}

fn who(stream: &mut impl Read) -> String {
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("an answer");
    answer.trim().to_owned()
}

#[test]
fn two_named_sockets_are_served_and_survive_reloads() {
    let directory = directory();
    let receiver = Receiver::with_header(say_who);
    let (tcp, app) = (SocketAddr::from((Ipv4Addr::LOCALHOST, free_port())), directory.path().join("app.sock"));
    let both = format!("[listeners.web]\nbind = [\"fd:web\", \"fd:app\"]\n{}", pool(receiver.address));
    let config = format!("[runtime]\nworkers = 2\n{both}");
    let (listen, socket) = (tcp.to_string(), app.display().to_string());
    let options = ["--fdname=web:app", "-l", &listen, "-l", &socket];
    let activated = Activated::start(directory, &options, &config);
    // The first client starts it, and has waited in the socket's queue meanwhile.
    let mut first = connect(tcp).expect("the socket listens");
    assert_eq!(who(&mut first), first.local_addr().expect("an address").to_string());
    let mut client = UnixStream::connect(&app).expect("the socket listens");
    assert_eq!(who(&mut client), receiver.arrivals()[1].peer.to_string(), "LOCAL: the connection's own addresses");
    assert_eq!(receiver.arrivals()[1].raw[12], 0x20);
    let id = activated.process.id();
    for number in [3, 4] {
        let info = fs::read_to_string(format!("/proc/{id}/fdinfo/{number}")).expect("the descriptor is open");
        let flags = info.lines().find_map(|line| line.strip_prefix("flags:")).expect("flags").trim();
        let flags = u32::from_str_radix(flags, 8).expect("octal");
        assert_ne!(flags & rustix::fs::OFlags::CLOEXEC.bits(), 0, "descriptor {number} would be inherited: {info}");
    }
    let status = activated.ask("GET", "/status").json();
    assert_eq!(status["listeners"]["web"]["bind"], serde_json::json!(["fd:web", "fd:app"]));

    // A socket that no listener uses is still ours, and comes back; what waits in its queue is served then.
    let file = activated.directory.path().join("preface.toml");
    let text = fs::read_to_string(&file).expect("the configuration is there");
    fs::write(&file, text.replace("\"fd:web\", ", "")).expect("it is written");
    assert_eq!(activated.ask("POST", "/reload").status, 200);
    let mut waiting = connect(tcp).expect("the queue takes it");
    let mut other = UnixStream::connect(&app).expect("the socket listens");
    who(&mut other);
    fs::write(&file, &text).expect("it is written");
    assert_eq!(activated.ask("POST", "/reload").status, 200);
    assert_eq!(who(&mut waiting), waiting.local_addr().expect("an address").to_string());

    // A wrong name changes nothing, and says what there is.
    fs::write(&file, text.replace("fd:web", "fd:wbe")).expect("it is written");
    let report = activated.ask("POST", "/reload");
    assert_eq!(report.status, 422);
    let errors = report.json()["errors"].to_string().replace(&listen, "TCP").replace(&socket, "PATH");
    insta::assert_snapshot!(errors);
    drop((first, client, other, waiting));
    let mut activated = activated;
    activated.process.signal(Signal::TERM);
    assert!(activated.process.wait_exit().success());
    assert!(app.exists(), "the file belongs to whoever made it");
}

#[test]
fn datagrams_of_an_inherited_socket_find_their_session() {
    let upstream = UdpSocket::bind("127.0.0.1:0").expect("a free port");
    upstream.set_read_timeout(Some(DEADLINE)).expect("a time limit");
    let listen = SocketAddr::from((Ipv4Addr::LOCALHOST, free_port()));
    let to = upstream.local_addr().expect("an address");
    let config =
        format!("[runtime]\nworkers = 2\n[listeners.dns]\nbind = \"fd:dns\"\nprotocol = \"udp\"\n{}", pool(to));
    let options = ["--fdname=dns", "--datagram", "-l", &listen.to_string()];
    let _activated = Activated::start(directory(), &options, &config);
    let clients: Vec<UdpSocket> = (0..10).map(|_| UdpSocket::bind("127.0.0.1:0").expect("a free port")).collect();
    let mut from = Vec::new();
    for client in &clients {
        client.set_read_timeout(Some(DEADLINE)).expect("a time limit");
        for question in [&b"one"[..], b"two"] {
            client.send_to(question, listen).expect("it is sent");
            let mut bytes = [0; 256];
            let (length, session) = upstream.recv_from(&mut bytes).expect("it arrives");
            let own = client.local_addr().expect("an address").port().to_be_bytes();
            assert_eq!(&bytes[24..26], own, "the header names the client");
            assert!(bytes[..length].ends_with(question));
            upstream.send_to(b"answer", session).expect("it is sent");
            let (length, answered) = client.recv_from(&mut bytes).expect("it is answered");
            assert_eq!((&bytes[..length], answered), (&b"answer"[..], listen));
            from.push(session);
        }
    }
    assert!(from.chunks(2).all(|pair| pair[0] == pair[1]), "one session for each client: {from:?}");
}

#[test]
fn a_socket_of_the_wrong_kind_is_an_error_that_says_which() {
    let stream = "[listeners.web]\nbind = \"fd:web\"\n".to_owned() + &pool(([127, 0, 0, 1], 9).into());
    let datagrams = stream.replace("bind", "protocol = \"udp\"\nbind");
    let limited = stream.replace("bind", "deny = [\"10.0.0.0/8\"]\nbind");
    let mut said = String::new();
    for (config, options, name) in
        [(&stream, &["--datagram"][..], "web"), (&datagrams, &[], "web"), (&stream, &[], "www")]
    {
        let listen = SocketAddr::from((Ipv4Addr::LOCALHOST, free_port()));
        let (name, address) = (format!("--fdname={name}"), listen.to_string());
        let options = [&[name.as_str()], options, &["-l", &address]].concat();
        let activated = Activated::start(directory(), &options, config);
        if options.contains(&"--datagram") {
            UdpSocket::bind("127.0.0.1:0").expect("a free port").send_to(b"x", listen).expect("it is sent");
        } else {
            let mut client = connect(listen).expect("the socket listens");
            let _ = client.write_all(b"x");
        }
        said += &format!("{}\n", activated.refused().replace(&listen.to_string(), "ADDRESS"));
    }
    // What it is shows only at the start: `check` cannot say it.
    let directory = directory();
    let socket = directory.path().join("web.sock").display().to_string();
    let activated = Activated::start(directory, &["--fdname=web", "-l", &socket], &limited);
    let _client = UnixStream::connect(&socket).expect("the socket listens");
    said += &format!("{}\n", activated.refused());
    insta::assert_snapshot!(said);
}

#[test]
fn a_process_between_is_told_from_a_missing_name() {
    let directory = directory();
    let file = directory.path().join("preface.toml");
    let receiver = Receiver::plain(echo);
    let text = format!(
        "[admin]\nbind = \"unix:{}\"\n[listeners.web]\nbind = \"fd:web\"\n{}",
        directory.path().join("admin.sock").display(),
        pool(receiver.address)
    );
    fs::write(&file, text).expect("the configuration is written");
    let run = |variables: &[(&str, &str)]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_preface"));
        command.args(["run", "--config"]).arg(&file).env_remove("LISTEN_FDS").envs(variables.iter().copied());
        let (status, output) = Process::run(&mut command);
        assert_eq!(status.code(), Some(1), "{output}");
        output
    };
    assert!(run(&[]).contains("handed over: nothing was;"));
    let other = run(&[("LISTEN_PID", "1"), ("LISTEN_FDS", "1"), ("LISTEN_FDNAMES", "web")]);
    assert!(other.contains("nothing was (LISTEN_PID is \"1\", and this process is "), "{other}");
    let (status, output) = Process::run(Command::new(env!("CARGO_BIN_EXE_preface")).arg("check").arg(&file));
    assert!(status.success(), "check cannot know: {output}");
}
