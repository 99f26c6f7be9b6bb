//! PURE. From the file as written to a `Config`, or to every error that it has: the tables that stand alone, and what
//! listeners and pools must be to each other.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;

use toml::de::DeTable;

use super::error::{Diagnostic, Diagnostics, Errors, Severity};
use super::file::{Notes, Section, Span, Text, nearest, quoted};
use super::hints::Surroundings;
use super::listener::WrittenListener;
use super::pool::{WrittenPool, WrittenUpstream};
use super::tlvs::Levels;
use super::{
    Admin, AdminBind, Bind, Config, HeaderFormat, Log, LogConnections, LogFormat, Parsed, Protocol, Runtime, UdpHeader,
    UpstreamAddress, address, hints, level, listener, pool, tlvs,
};
use crate::address::Address;

/// Reads the whole text.
pub(super) fn parse(file_name: &str, text: &str, around: &Surroundings) -> Result<Parsed, Errors> {
    let (document, syntax_errors) = DeTable::parse_recoverable(text);
    let notes = Notes::default();
    for error in &syntax_errors {
        notes.push(syntax_error(text, error));
    }
    let config = if text.trim().is_empty() {
        notes.push(
            Diagnostic::file_error("the file is empty")
                .help("an empty file is never a configuration: at least a listener and a pool are needed"),
        );
        None
    } else {
        Some(read(&Section::file(&notes, document.get_ref()), around))
    };
    let mut list = notes.into_list();
    if !syntax_errors.is_empty() {
        list.retain(|diagnostic| !diagnostic.needs_whole_file);
    }
    let (errors, warnings): (Vec<_>, Vec<_>) =
        list.into_iter().partition(|diagnostic| diagnostic.severity == Severity::Error);
    match config {
        Some(config) if errors.is_empty() => {
            Ok(Parsed { config, warnings: Diagnostics::new(file_name, text, warnings) })
        }
        _ => Err(Errors::new(Diagnostics::new(file_name, text, errors))),
    }
}

/// `admin.bind` of a file that may be broken elsewhere.
pub(super) fn lenient_admin_bind(text: &str) -> Option<AdminBind> {
    let (document, _) = DeTable::parse_recoverable(text);
    let value = document.get_ref().get("admin")?.get_ref().get("bind")?;
    let value = Text { value: value.get_ref().as_str()?, span: value.span() };
    address::admin_bind(&value).ok()
}

fn syntax_error(text: &str, error: &toml::de::Error) -> Diagnostic {
    let Some(span) = error.span() else {
        return Diagnostic::file_error(format!("not valid TOML: {}", error.message()));
    };
    let at = text.get(span.clone()).unwrap_or("").trim_matches('"');
    if error.message() == "duplicate key" {
        let diagnostic = Diagnostic::error(&span, format!("{at:?} is defined twice")).label("again");
        return diagnostic.help("a table or key stands once in a file: rename or remove one of the two");
    }
    let message = format!("not valid TOML: {}", error.message().replace('\n', "; "));
    // An error at the end of the file has nothing to underline: show the last line that has something.
    let end = text.trim_end().len();
    let span = if span.start >= end { end.saturating_sub(1)..end } else { span };
    let diagnostic = Diagnostic::error(&span, message);
    let line = text[..span.start].rfind('\n').map_or(0, |end| end + 1);
    let line = text[line..].lines().next().unwrap_or_default();
    match error.message().contains("must be quoted") && !at.is_empty() {
        _ if line.contains(address::TYPOGRAPHIC_QUOTES) => {
            diagnostic.help("these are typographic quotes: write \" instead, on both sides")
        }
        true => diagnostic.help(format!("write {at:?}")),
        false => diagnostic,
    }
}

fn read(file: &Section<'_>, around: &Surroundings) -> Config {
    let runtime = runtime(&file.table("runtime"));
    let log = log(&file.table("log"));
    let admin_section = file.table("admin");
    let admin = admin(&admin_section);
    let mut listeners: Vec<_> = file.named("listeners").iter().map(listener::read).collect();
    let pools: Vec<_> = file.named("pools").iter().map(pool::read).collect();
    if listeners.is_empty() && (file.written("listeners").is_none() || pools.is_empty()) {
        let diagnostic = Diagnostic::file_error("no listener is defined").if_whole();
        file.note(diagnostic.help("write [listeners.web] with bind = \":80\" and pool = \"NAME\", and [pools.NAME] with upstreams = [\"10.0.0.30:80\"]"));
    }
    listener::resolve_binds(file, &mut listeners, &admin, &admin_section);
    for written in &listeners {
        check_pool_of(file, written, &pools);
    }
    for written in &pools {
        check_pool(file, written, &listeners);
        let hint = |(upstream, place): (&super::Upstream, &WrittenUpstream<'_>)| {
            hints::upstream(&place.address, &upstream.address, around)
        };
        written.pool.upstreams.iter().zip(&written.upstreams).filter_map(hint).for_each(|hint| file.note(hint));
        let sources = written.pool.source.iter().zip(&written.sources);
        sources.filter_map(|(ip, text)| hints::source(text, *ip, around)).for_each(|hint| file.note(hint));
    }
    let listeners = listeners.into_iter().map(|w| (w.listener.name.clone(), Arc::new(w.listener))).collect();
    let pools = pools.into_iter().map(|w| (w.pool.name.clone(), Arc::new(w.pool))).collect();
    Config { runtime, log, admin, listeners, pools }
}

fn runtime(section: &Section<'_>) -> Runtime {
    Runtime {
        workers: section.size("workers"),
        pin_workers: section.boolean("pin_workers").unwrap_or(false),
        max_connections: section.size("max_connections"),
        stop_delay: section.duration("stop_delay"),
        stop_timeout: section.duration("stop_timeout"),
    }
}

fn log(section: &Section<'_>) -> Log {
    let level = section.text("level").expect("it has a default");
    for error in level::errors(level.value) {
        section.note(Diagnostic::error(&level.span, error.what).help(error.advice));
    }
    Log {
        level: level.value.to_owned(),
        format: match section.word("format") {
            "json" => LogFormat::Json,
            _ => LogFormat::Text,
        },
        connections: match section.word("connections") {
            "errors" => LogConnections::Errors,
            "off" => LogConnections::Off,
            "start_and_end" => LogConnections::StartAndEnd,
            _ => LogConnections::All,
        },
    }
}

fn admin(section: &Section<'_>) -> Admin {
    let text = section.text("bind").expect("it has a default");
    let bind = address::admin_bind(&text).unwrap_or_else(|diagnostic| {
        section.note(*diagnostic);
        AdminBind::Tcp(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)))
    });
    let token_file = section.text("token_file").and_then(|text| match text.value {
        "" => {
            section.note(Diagnostic::error(&text.span, "\"token_file\" must be the path of a file").label("empty"));
            None
        }
        path => Some(PathBuf::from(path)),
    });
    if let (AdminBind::Tcp(address), None) = (&bind, section.written("token_file"))
        && !address.ip().is_loopback()
    {
        let message = format!("the admin API on {:?} needs a \"token_file\"", text.value);
        let diagnostic = Diagnostic::error(&text.span, message).label("not a loopback address").if_whole();
        section.note(diagnostic.help("whoever can connect could drain production: write token_file = \"/etc/preface/token\", or bind a loopback address or \"unix:/run/preface/admin.sock\""));
    }
    let probe_bind = section
        .text("probe_bind")
        .and_then(|text| address::probe_bind(&text).map_err(|diagnostic| section.note(*diagnostic)).ok());
    Admin { bind, probe_bind, token_file }
}

/// What a listener needs of its pool.
fn check_pool_of(file: &Section<'_>, written: &WrittenListener<'_>, pools: &[WrittenPool<'_>]) {
    let Some(text) = &written.pool else { return };
    let Some(pool) = pools.iter().find(|pool| pool.pool.name == text.value) else {
        let names: Vec<&str> = pools.iter().map(|pool| pool.pool.name.as_str()).collect();
        let diagnostic = Diagnostic::error(&text.span, format!("no pool named {:?}", text.value)).if_whole();
        return file.note(match nearest(text.value, &names) {
            Some(near) => diagnostic.label("not defined").help(format!("did you mean {near:?}?")),
            None if names.is_empty() => diagnostic
                .label("the file defines no pool")
                .help(format!("write [pools.{}] with upstreams = [\"10.0.0.30:80\"]", text.value)),
            None => diagnostic.label("not defined").help(format!("defined pools: {}", quoted(&names))),
        });
    };
    if tlvs::any(&written.listener.tlvs) && !pool.takes_tlvs() {
        file.note(tlvs_without_v2(&written.tlvs, &format!("listener {:?}", written.listener.name), pool));
    }
    check_header_fits(file, written, pool);
    check_datagrams_fit(file, written, pool);
    check_loops_and_ports(file, written, pool);
}

/// v1 has no form for UDP, and Simple Proxy Protocol none for TCP.
fn check_header_fits(file: &Section<'_>, written: &WrittenListener<'_>, pool: &WrittenPool<'_>) {
    let listener = &written.listener;
    for (upstream, place) in pool.pool.upstreams.iter().zip(&pool.upstreams) {
        let (message, help) = match upstream.proxy_protocol {
            Some(HeaderFormat::V1) if listener.serves(Protocol::Udp) => (
                format!(
                    "listener {:?} serves UDP, and upstream {:?} gets a v1 header",
                    listener.name, place.address.value
                ),
                "v1 is a line of text for TCP, it has no form for UDP: write proxy_protocol = \"v2\", which such servers take on every datagram, or \"spp\"",
            ),
            Some(HeaderFormat::Spp) if listener.serves(Protocol::Tcp) => (
                format!(
                    "listener {:?} serves TCP, and upstream {:?} gets Simple Proxy Protocol",
                    listener.name, place.address.value
                ),
                "spp is for UDP alone: write proxy_protocol = \"v2\", or give TCP a pool of its own",
            ),
            _ => continue,
        };
        let span = place.proxy_protocol.as_ref().unwrap_or(&pool.proxy_protocol);
        let diagnostic = Diagnostic::error(span, message).if_whole();
        let protocol = written.protocol.as_ref().map_or(diagnostic.clone(), |at| diagnostic.clone().also(at, "here"));
        file.note(protocol.help(help));
        // One is enough where the pool decides for all of them.
        if place.proxy_protocol.is_none() {
            return;
        }
    }
}

/// A UNIX upstream takes streams.
fn check_datagrams_fit(file: &Section<'_>, written: &WrittenListener<'_>, pool: &WrittenPool<'_>) {
    if !written.listener.serves(Protocol::Udp) {
        return;
    }
    for (upstream, place) in pool.pool.upstreams.iter().zip(&pool.upstreams) {
        if let UpstreamAddress::Unix(_) = upstream.address {
            let (name, address) = (&written.listener.name, place.address.value);
            let message = format!("listener {name:?} serves UDP, and upstream {address:?} takes streams");
            let diagnostic = Diagnostic::error(&place.address.span, message).if_whole();
            let protocol =
                written.protocol.as_ref().map_or(diagnostic.clone(), |at| diagnostic.clone().also(at, "here"));
            file.note(protocol.help("give UDP a pool of IP addresses"));
        }
    }
}

fn tlvs_without_v2(section: &Section<'_>, whose: &str, pool: &WrittenPool<'_>) -> Diagnostic {
    let v1 = pool.pool.upstreams.iter().any(|upstream| upstream.proxy_protocol == Some(HeaderFormat::V1));
    let message =
        format!("the TLVs of {whose} would never be sent: no upstream of pool {:?} gets a v2 header", pool.pool.name);
    let diagnostic = Diagnostic::error(&section.span, message).label("only v2 carries TLVs").if_whole();
    diagnostic
        .also(&pool.proxy_protocol, if v1 { "v1 here" } else { "no header here" })
        .help("write proxy_protocol = \"v2\" in the pool, if its upstreams take that, or remove the TLVs")
}

/// Looks at each pair of a listener's address and an upstream of its pool.
fn check_loops_and_ports(file: &Section<'_>, written: &WrittenListener<'_>, pool: &WrittenPool<'_>) {
    for (upstream, place) in pool.pool.upstreams.iter().zip(&pool.upstreams) {
        for (bind, text) in written.listener.binds.iter().zip(&written.binds) {
            let port = bind.port().filter(|port| *port != 0);
            if upstream.address.takes_port() && port.is_none() {
                let message = format!(
                    "upstream {:?} has no port, and listener {:?} has none to give",
                    place.address.value, written.listener.name
                );
                let label = if bind.port().is_some() { "port 0" } else { "no port in the file" };
                file.note(
                    Diagnostic::error(&place.address.span, message)
                        .also(&text.span, label)
                        .help("write the upstream's port"),
                );
            } else if let Some(target) = upstream.address.at(port).filter(|target| is_itself(bind, target)) {
                let message =
                    format!("upstream {:?} is listener {:?} itself", place.address.value, written.listener.name);
                let diagnostic =
                    Diagnostic::warning(&place.address.span, message).label(format!("connects to {target}"));
                file.note(
                    diagnostic.also(&text.span, "which is taken here").help(
                        "such a connection comes back until the limits are reached: another port is probably meant",
                    ),
                );
            }
            let UpstreamAddress::Ip(ip, None) = upstream.address else { continue };
            let twin = |other: &super::Upstream| matches!(other.address, UpstreamAddress::Ip(own, Some(port)) if own == ip && bind.port() == Some(port));
            if let Some(at) = pool.pool.upstreams.iter().position(twin) {
                let message = format!(
                    "upstream {:?} stands twice in pool {:?} for listener {:?}",
                    place.address.value, pool.pool.name, written.listener.name
                );
                let means = bind.port().unwrap_or_default();
                let diagnostic =
                    Diagnostic::error(&place.address.span, message).label(format!("means port {means} there"));
                file.note(
                    diagnostic.also(&pool.upstreams[at].address.span, "the same address").also(&text.span, "the port"),
                );
            }
        }
    }
}

/// Would a connection to this upstream come back to this bind?
fn is_itself(bind: &Bind, target: &Address) -> bool {
    match (bind, target) {
        (Bind::Ip(bind), Address::Ip(target)) => {
            let wildcard_loop = bind.address.ip().is_unspecified() && target.ip().is_loopback();
            let is_same = wildcard_loop || bind.address.ip() == target.ip();
            bind.address.port() != 0 && is_same && address::covers(bind, *target)
        }
        (Bind::Unix(path), Address::Unix(target)) => path == target,
        _ => false,
    }
}

/// What a pool is to all listeners.
fn check_pool(file: &Section<'_>, written: &WrittenPool<'_>, listeners: &[WrittenListener<'_>]) {
    let pool = &written.pool;
    if tlvs::any(&pool.tlvs) && !written.takes_tlvs() {
        file.note(tlvs_without_v2(&written.tlvs, &format!("pool {:?}", pool.name), written));
    }
    for (upstream, place) in pool.upstreams.iter().zip(&written.upstreams) {
        let Some(section) = place.tlvs.as_ref().filter(|_| tlvs::any(&upstream.tlvs)) else { continue };
        if upstream.proxy_protocol != Some(HeaderFormat::V2) && !written.unclear {
            let gets = upstream.proxy_protocol.map_or("no header", HeaderFormat::as_str);
            let message = format!("upstream {:?} has TLVs, and gets {gets}", place.address.value);
            let diagnostic = Diagnostic::error(&section.span, message).label("only v2 carries TLVs");
            file.note(diagnostic.help("write proxy_protocol = \"v2\" for it, if it takes that, or remove its TLVs"));
        }
    }
    let users: Vec<_> = listeners.iter().filter(|listener| listener.listener.pool == pool.name).collect();
    check_protocols(file, written, &users);
    if users.is_empty() {
        let diagnostic = Diagnostic::warning(&written.name, format!("no listener uses pool {:?}", pool.name));
        file.note(diagnostic.label("never used").if_whole());
    }
    tlvs::check_headers(file, &headers(written, &users));
}

/// What is for the other protocol than the pool's listeners serve.
fn check_protocols(file: &Section<'_>, written: &WrittenPool<'_>, users: &[&WrittenListener<'_>]) {
    let serves = |protocol| users.is_empty() || users.iter().any(|user| user.listener.serves(protocol));
    let name = &written.pool.name;
    let idle = |span: &Span, key: &str, is_for: &str, serves: &str| {
        let message =
            format!("{key:?} is for {is_for} and has no effect: every listener of pool {name:?} serves {serves}");
        file.note(Diagnostic::warning(span, message).if_whole());
    };
    if written.pool.fast_open && !serves(Protocol::Tcp) {
        idle(&written.fast_open, "fast_open", "TCP", "UDP");
    }
    if written.pool.udp_header != UdpHeader::EveryDatagram && !serves(Protocol::Udp) {
        idle(&written.udp_header, "udp_header", "UDP", "TCP");
    }
}

/// The TLVs of every header that the pool's upstreams can get.
fn headers<'s, 'a>(written: &'s WrittenPool<'a>, users: &[&'s WrittenListener<'a>]) -> Vec<Levels<'s, 'a>> {
    let pool = &written.pool;
    let listeners: Vec<Option<&WrittenListener<'a>>> =
        if users.is_empty() { vec![None] } else { users.iter().copied().map(Some).collect() };
    let mut headers = Vec::new();
    for listener in listeners {
        let mut shared_is_in = false;
        for (upstream, place) in pool.upstreams.iter().zip(&written.upstreams) {
            let own = place.tlvs.as_ref().filter(|section| section.is_written());
            // Upstreams without TLVs of their own all get the same header.
            if upstream.proxy_protocol != Some(HeaderFormat::V2) || (own.is_none() && shared_is_in) {
                continue;
            }
            shared_is_in |= own.is_none();
            let from =
                listener.map_or_else(String::new, |listener| format!(" from listener {:?}", listener.listener.name));
            let to = own.map_or_else(String::new, |_| format!(" to {:?}", place.address.value));
            let levels = [
                own.map(|section| (&upstream.tlvs, section)),
                listener.map(|listener| (&listener.listener.tlvs, &listener.tlvs)),
                Some((&pool.tlvs, &written.tlvs)),
            ];
            headers.push(Levels { what: format!("the header{from} for pool {:?}{to}", pool.name), levels });
        }
    }
    headers
}
