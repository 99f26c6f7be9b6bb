//! The systems that people named when they asked for this: Wireshark's dissector, Go programs, WebSockets.
//! go-mmproxy needs a network namespace and is in `netns`.

use std::io::{BufRead, BufReader, Read};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::Path;
use std::process::Command;

use crate::support::client::{connect_from, loopback};
use crate::support::peers::nginx;
use crate::support::receiver::say_who;
use crate::support::{Process, Receiver, eventually, peers_directory, preface, program, skip};

const VPCE: &str = "vpce-08d2bf15fac5001c9";

fn with_vpce(upstream: SocketAddr, version: &str) -> String {
    let tlvs = if version == "v2" { format!("[pools.p.tlvs]\nvpce_id = \"{VPCE}\"\n") } else { String::new() };
    format!(
        "[listeners.web]\nbind = \"127.0.0.1:0\"\npool = \"p\"\n\
         [pools.p]\nproxy_protocol = \"{version}\"\nupstreams = [\"{upstream}\"]\n{tlvs}"
    )
}

#[test]
fn tshark_decodes_our_header() {
    let receiver = Receiver::with_header(say_who);
    let lb = preface(&with_vpce(receiver.address, "v2"));
    let directory = tempfile::tempdir().expect("a temporary directory");
    let capture = directory.path().join("capture.pcapng");
    let mut dumpcap = Command::new(program("dumpcap"));
    let filter = format!("tcp port {}", receiver.address.port());
    dumpcap.args(["-q", "-i", "lo", "-f", &filter, "-w"]).arg(&capture);
    let mut dumpcap = Process::start(&mut dumpcap);
    // It says that it captures before it does: connect until a header is caught.
    let mut clients = Vec::new();
    eventually("a header is captured", || {
        let client = lb.connect("web");
        receiver.wait_for(clients.len() + 1);
        clients.push(client.local_addr().expect("a client has an address"));
        let bytes = std::fs::read(&capture).unwrap_or_default();
        let caught = bytes.windows(VPCE.len()).any(|window| window == VPCE.as_bytes());
        (caught || !dumpcap.is_running()).then_some(())
    });
    if !dumpcap.is_running() {
        return skip("requested::tshark_decodes_our_header", &format!("no capture here: {}", dumpcap.stderr.text()));
    }
    dumpcap.signal(rustix::process::Signal::INT);
    dumpcap.wait_exit();

    let mut tshark = Command::new(program("tshark"));
    tshark.arg("-r").arg(&capture).args(["--disable-protocol", "http", "-VY", "proxy.v2.protocol==0x01"]);
    let (status, text) = Process::run(&mut tshark);
    assert!(status.success(), "{text}");
    let headers: Vec<&str> = text.split("PROXY Protocol\n").skip(1).collect();
    assert!(!headers.is_empty() && !text.contains("Malformed"), "{text}");
    let id: String = VPCE.bytes().map(|byte| format!("{byte:02x}")).collect();
    for header in headers {
        let value = |name: &str| header.lines().find_map(|line| line.trim().strip_prefix(name)).unwrap_or_default();
        assert!(header.contains("= Version: 2\n") && header.contains("= Command: 1\n"), "{header}");
        assert_eq!(value("Address Family Protocol: "), "TCP over IPv4 (0x11)");
        let client = format!("{}:{}", value("Source Address: "), value("Source Port: "));
        assert!(clients.iter().any(|one| one.to_string() == client), "{client} is none of {clients:?}");
        assert_eq!(value("Destination Port: "), lb.port("web").to_string());
        assert_eq!((value("Type: "), value("Value: ")), ("AWS (0xea)", format!("01{id}").as_str()));
    }
}

/// The Go receiver, built with the distribution's compiler and package.
fn go_receiver(directory: &Path) -> (Process, SocketAddr) {
    let binary = directory.join("receiver");
    let mut build = Command::new(program("go"));
    build.args(["build", "-o"]).arg(&binary).arg(peers_directory().join("receiver.go"));
    build.envs([("GO111MODULE", "off"), ("GOPATH", "/usr/share/gocode"), ("GOFLAGS", ""), ("CGO_ENABLED", "0")]);
    let (status, output) = Process::run(build.env("GOCACHE", directory.join("cache")));
    assert!(status.success(), "{output}: run tests/run, which installs what the tests need");
    let process = Process::start(Command::new(binary).arg("127.0.0.1:0"));
    let line = process.stdout.wait_for("the Go receiver listens", |line| line.starts_with("listening on "));
    let address = line.trim_start_matches("listening on ").parse().expect("an address");
    (process, address)
}

#[test]
fn a_go_receiver_prints_the_client() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let (process, address) = go_receiver(directory.path());
    for (version, vpce) in [("v1", ""), ("v2", VPCE)] {
        let lb = preface(&with_vpce(address, version));
        for index in 0..20 {
            let mut client = connect_from(loopback(index), lb.ipv4("web")).expect("a client connects");
            let expected = format!("{version} {} {vpce}", client.local_addr().unwrap());
            let mut answer = String::new();
            client.read_to_string(&mut answer).expect("the receiver answers");
            assert_eq!(answer.trim_end_matches('\n'), expected);
            process.stdout.wait_for("the client's line", |line| line == expected.trim_end());
        }
    }
}

/// Two listeners share a pool; Go's parser for AWS names the endpoint of each.
#[test]
fn a_go_receiver_names_the_endpoint_of_each_listener() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let (_process, address) = go_receiver(directory.path());
    let config = format!(
        "[listeners.blue]\nbind = \"127.0.0.1:0\"\npool = \"p\"\ntlvs = {{ vpce_id = \"vpce-blue\" }}\n\
         [listeners.green]\nbind = \"127.0.0.1:0\"\npool = \"p\"\n[listeners.green.tlvs]\nvpce_id = \"vpce-green\"\n\
         vpce_id_by_source = [{{ from = \"127.2.0.0/16\", id = \"vpce-two\" }}]\n\
         [pools.p]\nproxy_protocol = \"v2\"\nupstreams = [\"{address}\"]\n"
    );
    let lb = preface(&config);
    let two = IpAddr::V4(Ipv4Addr::new(127, 2, 0, 1));
    for (listener, source, id) in
        [("blue", loopback(0), "vpce-blue"), ("green", loopback(0), "vpce-green"), ("green", two, "vpce-two")]
    {
        let mut client = connect_from(source, lb.ipv4(listener)).expect("a client connects");
        let mut answer = String::new();
        client.read_to_string(&mut answer).expect("the receiver answers");
        assert_eq!(answer.trim(), format!("v2 {} {id}", client.local_addr().unwrap()));
    }
}

#[test]
fn a_websocket_through_a_v1_listener_stays_up() {
    let nginx = nginx();
    // Debian's own interpreter: the one that has Debian's packages.
    let python = |script: &str| {
        let mut command = Command::new("/usr/bin/python3");
        command.arg(peers_directory().join(script));
        command
    };
    let server = Process::start(python("websocket_server.py").arg(nginx.websocket.to_string()));
    server
        .stdout
        .wait_for("the WebSocket server listens (python3-websockets: run tests/run)", |line| line == "listening");
    let lb = preface(&with_vpce((Ipv4Addr::LOCALHOST, nginx.headers).into(), "v1"));
    let url = format!("ws://{}/websocket", lb.ipv4("web"));
    let (status, output) = Process::run(python("websocket_client.py").arg(url));
    assert!(status.success(), "{output}");
    let line = |word: &str| output.lines().find_map(|line| line.strip_prefix(word)).map(str::to_owned);
    assert!(line("local ").is_some(), "{output}");
    assert_eq!(line("named "), line("local "), "{output}");
    assert!(output.contains("echoed 1000000") && output.contains("echoed still here"), "{output}");
    assert_eq!(lb.status()["listeners"]["web"]["accepted"], 1);
    assert_eq!(nginx.errors(), [""; 0]);
}

/// SMTP, SSH, MySQL, FTP: nothing comes from the client until the server has spoken.
#[test]
fn a_server_that_speaks_first_is_heard() {
    let receiver = Receiver::with_header(say_who);
    for version in ["v1", "v2"] {
        let lb = preface(&with_vpce(receiver.address, version));
        let client = lb.connect("web");
        let mut banner = String::new();
        BufReader::new(&client).read_line(&mut banner).expect("the banner comes");
        assert_eq!(banner.trim(), client.local_addr().unwrap().to_string());
    }
}
