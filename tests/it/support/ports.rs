//! Ports for programs that must be told one before they bind it.
//!
//! A port that the kernel chose (port 0) and that was closed again may be taken by any outgoing connection before the
//! program binds it. So these come from below the range of outgoing connections, in blocks: the first port of a block
//! stays bound for the life of this process, which keeps other test processes out of it.

use std::io::ErrorKind;
use std::net::{Ipv4Addr, Ipv6Addr, TcpListener, UdpSocket};
use std::ops::Range;
use std::sync::Mutex;

const BLOCK: u16 = 128;
const BLOCKS: Range<u16> = 80..250;

struct Block {
    _claim: TcpListener,
    unused: Range<u16>,
}

static BLOCKS_TAKEN: Mutex<Vec<Block>> = Mutex::new(Vec::new());

/// A port that nobody listens on, on any address, neither for TCP nor for UDP; handed out once.
pub fn free_port() -> u16 {
    let mut blocks = BLOCKS_TAKEN.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    loop {
        while let Some(port) = blocks.last_mut().and_then(|block| block.unused.next()) {
            if is_free(port) {
                return port;
            }
        }
        blocks.push(claim_block());
    }
}

fn claim_block() -> Block {
    let count = BLOCKS.end - BLOCKS.start;
    let first = (std::process::id() % u32::from(count)) as u16;
    for index in 0..count {
        let base = (BLOCKS.start + (first + index) % count) * BLOCK;
        if let Ok(claim) = TcpListener::bind((Ipv4Addr::LOCALHOST, base)) {
            return Block { _claim: claim, unused: base + 1..base + BLOCK };
        }
    }
    panic!("no free block of ports between {} and {}", BLOCKS.start * BLOCK, BLOCKS.end * BLOCK);
}

fn is_free(port: u16) -> bool {
    // One after the other: a dual-stack bind beside an IPv4 one of our own would fail for that reason alone.
    UdpSocket::bind((Ipv4Addr::UNSPECIFIED, port)).is_ok()
        && TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).is_ok()
        && match TcpListener::bind((Ipv6Addr::UNSPECIFIED, port)) {
            Ok(_) => true,
            Err(error) => error.kind() != ErrorKind::AddrInUse,
        }
}
