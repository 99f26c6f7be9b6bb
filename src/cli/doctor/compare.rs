//! PURE. Every upstream of a configuration, what was found there, and which line of the file to change.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};

use toml::de::DeTable;

use super::advice::{Configured, Place, Problem, problems, sent_by};
use super::judge::{Diagnosis, Expectation};
use super::tries::Question;
use crate::address::Address;
use crate::config::{
    Bind, Config, HeaderFormat, HealthCheck, Listener, Pool, Probe, Protocol, Tlvs, UdpHeader, Upstream,
    UpstreamAddress,
};

/// Who meets the upstream at this address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Clients' connections, and checks on the same port.
    Traffic,
    /// Checks on a port of their own.
    Check,
}

/// One address to examine, and what the file says about it.
#[derive(Clone, Debug)]
pub struct Target {
    /// Name of the pool.
    pub pool: String,
    /// Which of its upstreams.
    pub index: usize,
    /// Its address, with the listener's port where it has none of its own.
    pub address: Address,
    /// Who connects there.
    pub role: Role,
    /// Over UDP.
    pub is_datagram: bool,
    /// Over UDP: the header has a datagram of its own.
    pub header_alone: bool,
    /// The pool's first source address.
    pub source: Option<IpAddr>,
    /// What is asked.
    pub question: Question,
    /// The question is not from the file.
    pub guessed: bool,
    /// What goes with v2 headers.
    pub tlvs: Tlvs,
    /// What the file says.
    pub configured: Configured,
}

impl Target {
    /// One examination will do for both.
    pub fn asks_the_same_as(&self, other: &Target) -> bool {
        self.address == other.address
            && (self.is_datagram, self.header_alone) == (other.is_datagram, other.header_alone)
            && self.source == other.source
            && self.question == other.question
            && (self.configured.tlvs, &self.tlvs) == (other.configured.tlvs, &other.tlvs)
    }

    /// In a column of a table.
    pub fn describe_configured(&self) -> String {
        match (self.role, &self.configured.check) {
            (Role::Check, Some(check)) => format!("check: {}", sent_by(check, self.configured.version).name()),
            _ if self.is_datagram => format!("udp: {}", self.configured.describe()),
            _ => self.configured.describe(),
        }
    }
}

/// What was found at one target.
#[derive(Clone, Debug)]
pub struct Finding {
    /// What was examined.
    pub target: Target,
    /// What came out.
    pub diagnosis: Diagnosis,
    /// Where file and upstream disagree.
    pub problems: Vec<Problem>,
    /// For each problem, what to do with the file.
    pub changes: Vec<Change>,
    /// What is slow about it beside its siblings, in a sentence.
    pub slow: Option<String>,
}

/// One change of the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// What is wrong.
    pub what: String,
    /// `FILE:LINE`, or the table.
    pub place: String,
    /// What stands there now, if it is written.
    pub now: Option<String>,
    /// What to write; `None`: take it out.
    pub then: Option<String>,
}

impl Finding {
    /// Compares.
    pub fn new(target: Target, diagnosis: Diagnosis) -> Finding {
        let mut problems = problems(&target.configured, &diagnosis);
        if target.role == Role::Check {
            problems.retain(|problem| problem.place == Place::HealthCheck);
        }
        Finding { target, diagnosis, problems, changes: Vec::new(), slow: None }
    }

    /// There was no conclusion.
    pub fn is_unjudged(&self) -> bool {
        matches!(self.diagnosis.expects, Expectation::Unclear(_) | Expectation::Unreachable(_))
    }

    /// One word for a table and for machines.
    pub fn verdict(&self) -> &'static str {
        match (self.is_unjudged(), self.problems.is_empty()) {
            (true, _) => "not judged",
            (false, false) => "mismatch",
            (false, true) if self.slow.is_some() => "slow",
            (false, true) => "ok",
        }
    }
}

/// Everything that preface would connect or send to, in the order of pools and upstreams.
pub fn targets(config: &Config) -> Vec<Target> {
    let mut found = Vec::new();
    for pool in config.pools.values() {
        let listeners: Vec<&Listener> = config
            .listeners
            .values()
            .filter(|listener| listener.pool == pool.name)
            .map(|listener| &**listener)
            .collect();
        let mut written = 0;
        for upstream in &pool.upstreams {
            // The addresses of a name stand behind it, and the file has one place for all of them.
            written += usize::from(upstream.name.is_none());
            found.extend(of_upstream(pool, upstream, written - 1, &listeners));
        }
    }
    found
}

fn of_upstream(pool: &Pool, upstream: &Upstream, index: usize, listeners: &[&Listener]) -> Vec<Target> {
    let mut found = Vec::new();
    let tlvs_of_listener = listeners.first().map(|listener| listener.tlvs.clone()).unwrap_or_default();
    let tlvs = Tlvs::merge(&upstream.tlvs, &tlvs_of_listener, &pool.tlvs);
    let new = |address: Address, role, protocol, check: Option<&HealthCheck>| {
        let (is_datagram, port) = (protocol == Protocol::Udp, address.port());
        let (question, guessed) = if is_datagram { question_of_datagrams(check, port) } else { question(check, port) };
        // No other header has any, and `crc32c = false` asks for none.
        let has_tlvs = upstream.proxy_protocol == Some(HeaderFormat::V2) && tlvs.are_sent();
        let configured = Configured { version: upstream.proxy_protocol, tlvs: has_tlvs, check: check.cloned() };
        let header_alone = is_datagram && pool.udp_header == UdpHeader::FirstAlone;
        let (source, tlvs, pool) = (source(pool, &upstream.address), tlvs.clone(), pool.name.clone());
        Target { pool, index, address, role, is_datagram, header_alone, source, question, guessed, tlvs, configured }
    };
    let addresses_of = |of: &mut dyn Iterator<Item = &&Listener>| -> BTreeSet<Address> {
        match upstream.address.takes_port() {
            true => {
                let ports = of.flat_map(|listener| &listener.binds).filter_map(Bind::port);
                ports.filter_map(|port| upstream.address.at(Some(port))).collect()
            }
            false => upstream.address.at(None).into_iter().collect(),
        }
    };
    let check = pool.health_check.as_ref();
    let checked_over = |check: &HealthCheck| match check.probe {
        Probe::Udp { .. } => Protocol::Udp,
        _ => Protocol::Tcp,
    };
    // A UNIX socket has no other port to be checked on.
    let own = check.and_then(|check| Some(Address::from(SocketAddr::new(upstream.address.ip()?, check.port?))));
    for protocol in [Protocol::Tcp, Protocol::Udp] {
        // A pool that nobody sends to may still be looked at.
        let is_used = listeners.iter().any(|listener| listener.serves(protocol))
            || listeners.is_empty() && protocol == Protocol::Tcp;
        let addresses = addresses_of(&mut listeners.iter().filter(|listener| listener.serves(protocol)));
        let check = check.filter(|check| checked_over(check) == protocol);
        for address in addresses.iter().filter(|_| is_used) {
            let check = check.filter(|_| own.as_ref().is_none_or(|own| own == address));
            found.push(new(address.clone(), Role::Traffic, protocol, check));
        }
        // Where the check goes, if no traffic does.
        let of_check = own.clone().map_or_else(|| addresses_of(&mut listeners.iter()), |own| [own].into());
        let is_traffic = |address: &Address| is_used && addresses.contains(address);
        for address in of_check.into_iter().filter(|address| check.is_some() && !is_traffic(address)) {
            found.push(new(address, Role::Check, protocol, check));
        }
    }
    found
}

fn source(pool: &Pool, upstream: &UpstreamAddress) -> Option<IpAddr> {
    let upstream = upstream.ip()?;
    pool.source.iter().copied().find(|source| source.is_ipv4() == upstream.is_ipv4())
}

/// The check's own question where it asks one.
fn question(check: Option<&HealthCheck>, port: Option<u16>) -> (Question, bool) {
    match check.map(|check| &check.probe) {
        Some(Probe::Http { path, host, .. }) => (Question::Http { path: path.clone(), host: host.clone() }, false),
        Some(Probe::Tcp { send, expect }) if !expect.is_empty() => {
            (Question::Given { send: send.clone(), expect: expect.clone() }, false)
        }
        _ => (Question::usual(port), true),
    }
}

/// The check's own question, or what its port says; else nothing can be asked.
fn question_of_datagrams(check: Option<&HealthCheck>, port: Option<u16>) -> (Question, bool) {
    if let Some(Probe::Udp { send, expect }) = check.map(|check| &check.probe)
        && !expect.is_empty()
    {
        return (Question::Given { send: send.clone(), expect: expect.clone() }, false);
    }
    let nothing = Question::Given { send: Vec::new(), expect: Vec::new() };
    (Question::usual_of_datagrams(port).unwrap_or(nothing), false)
}

/// Finds the place of each change in the file.
pub fn with_changes(mut findings: Vec<Finding>, file: &str, text: &str) -> Vec<Finding> {
    let (document, _) = DeTable::parse_recoverable(text);
    let all = findings.clone();
    for finding in &mut findings {
        let is_of_whole_pool = |problem: &Problem| {
            let same = |other: &&Finding| {
                (&other.target.pool, other.target.role) == (&finding.target.pool, finding.target.role)
            };
            let agrees = |other: &Finding| {
                let mut own = other.problems.iter();
                other.is_unjudged() || own.any(|own| (own.key, own.value) == (problem.key, problem.value))
            };
            all.iter().filter(same).all(agrees)
        };
        let changes = finding.problems.iter().map(|problem| {
            let place = Written { document: document.get_ref(), file, text };
            place.change(&finding.target, problem, is_of_whole_pool(problem))
        });
        finding.changes = changes.collect();
    }
    findings
}

/// The file as written.
struct Written<'a> {
    document: &'a DeTable<'a>,
    file: &'a str,
    text: &'a str,
}

impl Written<'_> {
    fn change(&self, target: &Target, problem: &Problem, is_of_whole_pool: bool) -> Change {
        let what = problem.what.clone();
        let then = problem.value.map(|value| format!("{} = \"{value}\"", problem.key));
        let Some(then) = then else {
            let place = format!("the {} of pool {}, of this upstream or of the listener", problem.key, target.pool);
            return Change { what, place, now: None, then: None };
        };
        let pool = self.document.get("pools").and_then(|pools| pools.get_ref().get(target.pool.as_str()));
        let pool = pool.and_then(|pool| pool.get_ref().as_table());
        let upstream = pool.and_then(|pool| pool.get("upstreams")?.get_ref().as_array()?.get(target.index));
        let own = upstream.and_then(|upstream| upstream.get_ref().as_table());
        let check = pool.and_then(|pool| pool.get("health_check")?.get_ref().as_table());
        let table = match problem.place {
            Place::HealthCheck => check,
            Place::Upstream if own.is_some_and(|own| own.contains_key(problem.key)) => own,
            Place::Upstream if is_of_whole_pool => pool,
            Place::Upstream => None,
        };
        if let Some((key, value)) = table.and_then(|table| table.get_key_value(problem.key)) {
            let (from, to) = (key.span().start, value.span().end);
            let now = self.text.get(from..to).map(str::to_owned);
            return Change { what, place: self.line(from), now, then: Some(then) };
        }
        let (place, then) = match (problem.place, upstream.filter(|_| !is_of_whole_pool)) {
            (Place::HealthCheck, _) => (format!("[pools.{}.health_check]", target.pool), then),
            (Place::Upstream, None) => (format!("[pools.{}]", target.pool), then),
            (Place::Upstream, Some(upstream)) => {
                let place = self.line(upstream.span().start);
                match upstream.get_ref().as_str() {
                    Some(address) => {
                        (format!("{place}, for {address:?}"), format!("{{ address = {address:?}, {then} }}"))
                    }
                    None => (format!("{place}, in this upstream's table"), then),
                }
            }
        };
        Change { what, place, now: None, then: Some(then) }
    }

    /// `FILE:LINE`
    fn line(&self, at: usize) -> String {
        format!("{}:{}", self.file, 1 + self.text[..at].matches('\n').count())
    }
}
