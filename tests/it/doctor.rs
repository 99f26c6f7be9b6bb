//! `preface doctor` in front of real receivers: what it finds is how they are configured.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::time::Duration;

use preface::config;
use preface::proxy_protocol::{self, Decoded, Header, Version};
use serde_json::Value;

use crate::support::dns;
use crate::support::more_peers::{self, is_root};
use crate::support::peers::{haproxy, nginx};
use crate::support::{Process, skip};

/// Tries in their order: no header, v2, v1, v2 LOCAL, v2 with TLVs, v1 UNKNOWN.
const TAKES_ALL: &str = "v2 v1 v2_local v2_tlvs v1_unknown";
/// Apache, Varnish and Postfix refuse `PROXY UNKNOWN`.
const TAKES_KNOWN: &str = "v2 v1 v2_local v2_tlvs";

fn doctor(arguments: &[&str]) -> (Option<i32>, String) {
    let (status, output) = Process::run(Command::new(env!("CARGO_BIN_EXE_preface")).arg("doctor").args(arguments));
    (status.code(), output)
}

#[track_caller]
fn examine(port: u16, more: &[&str]) -> Value {
    let address = format!("127.0.0.1:{port}");
    let (code, output) = doctor(&[&[address.as_str(), "--json"], more].concat());
    let value: Value = serde_json::from_str(&output).unwrap_or_else(|error| panic!("{error}: {output}"));
    assert_eq!(code, Some(0), "{value:#}");
    // What it recommends is a configuration, and nothing to warn of.
    let toml = format!("[listeners.l]\nbind = \":80\"\npool = \"NAME\"\n{}", value["toml"].as_str().unwrap());
    let parsed = config::parse("toml", &toml).unwrap_or_else(|error| panic!("{error:?}\n{toml}"));
    assert!(parsed.warnings.is_empty(), "{:?}\n{toml}", parsed.warnings);
    value
}

/// What it found, what it recommends, and which tries were answered.
#[track_caller]
fn finds(port: u16, more: &[&str], expects: &str, recommends: &str, answered: &str) -> Value {
    let value = examine(port, more);
    let tries = value["tries"].as_array().expect("tries");
    let words = |try_: &Value| try_["header"].as_str().unwrap_or_default().to_owned();
    let yes: Vec<String> = tries.iter().filter(|try_| try_["outcome"] == "answered").map(words).collect();
    let found = (value["expects"].as_str(), value["proxy_protocol"].as_str(), yes.join(" "));
    assert_eq!(found, (Some(expects), Some(recommends), answered.to_owned()), "{value:#}");
    assert_eq!(tries.len(), 6);
    value
}

/// It requires a header.
#[track_caller]
fn requires(port: u16, answered: &str) -> Value {
    finds(port, &[], "header_required", "v2", answered)
}

/// It expects none.
#[track_caller]
fn expects_none(port: u16) -> Value {
    finds(port, &[], "no_header", "off", "off")
}

#[test]
fn knows_nginx() {
    let nginx = nginx();
    requires(nginx.headers, TAKES_ALL);
    requires(nginx.stream, TAKES_ALL);
    expects_none(nginx.plain);
}

#[test]
fn knows_haproxy() {
    let haproxy = haproxy();
    requires(haproxy.headers, TAKES_ALL);
    expects_none(haproxy.plain);
}

#[test]
fn knows_apache() {
    let apache = more_peers::apache();
    requires(apache.headers, TAKES_KNOWN);
    expects_none(apache.plain);
}

#[test]
fn knows_varnish() {
    let varnish = more_peers::varnish();
    requires(varnish.headers, TAKES_KNOWN);
    expects_none(varnish.plain);
}

#[test]
fn knows_postfix() {
    if !is_root() {
        return skip("knows_postfix", "Postfix changes its user, and so must be started by root");
    }
    let postfix = more_peers::postfix();
    for port in [postfix.headers, postfix.third] {
        let value = requires(port, TAKES_KNOWN);
        assert!(value["toml"].as_str().is_some_and(|toml| toml.contains("expect = \"220\"")), "{value:#}");
    }
    expects_none(postfix.plain);
}

#[test]
fn knows_dovecot() {
    if !is_root() {
        return skip("knows_dovecot", "Dovecot changes its user, and so must be started by root");
    }
    let dovecot = more_peers::dovecot();
    let value = requires(dovecot.headers, TAKES_ALL);
    assert!(value["toml"].as_str().is_some_and(|toml| toml.contains("expect = \"* OK\"")), "{value:#}");
    expects_none(dovecot.plain);
}

/// By network: from a trusted one a header may come, and is not missed.
#[test]
fn knows_mariadb() {
    let trusting = more_peers::mariadb(Some("127.0.0.1"));
    finds(trusting.headers, &[], "header_optional", "v2", &format!("off {TAKES_ALL}"));
    // From another address of this machine it is not optional but refused.
    finds(trusting.headers, &["--source", "127.0.0.9"], "no_header", "off", "off");
    expects_none(more_peers::mariadb(None).headers);
}

#[test]
fn knows_a_plain_http_server() {
    expects_none(more_peers::python().plain);
}

/// On a port whose number doesn't say TLS, found out from the answer to HTTP.
#[test]
fn knows_tls() {
    let nginx = more_peers::nginx_tls();
    let value = requires(nginx.headers, TAKES_ALL);
    assert_eq!(value["asked"], "a TLS handshake");
    expects_none(nginx.plain);
    finds(nginx.headers, &["--tls"], "header_required", "v2", TAKES_ALL);
}

/// Found out from a server that closes whatever it is asked in HTTP.
#[test]
fn knows_tls_that_keeps_silent_about_it() {
    let haproxy = more_peers::haproxy_tls();
    let value = requires(haproxy.headers, TAKES_ALL);
    assert_eq!(value["asked"], "a TLS handshake");
    expects_none(haproxy.plain);
}

/// DNS servers that require a header, as the distribution configures them for the tests: over UDP and over TCP.
#[test]
fn knows_dns_servers() {
    for (name, server) in [("unbound", dns::unbound()), ("recursor", dns::recursor()), ("dnsdist", dns::dnsdist())] {
        let address = format!("127.0.0.1:{}", server.port);
        for (over, answered) in [(&["--udp"][..], "v2 v2_local v2_tlvs"), (&[], "v2 v2_local v2_tlvs")] {
            let question = ["--dns", "doctor.who", "--timeout", "1s", "--json"];
            let (code, output) = doctor(&[&[address.as_str()], over, &question].concat());
            let value: Value =
                serde_json::from_str(&output).unwrap_or_else(|error| panic!("{name}: {error}: {output}"));
            let tries = value["tries"].as_array().expect("tries").iter().filter(|one| one["outcome"] == "answered");
            let yes: Vec<&str> = tries.filter_map(|one| one["header"].as_str()).collect();
            assert_eq!((code, value["expects"].as_str()), (Some(0), Some("header_required")), "{name}: {value:#}");
            assert_eq!(yes.join(" "), answered, "{name} {over:?}: {value:#}");
            assert_eq!(value["proxy_protocol"], "v2", "{name}: {value:#}");
            // What it recommends is a configuration, and nothing to warn of.
            let protocol = if over.is_empty() { "tcp" } else { "udp" };
            let toml = value["toml"].as_str().expect("lines");
            let text = format!("[listeners.l]\nbind = \":53\"\nprotocol = \"{protocol}\"\npool = \"NAME\"\n{toml}");
            let parsed = config::parse("toml", &text).unwrap_or_else(|error| panic!("{error:?}\n{text}"));
            assert!(parsed.warnings.is_empty(), "{:?}\n{text}", parsed.warnings);
        }
    }
}

/// A file whose pool serves UDP is held against what answers there over UDP, with the question of its check.
#[test]
fn holds_a_file_against_dns_servers_over_udp() {
    let server = dns::unbound();
    let question: String = dns::query(0x1234, "doctor").iter().map(|byte| format!("\\u{byte:04x}")).collect();
    let directory = tempfile::tempdir().expect("a temporary directory");
    let file = directory.path().join("preface.toml");
    let path = file.display().to_string();
    let told = |header: &str| {
        let text = format!(
            "[listeners.dns]\nbind = \":53\"\nprotocol = \"udp\"\npool = \"dns\"\n\
             [pools.dns]\nproxy_protocol = \"{header}\"\nupstreams = [\"127.0.0.1:{}\"]\n\
             [pools.dns.health_check]\nprotocol = \"udp\"\nsend = \"{question}\"\nexpect = \"\\u0012\\u0034\"\n",
            server.port
        );
        std::fs::write(&file, text).expect("the file is written");
        let (code, text) = doctor(&["--config", &path, "--timeout", "1s"]);
        (code, without_ports(&text.replace(&path, "preface.toml"), &[(server.port, "UNBOUND")]))
    };
    let (code, wrong) = told("off");
    assert_eq!(code, Some(1), "{wrong}");
    insta::assert_snapshot!(wrong);
    let (code, right) = told("v2");
    assert_eq!(code, Some(0), "{right}");
    let (code, text) = doctor(&["127.0.0.1:5000", "--udp"]);
    assert!(code == Some(1) && text.contains("what should be asked of 127.0.0.1:5000?"), "{text}");
}

/// What a receiver of the test does with the bytes so far.
enum Does {
    Wait,
    Say(&'static [u8]),
    Close,
}

const OK: &[u8] = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n";

/// An HTTP server that takes these headers, and requires one or not. Returns its port and how many connections came.
fn receiver(takes: fn(&Header) -> bool, is_required: bool) -> (u16, Arc<AtomicUsize>) {
    serve(move |bytes| {
        let rest = match proxy_protocol::decode(bytes) {
            Ok(Decoded::Incomplete { .. }) => return Does::Wait,
            Ok(Decoded::Complete { header, len }) if takes(&header) => &bytes[len..],
            Ok(Decoded::Complete { .. }) => return Does::Close,
            Err(_) if is_required => return Does::Close,
            Err(_) => bytes,
        };
        if rest.ends_with(b"\r\n\r\n") { Does::Say(OK) } else { Does::Wait }
    })
}

/// One connection after the other, until the test's process ends.
fn serve(does: impl Fn(&[u8]) -> Does + Send + 'static) -> (u16, Arc<AtomicUsize>) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a free port");
    let port = listener.local_addr().expect("it is bound").port();
    let count = Arc::new(AtomicUsize::new(0));
    let counter = count.clone();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            counter.fetch_add(1, SeqCst);
            answer(stream.expect("a connection"), &does);
        }
    });
    (port, count)
}

/// Until the other side has closed, so that connections come one after the other.
fn answer(mut stream: TcpStream, does: &impl Fn(&[u8]) -> Does) {
    let mut bytes = Vec::new();
    let mut part = [0; 4096];
    stream.set_read_timeout(Some(Duration::from_secs(20))).expect("a limit");
    while let Ok(length @ 1..) = stream.read(&mut part) {
        bytes.extend_from_slice(&part[..length]);
        match does(&bytes) {
            Does::Wait => {}
            Does::Say(text) => {
                let _ = stream.write_all(text);
                return;
            }
            Does::Close => return,
        }
    }
}

#[test]
fn knows_receivers_that_take_only_a_part() {
    for (takes, is_required, expects, recommends, answered) in [
        (
            (|header| header.version == Version::V1) as fn(&Header) -> bool,
            true,
            "header_required",
            "v1",
            "v1 v1_unknown",
        ),
        (|header| header.version == Version::V2, true, "header_required", "v2", "v2 v2_local v2_tlvs"),
        (|header| header.tlvs.is_empty(), true, "header_required", "v2", "v2 v1 v2_local v1_unknown"),
        (|header| header.addresses.ends().is_some(), true, "header_required", "v2", "v2 v1 v2_tlvs"),
        (|_| true, false, "header_optional", "v2", "off v2 v1 v2_local v2_tlvs v1_unknown"),
        (|header| header.version == Version::V1, false, "header_optional", "v1", "off v1 v1_unknown"),
        (|_| false, false, "no_header", "off", "off"),
    ] {
        let (port, count) = receiver(takes, is_required);
        let value = finds(port, &["--timeout", "400ms"], expects, recommends, answered);
        assert_eq!(count.load(SeqCst), 6, "{value:#}");
        let refuses_local = recommends == "v2" && !answered.contains("v2_local");
        assert_eq!(value["toml"].as_str().unwrap().contains("proxy_command = \"proxy\""), refuses_local, "{value:#}");
    }
}

#[test]
fn asks_what_it_is_told_to_ask() {
    let pong = |bytes: &[u8]| match bytes {
        b"PING\r\n" => Does::Say(b"+PONG\r\n"),
        bytes if bytes.starts_with(b"PROXY") => Does::Say(b"-ERR unknown command\r\n+PONG\r\n"),
        _ => Does::Close,
    };
    let (port, _) = serve(pong);
    let question = ["--send", r"PING\r\n", "--expect", "PONG", "--timeout", "400ms"];
    let value = finds(port, &question, "no_header", "off", "off");
    assert_eq!(value["asked"], r#""PING\r\n""#);
}

/// An upstream that says nothing takes no longer than its time-outs, and one that isn't there none at all.
#[test]
fn no_conclusion_is_an_error() {
    let (silent, count) = serve(|_| Does::Wait);
    let (code, text) = doctor(&[&format!("127.0.0.1:{silent}"), "--timeout", "100ms"]);
    assert_eq!((code, count.load(SeqCst)), (Some(1), 3), "{text}");
    assert!(text.contains("No conclusion: it is silent whatever comes first"), "{text}");
    let gone = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).and_then(|listener| listener.local_addr()).unwrap();
    let (code, text) = doctor(&[&gone.to_string()]);
    assert_eq!(code, Some(1), "{text}");
    assert!(text.ends_with(&format!("preface: {gone}: not reached: connection refused")), "{text}");
}

/// Ports as words, so that what is told can be compared.
fn without_ports(text: &str, ports: &[(u16, &str)]) -> String {
    let text = ports.iter().fold(text.to_owned(), |text, (port, name)| text.replace(&port.to_string(), name));
    // A receiver that leaves bytes unread closes by a reset, or not, as it happens.
    let text = text.replace("reset without a byte", "closed without a byte");
    // Columns are as wide as the numbers were.
    text.lines().map(|line| if line.contains("  127.") { squeeze(line) } else { line.to_owned() } + "\n").collect()
}

fn squeeze(line: &str) -> String {
    line.split("  ").map(str::trim).filter(|part| !part.is_empty()).collect::<Vec<_>>().join(" | ")
}

#[test]
fn holds_a_file_against_its_upstreams() {
    let (nginx, haproxy, python) = (nginx(), haproxy(), more_peers::python());
    let directory = tempfile::tempdir().expect("a temporary directory");
    let file = directory.path().join("preface.toml");
    let write = |web: &str, python_header: &str, check: &str| {
        let text = format!(
            "[listeners.web]\nbind = \":80\"\npool = \"web\"\n\n[pools.web]\nproxy_protocol = \"{web}\"\n\
             upstreams = [\"127.0.0.1:{}\", \"127.0.0.1:{}\"]\n[pools.web.health_check]\nprotocol = \"http\"\n{check}\n\
             [pools.api]\nproxy_protocol = \"v1\"\n[[pools.api.upstreams]]\naddress = \"127.0.0.1:{}\"\n{python_header}\n",
            nginx.headers, haproxy.headers, python.plain
        );
        std::fs::write(&file, text).expect("the file is written");
    };
    let path = file.display().to_string();
    let ports = [(nginx.headers, "NGINX"), (haproxy.headers, "HAPROXY"), (python.plain, "PYTHON")];
    let told = |more: &[&str]| {
        let (code, text) = doctor(&[&["--config", &path], more].concat());
        (code, without_ports(&text.replace(&path, "preface.toml"), &ports))
    };
    write("off", "", "");
    let (code, wrong) = told(&[]);
    assert_eq!(code, Some(1), "{wrong}");
    insta::assert_snapshot!(wrong);
    write("v2", "proxy_protocol = \"off\"", "proxy_protocol = \"v1\"\nproxy_command = \"unknown\"");
    let (code, right) = told(&[]);
    assert_eq!(code, Some(0), "{right}");
    let (code, json) = told(&["--json"]);
    let json: Value = serde_json::from_str(&json).unwrap_or_else(|error| panic!("{error}: {json}"));
    assert_eq!(code, Some(0));
    let verdicts: Vec<_> = json["upstreams"].as_array().unwrap().iter().map(|one| &one["verdict"]).collect();
    assert_eq!(verdicts, ["ok", "ok", "ok"]);
    std::fs::write(&file, "[listeners]\nwrong = 1\n").expect("the file is written");
    let (code, text) = told(&[]);
    assert!(code == Some(1) && text.contains("preface.toml:2:1"), "{text}");
}

/// `localhost` may be ::1 first, where this server doesn't listen.
#[test]
fn the_first_address_of_a_name_that_is_reached_is_examined() {
    let python = more_peers::python();
    let (code, text) = doctor(&[&format!("localhost:{}", python.plain)]);
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, python.plain));
    assert!(code == Some(0) && text.starts_with(&address.to_string()), "{text}");
}
