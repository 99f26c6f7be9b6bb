//! The same relay without features: no snapshot, registry, counters, log, limits or balancing. What they cost is the
//! difference between this and the whole program.

use std::future::poll_fn;
use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::Duration;

use preface::net::listen::{self, BindOptions};
use preface::net::stream::{ConnectOptions, Read};
use preface::net::{Accepted, Listening, Stream};
use preface::pool::rejection::HEAD_BYTES;
use preface::proxy_protocol::{Addresses, Header, Transport, Version};
use preface::relay::{self, Buffers, Early, Observer, Scratch};
use preface::termination::Termination;
use tokio::runtime::{Builder, LocalOptions};

const KEEPALIVE: Option<Duration> = Some(Duration::from_secs(60));
const IDLE_TIMEOUT: Duration = Duration::from_secs(3600);
/// As many as a worker has.
const PIPES_MAX: usize = 128;

const OPTIONS: ConnectOptions =
    ConnectOptions { source: None, keepalive: KEEPALIVE, fast_open: false, writes_at_once: true };

/// Sees nothing and says nothing.
struct Nobody;

impl Observer for Nobody {
    fn to_upstream(&self, _: usize) {}

    fn to_client(&self, _: usize) {}

    fn awaits_answer(&self) -> bool {
        false
    }

    fn answered(&self, _: &[u8; HEAD_BYTES]) {}

    fn poll_ordered(&self, _: &mut Context<'_>) -> Option<Termination> {
        None
    }
}

/// Relays from one address to the other until the process is killed.
pub fn run(address: SocketAddr, upstream: SocketAddr) -> io::Result<()> {
    preface::net::limits::raise_descriptor_limit();
    let runtime = Builder::new_current_thread().enable_all().build_local(LocalOptions::default())?;
    runtime.block_on(async {
        let options = BindOptions { address, v6only: false, keepalive: KEEPALIVE };
        let socket = listen::bind(&options, 1)?.remove(0);
        listen::listen(&socket)?;
        let listening = Listening::new(socket)?;
        let scratch = Buffers::new(PIPES_MAX);
        loop {
            let accepted = poll_fn(|cx| listening.poll_accept(cx)).await?;
            let scratch = Rc::clone(&scratch);
            tokio::task::spawn_local(async move {
                // A connection that fails is simply gone: the generator sees it and fails the run.
                let _ = serve(accepted, address, upstream, &scratch).await;
            });
        }
    })
}

async fn serve(accepted: Accepted, local: SocketAddr, upstream: SocketAddr, scratch: &Scratch) -> io::Result<()> {
    let peer = accepted.client.ip().expect("the benchmark listens on an IP address");
    let client = Stream::new(accepted)?;
    let (upstream, handshake) = Stream::connect(&upstream.into(), &OPTIONS)?;
    upstream.connected(handshake).await?;
    let header = Header::proxy(Version::V2, Addresses::inet(peer, local, Transport::Stream), vec![]);
    let mut early = Early::default();
    poll_fn(|cx| {
        let mut bytes = Vec::with_capacity(128);
        header.encode(&mut bytes).map_err(io::Error::other)?;
        let scratch = &mut scratch.borrow_mut().bytes;
        match client.poll_read(cx, scratch) {
            Poll::Pending => {}
            Poll::Ready(Ok(Read { count, is_last })) => {
                bytes.extend_from_slice(&scratch[..count]);
                early.client_eof = is_last;
            }
            Poll::Ready(Err(_)) => early.client_reset = true,
        }
        let written = match upstream.poll_write(cx, &bytes) {
            Poll::Pending => 0,
            Poll::Ready(written) => written?,
        };
        early.pending = bytes.split_off(written);
        Poll::Ready(Ok::<(), io::Error>(()))
    })
    .await?;
    relay::run(&client, &upstream, early, IDLE_TIMEOUT, scratch, &Nobody).await;
    Ok(())
}
