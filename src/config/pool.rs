//! PURE. `[pools.NAME]` and its upstreams: from the table to a `Pool`.

use std::net::IpAddr;

use super::error::Diagnostic;
use super::file::{Element, Section, Span, Text};
use super::listener::check_name;
use super::{
    Balance, HeaderFormat, OnUnhealthy, Pool, Tlvs, UdpHeader, Upstream, UpstreamAddress, WhenNoneHealthy, address,
    health_check, tlvs,
};

/// Upstreams of one pool: its table of turns has no more places than a few for each.
pub const UPSTREAMS_MAX: usize = 1_024;

/// A pool and where its parts stand in the file.
#[derive(Debug)]
pub(super) struct WrittenPool<'a> {
    pub(super) pool: Pool,
    pub(super) name: Span,
    /// Where `proxy_protocol` stands, else the name.
    pub(super) proxy_protocol: Span,
    /// Where `fast_open` stands, and `udp_header`.
    pub(super) fast_open: Span,
    pub(super) udp_header: Span,
    pub(super) tlvs: Section<'a>,
    /// As many as `pool.source`.
    pub(super) sources: Vec<Text<'a>>,
    /// As many as `pool.upstreams`.
    pub(super) upstreams: Vec<WrittenUpstream<'a>>,
    /// Some upstream or version could not be read: nothing is said about who gets which header.
    pub(super) unclear: bool,
}

/// Where the parts of an upstream stand.
#[derive(Debug)]
pub(super) struct WrittenUpstream<'a> {
    pub(super) address: Text<'a>,
    /// `None`: written in the short form.
    pub(super) tlvs: Option<Section<'a>>,
    /// Where its own `proxy_protocol` stands.
    pub(super) proxy_protocol: Option<Span>,
    /// Its version could not be read.
    unclear: bool,
}

impl WrittenPool<'_> {
    /// Whether TLVs have a header to stand in, as far as the file tells.
    pub(super) fn takes_tlvs(&self) -> bool {
        self.unclear || self.pool.upstreams.iter().any(|upstream| upstream.proxy_protocol == Some(HeaderFormat::V2))
    }
}

/// What an upstream takes from its pool.
struct PoolDefaults {
    proxy_protocol: Option<HeaderFormat>,
    max_connections: usize,
}

/// Reads one table.
pub(super) fn read<'a>(section: &Section<'a>) -> WrittenPool<'a> {
    check_name(section, "pool");
    section.require("upstreams", &format!("pool {:?}", section.name), "[\"10.0.0.30:80\"]");
    let tlvs_section = section.table("tlvs");
    let defaults = PoolDefaults {
        proxy_protocol: format(section.word("proxy_protocol")),
        max_connections: section.size("max_connections"),
    };
    let (upstreams, places) = upstreams(section, &defaults);
    let (source, sources) = source(section, &upstreams, &places);
    let pool = Pool {
        name: section.name.to_owned(),
        balance: match section.word("balance") {
            "least_connections" => Balance::LeastConnections,
            "random_two" => Balance::RandomTwo,
            "source_hash" => Balance::SourceHash,
            _ => Balance::RoundRobin,
        },
        udp_header: match section.word("udp_header") {
            "first_datagram" => UdpHeader::FirstDatagram,
            "first_alone" => UdpHeader::FirstAlone,
            _ => UdpHeader::EveryDatagram,
        },
        source,
        connect_timeout: section.duration("connect_timeout"),
        connect_deadline: section.duration("connect_deadline"),
        retries: section.count("retries"),
        slow_start: section.duration("slow_start"),
        unhealthy_after_failed_connects: section.count("unhealthy_after_failed_connects"),
        drain_timeout: section.duration("drain_timeout"),
        on_unhealthy: match section.word("on_unhealthy") {
            "close" => OnUnhealthy::Close,
            _ => OnUnhealthy::Keep,
        },
        fast_open: section.boolean("fast_open").unwrap_or(false),
        when_none_healthy: match section.word("when_none_healthy") {
            "refuse" => WhenNoneHealthy::Refuse,
            _ => WhenNoneHealthy::UseAll,
        },
        health_check: health_check::read(section, &upstreams),
        tlvs: tlvs::read(&tlvs_section),
        upstreams,
    };
    check_connect_times(section, &pool);
    check_unix(section, &pool, &places);
    check_weights(section, &pool);
    let (name, proxy_protocol) = (section.span.clone(), section.span_of("proxy_protocol"));
    let all_read = section.list_len("upstreams") == places.len();
    let unclear = !all_read || section.word_is_wrong("proxy_protocol") || places.iter().any(|place| place.unclear);
    let [fast_open, udp_header] = ["fast_open", "udp_header"].map(|key| section.span_of(key));
    let (tlvs, upstreams) = (tlvs_section, places);
    WrittenPool { pool, name, proxy_protocol, fast_open, udp_header, tlvs, sources, upstreams, unclear }
}

/// `proxy_protocol` as written.
pub(super) fn format(word: &str) -> Option<HeaderFormat> {
    match word {
        "v1" => Some(HeaderFormat::V1),
        "v2" => Some(HeaderFormat::V2),
        "spp" => Some(HeaderFormat::Spp),
        _ => None,
    }
}

fn upstreams<'a>(section: &Section<'a>, defaults: &PoolDefaults) -> (Vec<Upstream>, Vec<WrittenUpstream<'a>>) {
    let (mut upstreams, mut places) = (Vec::<Upstream>::new(), Vec::<WrittenUpstream<'a>>::new());
    let Some(elements) = section.list("upstreams") else { return (upstreams, places) };
    let span = section.span_of("upstreams");
    if section.empty_list("upstreams").is_some() {
        let diagnostic = Diagnostic::error(&span, format!("pool {:?} has no upstream", section.name)).label("empty");
        section.note(diagnostic.help("list where connections go: upstreams = [\"10.0.0.30:80\"]"));
    }
    if elements.len() > UPSTREAMS_MAX {
        let message = format!("pool {:?} has more than {UPSTREAMS_MAX} upstreams", section.name);
        section.note(Diagnostic::error(&span, message).label(format!("{} upstreams", elements.len())));
        return (upstreams, places);
    }
    for element in elements {
        let (upstream, written) = match &element {
            Element::Table(table) => read_upstream(table, defaults),
            Element::Text(text) => {
                let upstream = parsed(section, text).map(|address| plain(address, defaults));
                (
                    upstream,
                    Some(WrittenUpstream { address: text.clone(), tlvs: None, proxy_protocol: None, unclear: false }),
                )
            }
        };
        let (Some(upstream), Some(written)) = (upstream, written) else { continue };
        let same = |known: &Upstream| known.address == upstream.address;
        if let Some(first) = upstreams.iter().position(same) {
            let message = format!("upstream {:?} stands twice in pool {:?}", written.address.value, section.name);
            let diagnostic = Diagnostic::error(&written.address.span, message).label("again");
            let diagnostic = diagnostic.also(&places[first].address.span, "first here");
            section.note(diagnostic.help("for a larger share of the connections give it a weight"));
            continue;
        }
        upstreams.push(upstream);
        places.push(written);
    }
    (upstreams, places)
}

fn parsed(section: &Section<'_>, text: &Text<'_>) -> Option<UpstreamAddress> {
    address::upstream(text).map_err(|diagnostic| section.note(*diagnostic)).ok()
}

fn plain(address: UpstreamAddress, defaults: &PoolDefaults) -> Upstream {
    let (proxy_protocol, max_connections) = (defaults.proxy_protocol, defaults.max_connections);
    Upstream { address, name: None, weight: 1, backup: false, proxy_protocol, max_connections, tlvs: Tlvs::default() }
}

fn read_upstream<'a>(table: &Section<'a>, defaults: &PoolDefaults) -> (Option<Upstream>, Option<WrittenUpstream<'a>>) {
    table.require("address", "an upstream", "\"10.0.0.30:80\"");
    let tlvs_section = table.table("tlvs");
    let tlvs = tlvs::read(&tlvs_section);
    let weight = table.count("weight");
    let backup = table.boolean("backup").unwrap_or(false);
    let proxy_protocol = match table.word("proxy_protocol") {
        "" => defaults.proxy_protocol,
        word => format(word),
    };
    let max_connections = match table.written("max_connections") {
        Some(_) => table.size("max_connections"),
        None => defaults.max_connections,
    };
    let Some(text) = table.text("address") else { return (None, None) };
    let upstream = parsed(table, &text);
    let upstream =
        upstream.map(|address| Upstream { address, name: None, weight, backup, proxy_protocol, max_connections, tlvs });
    let unclear = table.word_is_wrong("proxy_protocol");
    let proxy_protocol = table.written("proxy_protocol");
    (upstream, Some(WrittenUpstream { address: text, tlvs: Some(tlvs_section), proxy_protocol, unclear }))
}

fn source<'a>(
    section: &Section<'a>,
    upstreams: &[Upstream],
    places: &[WrittenUpstream<'_>],
) -> (Vec<IpAddr>, Vec<Text<'a>>) {
    let (mut sources, mut texts) = (Vec::new(), Vec::new());
    for text in section.texts("source") {
        match address::source(&text) {
            Ok(ip) if sources.contains(&ip) => {
                section.note(Diagnostic::error(&text.span, format!("{:?} stands twice in \"source\"", text.value)));
            }
            Ok(ip) => {
                sources.push(ip);
                texts.push(text);
            }
            Err(diagnostic) => section.note(*diagnostic),
        }
    }
    for (upstream, place) in upstreams.iter().zip(places) {
        let Some(ip) = upstream.address.ip() else { continue };
        let family = if ip.is_ipv4() { "IPv4" } else { "IPv6" };
        if !sources.is_empty() && !sources.iter().any(|source| source.is_ipv4() == ip.is_ipv4()) {
            let message =
                format!("upstream {:?} cannot be reached from the addresses in \"source\"", place.address.value);
            let diagnostic = Diagnostic::error(&place.address.span, message).label(format!("an {family} address"));
            let diagnostic = diagnostic.also(&section.span_of("source"), format!("no {family} address here"));
            section.note(diagnostic.help(format!("add an {family} address of this machine to \"source\"")).if_whole());
        }
    }
    (sources, texts)
}

fn check_connect_times(section: &Section<'_>, pool: &Pool) {
    if pool.connect_timeout <= pool.connect_deadline {
        return;
    }
    let (timeout, deadline) = (pool.connect_timeout, pool.connect_deadline);
    let (timeout, deadline) = (humantime::format_duration(timeout), humantime::format_duration(deadline));
    let message = format!("one attempt to connect ({timeout}) may take longer than all together ({deadline})");
    let key = if section.written("connect_timeout").is_some() { "connect_timeout" } else { "connect_deadline" };
    let diagnostic = Diagnostic::error(&section.span_of(key), message);
    section.note(diagnostic.help("raise \"connect_deadline\", or lower \"connect_timeout\""));
}

/// What has no effect on UNIX upstreams.
fn check_unix(section: &Section<'_>, pool: &Pool, places: &[WrittenUpstream<'_>]) {
    let is_unix = |upstream: &Upstream| matches!(upstream.address, UpstreamAddress::Unix(_));
    let Some(index) = pool.upstreams.iter().position(is_unix) else { return };
    let place = &places[index].address;
    for (key, is_set) in [("source", !pool.source.is_empty()), ("fast_open", pool.fast_open)] {
        if is_set {
            let message = format!("{key:?} is for TCP and has no effect on upstream {:?}", place.value);
            section.note(Diagnostic::warning(&section.span_of(key), message).also(&place.span, "a UNIX socket"));
        }
    }
}

fn check_weights(section: &Section<'_>, pool: &Pool) {
    if !pool.upstreams.is_empty() && pool.upstreams.iter().all(|upstream| upstream.weight == 0) {
        let message = format!("pool {:?} takes no new connections", section.name);
        let warning = Diagnostic::warning(&section.span, message).label("every upstream has weight 0");
        section.note(warning.help("give at least one a weight of 1 or more"));
    }
}
