//! One look-up of one name: hosts first, then the names of the search list until one exists, then what it stands for.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinSet;

use super::ask::{Known, ask};
use super::files::{Files, HOSTS, RESOLV_CONF};
use super::message::{Kind, Question, Record};
use super::resolv::Resolv;
use super::rules;
use crate::config::names::{Answer, Found, Name, Records, Service};
use crate::control::lookups::{Answered, LookupError, Outcome};
use crate::net;

/// Addresses of one name, and records of one service: the first ones by number, so that the choice does not change.
pub const FOUND_MAX: usize = 256;
/// Hosts of a service that are looked up at a time.
const HOSTS_AT_ONCE: usize = 16;
/// What stands in hosts is looked at again after this long.
const HOSTS_TTL: Duration = Duration::from_secs(5);

/// Looks it up. `last` is the last good answer: a family of addresses that cannot be asked for keeps its part of it.
pub async fn look_up(name: &Name, files: &Files, last: &Answer) -> Result<Answered, LookupError> {
    match name.records {
        Records::Addresses => addresses_of_name(&name.host, files, last).await,
        Records::Services => services(&name.host, files, last).await,
    }
}

async fn addresses_of_name(host: &str, files: &Files, last: &Answer) -> Result<Answered, LookupError> {
    let known = rules::in_hosts(&files.hosts(), host);
    if !known.is_empty() {
        return answered(known, HOSTS.to_owned(), HOSTS_TTL, Vec::new());
    }
    let resolv = resolv(files)?;
    let mut nothing = None;
    for candidate in rules::candidates(host, &resolv.search, resolv.ndots) {
        match addresses(&resolv, &candidate, last).await? {
            Ok(Addresses { ips, ttl, remarks }) => return answered(ips, candidate, ttl, remarks),
            Err(outcome) => keep_better(&mut nothing, outcome, candidate),
        }
    }
    Err(no_such(nothing, "A or AAAA"))
}

async fn services(host: &str, files: &Files, last: &Answer) -> Result<Answered, LookupError> {
    let resolv = resolv(files)?;
    let mut nothing = None;
    for candidate in rules::candidates(host, &resolv.search, resolv.ndots) {
        match ask(&resolv, &Question { name: candidate.clone(), kind: Kind::Srv }).await? {
            Known::Records(records, ttl) if !records.is_empty() => {
                return hosts_of_services(resolv, records, candidate, ttl, last).await;
            }
            Known::Records(..) => keep_better(&mut nothing, Outcome::Empty, candidate),
            Known::Nxdomain => keep_better(&mut nothing, Outcome::Nxdomain, candidate),
        }
    }
    Err(no_such(nothing, "SRV"))
}

/// That a name exists without records says more than that another one does not exist; else the first one asked counts.
fn keep_better(nothing: &mut Option<(Outcome, String)>, outcome: Outcome, candidate: String) {
    if nothing.as_ref().is_none_or(|(known, _)| *known == Outcome::Nxdomain && outcome == Outcome::Empty) {
        *nothing = Some((outcome, candidate));
    }
}

fn no_such(nothing: Option<(Outcome, String)>, records: &str) -> LookupError {
    let (outcome, candidate) = nothing.expect("at least one name is asked for");
    let message = match outcome {
        Outcome::Nxdomain => format!("{candidate} does not exist (NXDOMAIN)"),
        _ => format!("{candidate} exists, but has no {records} records"),
    };
    LookupError { outcome, message }
}

fn resolv(files: &Files) -> Result<Arc<Resolv>, LookupError> {
    match &*files.resolv() {
        Ok(resolv) => Ok(Arc::new(resolv.clone())),
        Err(error) => Err(LookupError {
            outcome: Outcome::Error,
            message: format!("cannot read {RESOLV_CONF}: {error}; it says which name servers to ask"),
        }),
    }
}

/// What a whole name stands for.
struct Addresses {
    ips: Vec<IpAddr>,
    ttl: Duration,
    remarks: Vec<String>,
}

/// Asks for both families at a time. Inside: why there are none.
async fn addresses(resolv: &Resolv, candidate: &str, last: &Answer) -> Result<Result<Addresses, Outcome>, LookupError> {
    let question = |kind| Question { name: candidate.to_owned(), kind };
    let (a, aaaa) = (question(Kind::A), question(Kind::Aaaa));
    let v6 = async {
        match net::has_ipv6() {
            true => ask(resolv, &aaaa).await,
            false => Ok(Known::Records(Vec::new(), rules::TTL_MAX)),
        }
    };
    let replies = tokio::join!(ask(resolv, &a), v6);
    let (v4, v6) = match replies {
        (Ok(Known::Nxdomain), Ok(Known::Nxdomain)) => return Ok(Err(Outcome::Nxdomain)),
        (Err(v4), Err(_)) => return Err(v4),
        other => other,
    };
    let mut all = Addresses { ips: Vec::new(), ttl: rules::TTL_MAX, remarks: Vec::new() };
    let mut failure = None;
    for (reply, is_v4) in [(v4, true), (v6, false)] {
        match reply {
            Ok(Known::Records(records, ttl)) if !records.is_empty() => {
                all.ttl = all.ttl.min(ttl);
                all.ips.extend(records.into_iter().filter_map(|record| match record {
                    Record::Address(ip) => Some(ip),
                    Record::Service(..) => None,
                }));
            }
            // A server that knows addresses of one family, and says that the name does not exist for the other, is not
            // rare: it means that there are none.
            Ok(_) => {}
            Err(error) => failure = Some((error, is_v4)),
        }
    }
    match failure {
        Some((error, _)) if all.ips.is_empty() => Err(error),
        Some((error, is_v4)) => {
            all.remarks.push(format!("{}; its last addresses are kept", error.message));
            all.ips.extend(last.iter().map(|found| found.ip).filter(|ip| ip.is_ipv4() == is_v4));
            Ok(Ok(all))
        }
        None if all.ips.is_empty() => Ok(Err(Outcome::Empty)),
        None => Ok(Ok(all)),
    }
}

/// The addresses of the hosts that offer a service.
async fn hosts_of_services(
    resolv: Arc<Resolv>,
    mut records: Vec<Record>,
    from: String,
    mut ttl: Duration,
    last: &Answer,
) -> Result<Answered, LookupError> {
    let mut remarks = Vec::new();
    records.sort_by(|a, b| order(a).cmp(&order(b)));
    truncate(&mut records, "records", &mut remarks);
    let mut by_host: BTreeMap<String, Vec<Service>> = BTreeMap::new();
    for record in records {
        if let Record::Service(service, host) = record {
            by_host.entry(host).or_default().push(service);
        }
    }
    let (mut found, mut lookups, mut nothing) = (Answer::new(), JoinSet::new(), None);
    let mut waiting = by_host.into_iter();
    loop {
        while lookups.len() < HOSTS_AT_ONCE
            && let Some((host, services)) = waiting.next()
        {
            let resolv = Arc::clone(&resolv);
            // What of the last answer has one of its ports may be a family that cannot be asked for now.
            let is_of = |found: &&Found| found.service.is_some_and(|service| services.contains(&service));
            let last: Answer = last.iter().filter(is_of).copied().collect();
            lookups.spawn(async move { (addresses(&resolv, &host, &last).await, host, services) });
        }
        let Some(joined) = lookups.join_next().await else { break };
        let (result, host, services) = joined.expect("a look-up neither panics nor is cancelled");
        match result? {
            Ok(addresses) => {
                ttl = ttl.min(addresses.ttl);
                remarks.extend(addresses.remarks);
                let ips = usable(addresses.ips, &mut remarks);
                found.extend(
                    services.iter().flat_map(|service| ips.iter().map(|ip| Found { ip: *ip, service: Some(*service) })),
                );
            }
            Err(outcome) => {
                remarks.push(format!("host {host} of the service has no address"));
                keep_better(&mut nothing, outcome, host);
            }
        }
    }
    let mut found: Vec<Found> = found.into_iter().collect();
    truncate(&mut found, "addresses", &mut remarks);
    if found.is_empty() {
        let message = format!("{from} has no host with an address that can be used");
        return Err(LookupError { outcome: Outcome::Empty, message });
    }
    remarks.sort();
    Ok(Answered { found: found.into_iter().collect(), from, ttl, remarks })
}

fn order(record: &Record) -> (Option<Service>, Option<&str>) {
    match record {
        Record::Service(service, host) => (Some(*service), Some(host)),
        Record::Address(_) => (None, None),
    }
}

fn answered(ips: Vec<IpAddr>, from: String, ttl: Duration, mut remarks: Vec<String>) -> Result<Answered, LookupError> {
    let mut ips = usable(ips, &mut remarks);
    truncate(&mut ips, "addresses", &mut remarks);
    if ips.is_empty() {
        let message = format!("{from} has no address that can be used: {}", remarks.join(", "));
        return Err(LookupError { outcome: Outcome::Empty, message });
    }
    let found = ips.into_iter().map(|ip| Found { ip, service: None }).collect();
    Ok(Answered { found, from, ttl, remarks })
}

/// The addresses that can be connected to, in their order. Those without a way to them are left out while others have
/// one: a name with IPv6 addresses on a machine without an IPv6 route.
fn usable(ips: Vec<IpAddr>, remarks: &mut Vec<String>) -> Vec<IpAddr> {
    let mut usable = Vec::with_capacity(ips.len());
    for ip in ips {
        match rules::usable(ip) {
            Ok(ip) => usable.push(ip),
            Err(what) => remarks.push(format!("{ip} left out: {what}")),
        }
    }
    usable.sort();
    usable.dedup();
    let (reachable, others): (Vec<IpAddr>, Vec<IpAddr>) = usable.into_iter().partition(|ip| net::has_route(*ip));
    if reachable.is_empty() {
        return others;
    }
    remarks.extend(others.iter().map(|ip| format!("{ip} left out: no route to it from here")));
    reachable
}

fn truncate<T>(list: &mut Vec<T>, what: &str, remarks: &mut Vec<String>) {
    if list.len() > FOUND_MAX {
        remarks.push(format!("{} {what}, the first {FOUND_MAX} are used", list.len()));
        list.truncate(FOUND_MAX);
    }
}
