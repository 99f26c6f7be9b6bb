//! What has a number: start-up and memory. The bounds here are generous, for a busy machine and an unoptimised build;
//! `benches/measure` prints the exact figures.

use std::process::Command;
use std::time::Instant;

use crate::hostile::{Silent, raise_descriptor_limit, resident_bytes};
use crate::support::ports::free_port;
use crate::support::{Process, client, eventually, preface};

#[test]
fn it_listens_within_a_second() {
    let directory = tempfile::tempdir().unwrap();
    let (file, port) = (directory.path().join("preface.toml"), free_port());
    let config = format!(
        "[listeners.web]\nbind = \"127.0.0.1:{port}\"\npool = \"test\"\n[pools.test]\nupstreams = [\"127.0.0.1:9\"]\n\
         [admin]\nbind = \"unix:{}\"\n",
        directory.path().join("admin.sock").display()
    );
    std::fs::write(&file, config).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_preface"));
    command.arg("run").arg("--config").arg(&file).env("RUNTIME_DIRECTORY", directory.path());
    let begun = Instant::now();
    let _process = Process::start(&mut command);
    eventually("it listens", || client::connect(([127, 0, 0, 1], port).into()).ok());
    let took = begun.elapsed();
    println!("start to listening: {took:?}");
    assert!(took.as_millis() < 1000, "{took:?}");
}

#[test]
fn an_idle_connection_costs_less_than_4_kib_of_user_memory() {
    const WARM: usize = 500;
    const MEASURED: usize = 4000;
    raise_descriptor_limit();
    let silent = Silent::new();
    let balancer = preface(&format!(
        "[listeners.web]\nbind = \"127.0.0.1:0\"\npool = \"test\"\n\
         [pools.test]\nproxy_protocol = \"v2\"\nupstreams = [\"{}\"]\n",
        silent.address
    ));
    let open = |count: usize, total: usize| {
        let clients: Vec<_> = (0..count).map(|_| balancer.connect("web")).collect();
        eventually("all of them are connected through", || {
            (balancer.metric("preface_headers_sent_total", &[]) == total as f64).then_some(())
        });
        (clients, resident_bytes(balancer.id()))
    };
    let (_warm, before) = open(WARM, WARM);
    let (_clients, after) = open(MEASURED, WARM + MEASURED);
    let each = after.saturating_sub(before) / MEASURED;
    println!("user memory of an idle connection: {each} bytes");
    assert!(each < 4096, "{each} bytes");
}
