//! PURE. DNS messages: a question to bytes, and what a server's answer to it says.

use std::net::IpAddr;
use std::str::FromStr;
use std::time::Duration;

use domain::base::iana::Rcode;
use domain::base::{Message, MessageBuilder, Name, Rtype, ToName};
use domain::rdata::{A, Aaaa, Cname, Srv};

use crate::config::names::Service;

/// Longest answer over UDP that is asked for where resolv.conf has `edns0`: it fits everywhere without fragments.
const UDP_BYTES_MAX: u16 = 1_232;

/// What is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// IPv4 addresses.
    A,
    /// IPv6 addresses.
    Aaaa,
    /// Services.
    Srv,
}

impl Kind {
    /// As DNS has it.
    pub fn as_str(self) -> &'static str {
        match self {
            Kind::A => "A",
            Kind::Aaaa => "AAAA",
            Kind::Srv => "SRV",
        }
    }

    fn rtype(self) -> Rtype {
        match self {
            Kind::A => Rtype::A,
            Kind::Aaaa => Rtype::AAAA,
            Kind::Srv => Rtype::SRV,
        }
    }
}

/// One question.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Question {
    /// The whole name, with a dot at its end.
    pub name: String,
    /// Of what.
    pub kind: Kind,
}

/// One record that was asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Record {
    /// A or AAAA.
    Address(IpAddr),
    /// SRV: where, and the whole name of the host.
    Service(Service, String),
}

/// What a server said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reply {
    /// These records, perhaps none, and the smallest TTL of all that led to them.
    Records(Vec<Record>, Duration),
    /// There is no such name.
    Nxdomain,
    /// There is more than fits into a datagram.
    Truncated,
    /// The server could not, or would not: its word for it.
    Failed(String),
}

/// Is this a name that DNS can have? If not, why not.
pub fn check_name(name: &str) -> Result<(), String> {
    Name::<Vec<u8>>::from_str(name).map(drop).map_err(|error| error.to_string())
}

/// The bytes of a question.
pub fn encode(question: &Question, id: u16, edns: bool) -> Result<Vec<u8>, String> {
    let name = Name::<Vec<u8>>::from_str(&question.name).map_err(|error| error.to_string())?;
    let mut builder = MessageBuilder::new_vec();
    builder.header_mut().set_id(id);
    builder.header_mut().set_rd(true);
    let mut builder = builder.question();
    builder.push((name, question.kind.rtype())).map_err(|error| error.to_string())?;
    if !edns {
        return Ok(builder.into_message().into_octets());
    }
    let mut builder = builder.additional();
    let set_size = |opt: &mut domain::base::message_builder::OptBuilder<'_, Vec<u8>>| {
        opt.set_udp_payload_size(UDP_BYTES_MAX);
        Ok(())
    };
    builder.opt(set_size).map_err(|error| error.to_string())?;
    Ok(builder.into_message().into_octets())
}

/// What these bytes answer to the question; `None`: they are no answer to it.
pub fn decode(bytes: &[u8], question: &Question, id: u16) -> Option<Reply> {
    let message = Message::from_octets(bytes).ok()?;
    let header = message.header();
    let asked = Name::<Vec<u8>>::from_str(&question.name).ok()?;
    let is_answer = header.qr() && header.id() == id;
    let echoed =
        || message.sole_question().is_ok_and(|echo| echo.qname() == &asked && echo.qtype() == question.kind.rtype());
    if !is_answer {
        return None;
    }
    let rcode = header.rcode();
    // A server that does not understand the question may leave it out of its answer.
    let is_failure = rcode != Rcode::NOERROR && rcode != Rcode::NXDOMAIN;
    if !echoed() {
        return (is_failure && message.header_counts().qdcount() == 0).then(|| Reply::Failed(rcode.to_string()));
    }
    Some(match rcode {
        Rcode::NXDOMAIN => Reply::Nxdomain,
        _ if is_failure => Reply::Failed(rcode.to_string()),
        _ if header.tc() => Reply::Truncated,
        _ => records(&message, question.kind)
            .unwrap_or_else(|| Reply::Failed("an answer that makes no sense".to_owned())),
    })
}

/// The records at the end of the chain of aliases.
fn records(message: &Message<&[u8]>, kind: Kind) -> Option<Reply> {
    let owner = message.canonical_name()?;
    let answer = message.answer().ok()?;
    let mut ttl = u32::MAX;
    for alias in answer.limit_to_in::<Cname<_>>() {
        ttl = ttl.min(alias.ok()?.ttl().as_secs());
    }
    let mut records = Vec::new();
    macro_rules! collect {
        ($data:ty, $record:expr) => {
            for record in answer.limit_to_in::<$data>() {
                let record = record.ok()?;
                if *record.owner() == owner {
                    ttl = ttl.min(record.ttl().as_secs());
                    records.extend($record(record.data()));
                }
            }
        };
    }
    match kind {
        Kind::A => collect!(A, |data: &A| Some(Record::Address(data.addr().into()))),
        Kind::Aaaa => collect!(Aaaa, |data: &Aaaa| Some(Record::Address(data.addr().into()))),
        Kind::Srv => collect!(Srv<_>, service),
    }
    Some(Reply::Records(records, Duration::from_secs(u64::from(ttl))))
}

/// RFC 2782: a target of "." says that the service is decidedly not available.
fn service<N: ToName>(data: &Srv<N>) -> Option<Record> {
    let target = data.target();
    // The root's label is there, too.
    if target.iter_labels().count() == 1 || data.port() == 0 {
        return None;
    }
    let service = Service { port: data.port(), priority: data.priority(), weight: data.weight() };
    let name: Name<Vec<u8>> = target.to_name();
    Some(Record::Service(service, format!("{name}.").to_ascii_lowercase()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use domain::base::Ttl;

    fn question(kind: Kind) -> Question {
        Question { name: "Web.example.".to_owned(), kind }
    }

    fn name(text: &str) -> Name<Vec<u8>> {
        Name::from_str(text).unwrap()
    }

    fn ttl(seconds: u32) -> Ttl {
        Ttl::from_secs(seconds)
    }

    /// An answer to the question, with what `fill` puts there.
    fn answer(kind: Kind, fill: impl FnOnce(&mut domain::base::message_builder::AnswerBuilder<Vec<u8>>)) -> Vec<u8> {
        let mut builder = MessageBuilder::new_vec();
        builder.header_mut().set_id(7);
        builder.header_mut().set_qr(true);
        let mut builder = builder.question();
        builder.push((name("web.EXAMPLE"), kind.rtype())).unwrap();
        let mut builder = builder.answer();
        fill(&mut builder);
        builder.into_message().into_octets()
    }

    #[test]
    fn a_question_is_what_the_rfc_says() {
        let plain = encode(&question(Kind::Aaaa), 0x1234, false).unwrap();
        assert_eq!(plain, b"\x12\x34\x01\x00\x00\x01\0\0\0\0\0\0\x03Web\x07example\0\0\x1c\0\x01");
        let edns = encode(&question(Kind::A), 0x1234, true).unwrap();
        assert_eq!(edns[..12], *b"\x12\x34\x01\x00\x00\x01\0\0\0\0\0\x01");
        assert!(edns.ends_with(b"\0\0\x29\x04\xd0\0\0\0\0\0\0"), "OPT with 1,232 bytes: {edns:?}");
        assert!(check_name(&format!("{}.example.", "a".repeat(64))).is_err());
    }

    #[test]
    fn aliases_are_followed_and_the_smallest_ttl_counts() {
        let bytes = answer(Kind::A, |answer| {
            answer.push((name("web.example"), ttl(60), Cname::new(name("a.example")))).unwrap();
            answer.push((name("a.example"), ttl(30), A::from_octets(10, 0, 0, 1))).unwrap();
            answer.push((name("a.example"), ttl(90), A::from_octets(10, 0, 0, 2))).unwrap();
            answer.push((name("other.example"), ttl(1), A::from_octets(10, 0, 0, 3))).unwrap();
        });
        let address = |last| Record::Address([10, 0, 0, last].into());
        let expected = Reply::Records(vec![address(1), address(2)], Duration::from_secs(30));
        assert_eq!(decode(&bytes, &question(Kind::A), 7), Some(expected));
        assert_eq!(decode(&bytes, &question(Kind::A), 8), None, "another id");
        assert_eq!(decode(&bytes, &question(Kind::Aaaa), 7), None, "another question");
        let other = Question { name: "other.example.".to_owned(), kind: Kind::A };
        assert_eq!(decode(&bytes, &other, 7), None, "another name");
    }

    #[test]
    fn services_have_their_targets() {
        let bytes = answer(Kind::Srv, |answer| {
            answer.push((name("web.example"), ttl(5), Srv::new(1, 2, 8080, name("A.example")))).unwrap();
            answer.push((name("web.example"), ttl(9), Srv::new(1, 2, 0, name("no-port.example")))).unwrap();
            answer.push((name("web.example"), ttl(9), Srv::new(0, 0, 80, name(".")))).unwrap();
        });
        let service = Record::Service(Service { port: 8080, priority: 1, weight: 2 }, "a.example.".to_owned());
        let expected = Reply::Records(vec![service], Duration::from_secs(5));
        assert_eq!(decode(&bytes, &question(Kind::Srv), 7), Some(expected));
    }

    #[test]
    fn failures_are_told_from_answers() {
        let mut bytes = answer(Kind::A, |_| {});
        let expected = Reply::Records(vec![], Duration::from_secs(u64::from(u32::MAX)));
        assert_eq!(decode(&bytes, &question(Kind::A), 7), Some(expected), "no records");
        for (rcode, expected) in
            [(2, Reply::Failed("SERVFAIL".to_owned())), (3, Reply::Nxdomain), (5, Reply::Failed("REFUSED".to_owned()))]
        {
            bytes[3] = rcode;
            assert_eq!(decode(&bytes, &question(Kind::A), 7), Some(expected));
        }
        bytes[3] = 0;
        bytes[2] |= 0x02;
        assert_eq!(decode(&bytes, &question(Kind::A), 7), Some(Reply::Truncated));
        bytes[2] &= 0x7F;
        assert_eq!(decode(&bytes, &question(Kind::A), 7), None, "a question is no answer");
        assert_eq!(
            decode(b"\0\x07\x80\x01\0\0\0\0\0\0\0\0", &question(Kind::A), 7),
            Some(Reply::Failed("FORMERR".to_owned())),
            "a server may leave out a question that it does not understand"
        );
    }

    #[test]
    fn bytes_cut_anywhere_and_changed_anywhere_are_survived() {
        let bytes = answer(Kind::Srv, |answer| {
            answer.push((name("web.example"), ttl(60), Cname::new(name("a.example")))).unwrap();
            answer.push((name("a.example"), ttl(5), Srv::new(1, 2, 8080, name("b.example")))).unwrap();
        });
        for length in 0..bytes.len() {
            let reply = decode(&bytes[..length], &question(Kind::Srv), 7);
            assert!(!matches!(&reply, Some(Reply::Records(records, _)) if !records.is_empty()), "{length}: {reply:?}");
        }
        for at in 0..bytes.len() {
            for value in 0..=255 {
                let mut bytes = bytes.clone();
                bytes[at] = value;
                // Whatever it says: it ends, and without a panic.
                let _ = decode(&bytes, &question(Kind::Srv), 7);
            }
        }
    }
}
