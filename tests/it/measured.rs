//! What has a number: start-up and memory. The bounds here are generous, for a busy machine and an unoptimised build;
//! `benches/measure` prints the exact figures.

use std::process::Command;
use std::time::Instant;

use crate::hostile::{Crowded, resident_bytes};
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
    let silent = Crowded::silent();
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

/// What `/proc` says a worker may run on.
fn processors_of_workers(id: u32) -> Vec<String> {
    let tasks = std::fs::read_dir(format!("/proc/{id}/task")).unwrap();
    let read = |path: &std::path::Path, file: &str| std::fs::read_to_string(path.join(file)).unwrap_or_default();
    let workers = tasks.map(|task| task.unwrap().path()).filter(|task| read(task, "comm").starts_with("worker-"));
    let allowed = workers.map(|task| {
        let status = read(&task, "status");
        let line = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"));
        line.expect("Linux says it").trim().to_owned()
    });
    allowed.collect()
}

#[test]
fn pinned_workers_have_a_processor_each_in_turn() {
    let config = |pin: bool| {
        format!(
            "[runtime]\nworkers = 2\npin_workers = {pin}\n[listeners.web]\nbind = \"127.0.0.1:0\"\npool = \"test\"\n\
             [pools.test]\nupstreams = [\"127.0.0.1:9\"]\n"
        )
    };
    let own = std::fs::read_to_string("/proc/self/status").unwrap();
    let own = own.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:")).unwrap().trim();
    assert_eq!(processors_of_workers(preface(&config(false)).id()), [own, own]);
    let pinned = processors_of_workers(preface(&config(true)).id());
    assert_eq!(pinned.len(), 2);
    assert!(pinned.iter().all(|processor| processor.parse::<usize>().is_ok()), "{pinned:?}");
    assert!(std::thread::available_parallelism().unwrap().get() < 2 || pinned[0] != pinned[1], "{pinned:?}");
}
