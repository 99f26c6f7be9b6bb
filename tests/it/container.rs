//! The image as a container engine runs it, restricted as in Kubernetes: its size, its header at a real nginx, a reload
//! through a mounted ConfigMap, its end.
//!
//! What is built here is the last stage of deploy/docker/Dockerfile around a binary from cargo: the stage that compiles needs
//! an image from a registry, so no test builds it.

use std::fs::{self, Permissions};
use std::io::ErrorKind;
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::os::unix::fs::PermissionsExt;

use serde_json::Value;
use tempfile::TempDir;

use crate::load::exchange;
use crate::support::configmap::configmap_swap;
use crate::support::peers::nginx;
use crate::support::podman::Engine;
use crate::support::ports::free_port;
use crate::support::receiver::echo;
use crate::support::{Receiver, client, eventually, http, skip};

const IMAGE_BYTES_MAX: u64 = 10_000_000;

/// An engine with the image; or says SKIP.
fn engine(test: &str) -> Option<Engine> {
    Engine::with_image().map_err(|why| skip(test, &why)).ok()
}

/// A directory that everybody may read, as the kubelet makes it.
fn volume() -> TempDir {
    let directory = tempfile::tempdir().expect("a temporary directory");
    fs::set_permissions(directory.path(), Permissions::from_mode(0o755)).expect("a mode is set");
    directory
}

/// One listener in front of one upstream; the admin API on loopback, as by default.
struct Scene {
    listener: u16,
    admin: u16,
    upstream: u16,
}

impl Scene {
    fn new(upstream: u16) -> Scene {
        Scene { listener: free_port(), admin: free_port(), upstream }
    }

    fn toml(&self, version: &str) -> String {
        let Scene { listener, admin, upstream } = self;
        format!(
            "[runtime]\nworkers = 1\nstop_delay = \"1s\"\nstop_timeout = \"40s\"\n[admin]\nbind = \"127.0.0.1:{admin}\"\n\
             [listeners.web]\nbind = \"127.0.0.1:{listener}\"\npool = \"web\"\n\
             [pools.web]\nproxy_protocol = \"{version}\"\nupstreams = [\"127.0.0.1:{upstream}\"]\n"
        )
    }

    fn connect(&self) -> std::io::Result<TcpStream> {
        client::connect((Ipv4Addr::LOCALHOST, self.listener).into())
    }
}

/// Asks through the balancer for a path, and returns the client's own address.
#[track_caller]
fn get(scene: &Scene, path: &str) -> SocketAddr {
    let mut stream = scene.connect().expect("the container listens");
    let own = stream.local_addr().expect("a connected socket has an address");
    assert_eq!(http::get(&mut stream, path).expect("nginx answers").status, 200);
    own
}

#[test]
fn an_image_below_ten_megabytes_that_runs_as_nobody() {
    let Some(engine) = engine("an_image_below_ten_megabytes_that_runs_as_nobody") else { return };
    let image: Value = serde_json::from_str(&engine.must(&["image", "inspect", "preface"])).expect("JSON");
    let bytes = image[0]["Size"].as_u64().expect("an image has a size");
    assert!(bytes < IMAGE_BYTES_MAX, "the image has {bytes} bytes");
    eprintln!("the image has {bytes} bytes");
    let config = &image[0]["Config"];
    assert_eq!(config["User"], "65532:65532");
    assert_eq!(config["Entrypoint"], serde_json::json!(["/preface"]));
    assert_eq!(config["Cmd"], serde_json::json!(["run"]));
    assert_eq!(config["StopSignal"], "SIGTERM");
    assert_eq!(image[0]["Healthcheck"]["Test"], serde_json::json!(["CMD", "/preface", "health"]));
    // No shell, no loader: what is in it is what was laid out.
    let (status, output) = crate::support::Process::run(engine.command().args([
        "run",
        "--rm",
        "--pull=never",
        "--network=host",
        "--entrypoint=/bin/sh",
        "preface",
    ]));
    assert!(!status.success() && output.contains("/bin/sh"), "{output}");
}

#[test]
fn nginx_reads_its_header_and_a_configmap_reloads_it() {
    let Some(engine) = engine("nginx_reads_its_header_and_a_configmap_reloads_it") else { return };
    let nginx = nginx();
    let (scene, volume) = (Scene::new(nginx.headers), volume());
    configmap_swap(volume.path(), &scene.toml("v2"));
    let container = engine.run("reloaded", volume.path());
    let first = get(&scene, "/v2");
    assert_eq!(nginx.wait_for(1)[0].client, first, "nginx knows the client by preface's header");

    let log = &container.process.stdout;
    let mut kept = scene.connect().expect("the container listens");
    configmap_swap(volume.path(), &scene.toml("v1"));
    log.wait_for("a reload", |line| line.contains("trigger=file") && line.contains("outcome=applied"));
    let second = get(&scene, "/v1");
    assert_eq!(nginx.wait_for(2)[1].client, second);
    log.wait_for("a connection with the new header", |line| line.contains("header=v1"));
    assert_eq!(http::get(&mut kept, "/kept").expect("what was open goes on").status, 200);

    // A broken one changes nothing, neither what runs nor what the engine thinks of it; its repair is a reload again.
    configmap_swap(volume.path(), &(scene.toml("v1") + "[nonsense\n"));
    log.wait_for("a refusal", |line| line.contains("trigger=file") && line.contains("outcome=refused"));
    assert!(container.is_healthy());
    let (reloaded, output) = container.exec(&["reload"]);
    assert!(!reloaded && output.contains("nonsense"), "{output}");
    get(&scene, "/while-broken");
    configmap_swap(volume.path(), &scene.toml("v2"));
    log.wait_for_count("the repair", 2, |line| line.contains("trigger=file") && line.contains("outcome=applied"));
    assert_eq!(nginx.errors(), [""; 0]);
}

#[test]
fn a_stop_waits_for_what_is_open() {
    let Some(engine) = engine("a_stop_waits_for_what_is_open") else { return };
    let receiver = Receiver::with_header(echo);
    let (scene, volume) = (Scene::new(receiver.address.port()), volume());
    configmap_swap(volume.path(), &scene.toml("v2"));
    let mut container = engine.run("stopped", volume.path());
    let mut open = scene.connect().expect("the container listens");
    exchange(&mut open, 1, 1_000).expect("the echo answers");

    let mut stop = container.stop(60);
    eventually("not ready", || (!container.is_healthy()).then_some(()));
    let refused = eventually("nobody listens any more", || scene.connect().err());
    assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
    assert!(container.process.is_running(), "it waits for the open connection");
    exchange(&mut open, 2, 100_000).expect("what is open goes on");
    drop(open);
    assert_eq!(container.process.wait_exit().code(), Some(0));
    assert!(stop.wait_exit().success());
    let log = container.process.stdout.wait_for_end();
    assert!(log.iter().any(|line| line.contains("end=client.relay.closed")), "{log:#?}");
    assert!(log.last().is_some_and(|line| line.contains("event=stop")), "{log:#?}");
}
