//! Names as upstreams, on the control thread: what look-ups came to, what that changes, and reloads that wait for names.
//!
//! An answer changes the configuration in force and nothing else: what follows of that (who joins, who drains, what is
//! checked) is what follows of a reload.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use serde_json::{Value, json};
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout_at;

use super::state::State;
use super::status::time;
use crate::address::Address;
use crate::config::hints::{CLUSTER_IP, Surroundings};
use crate::config::names::{self, Answer, Name, Remarks};
use crate::config::{Config, Pool, UpstreamAddress};
use crate::control::lookups::{Answered, Lookup, LookupError, Outcome};
use crate::control::{Command, ReloadReport, ReloadTrigger};
use crate::discovery::{Discovery, surroundings};
use crate::snapshot;

/// A start, and a reload that brings names, waits this long at most for their first answers.
pub const FIRST_ANSWERS_MAX: Duration = Duration::from_secs(5);

/// All that is known of names.
pub struct Names {
    discovery: Discovery,
    records: BTreeMap<Name, Record>,
    /// What could not be used of the answers that are in force; each was logged when it came up.
    remarks: Remarks,
    pending: Option<Pending>,
    surroundings: Surroundings,
}

/// What look-ups of one name came to; there was at least one.
struct Record {
    /// The last good answer, and when it came.
    answer: Option<(Answered, SystemTime)>,
    /// Why there is none now, and since when not.
    failing: Option<(LookupError, SystemTime)>,
    /// When the next look-up begins.
    next: Instant,
    /// By `Outcome`.
    counts: [u64; Outcome::ALL.len()],
}

/// What is counted of a name.
pub struct Counts {
    /// Look-ups by `Outcome`.
    pub lookups: [u64; Outcome::ALL.len()],
    /// In the last good answer.
    pub addresses: usize,
    /// Of the last good answer.
    pub age: Option<Duration>,
}

/// A reload that waits for the first answers of its names.
struct Pending {
    trigger: ReloadTrigger,
    content: Vec<u8>,
    /// All names that it has.
    names: BTreeSet<Name>,
    deadline: Instant,
    replies: Vec<oneshot::Sender<Arc<ReloadReport>>>,
}

impl Names {
    /// None yet.
    pub fn new(discovery: Discovery) -> Names {
        Names {
            discovery,
            records: BTreeMap::new(),
            remarks: Remarks::new(),
            pending: None,
            surroundings: surroundings::here(),
        }
    }

    fn answers(&self) -> BTreeMap<Name, Answer> {
        let answered = self.records.iter().filter_map(|(name, record)| Some((name, record.answer.as_ref()?)));
        answered.map(|(name, (answered, _))| (name.clone(), answered.found.clone())).collect()
    }

    /// What is counted of each name.
    pub fn counts(&self) -> impl Iterator<Item = (String, Counts)> {
        self.records.iter().map(|(name, record)| {
            let answer = record.answer.as_ref();
            let counts = Counts {
                lookups: record.counts,
                addresses: answer.map_or(0, |(answered, _)| answered.found.len()),
                age: answer.map(|(_, at)| SystemTime::now().duration_since(*at).unwrap_or_default()),
            };
            (name.to_string(), counts)
        })
    }

    /// When a reload that waits has waited long enough.
    pub fn deadline(&self) -> Option<Instant> {
        self.pending.as_ref().map(|pending| pending.deadline)
    }

    /// Looks up what these names and a reload that waits need, and nothing else.
    fn watch(&mut self, mut names: BTreeSet<Name>) {
        names.extend(self.pending.iter().flat_map(|pending| pending.names.iter().cloned()));
        self.discovery.watch(&names);
        self.records.retain(|name, _| names.contains(name));
    }

    fn has_all(&self, names: &BTreeSet<Name>) -> bool {
        names.iter().all(|name| self.records.contains_key(name))
    }

    /// Remembers what came of a look-up, and says what is new about that. Did the answer change?
    fn record(&mut self, lookup: Lookup) -> bool {
        let now = SystemTime::now();
        let Lookup { name, result, next } = lookup;
        let record = self.records.entry(name.clone()).or_insert_with(|| Record {
            answer: None,
            failing: None,
            next,
            counts: [0; Outcome::ALL.len()],
        });
        record.next = next;
        let outcome = result.as_ref().err().map_or(Outcome::Answered, |error| error.outcome);
        record.counts[outcome as usize] += 1;
        match result {
            Err(error) => {
                let kept = record.answer.as_ref().map_or(0, |(answered, _)| answered.found.len());
                let since = match &record.failing {
                    Some((_, since)) => *since,
                    None => {
                        let what = if kept > 0 { "its last addresses stay" } else { "it has no addresses yet" };
                        tracing::warn!(
                            event = "lookup", name = %name, outcome = outcome.as_str(), reason = error.message,
                            addresses = kept, "{what}; it is tried again"
                        );
                        now
                    }
                };
                record.failing = Some((error, since));
                false
            }
            Ok(mut answered) => {
                if let Some((_, since)) = record.failing.take() {
                    let seconds = now.duration_since(since).unwrap_or_default().as_secs();
                    tracing::info!(
                        event = "lookup", name = %name, outcome = outcome.as_str(), addresses = answered.found.len(),
                        "answered again after {seconds} s"
                    );
                }
                answered.remarks.extend(self.surroundings.service_network().and_then(|network| {
                    let mut ips = answered.found.iter().map(|found| found.ip);
                    let (first, others) = (ips.next()?, ips.next());
                    let looks_so = others.is_none() && network.contains(&first);
                    looks_so.then(|| {
                        format!("{first} looks like a ClusterIP, the address of a whole Service: {CLUSTER_IP}")
                    })
                }));
                let before = record.answer.replace((answered, now)).map(|(before, _)| before);
                let (answered, _) = record.answer.as_ref().expect("it was just put there");
                for remark in &answered.remarks {
                    if before.as_ref().is_none_or(|before| !before.remarks.contains(remark)) {
                        tracing::warn!(event = "lookup", name = %name, outcome = outcome.as_str(), remark);
                    }
                }
                before.is_none_or(|before| before.found != answered.found)
            }
        }
    }
}

impl State {
    /// Looks up the names of the first configuration before it is put in force: no connection is to meet an empty pool
    /// because DNS takes a moment. Nothing else is asked of the control thread yet.
    pub async fn wait_for_first_answers(&mut self, config: &Config, commands: &mut mpsc::Receiver<Command>) {
        let wanted = names::names(config);
        self.names.watch(wanted.clone());
        let deadline = tokio::time::Instant::now() + FIRST_ANSWERS_MAX;
        while !self.names.has_all(&wanted) {
            match timeout_at(deadline, commands.recv()).await {
                Ok(Some(Command::LookedUp(lookup))) => drop(self.names.record(lookup)),
                Ok(Some(_)) => {}
                Ok(None) => return,
                Err(_) => {
                    for name in wanted.iter().filter(|name| !self.names.records.contains_key(name)) {
                        let seconds = FIRST_ANSWERS_MAX.as_secs();
                        tracing::warn!(event = "lookup", name = %name, "no answer within {seconds} s: it has no addresses yet");
                    }
                    return;
                }
            }
        }
    }

    /// Puts the addresses of names into a configuration, and says what of them cannot be used.
    pub fn resolve(&mut self, config: &mut Config) {
        let remarks = names::resolve(config, &self.names.answers());
        for remark in remarks.difference(&self.names.remarks) {
            tracing::warn!(event = "lookup", "{remark}");
        }
        self.names.remarks = remarks;
    }

    /// Looks up the names of the configuration in force; those that are looked up already, once more now.
    pub fn look_up_what_is_configured(&mut self) {
        self.names.watch(names::names(&self.config));
        self.names.discovery.look_now();
    }

    /// A look-up came to something: records it, and puts changed addresses in force.
    pub async fn looked_up(&mut self, lookup: Lookup) {
        // What was under way when the name left the configuration counts no more.
        if !self.names.discovery.watches(&lookup.name) {
            return;
        }
        if self.names.record(lookup) {
            let mut new = self.config.clone();
            self.resolve(&mut new);
            let changed = new.pools.iter().any(|(name, pool)| !Arc::ptr_eq(pool, &self.config.pools[name]));
            if changed {
                self.go_over_to(new);
                self.store_next();
            }
        }
        if self.names.pending.as_ref().is_some_and(|pending| self.names.has_all(&pending.names)) {
            self.reload_pending().await;
        }
    }

    /// Reloads now, or as soon as names that the content brings were looked up. `reply` gets the report.
    pub async fn reload_when_resolved(
        &mut self,
        trigger: ReloadTrigger,
        content: Result<Vec<u8>, String>,
        reply: Option<oneshot::Sender<Arc<ReloadReport>>>,
    ) {
        let names = content.as_ref().ok().and_then(|content| super::reload::names_in(&self.path, content));
        let (content, names) = match (content, names) {
            (Ok(content), Some(names)) => (content, names),
            (content, _) => {
                // One that cannot be used takes nothing from one that waits.
                let report = self.reload(trigger, content).await;
                return reply.into_iter().for_each(|reply| drop(reply.send(Arc::clone(&report))));
            }
        };
        // The newest content counts; whoever asked for an older one gets the report of this one.
        let before = self.names.pending.take();
        let deadline = Instant::now() + FIRST_ANSWERS_MAX;
        let replies = before.into_iter().flat_map(|before| before.replies).chain(reply).collect();
        let is_resolved = self.names.has_all(&names);
        self.names.pending = Some(Pending { trigger, content, names, deadline, replies });
        match is_resolved {
            true => self.reload_pending().await,
            false => self.names.watch(names::names(&self.config)),
        }
    }

    /// Why nothing is reloaded now, if nothing is.
    pub fn refuses_reloads(&self) -> Option<&'static str> {
        match &self.upgrade {
            _ if self.stopping => Some("error: the process is stopping: nothing is reloaded any more"),
            Some(_) => Some("error: an upgrade is under way: the new process reads the file itself"),
            None => None,
        }
    }

    /// The reload that waits, if its names were looked up or its time is over.
    pub async fn reload_pending(&mut self) {
        let Some(Pending { trigger, content, replies, .. }) = self.names.pending.take() else { return };
        let content = self.refuses_reloads().map_or(Ok(content), |refused| Err(refused.to_owned()));
        let report = self.reload(trigger, content).await;
        // A reply that nobody waits for any more is no error.
        replies.into_iter().for_each(|reply| drop(reply.send(Arc::clone(&report))));
    }

    /// What a name that stands in a pool stands for now; with its port as written, or without.
    pub fn addresses_of(&self, pool: &str, wanted: &str) -> BTreeSet<Address> {
        let is_it = |address: &UpstreamAddress| {
            address.to_string() == wanted || address.name().is_some_and(|name| name.to_string() == wanted)
        };
        let mut found = BTreeSet::new();
        for (name, port) in snapshot::pool_keys(&self.config).into_iter().filter(|(name, _)| name == pool) {
            let upstreams = self.config.pools[&name].upstreams.iter();
            let of_it = upstreams.filter(|upstream| upstream.name.as_deref().is_some_and(is_it));
            found.extend(of_it.filter_map(|upstream| upstream.address.at(port)));
        }
        found
    }

    /// The names of a pool for the status, in file order.
    pub fn names_value(&self, pool: &Pool) -> Value {
        let named = pool.upstreams.iter().filter_map(|upstream| Some((upstream, upstream.address.name()?)));
        let values = named.map(|(upstream, name)| {
            let record = self.names.records.get(name);
            let answer = record.and_then(|record| record.answer.as_ref());
            let failing = record.and_then(|record| record.failing.as_ref());
            let of_it = |other: &&crate::config::Upstream| other.name.as_deref() == Some(&upstream.address);
            let addresses: Vec<String> = pool.upstreams.iter().filter(of_it).map(ToString::to_string).collect();
            json!({
                "name": upstream.to_string(),
                "addresses": addresses,
                "from": answer.map(|(answered, _)| &answered.from),
                "answered": answer.map(|(_, at)| time(*at)),
                "ttl_s": answer.map(|(answered, _)| answered.ttl.as_secs()),
                "remarks": answer.map_or(&[][..], |(answered, _)| &answered.remarks[..]),
                "outcome": match (failing, record) {
                    (Some((error, _)), _) => Some(error.outcome.as_str()),
                    (None, Some(_)) => Some(Outcome::Answered.as_str()),
                    (None, None) => None,
                },
                "error": failing.map(|(error, _)| &error.message),
                "failing_since": failing.map(|(_, since)| time(*since)),
                "next": record.map(|record| {
                    time(SystemTime::now() + record.next.saturating_duration_since(Instant::now()))
                }),
            })
        });
        values.collect()
    }
}

/// Logs which addresses of names joined and left, for pools that stay or are new.
pub fn log_changes(old: &Config, new: &Config) {
    for (pool_name, pool) in &new.pools {
        let before = old.pools.get(pool_name);
        if before.is_some_and(|before| Arc::ptr_eq(before, pool)) {
            continue;
        }
        let before = before.map(|before| by_name(before)).unwrap_or_default();
        for (name, addresses) in by_name(pool) {
            let nothing = BTreeSet::new();
            let known = before.get(&name).unwrap_or(&nothing);
            let list = |set: Vec<&String>| set.into_iter().map(String::as_str).collect::<Vec<_>>().join(",");
            let (added, removed) =
                (list(addresses.difference(known).collect()), list(known.difference(&addresses).collect()));
            if !added.is_empty() || !removed.is_empty() {
                tracing::info!(event = "upstreams_changed", pool = %pool_name, name, added, removed);
            }
        }
    }
}

/// The addresses of each name of a pool.
fn by_name(pool: &Pool) -> BTreeMap<String, BTreeSet<String>> {
    let mut by_name: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for upstream in &pool.upstreams {
        if upstream.address.name().is_some() {
            by_name.entry(upstream.to_string()).or_default();
        } else if let Some(name) = &upstream.name {
            by_name.entry(name.to_string()).or_default().insert(upstream.to_string());
        }
    }
    by_name
}
