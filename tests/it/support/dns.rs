//! DNS: the distribution's servers that take a header before each question, what they say who asked, and clients.

use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream, UdpSocket};
use std::process::Command;
use std::time::Duration;

use preface::proxy_protocol::{Header, Transport};
use tempfile::TempDir;

use super::ports::free_port;
use super::{DEADLINE, Output, Process, eventually, program, template};

/// One question as a server logged it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Asked {
    /// Who the server takes for the client.
    pub client: SocketAddr,
    /// The address that the client asked, and over what, where the server says it.
    pub to: Option<(SocketAddr, Transport)>,
    /// What was asked for, without the dot at its end.
    pub name: String,
}

/// A running server that answers nothing without a header, over UDP and TCP on 127.0.0.1 and ::1.
pub struct Server {
    process: Process,
    _directory: TempDir,
    /// Its port.
    pub port: u16,
    parse: fn(&str) -> Option<Asked>,
}

/// Debian's Unbound; see `tests/peers/unbound.conf`.
#[track_caller]
pub fn unbound() -> Server {
    start(&["unbound.conf"], parse_unbound, |dir| {
        let mut command = Command::new(program("unbound"));
        command.arg("-d").arg("-c").arg(format!("{dir}/unbound.conf"));
        command
    })
}

/// Debian's PowerDNS Recursor; see `tests/peers/recursor.conf`.
#[track_caller]
pub fn recursor() -> Server {
    start(&["recursor.conf", "recursor.lua"], parse_who, |dir| {
        let mut command = Command::new(program("pdns_recursor"));
        command.arg(format!("--config-dir={dir}"));
        command
    })
}

/// Debian's dnsdist; see `tests/peers/dnsdist.conf`.
#[track_caller]
pub fn dnsdist() -> Server {
    start(&["dnsdist.conf"], parse_who, |dir| {
        let mut command = Command::new(program("dnsdist"));
        command.args(["--supervised", "--disable-syslog", "-C"]).arg(format!("{dir}/dnsdist.conf"));
        command
    })
}

#[track_caller]
fn start(files: &[&str], parse: fn(&str) -> Option<Asked>, command: impl Fn(&str) -> Command) -> Server {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let dir = directory.path().display().to_string();
    let port = free_port();
    for file in files {
        let text = template(file, &[("dir", &dir), ("port", &port.to_string())]);
        std::fs::write(directory.path().join(file), text).expect("the configuration is written");
    }
    let mut process = Process::start(&mut command(&dir));
    let mut question = Vec::new();
    Header::local(vec![]).encode(&mut question).expect("a header without addresses");
    question.extend(query(1, "ready"));
    eventually(&format!("{} answers", files[0]), || {
        assert!(process.is_running(), "it ended at its start");
        let client = udp_client(Ipv4Addr::LOCALHOST.into(), (Ipv4Addr::LOCALHOST, port).into());
        client.set_read_timeout(Some(Duration::from_millis(100))).expect("a time limit");
        client.send(&question).ok()?;
        client.recv(&mut [0; 512]).ok()
    });
    Server { process, _directory: directory, port, parse }
}

impl Server {
    /// Waits until so many questions are logged, and returns all of them.
    #[track_caller]
    pub fn wait_for(&self, count: usize) -> Vec<Asked> {
        eventually(&format!("{count} questions in the server's log"), || {
            Some(self.asked()).filter(|asked| asked.len() >= count)
        })
    }

    /// The questions so far, but for those that asked whether it is ready.
    pub fn asked(&self) -> Vec<Asked> {
        let lines = [&self.process.stdout, &self.process.stderr].map(Output::lines).concat();
        let asked = lines.iter().filter_map(|line| (self.parse)(line));
        asked.filter(|asked| asked.name != in_who("ready")).collect()
    }
}

/// `... info: who. inform_redirect 127.0.0.7@40000 label.who. TXT IN`
fn parse_unbound(line: &str) -> Option<Asked> {
    let (_, rest) = line.split_once(" inform_redirect ")?;
    let (client, rest) = rest.split_once(' ')?;
    let (ip, port) = client.split_once('@')?;
    let client = SocketAddr::new(ip.parse().ok()?, port.parse().ok()?);
    Some(Asked { client, to: None, name: rest.split_once(". ")?.0.to_owned() })
}

/// `who 127.0.0.7:40000 127.0.0.1:53 udp label.who.`, and perhaps something before it.
fn parse_who(line: &str) -> Option<Asked> {
    let (_, rest) = line.split_once("who ")?;
    let [client, to, transport, name] = rest.split(' ').collect::<Vec<_>>().try_into().ok()?;
    let transport = if transport == "tcp" { Transport::Stream } else { Transport::Dgram };
    let to = Some((to.parse().ok()?, transport));
    Some(Asked { client: client.parse().ok()?, to, name: name.trim_end_matches('.').to_owned() })
}

/// A name below `who`, which every server here answers.
pub fn in_who(label: &str) -> String {
    format!("{label}.who")
}

/// A question for the TXT records of a name below `who`.
pub fn query(id: u16, label: &str) -> Vec<u8> {
    let mut query = [id.to_be_bytes(), [1, 0], [0, 1], [0, 0], [0, 0], [0, 0]].concat();
    for label in [label, "who"] {
        query.push(u8::try_from(label.len()).expect("a short label"));
        query.extend(label.as_bytes());
    }
    query.extend([0, 0, 16, 0, 1]);
    query
}

/// Whether it is an answer, and to this question.
#[track_caller]
pub fn assert_answers(answer: &[u8], query: &[u8]) {
    assert!(answer.len() >= query.len(), "{answer:?} to {query:?}");
    assert_eq!((&answer[..2], answer[2] & 0x80), (&query[..2], 0x80), "{answer:?} to {query:?}");
    assert_eq!(&answer[12..query.len()], &query[12..], "another question is answered");
}

/// A socket of its own that speaks to one address.
#[track_caller]
pub fn udp_client(source: IpAddr, to: SocketAddr) -> UdpSocket {
    let socket = UdpSocket::bind((source, 0)).expect("a port");
    socket.connect(to).expect("a route");
    socket.set_read_timeout(Some(DEADLINE)).expect("a time limit");
    socket
}

/// Asks over TCP.
pub fn send_tcp(stream: &mut TcpStream, query: &[u8]) -> io::Result<()> {
    let len = u16::try_from(query.len()).expect("a short question");
    stream.write_all(&[&len.to_be_bytes(), query].concat())
}

/// The answer.
pub fn receive_tcp(stream: &mut TcpStream) -> io::Result<Vec<u8>> {
    let mut len = [0; 2];
    stream.read_exact(&mut len)?;
    let mut answer = vec![0; u16::from_be_bytes(len).into()];
    stream.read_exact(&mut answer)?;
    Ok(answer)
}
