//! UNIX sockets as binds and as upstreams: who the receiver takes for the client, the file, reloads, and what is hostile.

use std::fs;
use std::io::{IoSlice, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread::JoinHandle;

use preface::proxy_protocol::{Addresses, Command as HeaderCommand, Tlv};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use rustix::process::Signal;
use tempfile::TempDir;

use crate::support::client::{connect, connect_from, loopback};
use crate::support::peers::{haproxy, nginx};
use crate::support::ports::free_port;
use crate::support::receiver::{echo, say_who};
use crate::support::user::User;
use crate::support::{Balancer, DEADLINE, Process, Receiver, eventually, http, preface, program, skip, template};

fn directory() -> TempDir {
    tempfile::tempdir().expect("a temporary directory")
}

/// A listener `web` on `binds` in front of `upstream`.
fn one_pool(binds: &[String], header: &str, upstream: &str) -> String {
    format!(
        "[listeners.web]\nbind = {binds:?}\npool = \"app\"\n[pools.app]\nproxy_protocol = \"{header}\"\n\
         upstreams = [\"{upstream}\"]\n"
    )
}

fn unix(path: &Path) -> String {
    format!("unix:{}", path.display())
}

#[track_caller]
fn connect_unix(path: &Path) -> UnixStream {
    let stream = UnixStream::connect(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    stream.set_read_timeout(Some(DEADLINE)).expect("a time limit");
    stream.set_write_timeout(Some(DEADLINE)).expect("a time limit");
    stream
}

/// An application that serves one connection on a UNIX socket.
fn serve_one<T: Send + 'static>(path: &Path, serve: impl FnOnce(UnixStream) -> T + Send + 'static) -> JoinHandle<T> {
    let listener = UnixListener::bind(path).expect("a free path");
    std::thread::spawn(move || {
        let (stream, _) = listener.accept().expect("the balancer comes");
        stream.set_read_timeout(Some(DEADLINE)).expect("a time limit");
        stream.set_write_timeout(Some(DEADLINE)).expect("a time limit");
        serve(stream)
    })
}

#[test]
fn receivers_on_unix_sockets_name_every_client() {
    let (nginx, haproxy) = (nginx(), haproxy());
    let mut config = String::new();
    for (name, socket) in [("nginx", nginx.socket()), ("haproxy", haproxy.socket())] {
        for version in ["v1", "v2"] {
            config += &format!(
                "[listeners.{name}-{version}]\nbind = \"127.0.0.1:0\"\npool = \"{name}-{version}\"\n\
                 [pools.{name}-{version}]\nproxy_protocol = \"{version}\"\nupstreams = [\"{}\"]\n\
                 [pools.{name}-{version}.health_check]\nprotocol = \"http\"\npath = \"/quiet\"\n",
                unix(&socket)
            );
        }
    }
    let lb = preface(&config);
    for (name, seen, socket) in [("nginx", 40, nginx.socket()), ("haproxy", 40, haproxy.socket())] {
        for version in ["v1", "v2"] {
            let pool = format!("{name}-{version}");
            for index in 0..20 {
                let mut client = connect_from(loopback(index), lb.ipv4(&pool)).expect("a client connects");
                let own = client.local_addr().expect("an address");
                let answer = http::get(&mut client, &format!("/{own}")).expect("an answer");
                assert_eq!(answer.text(), format!("{} {}\n", own.ip(), own.port()), "{pool}");
            }
            let upstream = eventually("checked over the UNIX socket", || {
                let upstream = lb.status()["pools"][&pool]["upstreams"][0].clone();
                (upstream["health"] == "healthy").then_some(upstream)
            });
            assert_eq!(upstream["address"], unix(&socket).as_str());
            assert!(upstream["health_reason"].as_str().expect("a reason").starts_with("status 200 in "), "{upstream}");
            let labels = [("pool", pool.as_str()), ("upstream", &unix(&socket))];
            assert_eq!(lb.metric("preface_upstream_connections_total", &labels), 20.0);
        }
        let lines = if name == "nginx" { nginx.wait_for(seen) } else { haproxy.wait_for(seen) };
        assert!(lines.iter().all(|line| line.path == format!("/{}", line.client)), "{lines:?}");
    }
    assert_eq!(nginx.errors(), [""; 0]);
    lb.log().wait_for("a line of the log", |line| line.contains(&format!(" upstream={} ", unix(&nginx.socket()))));
}

#[test]
fn a_unix_client_is_local_in_v2_and_unknown_in_v1() {
    let directory = directory();
    let receiver = Receiver::with_header(say_who);
    let (v1, v2) = (directory.path().join("v1.sock"), directory.path().join("v 2.sock"));
    let mut config = one_pool(&[unix(&v2), "127.0.0.1:0".to_owned()], "v2", &receiver.address.to_string());
    config += "[pools.app.tlvs]\nunique_id = true\nvpce_id = \"vpce-1\"\n";
    config += &format!("[listeners.old]\nbind = \"{}\"\npool = \"old\"\n", unix(&v1));
    config += &format!("[pools.old]\nproxy_protocol = \"v1\"\nupstreams = [\"{}\"]\n", receiver.address);
    let lb = preface(&config);
    let mut answer = String::new();
    connect_unix(&v2).read_to_string(&mut answer).expect("an answer");
    let arrival = receiver.wait_for(1).remove(0);
    assert_eq!(answer, format!("{}\n", arrival.peer), "the receiver counts with the connection's own addresses");
    let header = arrival.header.expect("a header");
    assert_eq!((header.command, &header.addresses), (HeaderCommand::Local, &Addresses::Unknown));
    assert_eq!(arrival.raw[12..14], [0x20, 0x00], "LOCAL, UNSPEC");
    let Tlv::UniqueId(id) = &header.tlvs[0] else { panic!("{:?}", header.tlvs) };
    assert_eq!(header.tlvs[1], Tlv::AwsVpcEndpoint("vpce-1".to_owned()));
    let id = String::from_utf8_lossy(id).into_owned();
    let local = format!(" id={id} listener=web client=unix local=\"{}\" ", unix(&v2));
    lb.log().wait_for("the connection's line", |line| line.contains(&local) && line.contains(" end=upstream.relay."));
    let tapped = lb.ask("GET", &format!("/tap?id={id}")).json();
    assert_eq!(tapped["connections"][0]["client"], "unix");
    assert_eq!(tapped["connections"][0]["local"], unix(&v2).as_str());

    connect_unix(&v1).read_to_string(&mut String::new()).expect("an answer");
    assert_eq!(receiver.wait_for(2)[1].raw, b"PROXY UNKNOWN\r\n");
    // The other bind of the same listener is as ever.
    let mut client = lb.connect("web");
    let own = client.local_addr().expect("an address");
    client.read_to_string(&mut String::new()).expect("an answer");
    assert_eq!(receiver.wait_for(3)[2].client(), own);
    assert_eq!(lb.status()["listeners"]["web"]["bind"][0], unix(&v2).as_str());
}

/// LOCAL, with and without TLVs, and UNKNOWN are taken by real receivers; who asks is another program.
#[test]
fn clients_of_a_unix_bind_reach_real_receivers() {
    let directory = directory();
    let (nginx, haproxy) = (nginx(), haproxy());
    let mut config = String::new();
    for (receiver, address) in [("nginx", unix(&nginx.socket())), ("haproxy", format!("127.0.0.1:{}", haproxy.headers))]
    {
        for (name, header, tlvs) in
            [("v1", "v1", ""), ("v2", "v2", ""), ("tlvs", "v2", "tlvs = { unique_id = true, crc32c = true }\n")]
        {
            let socket = directory.path().join(format!("{receiver}-{name}.sock"));
            config += &format!(
                "[listeners.{receiver}-{name}]\nbind = \"{}\"\npool = \"{receiver}-{name}\"\n\
                 [pools.{receiver}-{name}]\nproxy_protocol = \"{header}\"\n{tlvs}upstreams = [\"{address}\"]\n",
                unix(&socket)
            );
        }
    }
    let _lb = preface(&config);
    for (receiver, name) in
        [("nginx", "v1"), ("nginx", "v2"), ("nginx", "tlvs"), ("haproxy", "v1"), ("haproxy", "v2"), ("haproxy", "tlvs")]
    {
        let socket = directory.path().join(format!("{receiver}-{name}.sock"));
        let mut curl = Command::new(program("curl"));
        curl.args(["--silent", "--show-error", "--fail", "--max-time", "10", "--unix-socket"]).arg(socket);
        let (status, output) = Process::run(curl.arg(format!("http://localhost/{name}")));
        assert!(status.success(), "{receiver} {name}: {output}");
        // nginx has no address of the header, HAProxy takes that of the connection.
        let expected = if receiver == "nginx" { "" } else { "127.0.0.1 " };
        assert!(output.trim_start().starts_with(expected.trim()), "{receiver} {name}: {output}");
    }
    let lines = eventually("nginx's lines", || Some(nginx.header_lines()).filter(|lines| lines.len() == 3));
    // Neither an address nor a port in the header; the client is the connection's own end.
    assert!(lines.iter().all(|line| line.contains(" unix: ") && line.contains(" 200 /")), "{lines:?}");
    assert_eq!(nginx.errors(), [""; 0]);
}

/// HAProxy in front speaks to preface over a UNIX socket.
#[test]
fn a_proxy_in_front_connects_over_the_unix_socket() {
    let directory = directory();
    let receiver = Receiver::with_header(echo);
    let socket = directory.path().join("web.sock");
    let _lb = preface(&one_pool(&[unix(&socket)], "v2", &receiver.address.to_string()));
    let port = free_port();
    let values = [("port", port.to_string()), ("socket", socket.display().to_string())];
    let values: Vec<(&str, &str)> = values.iter().map(|(name, value)| (*name, value.as_str())).collect();
    let file = directory.path().join("haproxy.cfg");
    fs::write(&file, template("haproxy-to-unix.cfg", &values)).expect("the configuration is written");
    let _haproxy = Process::start(Command::new(program("haproxy")).arg("-db").arg("-f").arg(&file));
    let mut client = eventually("HAProxy listens", || connect(([127, 0, 0, 1], port).into()).ok());
    client.write_all(b"through two proxies").expect("it is taken");
    client.shutdown(Shutdown::Write).expect("half-closed");
    let mut answer = String::new();
    client.read_to_string(&mut answer).expect("an answer");
    assert_eq!(answer, "through two proxies", "after a half-close");
    assert_eq!(receiver.wait_for(1)[0].raw[12], 0x20, "LOCAL");
}

#[test]
fn the_file_has_its_mode_replaces_a_stale_one_and_goes_with_the_process() {
    let directory = directory();
    let receiver = Receiver::plain(echo);
    let socket = directory.path().join("web.sock");
    // A std listener leaves its file behind, as a killed process does.
    drop(UnixListener::bind(&socket).expect("a free path"));
    let config = one_pool(&[unix(&socket)], "off", &receiver.address.to_string());
    let mut lb = preface(&config);
    let file = fs::metadata(&socket).expect("the file is there");
    assert!(file.file_type().is_socket());
    assert_eq!(file.mode() & 0o777, 0o660);
    exchange(&mut connect_unix(&socket));
    // What it serves already stays with it, and is no obstacle to a second start elsewhere.
    lb.signal(Signal::TERM);
    assert!(lb.wait_exit().success());
    assert!(!socket.exists(), "the file goes with the process");

    let mut killed = preface(&config);
    killed.signal(Signal::KILL);
    killed.wait_exit();
    assert!(socket.exists());
    let mut lb = preface(&config);
    exchange(&mut connect_unix(&socket));
    // Another process has put its own file there meanwhile: not ours to remove.
    fs::remove_file(&socket).expect("the file is removed");
    let _successor = UnixListener::bind(&socket).expect("a free path");
    lb.signal(Signal::TERM);
    assert!(lb.wait_exit().success());
    assert!(socket.exists(), "the successor's file stays");
}

fn exchange(stream: &mut (impl Read + Write)) {
    stream.write_all(b"ping").expect("it is taken");
    let mut answer = [0; 4];
    stream.read_exact(&mut answer).expect("an answer");
    assert_eq!(&answer, b"ping");
}

/// What a start with this bind says.
#[track_caller]
fn refused(directory: &Path, user: Option<&User>, bind: &Path) -> String {
    let config = format!(
        "[admin]\nbind = \"{}\"\n{}",
        unix(&directory.join("admin.sock")),
        one_pool(&[unix(bind)], "off", "127.0.0.1:9")
    );
    let file = directory.join("preface.toml");
    fs::write(&file, config).expect("the configuration is written");
    let preface = Path::new(env!("CARGO_BIN_EXE_preface"));
    let mut command = user.map_or_else(|| Command::new(preface), |user| user.command(preface, directory));
    let (status, output) = Process::run(command.arg("run").arg("--config").arg(&file));
    assert_eq!(status.code(), Some(1), "{output}");
    output.replace(&directory.display().to_string(), "DIR")
}

#[test]
fn a_path_that_cannot_be_bound_is_an_error_that_says_why() {
    let directory = directory();
    let at = |name: &str| directory.path().join(name);
    let mut said = String::new();
    let _live = UnixListener::bind(at("live.sock")).expect("a free path");
    fs::write(at("file"), "precious").expect("a file");
    fs::create_dir(at("directory")).expect("a directory");
    std::os::unix::fs::symlink(at("live.sock"), at("link")).expect("a link");
    for name in ["live.sock", "file", "directory", "link", "missing/web.sock"] {
        said += &format!("{}\n", refused(directory.path(), None, &at(name)));
    }
    assert_eq!(fs::read_to_string(at("file")).expect("it is still there"), "precious");
    insta::assert_snapshot!(said);
    assert!(connect_unix(&at("live.sock")).peer_addr().is_ok(), "the other process is not disturbed");
    match User::new() {
        Ok(user) => {
            let closed = tempfile::tempdir().expect("a temporary directory");
            let said = refused(directory.path(), Some(&user), &closed.path().join("web.sock"));
            assert!(said.contains("Permission denied") && said.contains("write to its directory"), "{said}");
        }
        Err(why) => skip("a_path_that_cannot_be_bound_is_an_error_that_says_why", &why),
    }
}

#[test]
fn a_reload_keeps_the_socket_and_removes_what_left() {
    let directory = directory();
    let (receiver, other) = (Receiver::with_header(echo), Receiver::with_header(echo));
    let (stays, leaves) = (directory.path().join("stays.sock"), directory.path().join("leaves.sock"));
    let config = |binds: &[String], upstream: &Receiver| one_pool(binds, "v2", &upstream.address.to_string());
    let mut lb = preface(&config(&[unix(&stays), unix(&leaves)], &receiver));
    let inode = |path: &Path| fs::metadata(path).expect("the file is there").ino();
    let (before, mut open) = (inode(&stays), connect_unix(&leaves));
    exchange(&mut open);
    lb.apply(&config(&[unix(&stays)], &other));
    assert_eq!(inode(&stays), before, "the same socket");
    assert!(!leaves.exists(), "the file goes with its address");
    exchange(&mut open);
    exchange(&mut connect_unix(&stays));
    assert_eq!(other.wait_for(1).len(), 1);
    // It comes back, and at once.
    lb.apply(&config(&[unix(&stays), unix(&leaves)], &other));
    exchange(&mut connect_unix(&leaves));
    assert_eq!(inode(&stays), before);
    // A reload that fails elsewhere leaves no file behind.
    let new = directory.path().join("new.sock");
    lb.rewrite_config(&config(&[unix(&stays), unix(&leaves), unix(&new), "192.0.2.1:80".to_owned()], &other));
    let report = lb.reload();
    assert_eq!(report.status, 422, "{}", report.text());
    assert!(!new.exists());
    exchange(&mut connect_unix(&stays));
    exchange(&mut open);
    assert_eq!(receiver.arrivals().len(), 1, "{:?}", receiver.errors());
}

/// The threads of a process that carry traffic, each with the processor time that it has used in nanoseconds.
fn workers(lb: &Balancer) -> Vec<(String, u64)> {
    let tasks = fs::read_dir(format!("/proc/{}/task", lb.id())).expect("the process is there");
    let tasks = tasks.map(|task| task.expect("a thread").path());
    let mut workers: Vec<(String, u64)> = tasks
        .filter_map(|task| {
            let name = fs::read_to_string(task.join("comm")).ok()?.trim().to_owned();
            let time = fs::read_to_string(task.join("schedstat")).ok()?;
            Some((name, time.split(' ').next()?.parse().ok()?))
        })
        .filter(|(name, _)| name.starts_with("worker-"))
        .collect();
    workers.sort();
    workers
}

#[test]
fn all_workers_accept_from_the_one_socket() {
    let directory = directory();
    let receiver = Receiver::plain(echo);
    let socket = directory.path().join("web.sock");
    let config = one_pool(&[unix(&socket)], "off", &receiver.address.to_string());
    let lb = preface(&format!("[runtime]\nworkers = 2\n[log]\nconnections = \"off\"\n{config}"));
    // Bytes are moved by the thread that accepted: each must have moved many of them.
    let before = workers(&lb);
    let mut open: Vec<UnixStream> = Vec::new();
    let block = vec![b'x'; 1 << 16];
    eventually("both workers have served connections", || {
        for _ in 0..8 {
            let mut stream = connect_unix(&socket);
            exchange(&mut stream);
            open.push(stream);
        }
        for stream in &mut open {
            stream.write_all(&block).expect("it is taken");
            stream.read_exact(&mut vec![0; block.len()]).expect("it comes back");
        }
        let used = workers(&lb).into_iter().zip(&before).map(|((_, now), (_, before))| now - before);
        // Looking in vain costs a few microseconds for each connection; this is far more.
        used.min().is_some_and(|least| least > open.len() as u64 * 200_000).then_some(())
    });
    assert_eq!(before.len(), 2);
    assert_eq!(lb.metric("preface_listener_connections_open", &[("listener", "web")]), open.len() as f64);
}

#[test]
fn nothing_is_lost_between_unix_sockets() {
    let directory = directory();
    let (front, back) = (directory.path().join("front.sock"), directory.path().join("back.sock"));
    let app = serve_one(&back, |mut stream| {
        let mut bytes = Vec::new();
        stream.read_to_end(&mut bytes).expect("all of it");
        stream.write_all(&bytes).expect("it is taken");
        bytes.len()
    });
    let lb = preface(&one_pool(&[unix(&front)], "off", &unix(&back)));
    let bytes: Vec<u8> = (0..16_u32 << 20).map(|index| (index.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let mut client = connect_unix(&front);
    let mut reader = client.try_clone().expect("a second descriptor");
    let sent = bytes.clone();
    let writer = std::thread::spawn(move || {
        client.write_all(&sent).expect("it is taken");
        client.shutdown(Shutdown::Write).expect("half-closed");
    });
    let mut answer = Vec::new();
    reader.read_to_end(&mut answer).expect("all of it comes back after the half-close");
    writer.join().expect("the writer ends");
    assert!(answer == bytes, "{} of {} bytes, or others", answer.len(), bytes.len());
    assert_eq!(app.join().expect("the application ends"), bytes.len());
    lb.log().wait_for("its line", |line| line.contains(" end=client.relay.closed") && line.contains("16777216"));
}

/// What can be kept of resets: a UNIX socket has none.
#[test]
fn a_reset_passes_from_a_unix_socket_and_ends_at_one() {
    let directory = directory();
    let front = directory.path().join("front.sock");
    let upstream = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = upstream.local_addr().expect("an address");
    let lb = preface(&one_pool(&[unix(&front)], "off", &address.to_string()));
    let accepted = |client: &mut UnixStream| {
        client.write_all(b"x").expect("it is taken");
        let (mut stream, _) = upstream.accept().expect("the balancer comes");
        stream.set_read_timeout(Some(DEADLINE)).expect("a time limit");
        stream.read_exact(&mut [0; 1]).expect("the client's byte");
        stream
    };
    // A client that closes with unread bytes resets: so it is for the upstream.
    let mut client = connect_unix(&front);
    let mut stream = accepted(&mut client);
    stream.write_all(b"answer").expect("it is taken");
    eventually("the answer is in the client's queue", || (rustix::io::ioctl_fionread(&client) == Ok(6)).then_some(()));
    drop(client);
    let error = stream.read(&mut [0; 1]).expect_err("a reset, not an end");
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    lb.log().wait_for("its line", |line| line.contains(" end=client.relay.reset"));
    // An upstream that resets: all that it sent arrives, and then, for want of anything else, the end of the stream.
    let mut client = connect_unix(&front);
    let mut stream = accepted(&mut client);
    stream.write_all(b"half").expect("it is taken");
    let mut half = [0; 4];
    client.read_exact(&mut half).expect("what was sent before");
    socket2::SockRef::from(&stream).set_linger(Some(std::time::Duration::ZERO)).expect("an option");
    drop(stream);
    assert_eq!(client.read(&mut [0; 1]).expect("wrong, but all there is"), 0);
    lb.log().wait_for("its line", |line| line.contains(" end=upstream.relay.reset"));
}

/// The kernel ends a read after bytes that came with a descriptor, though more is queued.
#[test]
fn bytes_behind_a_descriptor_are_not_left_waiting() {
    let directory = directory();
    let (front, back) = (directory.path().join("front.sock"), directory.path().join("back.sock"));
    let app = serve_one(&back, |mut stream| {
        let mut bytes = [0; 9];
        stream.read_exact(&mut bytes).map(|()| bytes)
    });
    let _lb = preface(&one_pool(&[unix(&front)], "off", &unix(&back)));
    let client = connect_unix(&front);
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    let rights = [client.as_fd()];
    assert!(ancillary.push(SendAncillaryMessage::ScmRights(&rights)));
    let sent = sendmsg(&client, &[IoSlice::new(b"with")], &mut ancillary, SendFlags::empty());
    assert_eq!(sent, Ok(4));
    (&client).write_all(b" more").expect("it is taken");
    assert_eq!(&app.join().expect("the application ends").expect("all of it comes"), b"with more");
}

#[test]
fn an_upstream_that_is_gone_or_busy_is_passed_over() {
    let directory = directory();
    let (gone, busy) = (directory.path().join("gone.sock"), directory.path().join("busy.sock"));
    let full = socket2::Socket::new(socket2::Domain::UNIX, socket2::Type::STREAM, None).expect("a socket");
    full.bind(&socket2::SockAddr::unix(&busy).expect("a path")).expect("a free path");
    full.listen(0).expect("it listens");
    let _queued = connect_unix(&busy);
    let receiver = Receiver::with_header(echo);
    let config = format!(
        "[listeners.web]\nbind = \"127.0.0.1:0\"\npool = \"app\"\n[pools.app]\nproxy_protocol = \"v2\"\n\
         unhealthy_after_failed_connects = 2\nupstreams = [\"{}\", \"{}\", \"{}\"]\n",
        unix(&gone),
        unix(&busy),
        receiver.address
    );
    let lb = preface(&config);
    for _ in 0..6 {
        exchange(&mut lb.connect("web"));
    }
    for path in [&gone, &busy] {
        let labels = [("upstream", unix(path))];
        let labels: Vec<(&str, &str)> = labels.iter().map(|(name, value)| (*name, value.as_str())).collect();
        assert!(lb.metric("preface_upstream_connect_failures_total", &labels) >= 2.0, "{}", path.display());
    }
    assert_eq!(lb.metric("preface_upstream_connections_total", &[]), 6.0, "local_resources would have ended them");
}

#[test]
fn orders_and_the_command_line_name_a_unix_upstream() {
    let directory = directory();
    let path: PathBuf = directory.path().join("app.sock");
    let _app = serve_one(&path, |mut stream| stream.read_to_end(&mut Vec::new()));
    let lb = preface(&one_pool(&["127.0.0.1:0".to_owned()], "v2", &unix(&path)));
    let mut client: TcpStream = lb.connect("web");
    client.write_all(b"x").expect("it is taken");
    let state = || lb.status()["pools"]["app"]["upstreams"][0]["admin"].clone();
    eventually("it is connected", || (lb.status()["pools"]["app"]["open"] == 1).then_some(()));
    let order = |order: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_preface"));
        command.args([order, "app", &unix(&path), "--admin"]).arg(unix(&lb.admin_socket()));
        let (status, output) = Process::run(&mut command);
        assert!(status.success(), "{output}");
        assert!(output.contains(&unix(&path)), "{output}");
    };
    order("drain");
    assert_eq!(state(), "draining");
    order("enable");
    assert_eq!(state(), "enabled");
    order("disable");
    assert_eq!(state(), "disabled");
    let end = client.read(&mut [0; 1]);
    assert!(end.is_err(), "an open connection is reset: {end:?}");
    let missing = lb.ask("POST", "/pools/app/upstreams/unix%3A%2Fother.sock/drain");
    assert_eq!(missing.status, 404);
    assert!(missing.text().contains(&unix(&path)), "{}", missing.text());
}

#[test]
fn doctor_and_whoami_speak_over_unix_sockets() {
    let directory = directory();
    let socket = directory.path().join("who.sock");
    let preface = env!("CARGO_BIN_EXE_preface");
    let whoami = Process::start(Command::new(preface).args(["whoami", "--listen", &unix(&socket)]));
    whoami.stdout.wait_for("it listens", |line| line.starts_with("answering on unix:"));
    let nginx = nginx();
    let (status, output) = Process::run(Command::new(preface).args(["doctor", &unix(&nginx.socket())]));
    assert!(status.success() && output.contains("It requires a header: v1 or v2."), "{output}");
    assert!(output.contains(&format!("upstreams = [\"{}\"]", unix(&nginx.socket()))), "{output}");
    let mut stream = connect_unix(&socket);
    stream.write_all(b"PROXY TCP4 192.0.2.1 192.0.2.2 1234 80\r\n").expect("it is taken");
    let said = http::get(&mut stream, "/").expect("an answer").text();
    assert!(said.contains("192.0.2.1:1234"), "{said}");
}
