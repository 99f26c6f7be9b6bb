//! preface under systemd: what it tells the manager, its units, and its Debian package.

use std::ffi::OsString;
use std::fs;
use std::net::SocketAddr;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use crate::readme::commands;
use crate::support::ports::free_port;
use crate::support::receiver::echo;
use crate::support::{Balancer, DEADLINE, Process, Receiver, client, eventually, preface_by, program, skip};

const ROOT: &str = env!("CARGO_MANIFEST_DIR");

/// Plays the manager's side of the notify protocol.
struct Manager {
    socket: UnixDatagram,
    /// For `$NOTIFY_SOCKET`.
    name: OsString,
    _directory: TempDir,
}

impl Manager {
    /// Behind a path.
    fn at_path() -> Manager {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let path = directory.path().join("notify");
        Manager::with(UnixDatagram::bind(&path).expect("a socket"), path.into(), directory)
    }

    /// Behind a name without a file.
    fn at_name() -> Manager {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let name = format!("preface-test-{}", std::process::id());
        let address = std::os::unix::net::SocketAddr::from_abstract_name(&name).expect("a name");
        let socket = UnixDatagram::bind_addr(&address).expect("a socket");
        Manager::with(socket, OsString::from_vec(format!("@{name}").into_bytes()), directory)
    }

    fn with(socket: UnixDatagram, name: OsString, directory: TempDir) -> Manager {
        socket.set_read_timeout(Some(DEADLINE)).expect("a time limit");
        Manager { socket, name, _directory: directory }
    }

    /// preface, started by this manager.
    #[track_caller]
    fn start(&self, config: &str, variables: &[(&str, &str)]) -> Balancer {
        let command = |_: &Path| {
            let mut command = Command::new(env!("CARGO_BIN_EXE_preface"));
            command.env("NOTIFY_SOCKET", &self.name).envs(variables.iter().copied());
            command
        };
        preface_by(command, config)
    }

    #[track_caller]
    fn receive(&self) -> String {
        let mut buffer = [0; 4096];
        let length = self.socket.recv(&mut buffer).expect("a message");
        String::from_utf8(buffer[..length].to_vec()).expect("text")
    }

    /// The next message that is no sign of life.
    #[track_caller]
    fn next(&self) -> String {
        loop {
            let message = self.receive();
            if message != "WATCHDOG=1" {
                return message;
            }
        }
    }

    /// Is there nothing more now?
    fn is_quiet(&self) -> bool {
        self.socket.set_nonblocking(true).expect("a mode");
        let nothing = self.socket.recv(&mut [0; 4096]).is_err();
        self.socket.set_nonblocking(false).expect("a mode");
        nothing
    }
}

fn config(upstream: SocketAddr) -> String {
    format!(
        "[listeners.web]\nbind = \"127.0.0.1:0\"\npool = \"web\"\n\
         [pools.web]\nproxy_protocol = \"v2\"\nupstreams = [\"{upstream}\"]\n"
    )
}

#[track_caller]
fn assert_reload(manager: &Manager, ready: &str) {
    let reloading = manager.next();
    let at = reloading.strip_prefix("RELOADING=1\nMONOTONIC_USEC=").expect("a reload with its time");
    let at: u64 = at.parse().expect("microseconds");
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    let now = u64::try_from(now.tv_sec).unwrap() * 1_000_000;
    assert!(at <= now + 1_000_000 && at + 60_000_000 > now, "{at} is not just before {now}");
    assert_eq!(manager.next(), ready);
}

#[test]
fn the_manager_is_told_of_start_reload_and_stop() {
    for manager in [Manager::at_path(), Manager::at_name()] {
        let receiver = Receiver::with_header(echo);
        let text = config(receiver.address);
        let mut lb = manager.start(&text, &[]);
        let serving = "READY=1\nSTATUS=serving 1 listener, 1 pool, 1 of 1 upstream healthy";
        assert_eq!(manager.receive(), serving);
        lb.connect("web");
        assert_eq!(lb.reload().status, 200);
        assert_reload(&manager, serving);
        lb.signal(Signal::HUP);
        assert_reload(&manager, serving);
        // A refused reload comes to its end as well, and `systemctl status` says so.
        lb.rewrite_config("nonsense");
        let refused = format!("{serving}; the last reload was refused, see the log");
        assert_reload(&manager, &refused);
        lb.rewrite_config(&text.replace("[pools.web]", "[pools.web]\nretries = 7"));
        assert_reload(&manager, serving);
        lb.signal(Signal::TERM);
        let stopping = manager.next();
        assert!(stopping.starts_with("STOPPING=1\nSTATUS=stopping, "), "{stopping}");
        assert_eq!(lb.wait_exit().code(), Some(0));
    }
}

#[test]
fn ready_comes_when_every_address_takes_connections_and_not_when_one_cannot() {
    let (manager, receiver, port) = (Manager::at_path(), Receiver::with_header(echo), free_port());
    let directory = tempfile::tempdir().unwrap();
    let (file, admin) = (directory.path().join("preface.toml"), directory.path().join("admin.sock"));
    let text = config(receiver.address).replace("127.0.0.1:0", &format!("127.0.0.1:{port}"));
    fs::write(&file, format!("[admin]\nbind = \"unix:{}\"\n{text}", admin.display())).unwrap();
    let run = || {
        let mut command = Command::new(env!("CARGO_BIN_EXE_preface"));
        command.args(["run", "--config"]).arg(&file).env("NOTIFY_SOCKET", &manager.name);
        command.env("RUNTIME_DIRECTORY", directory.path());
        command
    };
    let blocker = std::net::TcpListener::bind(("127.0.0.1", port)).unwrap();
    let (status, output) = Process::run(&mut run());
    assert_eq!(status.code(), Some(1), "{output}");
    assert!(manager.is_quiet(), "nothing was ready");
    drop(blocker);
    let process = Process::start(&mut run());
    // No retry: whoever hears READY=1 may connect.
    assert!(manager.receive().starts_with("READY=1\n"));
    client::connect(([127, 0, 0, 1], port).into()).unwrap();
    drop(process);
}

#[test]
fn health_is_in_the_status_line() {
    let manager = Manager::at_path();
    let nobody = SocketAddr::from(([127, 0, 0, 1], free_port()));
    let text = config(nobody) + "[pools.web.health_check]\nprotocol = \"tcp\"\n";
    let _lb = manager.start(&text, &[]);
    let first = manager.next();
    assert!(first.starts_with("READY=1\nSTATUS=serving 1 listener, 1 pool, 0 of 1 upstream healthy"), "{first}");
    let _receiver = Receiver::at(&nobody.to_string(), false, echo);
    assert_eq!(manager.next(), "STATUS=serving 1 listener, 1 pool, 1 of 1 upstream healthy");
}

#[test]
fn signs_of_life_come_twice_in_the_watchdogs_time() {
    let (manager, receiver) = (Manager::at_path(), Receiver::with_header(echo));
    let _lb = manager.start(&config(receiver.address), &[("WATCHDOG_USEC", "600000")]);
    manager.next();
    while manager.receive() != "WATCHDOG=1" {}
    let begun = Instant::now();
    for _ in 0..5 {
        assert_eq!(manager.receive(), "WATCHDOG=1");
    }
    let took = begun.elapsed();
    assert!(took >= Duration::from_millis(1_300), "5 halves of 0.6 s took {took:?}");
    assert!(took < Duration::from_millis(3_000), "one was missing: {took:?}");
}

#[test]
fn a_watchdog_of_another_process_is_not_fed() {
    let (manager, receiver) = (Manager::at_path(), Receiver::with_header(echo));
    let variables = [("WATCHDOG_USEC", "2000"), ("WATCHDOG_PID", "1")];
    let lb = manager.start(&config(receiver.address), &variables);
    assert!(manager.receive().starts_with("READY=1\n"));
    for _ in 0..20 {
        assert_eq!(lb.reload().status, 200);
        // A millisecond later a sign would have been due.
        assert!(manager.receive().starts_with("RELOADING=1\n"));
        assert!(manager.receive().starts_with("READY=1\n"));
    }
}

#[test]
fn an_upgrade_names_the_new_main_process_which_then_speaks() {
    let (manager, receiver) = (Manager::at_path(), Receiver::with_header(echo));
    let command = |_: &Path| {
        let mut command = Command::new("sh");
        // As systemd does it: the variable names the main process.
        command.args(["-c", "WATCHDOG_PID=$$ exec \"$0\" \"$@\"", env!("CARGO_BIN_EXE_preface")]);
        command.env("NOTIFY_SOCKET", &manager.name).env("WATCHDOG_USEC", "200000");
        command
    };
    let mut lb = preface_by(command, &config(receiver.address));
    assert!(manager.next().starts_with("READY=1\n"));
    while manager.receive() != "WATCHDOG=1" {}
    // A connection keeps the old process alive, and silent.
    let stream = lb.connect("web");
    eventually("it is open", || (lb.metric("preface_connections_open", &[]) >= 1.0).then_some(()));
    let report = lb.ask("POST", "/upgrade").json();
    let new = report["pid"].as_u64().expect("a process id");
    assert_eq!(manager.next(), format!("MAINPID={new}"));
    assert_eq!(manager.next(), "READY=1\nSTATUS=serving 1 listener, 1 pool, 1 of 1 upstream healthy");
    assert_eq!(lb.reload().status, 200);
    assert!(manager.next().starts_with("RELOADING=1\n"));
    assert!(manager.next().starts_with("READY=1\n"));
    assert!(lb.is_running());
    drop(stream);
    assert_eq!(lb.wait_exit().code(), Some(0));
    // Neither the end of the old process nor anything else of it is told; the new one feeds the watchdog.
    for _ in 0..5 {
        assert_eq!(manager.receive(), "WATCHDOG=1");
    }
    let new = Pid::from_raw(i32::try_from(new).unwrap()).unwrap();
    kill_process(new, Signal::TERM).unwrap();
    assert!(manager.next().starts_with("STOPPING=1\n"));
    eventually("it ends", || rustix::process::test_kill_process(new).is_err().then_some(()));
}

/// The units with the program under test in the place of the installed one.
fn units(directory: &Path) -> [PathBuf; 2] {
    ["preface.service", "preface.socket"].map(|name| {
        let text = fs::read_to_string(Path::new(ROOT).join("deploy/systemd").join(name)).expect("a unit");
        let unit = directory.join(name);
        fs::write(&unit, text.replace("/usr/bin/preface", env!("CARGO_BIN_EXE_preface"))).expect("it is written");
        unit
    })
}

#[test]
fn systemd_finds_nothing_to_say_about_the_units() {
    let directory = tempfile::tempdir().unwrap();
    let units = units(directory.path());
    let analyze = program("systemd-analyze");
    // Its exit status is 0 also for keys that it does not know: what counts is that it says nothing.
    let (status, output) = Process::run(Command::new(&analyze).args(["verify", "--man=no"]).args(&units));
    assert!(status.success() && output.is_empty(), "{output}");
    let mut broken = fs::read_to_string(&units[0]).unwrap();
    broken += "ExecRelaod=/bin/true\n";
    fs::write(&units[0], broken).unwrap();
    let (_, output) = Process::run(Command::new(&analyze).args(["verify", "--man=no"]).args(&units));
    assert!(output.contains("ExecRelaod"), "this check would see nothing: {output}");
}

#[test]
fn the_service_is_exposed_to_little() {
    let directory = tempfile::tempdir().unwrap();
    let [service, _] = units(directory.path());
    let arguments = ["security", "--offline=true", "--no-pager", "--threshold=20"];
    let (status, output) = Process::run(Command::new(program("systemd-analyze")).args(arguments).arg(&service));
    let level = output.lines().find(|line| line.contains("Overall exposure level")).unwrap_or(&output);
    assert!(status.success(), "2.0 is the limit: {level}");
    assert!(level.contains(" 1."), "{level}");
}

/// The package as `deploy/debian/build` makes it, from the same table of Cargo.toml and with the files of the same script:
/// what these say is tested, cargo-deb isn't.
struct Package {
    directory: TempDir,
    files: Vec<PathBuf>,
}

impl Package {
    /// Builds version `version`.
    #[track_caller]
    fn build(version: &str) -> Package {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let root = directory.path().join("root");
        fs::create_dir_all(root.join("DEBIAN")).expect("a directory");
        let manifest: toml::Table =
            fs::read_to_string(Path::new(ROOT).join("Cargo.toml")).unwrap().parse().expect("TOML");
        let package = &manifest["package"];
        let deb = &package["metadata"]["deb"];
        let text = |value: &toml::Value| value.as_str().expect("a text").to_owned();
        let generated = generate(directory.path());
        let mut files = Vec::new();
        for asset in deb["assets"].as_array().expect("a list") {
            let [source, target, mode] = [0, 1, 2].map(|index| text(&asset[index]));
            let sources = sources(&source, &generated);
            assert!(!sources.is_empty(), "{source} names no file");
            for source in sources {
                let target = match target.ends_with('/') {
                    true => root.join(&target).join(source.file_name().expect("a file")),
                    false => root.join(&target),
                };
                fs::create_dir_all(target.parent().expect("a directory")).expect("it is made");
                fs::copy(&source, &target).unwrap_or_else(|error| panic!("{}: {error}", source.display()));
                let mode = u32::from_str_radix(&mode, 8).expect("an octal mode");
                fs::set_permissions(&target, fs::Permissions::from_mode(mode)).expect("a mode");
                files.push(target.strip_prefix(&root).expect("it is below").to_owned());
            }
        }
        let control = format!(
            "Package: preface\nVersion: {version}\nArchitecture: {}\nMaintainer: {}\nSection: {}\nPriority: {}\n\
             Depends: {}\nDescription: {}\n",
            architecture(),
            text(&deb["maintainer"]),
            text(&deb["section"]),
            text(&deb["priority"]),
            text(&deb["depends"]).replace("$auto, ", ""),
            text(&package["description"])
        );
        fs::write(root.join("DEBIAN/control"), control).unwrap();
        let kept: Vec<String> = deb["conf-files"].as_array().expect("a list").iter().map(text).collect();
        fs::write(root.join("DEBIAN/conffiles"), kept.join("\n") + "\n").unwrap();
        for script in ["postinst", "prerm", "postrm"] {
            let source = Path::new(ROOT).join(text(&deb["maintainer-scripts"])).join(script);
            fs::copy(source, root.join("DEBIAN").join(script)).expect("a script");
            let mode = fs::Permissions::from_mode(0o755);
            fs::set_permissions(root.join("DEBIAN").join(script), mode).expect("a mode");
        }
        let mut build = Command::new(program("dpkg-deb"));
        build.args(["--root-owner-group", "-Znone", "--build"]).arg(&root).arg(directory.path().join("preface.deb"));
        let (status, output) = Process::run(&mut build);
        assert!(status.success(), "{output}");
        Package { directory, files }
    }

    fn file(&self) -> PathBuf {
        self.directory.path().join("preface.deb")
    }
}

fn architecture() -> String {
    Process::run(Command::new(program("dpkg")).arg("--print-architecture")).1
}

/// Manual pages and completions by the script that deploy/debian/build calls, of the program under test.
#[track_caller]
fn generate(directory: &Path) -> PathBuf {
    let generated = directory.join("package");
    let mut script = Command::new(Path::new(ROOT).join("deploy/debian/generate"));
    let (status, output) = Process::run(script.arg(env!("CARGO_BIN_EXE_preface")).arg(&generated));
    assert!(status.success() && output.is_empty(), "{output}");
    generated
}

/// The files that a pattern of an asset means.
fn sources(pattern: &str, generated: &Path) -> Vec<PathBuf> {
    if pattern == "target/release/preface" {
        return vec![env!("CARGO_BIN_EXE_preface").into()];
    }
    let path = match pattern.strip_prefix("target/package/") {
        Some(name) => generated.join(name),
        None => Path::new(ROOT).join(pattern),
    };
    let name = path.file_name().and_then(|name| name.to_str()).expect("a name").to_owned();
    let Some((start, end)) = name.split_once('*') else { return vec![path] };
    let entries = fs::read_dir(path.parent().expect("a directory")).expect("it is there");
    let mut found: Vec<PathBuf> = entries
        .map(|entry| entry.expect("an entry").path())
        .filter(|file| {
            let name = file.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            file.is_file() && name.starts_with(start) && name.ends_with(end)
        })
        .collect();
    found.sort();
    found
}

#[test]
fn the_package_has_a_manual_page_for_each_command_and_completions_that_shells_take() {
    let build = fs::read_to_string(Path::new(ROOT).join("deploy/debian/build")).unwrap();
    assert!(build.contains("\ndeploy/debian/generate target/release/preface target/package\n"), "{build}");
    let directory = tempfile::tempdir().unwrap();
    let generated = generate(directory.path());
    let (_, help) = Process::run(Command::new(env!("CARGO_BIN_EXE_preface")).arg("help"));
    let (_, commands) = help.split_once("Commands:\n").expect("help lists the commands");
    let names = commands.lines().take_while(|line| !line.is_empty()).filter_map(|line| line.split_whitespace().next());
    let names: Vec<&str> = names.filter(|name| *name != "help").collect();
    assert!(names.len() > 10, "{names:?}");
    let mut expected: Vec<String> = names.iter().map(|name| format!("preface-{name}.1")).collect();
    expected.extend(["preface.1", "preface.bash", "_preface", "preface.fish"].map(str::to_owned));
    expected.sort();
    let entries = fs::read_dir(&generated).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut found: Vec<String> = entries.collect();
    found.sort();
    assert_eq!(found, expected);
    for file in &found {
        let text = fs::read_to_string(generated.join(file)).unwrap();
        match file.strip_suffix(".1") {
            Some(page) => assert!(text.contains(&format!("\n.TH {page} 1 ")), "{file}: {text}"),
            None => assert!(names.iter().all(|name| text.contains(name)), "{file} lacks a command"),
        }
    }
    let (status, output) = Process::run(Command::new(program("bash")).arg("-n").arg(generated.join("preface.bash")));
    assert!(status.success(), "{output}");
}

/// Each command of the README's section is run here, or says what it needs that is not here.
#[test]
fn the_readmes_commands_run() {
    let (needing, runnable) = commands("systemd", &["cargo-deb", "the package", "systemd"]);
    assert_eq!((needing.len(), runnable.len()), (5, 1), "{needing:#?} {runnable:#?}");
    let programs = Path::new(env!("CARGO_BIN_EXE_preface")).parent().expect("a directory");
    let path = format!("{}:{}", programs.display(), std::env::var("PATH").unwrap_or_default());
    for line in runnable {
        // The file that the package installs there.
        let line = line.replace("/etc/preface/", "deploy/systemd/");
        let (status, output) =
            Process::run(Command::new("sh").args(["-ec", &line]).current_dir(ROOT).env("PATH", &path));
        assert!(status.success() && !output.contains("warning"), "{line}\n{output}");
    }
}

/// A system of its own below a directory, as dpkg sees it.
struct System {
    root: TempDir,
}

impl System {
    fn new() -> System {
        let root = tempfile::tempdir().expect("a temporary directory");
        for directory in ["var/lib/dpkg/info", "var/lib/dpkg/updates", "etc", "run/preface"] {
            fs::create_dir_all(root.path().join(directory)).expect("a directory");
        }
        fs::write(root.path().join("var/lib/dpkg/status"), "").expect("it is written");
        System { root }
    }

    fn path(&self, path: &str) -> PathBuf {
        self.root.path().join(path.trim_start_matches('/'))
    }

    /// dpkg below this root, with the package's scripts run beside it rather than inside: there is no shell in there.
    #[track_caller]
    fn dpkg(&self, arguments: &[&str]) {
        let mut command = Command::new(program("dpkg"));
        command.arg(format!("--root={}", self.root.path().display()));
        command.args(["--force-script-chrootless", "--force-depends", "--force-confold", "--force-not-root"]);
        let (status, output) = Process::run(command.args(arguments));
        assert!(status.success(), "{arguments:?}: {output}");
    }

    fn read(&self, path: &str) -> String {
        fs::read_to_string(self.path(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
    }

    /// A command line of the installed unit, below this root.
    fn command_of_unit(&self, key: &str) -> Command {
        let unit = self.read("usr/lib/systemd/system/preface.service");
        let line = unit.lines().find_map(|line| line.strip_prefix(key)).expect("the unit has it");
        let below = |word: &str| match word.starts_with('/') {
            true => self.path(word).display().to_string(),
            false => word.to_owned(),
        };
        let mut words = line.split(' ').map(below);
        let mut command = Command::new(words.next().expect("a program"));
        command.args(words).env("RUNTIME_DIRECTORY", self.path("run/preface"));
        command
    }
}

#[test]
fn the_package_installs_starts_reloads_upgrades_and_goes() {
    if !rustix::process::geteuid().is_root() {
        return skip("the_package_installs_starts_reloads_upgrades_and_goes", "only root installs packages");
    }
    let (package, system, manager) = (Package::build("0.1.0-1"), System::new(), Manager::at_path());
    system.dpkg(&["--install", &package.file().display().to_string()]);
    for file in &package.files {
        assert!(system.root.path().join(file).is_file(), "{} was not installed", file.display());
    }
    assert!(
        system.read("etc/passwd").lines().any(|user| user.starts_with("preface:")),
        "{}",
        system.read("etc/passwd")
    );
    assert!(system.read("etc/group").lines().any(|group| group.starts_with("preface:")));
    // The configuration as it is installed is a valid one without warnings, and serves nobody but this machine.
    let check = Process::run(
        Command::new(system.path("usr/bin/preface")).arg("check").arg(system.path("etc/preface/preface.toml")),
    );
    assert!(check.0.success() && !check.1.contains("warning"), "{}", check.1);
    assert!(system.read("etc/preface/preface.toml").contains("bind = \"127.0.0.1:8080\""));

    // As its operator changes it: where it serves, and the paths of this root.
    let (receiver, port) = (Receiver::with_header(echo), free_port());
    let own = system
        .read("etc/preface/preface.toml")
        .replace("unix:/run/preface", &format!("unix:{}", system.path("run/preface").display()))
        .replace("127.0.0.1:8080", &format!("127.0.0.1:{port}"))
        .replace("127.0.0.1:8081", &receiver.address.to_string());
    fs::write(system.path("etc/preface/preface.toml"), &own).unwrap();
    let mut service = Process::start(system.command_of_unit("ExecStart=").env("NOTIFY_SOCKET", &manager.name));
    assert!(manager.next().starts_with("READY=1\n"));
    crate::load::connect_and_exchange(([127, 0, 0, 1], port).into(), 1).unwrap();
    let config = system.path("etc/preface/preface.toml");
    let reload = |system: &System| Process::run(system.command_of_unit("ExecReload=").arg("--config").arg(&config));
    let (status, output) = reload(&system);
    assert!(status.success(), "{output}");
    assert!(manager.next().starts_with("RELOADING=1\n"));
    assert!(manager.next().starts_with("READY=1\n"));
    fs::write(&config, "nonsense").unwrap();
    let (status, output) = reload(&system);
    assert_eq!(status.code(), Some(1), "{output}");
    assert!(output.contains("nonsense"), "{output}");
    fs::write(&config, &own).unwrap();
    assert!(reload(&system).0.success());
    let state = Process::run(
        Command::new(system.path("usr/bin/preface")).arg("health").env("RUNTIME_DIRECTORY", system.path("run/preface")),
    );
    assert!(state.0.success(), "{}", state.1);

    // A new version: what was changed stays, and the running process takes the new file.
    upgrade_by_package(&system, &manager, &own);
    assert_eq!(service.wait_exit().code(), Some(0));
    system.dpkg(&["--remove", "preface"]);
    assert!(!system.path("usr/bin/preface").exists());
    assert_eq!(system.read("etc/preface/preface.toml"), own, "it is the operator's");
    system.dpkg(&["--purge", "preface"]);
    assert!(!system.path("etc/preface/preface.toml").exists());
}

/// Installs a newer version over the running one, and ends what serves then.
#[track_caller]
fn upgrade_by_package(system: &System, manager: &Manager, own: &str) {
    let newer = Package::build("0.2.0-1");
    system.dpkg(&["--install", &newer.file().display().to_string()]);
    assert_eq!(system.read("etc/preface/preface.toml"), own);
    let mut upgrade = Command::new(system.path("usr/bin/preface"));
    let (status, output) = Process::run(upgrade.arg("upgrade").env("RUNTIME_DIRECTORY", system.path("run/preface")));
    assert!(status.success(), "{output}");
    let main = loop {
        if let Some(id) = manager.next().strip_prefix("MAINPID=") {
            break Pid::from_raw(id.parse().unwrap()).unwrap();
        }
    };
    assert!(manager.next().starts_with("READY=1\n"));
    kill_process(main, Signal::TERM).unwrap();
    assert!(manager.next().starts_with("STOPPING=1\n"));
}
