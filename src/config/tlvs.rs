//! PURE. The `tlvs` tables: values, their limits, and what the three levels make together.

use std::collections::BTreeSet;

use ipnet::IpNet;

use super::error::Diagnostic;
use super::file::{Element, Section, Text};
use super::{Tlvs, address};
use crate::proxy_protocol::{HEADER_BYTES_MAX, HEADER_BYTES_SAFE};

/// A v2 header without TLVs, when both addresses are IPv6.
const BARE_BYTES_MAX: usize = 16 + 36;
/// A value's length is a 16-bit number.
const VALUE_BYTES_MAX: usize = 65_535;
/// Longest host name; HAProxy refuses longer ones.
const AUTHORITY_BYTES_MAX: usize = 255;
/// File names have no more, and a namespace is one.
const NETNS_BYTES_MAX: usize = 255;
/// A real one has 22.
const VPCE_ID_BYTES_MAX: usize = 128;
/// HAProxy drops the connection beyond this.
const HAPROXY_VALUE_BYTES_MAX: usize = 1_024;
/// A ULID in text.
const UNIQUE_ID_BYTES: usize = 26;

/// Who refuses headers of about how many bytes and more, as they were seen to do.
const REFUSERS: [(usize, &str); 4] = [
    (256, "Apache httpd and Exim"),
    (430, "Varnish, lighttpd and MariaDB"),
    (1_030, "nginx (http), Postfix and PowerDNS"),
    (4_096, "nginx (stream)"),
];

/// Reads one table.
pub(super) fn read(section: &Section<'_>) -> Tlvs {
    Tlvs {
        vpce_id: section.text("vpce_id").and_then(|text| vpce_id(section, &text)),
        vpce_id_by_source: vpce_id_by_source(section),
        azure_link_id: section.integer("azure_link_id").map(|id| u32::try_from(id).expect("limited to 32 bits")),
        gcp_psc_id: section.integer("gcp_psc_id"),
        crc32c: section.boolean("crc32c"),
        unique_id: section.boolean("unique_id"),
        authority: authority(section),
        netns: section.text("netns").and_then(|text| bounded(section, &text, "\"netns\"", NETNS_BYTES_MAX)),
        custom: custom(section),
    }
}

/// Whether the table asks for anything to be sent.
pub(super) fn any(tlvs: &Tlvs) -> bool {
    !values(tlvs).is_empty()
}

impl Tlvs {
    /// Do they put anything into a header of v2?
    pub fn are_sent(&self) -> bool {
        any(self)
    }
}

fn bounded(section: &Section<'_>, text: &Text<'_>, what: &str, bytes_max: usize) -> Option<String> {
    if (1..=bytes_max).contains(&text.value.len()) {
        return Some(text.value.to_owned());
    }
    let diagnostic = Diagnostic::error(&text.span, format!("{what} must have 1 to {bytes_max} bytes"));
    section.note(diagnostic.label(format!("{} bytes", text.value.len())));
    None
}

fn vpce_id(section: &Section<'_>, text: &Text<'_>) -> Option<String> {
    if !text.value.bytes().all(|b| b.is_ascii_graphic()) {
        let diagnostic = Diagnostic::error(&text.span, "a VPC endpoint's ID has only printable ASCII characters");
        section.note(diagnostic.help("it looks like \"vpce-08d2bf15fac5001c9\""));
        return None;
    }
    bounded(section, text, "a VPC endpoint's ID", VPCE_ID_BYTES_MAX)
}

fn vpce_id_by_source(section: &Section<'_>) -> Option<Vec<(IpNet, String)>> {
    let mut found: Vec<(IpNet, String)> = Vec::new();
    for element in section.list("vpce_id_by_source")? {
        let Element::Table(entry) = element else { continue };
        entry.require("from", "an entry of \"vpce_id_by_source\"", "\"10.1.0.0/16\"");
        entry.require("id", "an entry of \"vpce_id_by_source\"", "\"vpce-08d2bf15fac5001c9\"");
        let id = entry.text("id").and_then(|text| vpce_id(&entry, &text));
        let from = entry.text("from").and_then(|text| address::network(&entry, &text));
        let (Some(from), Some(id)) = (from, id) else { continue };
        if found.iter().any(|(known, _)| *known == from) {
            let message = format!("network {:?} stands twice in \"vpce_id_by_source\"", from.to_string());
            section.note(Diagnostic::error(&entry.span_of("from"), message).label("which ID would it be?"));
            continue;
        }
        found.push((from, id));
    }
    found.sort_by_key(|(network, _)| std::cmp::Reverse(network.prefix_len()));
    Some(found)
}

fn authority(section: &Section<'_>) -> Option<String> {
    let text = section.text("authority")?;
    if text.value == "sni" {
        section
            .note(super::file::not_supported(&text.span, "authority = \"sni\"").help("a fixed host name works today"));
        return None;
    }
    bounded(section, &text, "\"authority\"", AUTHORITY_BYTES_MAX)
}

fn custom(section: &Section<'_>) -> Option<Vec<(u8, Vec<u8>)>> {
    let mut found = Vec::new();
    for element in section.list("custom")? {
        let Element::Table(entry) = element else { continue };
        entry.require("type", "a custom TLV", "0xE4");
        let kind = entry.integer("type").map(|kind| u8::try_from(kind).expect("limited to 8 bits"));
        if let Some(kind) = kind {
            check_custom_type(&entry, kind);
        }
        let value = custom_value(&entry);
        let (Some(kind), Some(value)) = (kind, value) else { continue };
        if value.len() > VALUE_BYTES_MAX {
            let message = format!("the value of a TLV has {VALUE_BYTES_MAX} bytes at most");
            section.note(Diagnostic::error(&entry.span, message).label(format!("{} bytes", value.len())));
            continue;
        }
        found.push((kind, value));
    }
    Some(found)
}

fn check_custom_type(entry: &Section<'_>, kind: u8) {
    let help = match kind {
        0xE0..=0xF7 => return,
        0x01 => "ALPN belongs to TLS, which this version does not terminate",
        0x02 => "write authority = \"...\"",
        0x03 => "write crc32c = true",
        0x04 => "NOOP is padding, and nothing that upstreams look at",
        0x05 => "write unique_id = true",
        0x20..=0x2F => "the SSL types describe a TLS session, which this version does not terminate",
        0x30 => "write netns = \"...\"",
        0xF8..=0xFF => "types 0xF8-0xFF are reserved by the specification; 0xE0-0xEF are yours",
        _ => "the specification assigns it, or will; 0xE0-0xEF are yours, and 0xF0-0xF7 for experiments",
    };
    let message = format!("type 0x{kind:02X} cannot be a custom TLV");
    entry.note(Diagnostic::error(&entry.span_of("type"), message).help(help));
}

fn custom_value(entry: &Section<'_>) -> Option<Vec<u8>> {
    let (text, hex) = (entry.text("text"), entry.text("hex"));
    match (entry.written("text"), entry.written("hex")) {
        (Some(first), Some(second)) => {
            let diagnostic = Diagnostic::error(&second, "a custom TLV has either \"text\" or \"hex\"");
            entry.note(diagnostic.label("one value too many").also(&first, "the other one"));
            return None;
        }
        (None, None) => {
            let diagnostic =
                Diagnostic::error(&entry.span, "a custom TLV has no value").label("no \"text\", no \"hex\"");
            entry.note(
                diagnostic.help("write text = \"edge-1\", or hex = \"0a0b\"; an empty value is text = \"\"").if_whole(),
            );
            return None;
        }
        _ => {}
    }
    if let Some(text) = text {
        return Some(text.value.as_bytes().to_vec());
    }
    let hex = hex?;
    let digits: Vec<u32> = hex.value.chars().map_while(|c| c.to_digit(16)).collect();
    if digits.len() != hex.value.chars().count() || !digits.len().is_multiple_of(2) {
        let diagnostic = Diagnostic::error(&hex.span, "\"hex\" must be an even number of hexadecimal digits");
        entry.note(diagnostic.help("two digits a byte, without spaces and without 0x: \"0a0b\""));
        return None;
    }
    Some(digits.chunks(2).map(|pair| u8::try_from(pair[0] * 16 + pair[1]).expect("two digits")).collect())
}

/// Type and longest value of everything that the table asks for.
fn values(tlvs: &Tlvs) -> Vec<(u8, usize)> {
    let by_source = tlvs.vpce_id_by_source.iter().flatten().map(|(_, id)| id.len());
    let vpce_id = by_source.chain(tlvs.vpce_id.as_ref().map(String::len)).max();
    let known = [
        (0x02, tlvs.authority.as_ref().map(String::len)),
        (0x03, tlvs.crc32c.filter(|on| *on).map(|_| 4)),
        (0x05, tlvs.unique_id.filter(|on| *on).map(|_| UNIQUE_ID_BYTES)),
        (0x30, tlvs.netns.as_ref().map(String::len)),
        (0xE0, tlvs.gcp_psc_id.map(|_| 8)),
        (0xEA, vpce_id.map(|bytes| 1 + bytes)),
        (0xEE, tlvs.azure_link_id.map(|_| 1 + 4)),
    ];
    let known = known.into_iter().filter_map(|(kind, bytes)| Some((kind, bytes?)));
    known.chain(tlvs.custom.iter().flatten().map(|(kind, value)| (*kind, value.len()))).collect()
}

/// The three tables that make the TLVs of one header, and what it is called in a message.
#[derive(Debug)]
pub(super) struct Levels<'s, 'a> {
    pub(super) what: String,
    /// The upstream's, the listener's, the pool's: the first one that has a key decides.
    pub(super) levels: [Option<(&'s Tlvs, &'s Section<'a>)>; 3],
}

/// Checks the headers of one pool: no type twice that a key of its own has, and a size that receivers take.
pub(super) fn check_headers(file: &Section<'_>, headers: &[Levels<'_, '_>]) {
    let mut said = BTreeSet::new();
    let mut largest: Option<(usize, usize, &Levels<'_, '_>)> = None;
    for header in headers {
        let none = Tlvs::default();
        let [upstream, listener, pool] = header.levels.map(|level| level.map_or(&none, |(tlvs, _)| tlvs));
        let merged = Tlvs::merge(upstream, listener, pool);
        let values = values(&merged);
        check_types(file, header, &merged, &mut said);
        let bytes = BARE_BYTES_MAX + values.iter().map(|(_, bytes)| 3 + bytes).sum::<usize>();
        let value = values.iter().map(|(_, bytes)| *bytes).max().unwrap_or(0);
        if largest.as_ref().is_none_or(|(most, _, _)| bytes > *most) {
            largest = Some((bytes, value, header));
        }
    }
    let Some((bytes, value, header)) = largest.filter(|(bytes, ..)| *bytes > HEADER_BYTES_SAFE) else { return };
    let Some(section) = header.levels.iter().flatten().map(|(_, section)| section).find(|s| s.is_written()) else {
        return;
    };
    let message = format!("{} takes up to {bytes} bytes", header.what);
    if bytes > HEADER_BYTES_MAX {
        let diagnostic = Diagnostic::error(&section.span, message);
        return file.note(diagnostic.label(format!("a header has {HEADER_BYTES_MAX} bytes at most")));
    }
    let mut refusers: Vec<String> = REFUSERS
        .iter()
        .enumerate()
        .filter(|(index, (limit, _))| *index == 0 || bytes >= *limit)
        .map(|(_, (limit, who))| format!("{who} refuse about {limit} bytes and more"))
        .collect();
    if value > HAPROXY_VALUE_BYTES_MAX {
        refusers.push(format!("HAProxy refuses a TLV of more than {HAPROXY_VALUE_BYTES_MAX} bytes"));
    }
    let diagnostic = Diagnostic::warning(&section.span, message);
    let label = format!("{HEADER_BYTES_SAFE} bytes are safe with every known receiver");
    file.note(diagnostic.label(label).help(refusers.join("; ")));
}

fn check_types(file: &Section<'_>, header: &Levels<'_, '_>, merged: &Tlvs, said: &mut BTreeSet<(usize, u8)>) {
    let by_source = merged.vpce_id_by_source.as_ref().is_some_and(|list| !list.is_empty());
    let keys = [
        (0xEA, "vpce_id", merged.vpce_id.is_some()),
        (0xEA, "vpce_id_by_source", by_source),
        (0xEE, "azure_link_id", merged.azure_link_id.is_some()),
        (0xE0, "gcp_psc_id", merged.gcp_psc_id.is_some()),
    ];
    let place = |key: &str| header.levels.iter().flatten().find_map(|(_, section)| section.written(key));
    for (kind, key, set) in keys {
        let custom = merged.custom.iter().flatten().any(|(custom, _)| *custom == kind);
        let (true, true, Some(span)) = (set, custom, place("custom")) else { continue };
        if said.insert((span.start, kind)) {
            let message = format!("{} has type 0x{kind:02X} twice", header.what);
            let diagnostic = Diagnostic::error(&span, message).label("from \"custom\"");
            let diagnostic = match place(key) {
                Some(other) => diagnostic.also(&other, format!("from {key:?}")),
                None => diagnostic,
            };
            file.note(diagnostic.help("take one of the two out: a receiver looks at the first, or at the last"));
        }
    }
}
