//! What traffic costs in system calls, counted by strace on the one thread that carries it.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr};
use std::process::Command;

use rustix::process::Signal;

use crate::support::receiver::echo;
use crate::support::{Balancer, Process, Receiver, eventually, preface, program, skip};

/// A v2 header in front of one upstream, carried by one thread.
fn one_worker(upstream: SocketAddr) -> Balancer {
    preface(&format!(
        "[runtime]\nworkers = 1\n[listeners.web]\nbind = \"127.0.0.1:0\"\npool = \"test\"\n\
         [pools.test]\nproxy_protocol = \"v2\"\nupstreams = [\"{upstream}\"]\n"
    ))
}

/// The worker's thread id.
fn worker_thread(balancer: &Balancer) -> String {
    let tasks = std::fs::read_dir(format!("/proc/{}/task", balancer.id())).expect("the process is there");
    let workers: Vec<String> = tasks
        .map(|task| task.expect("a thread").path())
        .filter(|task| std::fs::read_to_string(task.join("comm")).is_ok_and(|name| name.starts_with("worker-")))
        .map(|task| task.file_name().expect("an id").to_string_lossy().into_owned())
        .collect();
    assert_eq!(workers.len(), 1, "one thread carries traffic");
    workers[0].clone()
}

/// The worker's system calls for `count` units of work, by name; or why this machine does not let them be counted.
/// A unit carries the four bytes that it is given through the balancer: they mark in the trace where counting begins
/// and ends, at the same point of a unit.
fn count_calls(
    balancer: &Balancer,
    count: usize,
    mut unit: impl FnMut(&[u8; 4]),
) -> Result<BTreeMap<String, usize>, String> {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let trace = directory.path().join("trace");
    let read = || std::fs::read_to_string(&trace).expect("strace has made its file");
    let mut command = Command::new(program("strace"));
    command.args(["-p", &worker_thread(balancer), "-o"]).arg(&trace);
    let mut strace = Process::start(&mut command);
    let told = strace
        .stderr
        .wait_for("attached, or why not", |line| line.contains("attached") || line.contains("not permitted"));
    if told.contains("not permitted") {
        return Err(told);
    }
    // What the thread does just after that is not in the trace yet.
    eventually("a unit is in the trace", || {
        unit(b"warm");
        read().contains("warm").then_some(())
    });
    unit(b"mark");
    (1..count).for_each(|_| unit(b"ping"));
    unit(b"done");
    eventually("the last unit is in the trace", || read().contains("done").then_some(()));
    strace.signal(Signal::INT);
    strace.wait_exit();
    let mut calls = BTreeMap::new();
    let text = read();
    let measured = text.lines().skip_while(|line| !line.contains("mark")).take_while(|line| !line.contains("done"));
    for line in measured {
        let (name, _) = line.split_once('(').unwrap_or_else(|| panic!("not a call: {line}"));
        *calls.entry(name.to_owned()).or_insert(0) += 1;
    }
    Ok(calls)
}

fn sum(calls: &BTreeMap<String, usize>, names: &[&str]) -> usize {
    names.iter().filter_map(|name| calls.get(*name)).sum()
}

const RECEIVES: [&str; 5] = ["recvfrom", "recvmsg", "read", "readv", "splice"];
const SENDS: [&str; 4] = ["sendto", "sendmsg", "write", "writev"];
const WAITS: [&str; 3] = ["epoll_wait", "epoll_pwait", "epoll_pwait2"];

#[test]
fn a_round_trip_costs_two_receives_two_sends_and_at_most_two_waits() {
    const ROUND_TRIPS: usize = 100;
    let receiver = Receiver::with_header(echo);
    let balancer = one_worker(receiver.address);
    let mut client = balancer.connect("web");
    let counted = count_calls(&balancer, ROUND_TRIPS, |bytes| {
        let mut answer = [0; 64];
        client.write_all(&bytes.repeat(16)).unwrap();
        client.read_exact(&mut answer).unwrap();
        assert_eq!(answer[..4], bytes[..]);
    });
    let calls = match counted {
        Ok(calls) => calls,
        Err(why) => return skip("a_round_trip_costs_two_receives_two_sends_and_at_most_two_waits", &why),
    };
    println!("{ROUND_TRIPS} round trips: {calls:?}");
    assert_eq!(sum(&calls, &RECEIVES), 2 * ROUND_TRIPS, "{calls:?}");
    assert_eq!(sum(&calls, &SENDS), 2 * ROUND_TRIPS, "{calls:?}");
    // The control thread asks for a sign of life now and then: that is a wait more, and the answer's wake-up.
    assert!(sum(&calls, &WAITS) <= 2 * ROUND_TRIPS + 5, "{calls:?}");
    assert!(calls.values().sum::<usize>() <= 6 * ROUND_TRIPS + 15, "{calls:?}");
}

#[test]
fn a_short_connection_costs_at_most_22_calls() {
    const CONNECTIONS: usize = 100;
    const CALLS_MAX: f64 = 22.0;
    const ROUNDS: usize = 5;
    let receiver = Receiver::with_header(|mut stream, arrival| {
        let mut question = arrival.behind.clone();
        let heard = question.len();
        question.resize(4, 0);
        stream.read_exact(&mut question[heard..])?;
        stream.write_all(&question)?;
        stream.shutdown(Shutdown::Write)
    });
    let balancer = one_worker(receiver.address);
    let mut finished = 0;
    let mut counted = Vec::new();
    // On a busy machine what belongs together comes in pieces, each with a wait of its own: the best of a few rounds.
    for _ in 0..ROUNDS {
        let calls = count_calls(&balancer, CONNECTIONS, |bytes| {
            let mut client = balancer.connect("web");
            client.write_all(bytes).unwrap();
            let mut answer = Vec::new();
            client.read_to_end(&mut answer).unwrap();
            assert_eq!(answer, bytes);
            drop(client);
            finished += 1;
            balancer.log().wait_for_count("its line", finished, |line| line.contains(" event=connection "));
        });
        let mut calls = match calls {
            Ok(calls) => calls,
            Err(why) => return skip("a_short_connection_costs_at_most_22_calls", &why),
        };
        if cfg!(debug_assertions) {
            // Before each close the standard library looks whether the descriptor is open, in debug builds only.
            calls.remove("fcntl");
        }
        let each = |count: usize| count as f64 / CONNECTIONS as f64;
        let total = each(calls.values().sum());
        let list: Vec<String> = calls.iter().map(|(name, count)| format!("{name} {:.2}", each(*count))).collect();
        counted.push(format!("{total:.2} ({})", list.join(", ")));
        if total <= CALLS_MAX {
            println!("calls of a short connection: {counted:?}");
            return;
        }
    }
    panic!("more than {CALLS_MAX} calls in each round: {counted:#?}");
}
