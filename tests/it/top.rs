//! `preface top` in a terminal (tmux plays it): what it shows, its keys, and that it gives the terminal back.

use std::io::Read;
use std::net::{Shutdown, SocketAddr};
use std::path::Path;
use std::process::Command;

use rustix::process::{Pid, Signal};
use tempfile::TempDir;

use crate::support::ports::free_port;
use crate::support::receiver::say_who;
use crate::support::{Process, Receiver, eventually, preface, program};

/// A terminal of 80 by 24 in which a shell runs one command and says how it ended. Everything ends with it.
struct Terminal {
    directory: TempDir,
}

impl Terminal {
    #[track_caller]
    fn start(arguments: &str) -> Terminal {
        let terminal = Terminal { directory: tempfile::tempdir().expect("a temporary directory") };
        let preface = env!("CARGO_BIN_EXE_preface");
        let script = format!(
            "echo before; {preface} top {arguments} & echo $! >{}; fg >/dev/null; echo \"ended with $?\"; stty -a; exec cat",
            terminal.directory.path().join("id").display()
        );
        let command = ["new-session", "-d", "-x", "80", "-y", "24", "bash", "-m", "-c", &script];
        terminal.tmux(&command);
        terminal
    }

    #[track_caller]
    fn tmux(&self, arguments: &[&str]) -> String {
        let mut command = Command::new(program("tmux"));
        command.arg("-S").arg(self.directory.path().join("tmux")).args(["-f", "/dev/null"]).args(arguments);
        let (status, output) = Process::run(command.env_remove("TMUX").env("LC_ALL", "C.UTF-8"));
        assert!(status.success(), "tmux {arguments:?}: {output}");
        output
    }

    /// Types: `j`, `Enter`, `C-c`.
    #[track_caller]
    fn press(&self, keys: &[&str]) {
        self.tmux(&[&["send-keys"], keys].concat());
    }

    /// The id of `preface top`.
    #[track_caller]
    fn id(&self) -> Pid {
        let text = std::fs::read_to_string(self.directory.path().join("id")).expect("the shell has written it");
        Pid::from_raw(text.trim().parse().expect("a number")).expect("not 0")
    }

    /// Waits until the screen is as wanted.
    #[track_caller]
    fn wait_for(&self, what: &str, wanted: impl Fn(&str) -> bool) -> String {
        let mut last = String::new();
        let look = || {
            last = self.tmux(&["capture-pane", "-p"]);
            wanted(&last).then(|| last.clone())
        };
        eventually(&format!("{what} on the screen"), look)
    }

    /// The command has ended, its screen is gone, and the shell's line discipline is as it was.
    #[track_caller]
    fn wait_restored(&self, status: u8) {
        let ended = format!("ended with {status}");
        let screen = self.wait_for("the shell's words", |screen| screen.contains(&ended) && screen.contains("extproc"));
        assert!(screen.contains("before") && !screen.contains("q quit"), "{screen}");
        for setting in [" icanon", " echo ", " isig", " opost"] {
            assert!(screen.replace('\n', " ").contains(setting), "{setting} is off: {screen}");
        }
        assert_eq!(self.tmux(&["display-message", "-p", "#{alternate_on} #{cursor_flag}"]).trim(), "0 1");
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let tmux = |arguments: &[&str]| {
            let mut command = Command::new(program("tmux"));
            command.arg("-S").arg(self.directory.path().join("tmux")).args(arguments).output()
        };
        if std::thread::panicking()
            && let Ok(output) = tmux(&["capture-pane", "-p"])
        {
            eprintln!("--- the screen\n{}", String::from_utf8_lossy(&output.stdout).trim_end());
        }
        let _ = tmux(&["kill-server"]);
    }
}

fn config(upstream: &Receiver) -> String {
    format!(
        "[listeners.web]\nbind = \"127.0.0.1:0\"\npool = \"ingress\"\n\
         [pools.ingress]\nproxy_protocol = \"v2\"\nupstreams = [\"{}\"]\n",
        upstream.address
    )
}

fn at(socket: &Path) -> String {
    format!("--admin unix:{}", socket.display())
}

#[test]
fn shows_upstreams_and_drains_one_after_a_yes() {
    let receiver = Receiver::with_header(say_who);
    let balancer = preface(&config(&receiver));
    let address = receiver.address.to_string();
    let terminal = Terminal::start(&at(&balancer.admin_socket()));
    terminal.wait_for("the upstream", |screen| screen.contains(&address) && screen.contains("1/1 serving"));
    let admin = || balancer.upstream("ingress", receiver.address)["admin"].clone();
    terminal.press(&["j", "d"]);
    terminal.wait_for("the question", |screen| screen.contains(&format!("y/n  drain {address} of ingress?")));
    assert_eq!(admin(), "enabled");
    terminal.press(&["y"]);
    terminal.wait_for("the drain", |screen| screen.contains(" draining ") && screen.contains("done: drain"));
    let upstream = balancer.upstream("ingress", receiver.address);
    assert_eq!((&upstream["admin"], &upstream["admin_by"]), (&"draining".into(), &"command line".into()));
    terminal.press(&["e", "y"]);
    terminal
        .wait_for("the upstream enabled", |screen| screen.contains("done: enable") && screen.contains("1/1 serving"));
    assert_eq!(admin(), "enabled");
    terminal.press(&["q"]);
    terminal.wait_restored(0);
}

/// The table's rows from its heading to the footer, without the mark of the chosen one.
fn rows(screen: &str) -> Vec<&str> {
    let table = screen.lines().skip_while(|line| !line.contains(" HEALTH "));
    let rows = table.skip(1).take_while(|line| !line.trim().is_empty());
    rows.map(|row| row.trim_start_matches(['>', '!', ' '])).collect()
}

/// What the rows begin with, from top to bottom, is this and nothing else.
fn shows(screen: &str, names: &[&str]) -> bool {
    let rows = rows(screen);
    rows.len() == names.len() && rows.iter().zip(names).all(|(row, name)| row.starts_with(&format!("{name} ")))
}

#[test]
fn keys_sort_and_filter_the_rows() {
    let receiver = Receiver::with_header(say_who);
    let (serving, dead) = (receiver.address, SocketAddr::from(([127, 0, 0, 1], free_port())));
    // By pool the one that is down comes last.
    let down = format!("[pools.other]\nupstreams = [\"{dead}\"]\n[pools.other.health_check]\n");
    let balancer = preface(&(config(&receiver) + &down));
    balancer.wait_health("other", dead, "unhealthy");
    let terminal = Terminal::start(&at(&balancer.admin_socket()));
    let [healthy, unhealthy] = [format!("ingress {serving}"), format!("other {dead}")];
    let (serving, dead) = (&*serving.to_string(), &*dead.to_string());
    let (healthy, unhealthy) = (&*healthy, &*unhealthy);
    terminal.wait_for("the rows by pool", |screen| {
        screen.contains("s sort: pool") && shows(screen, &["ingress", serving, "other", dead])
    });
    terminal.press(&["s"]);
    terminal.wait_for("the rows by state, the worst first", |screen| {
        screen.contains("s sort: state") && shows(screen, &[unhealthy, healthy])
    });

    terminal.press(&["/", "u", "n", "h"]);
    terminal.wait_for("the filter as it is typed", |screen| {
        screen.contains("filter: unh_   Enter keeps it") && shows(screen, &[unhealthy])
    });
    terminal.press(&["Enter"]);
    let is_kept = |screen: &str| screen.contains("/ filter: unh") && shows(screen, &[unhealthy]);
    terminal.wait_for("the filter that was kept", is_kept);
    // `q` is a letter while a filter is typed.
    terminal.press(&["/", "q"]);
    terminal.wait_for("that nothing is left", |screen| {
        screen.contains("filter: unhq_") && screen.contains("nothing matches the filter")
    });
    terminal.press(&["BSpace", "Enter"]);
    terminal.wait_for("the filter without its last letter", is_kept);
    terminal.press(&["Escape"]);
    terminal.wait_for("all of them again", |screen| {
        screen.trim_end().ends_with("s sort: state  / filter") && shows(screen, &[unhealthy, healthy])
    });
    for sort in ["open", "new", "answer", "failed", "pool"] {
        terminal.press(&["s"]);
        terminal.wait_for(sort, |screen| screen.contains(&format!("s sort: {sort} ")));
    }
    terminal.wait_for("the rows by pool", |screen| shows(screen, &["ingress", serving, "other", dead]));
    terminal.press(&["q"]);
    terminal.wait_restored(0);
}

#[test]
fn waits_for_a_process_that_is_gone_and_ends_with_control_c() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let socket = directory.path().join("admin.sock");
    let terminal = Terminal::start(&at(&socket));
    terminal.wait_for("that nobody answers", |screen| {
        screen.contains("no preface answers on") && screen.contains("still trying")
    });
    let receiver = Receiver::with_header(say_who);
    let file = directory.path().join("preface.toml");
    let text = format!("[admin]\nbind = \"unix:{}\"\n{}", socket.display(), config(&receiver));
    std::fs::write(&file, text).expect("it is written");
    let mut command = Command::new(env!("CARGO_BIN_EXE_preface"));
    let balancer =
        Process::start(command.arg("run").arg("--config").arg(&file).env("RUNTIME_DIRECTORY", directory.path()));
    terminal.wait_for("the upstream", |screen| screen.contains(&receiver.address.to_string()));
    drop(balancer);
    terminal.wait_for("the silence, and what was known", |screen| {
        screen.contains("no answer for ") && screen.contains(&receiver.address.to_string())
    });
    terminal.press(&["C-c"]);
    terminal.wait_restored(0);
}

#[test]
fn gives_the_terminal_back_when_it_is_told_to_end() {
    let receiver = Receiver::with_header(say_who);
    let balancer = preface(&config(&receiver));
    let terminal = Terminal::start(&at(&balancer.admin_socket()));
    terminal.wait_for("the upstream", |screen| screen.contains(&receiver.address.to_string()));
    rustix::process::kill_process(terminal.id(), Signal::TERM).expect("it takes a signal");
    terminal.wait_restored(0);
}

#[test]
fn ends_with_the_terminal_that_it_was_in() {
    let receiver = Receiver::with_header(say_who);
    let balancer = preface(&config(&receiver));
    let terminal = Terminal::start(&at(&balancer.admin_socket()));
    terminal.wait_for("the upstream", |screen| screen.contains(&receiver.address.to_string()));
    let process = format!("/proc/{}/stat", terminal.id());
    terminal.tmux(&["kill-server"]);
    let has_ended = || match std::fs::read_to_string(&process) {
        Ok(stat) => stat.contains(") Z ").then_some(()),
        Err(_) => Some(()),
    };
    eventually("it is no more", has_ended);
}

#[test]
fn prints_one_frame_where_there_is_no_terminal() {
    let receiver = Receiver::with_header(say_who);
    let balancer = preface(&config(&receiver));
    let mut command = Command::new(env!("CARGO_BIN_EXE_preface"));
    let (status, text) =
        Process::run(command.arg("top").arg("--admin").arg(format!("unix:{}", balancer.admin_socket().display())));
    assert!(status.success(), "{text}");
    let line = text.lines().find(|line| line.contains(&receiver.address.to_string())).expect("the upstream's line");
    assert!(line.contains("healthy") && line.contains("enabled"), "{text}");
    assert!(!text.contains('\u{1b}') && !text.contains("q quit"), "{text}");
    let mut command = Command::new(env!("CARGO_BIN_EXE_preface"));
    let (status, text) = Process::run(command.args(["top", "--once", "--admin", "unix:/nonexistent"]));
    assert_eq!((status.code(), text.starts_with("preface: no preface answers on")), (Some(1), true), "{text}");
}

#[test]
fn opens_the_chosen_row_with_every_figure_of_its_times() {
    let receiver = Receiver::with_header(say_who);
    let balancer = preface(&config(&receiver));
    let mut client = balancer.connect("web");
    client.shutdown(Shutdown::Write).expect("it is closed");
    client.read_to_end(&mut Vec::new()).expect("an answer");
    let terminal = Terminal::start(&at(&balancer.admin_socket()));
    terminal.wait_for("the upstream", |screen| screen.contains(&receiver.address.to_string()));
    terminal.press(&["j", "Enter"]);
    // Of one connection all figures are the same one, in both periods.
    let figures = |screen: &str, kind: &str| -> Vec<String> {
        let line = screen.lines().find_map(|line| line.strip_prefix(kind)).unwrap_or_default();
        line.split_whitespace().map(str::to_owned).collect()
    };
    let screen = terminal.wait_for("the times", |screen| figures(screen, "connection ").len() == 10);
    assert!(screen.contains("last minute") && screen.contains("since the start"), "{screen}");
    for kind in ["connect ", "first byte ", "connection "] {
        let figures = figures(&screen, kind);
        assert!(figures.len() == 10 && figures.iter().all(|figure| figure.ends_with('s')), "{kind}: {screen}");
    }
    terminal.press(&["l"]);
    terminal.wait_for("the line of two figures", |screen| screen.contains("last minute p50/p99:"));
}
