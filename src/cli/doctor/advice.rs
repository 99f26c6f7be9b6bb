//! PURE. What to write into the configuration, and what is wrong with what stands there.

use super::judge::{Diagnosis, Expectation, Takes, status};
use super::tries::{DNS_ID, Question, Try};
use crate::config::{CheckCommand, CheckHeader, HeaderFormat, HealthCheck, Probe};

/// The word of `proxy_protocol`.
pub fn word(version: Option<HeaderFormat>) -> &'static str {
    version.map_or("off", HeaderFormat::as_str)
}

/// The conclusion in one sentence.
pub fn conclusion(expects: &Expectation) -> String {
    match expects {
        Expectation::NoHeader => "it expects no header, and refuses those that come".to_owned(),
        Expectation::Required(takes) => format!("it requires a header: {}", takes_words(*takes)),
        Expectation::Optional(takes) => format!("a header is optional there: {}", takes_words(*takes)),
        Expectation::Unclear(why) => format!("no conclusion: {why}"),
        Expectation::Unreachable(why) => format!("not reached: {why}"),
    }
}

/// The conclusion in a column of a table.
pub fn found(expects: &Expectation) -> String {
    match expects {
        Expectation::NoHeader => "no header".to_owned(),
        Expectation::Required(takes) => format!("{}, required", versions(*takes)),
        Expectation::Optional(takes) => format!("{}, optional", versions(*takes)),
        Expectation::Unclear(_) => "?".to_owned(),
        Expectation::Unreachable(why) => why.clone(),
    }
}

/// The conclusion for machines.
pub fn found_word(expects: &Expectation) -> &'static str {
    match expects {
        Expectation::NoHeader => "no_header",
        Expectation::Required(_) => "header_required",
        Expectation::Optional(_) => "header_optional",
        Expectation::Unclear(_) => "unclear",
        Expectation::Unreachable(_) => "unreachable",
    }
}

fn versions(takes: Takes) -> &'static str {
    match (takes.v1, takes.v2, takes.spp) {
        (true, true, _) => "v1 or v2",
        (true, false, _) => "v1",
        (_, true, true) => "v2 or spp",
        (_, true, false) => "v2",
        _ => "spp",
    }
}

fn takes_words(takes: Takes) -> String {
    let one = [takes.v1, takes.v2, takes.spp].iter().filter(|takes| **takes).count() == 1;
    let mut words = format!("{}{}", versions(takes), if one { " only" } else { "" });
    words += match (takes.v2, takes.local, takes.tlvs) {
        (true, false, false) => ", but refuses LOCAL and these TLVs",
        (true, false, true) => ", but refuses LOCAL",
        (true, true, false) => ", but refuses these TLVs",
        _ => "",
    };
    words
}

/// The header that traffic should get; `None`: none.
pub fn version(expects: &Expectation) -> Option<Option<HeaderFormat>> {
    match expects {
        Expectation::NoHeader => Some(None),
        Expectation::Required(takes) | Expectation::Optional(takes) => Some(Some(takes.best())),
        Expectation::Unclear(_) | Expectation::Unreachable(_) => None,
    }
}

/// The lines for the configuration; none without a conclusion.
pub fn toml(diagnosis: &Diagnosis, pool: &str, address: &str) -> Vec<String> {
    let Some(version) = version(&diagnosis.expects) else { return Vec::new() };
    let mut lines = vec![
        format!("[pools.{pool}]"),
        format!("proxy_protocol = \"{}\"", word(version)),
        format!("upstreams = [\"{address}\"]"),
        String::new(),
        format!("[pools.{pool}.health_check]"),
    ];
    lines.extend(check_lines(diagnosis));
    // Over UDP a check names its own address anyway.
    if let (Some(HeaderFormat::V2), Some(takes)) = (version, takes(&diagnosis.expects))
        && !takes.local
        && !diagnosis.is_of_datagrams()
    {
        lines.push("proxy_command = \"proxy\"            # it refuses LOCAL".to_owned());
    }
    lines
}

fn takes(expects: &Expectation) -> Option<Takes> {
    match expects {
        Expectation::Required(takes) | Expectation::Optional(takes) => Some(*takes),
        _ => None,
    }
}

fn check_lines(diagnosis: &Diagnosis) -> Vec<String> {
    let transport = if diagnosis.is_of_datagrams() { "udp" } else { "tcp" };
    let tcp = format!("protocol = \"{transport}\"");
    let line = |key: &str, value: &str| format!("{key} = {}", toml_text(value));
    if let Some(greeting) = diagnosis.greeting() {
        let begins = ["220", "+OK", "* OK", "SSH-"].into_iter().find(|begin| greeting.starts_with(begin.as_bytes()));
        return [Some(tcp), begins.map(|begin| line("expect", begin))].into_iter().flatten().collect();
    }
    match &diagnosis.question {
        Question::Http { path, host } => {
            let mut lines = vec!["protocol = \"http\"".to_owned(), line("path", path)];
            lines.extend(host.as_ref().map(|host| line("host", host)));
            let code = diagnosis.good_answer().and_then(|answer| status(&answer.late));
            if let Some(code) = code.filter(|code| !(200..400).contains(code)) {
                lines[1] += &format!("   # answers {code}: name a path that answers 200 to 399");
            }
            lines
        }
        Question::Tls => vec![tcp],
        Question::Dns { .. } if diagnosis.is_of_datagrams() => {
            let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
            vec![tcp, line("send", &text(&diagnosis.question.datagram())), line("expect", &text(&DNS_ID))]
        }
        Question::Dns { .. } => vec![tcp],
        Question::Given { send, expect } => {
            let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).ok().filter(|text| !text.is_empty());
            let mut lines = vec![tcp];
            lines.extend(text(send).filter(|_| !expect.is_empty()).map(|send| line("send", &send)));
            lines.extend(text(expect).map(|expect| line("expect", &expect)));
            lines
        }
    }
}

fn toml_text(text: &str) -> String {
    toml::Value::String(text.to_owned()).to_string()
}

/// What becomes of health checks there: pass, fail, or fill the log.
pub fn checks(diagnosis: &Diagnosis) -> Vec<String> {
    let says =
        |attempt| diagnosis.outcome(attempt).map_or_else(|| "not tried".to_owned(), |outcome| outcome.describe());
    let mut notes = Vec::new();
    if diagnosis.is_of_datagrams() {
        if let Some(takes) = takes(&diagnosis.expects).filter(|takes| takes.v2) {
            notes.push("preface's check over UDP sends the header with its own address, and passes".to_owned());
            if !takes.local {
                notes.push(format!("one with proxy_command = \"local\" fails ({})", says(Try::Local)));
            }
        }
        return notes;
    }
    match &diagnosis.expects {
        Expectation::NoHeader => {
            notes.push("a check without a header passes".to_owned());
            notes.push(format!("a check with a header fails ({}), and the upstream may log each one", says(Try::V2)));
        }
        Expectation::Required(takes) => {
            notes.push(with_header(*takes));
            notes.push(format!(
                "a check without a header that waits for an answer fails ({}), and the upstream may log each one",
                says(Try::Bare)
            ));
            notes.push("a TCP check without a header passes, and proves only that the port is open".to_owned());
            notes.push("preface's own leaves no trace there; that of others may be logged each time".to_owned());
        }
        Expectation::Optional(takes) => {
            notes.push(format!("a check without a header passes; {}", with_header(*takes)));
        }
        Expectation::Unclear(_) | Expectation::Unreachable(_) => return notes,
    }
    if let Some(takes) = takes(&diagnosis.expects) {
        if takes.v1 && !takes.unknown {
            notes.push(format!("a check with PROXY UNKNOWN (GCP's) fails ({})", says(Try::Unknown)));
        }
        if takes.v2 && !takes.tlvs {
            notes.push(format!("leave the pool without such TLVs ({})", says(Try::Tlvs)));
        }
    }
    if diagnosis.greeting().is_some_and(is_mysql) {
        notes.push(
            "each check that is accepted counts there as an aborted connection; one with proxy_protocol = \"off\" is \
             gone before that"
                .to_owned(),
        );
    }
    notes
}

fn with_header(takes: Takes) -> String {
    match (takes.best(), takes.local) {
        (HeaderFormat::V2, true) => "preface's check sends LOCAL by default, and passes".to_owned(),
        (HeaderFormat::V2, false) => {
            "a check with LOCAL (HAProxy's, Envoy's, AWS's, preface's by default) fails: proxy_command = \"proxy\""
                .to_owned()
        }
        (HeaderFormat::Spp, _) => "preface's check sends spp with its own address, and passes".to_owned(),
        (HeaderFormat::V1, _) => "preface's check sends v1 with its own address, and passes".to_owned(),
    }
}

/// The handshake of protocol 10, the only one since 1998.
fn is_mysql(greeting: &[u8]) -> bool {
    greeting.len() > 5 && greeting[1..5] == [0, 0, 0, 10]
}

/// Why the advice for an optional header is to send one.
pub const OPTIONAL: &str =
    "without preface's header every client could write one of its own, and be taken for whom it likes";

/// Where a change belongs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// The upstream's own table, or its pool.
    Upstream,
    /// `[pools.NAME.health_check]`
    HealthCheck,
}

/// Something that cannot work, and the line that makes it work.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// What is wrong.
    pub what: String,
    /// Whose key.
    pub place: Place,
    /// The key to change.
    pub key: &'static str,
    /// Its new value; `None`: take it out.
    pub value: Option<&'static str>,
}

/// What the file says of one upstream.
#[derive(Clone, Debug)]
pub struct Configured {
    /// `None`: no header.
    pub version: Option<HeaderFormat>,
    /// TLVs go with it.
    pub tlvs: bool,
    /// The check on this port, if there is one.
    pub check: Option<HealthCheck>,
}

impl Configured {
    /// In a column of a table.
    pub fn describe(&self) -> String {
        format!("{}{}", word(self.version), if self.tlvs { " + TLVs" } else { "" })
    }
}

/// What traffic meets, then what checks meet. Nothing without a conclusion.
pub fn problems(configured: &Configured, diagnosis: &Diagnosis) -> Vec<Problem> {
    let traffic = traffic(configured, diagnosis);
    let check = match &configured.check {
        // The change for the traffic changes the check too.
        Some(check) if traffic.is_none() || check.proxy_protocol != CheckHeader::Same => {
            check_problem(check, configured.version, diagnosis)
        }
        _ => None,
    };
    traffic.into_iter().chain(check).collect()
}

fn traffic(configured: &Configured, diagnosis: &Diagnosis) -> Option<Problem> {
    let wanted = version(&diagnosis.expects)?;
    let change =
        |what: String| Some(Problem { what, place: Place::Upstream, key: "proxy_protocol", value: Some(word(wanted)) });
    let says = |attempt| diagnosis.outcome(attempt).map_or_else(String::new, |outcome| outcome.describe());
    let fails = if diagnosis.is_of_datagrams() { "every datagram is lost" } else { "every connection fails" };
    match (&diagnosis.expects, configured.version) {
        (Expectation::NoHeader, Some(version)) => {
            change(format!("it expects no header and gets {}: {fails} ({})", version.as_str(), says(Try::of(version))))
        }
        (Expectation::Required(_), None) => {
            change(format!("it requires a header and gets none: {fails} ({})", says(Try::Bare)))
        }
        (Expectation::Optional(_), None) => change(format!("it takes a header and gets none: {OPTIONAL}")),
        (Expectation::Required(takes) | Expectation::Optional(takes), Some(version)) if !takes.version(version) => {
            change(format!("it refuses {}: {}", version.as_str(), says(Try::of(version))))
        }
        (Expectation::Required(takes) | Expectation::Optional(takes), Some(HeaderFormat::V2))
            if configured.tlvs && !takes.tlvs =>
        {
            let what = format!("it refuses the header with these TLVs: {}", says(Try::Tlvs));
            Some(Problem { what, place: Place::Upstream, key: "tlvs", value: None })
        }
        _ => None,
    }
}

/// Which try is what this check sends.
pub fn sent_by(check: &HealthCheck, traffic: Option<HeaderFormat>) -> Try {
    let version = match check.proxy_protocol {
        CheckHeader::Off => None,
        CheckHeader::Same => traffic,
        CheckHeader::Format(format) => Some(format),
    };
    match (version, check.proxy_command) {
        (None, _) => Try::Bare,
        (Some(HeaderFormat::V1), CheckCommand::Unknown) => Try::Unknown,
        (Some(HeaderFormat::V1), _) => Try::V1,
        (Some(HeaderFormat::V2), CheckCommand::Proxy) => Try::V2,
        (Some(HeaderFormat::V2), _) => Try::Local,
        (Some(HeaderFormat::Spp), _) => Try::Spp,
    }
}

fn check_problem(check: &HealthCheck, version: Option<HeaderFormat>, diagnosis: &Diagnosis) -> Option<Problem> {
    let sent = sent_by(check, version);
    let outcome = diagnosis.outcome(sent)?;
    let asks_nothing = matches!(&check.probe, Probe::Tcp { send, expect } if send.is_empty() && expect.is_empty());
    // Silence is good enough for these.
    if matches!(&check.probe, Probe::Udp { expect, .. } if expect.is_empty()) {
        return None;
    }
    if outcome.is_answered()
        || super::advice::version(&diagnosis.expects).is_none()
        || sent == Try::Bare && asks_nothing
    {
        return None;
    }
    let effect = match asks_nothing {
        true => "each check is an error to it",
        false => "every check fails",
    };
    let what = match sent {
        Try::Bare => format!("its check sends no header, and one is required: {effect} ({})", outcome.describe()),
        _ => format!("its check sends {}, which it refuses: {effect} ({})", sent.name(), outcome.describe()),
    };
    let place = Place::HealthCheck;
    let traffic_is_right =
        takes(&diagnosis.expects).zip(version).is_some_and(|(takes, version)| takes.version(version));
    Some(match (takes(&diagnosis.expects), sent) {
        (None, _) => Problem { what, place, key: "proxy_protocol", value: Some("off") },
        (Some(takes), Try::Local) if takes.v2 => Problem { what, place, key: "proxy_command", value: Some("proxy") },
        (Some(takes), Try::Unknown) if takes.v1 => Problem { what, place, key: "proxy_command", value: Some("local") },
        (Some(_), _) if traffic_is_right => Problem { what, place, key: "proxy_protocol", value: Some("same") },
        (Some(takes), _) => Problem { what, place, key: "proxy_protocol", value: Some(takes.best().as_str()) },
    })
}
