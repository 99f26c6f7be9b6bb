//! PURE. The header of one listener's connections to one upstream, prepared as far as it is the same for all of them.

use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;

use crate::config::{HeaderFormat, Tlvs};
use crate::proxy_protocol::error::EncodeError;
use crate::proxy_protocol::{Addresses, Command, Tlv, Transport, spp, tlv, v1, v2};

/// What is known of a header before a client comes. TLVs ascend by type: one receiver sorts before it checks the CRC.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct HeaderPlan {
    /// `None`: no header at all.
    pub format: Option<HeaderFormat>,
    /// TLVs of types below UNIQUE_ID.
    head: Vec<u8>,
    unique_id: bool,
    /// TLVs between UNIQUE_ID and the VPC endpoint.
    middle: Vec<u8>,
    /// TLVs by the client's network, longest prefix first.
    endpoints: Vec<(IpNet, Vec<u8>)>,
    /// The TLV of all other clients; empty: none.
    endpoint: Vec<u8>,
    /// TLVs of types above the VPC endpoint's.
    tail: Vec<u8>,
}

impl HeaderPlan {
    /// From the merged TLVs of upstream, listener and pool. Only v2 carries TLVs.
    pub fn new(format: Option<HeaderFormat>, tlvs: &Tlvs) -> Result<HeaderPlan, EncodeError> {
        let mut plan = HeaderPlan { format, ..HeaderPlan::default() };
        if format != Some(HeaderFormat::V2) {
            return Ok(plan);
        }
        let mut fixed: Vec<Tlv> = Vec::new();
        fixed.extend(tlvs.authority.clone().map(Tlv::Authority));
        fixed.extend(tlvs.crc32c.unwrap_or(false).then_some(Tlv::Crc32c));
        fixed.extend(tlvs.netns.clone().map(Tlv::Netns));
        fixed.extend(tlvs.gcp_psc_id.map(Tlv::GcpPscConnectionId));
        fixed.extend(tlvs.azure_link_id.map(Tlv::AzureLinkId));
        for (kind, value) in tlvs.custom.iter().flatten() {
            fixed.push(Tlv::Custom { kind: *kind, value: value.clone() });
        }
        // Stable: custom ones of one type stay in file order.
        fixed.sort_by_key(Tlv::kind);
        for item in &fixed {
            let piece = match item.kind() {
                ..tlv::UNIQUE_ID => &mut plan.head,
                tlv::UNIQUE_ID..tlv::AWS => &mut plan.middle,
                tlv::AWS.. => &mut plan.tail,
            };
            item.encode(piece)?;
        }
        plan.unique_id = tlvs.unique_id.unwrap_or(false);
        plan.endpoint = tlvs.vpce_id.as_ref().map(|id| endpoint(id)).transpose()?.unwrap_or_default();
        for (network, id) in tlvs.vpce_id_by_source.iter().flatten() {
            plan.endpoints.push((*network, endpoint(id)?));
        }
        Ok(plan)
    }

    /// Appends the header of one connection; nothing when there is no header. `ends` are the client and the address that
    /// it connected to; `None`: it came over a UNIX socket, and the header says that there is nobody to tell of. `id` is
    /// the connection's ULID.
    pub fn encode(
        &self,
        ends: Option<(SocketAddr, SocketAddr)>,
        transport: Transport,
        id: &str,
        out: &mut Vec<u8>,
    ) -> Result<(), EncodeError> {
        // PROXY protocol, section 2.2: LOCAL comes with UNSPEC and no addresses, and the receiver takes the connection's
        // own; its length still counts the TLVs. Section 2.1: v1 says UNKNOWN.
        let (command, addresses) = match ends {
            Some((client, local)) => (Command::Proxy, Addresses::inet(client, local, transport)),
            None => (Command::Local, Addresses::Unknown),
        };
        match self.format {
            None => Ok(()),
            Some(HeaderFormat::Spp) => {
                // Of datagrams alone, and those have addresses.
                if let Some((client, local)) = ends {
                    spp::encode(out, client, local);
                }
                Ok(())
            }
            Some(HeaderFormat::V1) => v1::encode(out, &addresses),
            Some(HeaderFormat::V2) => {
                let mut unique_id = [0; 3 + 26];
                let unique_id: &[u8] = if self.unique_id && id.len() == 26 {
                    unique_id[0] = tlv::UNIQUE_ID;
                    unique_id[2] = 26;
                    unique_id[3..].copy_from_slice(id.as_bytes());
                    &unique_id
                } else {
                    &[]
                };
                let client = ends.map(|(client, _)| client.ip());
                let pieces = [&self.head, unique_id, &self.middle, self.endpoint_of(client), &self.tail];
                v2::encode_with(out, command, &addresses, &pieces)
            }
        }
    }

    fn endpoint_of(&self, client: Option<IpAddr>) -> &[u8] {
        let contains = |network: &IpNet| client.is_some_and(|client| network.contains(&client));
        self.endpoints.iter().find(|(network, _)| contains(network)).map_or(&self.endpoint, |(_, tlv)| tlv)
    }
}

fn endpoint(id: &str) -> Result<Vec<u8>, EncodeError> {
    let mut out = Vec::new();
    Tlv::AwsVpcEndpoint(id.to_owned()).encode(&mut out)?;
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proxy_protocol::{Decoded, Header, decode};

    fn header(plan: &HeaderPlan, client: &str) -> Header {
        let mut bytes = Vec::new();
        let id = "01JD5M4Z9Q8V6T7R5P3N1K0H2G";
        let ends = (client != "unix").then(|| (client.parse().unwrap(), "203.0.113.7:80".parse().unwrap()));
        plan.encode(ends, Transport::Stream, id, &mut bytes).unwrap();
        match decode(&bytes).unwrap() {
            Decoded::Complete { header, .. } => header,
            incomplete => panic!("{incomplete:?}"),
        }
    }

    #[test]
    fn tlvs_ascend_by_type_and_know_the_clients_network() {
        let tlvs = Tlvs {
            vpce_id: Some("vpce-default".into()),
            vpce_id_by_source: Some(vec![
                ("10.1.2.0/24".parse().unwrap(), "vpce-long".into()),
                ("10.1.0.0/16".parse().unwrap(), "vpce-short".into()),
            ]),
            azure_link_id: Some(7),
            gcp_psc_id: Some(9),
            crc32c: Some(true),
            unique_id: Some(true),
            authority: Some("example.org".into()),
            netns: Some("blue".into()),
            custom: Some(vec![(0xE4, b"b".to_vec()), (0xE1, b"x".to_vec()), (0xE4, b"a".to_vec()), (0xF0, vec![])]),
        };
        let plan = HeaderPlan::new(Some(HeaderFormat::V2), &tlvs).unwrap();
        let decoded = header(&plan, "10.1.2.3:5000");
        let kinds: Vec<u8> = decoded.tlvs.iter().map(Tlv::kind).collect();
        assert_eq!(kinds, [0x02, 0x03, 0x05, 0x30, 0xE0, 0xE1, 0xE4, 0xE4, 0xEA, 0xEE, 0xF0]);
        assert!(decoded.tlvs.contains(&Tlv::UniqueId(b"01JD5M4Z9Q8V6T7R5P3N1K0H2G".to_vec())));
        for (client, id) in [("10.1.2.3:1", "vpce-long"), ("10.1.9.9:1", "vpce-short"), ("10.9.9.9:1", "vpce-default")]
        {
            assert!(header(&plan, client).tlvs.contains(&Tlv::AwsVpcEndpoint(id.into())), "{client}");
        }
    }

    #[test]
    fn v1_carries_no_tlvs_and_no_header_is_no_bytes() {
        let tlvs = Tlvs { vpce_id: Some("vpce-1".into()), ..Tlvs::default() };
        let v1 = HeaderPlan::new(Some(HeaderFormat::V1), &tlvs).unwrap();
        assert!(header(&v1, "10.0.0.1:5").tlvs.is_empty());
        let mut bytes = Vec::new();
        let none = HeaderPlan::new(None, &tlvs).unwrap();
        let ends = ("10.0.0.1:5".parse().unwrap(), "10.0.0.2:80".parse().unwrap());
        none.encode(Some(ends), Transport::Stream, "", &mut bytes).unwrap();
        assert!(bytes.is_empty());
    }

    #[test]
    fn a_client_without_an_address_is_local_or_unknown() {
        let tlvs = Tlvs { vpce_id: Some("vpce-1".into()), unique_id: Some(true), ..Tlvs::default() };
        let v2 = header(&HeaderPlan::new(Some(HeaderFormat::V2), &tlvs).unwrap(), "unix");
        assert_eq!((v2.command, &v2.addresses), (Command::Local, &Addresses::Unknown));
        assert_eq!(v2.tlvs.iter().map(Tlv::kind).collect::<Vec<_>>(), [0x05, 0xEA], "they are about the connection");
        let mut bytes = Vec::new();
        HeaderPlan::new(Some(HeaderFormat::V1), &tlvs)
            .unwrap()
            .encode(None, Transport::Stream, "", &mut bytes)
            .unwrap();
        assert_eq!(bytes, b"PROXY UNKNOWN\r\n");
    }
}
