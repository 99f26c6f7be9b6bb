//! PURE. The configuration's values in the words of the file: for logs, status and the report of a reload.

use std::fmt;

use super::{
    AdminBind, Balance, Bind, CheckCommand, CheckHeader, HeaderFormat, LogConnections, LogFormat, OnUnhealthy,
    Protocol, UdpHeader, Upstream, UpstreamAddress, WhenNoneHealthy,
};

macro_rules! words {
    ($($type:ident { $($variant:pat => $word:literal),+ $(,)? })+) => {
        $(
            impl $type {
                /// The word in the file.
                pub fn as_str(self) -> &'static str {
                    match self { $($variant => $word),+ }
                }
            }

            impl fmt::Display for $type {
                fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                    f.write_str(self.as_str())
                }
            }
        )+
    };
}

words! {
    LogFormat { LogFormat::Text => "text", LogFormat::Json => "json" }
    LogConnections { LogConnections::All => "all", LogConnections::Errors => "errors", LogConnections::Off => "off", LogConnections::StartAndEnd => "start_and_end" }
    Balance {
        Balance::RoundRobin => "round_robin",
        Balance::LeastConnections => "least_connections",
        Balance::RandomTwo => "random_two",
        Balance::SourceHash => "source_hash",
    }
    Protocol { Protocol::Tcp => "tcp", Protocol::Udp => "udp" }
    HeaderFormat { HeaderFormat::V1 => "v1", HeaderFormat::V2 => "v2", HeaderFormat::Spp => "spp" }
    UdpHeader {
        UdpHeader::EveryDatagram => "every_datagram",
        UdpHeader::FirstDatagram => "first_datagram",
        UdpHeader::FirstAlone => "first_alone",
    }
    OnUnhealthy { OnUnhealthy::Keep => "keep", OnUnhealthy::Close => "close" }
    WhenNoneHealthy { WhenNoneHealthy::UseAll => "use_all", WhenNoneHealthy::Refuse => "refuse" }
    CheckHeader {
        CheckHeader::Same => "same",
        CheckHeader::Off => "off",
        CheckHeader::Format(HeaderFormat::V1) => "v1",
        CheckHeader::Format(HeaderFormat::V2) => "v2",
        CheckHeader::Format(HeaderFormat::Spp) => "spp",
    }
    CheckCommand {
        CheckCommand::Local => "local",
        CheckCommand::Proxy => "proxy",
        CheckCommand::Unknown => "unknown",
    }
}

impl fmt::Display for AdminBind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            AdminBind::Tcp(address) => address.fmt(f),
            AdminBind::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

impl fmt::Display for Bind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Bind::Ip(bind) if bind.any => write!(f, ":{}", bind.address.port()),
            Bind::Ip(bind) => bind.address.fmt(f),
            Bind::Unix(path) => write!(f, "unix:{}", path.display()),
            Bind::Inherited(name) => write!(f, "fd:{name}"),
        }
    }
}

/// `10.0.0.30:80`, or `10.0.0.30` where the port is the listener's.
impl fmt::Display for UpstreamAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            UpstreamAddress::Ip(ip, Some(port)) => std::net::SocketAddr::new(*ip, *port).fmt(f),
            UpstreamAddress::Ip(ip, None) => ip.fmt(f),
            UpstreamAddress::Unix(path) => write!(f, "unix:{}", path.display()),
            UpstreamAddress::Name(name, Some(port)) => write!(f, "{name}:{port}"),
            UpstreamAddress::Name(name, None) => name.fmt(f),
        }
    }
}

/// Its address.
impl fmt::Display for Upstream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.address.fmt(f)
    }
}
