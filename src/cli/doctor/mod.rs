//! `preface doctor`: finds out which header an upstream expects, and whether the configuration agrees.

pub mod advice;
pub mod compare;
pub mod datagram;
pub mod exchange;
pub mod judge;
pub mod report;
pub mod speed;
pub mod tries;

use std::collections::BTreeMap;
use std::io::{IsTerminal, Write};
use std::net::{IpAddr, ToSocketAddrs};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, anyhow, bail};
use tokio::task::JoinSet;

use self::compare::{Finding, Target, targets};
use self::exchange::{Subject, exchange};
use self::judge::{Diagnosis, Expectation, Outcome, better_question, talk};
use self::tries::{Question, Try, usual_tlvs};
use crate::address::Address;
use crate::config::{self, Config, Style, Tlvs, names};
use crate::discovery::{self, surroundings};

/// Upstreams that are examined at a time; one address at a time gets one connection.
const ADDRESSES_AT_ONCE: usize = 16;
/// Of a name with many, this many are tried until one can be reached.
const ADDRESSES_OF_A_NAME_MAX: usize = 4;
/// Names in a configuration are looked up within this time, or are said to be unknown.
const LOOKUPS_TIME_MAX: Duration = Duration::from_secs(10);
/// Whoever seems slow is asked again so often.
const SLOW_AGAIN: usize = 2;
/// Beyond the tries themselves: the deciding ones once more, with a better question.
const CONNECTIONS_MAX: usize = Try::ALL.len() + Try::DECIDING;

/// Find out which PROXY header an upstream expects, and the TOML line to use
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Makes 6 connections, one after the other: without a header, with v2, v1, v2 LOCAL, v2 with TLVs,
v1 UNKNOWN; up to 3 of them again if it guessed the wrong question. The headers name the connection's own addresses. A server that speaks first (SMTP,
IMAP, MySQL ...) is recognised and asked nothing; others get an HTTP request, or on the usual ports
a TLS ClientHello. An upstream that doesn't expect a header may log some of these as errors.

Receivers may decide by address: run it where preface runs.

With --config it examines every upstream of the file, and its health checks.
Exit status 0: there is a conclusion, and the configuration agrees; 1: a mismatch, or no conclusion.

Examples:
  preface doctor 10.0.0.30:8080
  preface doctor 10.0.0.40:6379 --send 'PING\\r\\n' --expect +PONG
  preface doctor 10.0.0.50:53 --udp --dns example.com
  preface doctor --config /etc/preface/preface.toml")]
pub struct Args {
    /// The upstream: 10.0.0.30:8080, [2001:db8::30]:8080, name:8080, unix:/path
    #[arg(value_name = "ADDR", required_unless_present = "config", conflicts_with = "config")]
    pub address: Option<String>,
    /// Examine every upstream of this file instead, from its pool's source address and with its check's question
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// What a client sends first; \r, \n, \t, \0, \\ and \xHH as usual
    #[arg(long, value_name = "TEXT", value_parser = unescape, conflicts_with_all = ["config", "tls", "path", "host"])]
    pub send: Option<Bytes>,
    /// A part of the right answer, or, without --send, of what the server says first
    #[arg(long, value_name = "TEXT", value_parser = unescape, conflicts_with_all = ["config", "tls", "path", "host"])]
    pub expect: Option<Bytes>,
    /// Path of the HTTP request
    #[arg(long, default_value = "/", conflicts_with_all = ["config", "tls"])]
    pub path: String,
    /// Host of the HTTP request; otherwise ADDR
    #[arg(long, conflicts_with_all = ["config", "tls"])]
    pub host: Option<String>,
    /// Send a TLS ClientHello instead of an HTTP request
    #[arg(long, conflicts_with = "config")]
    pub tls: bool,
    /// Ask over UDP: on port 53 for names, elsewhere with --dns or --send; without a header, with v2, LOCAL, TLVs, spp
    #[arg(long, conflicts_with_all = ["config", "tls", "path", "host"])]
    pub udp: bool,
    /// Ask a DNS server for this name
    #[arg(long, value_name = "NAME", conflicts_with_all = ["config", "tls", "path", "host", "send", "expect"])]
    pub dns: Option<String>,
    /// Connect from this address of this machine
    #[arg(long, value_name = "IP", conflicts_with = "config")]
    pub source: Option<IpAddr>,
    /// For each connect, and for each answer: from 100ms to 1m
    #[arg(long, value_name = "TIME", value_parser = timeout, default_value = "2s")]
    pub timeout: Duration,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// Bytes of an argument.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bytes(pub Vec<u8>);

/// Examines and reports. An error if there is no conclusion, or if the configuration doesn't agree with it.
pub fn run(args: Args) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("no runtime")?;
    match &args.config {
        Some(file) => runtime.block_on(file_against_reality(file, &args)),
        None => runtime.block_on(one_upstream(&args)),
    }
}

async fn one_upstream(args: &Args) -> anyhow::Result<()> {
    let name = args.address.as_deref().unwrap_or_default();
    let mut addresses = resolve(name)?.into_iter();
    let (to, diagnosis) = loop {
        let to = addresses.next().ok_or_else(|| anyhow!("{name:?} has no address"))?;
        let (question, guessed) = question(args, &to)?;
        let (source, timeout, is_datagram) = (args.source, args.timeout, args.udp);
        let tlvs = usual_tlvs();
        let subject = Subject { to: to.clone(), source, timeout, tlvs, is_datagram, header_alone: false };
        let diagnosis = examine(&subject, question, guessed).await;
        // As a client would: the next address of the name, while there is one.
        let is_reached = !matches!(diagnosis.expects, Expectation::Unreachable(_));
        if is_reached || addresses.len() == 0 {
            break (to, diagnosis);
        }
    };
    let text = match args.json {
        true => format!("{:#}\n", report::diagnosis_json(&to, &diagnosis)),
        false => report::diagnosis_text(&to, &diagnosis),
    };
    super::print(&text)?;
    match advice::version(&diagnosis.expects) {
        Some(_) => Ok(()),
        None => bail!("{to}: {}", advice::conclusion(&diagnosis.expects)),
    }
}

fn question(args: &Args, to: &Address) -> anyhow::Result<(Question, bool)> {
    let bytes = |bytes: &Option<Bytes>| bytes.as_ref().map(|bytes| bytes.0.clone()).unwrap_or_default();
    if args.send.is_some() || args.expect.is_some() {
        return Ok((Question::Given { send: bytes(&args.send), expect: bytes(&args.expect) }, false));
    }
    if let Some(name) = &args.dns {
        return Ok((Question::Dns { name: name.clone() }, false));
    }
    if args.udp {
        let usual = Question::usual_of_datagrams(to.port());
        let question =
            usual.ok_or_else(|| anyhow!("what should be asked of {to}? --dns NAME, or --send and --expect"))?;
        return Ok((question, false));
    }
    Ok(match args.tls {
        true => (Question::Tls, false),
        false if args.host.is_some() || args.path != "/" => {
            (Question::Http { path: args.path.clone(), host: args.host.clone() }, false)
        }
        false => (Question::usual(to.port()), true),
    })
}

/// The addresses of a name, in its resolver's order.
fn resolve(name: &str) -> anyhow::Result<Vec<Address>> {
    if let Ok(address) = name.parse() {
        return Ok(vec![address]);
    }
    if name.parse::<IpAddr>().is_ok() || !name.contains(':') {
        bail!("{name:?} has no port: write 10.0.0.30:8080 or [2001:db8::30]:8080");
    }
    let found = name.to_socket_addrs().with_context(|| format!("cannot resolve {name:?}"))?;
    Ok(found.take(ADDRESSES_OF_A_NAME_MAX).map(Address::Ip).collect())
}

/// All connections to one upstream, one after the other. A question that was `guessed` may be exchanged for a better
/// one, once.
async fn examine(subject: &Subject, mut question: Question, mut guessed: bool) -> Diagnosis {
    let mut exchanges = Vec::new();
    let mut made = 0;
    let all: &[Try] = if subject.is_datagram { &Try::UDP } else { &Try::ALL };
    let mut tries = all.iter();
    while let Some(attempt) = tries.next() {
        let result = exchange(subject, *attempt, &question, talk(&exchanges, &question)).await;
        made += 1;
        assert!(made <= CONNECTIONS_MAX, "each try is made once, and the deciding ones may be repeated");
        exchanges.push(result);
        let is_early = guessed && exchanges.len() <= Try::DECIDING;
        if let Some(better) = better_question(&exchanges, &question).filter(|_| is_early) {
            (question, guessed) = (better, false);
            exchanges.clear();
            tries = all.iter();
            continue;
        }
        let diagnosis = Diagnosis::new(question.clone(), exchanges.clone());
        let hopeless = |outcome: &Outcome| matches!(outcome, Outcome::Silent | Outcome::NotConnected(_));
        // A datagram tells nothing when it is lost, so all are sent.
        let all_hopeless = !subject.is_datagram && diagnosis.outcomes.iter().all(|(_, outcome)| hopeless(outcome));
        let not_reached = matches!(diagnosis.outcomes[0].1, Outcome::NotConnected(_));
        if not_reached || (all_hopeless && exchanges.len() == Try::DECIDING) {
            return diagnosis;
        }
    }
    Diagnosis::new(question, exchanges)
}

async fn file_against_reality(file: &Path, args: &Args) -> anyhow::Result<()> {
    let parsed = match config::load(file, &surroundings::here()) {
        Ok(parsed) => parsed,
        Err(error) => {
            let style = if std::io::stderr().is_terminal() { Style::Terminal } else { Style::Plain };
            for report in error.render(style) {
                // Nobody may be reading; the exit status still tells.
                let _ = writeln!(std::io::stderr(), "{report}\n");
            }
            bail!("{} cannot be used", file.display());
        }
    };
    let text = std::fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))?;
    let mut config = parsed.config;
    let unknown = look_up(&mut config).await;
    let mut findings = examine_all(targets(&config), args.timeout).await;
    for _ in 0..SLOW_AGAIN {
        ask_slow_ones_again(&mut findings, args.timeout).await;
    }
    let slow = speed::compared(&findings);
    findings.iter_mut().zip(slow).for_each(|(finding, slow)| finding.slow = slow);
    let findings = compare::with_changes(findings, &file.display().to_string(), &text);
    let output = match args.json {
        true => format!("{:#}\n", report::findings_json(&findings)),
        false => report::findings_text(&findings),
    };
    super::print(&output)?;
    let count = |meant: fn(&Finding) -> bool| findings.iter().filter(|finding| meant(finding)).count();
    let said = [
        (count(|finding| !finding.changes.is_empty()), format!("do not match {}", file.display())),
        (count(Finding::is_unjudged) + unknown, "could not be judged".to_owned()),
        (count(|finding| finding.slow.is_some()), "slower than the siblings".to_owned()),
    ];
    let said: Vec<String> =
        said.into_iter().filter(|(count, _)| *count > 0).map(|(count, what)| format!("{count} {what}")).collect();
    match said.is_empty() {
        true => Ok(()),
        false => bail!("of {} upstreams and checks: {}", findings.len() + unknown, said.join(", ")),
    }
}

/// A garbage collector may have come in between: only who is slow each time is slow.
async fn ask_slow_ones_again(findings: &mut [Finding], timeout: Duration) {
    let slow = speed::compared(findings);
    for (finding, _) in findings.iter_mut().zip(slow).filter(|(_, slow)| slow.is_some()) {
        let Finding { target, diagnosis, .. } = finding;
        let Some(attempt) = diagnosis.good_answer().map(|exchange| exchange.attempt) else { continue };
        let exchanges: Vec<_> = diagnosis.outcomes.iter().map(|(exchange, _)| exchange.clone()).collect();
        let talk = talk(&exchanges, &diagnosis.question);
        let subject = subject_of(target, target.tlvs.clone(), timeout);
        let again = exchange(&subject, attempt, &diagnosis.question, talk).await;
        diagnosis.quickened(again);
    }
}

/// Puts the addresses of names into the configuration; how many names have none, which is said.
async fn look_up(config: &mut Config) -> usize {
    let (mut answers, mut unknown) = (BTreeMap::new(), 0);
    for (name, result) in discovery::look_up_once(names::names(config), LOOKUPS_TIME_MAX).await {
        match result {
            Ok(answered) => drop(answers.insert(name, answered.found)),
            Err(error) => {
                unknown += 1;
                // Nobody may be reading; the exit status still tells.
                let _ = writeln!(std::io::stderr(), "name {name} has no address: {}", error.message);
            }
        }
    }
    names::resolve(config, &answers);
    unknown
}

/// Different addresses at the same time, those of one address one after the other, in the order of the targets.
async fn examine_all(targets: Vec<Target>, timeout: Duration) -> Vec<Finding> {
    let mut by_address: BTreeMap<Address, Vec<(usize, Target)>> = BTreeMap::new();
    for (index, target) in targets.into_iter().enumerate() {
        by_address.entry(target.address.clone()).or_default().push((index, target));
    }
    let mut waiting = by_address.into_values();
    let mut running = JoinSet::new();
    let mut findings = BTreeMap::new();
    loop {
        while running.len() < ADDRESSES_AT_ONCE
            && let Some(targets) = waiting.next()
        {
            running.spawn(examine_address(targets, timeout));
        }
        match running.join_next().await {
            Some(done) => findings.extend(done.expect("an examination does not panic and is not aborted")),
            None => return findings.into_values().collect(),
        }
    }
}

async fn examine_address(targets: Vec<(usize, Target)>, timeout: Duration) -> Vec<(usize, Finding)> {
    let mut findings: Vec<(usize, Finding)> = Vec::new();
    for (index, target) in targets {
        // Two pools may name the same upstream, and ask the same.
        let same = findings.iter().find(|(_, finding)| finding.target.asks_the_same_as(&target));
        let diagnosis = match same {
            Some((_, finding)) => finding.diagnosis.clone(),
            None if target.is_datagram && target.question.datagram().is_empty() => {
                let why = "nothing is known to ask it: give the pool a check with protocol = \"udp\", send and expect";
                Diagnosis::unasked(target.question.clone(), why.to_owned())
            }
            None => {
                let tlvs = if target.configured.tlvs { target.tlvs.clone() } else { usual_tlvs() };
                examine(&subject_of(&target, tlvs, timeout), target.question.clone(), target.guessed).await
            }
        };
        findings.push((index, Finding::new(target, diagnosis)));
    }
    findings
}

fn subject_of(target: &Target, tlvs: Tlvs, timeout: Duration) -> Subject {
    let &Target { source, is_datagram, header_alone, .. } = target;
    Subject { to: target.address.clone(), source, timeout, tlvs, is_datagram, header_alone }
}

fn timeout(text: &str) -> Result<Duration, String> {
    let limits = Duration::from_millis(100)..=Duration::from_secs(60);
    let timeout = humantime::parse_duration(text).map_err(|error| error.to_string())?;
    if limits.contains(&timeout) { Ok(timeout) } else { Err("must be from 100ms to 1m".to_owned()) }
}

/// Escapes as in most languages.
fn unescape(text: &str) -> Result<Bytes, String> {
    let mut bytes = Vec::new();
    let mut chars = text.chars();
    while let Some(char) = chars.next() {
        if char != '\\' {
            bytes.extend_from_slice(char.encode_utf8(&mut [0; 4]).as_bytes());
            continue;
        }
        bytes.push(match chars.next() {
            Some('r') => b'\r',
            Some('n') => b'\n',
            Some('t') => b'\t',
            Some('0') => 0,
            Some('\\') => b'\\',
            Some('x') => {
                let digits: String = chars.by_ref().take(2).collect();
                u8::from_str_radix(&digits, 16).map_err(|_| format!("\\x{digits} is not \\x and two hex digits"))?
            }
            Some(other) => return Err(format!("no escape is called \\{other}; a backslash itself is \\\\")),
            None => return Err("a backslash at the end; the character itself is \\\\".to_owned()),
        });
    }
    Ok(Bytes(bytes))
}

#[cfg(test)]
mod tests;
