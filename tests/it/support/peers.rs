//! Real receivers: the distribution's nginx and HAProxy, and what their own logs say.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::process::Command;

use tempfile::TempDir;

use super::ports::free_port;
use super::{Process, client, eventually, program, template};

/// One request as a receiver logged it.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Seen {
    /// Who the receiver takes for the client.
    pub client: SocketAddr,
    /// What was asked for.
    pub path: String,
}

/// A running nginx; see `tests/peers/nginx.conf`.
pub struct Nginx {
    process: Process,
    directory: TempDir,
    /// HTTP that requires a header, on 127.0.0.1 and ::1.
    pub headers: u16,
    /// HTTP without a header, and `/accepted`, on 127.0.0.1.
    pub plain: u16,
    /// A stream server that requires a header and answers with the client's address, on 127.0.0.1.
    pub stream: u16,
    /// Where `/websocket` of the first one leads.
    pub websocket: u16,
}

/// Starts nginx and waits until it listens.
#[track_caller]
pub fn nginx() -> Nginx {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let (headers, plain, stream, websocket) = (free_port(), free_port(), free_port(), free_port());
    let dir = directory.path().display().to_string();
    // Workers of a master that root started would otherwise belong to a user who cannot enter the directory.
    let user = if rustix::process::geteuid().is_root() { "user root;" } else { "" };
    let ports = [headers, plain, stream, websocket].map(|port| port.to_string());
    let config = template(
        "nginx.conf",
        &[
            ("dir", &dir),
            ("user", user),
            ("headers", &ports[0]),
            ("plain", &ports[1]),
            ("stream", &ports[2]),
            ("websocket", &ports[3]),
        ],
    );
    let file = directory.path().join("nginx.conf");
    std::fs::write(&file, config).expect("the configuration is written");
    let mut command = Command::new(program("nginx"));
    command.arg("-p").arg(&dir).arg("-c").arg(&file).arg("-e").arg(directory.path().join("error.log"));
    let process = Process::start(&mut command);
    let nginx = Nginx { process, directory, headers, plain, stream, websocket };
    wait_until_listening("nginx", plain);
    nginx
}

impl Nginx {
    /// The UNIX socket of the HTTP server that requires headers.
    pub fn socket(&self) -> PathBuf {
        self.directory.path().join("headers.sock")
    }

    /// What the server that requires headers has logged, as it stands there.
    pub fn header_lines(&self) -> Vec<String> {
        self.lines("headers.log")
    }

    /// Waits until the server that requires headers has logged so many requests, and returns all of them.
    ///
    /// The header's address and the one that nginx takes for the client because of it must be the same in each line.
    #[track_caller]
    pub fn wait_for(&self, count: usize) -> Vec<Seen> {
        eventually(&format!("{count} requests in nginx's log"), || {
            let lines = self.lines("headers.log");
            (lines.len() >= count).then(|| lines.iter().map(|line| parse_nginx(line)).collect())
        })
    }

    /// Requests that the server without headers has logged.
    pub fn plain_requests(&self) -> Vec<String> {
        // The first one was the question whether it listens.
        self.lines("plain.log").into_iter().skip(1).collect()
    }

    /// What an operator does by mistake: the server that required a header takes none from now on.
    #[track_caller]
    pub fn take_no_header(&self) {
        let file = self.directory.path().join("nginx.conf");
        let text = std::fs::read_to_string(&file).expect("the configuration is there");
        std::fs::write(&file, text.replace(" proxy_protocol backlog", " backlog")).expect("it is written");
        self.process.signal(rustix::process::Signal::HUP);
    }

    /// Everything in the error log that is worse than a notice.
    pub fn errors(&self) -> Vec<String> {
        let mut lines = self.lines("error.log");
        lines.retain(|line| !line.contains("[notice]") && !line.trim().is_empty());
        lines
    }

    /// Connections that nginx has accepted, on all its ports, since it started; this question is one of them.
    #[track_caller]
    pub fn accepted(&self) -> u64 {
        let address = (Ipv4Addr::LOCALHOST, self.plain).into();
        let mut stream = client::connect(address).expect("nginx listens");
        let page = super::http::get(&mut stream, "/accepted").expect("nginx answers").text();
        // "Active connections: 1 \nserver accepts handled requests\n 7 7 7 \n..."
        let numbers = page.lines().nth(2).expect("the third line has the counts");
        numbers.split_whitespace().next().and_then(|count| count.parse().ok()).expect("a count")
    }

    fn lines(&self, file: &str) -> Vec<String> {
        let text = std::fs::read(self.directory.path().join(file)).unwrap_or_default();
        // Only whole lines: nginx may be writing the last one.
        let whole = text.iter().rposition(|&byte| byte == b'\n').map_or(0, |end| end + 1);
        String::from_utf8_lossy(&text[..whole]).lines().map(str::to_owned).collect()
    }
}

impl Drop for Nginx {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- nginx, errors\n{}", self.errors().join("\n"));
        }
    }
}

#[track_caller]
fn parse_nginx(line: &str) -> Seen {
    let fields: Vec<&str> = line.split(' ').collect();
    let &[header_ip, header_port, ip, port, status, path] = &fields[..] else { panic!("nginx logged {line:?}") };
    assert_eq!((header_ip, header_port, status), (ip, port, "200"), "nginx logged {line:?}");
    Seen { client: address(ip, port), path: path.to_owned() }
}

/// A running HAProxy; see `tests/peers/haproxy.cfg`.
pub struct Haproxy {
    process: Process,
    directory: TempDir,
    /// HTTP that requires a header, on 127.0.0.1 and ::1.
    pub headers: u16,
    /// HTTP without a header, on 127.0.0.1.
    pub plain: u16,
}

/// Starts HAProxy and waits until it listens.
#[track_caller]
pub fn haproxy() -> Haproxy {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let (headers, plain) = (free_port(), free_port());
    let dir = directory.path().display().to_string();
    let config =
        template("haproxy.cfg", &[("headers", &headers.to_string()), ("plain", &plain.to_string()), ("dir", &dir)]);
    let file: PathBuf = directory.path().join("haproxy.cfg");
    std::fs::write(&file, config).expect("the configuration is written");
    let process = Process::start(Command::new(program("haproxy")).arg("-db").arg("-f").arg(&file));
    let haproxy = Haproxy { process, directory, headers, plain };
    wait_until_listening("HAProxy", plain);
    // That question itself leaves a line in the log; everything after it is the test's.
    haproxy
        .process
        .stdout
        .wait_for("HAProxy's line about the connection that looked", |line| line.starts_with("plain"));
    haproxy
}

impl Haproxy {
    /// The UNIX socket of the frontend that requires headers.
    pub fn socket(&self) -> PathBuf {
        self.directory.path().join("headers.sock")
    }

    /// Waits until the frontend that requires headers has logged so many requests, and returns all of them.
    #[track_caller]
    pub fn wait_for(&self, count: usize) -> Vec<Seen> {
        let lines = self.process.stdout.wait_for_count("HAProxy's log", count, |line| line.starts_with("headers "));
        lines.iter().map(|line| parse_haproxy(line)).collect()
    }

    /// Every line but those of requests that were answered: broken headers, connections without a request.
    pub fn errors(&self) -> Vec<String> {
        let mut lines = self.process.stdout.lines();
        lines.remove(0);
        lines.retain(|line| !line.contains(" 200 /"));
        lines
    }

    /// Requests and connections that the frontend without headers has logged.
    pub fn plain_requests(&self) -> Vec<String> {
        let mut lines = self.process.stdout.lines();
        lines.remove(0);
        lines.retain(|line| line.starts_with("plain"));
        lines
    }
}

#[track_caller]
fn parse_haproxy(line: &str) -> Seen {
    let fields: Vec<&str> = line.split(' ').collect();
    let &[_, ip, port, "200", path] = &fields[..] else { panic!("HAProxy logged {line:?}") };
    Seen { client: address(ip, port), path: path.to_owned() }
}

#[track_caller]
fn address(ip: &str, port: &str) -> SocketAddr {
    let ip: IpAddr = ip.parse().unwrap_or_else(|error| panic!("{ip:?}: {error}"));
    SocketAddr::new(ip, port.parse().unwrap_or_else(|error| panic!("{port:?}: {error}")))
}

#[track_caller]
fn wait_until_listening(name: &str, port: u16) {
    eventually(&format!("{name} listens"), || {
        let mut stream = client::connect((Ipv4Addr::LOCALHOST, port).into()).ok()?;
        super::http::get(&mut stream, "/").ok()
    });
}
