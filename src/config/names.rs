//! PURE. Upstreams written as names: what a name is, what it stood for when it was last looked up, and the upstreams
//! that come of it.
//!
//! A pool's `upstreams` hold each name as it is written, and after it, marked with that name, its addresses. So the
//! configuration in force says both, and a new answer replaces the marked ones alone.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use super::pool::UPSTREAMS_MAX;
use super::{Config, Pool, Upstream, UpstreamAddress};

/// Heaviest upstream.
const WEIGHT_MAX: u32 = 256;

/// What is looked up.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Name {
    /// As written, in lower case; a dot at its end says that nothing is to be appended.
    pub host: String,
    /// What of it.
    pub records: Records,
}

/// Which records of a name are looked up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Records {
    /// A and AAAA: its addresses.
    Addresses,
    /// SRV, written with `srv:` before it: hosts with ports, priorities and weights; then their addresses.
    Services,
}

/// As the file says it, without a port.
impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.records {
            Records::Addresses => f.write_str(&self.host),
            Records::Services => write!(f, "srv:{}", self.host),
        }
    }
}

/// One address that a name stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Found {
    /// Where.
    pub ip: IpAddr,
    /// What an SRV record says besides.
    pub service: Option<Service>,
}

/// The numbers of an SRV record (RFC 2782).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Service {
    /// Never 0.
    pub port: u16,
    /// The lowest one is used first.
    pub priority: u16,
    /// Share among those of one priority.
    pub weight: u16,
}

/// What a name stands for: a set, so that the order of an answer is no change.
pub type Answer = BTreeSet<Found>;

/// Every name in a configuration.
pub fn names(config: &Config) -> BTreeSet<Name> {
    let upstreams = config.pools.values().flat_map(|pool| &pool.upstreams);
    upstreams.filter_map(|upstream| upstream.address.name().cloned()).collect()
}

/// A pool's names, each once, and whether it has any.
pub fn names_of(pool: &Pool) -> BTreeSet<&Name> {
    pool.upstreams.iter().filter_map(|upstream| upstream.address.name()).collect()
}

/// What of the answers could not be used, a line each: the same as long as the reason stands.
pub type Remarks = BTreeSet<String>;

/// Puts the addresses of each name after it, in place of those that are there; a name without an answer has none. Pools
/// without names keep their `Arc`.
pub fn resolve(config: &mut Config, answers: &BTreeMap<Name, Answer>) -> Remarks {
    let mut remarks = Remarks::new();
    for pool in config.pools.values_mut() {
        if names_of(pool).is_empty() {
            continue;
        }
        let upstreams = resolved(pool, answers, &mut remarks);
        if upstreams != pool.upstreams {
            *pool = Arc::new(Pool { upstreams, ..(**pool).clone() });
        }
    }
    remarks
}

fn resolved(pool: &Pool, answers: &BTreeMap<Name, Answer>, remarks: &mut Remarks) -> Vec<Upstream> {
    let written = || pool.upstreams.iter().filter(|upstream| upstream.name.is_none());
    // What the file says by its address has the settings that the file says there.
    let mut known: HashSet<UpstreamAddress> = written().map(|upstream| upstream.address.clone()).collect();
    let mut room = UPSTREAMS_MAX.saturating_sub(written().count());
    let mut upstreams = Vec::new();
    for entry in written() {
        upstreams.push(entry.clone());
        let UpstreamAddress::Name(name, port) = &entry.address else { continue };
        let Some(answer) = answers.get(name) else { continue };
        for (found, weight, backup) in weighed(answer, entry.weight) {
            let port = found.service.map(|service| service.port).or(*port);
            let address = UpstreamAddress::Ip(found.ip, port);
            let family = if found.ip.is_ipv4() { "IPv4" } else { "IPv6" };
            let lacks_source =
                !pool.source.is_empty() && !pool.source.iter().any(|source| source.is_ipv4() == found.ip.is_ipv4());
            let problem = match () {
                () if lacks_source => format!("\"source\" has no {family} address to reach it from"),
                () if known.contains(&address) => "it is an upstream of this pool already".to_owned(),
                () if room == 0 => {
                    remarks.insert(format!("pool {:?}: name {name}: more than {UPSTREAMS_MAX} upstreams", pool.name));
                    break;
                }
                () => {
                    room -= 1;
                    known.insert(address.clone());
                    let (name, backup) = (Some(Arc::new(entry.address.clone())), entry.backup || backup);
                    upstreams.push(Upstream { address, name, weight, backup, ..entry.clone() });
                    continue;
                }
            };
            remarks.insert(format!("pool {:?}: name {name}: address {} left out: {problem}", pool.name, found.ip));
        }
    }
    upstreams
}

/// Each address with its weight, and whether it is a backup.
///
/// Addresses of a name have the entry's weight each. SRV: those of the lowest priority are used, all others are backups;
/// weights of each of the two are taken in their smallest whole numbers (10, 20, 30 are 1, 2, 3), times the entry's, and
/// scaled down where the largest would be more than 256. A weight of 0 beside others is the smallest there is.
fn weighed(answer: &Answer, weight: u32) -> Vec<(Found, u32, bool)> {
    let first = answer.iter().filter_map(|found| found.service).map(|service| service.priority).min();
    let is_backup = |found: &Found| found.service.is_some_and(|service| Some(service.priority) != first);
    let mut weighed = Vec::with_capacity(answer.len());
    for backup in [false, true] {
        let group: Vec<&Found> = answer.iter().filter(|found| is_backup(found) == backup).collect();
        let shares: Vec<u32> = group.iter().map(|found| found.service.map_or(1, |one| u32::from(one.weight))).collect();
        let weights = scaled(&shares, weight);
        weighed.extend(group.into_iter().zip(weights).map(|(found, weight)| (*found, weight, backup)));
    }
    weighed.sort();
    weighed
}

/// Weights in proportion to `shares`, each of 1..=256; all 0 where the entry's weight is.
fn scaled(shares: &[u32], weight: u32) -> Vec<u32> {
    let max = shares.iter().copied().max().unwrap_or(0);
    if weight == 0 || max == 0 {
        return vec![weight; shares.len()];
    }
    let divisor = shares.iter().copied().fold(0, gcd);
    let largest = max / divisor * weight;
    let has_zero = shares.contains(&0);
    // RFC 2782: beside others, a weight of 0 has a very small chance.
    let (times, by) = if has_zero || largest > WEIGHT_MAX { (WEIGHT_MAX, max) } else { (weight, divisor) };
    shares.iter().map(|share| ((share * times + by / 2) / by).clamp(1, WEIGHT_MAX)).collect()
}

fn gcd(a: u32, b: u32) -> u32 {
    if b == 0 { a } else { gcd(b, a % b) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{self, diff};

    fn config(upstreams: &str) -> Config {
        let text = format!("[listeners.a]\nbind = \":80\"\npool = \"p\"\n[pools.p]\n{upstreams}\n");
        config::parse("test.toml", &text).unwrap_or_else(|errors| panic!("{errors:?}")).config
    }

    fn answers(list: &[(&str, &[&str])]) -> BTreeMap<Name, Answer> {
        let name = |host: &str| Name { host: host.to_owned(), records: Records::Addresses };
        let found = |ip: &&str| Found { ip: ip.parse().unwrap(), service: None };
        list.iter().map(|(host, ips)| (name(host), ips.iter().map(found).collect())).collect()
    }

    fn shown(config: &Config) -> Vec<String> {
        config.pools["p"].upstreams.iter().map(ToString::to_string).collect()
    }

    fn service(priority: u16, weight: u16) -> Found {
        let ip = IpAddr::from([10, 0, (priority >> 8) as u8, priority as u8]);
        Found { ip, service: Some(Service { port: 80 + weight % 1000, priority, weight }) }
    }

    #[test]
    fn addresses_stand_after_their_name_with_its_settings() {
        let mut config = config(
            "upstreams = [\"10.0.0.1:80\", { address = \"Web.example:81\", weight = 3, backup = true }, \"last\", \"10.0.0.9\"]",
        );
        assert_eq!(shown(&config), ["10.0.0.1:80", "web.example:81", "last", "10.0.0.9"]);
        let written = config.clone();
        let none = resolve(&mut config, &answers(&[("web.example", &["10.0.0.3", "10.0.0.2"]), ("last", &["::1"])]));
        assert_eq!(none, Remarks::new());
        let expected = ["10.0.0.1:80", "web.example:81", "10.0.0.2:81", "10.0.0.3:81", "last", "::1", "10.0.0.9"];
        assert_eq!(shown(&config), expected);
        let second = &config.pools["p"].upstreams[3];
        assert_eq!((second.weight, second.backup), (3, true));
        assert_eq!(second.name.as_deref().map(ToString::to_string).as_deref(), Some("web.example:81"));
        assert_eq!(diff::diff(&written, &config), Vec::<String>::new(), "addresses are no change of the file");
        resolve(&mut config, &answers(&[("web.example", &["10.0.0.3"])]));
        assert_eq!(shown(&config), ["10.0.0.1:80", "web.example:81", "10.0.0.3:81", "last", "10.0.0.9"]);
        resolve(&mut config, &BTreeMap::new());
        assert_eq!(config, written);
    }

    #[test]
    fn what_did_not_change_keeps_its_arc() {
        let mut config = config("upstreams = [\"a.example:80\"]");
        let answer = answers(&[("a.example", &["10.0.0.1", "10.0.0.2"])]);
        resolve(&mut config, &answer);
        let before = Arc::clone(&config.pools["p"]);
        resolve(&mut config, &answer);
        assert!(Arc::ptr_eq(&before, &config.pools["p"]));
    }

    #[test]
    fn an_address_stands_once_in_a_pool() {
        let mut config = config("upstreams = [\"a.example:80\", \"b.example:80\", \"10.0.0.1:80\"]");
        let answer = answers(&[("a.example", &["10.0.0.1", "10.0.0.2"]), ("b.example", &["10.0.0.2", "10.0.0.3"])]);
        let remarks = resolve(&mut config, &answer);
        let expected = ["a.example:80", "10.0.0.2:80", "b.example:80", "10.0.0.3:80", "10.0.0.1:80"];
        assert_eq!(shown(&config), expected);
        let remarks: Vec<&str> = remarks.iter().map(String::as_str).collect();
        assert_eq!(
            remarks,
            [
                "pool \"p\": name a.example: address 10.0.0.1 left out: it is an upstream of this pool already",
                "pool \"p\": name b.example: address 10.0.0.2 left out: it is an upstream of this pool already",
            ]
        );
    }

    #[test]
    fn an_address_that_no_source_reaches_is_left_out_and_said() {
        let mut config = config("source = [\"10.0.0.100\"]\nupstreams = [\"a.example:80\"]");
        let remarks = resolve(&mut config, &answers(&[("a.example", &["10.0.0.1", "2001:db8::1"])]));
        assert_eq!(shown(&config), ["a.example:80", "10.0.0.1:80"]);
        assert_eq!(
            remarks.first().map(String::as_str),
            Some(
                "pool \"p\": name a.example: address 2001:db8::1 left out: \"source\" has no IPv6 address to reach it from"
            )
        );
    }

    #[test]
    fn a_pool_has_a_limit() {
        let mut config = config("upstreams = [\"a.example:80\", \"10.0.0.1:80\"]");
        let all = (0..2000_u32).map(|n| Found { ip: IpAddr::from((0x0A01_0000 + n).to_be_bytes()), service: None });
        let name = Name { host: "a.example".to_owned(), records: Records::Addresses };
        let remarks = resolve(&mut config, &BTreeMap::from([(name, all.collect())]));
        assert_eq!(config.pools["p"].upstreams.len(), UPSTREAMS_MAX);
        assert_eq!(remarks.len(), 1, "{remarks:?}");
    }

    #[test]
    fn srv_weights_become_ours_and_later_priorities_backups() {
        let weights = |answer: &[(u16, u16)], weight: u32| -> Vec<(u16, u32, bool)> {
            let answer: Answer = answer.iter().map(|(priority, weight)| service(*priority, *weight)).collect();
            let weighed = weighed(&answer, weight);
            weighed.iter().map(|(found, weight, backup)| (found.service.unwrap().weight, *weight, *backup)).collect()
        };
        assert_eq!(weights(&[(0, 10), (0, 20), (0, 30)], 1), [(10, 1, false), (20, 2, false), (30, 3, false)]);
        assert_eq!(weights(&[(0, 10), (0, 20)], 5), [(10, 5, false), (20, 10, false)]);
        assert_eq!(weights(&[(0, 33), (0, 34)], 100), [(33, 248, false), (34, 256, false)]);
        assert_eq!(weights(&[(0, 1), (0, 65_535)], 1), [(1, 1, false), (65_535, 256, false)]);
        assert_eq!(weights(&[(0, 0)], 7), [(0, 7, false)]);
        assert_eq!(weights(&[(0, 0), (0, 1)], 1), [(0, 1, false), (1, 256, false)]);
        assert_eq!(weights(&[(0, 5), (0, 6)], 0), [(5, 0, false), (6, 0, false)]);
        assert_eq!(weights(&[(5, 9), (9, 4), (7, 2)], 1), [(9, 1, false), (2, 1, true), (4, 2, true)]);
    }
}
