//! Bytes through the balancer: every one arrives, once and in order, behind one whole header; closes and resets are
//! passed on as what they were. The upstream is a socket in the test's own hands.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use preface::net::stream::unacknowledged;
use preface::proxy_protocol::{self, Decoded, Header};
use rustix::process::Signal;
use socket2::SockRef;

use crate::support::user::User;
use crate::support::{Balancer, DEADLINE, client, eventually, preface, preface_as};

const KIB: usize = 1024;
const MIB: usize = 1024 * KIB;

/// One listener, one upstream with v2 headers whose connections the test accepts itself.
pub struct Lane {
    pub balancer: Balancer,
    pub upstream: TcpListener,
}

impl Lane {
    pub fn new() -> Lane {
        Lane::with("", "")
    }

    /// With further lines for the listener and for the pool.
    #[track_caller]
    pub fn with(listener: &str, pool: &str) -> Lane {
        Lane::started(preface, listener, pool)
    }

    /// Whose balancer another user runs.
    #[track_caller]
    pub fn of_user(user: &User) -> Lane {
        Lane::started(|config| preface_as(user, config), "", "")
    }

    #[track_caller]
    fn started(start: impl FnOnce(&str) -> Balancer, listener: &str, pool: &str) -> Lane {
        let upstream = listen();
        let address = upstream.local_addr().unwrap();
        let config = format!(
            "[listeners.web]\nbind = \"127.0.0.1:0\"\npool = \"test\"\n{listener}\n\
             [pools.test]\nproxy_protocol = \"v2\"\nupstreams = [\"{address}\"]\n{pool}\n"
        );
        Lane { balancer: start(&config), upstream }
    }

    /// A client's connection and its other end, behind the header, which named the client.
    #[track_caller]
    pub fn open(&self) -> (TcpStream, TcpStream) {
        let client = self.balancer.connect("web");
        let (server, header) = accept(&self.upstream);
        assert_eq!(header.addresses.ends().unwrap().0, client.local_addr().unwrap());
        (client, server)
    }

    /// Waits for the log line of a connection that ended so.
    #[track_caller]
    pub fn wait_for_end(&self, end: &str) -> String {
        self.balancer.log().wait_for(end, |line| line.ends_with(&format!(" end={end}")))
    }
}

/// An upstream that the test serves itself; a connection that does not come fails the test instead of hanging it.
pub fn listen() -> TcpListener {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    SockRef::from(&listener).set_read_timeout(Some(DEADLINE)).unwrap();
    listener
}

/// The next connection, its header taken off.
#[track_caller]
pub fn accept(upstream: &TcpListener) -> (TcpStream, Header) {
    let (mut server, _) = upstream.accept().expect("a connection from the balancer");
    let header = take_header(&mut server).expect("a whole header");
    (server, header)
}

/// Reads a v2 header, and not a byte more.
pub fn take_header(server: &mut TcpStream) -> io::Result<Header> {
    server.set_read_timeout(Some(DEADLINE))?;
    server.set_write_timeout(Some(DEADLINE))?;
    let mut bytes = vec![0; 16];
    server.read_exact(&mut bytes)?;
    let rest = usize::from(u16::from_be_bytes([bytes[14], bytes[15]]));
    bytes.resize(16 + rest, 0);
    server.read_exact(&mut bytes[16..])?;
    match proxy_protocol::decode(&bytes) {
        Ok(Decoded::Complete { header, .. }) => Ok(header),
        other => Err(io::Error::new(ErrorKind::InvalidData, format!("{other:?} of {bytes:02x?}"))),
    }
}

/// Closes with RST.
pub fn reset(stream: TcpStream) {
    SockRef::from(&stream).set_linger(Some(Duration::ZERO)).unwrap();
}

/// Bytes that look like nothing else: a shift, a gap or a repetition shows.
pub fn noise(seed: u64, size: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut bytes = Vec::with_capacity(size + 8);
    while bytes.len() < size {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(size);
    bytes
}

#[track_caller]
fn assert_same(what: &str, got: &[u8], expected: &[u8]) {
    if got != expected {
        let at = got.iter().zip(expected).take_while(|(got, expected)| got == expected).count();
        panic!("{what}: {} bytes of {}, the first {at} are right", got.len(), expected.len());
    }
}

/// A pause that is itself what is tested: a peer that is slow.
fn dawdle(time: Duration) {
    // SLEEP: a slow peer, not a wait for anything.
    std::thread::sleep(time);
}

/// Reads to the end in small pieces with pauses; what came, and how it ended.
fn read_slowly(stream: &mut TcpStream, piece: usize, pause: Duration) -> (Vec<u8>, Option<ErrorKind>) {
    let (mut bytes, mut buffer) = (Vec::new(), vec![0; piece]);
    loop {
        match stream.read(&mut buffer) {
            Ok(0) => return (bytes, None),
            Ok(count) => bytes.extend_from_slice(&buffer[..count]),
            Err(error) => return (bytes, Some(error.kind())),
        }
        dawdle(pause);
    }
}

/// Waits until the other end's kernel has everything that was written to `stream`.
#[track_caller]
fn wait_until_taken(stream: &TcpStream) {
    eventually("the send queue is empty", || (unacknowledged(stream)? == 0).then_some(()));
}

/// Stops the balancer in its tracks, so that what happens meanwhile is there already when it looks.
pub fn while_stopped<T>(balancer: &Balancer, work: impl FnOnce() -> T) -> T {
    balancer.signal(Signal::STOP);
    let tasks = format!("/proc/{}/task", balancer.id());
    let is_stopped = |task: std::io::Result<std::fs::DirEntry>| {
        let stat = std::fs::read_to_string(task.unwrap().path().join("stat")).unwrap_or_default();
        stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('T'))
    };
    eventually("all threads are stopped", || std::fs::read_dir(&tasks).unwrap().all(is_stopped).then_some(()));
    let result = work();
    balancer.signal(Signal::CONT);
    result
}

/// Segments with data that came on this connection, as its own kernel socket counts them.
fn data_segments(stream: &TcpStream) -> usize {
    let (local, peer) = (stream.local_addr().unwrap().to_string(), stream.peer_addr().unwrap().to_string());
    let mut ss = std::process::Command::new(crate::support::program("ss"));
    let output = ss.args(["-tinHO", "src", &local, "dst", &peer]).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    let count = text.split_once("data_segs_in:").and_then(|(_, rest)| rest.split_whitespace().next());
    count.unwrap_or_else(|| panic!("no such connection: {text}")).parse().unwrap()
}

/// The first read of the next connection, and in how many segments it came.
#[track_caller]
fn first_read(upstream: &TcpListener) -> (TcpStream, Vec<u8>, usize) {
    let (mut server, _) = upstream.accept().expect("a connection from the balancer");
    server.set_read_timeout(Some(DEADLINE)).unwrap();
    let mut bytes = vec![0; 256 * KIB];
    let count = server.read(&mut bytes).unwrap();
    let segments = data_segments(&server);
    bytes.truncate(count);
    (server, bytes, segments)
}

#[track_caller]
fn header_length(bytes: &[u8]) -> usize {
    match proxy_protocol::decode(bytes) {
        Ok(Decoded::Complete { len, .. }) => len,
        other => panic!("not one whole header: {other:?} of {bytes:02x?}"),
    }
}

/// A read stops at the mark of urgent data (telnet, FTP's ABOR) although more is there.
#[test]
fn what_follows_urgent_data_does_not_wait_for_more() {
    let lane = Lane::new();
    let (mut client, mut server) = lane.open();
    while_stopped(&lane.balancer, || {
        client.write_all(b"abc").unwrap();
        assert_eq!(SockRef::from(&client).send_out_of_band(b"!").unwrap(), 1);
        client.write_all(b"def").unwrap();
    });
    let mut got = [0; 6];
    server.read_exact(&mut got).expect("all of it, without a further byte or a close");
    assert_eq!(&got, b"abcdef");
}

#[test]
fn the_header_comes_alone_and_at_once_while_the_client_is_silent() {
    let lane = Lane::new();
    for _ in 0..20 {
        let mut client = lane.balancer.connect("web");
        let (mut server, bytes, segments) = first_read(&lane.upstream);
        assert_eq!((bytes.len(), segments), (header_length(&bytes), 1));
        // The server speaks first: SMTP, SSH, MySQL.
        server.write_all(b"220 ready\r\n").unwrap();
        let mut banner = [0; 11];
        client.read_exact(&mut banner).unwrap();
        assert_eq!(&banner, b"220 ready\r\n");
    }
}

#[test]
fn what_the_client_has_said_already_is_in_the_headers_segment() {
    let lane = Lane::new();
    for _ in 0..5 {
        let _client = while_stopped(&lane.balancer, || {
            let mut client = lane.balancer.connect("web");
            client.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
            client
        });
        let (_server, bytes, segments) = first_read(&lane.upstream);
        assert_eq!(&bytes[header_length(&bytes)..], b"GET / HTTP/1.1\r\n\r\n");
        assert_eq!(segments, 1);
    }
}

#[test]
fn early_bytes_of_every_size_follow_the_header_once() {
    let lane = Lane::new();
    for size in [1, 64 * KIB - 1, 64 * KIB, 64 * KIB + 1, MIB] {
        let said = noise(size as u64, size);
        std::thread::scope(|scope| {
            let mut client = while_stopped(&lane.balancer, || {
                let mut client = lane.balancer.connect("web");
                let already = said.len().min(200 * KIB);
                client.set_nonblocking(true).unwrap();
                let written = client.write(&said[..already]).unwrap();
                client.set_nonblocking(false).unwrap();
                let rest = &said[written..];
                let mut writer = client.try_clone().unwrap();
                scope.spawn(move || {
                    writer.write_all(rest).unwrap();
                    writer.shutdown(Shutdown::Write).unwrap();
                });
                client
            });
            let (mut server, _) = accept(&lane.upstream);
            let mut heard = Vec::new();
            server.read_to_end(&mut heard).unwrap();
            assert_same("early bytes", &heard, &said);
            drop(server);
            assert_eq!(client.read(&mut [0]).unwrap(), 0);
        });
    }
}

/// Sends both ways at once, closes each way at its end, and compares.
#[track_caller]
fn exchange(lane: &Lane, up: &[u8], down: &[u8]) {
    let (client, server) = &lane.open();
    std::thread::scope(|scope| {
        for (stream, bytes) in [(client, up), (server, down)] {
            scope.spawn(move || {
                let mut stream = stream;
                stream.write_all(bytes).unwrap();
                stream.shutdown(Shutdown::Write).unwrap();
            });
        }
        let receive = |mut stream: &TcpStream| {
            let mut bytes = Vec::new();
            stream.read_to_end(&mut bytes).unwrap();
            bytes
        };
        let heard = scope.spawn(move || receive(server));
        assert_same("to the client", &receive(client), down);
        assert_same("to the upstream", &heard.join().unwrap(), up);
    });
}

#[test]
fn every_size_arrives_whole_both_ways_at_once() {
    let lane = Lane::new();
    for size in [0, 1, 64 * KIB - 1, 64 * KIB, 64 * KIB + 1, MIB, 16 * MIB] {
        exchange(&lane, &noise(1, size), &noise(2, size));
    }
    exchange(&lane, &noise(3, 0), &noise(4, MIB));
    exchange(&lane, &noise(5, MIB), &noise(6, 0));
    lane.balancer.log().wait_for("the longest one's line", |line| {
        line.contains(&format!(" bytes_in={} bytes_out={} ", 16 * MIB, 16 * MIB))
    });
}

#[test]
fn slow_readers_lose_nothing() {
    let lane = Lane::new();
    let bytes = noise(7, 4 * MIB);
    for slow_client in [true, false] {
        let (client, server) = lane.open();
        let (mut reader, mut writer) = if slow_client { (client, server) } else { (server, client) };
        std::thread::scope(|scope| {
            scope.spawn(|| {
                writer.write_all(&bytes).unwrap();
                writer.shutdown(Shutdown::Write).unwrap();
            });
            let (heard, error) = read_slowly(&mut reader, 64 * KIB, Duration::from_millis(5));
            assert_eq!(error, None);
            assert_same("to a slow reader", &heard, &bytes);
        });
    }
}

#[test]
fn slow_writers_and_gaps_lose_nothing() {
    let lane = Lane::new();
    let (mut client, mut server) = lane.open();
    let said = noise(8, 300);
    let mut heard = vec![0; 300];
    for index in 0..said.len() {
        // Each byte waits for the answer to the one before it.
        client.write_all(&said[index..=index]).unwrap();
        server.read_exact(&mut heard[index..=index]).unwrap();
        server.write_all(&heard[index..=index]).unwrap();
        let mut answer = [0];
        client.read_exact(&mut answer).unwrap();
        assert_eq!(answer[0], said[index]);
        if index % 100 == 0 {
            dawdle(Duration::from_millis(50));
        }
    }
    assert_same("byte by byte", &heard, &said);
    drop(server);
    assert_eq!(client.read(&mut [0]).unwrap(), 0);
    drop(client);
    let line = lane.wait_for_end("upstream.relay.closed");
    assert!(line.contains(" bytes_in=300 bytes_out=300 "), "{line}");
}

#[test]
fn a_client_that_has_finished_speaking_gets_its_whole_answer() {
    let lane = Lane::new();
    let answer = noise(9, MIB);
    let (mut client, mut server) = lane.open();
    client.write_all(b"question").unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    let mut heard = Vec::new();
    server.read_to_end(&mut heard).unwrap();
    assert_eq!(heard, b"question");
    std::thread::scope(|scope| {
        scope.spawn(|| {
            server.write_all(&answer).unwrap();
            drop(server);
        });
        let mut got = Vec::new();
        client.read_to_end(&mut got).unwrap();
        assert_same("the answer", &got, &answer);
    });
    lane.wait_for_end("client.relay.closed");
}

#[test]
fn an_upstream_that_has_finished_speaking_gets_everything_still_said() {
    let lane = Lane::new();
    let said = noise(10, MIB);
    let (mut client, mut server) = lane.open();
    server.write_all(b"banner").unwrap();
    server.shutdown(Shutdown::Write).unwrap();
    let mut banner = Vec::new();
    client.read_to_end(&mut banner).unwrap();
    assert_eq!(banner, b"banner");
    std::thread::scope(|scope| {
        scope.spawn(|| {
            client.write_all(&said).unwrap();
            drop(client);
        });
        let mut heard = Vec::new();
        server.read_to_end(&mut heard).unwrap();
        assert_same("what the client still said", &heard, &said);
    });
    lane.wait_for_end("upstream.relay.closed");
}

#[test]
fn a_slow_client_gets_every_byte_sent_before_the_upstreams_reset() {
    let lane = Lane::new();
    let answer = noise(11, MIB);
    let (mut client, mut server) = lane.open();
    server.write_all(&answer).unwrap();
    wait_until_taken(&server);
    reset(server);
    let (got, error) = read_slowly(&mut client, 16 * KIB, Duration::from_millis(10));
    assert_same("before the reset", &got, &answer);
    assert_eq!(error, Some(ErrorKind::ConnectionReset));
    let line = lane.wait_for_end("upstream.relay.reset");
    assert!(line.contains(&format!(" bytes_out={MIB} ")), "{line}");
}

#[test]
fn an_answer_cut_off_by_a_reset_never_looks_complete() {
    let lane = Lane::new();
    for (count, size) in
        [0, 1, 100, 10 * KIB, 64 * KIB, 64 * KIB + 1, 300 * KIB].into_iter().cycle().take(28).enumerate()
    {
        let part = noise(count as u64, size);
        let (mut client, mut server) = lane.open();
        server.write_all(&part).unwrap();
        wait_until_taken(&server);
        reset(server);
        let (got, error) = read_slowly(&mut client, 64 * KIB, Duration::ZERO);
        assert_same("before the reset", &got, &part);
        assert_eq!(error, Some(ErrorKind::ConnectionReset));
        // The count of bytes is exact, whatever came together with the reset.
        let ends =
            lane.balancer.log().wait_for_count("resets", count + 1, |line| line.ends_with("upstream.relay.reset"));
        assert!(ends[count].contains(&format!(" bytes_out={size} ")), "{}", ends[count]);
    }
}

#[test]
fn an_upload_cut_off_by_a_reset_never_looks_complete() {
    let lane = Lane::new();
    for (count, size) in [1, 100, 64 * KIB, 64 * KIB + 1, 300 * KIB].into_iter().cycle().take(20).enumerate() {
        let part = noise(count as u64, size);
        let (mut client, mut server) = lane.open();
        client.write_all(&part).unwrap();
        wait_until_taken(&client);
        reset(client);
        let (heard, error) = read_slowly(&mut server, 64 * KIB, Duration::ZERO);
        assert_same("before the reset", &heard, &part);
        assert_eq!(error, Some(ErrorKind::ConnectionReset));
        let ends = lane.balancer.log().wait_for_count("resets", count + 1, |line| line.ends_with("client.relay.reset"));
        assert!(ends[count].contains(&format!(" bytes_in={size} ")), "{}", ends[count]);
    }
}

#[test]
fn a_client_that_is_reset_in_the_middle_resets_the_upstream_too() {
    let lane = Lane::new();
    let (mut client, mut server) = lane.open();
    let (said, whole) = (noise(12, 32 * MIB), 32 * MIB);
    std::thread::scope(|scope| {
        let reader = scope.spawn(move || read_slowly(&mut server, 64 * KIB, Duration::ZERO));
        client.write_all(&said[..whole / 2]).unwrap();
        reset(client);
        let (heard, error) = reader.join().unwrap();
        assert_same("a part", &heard, &said[..heard.len()]);
        assert!(heard.len() <= whole / 2);
        assert_eq!(error, Some(ErrorKind::ConnectionReset));
    });
    lane.wait_for_end("client.relay.reset");
}

/// Writes until nothing is taken any more; how much that was.
pub fn flood(stream: &TcpStream) -> usize {
    let chunk = vec![b'x'; 256 * KIB];
    let mut total = 0;
    stream.set_write_timeout(Some(Duration::from_millis(300))).unwrap();
    let mut stream = stream;
    while let Ok(count) = stream.write(&chunk) {
        total += count;
    }
    total
}

#[test]
fn a_clients_reset_reaches_an_upstream_that_does_not_read() {
    let lane = Lane::new();
    let (client, server) = lane.open();
    flood(&client);
    let begun = Instant::now();
    reset(client);
    let error = eventually("the upstream's side is reset", || server.take_error().unwrap());
    let took = begun.elapsed();
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    // One second in the hope that it reads after all.
    assert!(took < Duration::from_millis(1500), "{took:?}");
    lane.wait_for_end("client.relay.reset");
}

#[test]
fn an_upstreams_reset_reaches_a_client_that_does_not_read() {
    let lane = Lane::new();
    let (client, server) = lane.open();
    flood(&server);
    let begun = Instant::now();
    reset(server);
    let error = eventually("the client's side is reset", || client.take_error().unwrap());
    let took = begun.elapsed();
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    assert!(took < Duration::from_millis(1500), "{took:?}");
    lane.wait_for_end("upstream.relay.reset");
}

#[test]
fn a_reset_after_a_half_close_is_passed_on() {
    let lane = Lane::new();
    for by_upstream in [true, false] {
        let (client, server) = lane.open();
        let (mut quiet, mut speaker) = if by_upstream { (client, server) } else { (server, client) };
        quiet.shutdown(Shutdown::Write).unwrap();
        assert_eq!(speaker.read(&mut [0]).unwrap(), 0);
        let part = noise(13, 100 * KIB);
        speaker.write_all(&part).unwrap();
        wait_until_taken(&speaker);
        reset(speaker);
        let (got, error) = read_slowly(&mut quiet, 64 * KIB, Duration::ZERO);
        assert_same("before the reset", &got, &part);
        assert_eq!(error, Some(ErrorKind::ConnectionReset));
        lane.wait_for_end(if by_upstream { "upstream.relay.reset" } else { "client.relay.reset" });
    }
    // The side that has closed its half is the one that is reset: it is not being read any more.
    for by_client in [true, false] {
        let (client, server) = lane.open();
        let (mut closed, mut other) = if by_client { (client, server) } else { (server, client) };
        closed.shutdown(Shutdown::Write).unwrap();
        assert_eq!(other.read(&mut [0]).unwrap(), 0);
        closed.set_nonblocking(true).unwrap();
        assert_eq!(closed.read(&mut [0]).unwrap_err().kind(), ErrorKind::WouldBlock);
        reset(closed);
        // What Linux calls a reset of a socket that has had the other's FIN.
        let error = eventually("the other side is reset", || other.take_error().unwrap());
        assert_eq!(error.kind(), ErrorKind::BrokenPipe);
        let end = if by_client { "client.relay.reset" } else { "upstream.relay.reset" };
        lane.balancer.log().wait_for_count(end, 2, |line| line.ends_with(end));
    }
}

#[test]
fn a_connection_without_a_byte_for_idle_timeout_is_reset_on_both_sides() {
    let lane = Lane::with("idle_timeout = \"300ms\"", "");
    let (mut client, mut server) = lane.open();
    let begun = Instant::now();
    // Bytes put it off.
    for _ in 0..3 {
        dawdle(Duration::from_millis(150));
        client.write_all(b"x").unwrap();
        server.read_exact(&mut [0]).unwrap();
    }
    for stream in [&mut client, &mut server] {
        assert_eq!(stream.read(&mut [0]).unwrap_err().kind(), ErrorKind::ConnectionReset);
    }
    assert!(begun.elapsed() >= Duration::from_millis(750));
    lane.wait_for_end("preface.relay.idle_timeout");
}

#[test]
fn several_listeners_and_families_carry_at_once() {
    let upstream = listen();
    let config = format!(
        "[listeners.web]\nbind = [\"127.0.0.1:0\", \"[::1]:0\"]\npool = \"test\"\n\
         [pools.test]\nproxy_protocol = \"v2\"\nupstreams = [\"{}\"]\n",
        upstream.local_addr().unwrap()
    );
    let balancer = preface(&config);
    for address in [balancer.ipv4("web"), balancer.ipv6("web")] {
        let mut client = client::connect(address).unwrap();
        let (mut server, header) = accept(&upstream);
        let (source, destination) = header.addresses.ends().unwrap();
        assert_eq!((source, destination), (client.local_addr().unwrap(), address));
        client.write_all(b"hello").unwrap();
        let mut heard = [0; 5];
        server.read_exact(&mut heard).unwrap();
        assert_eq!(&heard, b"hello");
    }
}
