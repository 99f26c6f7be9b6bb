//! PURE. `[listeners.NAME]`: from the table to a `Listener`, and the addresses of all of them beside each other.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use ipnet::IpNet;

use super::error::Diagnostic;
use super::file::{Section, Span, Text};
use super::{Admin, AdminBind, Bind, IpBind, Listener, Protocol, address, tlvs};

/// Longest name of a listener or pool: it stands in metrics, log lines and URLs.
const NAME_BYTES_MAX: usize = 64;
/// `idle_timeout` of UDP where it is not written: longer than DNS and QUIC leave a pause.
const IDLE_TIMEOUT_UDP: Duration = Duration::from_secs(120);

/// A listener and where its parts stand in the file.
#[derive(Debug)]
pub(super) struct WrittenListener<'a> {
    pub(super) listener: Listener,
    /// As many as `listener.binds`.
    pub(super) binds: Vec<Text<'a>>,
    pub(super) pool: Option<Text<'a>>,
    pub(super) tlvs: Section<'a>,
    /// Where `protocol` stands.
    pub(super) protocol: Option<Span>,
}

/// Reads one table.
pub(super) fn read<'a>(section: &Section<'a>) -> WrittenListener<'a> {
    let what = format!("listener {:?}", section.name);
    check_name(section, "listener");
    section.require("bind", &what, "\":80\"");
    section.require("pool", &what, "\"ingress\"");
    let mut protocols: Vec<Protocol> = section.words("protocol").into_iter().map(protocol).collect();
    protocols.sort();

    let (mut binds, mut texts) = (Vec::new(), Vec::new());
    if let Some(span) = section.empty_list("bind") {
        let diagnostic = Diagnostic::error(&span, format!("{what} has no address")).label("empty");
        section.note(diagnostic.help("write the port: bind = \":80\", or an address and a port"));
    }
    for text in section.texts("bind") {
        match address::bind(&text) {
            Ok(bind) => {
                if bind.port() == Some(0) {
                    let warning =
                        Diagnostic::warning(&text.span, format!("{what} listens on a port that the system chooses"));
                    section.note(warning.label("port 0").help("another one at each start: clients need a fixed port"));
                }
                binds.push(bind);
                texts.push(text);
            }
            Err(diagnostic) => section.note(*diagnostic),
        }
    }
    if let Some(span) = section.written("keepalive").filter(|_| protocols == [Protocol::Udp])
        && !section.text_is("keepalive", "off")
    {
        let message = format!("\"keepalive\" is for TCP and has no effect: {what} serves UDP");
        section.note(Diagnostic::warning(&span, message));
    }
    let allow = networks(section, "allow");
    if let Some(span) = section.empty_list("allow") {
        let diagnostic = Diagnostic::error(&span, format!("{what} lets nobody connect")).label("an empty list");
        section.note(diagnostic.help("leave \"allow\" out to let everybody connect, or list networks"));
    }
    check_unix(section, &what, binds.iter().zip(&texts), &protocols);
    if !protocols.contains(&Protocol::Udp) {
        for key in ["max_sessions", "responses"] {
            let Some(span) = section.written(key).filter(|_| section.size(key) > 0) else { continue };
            let diagnostic = Diagnostic::error(&span, format!("{key:?} is for UDP, and {what} serves TCP alone"));
            section.note(diagnostic.help("write protocol = \"udp\", or remove it").if_whole());
        }
    }
    let idle_timeout = section.duration("idle_timeout");
    let pool = section.text("pool");
    let tlvs_section = section.table("tlvs");
    let listener = Listener {
        name: section.name.to_owned(),
        binds,
        pool: pool.as_ref().map_or_else(String::new, |text| text.value.to_owned()),
        idle_timeout,
        idle_timeout_udp: match section.written("idle_timeout") {
            Some(_) if protocols.contains(&Protocol::Udp) => idle_timeout,
            _ => IDLE_TIMEOUT_UDP,
        },
        protocols,
        keepalive: section.duration_or_off("keepalive"),
        max_connections: section.size("max_connections"),
        max_connections_per_source: section.size("max_connections_per_source"),
        max_sessions: section.size("max_sessions"),
        responses: section.count("responses"),
        allow,
        deny: networks(section, "deny"),
        tlvs: tlvs::read(&tlvs_section),
    };
    WrittenListener { listener, binds: texts, pool, tlvs: tlvs_section, protocol: section.written("protocol") }
}

/// What a UNIX socket cannot do: take datagrams, and tell its clients apart.
fn check_unix<'b, 'a: 'b>(
    section: &Section<'_>,
    what: &str,
    mut binds: impl Iterator<Item = (&'b Bind, &'b Text<'a>)>,
    protocols: &[Protocol],
) {
    let Some((bind, text)) = binds.find(|(bind, _)| matches!(bind, Bind::Unix(_))) else { return };
    if protocols.contains(&Protocol::Udp) {
        let diagnostic = Diagnostic::error(&text.span, format!("{what} serves UDP, and a UNIX socket takes streams"));
        section.note(diagnostic.help("give UDP a listener of its own").if_whole());
    }
    for key in ["allow", "deny", "max_connections_per_source"] {
        let Some(span) = section.written(key) else { continue };
        if key == "max_connections_per_source" && section.size(key) == 0 {
            continue;
        }
        let message = format!("{key:?} is about client addresses, and clients of \"{bind}\" have none");
        let diagnostic = Diagnostic::error(&span, message).also(&text.span, "any program that may open this file");
        section.note(diagnostic.help("who may connect is decided by the file, mode 0660, and by its directory; give the UNIX socket a listener without this key"));
    }
}

fn protocol(word: &'static str) -> Protocol {
    match word {
        "udp" => Protocol::Udp,
        _ => Protocol::Tcp,
    }
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
    /// For messages.
    owner: String,
    protocols: Vec<Protocol>,
    is_admin: bool,
}

impl Bound {
    fn ip(&self) -> Option<&IpBind> {
        self.bind.ip()
    }

    fn is_any(&self) -> bool {
        self.ip().is_some_and(|bind| bind.any)
    }
}

/// Refuses addresses that stand twice, and decides which `[::]` sockets are for IPv6 alone.
pub(super) fn resolve_binds(
    file: &Section<'_>,
    listeners: &mut [WrittenListener<'_>],
    admin: &Admin,
    admin_section: &Section<'_>,
) {
    let mut all: Vec<Bound> = Vec::new();
    let probe_bind = admin.probe_bind.map(AdminBind::Tcp);
    for (key, bind, owner) in
        [("bind", Some(&admin.bind), "the admin API"), ("probe_bind", probe_bind.as_ref(), "probe_bind")]
    {
        let bind = match bind {
            None => continue,
            Some(AdminBind::Tcp(address)) if address.port() == 0 => continue,
            Some(AdminBind::Tcp(address)) => Bind::Ip(IpBind { address: *address, any: false, v6only: false }),
            Some(AdminBind::Unix(path)) => Bind::Unix(path.as_path().into()),
        };
        let (span, written, owner) = (admin_section.span_of(key), bind.to_string(), owner.to_owned());
        let protocols = vec![Protocol::Tcp];
        all.push(Bound { bind, span, written, owner, protocols, is_admin: true });
    }
    for written in listeners.iter() {
        for (bind, text) in written.listener.binds.iter().zip(&written.binds) {
            let owner = format!("listener {:?}", written.listener.name);
            let protocols = &written.listener.protocols;
            let (bind, span, written) = (bind.clone(), text.span.clone(), text.value.to_owned());
            let protocols = protocols.clone();
            all.push(Bound { bind, span, written, owner, protocols, is_admin: false });
        }
    }
    all.sort_by_key(|bound| bound.span.start);
    for (index, second) in all.iter().enumerate() {
        if let Some(first) = all[..index].iter().find(|first| collide(first, second)) {
            file.note(bound_twice(first, second));
        }
    }
    for written in listeners {
        let protocols = &written.listener.protocols;
        let rivals: Vec<Bound> =
            all.iter().filter(|bound| bound.protocols.iter().any(|other| protocols.contains(other))).cloned().collect();
        for (bind, text) in written.listener.binds.iter_mut().zip(&written.binds) {
            if let Bind::Ip(bind) = bind {
                resolve_v6only(file, bind, text, &rivals);
            }
        }
    }
}

fn bound_twice(first: &Bound, second: &Bound) -> Diagnostic {
    let diagnostic = Diagnostic::error(&second.span, format!("address {:?} is bound twice", second.written));
    let diagnostic = diagnostic.label(format!("{} wants it", second.owner));
    let every = [first, second].into_iter().find(|bound| bound.is_any()).filter(|_| first.written != second.written);
    let diagnostic = diagnostic.help(match every {
        Some(every) => format!("{:?} is every IPv4 and every IPv6 address", every.written),
        None if first.written == second.written => {
            let other = match &second.bind {
                Bind::Ip(_) => "port or address",
                Bind::Unix(_) => "path",
                Bind::Inherited(_) => "name",
            };
            format!("one address serves one listener: give one of them another {other}")
        }
        None => {
            let admin = if first.is_admin { first } else { second };
            format!("{} needs a port that nothing else has on every address", admin.owner)
        }
    });
    match first.span.is_empty() {
        true => diagnostic.help(format!("without [admin] bind {} is at {:?}", first.owner, first.written)),
        false => diagnostic.also(&first.span, format!("{} has it already", first.owner)),
    }
}

/// `[::]:P` takes IPv6 alone when the file also binds an IPv4 address on port P.
fn resolve_v6only(file: &Section<'_>, bind: &mut IpBind, text: &Text<'_>, all: &[Bound]) {
    let port = bind.address.port();
    let on_port = |bound: &&Bound| bound.ip().is_some_and(|bind| bind.address.is_ipv4() && bind.address.port() == port);
    let every_v6 = bind.address.ip().is_unspecified() && bind.address.is_ipv6() && !bind.any && port != 0;
    let Some(other) = all.iter().find(on_port).filter(|_| every_v6) else { return };
    bind.v6only = true;
    if all.iter().filter(on_port).any(|bound| bound.ip().is_some_and(|bind| bind.address.ip().is_unspecified())) {
        return;
    }
    let because = format!("because {} binds an IPv4 address on this port", other.owner);
    let diagnostic = Diagnostic::warning(&text.span, format!("{:?} takes IPv6 alone here", text.value));
    let diagnostic = match other.span.is_empty() {
        true => diagnostic.label(because),
        false => diagnostic.also(&other.span, because),
    };
    file.note(
        diagnostic.help(format!("to take all other IPv4 addresses, too, write \":{port}\", or add \"0.0.0.0:{port}\"")),
    );
}

/// Whether the system or the operator could not tell the two apart. A wildcard and one address on the same port are
/// fine among listeners: the more specific socket is preferred. The admin API shares no port with a wildcard.
fn collide(a: &Bound, b: &Bound) -> bool {
    if !a.protocols.iter().any(|protocol| b.protocols.contains(protocol)) {
        return false;
    }
    let admin = a.is_admin || b.is_admin;
    let (Some(a), Some(b)) = (a.ip(), b.ip()) else { return a.bind == b.bind };
    let same = a.address == b.address;
    let every_v4 = |any: &IpBind, other: &IpBind| {
        let v4: IpAddr = [0, 0, 0, 0].into();
        any.any && other.address == SocketAddr::new(v4, any.address.port())
    };
    let within = address::covers(a, b.address) || address::covers(b, a.address);
    same || every_v4(a, b) || every_v4(b, a) || (admin && within)
}
