//! PURE. `[pools.NAME.health_check]`: what is asked, how often, and behind which header.

use super::error::Diagnostic;
use super::file::Section;
use super::pool::format;
use super::{CheckCommand, CheckHeader, HeaderFormat, HealthCheck, Probe, Upstream, UpstreamAddress};

/// Question or expected answer of a check.
const PAYLOAD_BYTES_MAX: usize = 4_096;
/// Request target or host.
const TARGET_BYTES_MAX: usize = 2_048;
/// Parts of `expect_status`.
const STATUS_RANGES_MAX: usize = 64;

/// Reads the table of a pool, if there is one.
pub(super) fn read(pool: &Section<'_>, upstreams: &[Upstream]) -> Option<HealthCheck> {
    let section = pool.table("health_check");
    if !section.is_written() {
        return None;
    }
    let port = section.integer("port").map(|port| u16::try_from(port).expect("limited to 16 bits"));
    let check = HealthCheck {
        probe: probe(&section),
        interval: section.duration("interval"),
        timeout: section.duration("timeout"),
        healthy_threshold: section.count("healthy_threshold"),
        unhealthy_threshold: section.count("unhealthy_threshold"),
        port,
        proxy_protocol: header(&section, port, upstreams),
        proxy_command: match section.word("proxy_command") {
            "proxy" => CheckCommand::Proxy,
            "unknown" => CheckCommand::Unknown,
            // Receivers of datagrams know PROXY; Knot refuses LOCAL.
            "" if section.text_is("protocol", "udp") => CheckCommand::Proxy,
            _ => CheckCommand::Local,
        },
    };
    if check.timeout > check.interval {
        let span = section.written("timeout").unwrap_or_else(|| section.span_of("interval"));
        let (timeout, interval) =
            (humantime::format_duration(check.timeout), humantime::format_duration(check.interval));
        let diagnostic =
            Diagnostic::warning(&span, format!("a check may take {timeout}, longer than its interval {interval}"));
        section.note(diagnostic.help("checks of one upstream do not overlap: a slow one delays the next"));
    }
    check_command(&section, &check, upstreams);
    check_unix(&section, &check, upstreams);
    check_header_fits(&section, &check, upstreams);
    Some(check)
}

fn probe(section: &Section<'_>) -> Probe {
    let protocol = section.word("protocol");
    let (own, other): (&[&str], &[&str]) = (&["send", "expect"], &["path", "host", "expect_status"]);
    // A protocol that could not be read says nothing about which keys belong to it.
    let known = !section.word_is_wrong("protocol");
    for key in if protocol == "http" { own } else { other } {
        if let (Some(span), true) = (section.written(key), known) {
            let belongs = if protocol == "http" { "tcp and udp" } else { "http" };
            let message = format!("{key:?} is for {belongs} checks, and this one is {protocol}");
            section.note(Diagnostic::error(&span, message).help(match protocol {
                "http" => "a check with protocol = \"http\" has path, host and expect_status",
                _ => "write protocol = \"http\", or use send and expect",
            }));
        }
    }
    let path = target(section, "path").unwrap_or_else(|| "/".to_owned());
    let host = target(section, "host");
    let expect_status = statuses(section);
    let (send, expect) = (payload(section, "send"), payload(section, "expect"));
    match protocol {
        "http" => Probe::Http { path, host, expect_status },
        "udp" => {
            if let (Some(span), None) = (section.written("expect"), section.written("send")) {
                let diagnostic = Diagnostic::warning(&span, "this check expects an answer to an empty datagram");
                section.note(diagnostic.help("few servers answer one: write a question into \"send\""));
            }
            Probe::Udp { send, expect }
        }
        _ => Probe::Tcp { send, expect },
    }
}

fn target(section: &Section<'_>, key: &str) -> Option<String> {
    let text = section.text(key)?;
    let problem = match text.value {
        value if value.len() > TARGET_BYTES_MAX => format!("must not be longer than {TARGET_BYTES_MAX} bytes"),
        value if !value.bytes().all(|b| b.is_ascii_graphic()) => {
            "must not contain spaces, control characters or anything beyond ASCII".to_owned()
        }
        value if key == "path" && !value.starts_with('/') => "must begin with \"/\"".to_owned(),
        value if key == "path" && value.contains('#') => "must not contain \"#\": a fragment is never sent".to_owned(),
        value if key == "host" && (value.is_empty() || value.contains(['/', '@', '?', '#'])) => {
            "must be a host name, with a port where it needs one".to_owned()
        }
        value => return Some(value.to_owned()),
    };
    section.note(Diagnostic::error(&text.span, format!("{key:?} {problem}")));
    None
}

fn payload(section: &Section<'_>, key: &str) -> Vec<u8> {
    let Some(text) = section.text(key) else { return Vec::new() };
    if !(1..=PAYLOAD_BYTES_MAX).contains(&text.value.len()) {
        let diagnostic = Diagnostic::error(&text.span, format!("{key:?} must have 1 to {PAYLOAD_BYTES_MAX} bytes"));
        section.note(diagnostic.label(format!("{} bytes", text.value.len())));
        return Vec::new();
    }
    text.value.as_bytes().to_vec()
}

fn statuses(section: &Section<'_>) -> Vec<(u16, u16)> {
    let text = section.text("expect_status").expect("it has a default");
    let code = |text: &str| text.trim().parse::<u16>().ok().filter(|code| (100..=599).contains(code));
    let range = |part: &str| {
        let (low, high) = part.split_once('-').unwrap_or((part, part));
        Some((code(low)?, code(high)?)).filter(|(low, high)| low <= high)
    };
    let ranges: Vec<_> = text.value.split(',').map(range).collect();
    match ranges.iter().copied().collect::<Option<Vec<_>>>() {
        Some(ranges) if ranges.len() <= STATUS_RANGES_MAX => ranges,
        _ => {
            let diagnostic = Diagnostic::error(&text.span, "\"expect_status\" must be status codes from 100 to 599");
            section.note(diagnostic.help("codes and ranges: \"200\", \"200-399\", \"200,204,301-302\""));
            Vec::new()
        }
    }
}

/// On the traffic port a check speaks as the traffic does; on another port, where something else listens, plainly.
fn header(section: &Section<'_>, port: Option<u16>, upstreams: &[Upstream]) -> CheckHeader {
    let other_port = port.is_some_and(|port| {
        upstreams.iter().any(|upstream| !matches!(upstream.address, UpstreamAddress::Ip(_, Some(own)) if own == port))
    });
    let traffic_has_header = upstreams.iter().any(|upstream| upstream.proxy_protocol.is_some());
    let span = section.span_of("proxy_protocol");
    match section.word("proxy_protocol") {
        "" if other_port => CheckHeader::Off,
        "" => CheckHeader::Same,
        "same" => {
            if other_port && traffic_has_header {
                let diagnostic = Diagnostic::warning(&span, "this check sends the traffic's header to another port");
                let diagnostic = diagnostic.also(&section.span_of("port"), "not the traffic's port");
                section.note(diagnostic.label("is a header expected there?").help(
                    "most health ports expect none: leave \"proxy_protocol\" out, which means \"off\" on another port; or write \"v1\" or \"v2\" to be explicit",
                ));
            }
            CheckHeader::Same
        }
        "off" => {
            if !other_port && traffic_has_header {
                let diagnostic = Diagnostic::warning(&span, "this check sends no header to a port that expects one");
                section.note(diagnostic.help(
                    "an upstream that expects a header logs each such check as broken, or fails it: leave \"proxy_protocol\" out",
                ));
            }
            CheckHeader::Off
        }
        word => format(word).map_or(CheckHeader::Off, CheckHeader::Format),
    }
}

fn check_command(section: &Section<'_>, check: &HealthCheck, upstreams: &[Upstream]) {
    let Some(span) = section.written("proxy_command") else { return };
    if section.word_is_wrong("proxy_protocol") {
        return;
    }
    let sends = |format| sends(check, upstreams, format);
    let (v1, v2, spp) = (sends(HeaderFormat::V1), sends(HeaderFormat::V2), sends(HeaderFormat::Spp));
    let error = match check.proxy_command {
        CheckCommand::Unknown if !v1 && v2 => Some((
            "\"unknown\" is a word of v1, and these checks send v2",
            "write \"local\": it says the same in v2, that the check speaks for itself",
        )),
        CheckCommand::Unknown | CheckCommand::Local if !v1 && !v2 && spp => Some((
            "these checks send spp, which can name nothing but their own addresses",
            "leave \"proxy_command\" out",
        )),
        _ => None,
    };
    if let Some((message, help)) = error {
        section.note(Diagnostic::error(&span, message).help(help));
    } else if check.proxy_command != CheckCommand::Local && !v1 && !v2 && !spp && !upstreams.is_empty() {
        section.note(
            Diagnostic::warning(&span, "\"proxy_command\" has no effect: these checks send no header").if_whole(),
        );
    }
}

/// A UNIX upstream has no port, and takes streams.
fn check_unix(section: &Section<'_>, check: &HealthCheck, upstreams: &[Upstream]) {
    let is_unix = |upstream: &&Upstream| matches!(upstream.address, UpstreamAddress::Unix(_));
    let Some(upstream) = upstreams.iter().find(is_unix).map(Upstream::to_string) else { return };
    if check.port.is_some() {
        let message = format!("upstream {upstream:?} has no port that a check could go to");
        let diagnostic = Diagnostic::error(&section.span_of("port"), message);
        section.note(diagnostic.help("leave \"port\" out, or give the UNIX socket a pool of its own"));
    }
    if matches!(check.probe, Probe::Udp { .. }) {
        let message = format!("this check is udp, and upstream {upstream:?} takes streams");
        let diagnostic = Diagnostic::error(&section.span_of("protocol"), message);
        section.note(diagnostic.help("write protocol = \"tcp\" or \"http\""));
    }
}

/// Does some check of these upstreams send this header?
fn sends(check: &HealthCheck, upstreams: &[Upstream], format: HeaderFormat) -> bool {
    match check.proxy_protocol {
        CheckHeader::Off => false,
        // Where spp cannot stand, "same" means none.
        CheckHeader::Same if format == HeaderFormat::Spp && !matches!(check.probe, Probe::Udp { .. }) => false,
        CheckHeader::Same => upstreams.iter().any(|upstream| upstream.proxy_protocol == Some(format)),
        CheckHeader::Format(own) => own == format,
    }
}

/// v1 has no form for datagrams, and spp no other.
fn check_header_fits(section: &Section<'_>, check: &HealthCheck, upstreams: &[Upstream]) {
    let is_udp = matches!(check.probe, Probe::Udp { .. });
    let message = match check.proxy_protocol {
        CheckHeader::Format(HeaderFormat::V1) if is_udp => "v1 has no form for UDP, and this check is udp",
        CheckHeader::Same if is_udp && sends(check, upstreams, HeaderFormat::V1) => {
            "this check is udp and sends the traffic's header, v1, which has no form for UDP"
        }
        CheckHeader::Format(HeaderFormat::Spp) if !is_udp => "spp is for UDP alone, and this check is not udp",
        _ => return,
    };
    let key = if section.written("proxy_protocol").is_some() { "proxy_protocol" } else { "protocol" };
    let diagnostic = Diagnostic::error(&section.span_of(key), message);
    section.note(diagnostic.help("write proxy_protocol = \"v2\" or \"off\" in this table"));
}
