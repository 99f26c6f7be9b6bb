//! What the doctor makes of answers, and how it says so.

use super::advice::{Configured, problems};
use super::judge::{End, Exchange, Takes, Talk};
use super::*;
use crate::config::HeaderFormat;
use crate::proxy_protocol::Transport;

const BAD_REQUEST: &[u8] = b"HTTP/1.1 400 Bad Request\r\n\r\n";
const OK: &[u8] = b"HTTP/1.1 200 OK\r\n\r\n";

fn http() -> Question {
    Question::Http { path: "/".into(), host: None }
}

fn given(send: &str, expect: &str) -> Question {
    Question::Given { send: send.into(), expect: expect.into() }
}

/// One connection: what came unasked, what came after the question, how it ended.
fn came(attempt: Try, early: &[u8], late: &[u8], end: End) -> Exchange {
    let mut exchange = Exchange::new(attempt);
    let address = |text: &str| text.parse().unwrap();
    let (local, peer) = (address("192.0.2.1:40000"), address("192.0.2.2:80"));
    exchange.header = attempt.header(&usual_tlvs(), (local, peer), Transport::Stream).unwrap();
    (exchange.early, exchange.late, exchange.end) = (early.to_vec(), late.to_vec(), end);
    exchange.asked = early.is_empty();
    exchange
}

/// Every try: the first answer to the bare one, the second to every header.
fn all(question: Question, bare: (&[u8], &[u8], End), headers: (&[u8], &[u8], End)) -> Diagnosis {
    let exchange = |attempt: Try| {
        let (early, late, end) = if attempt == Try::Bare { bare.clone() } else { headers.clone() };
        came(attempt, early, late, end)
    };
    Diagnosis::new(question, Try::ALL.map(exchange).into())
}

const EVERYTHING: Takes = Takes { v1: true, v2: true, local: true, tlvs: true, unknown: true, spp: false };

#[test]
fn what_receivers_do_leads_to_what_they_expect() {
    let none = Expectation::NoHeader;
    let required = Expectation::Required(EVERYTHING);
    let optional = Expectation::Optional(EVERYTHING);
    let smtp = b"220 mail ESMTP\r\n";
    let both = b"220 mail ESMTP\r\n500 bad syntax\r\n";
    let before = b"500 bad syntax\r\n220 mail ESMTP\r\n";
    let dated = |second: &str| format!("220 mail; Sat, 21 Nov 2026 08:00:{second}\r\n").into_bytes();
    let mysql = |random: &str| [b"\x0c\0\0\0\x0a5.5.5\0", random.as_bytes()].concat();
    let error = [mysql("1234").as_slice(), b"\x10\0\0\x01\xff\x6a\x04#HY000 no header"].concat();
    let (html, not_allowed) = (b"<!DOCTYPE HTML>", b"HTTP/1.1 405 Not Allowed\r\n\r\n");
    for (question, bare, headers, expected) in [
        (http(), (&b""[..], OK, End::Closed), (&b""[..], BAD_REQUEST, End::Closed), &none),
        (http(), (b"", OK, End::Closed), (BAD_REQUEST, b"", End::Closed), &none),
        (http(), (b"", OK, End::Closed), (b"", not_allowed, End::Closed), &none),
        (http(), (b"", not_allowed, End::Closed), (b"", not_allowed, End::Closed), &optional),
        (http(), (b"", OK, End::Closed), (b"", html, End::Closed), &none),
        (http(), (b"", OK, End::Closed), (b"", b"", End::Reset), &none),
        (http(), (b"", OK, End::Closed), (b"", b"", End::Open), &none),
        (http(), (b"", OK, End::Closed), (b"", OK, End::Open), &optional),
        (http(), (b"", b"", End::Closed), (b"", OK, End::Open), &required),
        (http(), (b"", b"", End::Reset), (b"", OK, End::Open), &required),
        (http(), (b"", b"", End::Open), (b"", OK, End::Open), &required),
        (http(), (b"", BAD_REQUEST, End::Closed), (b"", OK, End::Open), &required),
        (http(), (smtp, b"", End::Open), (smtp, b"", End::Open), &optional),
        (http(), (smtp, b"", End::Open), (both, b"", End::Open), &none),
        (http(), (smtp, b"", End::Open), (before, b"", End::Open), &none),
        (http(), (smtp, b"", End::Open), (smtp, b"", End::Closed), &none),
        (http(), (&dated("01"), b"", End::Open), (&dated("02"), b"", End::Open), &optional),
        (http(), (b"", b"421 no\r\n", End::Reset), (smtp, b"", End::Open), &required),
        (http(), (b"", b"", End::Open), (smtp, b"", End::Open), &required),
        (http(), (&mysql("1234"), b"", End::Open), (&mysql("abcd"), b"", End::Open), &optional),
        (http(), (&mysql("1234"), b"", End::Open), (&error, b"", End::Reset), &none),
        (Question::Tls, (b"", b"\x16\x03\x03....", End::Open), (b"", BAD_REQUEST, End::Closed), &none),
        (
            Question::Tls,
            (b"", b"\x16\x03\x03....", End::Open),
            (b"", b"\x15\x03\x01\0\x02\x02\x46", End::Closed),
            &none,
        ),
        (Question::Tls, (b"", b"", End::Closed), (b"", b"\x15\x03\x03\0\x02\x02\x70", End::Closed), &required),
        (given("PING\r\n", "PONG"), (b"", b"+PONG\r\n", End::Open), (b"", b"-ERR\r\n+PONG\r\n", End::Open), &none),
        (given("PING\r\n", "PONG"), (b"", b"", End::Closed), (b"", b"+PONG\r\n", End::Open), &required),
        (given("", "220"), (b"", b"", End::Closed), (smtp, b"", End::Open), &required),
        (given("", "221"), (smtp, b"", End::Open), (both, b"", End::Open), &Expectation::Unclear(String::new())),
        (http(), (b"", b"", End::Open), (b"", b"", End::Open), &Expectation::Unclear(String::new())),
        (
            http(),
            (b"", BAD_REQUEST, End::Closed),
            (b"", BAD_REQUEST, End::Closed),
            &Expectation::Unclear(String::new()),
        ),
    ] {
        let told = format!("{question:?} {:?} {:?}", bare, headers);
        let diagnosis = all(question, bare, headers);
        match (&diagnosis.expects, expected) {
            (Expectation::Unclear(_), Expectation::Unclear(_)) => {}
            (found, expected) => assert_eq!(found, expected, "{told}"),
        }
    }
}

/// Over UDP: the answers to no header, v2, LOCAL, TLVs, spp.
#[test]
fn what_dns_servers_answer_leads_to_what_they_expect() {
    // Codes 0, 1 and 5; the last one is the answer to the signature of v2, taken for a question of unknown kind.
    let (yes, malformed, refused) = (b"\x12\x34\x81\x80", b"\x12\x34\x81\x81", b"\x12\x34\x81\x85");
    let to_signature = b"\x0d\x0a\x8d\x84";
    let takes = |v2, local, spp| Takes { v1: false, v2, local, tlvs: v2, unknown: false, spp };
    for (answers, expected) in [
        ([&b""[..], yes, yes, yes, b""], Expectation::Required(takes(true, true, false))),
        ([b"", yes, b"", yes, b""], Expectation::Required(takes(true, false, false))),
        ([b"", b"", b"", b"", yes], Expectation::Required(takes(false, false, true))),
        ([yes, to_signature, to_signature, to_signature, malformed], Expectation::NoHeader),
        ([refused, b"", b"", b"", b""], Expectation::NoHeader),
        ([refused, refused, refused, refused, b""], Expectation::Optional(takes(true, true, false))),
    ] {
        let exchange =
            |(attempt, late): (Try, &[u8])| Exchange { is_datagram: true, ..came(attempt, b"", late, End::Open) };
        let exchanges = Try::UDP.into_iter().zip(answers).map(exchange).collect();
        let diagnosis = Diagnosis::new(Question::Dns { name: ".".to_owned() }, exchanges);
        assert_eq!(diagnosis.expects, expected, "{answers:?}");
    }
}

#[test]
fn a_header_that_comes_back_was_not_understood() {
    let mut exchanges: Vec<Exchange> = Try::ALL.map(|attempt| came(attempt, b"", b"", End::Open)).into();
    for exchange in &mut exchanges {
        exchange.late = [exchange.header.as_slice(), b"PING"].concat();
    }
    assert_eq!(Diagnosis::new(given("PING", "PING"), exchanges).expects, Expectation::NoHeader);
}

#[test]
fn who_speaks_first_decides_whether_a_question_is_asked() {
    let bare = |early: &[u8], late: &[u8]| [came(Try::Bare, early, late, End::Open)];
    assert_eq!(talk(&[], &http()), Talk::Unknown);
    assert_eq!(talk(&[], &given("", "220")), Talk::ServerFirst);
    assert_eq!(talk(&bare(b"", b""), &http()), Talk::Unknown);
    assert_eq!(talk(&bare(b"", OK), &http()), Talk::ClientFirst);
    assert_eq!(talk(&bare(b"220 mail\r\n", b""), &http()), Talk::ServerFirst);
    assert_eq!(talk(&bare(b"", b"421 4.3.0 local error\r\n"), &http()), Talk::Unknown);
}

#[test]
fn a_wrong_question_is_noticed() {
    let bare = |late: &[u8]| [came(Try::Bare, b"", late, End::Closed)];
    let tls = [&b"HTTP/1.1 400 Bad Request\r\n\r\n"[..], b"The plain HTTP request was sent to HTTPS port"].concat();
    assert_eq!(better_question(&bare(&tls), &http()), Some(Question::Tls));
    assert_eq!(better_question(&bare(b"\x15\x03\x01\0\x02\x02\x46"), &http()), Some(Question::Tls));
    assert_eq!(better_question(&bare(BAD_REQUEST), &http()), None);
    assert_eq!(better_question(&bare(BAD_REQUEST), &Question::Tls), Some(http()));
    // Behind a header; but a TLS server that reads a header for a request answers so too, and its own hello before.
    let behind =
        |first: &[u8]| [came(Try::Bare, b"", first, End::Closed), came(Try::V2, b"", BAD_REQUEST, End::Closed)];
    assert_eq!(better_question(&behind(b""), &Question::Tls), Some(http()));
    assert_eq!(better_question(&behind(b"\x16\x03\x03...."), &Question::Tls), None);
    let ended = [Try::Bare, Try::V2, Try::V1].map(|attempt| came(attempt, b"", b"", End::Closed));
    assert_eq!(better_question(&ended[..2], &http()), None);
    assert_eq!(better_question(&ended, &http()), Some(Question::Tls));
}

/// Answers by try.
fn diagnosis(answers: [&[u8]; 6]) -> Diagnosis {
    let exchange = |(attempt, late): (Try, &[u8])| came(attempt, b"", late, End::Closed);
    Diagnosis::new(http(), Try::ALL.into_iter().zip(answers).map(exchange).collect())
}

#[test]
fn tells_about_one_upstream() {
    let (yes, no) = (OK, &b""[..]);
    let address = Address::Ip("192.0.2.2:8080".parse().unwrap());
    let all = [
        diagnosis([yes, BAD_REQUEST, BAD_REQUEST, BAD_REQUEST, BAD_REQUEST, BAD_REQUEST]),
        diagnosis([no, yes, yes, yes, yes, no]),
        diagnosis([no, no, yes, no, no, yes]),
        diagnosis([no, yes, no, no, no, no]),
        diagnosis([yes, yes, yes, yes, yes, yes]),
        diagnosis([no, no, no, no, no, no]),
    ];
    insta::assert_snapshot!(all.map(|diagnosis| report::diagnosis_text(&address, &diagnosis)).join("\n=====\n\n"));
}

#[test]
fn advice_is_a_configuration_without_warnings() {
    let smtp = |attempt| came(attempt, if attempt == Try::Bare { b"" } else { b"220 mail\r\n" }, b"", End::Open);
    let redis = given("PING\r\n", "+PONG");
    let ping = |attempt| came(attempt, b"", b"+PONG\r\n", End::Open);
    for diagnosis in [
        diagnosis([OK, b"", b"", b"", b"", b""]),
        diagnosis([b"", OK, OK, OK, OK, OK]),
        diagnosis([b"", OK, b"", b"", b"", b""]),
        diagnosis([b"", b"", OK, b"", b"", b""]),
        Diagnosis::new(http(), Try::ALL.map(smtp).into()),
        Diagnosis::new(redis, Try::ALL.map(ping).into()),
    ] {
        let lines = advice::toml(&diagnosis, "NAME", "192.0.2.2:8080").join("\n");
        let text = format!("[listeners.web]\nbind = \":80\"\npool = \"NAME\"\n\n{lines}\n");
        let parsed = config::parse("advice.toml", &text).unwrap_or_else(|error| panic!("{error:?}\n{text}"));
        assert!(parsed.warnings.is_empty(), "{:?}\n{text}", parsed.warnings);
        let target = targets(&parsed.config).remove(0);
        assert_eq!(problems(&target.configured, &diagnosis), [], "{text}");
    }
}

const FILE: &str = r#"[listeners.web]
bind = ":8080"
pool = "web"

[pools.web]
proxy_protocol = "v2"        # since March
upstreams = ["192.0.2.1", "192.0.2.2"]
[pools.web.tlvs]
crc32c = true
[pools.web.health_check]
protocol = "http"
proxy_protocol = "off"

[pools.mail]
[[pools.mail.upstreams]]
address = "192.0.2.3:25"
proxy_protocol = "v1"
[[pools.mail.upstreams]]
address = "192.0.2.4:25"
[pools.mail.health_check]
port = 8000
"#;

#[test]
fn tells_which_lines_of_a_file_to_change() {
    let parsed = config::parse("preface.toml", FILE).unwrap();
    let targets = targets(&parsed.config);
    let addresses: Vec<String> = targets.iter().map(|target| target.address.to_string()).collect();
    let expected =
        ["192.0.2.3:25", "192.0.2.3:8000", "192.0.2.4:25", "192.0.2.4:8000", "192.0.2.1:8080", "192.0.2.2:8080"];
    assert_eq!(addresses, expected);
    let required = || diagnosis([b"", OK, OK, OK, OK, OK]);
    let none = || diagnosis([OK, BAD_REQUEST, BAD_REQUEST, BAD_REQUEST, BAD_REQUEST, BAD_REQUEST]);
    let silent = || diagnosis([b"", b"", b"", b"", b"", b""]);
    let tell = |diagnoses: [Diagnosis; 6]| {
        let findings = targets.iter().cloned().zip(diagnoses).map(|(target, found)| Finding::new(target, found));
        report::findings_text(&compare::with_changes(findings.collect(), "preface.toml", FILE))
    };
    let no_v1_no_tlvs = || diagnosis([b"", OK, b"", OK, b"", b""]);
    let told = [
        tell([none(), none(), required(), required(), none(), none()]),
        tell([no_v1_no_tlvs(), none(), none(), none(), no_v1_no_tlvs(), silent()]),
        tell([required(), none(), none(), none(), required(), none()]),
    ];
    insta::assert_snapshot!(told.join("\n=====\n\n"));
}

#[test]
fn checks_are_compared_too() {
    let check = |lines: &str| {
        let text = format!(
            "[listeners.web]\nbind = \":80\"\npool = \"p\"\n[pools.p]\nproxy_protocol = \"v2\"\nupstreams = [\"192.0.2.1\"]\n\
             [pools.p.health_check]\n{lines}"
        );
        targets(&config::parse("p.toml", &text).unwrap().config).remove(0).configured
    };
    let no_local = || diagnosis([b"", OK, OK, b"", OK, b""]);
    let first = |configured: &Configured, diagnosis: &Diagnosis| {
        problems(configured, diagnosis).into_iter().map(|problem| (problem.key, problem.value)).next()
    };
    assert_eq!(first(&check("protocol = \"http\""), &no_local()), Some(("proxy_command", Some("proxy"))));
    assert_eq!(first(&check("proxy_command = \"proxy\""), &no_local()), None);
    let v1 = "proxy_protocol = \"v1\"\nproxy_command = \"unknown\"";
    assert_eq!(first(&check(v1), &no_local()), Some(("proxy_command", Some("local"))));
    assert_eq!(
        first(&check("protocol = \"http\"\nproxy_protocol = \"off\""), &no_local()),
        Some(("proxy_protocol", Some("same")))
    );
    // A connect that is over before the upstream accepts it disturbs nobody.
    assert_eq!(first(&check("proxy_protocol = \"off\""), &no_local()), None);
    let v2_only = diagnosis([b"", OK, b"", OK, OK, b""]);
    assert_eq!(first(&check("proxy_protocol = \"v1\""), &v2_only), Some(("proxy_protocol", Some("same"))));
    let off = Configured { version: None, ..check("proxy_protocol = \"v1\"") };
    let none = diagnosis([OK, BAD_REQUEST, BAD_REQUEST, BAD_REQUEST, BAD_REQUEST, BAD_REQUEST]);
    assert_eq!(first(&off, &none), Some(("proxy_protocol", Some("off"))));
    let v1 = Configured { version: Some(HeaderFormat::V1), ..check("") };
    assert_eq!(first(&v1, &v2_only), Some(("proxy_protocol", Some("v2"))));
}

#[test]
fn tlvs_are_told_where_they_are_sent() {
    let described = |more: &str| {
        let text = format!(
            "[listeners.web]\nbind = \":80\"\npool = \"p\"\n[pools.p]\nupstreams = [\"192.0.2.1\", {{ address = \"192.0.2.2\", \
             proxy_protocol = \"off\" }}]\nproxy_protocol = {more}"
        );
        let targets = targets(&config::parse("p.toml", &text).unwrap().config);
        targets.iter().map(|target| target.configured.describe()).collect::<Vec<_>>()
    };
    assert_eq!(described("\"v2\"\ntlvs = { crc32c = true }"), ["v2 + TLVs", "off"]);
    assert_eq!(described("\"v2\"\ntlvs = { crc32c = false }"), ["v2", "off"]);
    assert_eq!(described("\"off\"\ntlvs = { crc32c = false, unique_id = false }"), ["off", "off"]);
}

#[test]
fn arguments_are_read() {
    assert_eq!(unescape(r"PING\r\n\x00\\\t").unwrap().0, b"PING\r\n\0\\\t");
    for wrong in [r"\q", r"\", r"\x", r"\xg0"] {
        assert!(unescape(wrong).is_err(), "{wrong}");
    }
    for wrong in ["0s", "99ms", "2m", "soon"] {
        assert!(timeout(wrong).is_err(), "{wrong}");
    }
    assert_eq!(timeout("2s"), Ok(Duration::from_secs(2)));
    assert_eq!(resolve("[::1]:80").unwrap(), ["[::1]:80".parse().unwrap()]);
    for wrong in ["10.0.0.1", "::1", "name", ""] {
        assert!(format!("{:#}", resolve(wrong).unwrap_err()).contains("has no port"), "{wrong}");
    }
}
