//! `preface whoami`: a receiver for tests and demos that answers each connection and datagram with its decoded header.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, UdpSocket, UnixListener};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::Semaphore;
use tokio::time::{Instant, sleep, timeout, timeout_at};

use crate::address::{Address, Client};
use crate::net::unix;
use crate::proxy_protocol::explain::{explain, explain_error, explain_spp, facts, hex, spp_facts, summary, table};
use crate::proxy_protocol::spp::{self, Spp};
use crate::proxy_protocol::{DecodeError, Decoded, HEADER_BYTES_MAX, Header, Transport, decode};

/// Connections served at a time; more wait in the accept queue.
const CONNECTIONS_MAX: usize = 1_024;
/// A header that began must be complete after this long, and an HTTP request too.
const HEADER_TIMEOUT: Duration = Duration::from_secs(3);
/// Nothing at all for this long: the sender waits for us, and sends no header.
const SILENCE: Duration = Duration::from_secs(1);
/// After a header: this long for an HTTP request to begin. Then it is a protocol in which the server speaks first.
const HTTP_GRACE: Duration = Duration::from_millis(300);
/// Echoing and kept-alive connections end after this long without a byte.
const IDLE_TIMEOUT: Duration = Duration::from_secs(300);
/// Head of an HTTP request.
const HTTP_HEAD_BYTES_MAX: usize = 64 * 1024;
/// Answer to a datagram; more would be split on the way.
const DATAGRAM_ANSWER_BYTES_MAX: usize = 1_200;
/// How the answer to anything without a header begins.
const NO_HEADER: &str = "no PROXY header came";
/// After an error of accept, most often for want of descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Answer every connection and datagram with its decoded PROXY header
#[derive(clap::Args, Debug)]
#[command(after_help = "\
For tests and demos. It believes the header of everyone who connects: a real receiver must take
headers from its load balancers only.")]
pub struct Args {
    /// Address and port, TCP and UDP; or unix:/path
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:8080")]
    pub listen: Address,
}

/// What came on one connection, or in one datagram.
#[derive(Clone, Debug)]
pub struct Seen {
    /// TCP or UDP.
    pub transport: Transport,
    /// Who connected to us: the balancer.
    pub peer: Client,
    /// The address it connected to.
    pub local: Address,
    /// What it said first.
    pub first: First,
}

/// What was said first.
#[derive(Clone, Debug)]
pub enum First {
    /// A valid header.
    Header {
        /// What it says.
        header: Header,
        /// Its bytes.
        raw: Vec<u8>,
    },
    /// Cloudflare's header, of a datagram.
    Spp {
        /// What it says.
        spp: Spp,
        /// Its bytes.
        raw: Vec<u8>,
    },
    /// Something else: the first bytes, none after a second of silence.
    Nothing(Vec<u8>),
    /// A header that is wrong.
    Wrong {
        /// Why; `None`: it was never completed.
        error: Option<DecodeError>,
        /// Its bytes.
        raw: Vec<u8>,
    },
}

impl Seen {
    /// The answer in plain text.
    pub fn text(&self) -> String {
        match &self.first {
            First::Header { header, raw } => {
                format!("{}\n{}", explain(header, raw), table(&[("raw".to_owned(), hex(raw, ""))]))
            }
            First::Spp { spp, raw } => {
                format!("{}\n{}", explain_spp(spp, raw), table(&[("raw".to_owned(), hex(raw, ""))]))
            }
            First::Nothing(bytes) => format!("{}\n{}", self.nothing(bytes), table(&self.own())),
            First::Wrong { error: Some(error), raw } => {
                format!("{}\n{}", explain_error(error, raw), table(&self.own()))
            }
            First::Wrong { error: None, raw } => {
                let came = table(&[("raw".to_owned(), hex(raw, ""))]);
                format!(
                    "the PROXY header was never completed: {} bytes came\n\n{came}{}",
                    raw.len(),
                    table(&self.own())
                )
            }
        }
    }

    /// The connection's own addresses.
    fn own(&self) -> Vec<(String, String)> {
        let fact = |name: &str, address: String| (name.to_owned(), address);
        vec![fact("connected from", self.peer.to_string()), fact("to", self.local.to_string())]
    }

    fn nothing(&self, bytes: &[u8]) -> String {
        match bytes {
            [] if self.transport == Transport::Dgram => format!("{NO_HEADER}: the datagram is empty\n"),
            [] => format!("{NO_HEADER}: nothing was sent for a second\n"),
            bytes => {
                let shown = &bytes[..bytes.len().min(16)];
                format!("{NO_HEADER}: the first bytes are {}\n", hex(shown, " "))
            }
        }
    }

    /// The answer as a page of its own: no script, nothing loaded from elsewhere.
    fn html(&self) -> String {
        let (title, rows, details) = match &self.first {
            First::Header { header, raw } => (
                "PROXY header received",
                [facts(header), self.own(), vec![("raw".to_owned(), hex(raw, " "))]].concat(),
                self.text(),
            ),
            _ => ("No PROXY header", self.own(), self.text()),
        };
        let rows: String = rows
            .iter()
            .map(|(name, value)| format!("<tr><th>{}</th><td>{}</td></tr>\n", escape(name), escape(value)))
            .collect();
        format!(
            "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>{title}</title>\n<style>\
             body{{font:16px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:60rem;padding:0 1rem}}\
             th{{text-align:left;vertical-align:top;padding-right:2rem;white-space:nowrap;font-weight:600}}\
             td{{overflow-wrap:anywhere;font-family:monospace}}pre{{background:#f4f4f4;color:#111;padding:1rem;overflow:auto}}\
             </style></head>\n<body><h1>{title}</h1>\n<table>\n{rows}</table>\n<pre>{}</pre></body></html>\n",
            escape(&details)
        )
    }
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

/// Serves until it is interrupted.
pub fn run(args: Args) -> anyhow::Result<()> {
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().context("cannot start the runtime")?;
    runtime.block_on(async {
        let cannot = || format!("cannot listen on {}", args.listen);
        let address = match &args.listen {
            Address::Ip(address) => *address,
            Address::Unix(path) => {
                let (socket, _file) = unix::bind(path).with_context(cannot)?;
                socket.listen(CONNECTIONS_MAX as i32).with_context(cannot)?;
                let listener = UnixListener::from_std(socket.into()).with_context(cannot)?;
                say(&format!(
                    "answering on {0}; try: curl --unix-socket {1} http://localhost/",
                    args.listen,
                    path.display()
                ));
                tokio::select! {
                    never = serve_unix(listener, args.listen.clone(), print) => match never {},
                    stopped = stopped() => return stopped,
                }
            }
        };
        let listener = TcpListener::bind(address).await.with_context(cannot)?;
        let listen = listener.local_addr().with_context(cannot)?;
        let socket = UdpSocket::bind(listen).await.with_context(cannot)?;
        say(&format!(
            "answering on {listen}, TCP and UDP; try: curl --haproxy-protocol http://{listen}/ or nc -u {} {}",
            listen.ip(),
            listen.port()
        ));
        tokio::select! {
            never = serve(listener, print) => match never {},
            never = serve_udp(socket, print) => match never {},
            stopped = stopped() => stopped,
        }
    })
}

/// Waits for Ctrl-C or SIGTERM.
async fn stopped() -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate()).context("cannot wait for SIGTERM")?;
    tokio::select! {
        stopped = tokio::signal::ctrl_c() => stopped.context("cannot wait for Ctrl-C"),
        _ = terminate.recv() => Ok(()),
    }
}

fn print(seen: Seen) {
    let what = match &seen.first {
        First::Header { header, .. } => summary(header).trim_end().replace('\n', "; "),
        First::Spp { spp, .. } => table(&spp_facts(spp)).trim_end().replace('\n', "; "),
        First::Nothing(_) => "no PROXY header".to_owned(),
        First::Wrong { error: Some(error), .. } => error.to_string(),
        First::Wrong { error: None, .. } => "the PROXY header was never completed".to_owned(),
    };
    say(&format!("{} {}", seen.peer, what.split_whitespace().collect::<Vec<_>>().join(" ")));
}

/// A closed standard output is no reason to stop answering.
fn say(line: &str) {
    use std::io::Write as _;
    let _ = writeln!(std::io::stdout(), "{line}");
}

/// Answers TCP connections for ever; `on_header` hears of each one's first bytes before it is answered.
pub async fn serve(
    listener: TcpListener,
    on_header: impl Fn(Seen) + Send + Sync + 'static,
) -> std::convert::Infallible {
    let listener = &listener;
    let accept = || async move {
        let (stream, peer) = listener.accept().await?;
        let local = stream.local_addr()?;
        Ok((stream, (peer.into(), local.into())))
    };
    serve_each(accept, on_header).await
}

/// The same over a UNIX socket.
async fn serve_unix(
    listener: UnixListener,
    local: Address,
    on_header: impl Fn(Seen) + Send + Sync + 'static,
) -> std::convert::Infallible {
    let (listener, local) = (&listener, &local);
    let accept = || async move { Ok((listener.accept().await?.0, (Client::Unix, local.clone()))) };
    serve_each(accept, on_header).await
}

async fn serve_each<S: Stream + 'static, F: Future<Output = io::Result<(S, (Client, Address))>>>(
    accept: impl Fn() -> F,
    on_header: impl Fn(Seen) + Send + Sync + 'static,
) -> std::convert::Infallible {
    let (on_header, limit) = (Arc::new(on_header), Arc::new(Semaphore::new(CONNECTIONS_MAX)));
    loop {
        let permit = limit.clone().acquire_owned().await.expect("the semaphore is never closed");
        match accept().await {
            Ok((stream, ends)) => {
                let on_header = on_header.clone();
                tokio::spawn(async move {
                    // Whatever ends one connection, most often its other end, is no concern of the others.
                    let _ = answer(stream, ends, &*on_header).await;
                    drop(permit);
                });
            }
            Err(_) => sleep(ACCEPT_PAUSE).await,
        }
    }
}

/// A connection of either kind.
trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<S: AsyncRead + AsyncWrite + Send + Unpin> Stream for S {}

/// Answers datagrams for ever.
pub async fn serve_udp(socket: UdpSocket, on_header: impl Fn(Seen)) -> std::convert::Infallible {
    let mut buffer = vec![0; HEADER_BYTES_MAX];
    loop {
        let (len, peer) = match socket.recv_from(&mut buffer).await {
            Ok(received) => received,
            // An answer that could not be delivered is reported here.
            Err(_) => {
                sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let local = socket.local_addr().unwrap_or(peer);
        let (first, payload) = first_of_datagram(&buffer[..len]);
        // Two receivers that answer each other's answers would never stop.
        if matches!(&first, First::Nothing(bytes) if bytes.starts_with(NO_HEADER.as_bytes())) {
            continue;
        }
        let seen = Seen { transport: Transport::Dgram, peer: peer.into(), local: local.into(), first };
        let said = match &seen.first {
            First::Header { header, .. } => summary(header),
            First::Spp { spp, .. } => table(&spp_facts(spp)),
            _ => seen.text(),
        };
        let shown = String::from_utf8_lossy(&payload[..payload.len().min(256)]).escape_debug().to_string();
        let answer = format!("{said}{}", table(&[("payload".to_owned(), shown)]));
        on_header(seen);
        let answer = &answer.as_bytes()[..answer.len().min(DATAGRAM_ANSWER_BYTES_MAX)];
        let _ = socket.send_to(answer, peer).await;
    }
}

/// What a datagram begins with, and what follows it.
fn first_of_datagram(datagram: &[u8]) -> (First, &[u8]) {
    if let Ok(spp) = spp::decode(datagram) {
        let (raw, payload) = datagram.split_at(spp::HEADER_BYTES);
        return (First::Spp { spp, raw: raw.to_vec() }, payload);
    }
    match decode(datagram) {
        Ok(Decoded::Complete { header, len }) => {
            let (raw, payload) = datagram.split_at(len);
            (First::Header { header, raw: raw.to_vec() }, payload)
        }
        // An empty datagram is no header that was cut.
        Ok(Decoded::Incomplete { .. }) if !datagram.is_empty() => {
            (First::Wrong { error: None, raw: datagram.to_vec() }, &[])
        }
        Err(error) if !error.is_no_header() => (First::Wrong { error: Some(error), raw: datagram.to_vec() }, &[]),
        _ => (First::Nothing(datagram.to_vec()), datagram),
    }
}

/// One connection: its header, then HTTP, or an answer and an echo.
async fn answer(
    mut stream: impl Stream,
    (peer, local): (Client, Address),
    on_header: &(impl Fn(Seen) + Sync),
) -> io::Result<()> {
    let mut buffer = Vec::new();
    let Some(first) = first_bytes(&mut stream, &mut buffer).await? else { return Ok(()) };
    let seen = Seen { transport: Transport::Stream, peer, local, first };
    on_header(seen.clone());
    let deadline = Instant::now() + HTTP_GRACE;
    let may_be_http = matches!(seen.first, First::Header { .. }) || !buffer.is_empty();
    while may_be_http && could_be_http(&buffer) && !is_http(&buffer) {
        match timeout_at(deadline, stream.read_buf(&mut buffer)).await {
            Ok(Ok(1..)) => {}
            Ok(Err(error)) => return Err(error),
            Ok(Ok(0)) | Err(_) => break,
        }
    }
    if is_http(&buffer) {
        return http(&mut stream, &mut buffer, &seen).await;
    }
    stream.write_all(seen.text().as_bytes()).await?;
    match seen.first {
        First::Wrong { .. } => linger(&mut stream).await,
        _ => echo(&mut stream, &buffer).await,
    }
}

/// Reads until the first bytes are a header, wrong, or none; what follows a header, or what is none, stays in `buffer`.
/// `None`: closed without a byte.
async fn first_bytes(stream: &mut impl Stream, buffer: &mut Vec<u8>) -> io::Result<Option<First>> {
    let deadline = Instant::now() + HEADER_TIMEOUT;
    loop {
        match decode(buffer) {
            Ok(Decoded::Complete { header, len }) => {
                let rest = buffer.split_off(len);
                return Ok(Some(First::Header { header, raw: std::mem::replace(buffer, rest) }));
            }
            Ok(Decoded::Incomplete { .. }) => {}
            Err(error) if error.is_no_header() => return Ok(Some(First::Nothing(buffer.clone()))),
            Err(error) => return Ok(Some(First::Wrong { error: Some(error), raw: std::mem::take(buffer) })),
        }
        let silence = if buffer.is_empty() { Instant::now() + SILENCE } else { deadline };
        match timeout_at(silence, stream.read_buf(buffer)).await {
            Ok(Ok(0)) if buffer.is_empty() => return Ok(None),
            Err(_) if buffer.is_empty() => return Ok(Some(First::Nothing(Vec::new()))),
            Ok(Ok(0)) | Err(_) => return Ok(Some(First::Wrong { error: None, raw: std::mem::take(buffer) })),
            Ok(read) => read?,
        };
    }
}

const METHODS: [&[u8]; 7] = [b"GET ", b"HEAD ", b"POST ", b"PUT ", b"DELETE ", b"OPTIONS ", b"PATCH "];

fn is_http(bytes: &[u8]) -> bool {
    METHODS.iter().any(|method| bytes.starts_with(method))
}

/// True also of no bytes at all.
fn could_be_http(bytes: &[u8]) -> bool {
    METHODS.iter().any(|method| method.starts_with(&bytes[..bytes.len().min(method.len())]))
}

/// Answers requests without a body one after the other; one with a body, or "Connection: close", is the last.
async fn http(stream: &mut impl Stream, buffer: &mut Vec<u8>, seen: &Seen) -> io::Result<()> {
    let mut patience = HEADER_TIMEOUT;
    loop {
        let deadline = Instant::now() + patience;
        let end = loop {
            match buffer.windows(4).position(|window| window == b"\r\n\r\n") {
                Some(end) => break end + 4,
                None if buffer.len() > HTTP_HEAD_BYTES_MAX => return Ok(()),
                None => {}
            }
            match timeout_at(deadline, stream.read_buf(buffer)).await {
                Ok(Ok(1..)) => {}
                Ok(Err(error)) => return Err(error),
                Ok(Ok(0)) | Err(_) => return Ok(()),
            }
        };
        let head = String::from_utf8_lossy(&buffer[..end]).to_ascii_lowercase();
        let field = |name: &str| {
            head.lines()
                .filter_map(|line| line.split_once(':'))
                .find(|(key, _)| *key == name)
                .map(|(_, value)| value.trim())
        };
        let is_html = field("accept").is_some_and(|accept| accept.contains("text/html"));
        let (kind, body) = if is_html { ("text/html", seen.html()) } else { ("text/plain", seen.text()) };
        let has_body =
            field("transfer-encoding").is_some() || field("content-length").is_some_and(|length| length != "0");
        let http11 = head.lines().next().is_some_and(|line| line.ends_with("http/1.1"));
        let is_last = has_body || !http11 || field("connection").is_some_and(|value| value.contains("close"));
        let connection = if is_last { "close" } else { "keep-alive" };
        let mut answer = format!(
            "HTTP/1.1 200 OK\r\ncontent-type: {kind}; charset=utf-8\r\ncontent-length: {}\r\n\
             cache-control: no-store\r\nconnection: {connection}\r\n\r\n",
            body.len()
        );
        if !head.starts_with("head ") {
            answer.push_str(&body);
        }
        timeout(IDLE_TIMEOUT, stream.write_all(answer.as_bytes())).await??;
        if is_last {
            return linger(stream).await;
        }
        buffer.drain(..end);
        patience = IDLE_TIMEOUT;
    }
}

/// Sends back what comes, and closes when the other side has closed.
async fn echo(stream: &mut impl Stream, already: &[u8]) -> io::Result<()> {
    stream.write_all(already).await?;
    let mut buffer = vec![0; 16 * 1024];
    while let Ok(len @ 1..) = timeout(IDLE_TIMEOUT, stream.read(&mut buffer)).await.unwrap_or(Ok(0)) {
        timeout(IDLE_TIMEOUT, stream.write_all(&buffer[..len])).await??;
    }
    stream.shutdown().await
}

/// Closes without a reset: one that overtakes the answer would destroy it.
async fn linger(stream: &mut impl Stream) -> io::Result<()> {
    stream.shutdown().await?;
    let mut buffer = vec![0; 16 * 1024];
    let drain = async { while let Ok(1..) = stream.read(&mut buffer).await {} };
    let _ = timeout(HEADER_TIMEOUT, drain).await;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proxy_protocol::{Addresses, Tlv, Version};
    use std::net::SocketAddr;
    use tokio::net::TcpStream;
    use tokio::sync::mpsc;

    fn v2(transport: Transport) -> Vec<u8> {
        let addresses = Addresses::inet(([198, 51, 100, 22], 35_646).into(), ([203, 0, 113, 7], 80).into(), transport);
        let tlvs = vec![Tlv::AwsVpcEndpoint("vpce-<b>".into())];
        let mut bytes = Vec::new();
        Header::proxy(Version::V2, addresses, tlvs).encode(&mut bytes).expect("a short header");
        bytes
    }

    async fn receiver() -> (SocketAddr, mpsc::UnboundedReceiver<Seen>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("bound");
        let (sender, seen) = mpsc::unbounded_channel();
        tokio::spawn(serve(listener, move |seen| drop(sender.send(seen))));
        (address, seen)
    }

    /// Sends, closes the sending side, and reads to the end.
    async fn whole_answer(address: SocketAddr, bytes: &[u8]) -> String {
        let mut stream = TcpStream::connect(address).await.expect("a listener");
        stream.write_all(bytes).await.expect("an open connection");
        stream.shutdown().await.expect("an open connection");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.expect("text");
        answer
    }

    #[tokio::test]
    async fn answers_a_raw_client_and_echoes_until_it_closes() {
        let (address, mut seen) = receiver().await;
        let answer = whole_answer(address, &[v2(Transport::Stream), b"hello\n".to_vec()].concat()).await;
        assert!(answer.contains("client       198.51.100.22:35646\n"), "{answer}");
        assert!(answer.contains("AWS VPC endpoint vpce-<b>\n"), "{answer}");
        assert!(answer.ends_with("hello\n"), "{answer}");
        let first = seen.recv().await.expect("the receiver runs").first;
        assert!(matches!(first, First::Header { raw, .. } if raw == v2(Transport::Stream)));
    }

    #[tokio::test]
    async fn speaks_first_where_the_client_waits() {
        let (address, _seen) = receiver().await;
        let mut stream = TcpStream::connect(address).await.expect("a listener");
        stream.write_all(b"PROXY TCP4 198.51.100.22 203.0.113.7 35646 80\r\n").await.expect("an open connection");
        let mut answer = [0; 6];
        stream.read_exact(&mut answer).await.expect("an answer without a byte after the header");
        assert_eq!(&answer, b"header");
    }

    #[tokio::test]
    async fn answers_http_as_text_and_as_a_page() {
        let (address, _seen) = receiver().await;
        let request = |accept: &str| {
            let requests = format!(
                "GET / HTTP/1.1\r\nHost: x\r\nAccept: {accept}\r\n\r\nHEAD / HTTP/1.1\r\nConnection: close\r\n\r\n"
            );
            [v2(Transport::Stream), requests.into_bytes()].concat()
        };
        let text = whole_answer(address, &request("*/*")).await;
        assert!(text.starts_with("HTTP/1.1 200 OK\r\ncontent-type: text/plain"), "{text}");
        assert!(text.contains("client       198.51.100.22:35646\n"), "{text}");
        assert_eq!(text.matches("HTTP/1.1 200 OK").count(), 2, "{text}");
        let page = whole_answer(address, &request("text/html,*/*")).await;
        assert!(page.contains("<th>TLV 0xea</th><td>AWS VPC endpoint vpce-&lt;b&gt;</td>"), "{page}");
        assert!(!page.contains("<b>"), "{page}");
    }

    #[tokio::test]
    async fn says_plainly_when_no_header_came() {
        let (address, mut seen) = receiver().await;
        for request in ["GET / HTTP/1.0\r\n\r\n", "EHLO x\r\n"] {
            let answer = whole_answer(address, request.as_bytes()).await;
            assert!(answer.contains("no PROXY header came: the first bytes are "), "{answer}");
            assert!(answer.contains("connected from  127.0.0.1:"), "{answer}");
            assert!(matches!(seen.recv().await.expect("the receiver runs").first, First::Nothing(_)));
        }
        let answer = whole_answer(address, b"PROXY TCP4 198.51.100.22 203.0.113.7 +1 80\r\n").await;
        assert!(answer.contains("the source port at byte 37"), "{answer}");
        let answer = whole_answer(address, b"PROXY TCP4 198").await;
        assert!(answer.contains("never completed: 14 bytes came"), "{answer}");
    }

    #[tokio::test]
    async fn silence_is_answered_too() {
        let (address, _seen) = receiver().await;
        let mut stream = TcpStream::connect(address).await.expect("a listener");
        let mut answer = [0; 20];
        stream.read_exact(&mut answer).await.expect("an answer");
        assert_eq!(&answer, b"no PROXY header came");
    }

    #[tokio::test]
    async fn answers_datagrams() {
        let socket = UdpSocket::bind("127.0.0.1:0").await.expect("a free port");
        let address = socket.local_addr().expect("bound");
        let (sender, mut seen) = mpsc::unbounded_channel();
        tokio::spawn(serve_udp(socket, move |seen| drop(sender.send(seen))));
        let client = UdpSocket::bind("127.0.0.1:0").await.expect("a free port");
        let mut buffer = [0; 2_000];
        let mut spp = Vec::new();
        spp::encode(&mut spp, ([198, 51, 100, 22], 35_646).into(), ([203, 0, 113, 7], 53).into());
        for (bytes, expected) in [
            ([v2(Transport::Dgram), b"query".to_vec()].concat(), "transport    UDP over IPv4\n"),
            (
                [spp.clone(), b"query".to_vec()].concat(),
                "client       198.51.100.22:35646\ndestination  203.0.113.7:53\n",
            ),
            (b"query".to_vec(), "no PROXY header came: the first bytes are 71 75 65 72 79\n"),
            (spp[..37].to_vec(), "no PROXY header came: the first bytes are 56 ec 00"),
            (Vec::new(), "no PROXY header came: the datagram is empty\n"),
            (v2(Transport::Dgram)[..20].to_vec(), "the PROXY header was never completed: 20 bytes came\n"),
        ] {
            client.send_to(&bytes, address).await.expect("a socket");
            let len = client.recv(&mut buffer).await.expect("an answer");
            let answer = String::from_utf8_lossy(&buffer[..len]);
            assert!(answer.contains(expected), "{answer}");
            assert!(answer.ends_with("payload  query\n") || !bytes.ends_with(b"query"), "{answer}");
            assert_eq!(seen.recv().await.expect("the receiver runs").transport, Transport::Dgram);
        }
    }
}
