//! PURE. `[listeners.NAME]`: from the table to a `Listener`, and the addresses of all of them beside each other.

use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;

use super::error::Diagnostic;
use super::file::{Section, Span, Text};
use super::{Admin, AdminBind, Bind, Listener, address, tlvs};

/// Longest name of a listener or pool: it stands in metrics, log lines and URLs.
const NAME_BYTES_MAX: usize = 64;

/// A listener and where its parts stand in the file.
#[derive(Debug)]
pub(super) struct WrittenListener<'a> {
    pub(super) listener: Listener,
    pub(super) name: Span,
    /// As many as `listener.binds`.
    pub(super) binds: Vec<Text<'a>>,
    pub(super) pool: Option<Text<'a>>,
    pub(super) tlvs: Section<'a>,
}

/// Reads one table.
pub(super) fn read<'a>(section: &Section<'a>) -> WrittenListener<'a> {
    let what = format!("listener {:?}", section.name);
    check_name(section, "listener");
    section.require("bind", &what);
    section.require("pool", &what);
    section.word("protocol");

    let (mut binds, mut texts) = (Vec::new(), Vec::new());
    let written = section.texts("bind");
    if let (Some(span), true) = (section.written("bind"), written.is_empty()) {
        section.note(Diagnostic::error(&span, format!("{what} has no address")).label("empty").if_whole());
    }
    for text in written {
        match address::bind(&text) {
            Ok(bind) => {
                if bind.address.port() == 0 {
                    let warning =
                        Diagnostic::warning(&text.span, format!("{what} listens on a port that the system chooses"));
                    section.note(warning.label("port 0").help("another one at each start: clients need a fixed port"));
                }
                binds.push(bind);
                texts.push(text);
            }
            Err(diagnostic) => section.note(diagnostic),
        }
    }
    let allow = networks(section, "allow");
    if let (Some(span), true) = (section.written("allow"), section.texts("allow").is_empty()) {
        let diagnostic = Diagnostic::error(&span, format!("{what} lets nobody connect")).label("an empty list");
        section.note(diagnostic.help("leave \"allow\" out to let everybody connect, or list networks"));
    }
    let pool = section.text("pool");
    let tlvs_section = section.table("tlvs");
    let listener = Listener {
        name: section.name.to_owned(),
        binds,
        pool: pool.as_ref().map_or_else(String::new, |text| text.value.to_owned()),
        idle_timeout: section.duration("idle_timeout"),
        keepalive: section.duration_or_off("keepalive"),
        max_connections: section.size("max_connections"),
        max_connections_per_source: section.size("max_connections_per_source"),
        allow,
        deny: networks(section, "deny"),
        tlvs: tlvs::read(&tlvs_section),
    };
    WrittenListener { listener, name: section.span.clone(), binds: texts, pool, tlvs: tlvs_section }
}

/// A name that can stand in a metric's label, a log line and a URL without quoting.
pub(super) fn check_name(section: &Section<'_>, what: &str) {
    let name = section.name;
    let allowed = |b: u8| b.is_ascii_alphanumeric() || b"-_.".contains(&b);
    let first = name.bytes().next().is_some_and(|b| b.is_ascii_alphanumeric());
    if first && name.len() <= NAME_BYTES_MAX && name.bytes().all(allowed) {
        return;
    }
    let diagnostic = Diagnostic::error(&section.span, format!("{name:?} cannot be the name of a {what}"));
    section.note(diagnostic.help(format!(
        "a name has letters, digits, \"-\", \"_\" and \".\", begins with a letter or digit, and has {NAME_BYTES_MAX} characters at most"
    )));
}

fn networks(section: &Section<'_>, key: &str) -> Vec<IpNet> {
    let mut networks = Vec::<IpNet>::new();
    for text in section.texts(key) {
        let Some(network) = address::network(section, &text) else { continue };
        if networks.contains(&network) {
            section.note(Diagnostic::warning(&text.span, format!("{:?} stands twice in {key:?}", text.value)));
        } else {
            networks.push(network);
        }
    }
    networks
}

/// One address of the whole file.
#[derive(Clone, Debug)]
struct Bound {
    bind: Bind,
    span: Span,
    written: String,
    /// The listener's index; `None`: the admin API.
    listener: Option<usize>,
}

/// Refuses addresses that stand twice, and decides which `[::]` sockets are for IPv6 alone.
pub(super) fn resolve_binds(
    file: &Section<'_>,
    listeners: &mut [WrittenListener<'_>],
    admin: &Admin,
    admin_span: &Span,
) {
    let mut all: Vec<Bound> = Vec::new();
    if let AdminBind::Tcp(address) = admin.bind
        && address.port() != 0
    {
        let bind = Bind { address, any: false, v6only: false };
        all.push(Bound { bind, span: admin_span.clone(), written: address.to_string(), listener: None });
    }
    for (index, written) in listeners.iter().enumerate() {
        for (bind, text) in written.listener.binds.iter().zip(&written.binds) {
            let (span, written) = (text.span.clone(), text.value.to_owned());
            all.push(Bound { bind: *bind, span, written, listener: Some(index) });
        }
    }
    all.sort_by_key(|bound| bound.span.start);
    for (index, second) in all.iter().enumerate() {
        if let Some(first) = all[..index].iter().find(|first| collide(first, second)) {
            let message = format!("address {:?} is bound twice", second.written);
            let label = format!("{} has it already", owner(listeners, first));
            let diagnostic =
                Diagnostic::error(&second.span, message).label(format!("{} wants it", owner(listeners, second)));
            let help = match (first.bind.any, second.bind.any) {
                (true, false) if first.written != second.written => {
                    format!("{:?} is every IPv4 and every IPv6 address", first.written)
                }
                (false, true) if first.written != second.written => {
                    format!("{:?} is every IPv4 and every IPv6 address", second.written)
                }
                _ => "one address serves one listener: give the other one another port or address".to_owned(),
            };
            file.note(diagnostic.also(&first.span, label).help(help));
        }
    }
    for index in 0..listeners.len() {
        let (binds, texts) = (listeners[index].listener.binds.clone(), listeners[index].binds.clone());
        for (at, (bind, text)) in binds.iter().zip(&texts).enumerate() {
            let v4 = |bound: &&Bound| bound.bind.address.is_ipv4() && bound.bind.address.port() == bind.address.port();
            let all_v6 = bind.address.ip().is_unspecified() && bind.address.is_ipv6() && !bind.any;
            let Some(other) = all.iter().find(v4).filter(|_| all_v6 && bind.address.port() != 0) else { continue };
            listeners[index].listener.binds[at].v6only = true;
            let covered = all.iter().any(|bound| v4(&bound) && bound.bind.address.ip().is_unspecified());
            if !covered {
                let message = format!("{:?} takes IPv6 alone here", text.value);
                let diagnostic = Diagnostic::warning(&text.span, message);
                file.note(diagnostic.also(&other.span, "because this binds an IPv4 address on the same port").help(
                    format!(
                        "for the other IPv4 addresses write \":{}\" in its place, or add \"0.0.0.0:{}\"",
                        bind.address.port(),
                        bind.address.port()
                    ),
                ));
            }
        }
    }
}

/// Whether the system or the operator could not tell the two apart. A wildcard and one address on the same port are
/// fine among listeners: the more specific socket is preferred. The admin API shares no port with a wildcard.
fn collide(a: &Bound, b: &Bound) -> bool {
    let same = a.bind.address == b.bind.address;
    let every_v4 = |any: &Bound, other: &Bound| {
        let v4: IpAddr = [0, 0, 0, 0].into();
        any.bind.any && other.bind.address == SocketAddr::new(v4, any.bind.address.port())
    };
    let admin = a.listener.is_none() || b.listener.is_none();
    let within = address::covers(&a.bind, b.bind.address) || address::covers(&b.bind, a.bind.address);
    same || every_v4(a, b) || every_v4(b, a) || (admin && within)
}

fn owner(listeners: &[WrittenListener<'_>], bound: &Bound) -> String {
    match bound.listener {
        Some(index) => format!("listener {:?}", listeners[index].listener.name),
        None => "the admin API".to_owned(),
    }
}
