//! `preface demo`: two receivers, a balancer in front of them, and what the receivers read of two first connections and
//! a first datagram.

use std::convert::Infallible;
use std::fmt::Write as _;
use std::fs::{self, DirBuilder};
use std::io::{self, IsTerminal, Read, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, bail};

use super::whoami::{self, First, Seen};
use crate::proxy_protocol::explain::explain;
use crate::proxy_protocol::{Addresses, Transport};

/// The balancer must listen, and a header arrive, within this.
const FIRST_CONNECTION_TIMEOUT: Duration = Duration::from_secs(5);
/// Between two attempts to reach a balancer that is only just starting.
const CONNECT_PAUSE: Duration = Duration::from_millis(5);
/// A datagram may be lost: after this long it is sent again.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(1);
/// Names tried for the directory before giving up.
const DIRECTORY_ATTEMPTS_MAX: usize = 16;

/// See preface work: no file, no root, nothing to install
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Starts two receivers and a balancer in front of them on 127.0.0.1, with a v1, a v2 and a UDP listener,
shows the headers of two first connections and a first datagram, and serves until Ctrl-C.")]
pub struct Args {}

/// Everything starts, is shown, and serves until Ctrl-C.
pub fn run(_: Args) -> anyhow::Result<()> {
    let receivers = [Receiver::bind(9081)?, Receiver::bind(9082)?];
    let ports = Ports::choose(&receivers)?;
    let scene = Scene { directory: Directory::create()?, ports };
    fs::write(scene.file(), scene.toml()).with_context(|| format!("cannot write {}", scene.file().display()))?;

    let (sender, seen) = mpsc::channel();
    for receiver in receivers {
        let sender = sender.clone();
        spawn("receiver", move || {
            let Err(error) = receiver.serve(sender);
            eprintln!("preface demo: a receiver could not start: {error}");
        })?;
    }
    let file = scene.file();
    let story = Story { seen, paint: Paint::of_stdout(), file: file.clone(), ports };
    spawn("demo", move || match story.tell() {
        Ok(()) => {}
        Err(error) => eprintln!("preface demo: {error:#}; the balancer runs on until Ctrl-C"),
    })?;
    // Returns on Ctrl-C; `scene` removes its directory when it is dropped, whatever the outcome.
    crate::server::run(file, None)
}

/// Where everything listens, on 127.0.0.1.
#[derive(Clone, Copy, Debug)]
struct Ports {
    v1: SocketAddr,
    v2: SocketAddr,
    udp: SocketAddr,
    admin: SocketAddr,
    receivers: [SocketAddr; 2],
    /// The receivers' for datagrams: the same numbers, where they are free.
    datagram_receivers: [SocketAddr; 2],
}

impl Ports {
    /// The easily remembered ones where they are free. All are held until each is known, so no two are the same.
    fn choose(receivers: &[Receiver; 2]) -> anyhow::Result<Ports> {
        let held = [listen(8081)?, listen(8082)?, listen(9900)?];
        let [first, second] = receivers;
        Ok(Ports {
            v1: held[0].local_addr()?,
            v2: held[1].local_addr()?,
            udp: bind(8083)?.local_addr()?,
            admin: held[2].local_addr()?,
            receivers: [first.tcp.local_addr()?, second.tcp.local_addr()?],
            datagram_receivers: [first.udp.local_addr()?, second.udp.local_addr()?],
        })
    }
}

/// On that TCP port of 127.0.0.1, or on any if it is taken.
fn listen(port: u16) -> anyhow::Result<TcpListener> {
    TcpListener::bind((Ipv4Addr::LOCALHOST, port))
        .or_else(|_| TcpListener::bind((Ipv4Addr::LOCALHOST, 0)))
        .context("no free port on 127.0.0.1")
}

/// The same for UDP.
fn bind(port: u16) -> anyhow::Result<UdpSocket> {
    UdpSocket::bind((Ipv4Addr::LOCALHOST, port))
        .or_else(|_| UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)))
        .context("no free UDP port on 127.0.0.1")
}

/// What was set up for this demo, and goes with it.
struct Scene {
    directory: Directory,
    ports: Ports,
}

impl Scene {
    fn file(&self) -> PathBuf {
        self.directory.path.join("preface.toml")
    }

    fn toml(&self) -> String {
        let Ports { v1, v2, udp, admin, receivers: [first, second], datagram_receivers } = self.ports;
        let [first_udp, second_udp] = datagram_receivers;
        format!(
            r#"# The demo's configuration. Change something and save: the running balancer takes it over, and tells you so.
# A mistake changes nothing; you are told where it is.

[runtime]
workers = 2
stop_timeout = "2s"

[admin]
bind = "{admin}"

[listeners.v1]
bind = "{v1}"
pool = "v1"

[listeners.v2]
bind = "{v2}"
pool = "v2"

[listeners.udp]
bind = "{udp}"
protocol = "udp"
pool = "udp"

[pools.v1]
proxy_protocol = "v1"                   # try "v2", or "off"
upstreams = ["{first}", "{second}"]
health_check = {{ protocol = "http" }}

[pools.v2]
proxy_protocol = "v2"
balance = "round_robin"                 # try "least_connections"
upstreams = ["{first}", "{second}"]     # try to remove one
health_check = {{ protocol = "http" }}

[pools.v2.tlvs]
vpce_id = "vpce-08d2bf15fac5001c9"      # an AWS VPC endpoint: try another one
crc32c = true
unique_id = true                        # the same id as in the log line

[pools.udp]
proxy_protocol = "v2"                   # before each datagram; try "spp"
upstreams = ["{first_udp}", "{second_udp}"]
health_check = {{ protocol = "udp", send = "check", expect = "check" }}
"#
        )
    }
}

/// A directory that nobody else may enter, removed when dropped.
struct Directory {
    path: PathBuf,
}

impl Directory {
    fn create() -> anyhow::Result<Directory> {
        let parent = std::env::temp_dir();
        for _ in 0..DIRECTORY_ATTEMPTS_MAX {
            let path = parent.join(format!("preface-demo-{:06}", fastrand::u32(..1_000_000)));
            match DirBuilder::new().mode(0o700).create(&path) {
                Ok(()) => return Ok(Directory { path }),
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => {
                    let next = "name a writable directory in TMPDIR";
                    return Err(error).with_context(|| format!("cannot write to {}; {next}", parent.display()));
                }
            }
        }
        bail!("{} is full of earlier demos; remove its preface-demo-*", parent.display())
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        // Nothing can be done about a failure, and nothing is lost by it.
        let _ = fs::remove_dir_all(&self.path);
    }
}

fn spawn(name: &str, body: impl FnOnce() + Send + 'static) -> anyhow::Result<()> {
    std::thread::Builder::new().name(name.to_owned()).spawn(body).context("cannot start a thread")?;
    Ok(())
}

/// One receiver of connections and datagrams.
struct Receiver {
    tcp: TcpListener,
    udp: UdpSocket,
}

impl Receiver {
    fn bind(port: u16) -> anyhow::Result<Receiver> {
        let tcp = listen(port)?;
        let udp = bind(tcp.local_addr()?.port())?;
        Ok(Receiver { tcp, udp })
    }

    /// For as long as the process lives.
    fn serve(self, sender: mpsc::Sender<Seen>) -> io::Result<Infallible> {
        self.tcp.set_nonblocking(true)?;
        self.udp.set_nonblocking(true)?;
        tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(async {
            let listener = tokio::net::TcpListener::from_std(self.tcp)?;
            let socket = tokio::net::UdpSocket::from_std(self.udp)?;
            // Once the story is told nobody asks any more.
            let of_datagrams = sender.clone();
            tokio::select! {
                never = whoami::serve(listener, move |seen| drop(sender.send(seen))) => match never {},
                never = whoami::serve_udp(socket, move |seen| drop(of_datagrams.send(seen))) => match never {},
            }
        })
    }
}

/// The thread that makes the first connections, sends the first datagram, and says what they showed.
struct Story {
    seen: mpsc::Receiver<Seen>,
    paint: Paint,
    file: PathBuf,
    ports: Ports,
}

impl Story {
    fn tell(&self) -> anyhow::Result<()> {
        let Ports { v1, v2, udp, .. } = self.ports;
        // Both stay open until all is said, so that their lines in the log come after it.
        let (first, first_seen) = self.connect(v1)?;
        let (second, second_seen) = self.connect(v2)?;
        let third_seen = self.send(udp)?;
        let mut text = self.opening();
        text.push_str(&self.chapter(1, "v1", v1, &first_seen)?);
        text.push_str(&self.chapter(2, "v2", v2, &second_seen)?);
        text.push_str(&self.chapter(3, "v2", udp, &third_seen)?);
        text.push_str(&self.what_next());
        say(&text);
        drop((first, second));
        Ok(())
    }

    /// A request through the balancer, answered, and what the receiver read before it.
    fn connect(&self, listener: SocketAddr) -> anyhow::Result<(TcpStream, Seen)> {
        let deadline = Instant::now() + FIRST_CONNECTION_TIMEOUT;
        let mut stream = loop {
            match TcpStream::connect_timeout(&listener, FIRST_CONNECTION_TIMEOUT) {
                Ok(stream) => break stream,
                Err(error) if Instant::now() > deadline => {
                    return Err(error).with_context(|| format!("the balancer does not answer on {listener}"));
                }
                Err(_) => std::thread::sleep(CONNECT_PAUSE),
            }
        };
        let client = stream.local_addr()?;
        stream.set_read_timeout(Some(FIRST_CONNECTION_TIMEOUT))?;
        let mut answer = Vec::new();
        stream
            .write_all(b"GET / HTTP/1.1\r\nHost: demo\r\nConnection: close\r\n\r\n")
            .and_then(|()| stream.read_to_end(&mut answer))
            .with_context(|| format!("the first connection to {listener} failed"))?;
        Ok((stream, self.find(Transport::Stream, client, deadline)?))
    }

    /// A datagram through the balancer, answered, and what stood before it when it came to the receiver.
    fn send(&self, listener: SocketAddr) -> anyhow::Result<Seen> {
        let deadline = Instant::now() + FIRST_CONNECTION_TIMEOUT;
        let socket = bind(0)?;
        let client = socket.local_addr()?;
        socket.connect(listener)?;
        socket.set_read_timeout(Some(ANSWER_TIMEOUT))?;
        let cannot = || format!("no answer to a datagram to {listener}");
        let attempt = || socket.send(b"hello").and_then(|_| socket.recv(&mut [0; 2_048]));
        while let Err(error) = attempt() {
            if Instant::now() > deadline {
                return Err(error).with_context(cannot);
            }
            std::thread::sleep(CONNECT_PAUSE);
        }
        self.find(Transport::Dgram, client, deadline)
    }

    /// The receivers also report health checks; a header of this client names this client.
    fn find(&self, transport: Transport, client: SocketAddr, deadline: Instant) -> anyhow::Result<Seen> {
        std::iter::from_fn(|| self.seen.recv_timeout(deadline - Instant::now().min(deadline)).ok())
            .find(|seen| seen.transport == transport && is_about(seen, client))
            .ok_or_else(|| anyhow!("no receiver reported a header that names {client}"))
    }

    fn opening(&self) -> String {
        let Ports { v1, v2, udp, receivers: [first, second], .. } = self.ports;
        let title = self.paint.bold("preface demo");
        format!(
            "\n{title}: a balancer between you and two receivers, all on this machine\n\n\
             \x20 you -> {v1:<15} listener v1 --+--> {first} receiver\n\
             \x20 you -> {v2:<15} listener v2 --+--> {second} receiver\n\
             \x20 you -> {udp:<15} listener udp -+\n"
        )
    }

    /// One connection or datagram: what the receiver read first, field by field.
    fn chapter(&self, number: usize, version: &str, listener: SocketAddr, seen: &Seen) -> anyhow::Result<String> {
        let First::Header { header, raw } = &seen.first else { bail!("no header came through {listener}") };
        let (what, sends, before, did) = match seen.transport {
            Transport::Stream => ("connection", version.to_owned(), "the client's first byte", "connected"),
            Transport::Dgram => {
                ("datagram", format!("{version} with each"), "the client's bytes, in the same datagram", "sent it")
            }
        };
        let title = format!("{number}. A {what} to {listener}, where the pool sends {sends}");
        let mut text = format!("\n{}\n", self.paint.bold(&title));
        let _ = writeln!(text, "   Before {before}, receiver {} read these {} bytes:\n", seen.local, raw.len());
        let explained = explain(header, raw);
        let (facts, fields) = explained.split_once("\n\n").unwrap_or((&explained, ""));
        for line in facts.lines() {
            let _ = writeln!(text, "     {}", self.paint.green(line));
        }
        text.push('\n');
        for line in fields.lines() {
            let _ = writeln!(text, "   {}", self.paint.dim(line));
        }
        let _ = writeln!(text, "\n   Without them, all it would know is that {} {did}: the balancer.", seen.peer);
        Ok(text)
    }

    fn what_next(&self) -> String {
        let Ports { v1, v2, udp, admin, receivers: [first, _], .. } = self.ports;
        let (udp_ip, udp_port) = (udp.ip(), udp.port());
        let preface = command();
        let mut text = format!("\n{}\n\n", self.paint.bold("Try, in another terminal"));
        for (line, what) in [
            (format!("curl http://{v1}/"), "what the receiver read about you, v1; browsers get a page"),
            (
                format!("curl http://{v2}/"),
                "the same, v2 with its TLVs; once more, and the log names the other receiver",
            ),
            (
                format!("nc -u {udp_ip} {udp_port}"),
                "then type a line: it is a datagram, and the answer says what the receiver read before it",
            ),
            (
                format!("bash -c 'exec 3<>/dev/udp/{udp_ip}/{udp_port}; echo hello >&3; timeout 1 cat <&3'"),
                "the same where there is no nc",
            ),
            (format!("http://{admin}/"), "the status page, for a browser; as JSON: /status"),
            (format!("{preface} top --admin {admin}"), "the same in the terminal"),
            (format!("curl http://{admin}/metrics"), "for Prometheus"),
            (format!("{preface} drain v2 {first} --admin {admin}"), "then curl: the log names only the other receiver"),
            (format!("{preface} enable v2 {first} --admin {admin}"), "and back"),
        ] {
            let _ = writeln!(text, "  {line}\n      {}", self.paint.dim(what));
        }
        let _ = write!(
            text,
            "\n{}  edit this file and save; it reloads, and no connection is lost:\n\n  {}\n\n{}\n\n",
            self.paint.bold("Hot reload"),
            self.file.display(),
            self.paint.dim("Ctrl-C ends the demo and removes that file. Below: the balancer's log, one line for each connection that ended."),
        );
        text
    }
}

fn is_about(seen: &Seen, client: SocketAddr) -> bool {
    match &seen.first {
        First::Header { header, .. } => {
            matches!(header.addresses, Addresses::Inet { source, .. } if source == client)
        }
        First::Spp { spp, .. } => spp.client == client,
        First::Nothing(_) | First::Wrong { .. } => false,
    }
}

/// How this program was called: under `cargo run` it is not in the PATH.
fn command() -> String {
    let called = std::env::args_os().next().map(PathBuf::from);
    called.as_deref().map(Path::display).map_or_else(|| "preface".to_owned(), |path| path.to_string())
}

/// A closed standard output is no reason to stop serving.
fn say(text: &str) {
    let mut stdout = io::stdout().lock();
    let _ = stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush());
}

/// Colours, or none.
#[derive(Clone, Copy, Debug)]
struct Paint {
    on: bool,
}

impl Paint {
    /// On a terminal, unless NO_COLOR is set or the terminal can do nothing.
    fn of_stdout() -> Paint {
        let is_set = |name: &str| std::env::var_os(name).is_some_and(|value| !value.is_empty());
        let is_dumb = std::env::var_os("TERM").is_some_and(|term| term == "dumb");
        Paint { on: io::stdout().is_terminal() && !is_set("NO_COLOR") && !is_dumb }
    }

    fn bold(self, text: &str) -> String {
        self.wrap("1", text)
    }

    fn dim(self, text: &str) -> String {
        self.wrap("2", text)
    }

    fn green(self, text: &str) -> String {
        self.wrap("32", text)
    }

    fn wrap(self, code: &str, text: &str) -> String {
        if self.on && !text.is_empty() { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proxy_protocol::{Header, Tlv, Transport, Version};

    fn ports() -> Ports {
        let local = |port: u16| SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        Ports {
            v1: local(8081),
            v2: local(8082),
            udp: local(8083),
            admin: local(9900),
            receivers: [local(9081), local(9082)],
            datagram_receivers: [local(9081), local(9082)],
        }
    }

    fn seen(version: Version, transport: Transport, listener: SocketAddr, tlvs: Vec<Tlv>) -> Seen {
        let client: SocketAddr = "127.0.0.1:40112".parse().expect("an address");
        let header = Header::proxy(version, Addresses::inet(client, listener, transport), tlvs);
        let mut raw = Vec::new();
        header.encode(&mut raw).expect("a short header");
        let peer: SocketAddr = "127.0.0.1:50132".parse().expect("an address");
        Seen { transport, peer: peer.into(), local: ports().receivers[0].into(), first: First::Header { header, raw } }
    }

    #[test]
    fn its_configuration_is_valid_and_draws_no_warning() {
        let scene = Scene { directory: Directory::create().expect("a directory"), ports: ports() };
        let parsed = crate::config::parse("preface.toml", &scene.toml()).expect("valid");
        assert!(parsed.warnings.is_empty(), "{:?}", parsed.warnings);
        assert_eq!(parsed.config.listeners.len(), 3);
    }

    #[test]
    fn its_directory_is_private_and_goes_with_it() {
        use std::os::unix::fs::PermissionsExt;
        let directory = Directory::create().expect("a directory");
        let path = directory.path.clone();
        assert_eq!(fs::metadata(&path).expect("it exists").permissions().mode() & 0o777, 0o700);
        drop(directory);
        assert!(!path.exists());
    }

    #[test]
    fn takes_another_port_where_the_nice_one_is_taken() {
        let taken = listen(0).expect("a port");
        let other = listen(taken.local_addr().expect("bound").port()).expect("another port");
        assert_ne!(taken.local_addr().expect("bound"), other.local_addr().expect("bound"));
        let taken = bind(0).expect("a port");
        let other = bind(taken.local_addr().expect("bound").port()).expect("another port");
        assert_ne!(taken.local_addr().expect("bound"), other.local_addr().expect("bound"));
    }

    #[test]
    fn tells_what_the_receivers_read() {
        let (_, nothing_more) = mpsc::channel();
        let file = PathBuf::from("/tmp/preface-demo-123456/preface.toml");
        let story = Story { seen: nothing_more, paint: Paint { on: false }, file, ports: ports() };
        let vpce = vec![Tlv::AwsVpcEndpoint("vpce-08d2bf15fac5001c9".into())];
        let first = seen(Version::V1, Transport::Stream, ports().v1, Vec::new());
        let second = seen(Version::V2, Transport::Stream, ports().v2, vpce);
        let third = seen(Version::V2, Transport::Dgram, ports().udp, Vec::new());
        let text = [
            story.opening(),
            story.chapter(1, "v1", ports().v1, &first).expect("a header"),
            story.chapter(2, "v2", ports().v2, &second).expect("a header"),
            story.chapter(3, "v2", ports().udp, &third).expect("a header"),
            story.what_next().replace(&command(), "preface"),
        ]
        .concat();
        insta::assert_snapshot!(text);
    }

    #[test]
    fn knows_its_own_connection_from_a_health_check() {
        let own = seen(Version::V1, Transport::Stream, ports().v1, Vec::new());
        assert!(is_about(&own, "127.0.0.1:40112".parse().expect("an address")));
        assert!(!is_about(&own, "127.0.0.1:40113".parse().expect("an address")));
        let check = Seen { first: First::Nothing(Vec::new()), ..own };
        assert!(!is_about(&check, "127.0.0.1:40112".parse().expect("an address")));
    }

    #[test]
    fn colours_only_where_they_are_wanted() {
        assert_eq!(Paint { on: false }.bold("x"), "x");
        assert_eq!(Paint { on: true }.bold("x"), "\x1b[1mx\x1b[0m");
    }
}
