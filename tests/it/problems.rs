//! What `problems` of the status says of the troubles that operators have, while they have them.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::process::Command;

use rustix::process::{Pid, Resource, Rlimit, prlimit};
use serde_json::{Value, json};

use crate::support::client;
use crate::support::http;
use crate::support::ports::free_port;
use crate::support::receiver::Arrival;
use crate::support::{Balancer, Receiver, eventually, preface, preface_by};

fn config(upstreams: &str, more: &str) -> String {
    format!(
        "[listeners.web]\nbind = \"127.0.0.1:0\"\npool = \"p\"\n\
         [pools.p]\nupstreams = [{upstreams}]\n{more}"
    )
}

/// Those of one kind.
fn problems(lb: &Balancer, kind: &str) -> Vec<Value> {
    let status = lb.status();
    let all = status["problems"].as_array().expect("a list");
    all.iter().filter(|problem| problem["kind"] == kind).cloned().collect()
}

/// Answers 200 to whatever is asked.
fn ok(mut stream: TcpStream, _: &Arrival) -> io::Result<()> {
    let lines = BufReader::new(stream.try_clone()?).lines();
    lines.map_while(Result::ok).find(|line| line.is_empty());
    stream.write_all(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 0\r\n\r\n")
}

#[test]
fn an_unhealthy_upstream_shows_why_its_last_check_failed() {
    let address = format!("127.0.0.1:{}", free_port());
    let check = "[pools.p.health_check]\nprotocol = \"http\"\nexpect_status = \"404\"\ninterval = \"100ms\"\n";
    let lb = preface(&config(&format!("{address:?}"), check));
    let at = address.parse().expect("an address");
    let first = lb.wait_health("p", at, "unhealthy");
    assert_eq!(first["health_reason"], "connection refused");
    let _receiver = Receiver::at(&address, false, ok);
    let reason = "status 200, expected 404";
    let later = eventually("the reason of a later check", || {
        Some(lb.upstream("p", at)).filter(|upstream| upstream["health_reason"] == reason)
    });
    assert_eq!(later["health_since"], first["health_since"]);
    let problem = problems(&lb, "unhealthy").pop().expect("a problem");
    assert_eq!(problem["what"], format!("unhealthy: {reason}"));
    assert!(problem["advice"].as_str().is_some_and(|advice| advice.contains("expect_status")), "{problem}");
    assert_eq!(lb.log().lines().iter().filter(|line| line.contains("event=health ")).count(), 1);
}

#[test]
fn connections_that_this_machine_cannot_make_are_a_problem_that_says_what_it_lacks() {
    let receiver = Receiver::plain(ok);
    let upstream = format!("\"{}\"", receiver.address);
    // Of TEST-NET-1: no machine has it.
    let mut lb = preface(&config(&upstream, "source = [\"192.0.2.9\"]\n"));
    let warning = "source \"192.0.2.9\" is not an address of this machine";
    assert!(problems(&lb, "configuration")[0]["what"].as_str().is_some_and(|what| what.contains(warning)));
    lb.log().wait_for("the warning", |line| line.contains("event=config") && line.contains("192.0.2.9"));
    for _ in 0..3 {
        let ended = client::connect(lb.ipv4("web")).and_then(|mut client| client.read(&mut [0]));
        assert!(ended.is_err(), "{ended:?}");
    }
    let problem = eventually("the problem", || problems(&lb, "local_resources").pop());
    assert_eq!(problem["severity"], "bad");
    let what = problem["what"].as_str().expect("text");
    assert!(what.ends_with("source 192.0.2.9 is not an address of this machine"), "{what}");
    assert!(problem["since"].is_string(), "{problem}");
    assert!(problem["advice"].as_str().is_some_and(|advice| advice.contains("ip addr")), "{problem}");
    lb.log().wait_for("the transition", |line| line.contains("event=local_resources") && line.contains("listener=web"));

    lb.rewrite_config(&config(&upstream, "source = [\"127.0.0.1\"]\n"));
    let report: Value = lb.reload().json();
    assert_eq!(report["warnings"], json!([]), "{report}");
    assert_eq!(problems(&lb, "configuration").len(), 0);
}

/// Preface with at most so many descriptors.
fn preface_with(descriptors: usize, config: &str) -> Balancer {
    let limited = |_: &std::path::Path| {
        let mut command = Command::new("sh");
        let script = format!("ulimit -n {descriptors}; exec \"$0\" \"$@\"");
        command.args(["-c", &script, env!("CARGO_BIN_EXE_preface")]);
        command
    };
    preface_by(limited, config)
}

#[test]
fn no_more_connections_are_accepted_than_the_descriptors_allow_whatever_the_file_says() {
    let file = |runtime: &str| format!("{}[runtime]\nworkers = 1\n{runtime}", config("\"127.0.0.1:9\"", ""));
    let mut lb = preface_with(512, &file("max_connections = 100000\n"));
    let max = lb.status()["connections"]["max"].as_u64().expect("a number");
    assert!((64..256).contains(&max), "{max}");
    let what =
        format!("runtime.max_connections = 100000 is more than 512 descriptors have room for: {max} is in force");
    assert_eq!(problems(&lb, "configuration")[0]["what"], what);
    lb.log().wait_for("the start", |line| line.contains("event=start"));
    assert_eq!(lb.log().lines().iter().filter(|line| line.contains(&what)).count(), 1, "{}", lb.log().text());
    assert_eq!(lb.metric("preface_connections_max", &[]) as u64, max);

    lb.rewrite_config(&file("max_connections = 200000\n"));
    let report: Value = lb.reload().json();
    let warnings = report["warnings"].as_array().expect("a list");
    assert!(warnings.len() == 1 && warnings[0].as_str().is_some_and(|one| one.contains("200000 is more")), "{report}");
    lb.apply(&file("max_connections = 100\n"));
    assert_eq!((lb.status()["connections"]["max"].as_u64(), problems(&lb, "configuration").len()), (Some(100), 0));

    let lb = preface_with(64, &file(""));
    let what = problems(&lb, "configuration")[0]["what"].clone();
    assert_eq!(what, "the descriptor limit of 64 leaves room for 1 connections");
}

#[test]
fn without_a_descriptor_left_the_file_is_not_said_to_be_broken_and_all_are_said_to_be_open() {
    let mut lb = preface(&config("\"127.0.0.1:9\"", ""));
    lb.ask("POST", "/log?level=debug");
    let before = lb.status();
    // No other is accepted for as long as it lasts.
    let mut admin = UnixStream::connect(lb.admin_socket()).expect("it listens");
    admin.write_all(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n").expect("it is sent");
    let mut answer = Vec::new();
    while !answer.ends_with(b"\r\n\r\nok\n") {
        let mut byte = [0];
        admin.read_exact(&mut byte).expect("an answer");
        answer.extend(byte);
    }
    let pid = Pid::from_raw(lb.id() as i32);
    // It has raised its own to the maximum.
    let maximum = before["process"]["descriptors_max"].as_u64();
    prlimit(pid, Resource::Nofile, Rlimit { current: Some(1), maximum }).expect("the limit is set");
    lb.rewrite_config(&config("\"127.0.0.1:9\"", "retries = 7\n"));
    lb.log().wait_for_count("looks that failed", 2, |line| line.contains("no descriptor is left to look"));
    let during: Value = http::get(&mut admin, "/status").expect("an answer").json();
    assert_eq!(during["process"]["descriptors"], before["process"]["descriptors_max"]);
    assert_eq!(during["reloads"], json!([]));
    prlimit(pid, Resource::Nofile, Rlimit { current: maximum, maximum }).expect("the limit is set back");
    lb.log().wait_for("the reload", |line| line.contains("event=reload") && line.contains("outcome=applied"));
    assert!(!lb.log().text().contains("outcome=refused"), "{}", lb.log().text());
}

#[test]
fn an_upstream_whose_last_connects_all_failed_is_a_problem_since_the_first_of_them() {
    let address = format!("127.0.0.1:{}", free_port());
    let lb = preface(&config(&format!("{address:?}"), "retries = 0\n"));
    // The reset may be there before the connect has returned.
    let fail = || drop(client::connect(lb.ipv4("web")).and_then(|mut client| client.read(&mut [0])));
    for _ in 0..3 {
        fail();
    }
    let first = eventually("the problem", || problems(&lb, "connects_fail").pop());
    assert_eq!(first["what"], "its last 3 connects all failed");
    fail();
    let later = eventually("the fourth", || {
        let found = problems(&lb, "connects_fail").pop()?;
        (found["what"] == "its last 4 connects all failed").then_some(found)
    });
    assert!(first["since"].is_string() && first["since"] == later["since"], "{first} {later}");
    let _receiver = Receiver::at(&address, false, ok);
    drop(lb.connect("web").write_all(b"GET / HTTP/1.1\r\n\r\n"));
    eventually("it is over", || {
        let at = address.parse().expect("an address");
        lb.upstream("p", at)["failing"].is_null().then_some(())
    });
}

#[test]
fn refused_reloads_are_a_problem_since_the_first_of_them() {
    let mut lb = preface(&config("\"127.0.0.1:9\"", ""));
    let mut refused = |upstream: &str| {
        lb.rewrite_config(&config(upstream, ""));
        assert_eq!(lb.reload().status, 422);
        problems(&lb, "reload_refused").pop().expect("a problem")
    };
    let (first, second) = (refused("\"one two\""), refused("\"three four\""));
    assert!(first["what"] != second["what"] && first["since"].is_string(), "{first} {second}");
    assert_eq!(first["since"], second["since"]);
}

#[test]
fn what_applies_at_the_next_start_is_said_until_then() {
    let file = |runtime: &str| format!("{}[runtime]\n{runtime}", config("\"127.0.0.1:9\"", ""));
    let mut lb = preface(&file("workers = 1\n"));
    let line = "runtime: workers 1 -> 2 (applies at the next start)";
    lb.rewrite_config(&file("workers = 2\n"));
    for _ in 0..2 {
        let report: Value = lb.reload().json();
        assert_eq!(report["outcome"], "unchanged", "{report}");
        assert_eq!(report["pending"], json!([line]), "{report}");
    }
    let shown: Value = lb.ask("GET", "/config").json();
    assert_eq!(shown["pending"], json!([line]));
    assert_eq!(problems(&lb, "configuration")[0]["what"], format!("not in force: {line}"));
    lb.rewrite_config(&file("workers = 2\nstop_timeout = \"7s\"\n"));
    let report: Value = lb.reload().json();
    assert_eq!((&report["outcome"], &report["pending"]), (&json!("applied"), &json!([line])), "{report}");
    lb.rewrite_config(&file("workers = 1\nstop_timeout = \"7s\"\n"));
    let report: Value = lb.reload().json();
    assert_eq!((&report["outcome"], &report["pending"]), (&json!("unchanged"), &json!([])), "{report}");
    assert_eq!(problems(&lb, "configuration").len(), 0);
}

#[test]
fn a_token_file_that_cannot_be_used_is_said_at_the_start() {
    let lb = preface(&format!("{}[admin]\ntoken_file = \"/nonexistent/token\"\n", config("\"127.0.0.1:9\"", "")));
    let line = lb.log().wait_for("the warning", |line| line.contains("event=config"));
    assert!(line.contains("admin.token_file /nonexistent/token cannot be used: No such file"), "{line}");
}
