//! Upstreams that seem to reject the header that they get, or to miss one: said once, with what to change.

use std::time::SystemTime;

use serde_json::{Value, json};

use crate::config::{self, CheckHeader, Config, HeaderFormat, Probe, Tlvs};
use crate::pool::rejection::Rejection;
use crate::pool::{Health, UpstreamKey};
use crate::server::state::State;
use crate::snapshot;

/// Why an upstream is suspected.
#[derive(Clone, Debug)]
pub struct Suspicion {
    /// How the last connection looked.
    pub rejection: Rejection,
    /// Since when.
    pub since: SystemTime,
    /// What was seen and what probably is the matter.
    pub reason: String,
    /// What to write where.
    pub change: String,
    /// `false`: the upstream may as well be one that takes what clients say and never answers.
    pub is_certain: bool,
}

impl Suspicion {
    /// As the status shows it.
    pub fn value(&self) -> Value {
        json!({
            "how": self.rejection.as_str(),
            "since": humantime::format_rfc3339_millis(self.since).to_string(),
            "reason": self.reason,
            "change": self.change,
            "certain": self.is_certain,
        })
    }
}

impl State {
    /// Looks at what the connections since the last time say about headers, and tells of what turned.
    pub fn look_at_rejections(&mut self) {
        self.suspicions.retain(|key, suspicion| {
            let Some(life) = self.inputs.lives.get(key) else { return false };
            let stands = life.suspicion().is_some();
            if !stands {
                tracing::info!(
                    event = "header_accepted", pool = %key.pool, upstream = %key.address, was = suspicion.rejection.as_str(),
                    "the upstream answers again"
                );
            }
            stands
        });
        let lives = self.inputs.lives.iter().filter(|(key, _)| !self.suspicions.contains_key(key));
        let suspected: Vec<_> = lives.filter_map(|(key, life)| Some((key.clone(), life.suspicion()?))).collect();
        for (key, (in_a_row, rejection)) in suspected {
            let Some((pool, upstream)) = self.configured(&key) else { continue };
            if self.is_cleared_by_checks(&key, pool, upstream) {
                continue;
            }
            let was_taken = self.inputs.lives.get(&key).is_some_and(|life| life.has_answered());
            let seen = Seen { rejection, in_a_row, was_taken };
            let (reason, change) = advice(&key, pool, upstream, seen);
            tracing::warn!(
                event = if seen.is_certain() { "header_rejected" } else { "never_answers" },
                pool = %key.pool, upstream = %key.address, reason, change,
            );
            let is_certain = seen.is_certain();
            self.suspicions.insert(key, Suspicion { rejection, since: SystemTime::now(), reason, change, is_certain });
        }
    }

    /// The pool and the entry of an upstream.
    fn configured(&self, key: &UpstreamKey) -> Option<(&config::Pool, &config::Upstream)> {
        configured(&self.config, key)
    }

    /// An answer to a check with the same header shows that the header is taken. TLVs are not in checks.
    fn is_cleared_by_checks(&self, key: &UpstreamKey, pool: &config::Pool, upstream: &config::Upstream) -> bool {
        let Some(check) = &pool.health_check else { return false };
        let asks = match &check.probe {
            Probe::Tcp { expect, .. } => !expect.is_empty(),
            Probe::Http { .. } => true,
            Probe::Udp { .. } => false,
        };
        let header = match check.proxy_protocol {
            CheckHeader::Same => upstream.proxy_protocol,
            CheckHeader::Off => None,
            CheckHeader::Format(format) => Some(format),
        };
        let has_tlvs = upstream.tlvs != Tlvs::default()
            || pool.tlvs != Tlvs::default()
            || self.config.listeners.values().any(|of| of.pool == key.pool && of.tlvs != Tlvs::default());
        let is_healthy = self.checkers.get(key).is_some_and(|checker| checker.health() == Health::Healthy);
        asks && check.port.is_none() && header == upstream.proxy_protocol && !has_tlvs && is_healthy
    }

    /// What upstreams answered to another header says nothing about the one that they get from now on.
    pub fn forget_answers_to_other_headers(&mut self, old: &Config) {
        for (key, life) in &self.inputs.lives {
            let (Some(before), Some(now)) = (configured(old, key), self.configured(key)) else { continue };
            let header = |(pool, upstream): (&config::Pool, &config::Upstream)| {
                (upstream.proxy_protocol, upstream.tlvs.clone(), pool.tlvs.clone())
            };
            if header(before) != header(now) {
                life.forget_answers();
                self.suspicions.remove(key);
            }
        }
    }
}

fn configured<'a>(config: &'a Config, key: &UpstreamKey) -> Option<(&'a config::Pool, &'a config::Upstream)> {
    let pool = config.pools.get(&key.pool)?;
    let fits = |upstream: &&config::Upstream| {
        snapshot::upstream_address(upstream, key.address.port()).as_ref() == Some(&key.address)
    };
    Some((pool, pool.upstreams.iter().find(fits)?))
}

/// What accuses an upstream.
#[derive(Clone, Copy)]
struct Seen {
    rejection: Rejection,
    in_a_row: u32,
    /// Before these it answered, with the header that it gets now.
    was_taken: bool,
}

impl Seen {
    /// Who closes without a word, and never said one, may have taken a message.
    fn is_certain(self) -> bool {
        self.was_taken || self.rejection != Rejection::Closed
    }
}

/// What was seen and is probably the matter, and what to change.
fn advice(key: &UpstreamKey, pool: &config::Pool, upstream: &config::Upstream, seen: Seen) -> (String, String) {
    let Seen { rejection, in_a_row, was_taken } = seen;
    let or_never = if seen.is_certain() { "" } else { ", or takes what clients say and never answers" };
    let clients = if seen.is_certain() { "" } else { "if its clients wait for answers: " };
    let seen = format!("the last {in_a_row} connections were {}", rejection.in_words());
    // A 400 and an alert are words of a program that read the header; a bare end is less.
    let or_all = match rejection {
        Rejection::Reset | Rejection::Closed => ", or turns everyone away (overload, a limit, a crash)",
        Rejection::BadRequest | Rejection::TlsAlert => "",
    };
    let (reason, word) = match upstream.proxy_protocol {
        None if was_taken => (format!("{seen}; before that it answered: it requires a header now{or_all}"), "v2"),
        Some(format) if was_taken => {
            let header = format.as_str();
            let reason = format!(
                "{seen}, right after the {header} header that it took before: it no longer expects one{or_all}"
            );
            (reason, "off")
        }
        None => (format!("{seen}: it probably requires a header, and gets none{or_never}"), "v2"),
        Some(format) => {
            let cause = "it probably does not expect a header";
            let or = if format == HeaderFormat::V2 { ", or not this version" } else { "" };
            (format!("{seen}, right after the {} header: {cause}{or}{or_never}", format.as_str()), "off")
        }
    };
    let address = &key.address;
    let others_differ = pool.upstreams.iter().any(|other| other.proxy_protocol != upstream.proxy_protocol);
    let table = if others_differ || pool.upstreams.len() > 1 {
        format!("in the [[pools.{}.upstreams]] of {address}", key.pool)
    } else {
        format!("in [pools.{}]", key.pool)
    };
    let there = match upstream.proxy_protocol {
        None => "switch the header off there",
        Some(_) => "let it take the header there (nginx: listen ... proxy_protocol)",
    };
    let first = if was_taken && !or_all.is_empty() { "its log says which; if it is the header, " } else { "" };
    let change = format!(
        "{clients}{first}{table}: proxy_protocol = \"{word}\"; or {there}; `preface doctor {address}` finds out which"
    );
    (reason, change)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::SocketAddr;

    #[test]
    fn tells_what_to_write_where() {
        let text = |header: &str, upstreams: &str| {
            format!(
                "[listeners.a]\nbind = \":80\"\npool = \"p\"\n[pools.p]\nproxy_protocol = \"{header}\"\nupstreams = {upstreams}\n"
            )
        };
        let mut said = String::new();
        for (header, upstreams, rejection, was_taken) in [
            ("v2", "[\"10.0.0.1\"]", Rejection::BadRequest, false),
            ("v1", "[\"10.0.0.1\", \"10.0.0.2\"]", Rejection::TlsAlert, false),
            ("off", "[\"10.0.0.1:80\"]", Rejection::Closed, false),
            ("v2", "[\"10.0.0.1:80\"]", Rejection::Closed, false),
            ("v2", "[\"10.0.0.1\"]", Rejection::BadRequest, true),
            ("v2", "[\"10.0.0.1\"]", Rejection::Reset, true),
            ("off", "[\"10.0.0.1\"]", Rejection::Closed, true),
        ] {
            let config = config::parse("test.toml", &text(header, upstreams)).expect("it is valid").config;
            let key = UpstreamKey { pool: "p".to_owned(), address: SocketAddr::from(([10, 0, 0, 1], 80)).into() };
            let (pool, upstream) = configured(&config, &key).expect("it is configured");
            let (reason, change) = advice(&key, pool, upstream, Seen { rejection, in_a_row: 3, was_taken });
            said += &format!("{reason}\n    {change}\n");
        }
        insta::assert_snapshot!(said);
    }
}
