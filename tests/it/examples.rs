//! The receivers' examples in `deploy/`, run by the real programs behind preface: only addresses, ports and paths are changed.

use std::fs;
use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;

use crate::support::client::{connect_from, loopback};
use crate::support::ports::free_port;
use crate::support::receiver::say_who;
use crate::support::{Balancer, Process, Receiver, client, eventually, http, preface, program};

const PREFACE: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

fn deploy(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy").join(path)
}

/// A file of `deploy/` with these texts replaced, each of which it must have.
#[track_caller]
fn adapted(path: &str, changes: &[(&str, &str)]) -> String {
    let text = fs::read_to_string(deploy(path)).unwrap_or_else(|error| panic!("{path}: {error}"));
    changes.iter().fold(text, |text, (from, to)| {
        assert!(text.contains(from), "{path} no longer has {from:?}");
        text.replace(from, to)
    })
}

/// Waits until someone listens.
#[track_caller]
fn listening(port: u16) {
    eventually("the receiver listens", || client::connect((PREFACE, port).into()).ok());
}

/// preface in front of this port, with the example's own health check passed.
#[track_caller]
fn balancer(port: u16) -> Balancer {
    let lb = preface(&format!(
        "[listeners.web]\nbind = \"127.0.0.1:0\"\npool = \"p\"\n[pools.p]\nproxy_protocol = \"v2\"\n\
         upstreams = [\"127.0.0.1:{port}\"]\n[pools.p.health_check]\nprotocol = \"http\"\npath = \"/healthz\"\n"
    ));
    lb.wait_health("p", (PREFACE, port).into(), "healthy");
    lb
}

/// nginx with this configuration, in the foreground.
#[track_caller]
fn nginx(directory: &TempDir, config: &str) -> Process {
    let file = directory.path().join("nginx.conf");
    fs::write(&file, config).expect("the configuration is written");
    let command = || {
        let mut command = Command::new(program("nginx"));
        command.arg("-p").arg(directory.path()).arg("-c").arg(&file).arg("-e").arg(directory.path().join("error.log"));
        command
    };
    let (status, output) = Process::run(command().arg("-t"));
    assert!(status.success() && !output.contains("[warn]"), "{output}");
    let user = if rustix::process::geteuid().is_root() { "user root;" } else { "" };
    let pid = directory.path().join("nginx.pid");
    Process::start(command().arg("-g").arg(format!("daemon off; pid {}; {user}", pid.display())))
}

#[test]
fn nginx_names_the_client() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let (web, stream, page) = (free_port(), free_port(), directory.path().join("page"));
    fs::create_dir(&page).expect("a directory is made");
    fs::write(page.join("index.html"), "hello\n").expect("a page is written");
    let next = Receiver::with_header(say_who);
    let log = directory.path().join("access.log");
    let config = adapted(
        "receivers/nginx.conf",
        &[
            ("modules/ngx_stream_module.so", "/usr/lib/nginx/modules/ngx_stream_module.so"),
            ("listen 8080 ", &format!("listen 127.0.0.1:{web} ")),
            ("listen 2525 ", &format!("listen 127.0.0.1:{stream} ")),
            ("proxy_pass 10.0.0.60:2525", &format!("proxy_pass {}", next.address)),
            ("set_real_ip_from 10.0.0.5", "set_real_ip_from 127.0.0.1"),
            ("/var/log/nginx/access.log", &log.display().to_string()),
            ("/var/www/html", &page.display().to_string()),
        ],
    );
    let _nginx = nginx(&directory, &config);
    listening(web);
    let lb = balancer(web);
    let source = loopback(7);
    let mut client = connect_from(source, lb.ipv4("web")).expect("a client connects");
    assert_eq!(http::get(&mut client, "/").expect("nginx answers").text(), "hello\n");
    let line = eventually("nginx's line", || {
        let log = fs::read_to_string(&log).unwrap_or_default();
        log.lines().find(|line| line.contains("\"GET / ")).map(str::to_owned)
    });
    assert!(line.starts_with(&format!("{source} via 127.0.0.1 ")), "{line}");

    // The stream server hands the client on to the next hop.
    let lb = preface(&format!(
        "[listeners.mail]\nbind = \"127.0.0.1:0\"\npool = \"p\"\n[pools.p]\nproxy_protocol = \"v2\"\n\
         upstreams = [\"127.0.0.1:{stream}\"]\n"
    ));
    let mut client = connect_from(source, lb.ipv4("mail")).expect("a client connects");
    http::send(&mut client, "GET", "/", &[]).expect("nginx reads");
    let arrivals = next.wait_for(1);
    assert_eq!(arrivals[0].client().ip(), source);
}

#[test]
fn haproxy_names_the_client() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let (web, app) = (free_port(), Receiver::plain(say_who));
    let config = adapted(
        "receivers/haproxy.cfg",
        &[
            ("bind :8080", &format!("bind 127.0.0.1:{web}")),
            ("src 10.0.0.5", "src 127.0.0.1"),
            ("10.0.0.60:8080", &app.address.to_string()),
        ],
    );
    let file = directory.path().join("haproxy.cfg");
    fs::write(&file, config).expect("the configuration is written");
    for file in [&file, &deploy("receivers/haproxy.cfg")] {
        let (status, output) = Process::run(Command::new(program("haproxy")).arg("-c").arg("-q").arg("-f").arg(file));
        assert!(status.success() && !output.contains("[WARNING]"), "{output}");
    }
    let haproxy = Process::start(Command::new(program("haproxy")).arg("-db").arg("-f").arg(&file));
    listening(web);
    let lb = balancer(web);
    let source = loopback(8);
    let mut client = connect_from(source, lb.ipv4("web")).expect("a client connects");
    http::send(&mut client, "GET", "/from-client", &[]).expect("HAProxy reads");
    drop(http::receive(&mut client));
    let line = haproxy.stdout.wait_for("HAProxy's line", |line| line.contains("/from-client"));
    assert!(line.starts_with(&format!("{source}:")), "{line}");
}

/// What `docker compose up` starts, without Docker: both configurations of deploy/docker/compose.
#[test]
fn composes_nginx_names_the_client() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let web = free_port();
    let server = adapted("docker/compose/nginx.conf", &[("127.0.0.1:8081", &format!("127.0.0.1:{web}"))]);
    let _nginx = nginx(&directory, &format!("events {{}}\nhttp {{\naccess_log off;\n{server}\n}}\n"));
    listening(web);
    let upstream = format!("127.0.0.1:{web}");
    let config =
        adapted("docker/compose/preface/preface.toml", &[(":8080", "127.0.0.1:0"), ("127.0.0.1:8081", &upstream)]);
    let lb = preface(&config);
    lb.wait_health("nginx", (PREFACE, web).into(), "healthy");
    let source = loopback(9);
    let mut client = connect_from(source, lb.ipv4("web")).expect("a client connects");
    let said = http::get(&mut client, "/").expect("nginx answers").text();
    assert_eq!(said, format!("nginx takes you for {source}, introduced by 127.0.0.1\n"));
}
