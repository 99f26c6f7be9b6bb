//! PURE. resolv.conf(5), as far as it concerns us; what it does not know has the defaults of glibc.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

/// Name servers that are asked, as in glibc.
const SERVERS_MAX: usize = 3;
/// Domains in the search list: more than anybody has, and a limit for what a file can make us ask.
const SEARCH_MAX: usize = 32;
/// glibc waits 5 s; the next server may know already.
const TIMEOUT_DEFAULT: Duration = Duration::from_secs(2);

/// The settings of resolv.conf.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resolv {
    /// Asked in this order.
    pub servers: Vec<SocketAddr>,
    /// Domains for names that do not end in a dot.
    pub search: Vec<String>,
    /// A name with fewer dots is looked for in the search list first.
    pub ndots: usize,
    /// For one try at one server.
    pub timeout: Duration,
    /// Rounds over all servers.
    pub attempts: u32,
    /// Long answers over UDP.
    pub edns: bool,
    /// TCP alone.
    pub use_vc: bool,
}

/// Reads the file; lines that make no sense are passed over, as everywhere.
pub fn parse(text: &str) -> Resolv {
    let mut resolv = Resolv {
        servers: Vec::new(),
        search: Vec::new(),
        ndots: 1,
        timeout: TIMEOUT_DEFAULT,
        attempts: 2,
        edns: false,
        use_vc: false,
    };
    for line in text.lines() {
        let mut words = line.split(['#', ';']).next().unwrap_or_default().split_whitespace();
        match words.next() {
            Some("nameserver") if resolv.servers.len() < SERVERS_MAX => {
                let ip = words.next().and_then(|word| word.parse::<IpAddr>().ok());
                resolv.servers.extend(ip.map(|ip| SocketAddr::new(ip, 53)));
            }
            // Of these two the last line counts.
            Some("search" | "domain") => {
                resolv.search = words.take(SEARCH_MAX).map(|word| word.to_ascii_lowercase()).collect();
            }
            Some("options") => words.for_each(|word| option(&mut resolv, word)),
            _ => {}
        }
    }
    if resolv.servers.is_empty() {
        resolv.servers.push((Ipv4Addr::LOCALHOST, 53).into());
    }
    resolv
}

fn option(resolv: &mut Resolv, word: &str) {
    let (key, value) = word.split_once(':').unwrap_or((word, ""));
    let number = value.parse::<u32>();
    match (key, number) {
        ("ndots", Ok(dots)) => resolv.ndots = dots.min(15) as usize,
        ("timeout", Ok(seconds)) => resolv.timeout = Duration::from_secs(u64::from(seconds.clamp(1, 30))),
        ("attempts", Ok(attempts)) => resolv.attempts = attempts.clamp(1, 5),
        ("edns0", _) => resolv.edns = true,
        ("use-vc", _) => resolv.use_vc = true,
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_the_kubelet_writes() {
        let resolv = parse(
            "search default.svc.cluster.local svc.cluster.local cluster.local\nnameserver 10.96.0.10\noptions ndots:5\n",
        );
        assert_eq!(resolv.servers, ["10.96.0.10:53".parse().unwrap()]);
        assert_eq!(resolv.search, ["default.svc.cluster.local", "svc.cluster.local", "cluster.local"]);
        assert_eq!((resolv.ndots, resolv.attempts, resolv.timeout), (5, 2, TIMEOUT_DEFAULT));
    }

    #[test]
    fn reads_what_people_and_programs_write() {
        let resolv = parse(
            "# by hand\ndomain old.example\nnameserver ::1 ; local\nnameserver nonsense\nnameserver 192.0.2.1\n\
             nameserver fe80::1%eth0\nnameserver 192.0.2.2\nnameserver 192.0.2.3\nsearch Example.COM .\n\
             options edns0 trust-ad timeout:1 attempts:99 ndots:200 use-vc rotate ndots:x\n",
        );
        let servers: Vec<String> = resolv.servers.iter().map(ToString::to_string).collect();
        assert_eq!(servers, ["[::1]:53", "192.0.2.1:53", "192.0.2.2:53"]);
        assert_eq!(resolv.search, ["example.com", "."]);
        assert_eq!((resolv.ndots, resolv.attempts, resolv.timeout.as_secs()), (15, 5, 1));
        assert!(resolv.edns && resolv.use_vc);
    }

    #[test]
    fn without_a_server_it_is_the_local_one() {
        assert_eq!(parse("").servers, ["127.0.0.1:53".parse().unwrap()]);
    }
}
