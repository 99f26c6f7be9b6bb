//! PURE. What is allowed and probably not meant: upstreams that are looked for in search domains first, and those that
//! look like the address of a Service.

use std::net::IpAddr;

use ipnet::{IpNet, Ipv4Net};

use super::UpstreamAddress;
use super::address::port_at_end;
use super::error::Diagnostic;
use super::file::Text;
use super::names::{Name, Records};

/// What is known of the machine that the configuration is for.
#[derive(Clone, Debug, Default)]
pub struct Surroundings {
    /// Domains of resolv.conf's search list.
    pub search: Vec<String>,
    /// A name with fewer dots is looked for there first; 0 is not known.
    pub ndots: usize,
    /// In a pod: the address of the API server's Service.
    pub service: Option<IpAddr>,
    /// Is it perhaps for a cluster elsewhere? Then the usual networks of Services deserve a word.
    pub elsewhere: bool,
    /// Tells which addresses this machine does not have; `None`: nobody can say.
    pub is_foreign: Option<fn(IpAddr) -> bool>,
}

impl Surroundings {
    /// The networks in which this machine's Services have their addresses, as far as that can be told: in a pod the one
    /// of the API server, a /16, or kubeadm's /12. IPv6 ones are /108 or larger at most.
    pub fn service_network(&self) -> Option<IpNet> {
        let net = match self.service? {
            IpAddr::V4(ip) if KUBEADM.contains(&ip) => return Some(KUBEADM.into()),
            ip @ IpAddr::V4(_) => IpNet::new(ip, 16),
            ip @ IpAddr::V6(_) => IpNet::new(ip, 112),
        };
        Some(net.expect("the prefix length fits the family").trunc())
    }
}

/// Services of a cluster that kubeadm made.
const KUBEADM: Ipv4Net = Ipv4Net::new_assert(std::net::Ipv4Addr::new(10, 96, 0, 0), 12);
/// Services of a k3s cluster.
const K3S: Ipv4Net = Ipv4Net::new_assert(std::net::Ipv4Addr::new(10, 43, 0, 0), 16);

/// Why a headless Service is wanted.
pub const CLUSTER_IP: &str = "the cluster's proxy would choose the pod, and balancing, health checks and draining would be for nothing: name a headless Service (clusterIP: None), such as \"web.namespace.svc.cluster.local.:80\"";

/// What there is to say about an upstream.
pub(super) fn upstream(text: &Text<'_>, address: &UpstreamAddress, around: &Surroundings) -> Option<Diagnostic> {
    match address {
        UpstreamAddress::Name(name, _) => searched(text, name, around),
        UpstreamAddress::Ip(IpAddr::V6(_), None) if port_at_end(text.value).is_some() => reads_like_a_port(text),
        address => cluster_ip(text, address.ip()?, around),
    }
}

/// It is a whole address, and was probably meant to be one and a port.
fn reads_like_a_port(text: &Text<'_>) -> Option<Diagnostic> {
    let (value, (ip, port)) = (text.value, port_at_end(text.value)?);
    let message = format!("the last group of {value:?} reads like a port");
    Some(Diagnostic::warning(&text.span, message).label("an address without a port").help(format!(
        "write \"[{ip}]:{port}\" if it is one; if it is part of the address, write \"[{value}]\", which takes the listener's port"
    )))
}

/// Each look-up of such a name asks for others first.
fn searched(text: &Text<'_>, name: &Name, around: &Surroundings) -> Option<Diagnostic> {
    if name.host.ends_with('.') {
        return None;
    }
    let dots = name.host.matches('.').count();
    let here = around.ndots > 1 && dots < around.ndots && !around.search.is_empty();
    // A name of a cluster is looked up in a cluster, whose pods have ndots 5 and at least three search domains.
    let in_cluster = dots > 1 && dots < 5 && name.host.ends_with(".cluster.local");
    let (others, whose) = match (here, in_cluster) {
        (true, _) => (around.search.len(), format!("ndots:{} in /etc/resolv.conf", around.ndots)),
        (_, true) => (3, "ndots:5, as in every pod,".to_owned()),
        _ => return None,
    };
    let records = if name.records == Records::Services { "srv:" } else { "" };
    let message = format!("name {:?} is looked for in {others} search domains first", text.value);
    let diagnostic = Diagnostic::warning(&text.span, message).label("no dot at its end");
    Some(diagnostic.help(format!(
        "with {whose} each look-up asks for {} other names before this one, and takes what it finds there; if it is the whole name, write \"{records}{}.\"{}",
        others,
        name.host,
        if name.records == Records::Addresses { " (before the port)" } else { "" },
    )))
}

/// What there is to say about an element of `source`: every connection from it would fail.
pub(super) fn source(text: &Text<'_>, ip: IpAddr, around: &Surroundings) -> Option<Diagnostic> {
    around.is_foreign.filter(|is_foreign| is_foreign(ip))?;
    let message = format!("source {:?} is not an address of this machine", text.value);
    let warning = Diagnostic::warning(&text.span, message).label("cannot be bound here now");
    Some(
        warning.help(
            "connections from it fail (preface.connect.local_resources): `ip addr` lists this machine's addresses",
        ),
    )
}

/// A connection to it goes anywhere. A hint only: such an address may be a machine's.
fn cluster_ip(text: &Text<'_>, ip: IpAddr, around: &Surroundings) -> Option<Diagnostic> {
    let said = match (around.service_network(), ip) {
        (Some(network), ip) if network.contains(&ip) => format!("in the network of this cluster's Services, {network}"),
        (Some(_), _) => return None,
        (None, IpAddr::V4(ip)) if around.elsewhere && KUBEADM.contains(&ip) => {
            format!("Services of many clusters are in {KUBEADM}")
        }
        (None, IpAddr::V4(ip)) if around.elsewhere && K3S.contains(&ip) => {
            format!("Services of k3s clusters are in {K3S}")
        }
        _ => return None,
    };
    let message = format!("upstream {:?} looks like a ClusterIP, the address of a whole Service", text.value);
    Some(Diagnostic::warning(&text.span, message).label(said).help(format!("if it is one, {CLUSTER_IP}")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config;

    fn said(upstreams: &str, around: &Surroundings) -> String {
        let text = format!("[listeners.a]\nbind = \":8080\"\npool = \"p\"\n[pools.p]\nupstreams = [{upstreams}]\n");
        let parsed = config::parse_in("test.toml", &text, around).unwrap_or_else(|errors| panic!("{errors:?}"));
        parsed.warnings.to_string()
    }

    fn in_a_pod() -> Surroundings {
        let search = ["web.svc.cluster.local", "svc.cluster.local", "cluster.local"].map(str::to_owned).to_vec();
        Surroundings { search, ndots: 5, service: Some([10, 96, 0, 1].into()), elsewhere: false, is_foreign: None }
    }

    fn on_a_host(elsewhere: bool) -> Surroundings {
        Surroundings { search: vec!["example.com".to_owned()], ndots: 1, service: None, elsewhere, is_foreign: None }
    }

    #[test]
    fn a_name_that_is_looked_for_elsewhere_first_is_said() {
        insta::assert_snapshot!(said("\"web.prod:80\", \"srv:_http._tcp.web.prod.svc\"", &in_a_pod()));
        assert_eq!(said("\"web.prod.:80\", \"a.b.c.d.e.f:80\", \"srv:_http._tcp.web.prod.svc.\"", &in_a_pod()), "");
        assert_eq!(said("\"web\", \"web.prod:80\"", &on_a_host(false)), "");
        let for_a_pod = said("\"web.prod.svc.cluster.local:80\"", &on_a_host(true));
        assert!(for_a_pod.contains("write \"web.prod.svc.cluster.local.\" (before the port)"), "{for_a_pod}");
    }

    #[test]
    fn an_ipv6_address_that_ends_like_a_port_is_said() {
        let said = |upstream: &str| said(upstream, &Surroundings::default());
        let warning = said("\"2001:db8::1:8080\"");
        assert!(warning.contains("write \"[2001:db8::1]:8080\" if it is one"), "{warning}");
        for clear in [
            "[2001:db8::1:8080]",
            "2001:db8::1",
            "2001:db8::30",
            "2001:db8::1:2",
            "2001:db8::1:beef",
            "[2001:db8::1]:8080",
        ] {
            assert_eq!(said(&format!("{clear:?}")), "", "{clear}");
        }
    }

    #[test]
    fn what_looks_like_a_service_is_said_as_a_hint() {
        insta::assert_snapshot!(said("\"10.100.7.7:80\"", &in_a_pod()));
        assert_eq!(said("\"10.43.0.7:80\", \"10.244.0.7:80\", \"[2001:db8::1]:80\"", &in_a_pod()), "");
        let eks = Surroundings { service: Some([172, 20, 0, 1].into()), ..in_a_pod() };
        assert!(said("\"172.20.9.9:80\"", &eks).contains("172.20.0.0/16"));
        assert_eq!(said("\"172.21.9.9:80\", \"10.96.0.9:80\"", &eks), "");
        let v6 = Surroundings { service: Some("fd00:10:96::1".parse().unwrap()), ..in_a_pod() };
        assert!(said("\"[fd00:10:96::1f]:80\"", &v6).contains("fd00:10:96::/112"));
        // A balancer outside a cluster runs beside networks that only look so; a file that is checked may be for a pod.
        assert_eq!(said("\"10.96.0.10:80\"", &on_a_host(false)), "");
        assert!(said("\"10.96.0.10:80\"", &on_a_host(true)).contains("looks like a ClusterIP"));
        assert!(said("\"10.43.0.10:80\"", &on_a_host(true)).contains("k3s"));
        assert_eq!(said("\"172.20.0.10:80\"", &on_a_host(true)), "");
    }
}
