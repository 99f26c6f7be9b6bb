//! PURE. What is asked for, which addresses are usable, and when to ask again.

use std::net::IpAddr;
use std::time::Duration;

/// A name is looked up again after this long at least, whatever its records say.
pub const TTL_MIN: Duration = Duration::from_secs(1);
/// And after this long at most.
pub const TTL_MAX: Duration = Duration::from_secs(300);
/// After a first failure; doubled with each one in a row.
const RETRY_MIN: Duration = Duration::from_secs(1);
/// The longest wait after a failure.
const RETRY_MAX: Duration = Duration::from_secs(30);

/// The whole names to ask for, in this order, as resolv.conf(5) says of `search` and `ndots`. Each ends in a dot.
pub fn candidates(host: &str, search: &[String], ndots: usize) -> Vec<String> {
    if host.ends_with('.') {
        return vec![host.to_owned()];
    }
    let whole = format!("{host}.");
    let mut candidates: Vec<String> =
        search.iter().map(|domain| format!("{whole}{}.", domain.trim_matches('.'))).map(|name| dots(&name)).collect();
    match host.matches('.').count() >= ndots {
        true => candidates.insert(0, whole),
        false => candidates.push(whole),
    }
    candidates
}

/// A search in the root is the name itself.
fn dots(name: &str) -> String {
    format!("{}.", name.trim_end_matches('.'))
}

/// Addresses of a host in hosts(5), in file order.
pub fn in_hosts(hosts: &str, host: &str) -> Vec<IpAddr> {
    let host = host.trim_end_matches('.');
    let of_line = |line: &str| {
        let mut words = line.split('#').next().unwrap_or_default().split_whitespace();
        // A link-local address has its interface after it, and is of no use here.
        let ip: IpAddr = words.next()?.parse().ok()?;
        words.any(|word| word.trim_end_matches('.').eq_ignore_ascii_case(host)).then_some(ip)
    };
    hosts.lines().filter_map(of_line).collect()
}

/// The address as it is connected to, or why nobody can.
pub fn usable(ip: IpAddr) -> Result<IpAddr, &'static str> {
    let ip = ip.to_canonical();
    let link_local = matches!(ip, IpAddr::V6(v6) if v6.is_unicast_link_local());
    match ip {
        _ if ip.is_unspecified() => Err("an unspecified address"),
        _ if ip.is_multicast() || ip == IpAddr::from([255, 255, 255, 255]) => Err("a multicast or broadcast address"),
        _ if link_local => Err("a link-local address"),
        ip => Ok(ip),
    }
}

/// How long until the next look-up, after an answer. `chance` is of 0..1: many balancers must not ask in step.
pub fn after_answer(ttl: Duration, chance: f64) -> Duration {
    ttl.clamp(TTL_MIN, TTL_MAX).mul_f64(1.0 + chance / 10.0)
}

/// How long until the next look-up, after this many failures in a row.
pub fn after_failure(failures: u32, chance: f64) -> Duration {
    let doubled = RETRY_MIN * 2_u32.pow(failures.saturating_sub(1).min(10));
    doubled.min(RETRY_MAX).mul_f64(0.8 + chance / 5.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn search_and_ndots_decide_what_is_asked_first() {
        let search = ["web.svc.cluster.local".to_owned(), "svc.cluster.local.".to_owned()];
        let asked = |host, ndots| candidates(host, &search, ndots).join(" ");
        assert_eq!(asked("a.b.", 5), "a.b.");
        assert_eq!(asked("a", 1), "a.web.svc.cluster.local. a.svc.cluster.local. a.");
        assert_eq!(asked("a.b", 1), "a.b. a.b.web.svc.cluster.local. a.b.svc.cluster.local.");
        assert_eq!(asked("a.b", 5), "a.b.web.svc.cluster.local. a.b.svc.cluster.local. a.b.");
        assert_eq!(asked("a.b", 0), "a.b. a.b.web.svc.cluster.local. a.b.svc.cluster.local.");
        assert_eq!(candidates("a", &[], 1), ["a."]);
        assert_eq!(candidates("a", &[".".to_owned()], 1), ["a.", "a."]);
    }

    #[test]
    fn hosts_are_read_as_hosts_5_says() {
        let hosts = "127.0.0.1\tlocalhost\n# 10.0.0.9 web\n10.0.0.1 Web.example web # 10.0.0.2 other\n\n::1 localhost web\nfe80::1%2 web\nnonsense web\n";
        let found = |host| in_hosts(hosts, host).iter().map(ToString::to_string).collect::<Vec<_>>().join(" ");
        assert_eq!(found("web"), "10.0.0.1 ::1");
        assert_eq!(found("web.EXAMPLE."), "10.0.0.1");
        assert_eq!(found("other"), "");
    }

    #[test]
    fn addresses_that_nobody_can_connect_to_are_known() {
        let said = |text: &str| usable(text.parse().unwrap());
        assert_eq!(said("::ffff:10.0.0.1"), Ok("10.0.0.1".parse().unwrap()));
        assert_eq!(said("127.0.0.1"), Ok("127.0.0.1".parse().unwrap()));
        assert_eq!(said("2001:db8::1"), Ok("2001:db8::1".parse().unwrap()));
        assert_eq!(said("0.0.0.0"), Err("an unspecified address"));
        assert_eq!(said("::"), Err("an unspecified address"));
        assert_eq!(said("224.0.0.1"), Err("a multicast or broadcast address"));
        assert_eq!(said("ff02::1"), Err("a multicast or broadcast address"));
        assert_eq!(said("255.255.255.255"), Err("a multicast or broadcast address"));
        assert_eq!(said("fe80::1"), Err("a link-local address"));
    }

    #[test]
    fn waits_have_limits_and_are_not_in_step() {
        let seconds = Duration::from_secs;
        assert_eq!(after_answer(seconds(5), 0.0), seconds(5));
        assert_eq!(after_answer(seconds(5), 1.0), Duration::from_millis(5500));
        assert_eq!(after_answer(seconds(0), 0.0), TTL_MIN);
        assert_eq!(after_answer(seconds(86_400), 0.0), TTL_MAX);
        let failures: Vec<u64> = (1..=7).map(|failures| after_failure(failures, 1.0).as_secs()).collect();
        assert_eq!(failures, [1, 2, 4, 8, 16, 30, 30]);
        assert_eq!(after_failure(1, 0.0), Duration::from_millis(800));
        assert_eq!(after_failure(u32::MAX, 1.0), RETRY_MAX);
    }
}
