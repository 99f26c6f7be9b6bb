//! PURE. Addresses and networks as operators write them, and what to say where they are wrong.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::Path;

use ipnet::IpNet;

use super::error::Diagnostic;
use super::file::{Section, Text, not_supported};
use super::names::{Name, Records};
use super::{AdminBind, Bind, IpBind, UpstreamAddress};

/// `sockaddr_un` has 108 bytes, the last one a zero.
const UNIX_PATH_BYTES_MAX: usize = 107;
/// Longest name that DNS can have, a dot at its end included.
const NAME_BYTES_MAX: usize = 254;
/// Longest part of a name.
const LABEL_BYTES_MAX: usize = 63;

/// What systemd takes as the name of a socket.
const FD_NAME_BYTES_MAX: usize = 255;

/// One element of `listeners.NAME.bind`.
pub(super) fn bind(text: &Text<'_>) -> Result<Bind, Box<Diagnostic>> {
    if let Some(path) = text.value.strip_prefix("unix:") {
        return Ok(Bind::Unix(unix_path(text, path, "unix:/run/preface/web.sock")?.into()));
    }
    if let Some(name) = text.value.strip_prefix("fd:") {
        return inherited(text, name);
    }
    if let Some(port) = text.value.strip_prefix(':').and_then(port) {
        let address = SocketAddr::new(IpAddr::V6(Ipv6Addr::UNSPECIFIED), port);
        return Ok(Bind::Ip(IpBind { address, any: true, v6only: false }));
    }
    let address = socket_address(text, "bind", "such as \":80\", \"192.0.2.1:80\" or \"[2001:db8::1]:80\"")?;
    if address.ip().is_multicast() {
        let message = format!("bind address {:?} is a multicast address", text.value);
        return Err(Box::new(Diagnostic::error(&text.span, message)));
    }
    if let SocketAddr::V6(v6) = address
        && v6.ip().is_unicast_link_local()
        && v6.scope_id() == 0
    {
        let message = format!("link-local address {:?} needs the interface", text.value);
        let help = "append its number: \"[fe80::1%2]:80\" for the one that `ip link` shows as 2";
        return Err(Box::new(Diagnostic::error(&text.span, message).help(help)));
    }
    Ok(Bind::Ip(IpBind { address, any: false, v6only: false }))
}

/// `admin.bind`
pub(super) fn admin_bind(text: &Text<'_>) -> Result<AdminBind, Box<Diagnostic>> {
    let Some(path) = text.value.strip_prefix("unix:") else {
        let address = socket_address(text, "admin.bind", "such as \"127.0.0.1:9900\", or \"unix:/path\"")?;
        return Ok(AdminBind::Tcp(address));
    };
    Ok(AdminBind::Unix(unix_path(text, path, "unix:/run/preface/admin.sock")?.to_owned()))
}

/// The path behind `unix:`.
fn unix_path<'a>(text: &Text<'_>, path: &'a str, example: &str) -> Result<&'a Path, Box<Diagnostic>> {
    let problem = match path {
        _ if !path.starts_with('/') => "the path of a UNIX socket must be absolute",
        _ if path.ends_with('/') => "the path of a UNIX socket must name a file",
        _ if path.len() > UNIX_PATH_BYTES_MAX => "the path of a UNIX socket must not be longer than 107 bytes",
        _ if path.contains('\0') => "the path of a UNIX socket must not contain a zero byte",
        _ => return Ok(Path::new(path)),
    };
    Err(Box::new(Diagnostic::error(&text.span, problem).help(format!("for example {example:?}"))))
}

/// The name behind `fd:`, as sd_listen_fds_with_names(3) allows them.
fn inherited(text: &Text<'_>, name: &str) -> Result<Bind, Box<Diagnostic>> {
    let fits = |byte: u8| (byte.is_ascii_graphic() || byte == b' ') && byte != b':';
    if (1..=FD_NAME_BYTES_MAX).contains(&name.len()) && name.bytes().all(fits) {
        return Ok(Bind::Inherited(name.to_owned()));
    }
    let message = format!("{name:?} cannot be the name of an inherited socket");
    let help = "\"fd:web\" is what a socket unit with FileDescriptorName=web hands over; a name has 1 to 255 ASCII characters without \":\"";
    Err(Box::new(Diagnostic::error(&text.span, message).help(help)))
}

/// Where probes are served.
pub(super) fn probe_bind(text: &Text<'_>) -> Result<SocketAddr, Box<Diagnostic>> {
    socket_address(text, "admin.probe_bind", "such as \"0.0.0.0:9901\"")
}

/// The address of an upstream.
pub(super) fn upstream(text: &Text<'_>) -> Result<UpstreamAddress, Box<Diagnostic>> {
    let value = text.value;
    if let Some(path) = value.strip_prefix("unix:") {
        return Ok(UpstreamAddress::Unix(unix_path(text, path, "unix:/run/app.sock")?.into()));
    }
    let bare = value.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(value);
    let (ip, port) = match bare.parse::<IpAddr>() {
        Ok(ip) => (unmapped(text, ip)?, None),
        Err(_) => {
            if let Some(address) = name(text) {
                return address;
            }
            let address = socket_address(
                text,
                "address",
                "such as \"10.0.0.30:80\" or \"[2001:db8::30]:80\", or a name and a port",
            )?;
            (address.ip(), Some(address.port()))
        }
    };
    let link_local = matches!(ip, IpAddr::V6(v6) if v6.is_unicast_link_local());
    let (problem, help) = match ip {
        _ if port == Some(0) => {
            ("has port 0", "write the port that it listens on; without one it is the listener's".to_owned())
        }
        _ if ip.is_unspecified() => {
            let here: IpAddr = if ip.is_ipv4() { Ipv4Addr::LOCALHOST.into() } else { Ipv6Addr::LOCALHOST.into() };
            let here = port.map_or_else(|| here.to_string(), |port| SocketAddr::new(here, port).to_string());
            ("is no address that can be connected to", format!("for a server on this machine write {here:?}"))
        }
        _ if ip.is_multicast() || ip == IpAddr::from([255, 255, 255, 255]) => {
            ("is a multicast or broadcast address", "list the addresses of the servers, one by one".to_owned())
        }
        _ if link_local => return Err(Box::new(not_supported(&text.span, &format!("link-local address {value:?}")))),
        _ => return Ok(UpstreamAddress::Ip(ip, port)),
    };
    Err(Box::new(Diagnostic::error(&text.span, format!("upstream {value:?} {problem}")).help(help)))
}

/// A network in CIDR form, or one address.
pub(super) fn network(section: &Section<'_>, text: &Text<'_>) -> Option<IpNet> {
    let parsed = text.value.parse::<IpNet>().ok().or_else(|| text.value.parse::<IpAddr>().ok().map(IpNet::from));
    let Some(net) = parsed else {
        let diagnostic = Diagnostic::error(&text.span, format!("{:?} is not a network", text.value));
        section.note(
            diagnostic
                .help("write an address and its prefix length: \"10.0.0.0/8\", \"2001:db8::/32\", or one address"),
        );
        return None;
    };
    if let Err(diagnostic) = unmapped(text, net.addr()) {
        section.note(*diagnostic);
        return None;
    }
    if net.trunc() != net {
        let diagnostic = Diagnostic::warning(&text.span, format!("{:?} has bits beyond its prefix", text.value));
        let help =
            format!("it means {:?}; for the one address write {:?}", net.trunc().to_string(), net.addr().to_string());
        section.note(diagnostic.help(help));
    }
    Some(net.trunc())
}

/// An address of this machine that connections can start from.
pub(super) fn source(text: &Text<'_>) -> Result<IpAddr, Box<Diagnostic>> {
    let Ok(ip) = text.value.parse::<IpAddr>() else {
        let diagnostic = Diagnostic::error(&text.span, format!("{:?} is not an IP address", text.value));
        return Err(Box::new(diagnostic.help("source takes addresses of this machine, without a port")));
    };
    let ip = unmapped(text, ip)?;
    let link_local = matches!(ip, IpAddr::V6(v6) if v6.is_unicast_link_local());
    if ip.is_unspecified() || ip.is_multicast() || link_local {
        let diagnostic = Diagnostic::error(&text.span, format!("connections cannot start from {:?}", text.value));
        return Err(Box::new(diagnostic.help("write an address of this machine, or leave source out")));
    }
    Ok(ip)
}

/// Whether a socket bound to `bind` takes connections to `address`.
pub(super) fn covers(bind: &IpBind, address: SocketAddr) -> bool {
    let bound = bind.address.ip();
    let any = match (bound, address.ip()) {
        (IpAddr::V6(_), IpAddr::V4(_)) => bound.is_unspecified() && !bind.v6only,
        (IpAddr::V4(_), IpAddr::V4(_)) | (IpAddr::V6(_), IpAddr::V6(_)) => bound.is_unspecified(),
        (IpAddr::V4(_), IpAddr::V6(_)) => false,
    };
    bind.address.port() == address.port() && (any || bound == address.ip())
}

fn socket_address(text: &Text<'_>, key: &str, examples: &str) -> Result<SocketAddr, Box<Diagnostic>> {
    let value = text.value;
    if let Ok(address) = value.parse::<SocketAddr>() {
        unmapped(text, address.ip())?;
        return Ok(address);
    }
    let error = |message: String| Diagnostic::error(&text.span, message);
    let (host, after) = value.rsplit_once(':').unwrap_or((value, ""));
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    let digits = |s: &str| !s.is_empty() && s.bytes().all(|b| b.is_ascii_digit());
    let is_ip = bare.parse::<IpAddr>().is_ok();
    // Only a listener's bind may leave the address out.
    let of_port = |port: &str| match key {
        "bind" => format!("\":{port}\" for port {port}"),
        _ => format!("the address, too: \"127.0.0.1:{port}\" for port {port} of this machine"),
    };
    Err(Box::new(match () {
        _ if value.contains(TYPOGRAPHIC_QUOTES) => error(format!("{value:?} has typographic quotes in it"))
            .if_whole()
            .help(format!("write \"{}\"", value.replace(TYPOGRAPHIC_QUOTES, ""))),
        _ if value.contains("://") => {
            error(format!("{value:?} is a URL")).help(format!("{key} takes an IP address and a port, {examples}"))
        }
        _ if value.parse::<IpAddr>().is_ok() => {
            error(format!("{value:?} has no port")).help(match value.contains(':') {
                true if port_at_end(value).is_some() => {
                    let (ip, port) = port_at_end(value).expect("it was asked");
                    format!("write \"[{ip}]:{port}\" (an IPv6 address needs the brackets)")
                }
                true => format!("write \"[{value}]:80\" (an IPv6 address needs the brackets)"),
                false => format!("write \"{value}:80\""),
            })
        }
        _ if (is_ip || host.is_empty()) && digits(after) && port(after).is_none() => {
            error(format!("port {after} is out of range")).label("a port is a number from 1 to 65535")
        }
        _ if is_ip && after.is_empty() => error(format!("{value:?} has no port")).help(match key {
            "address" => format!("write \"{host}:80\"; \"{bare}\" alone takes the listener's port"),
            _ => format!("write \"{host}:80\""),
        }),
        _ if digits(value) && port(value).is_some() => {
            error(format!("{value:?} is not an address")).help(format!("write {}", of_port(value)))
        }
        _ if host.is_empty() && key != "bind" && port(after).is_some() => {
            error(format!("{value:?} is not an address")).help(format!("write {}", of_port(after)))
        }
        _ if host == "*" && digits(after) && key != "address" => {
            let every = if key == "bind" { "" } else { "0.0.0.0" };
            error(format!("{value:?} is not an address")).help(format!("for every address write \"{every}:{after}\""))
        }
        _ if is_name(host) => {
            error(format!("{value:?} is a name")).help(format!("{key} takes an IP address, {examples}"))
        }
        _ => error(format!("{value:?} is not an address"))
            .help(format!("{key} takes an IP address and a port, {examples}")),
    }))
}

/// What word processors make of a quote.
pub(super) const TYPOGRAPHIC_QUOTES: &[char] =
    &['\u{201c}', '\u{201d}', '\u{201e}', '\u{2018}', '\u{2019}', '\u{ab}', '\u{bb}'];

/// Of an IPv6 address without brackets whose last group reads like a port: what is before it, and the port.
pub(super) fn port_at_end(value: &str) -> Option<(Ipv6Addr, u16)> {
    let (ip, last) = value.rsplit_once(':')?;
    // A group of one digit is hardly a port, and often the number of a machine.
    let number = port(last).filter(|number| *number > 9 && !last.starts_with('0'));
    Some((ip.parse().ok()?, number?))
}

/// A port without sign or spaces; 0 is one.
fn port(text: &str) -> Option<u16> {
    text.bytes().all(|b| b.is_ascii_digit()).then(|| text.parse().ok()).flatten()
}

/// Letters, digits, hyphens, underscores and dots; the last part has a letter, or it would be a mistyped address.
fn is_name(text: &str) -> bool {
    let host = |b: u8| b.is_ascii_alphanumeric() || b"-_.".contains(&b);
    let last = text.strip_suffix('.').unwrap_or(text).rsplit('.').next().unwrap_or_default();
    last.bytes().any(|b| b.is_ascii_alphabetic()) && text.bytes().all(host)
}

/// `name`, `name:port` and `srv:name`; `None`: it is not written as one of them.
fn name(text: &Text<'_>) -> Option<Result<UpstreamAddress, Box<Diagnostic>>> {
    let (host, records) = match text.value.strip_prefix("srv:") {
        Some(host) => (host, Records::Services),
        None => (text.value, Records::Addresses),
    };
    let (host, after) = host.split_once(':').map_or((host, None), |(host, after)| (host, Some(after)));
    let is_elsewhat = !is_name(host) || after.is_some_and(|after| after.contains([':', '/']));
    if records == Records::Addresses && is_elsewhat {
        return None;
    }
    let error = |message: String| Diagnostic::error(&text.span, message);
    let labels = || host.strip_suffix('.').unwrap_or(host).split('.');
    let number = after.and_then(port).filter(|port| *port != 0);
    Some(Err(Box::new(match (records, after) {
        (Records::Services, Some(_)) => error(format!("{:?} has a port", text.value)).help(format!(
            "SRV records say the port themselves: write \"srv:{host}\", or \"{}\" without srv:",
            &text.value[4..]
        )),
        _ if !is_name(host) => {
            error(format!("{host:?} is not a name")).help("for example \"srv:_http._tcp.web.example.com\"")
        }
        _ if host.len() > NAME_BYTES_MAX || labels().any(|label| label.is_empty() || label.len() > LABEL_BYTES_MAX) => {
            error(format!("{host:?} is not a name"))
                .help("between its dots a name has 1 to 63 characters, and 253 in all")
        }
        (_, Some(written)) if number.is_none() => error(format!("{:?} has no port after the colon", text.value))
            .label(format!("{written:?}"))
            .help("a port is a number from 1 to 65535"),
        _ => {
            let name = Name { host: host.to_ascii_lowercase(), records };
            return Some(Ok(UpstreamAddress::Name(name, number)));
        }
    })))
}

/// `::ffff:10.0.0.1` and `10.0.0.1` are one address; only one spelling is taken, so that equal means equal.
fn unmapped(text: &Text<'_>, ip: IpAddr) -> Result<IpAddr, Box<Diagnostic>> {
    match ip {
        IpAddr::V6(v6) if v6.to_ipv4_mapped().is_some() => {
            let v4 = ip.to_canonical();
            let diagnostic = Diagnostic::error(&text.span, format!("{:?} is an IPv4 address in IPv6 form", text.value));
            Err(Box::new(diagnostic.help(format!("write it as IPv4: {v4}"))))
        }
        ip => Ok(ip),
    }
}
