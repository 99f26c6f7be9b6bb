//! The binary as an operator calls it: exit codes, one message, and a running process that is found.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Output, Stdio};

/// The binary, without anything of this machine that could lead it to another process.
fn preface(directory: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_preface"));
    command.env_remove("PREFACE_ADMIN").env_remove("PREFACE_TOKEN_FILE").env_remove("PREFACE_CONFIG");
    command.env("RUNTIME_DIRECTORY", directory).env("TMPDIR", directory);
    command
}

fn outcome(command: &mut Command) -> (Option<i32>, String, String) {
    let Output { status, stdout, stderr } = command.output().unwrap();
    (status.code(), String::from_utf8(stdout).unwrap(), String::from_utf8(stderr).unwrap())
}

/// A running one, and what it says. Killed in the end.
struct Running {
    child: Child,
    stdout: BufReader<ChildStdout>,
}

impl Running {
    fn start(command: &mut Command) -> Running {
        let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
        let stdout = BufReader::new(child.stdout.take().unwrap());
        Running { child, stdout }
    }

    /// Everything up to the line that holds `what`.
    fn read_until(&mut self, what: &str) -> String {
        let mut text = String::new();
        while !text.lines().last().is_some_and(|line| line.contains(what)) {
            assert!(self.stdout.read_line(&mut text).unwrap() > 0, "no {what:?} in:\n{text}");
        }
        text
    }

    fn interrupt(mut self) -> Option<i32> {
        let id = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(id, rustix::process::Signal::INT).unwrap();
        self.child.wait().unwrap().code()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn wrong_usage_exits_with_2_and_failure_with_1() {
    let directory = tempfile::tempdir().unwrap();
    let (code, stdout, stderr) = outcome(preface(directory.path()).arg("drian"));
    assert_eq!((code, stdout.as_str()), (Some(2), ""));
    assert!(stderr.contains("drian") && stderr.contains("drain"), "{stderr}");
    assert_eq!(outcome(&mut preface(directory.path())).0, Some(2));
    let (code, stdout, stderr) = outcome(preface(directory.path()).args(["health", "--admin", "unix:/nonexistent"]));
    assert_eq!((code, stdout.as_str()), (Some(1), ""));
    assert!(stderr.starts_with("preface: no preface answers on unix:/nonexistent (from --admin): "), "{stderr}");
    let (code, stdout, stderr) = outcome(preface(directory.path()).arg("--version"));
    assert_eq!((code, stdout, stderr.as_str()), (Some(0), format!("preface {}\n", env!("CARGO_PKG_VERSION")), ""));
}

#[test]
fn check_and_run_say_the_same_of_a_file_that_cannot_be_read() {
    let directory = tempfile::tempdir().unwrap();
    let file = |name: &str, content: &[u8]| {
        let path = directory.path().join(name);
        std::fs::write(&path, content).unwrap();
        path
    };
    let mut larger = b"lisseners = 1 #".to_vec();
    larger.resize(5 << 20, b'#');
    let large = file("large", &larger);
    larger.resize((16 << 20) + 1, b'#');
    for (path, what) in [
        (directory.path().join("missing"), "no such file; is its path right?"),
        (directory.path().to_owned(), "is a directory; name the file in it"),
        (file("binary", b"a = 1\n\xff"), "not UTF-8 text (line 2); TOML is UTF-8"),
        (large, "lisseners"),
        (file("larger", &larger), "larger than 16 MiB; name a configuration file"),
    ] {
        for arguments in [&["check"][..], &["run", "--config"]] {
            let (code, _, said) = outcome(preface(directory.path()).args(arguments).arg(&path));
            assert!(code == Some(1) && said.contains(what), "{arguments:?}: {said}");
        }
    }
}

#[test]
fn a_file_that_was_just_broken_fails_the_reload_and_never_the_health_check() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("preface.toml");
    let good = |upstream: &str| {
        format!(
            "[admin]\nbind = \"unix:{}/admin.sock\"\n[listeners.web]\nbind = \"127.0.0.1:0\"\npool = \"web\"\n\
             [pools.web]\nupstreams = [{upstream:?}]\n",
            directory.path().display()
        )
    };
    std::fs::write(&file, good("192.0.2.1:80")).unwrap();
    let ask = |arguments: &[&str]| outcome(preface(directory.path()).args(arguments).arg("--config").arg(&file));
    let mut running = Running::start(preface(directory.path()).arg("run").arg("--config").arg(&file));
    running.read_until("event=start");
    assert_eq!(ask(&["health"]), (Some(0), "ready\n".to_owned(), String::new()));
    assert_eq!(ask(&["drain", "web", "--wait"]).1, "192.0.2.1:80 draining, no open connection\ndrained\n");
    assert_eq!(ask(&["disable", "web", "192.0.2.1:80"]).1, "192.0.2.1:80 disabled, no open connection\n");
    assert_eq!(ask(&["enable", "web"]).1, "192.0.2.1:80 enabled, no open connection\n");
    let (code, _, stderr) = ask(&["enable", "webb"]);
    assert_eq!((code, stderr.as_str()), (Some(1), "preface: no pool named \"webb\"; pools: web\n"));

    std::fs::write(&file, "[admin\nbroken = ").unwrap();
    let (code, stdout, stderr) = ask(&["reload"]);
    assert_eq!((code, stdout.as_str()), (Some(1), ""), "{stderr}");
    assert!(stderr.starts_with("preface: the reload was refused, and what ran goes on\n"), "{stderr}");
    assert!(stderr.contains("preface.toml:1:"), "{stderr}");
    assert_eq!(ask(&["health"]).0, Some(0));
    // Without the announcement the address still comes out of the file, broken as it is elsewhere.
    std::fs::write(&file, format!("{}[pools.web\n", good("192.0.2.1:80"))).unwrap();
    let elsewhere = tempfile::tempdir().unwrap();
    let mut health = preface(elsewhere.path());
    if !Path::new("/run/preface/preface.admin").exists() {
        assert_eq!(outcome(health.args(["health", "--config"]).arg(&file)).0, Some(0));
    }

    std::fs::write(&file, good("192.0.2.2:80")).unwrap();
    let (code, stdout, stderr) = ask(&["reload"]);
    assert_eq!(code, Some(0), "{stderr}");
    assert!(stdout.starts_with("applied in ") || stdout.starts_with("unchanged: "), "{stdout}");
    assert_eq!(running.interrupt(), Some(0));
    assert_eq!(ask(&["health"]).0, Some(1), "nobody is there any more");
}

#[test]
fn the_demo_shows_a_header_of_each_version_and_ends_with_control_c() {
    let directory = tempfile::tempdir().unwrap();
    let mut demo = Running::start(preface(directory.path()).arg("demo"));
    let text = demo.read_until("/metrics");
    let parts = ["PROXY protocol version 1", "PROXY protocol version 2", "AWS VPC endpoint vpce-08d2bf15fac5001c9"];
    for part in parts.into_iter().chain(["UDP over IPv4"]) {
        assert!(text.contains(part), "no {part:?} in:\n{text}");
    }
    assert_eq!(demo.interrupt(), Some(0));
    let left: Vec<_> = std::fs::read_dir(directory.path()).unwrap().collect();
    assert!(left.is_empty(), "the demo left {left:?}");
}
