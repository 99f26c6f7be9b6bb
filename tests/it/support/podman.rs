//! A container engine of the test's own: its images, containers and settings are in one directory, which goes with it.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use tempfile::TempDir;

use super::{Process, eventually, program};

const DOCKERFILE: &str = include_str!("../../../deploy/docker/Dockerfile");

/// What Kubernetes gives a pod under PodSecurity `restricted`, as far as podman has it. Never `--cap-add`: podman would make
/// ambient capabilities of it, Kubernetes does not, so it would prove nothing.
const RESTRICTED: [&str; 7] = [
    "--read-only",
    // Without it podman puts writable file systems on /tmp and /run; Kubernetes does not.
    "--read-only-tmpfs=false",
    "--cap-drop",
    "all",
    "--security-opt",
    "no-new-privileges",
    "--pull=never",
];

/// podman with root directories of its own. Containers are removed on drop.
pub struct Engine {
    directory: TempDir,
}

/// A running container of the image under test. Ended with its engine.
pub struct Container<'engine> {
    engine: &'engine Engine,
    name: &'static str,
    /// `podman run` in the foreground: its output and its exit status are the container's.
    pub process: Process,
}

impl Engine {
    /// An engine with the image `preface`, or why this machine has none. Where podman runs at all, an image that cannot be
    /// built fails the test.
    #[track_caller]
    pub fn with_image() -> Result<Engine, String> {
        let binary = static_binary();
        let engine = Engine { directory: tempfile::tempdir().expect("a temporary directory") };
        fs::write(engine.path("containers.conf"), CONTAINERS_CONF).expect("the engine's settings are written");
        engine.lay_out(binary);
        engine.can_run()?;
        engine.must(&["build", "-q", "--format=docker", "-t", "preface", "-f", "Final", "."]);
        Ok(engine)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// The last stage of deploy/docker/Dockerfile, and what the stage before it leaves in /image.
    fn lay_out(&self, binary: &Path) {
        let (_, last) = DOCKERFILE.split_once("\nFROM scratch\n").expect("the last stage is FROM scratch");
        let copied = last.replace("COPY --from=build /image/ /", "COPY image/ /");
        assert_ne!(last, copied, "the last stage copies /image");
        fs::write(self.path("Final"), format!("FROM scratch\n{copied}")).expect("the Dockerfile is written");
        for directory in ["image/etc/ssl/certs", "image/etc/preface", "image/tmp"] {
            fs::create_dir_all(self.path(directory)).expect("a directory is made");
        }
        fs::set_permissions(self.path("image/tmp"), Permissions::from_mode(0o1777)).expect("a mode is set");
        let bundle = Path::new("/etc/ssl/certs/ca-certificates.crt");
        if bundle.exists() {
            fs::copy(bundle, self.path("image/etc/ssl/certs/ca-certificates.crt")).expect("the CA bundle is copied");
        }
        fs::copy(binary, self.path("image/preface")).expect("the binary is copied");
        fs::set_permissions(self.path("image/preface"), Permissions::from_mode(0o755)).expect("a mode is set");
    }

    /// Does podman build and run anything here? The binary alone, without any of the restrictions.
    fn can_run(&self) -> Result<(), String> {
        fs::write(self.path("Probe"), "FROM scratch\nCOPY image/preface /preface\n")
            .expect("the Dockerfile is written");
        for arguments in [
            &["build", "-q", "-t", "probe", "-f", "Probe", "."][..],
            &["run", "--rm", "--pull=never", "--network=host", "probe", "/preface", "--version"],
        ] {
            let (status, output) = Process::run(self.command().args(arguments));
            if !status.success() {
                return Err(format!("podman {} does not work here: {output}", arguments[0]));
            }
        }
        Ok(())
    }

    /// podman, with this engine's directories.
    pub fn command(&self) -> Command {
        let mut command = Command::new(program("podman"));
        command.current_dir(self.directory.path());
        command.env("CONTAINERS_CONF", self.path("containers.conf")).env("TMPDIR", self.directory.path());
        for (option, name) in [("--root", "root"), ("--runroot", "run"), ("--tmpdir", "tmp")] {
            command.arg(option).arg(self.path(name));
        }
        command.args(["--storage-driver", "vfs", "--log-level", "error"]);
        command
    }

    /// Runs podman, which must succeed, and returns what it says.
    #[track_caller]
    pub fn must(&self, arguments: &[&str]) -> String {
        let (status, output) = Process::run(self.command().args(arguments));
        assert!(status.success(), "podman {}: {output}", arguments.join(" "));
        output
    }

    /// Runs the image under the restrictions on the host's network, with `configuration` as /etc/preface, and waits until it
    /// says that it is ready.
    #[track_caller]
    pub fn run(&self, name: &'static str, configuration: &Path) -> Container<'_> {
        let mut command = self.command();
        // The test asks for the check itself: the engine would need systemd to do it in turn.
        command.args(["run", "--rm", "--name", name, "--network=host", "--health-interval=disable"]).args(RESTRICTED);
        command.arg("-v").arg(format!("{}:/etc/preface:ro", configuration.display())).arg("preface");
        let mut container = Container { engine: self, name, process: Process::start(&mut command) };
        eventually("the container is healthy", || {
            assert!(container.process.is_running(), "the container ended at its start");
            container.is_healthy().then_some(())
        });
        container
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        let (status, output) = Process::run(self.command().args(["rm", "--all", "--force", "--time=0"]));
        if !status.success() {
            eprintln!("containers stay behind: {output}");
        }
    }
}

impl Container<'_> {
    /// The image's own health check, as the engine runs it.
    pub fn is_healthy(&self) -> bool {
        Process::run(self.engine.command().args(["healthcheck", "run", self.name])).0.success()
    }

    /// `/preface` with these arguments inside.
    pub fn exec(&self, arguments: &[&str]) -> (bool, String) {
        let (status, output) =
            Process::run(self.engine.command().args(["exec", self.name, "/preface"]).args(arguments));
        (status.success(), output)
    }

    /// `podman stop`, which sends the image's signal and waits so many seconds before it kills.
    pub fn stop(&self, seconds: u32) -> Process {
        Process::start(self.engine.command().args(["stop", "--time", &seconds.to_string(), self.name]))
    }
}

/// No limit above what the machine gives, and neither systemd nor a journal is needed.
const CONTAINERS_CONF: &str = r#"[containers]
default_ulimits = ["nofile=20000:20000", "nproc=20000:20000"]
log_driver = "k8s-file"
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
"#;

/// The program without a dynamic linker. `tests/run` has built it with the same words; then this finds nothing to do.
fn static_binary() -> &'static Path {
    static BINARY: OnceLock<PathBuf> = OnceLock::new();
    BINARY.get_or_init(|| {
        let triple = format!("{}-unknown-linux-gnu", std::env::consts::ARCH);
        let mut command = Command::new(env!("CARGO"));
        command.current_dir(env!("CARGO_MANIFEST_DIR")).env("RUSTFLAGS", "-C target-feature=+crt-static");
        command.env_remove("CARGO_ENCODED_RUSTFLAGS");
        command.args(["build", "--locked", "--bin", "preface", "--profile", "image", "--target", &triple]);
        // Longer than anything else here may take, where tests/run has not been first.
        let output = command.output().expect("cargo runs");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let target = Path::new(env!("CARGO_TARGET_TMPDIR")).parent().expect("target/tmp has a parent");
        target.join(triple).join("image/preface")
    })
}
