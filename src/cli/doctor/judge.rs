//! PURE. What the connections of an examination say about an upstream.

use std::time::Duration;

use super::tries::{Question, Try, contains};
use crate::proxy_protocol::Version;

/// Who speaks first, as far as it is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Talk {
    /// Listen for a while, then ask.
    Unknown,
    /// The server: a question would be an error.
    ServerFirst,
    /// The client: the question goes with the header.
    ClientFirst,
}

/// How one connection ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// It was open when there was enough to judge, or the time was over.
    Open,
    /// By the upstream's FIN.
    Closed,
    /// By the upstream's reset.
    Reset,
    /// It never came to be, or failed for a reason that is not the upstream's.
    NotConnected(String),
}

/// All that happened on one connection.
#[derive(Clone, Debug)]
pub struct Exchange {
    /// What went first.
    pub attempt: Try,
    /// Its bytes.
    pub header: Vec<u8>,
    /// What came before anything but the header was sent.
    pub early: Vec<u8>,
    /// The question, or a goodbye after a greeting, was sent.
    pub asked: bool,
    /// What came after that.
    pub late: Vec<u8>,
    /// How it ended.
    pub end: End,
    /// Connect and answer together.
    pub duration: Duration,
    /// Of the connect, if it succeeded.
    pub connect: Option<Duration>,
    /// From the last that was sent to the first byte after it.
    pub answer_after: Option<Duration>,
}

impl Exchange {
    /// Nothing has happened yet.
    pub fn new(attempt: Try) -> Exchange {
        let (header, early, late) = (Vec::new(), Vec::new(), Vec::new());
        Exchange {
            attempt,
            header,
            early,
            asked: false,
            late,
            end: End::Open,
            duration: Duration::ZERO,
            connect: None,
            answer_after: None,
        }
    }

    /// The server spoke without being asked, and not in HTTP: that is how HTTP servers complain about a header.
    fn was_greeted(&self) -> bool {
        !self.early.is_empty() && !self.early.starts_with(b"HTTP/") && !self.early.starts_with(b"\x15\x03")
    }

    fn answer(&self) -> Vec<u8> {
        [self.early.as_slice(), &self.late].concat()
    }
}

/// What one try came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Accepted and answered; how.
    Answered(String),
    /// Answered that it did not understand; how.
    Complained(String),
    /// Reset without a byte.
    Reset,
    /// Closed without a byte.
    Closed,
    /// Not a byte within the time.
    Silent,
    /// Could not be made.
    NotConnected(String),
}

impl Outcome {
    /// It was accepted.
    pub fn is_answered(&self) -> bool {
        matches!(self, Outcome::Answered(_))
    }

    /// For people.
    pub fn describe(&self) -> String {
        match self {
            Outcome::Answered(how) => format!("answered: {how}"),
            Outcome::Complained(how) => format!("refused: {how}"),
            Outcome::Reset => "reset without a byte".to_owned(),
            Outcome::Closed => "closed without a byte".to_owned(),
            Outcome::Silent => "silence".to_owned(),
            Outcome::NotConnected(why) => why.clone(),
        }
    }

    /// For machines.
    pub fn word(&self) -> &'static str {
        match self {
            Outcome::Answered(_) => "answered",
            Outcome::Complained(_) => "refused",
            Outcome::Reset => "reset",
            Outcome::Closed => "closed",
            Outcome::Silent => "silent",
            Outcome::NotConnected(_) => "not_connected",
        }
    }
}

/// Which headers are taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Takes {
    /// Version 1.
    pub v1: bool,
    /// Version 2.
    pub v2: bool,
    /// v2 LOCAL.
    pub local: bool,
    /// v2 with TLVs.
    pub tlvs: bool,
    /// `PROXY UNKNOWN`.
    pub unknown: bool,
}

impl Takes {
    /// Is this one taken?
    pub fn version(self, version: Version) -> bool {
        match version {
            Version::V1 => self.v1,
            Version::V2 => self.v2,
        }
    }

    /// The better one of those taken.
    pub fn best(self) -> Version {
        if self.v2 { Version::V2 } else { Version::V1 }
    }
}

/// What an upstream expects.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Expectation {
    /// None, and it refuses those that come.
    NoHeader,
    /// One on every connection.
    Required(Takes),
    /// It serves with and without one.
    Optional(Takes),
    /// Nothing that was tried was answered; why, perhaps.
    Unclear(String),
    /// It could not be reached.
    Unreachable(String),
}

/// Everything found out about one upstream.
#[derive(Clone, Debug)]
pub struct Diagnosis {
    /// What was asked in the end.
    pub question: Question,
    /// In the order in which they were made; those that were not needed are missing.
    pub outcomes: Vec<(Exchange, Outcome)>,
    /// The conclusion.
    pub expects: Expectation,
}

impl Diagnosis {
    /// Draws the conclusion.
    pub fn new(question: Question, exchanges: Vec<Exchange>) -> Diagnosis {
        // What is usual there; without an answer nothing is.
        let bare = exchanges.iter().find(|exchange| exchange.attempt == Try::Bare);
        let bare = bare.filter(|bare| outcome(bare, &question, None).is_answered()).cloned();
        let judged = |exchange: Exchange| {
            let outcome = outcome(&exchange, &question, bare.as_ref().filter(|_| exchange.attempt != Try::Bare));
            (exchange, outcome)
        };
        let outcomes: Vec<_> = exchanges.into_iter().map(judged).collect();
        let expects = expectation(&outcomes, &question);
        Diagnosis { question, outcomes, expects }
    }

    /// The same try once more: if it was quicker, that is how quick it is.
    pub fn quickened(&mut self, again: Exchange) {
        let before = self.outcomes.iter_mut().map(|(exchange, _)| exchange);
        for exchange in before.filter(|exchange| exchange.attempt == again.attempt) {
            exchange.connect = exchange.connect.min(again.connect.or(exchange.connect));
            exchange.answer_after = exchange.answer_after.min(again.answer_after.or(exchange.answer_after));
        }
    }

    /// What a try came to; `None`: it was not made.
    pub fn outcome(&self, attempt: Try) -> Option<&Outcome> {
        self.outcomes.iter().find(|(exchange, _)| exchange.attempt == attempt).map(|(_, outcome)| outcome)
    }

    /// An answer that was a success, to see which protocol is spoken: of the first try that was answered.
    pub fn good_answer(&self) -> Option<&Exchange> {
        self.outcomes.iter().find(|(_, outcome)| outcome.is_answered()).map(|(exchange, _)| exchange)
    }

    /// What the server says of its own accord.
    pub fn greeting(&self) -> Option<&[u8]> {
        self.good_answer().filter(|exchange| exchange.was_greeted()).map(|exchange| exchange.early.as_slice())
    }
}

/// What is known after these about who speaks first.
pub fn talk(exchanges: &[Exchange], question: &Question) -> Talk {
    if matches!(question, Question::Given { send, .. } if send.is_empty())
        || exchanges.iter().any(Exchange::was_greeted)
    {
        return Talk::ServerFirst;
    }
    // Not any answer: a server that speaks first, behind a header, may answer a question instead of it with an error.
    let is_asked = |exchange: &Exchange| exchange.early.is_empty() && outcome(exchange, question, None).is_answered();
    if exchanges.iter().any(is_asked) { Talk::ClientFirst } else { Talk::Unknown }
}

/// The other question, where the answers say that the guessed one was wrong: HTTP asked of a TLS port, or the reverse.
pub fn better_question(exchanges: &[Exchange], question: &Question) -> Option<Question> {
    let outcomes: Vec<Outcome> = exchanges.iter().map(|exchange| outcome(exchange, question, None)).collect();
    if outcomes.iter().any(Outcome::is_answered) {
        return None;
    }
    let ended = |outcome: &Outcome| matches!(outcome, Outcome::Closed | Outcome::Reset);
    let answer = exchanges.last()?.answer();
    let is_http = answer.starts_with(b"HTTP/");
    match question {
        Question::Http { .. } if answer.starts_with(b"\x15\x03") => Some(Question::Tls),
        Question::Http { .. } if is_http && status(&answer) == Some(400) => {
            let says_tls = contains(&answer, b"HTTPS") || contains(&answer, b"SSL-enabled");
            says_tls.then_some(Question::Tls)
        }
        // Many a TLS server just closes when it reads a request.
        Question::Http { .. } if outcomes.len() == Try::DECIDING && outcomes.iter().all(ended) => Some(Question::Tls),
        Question::Tls if is_http => Some(Question::Http { path: "/".to_owned(), host: None }),
        _ => None,
    }
}

fn outcome(exchange: &Exchange, question: &Question, bare: Option<&Exchange>) -> Outcome {
    if let End::NotConnected(why) = &exchange.end {
        return Outcome::NotConnected(why.clone());
    }
    let answer = exchange.answer();
    if answer.is_empty() {
        return match exchange.end {
            End::Closed => Outcome::Closed,
            End::Reset => Outcome::Reset,
            _ => Outcome::Silent,
        };
    }
    if !exchange.header.is_empty() && contains(&answer, &exchange.header) {
        return Outcome::Complained("it sent the header back, so took it for the client's bytes".to_owned());
    }
    let is_greeting = exchange.was_greeted() && bare.is_none_or(Exchange::was_greeted);
    let result = match question {
        _ if is_greeting => greeting(exchange, question, bare),
        Question::Http { .. } => http(&answer, bare),
        Question::Tls => tls(&answer),
        Question::Given { expect, .. } => given(&answer, expect, bare),
    };
    result.map_or_else(Outcome::Complained, Outcome::Answered)
}

type Judged = Result<String, String>;

fn greeting(exchange: &Exchange, question: &Question, bare: Option<&Exchange>) -> Judged {
    let early = &exchange.early;
    // SMTP and FTP turn away with a status of their own, MySQL with an error in the place of its greeting.
    let turned_away = early.len() > 3 && matches!(early[0], b'4' | b'5') && early[1..3].iter().all(u8::is_ascii_digit);
    if turned_away || is_mysql_error(early) {
        return Err(excerpt(early));
    }
    if let Question::Given { expect, .. } = question
        && !contains(early, expect)
    {
        return Err(excerpt(early));
    }
    let greeted = Ok(format!("it speaks first, {}", excerpt(early)));
    let Some(bare) = bare else { return greeted };
    if let Some(complaint) = beside_greeting(early, &bare.early) {
        return Err(format!("beside its greeting {}", excerpt(complaint)));
    }
    if bare.asked && !exchange.asked || bare.end == End::Open && exchange.end != End::Open {
        return Err("it greeted, then ended the connection".to_owned());
    }
    let replies_differ = !exchange.late.is_empty() && exchange.late.get(..3) != bare.late.get(..3);
    if exchange.asked && bare.asked && replies_differ {
        return Err(format!("beside its greeting {}", excerpt(&exchange.late)));
    }
    greeted
}

/// What a server says more than its greeting, by what it says without a header: further lines, or, in a protocol that is
/// not text, further bytes. The words of the greeting may differ (dates, random numbers), and a complaint may come
/// before it.
fn beside_greeting<'a>(early: &'a [u8], bare: &[u8]) -> Option<&'a [u8]> {
    if !bare.ends_with(b"\n") {
        return early.get(bare.len()..).filter(|more| !more.is_empty());
    }
    let lines: Vec<&[u8]> = early.split_inclusive(|byte| *byte == b'\n').collect();
    let usual: Vec<&[u8]> = bare.split_inclusive(|byte| *byte == b'\n').collect();
    let is_more = lines.len() > usual.len();
    let unusual = lines.iter().find(|line| !usual.contains(line)).or(lines.last());
    unusual.copied().filter(|_| is_more)
}

/// Length, sequence number, then 0xFF.
fn is_mysql_error(bytes: &[u8]) -> bool {
    bytes.len() > 7 && bytes[4] == 0xff && usize::from(bytes[0]) + 4 == bytes.len() && bytes[1..3] == [0, 0]
}

fn http(answer: &[u8], bare: Option<&Exchange>) -> Judged {
    let Some(code) = status(answer) else {
        return Err(excerpt(answer));
    };
    // Whatever a server makes of a header that it takes for a request.
    const NOT_UNDERSTOOD: [u16; 6] = [405, 408, 414, 431, 501, 505];
    let usual = bare.and_then(|bare| status(&bare.answer()));
    match code == 400 || (NOT_UNDERSTOOD.contains(&code) && usual.is_some_and(|usual| usual != code)) {
        true => Err(format!("HTTP {code}")),
        false => Ok(format!("HTTP {code}")),
    }
}

/// The status of an HTTP/1 answer.
pub fn status(answer: &[u8]) -> Option<u16> {
    let line = answer.strip_prefix(b"HTTP/1.")?;
    std::str::from_utf8(line.get(2..5)?).ok()?.parse().ok()
}

fn tls(answer: &[u8]) -> Judged {
    // Alerts of those who read something else than TLS: unexpected_message, bad_record_mac, record_overflow,
    // decode_error, protocol_version (RFC 8446, section 6).
    const NOT_UNDERSTOOD: [u8; 5] = [10, 20, 22, 50, 70];
    match answer {
        [0x16, 3, ..] => Ok("it begins a TLS handshake".to_owned()),
        [0x15, 3, _, _, _, _, alert, ..] if NOT_UNDERSTOOD.contains(alert) => Err(format!("TLS alert {alert}")),
        [0x15, 3, _, _, _, _, alert, ..] => Ok(format!("TLS alert {alert}, after reading the hello")),
        _ => match status(answer) {
            Some(code) => Err(format!("HTTP {code}")),
            None => Err(excerpt(answer)),
        },
    }
}

fn given(answer: &[u8], expect: &[u8], bare: Option<&Exchange>) -> Judged {
    // The expected answer may follow a complaint about the header.
    let begins_otherwise = bare.is_some_and(|bare| {
        let usual = bare.answer();
        let length = usual.len().min(answer.len()).min(4);
        contains(&usual, expect) && usual[..length] != answer[..length]
    });
    match contains(answer, expect) && !begins_otherwise {
        true => Ok(excerpt(answer)),
        false => Err(excerpt(answer)),
    }
}

fn expectation(outcomes: &[(Exchange, Outcome)], question: &Question) -> Expectation {
    let of = |attempt| outcomes.iter().find(|(exchange, _)| exchange.attempt == attempt).map(|(_, outcome)| outcome);
    let is_answered = |attempt| of(attempt).is_some_and(Outcome::is_answered);
    let takes = Takes {
        v1: is_answered(Try::V1),
        v2: is_answered(Try::V2),
        local: is_answered(Try::Local),
        tlvs: is_answered(Try::Tlvs),
        unknown: is_answered(Try::Unknown),
    };
    if let Some(Outcome::NotConnected(why)) = of(Try::Bare) {
        return Expectation::Unreachable(why.clone());
    }
    match (is_answered(Try::Bare), takes.v1 || takes.v2) {
        (true, true) => Expectation::Optional(takes),
        (true, false) => Expectation::NoHeader,
        (false, true) => Expectation::Required(takes),
        (false, false) => Expectation::Unclear(unclear(outcomes, question)),
    }
}

fn unclear(outcomes: &[(Exchange, Outcome)], question: &Question) -> String {
    let asked = question.describe();
    if outcomes.iter().all(|(_, outcome)| *outcome == Outcome::Silent) {
        return format!(
            "it is silent whatever comes first; asked was {asked}: say what its clients send with --send, and with \
             --expect what it answers; a slow one needs a longer --timeout"
        );
    }
    let complaint = outcomes.iter().find_map(|(_, outcome)| match outcome {
        Outcome::Complained(how) => Some(how),
        _ => None,
    });
    match complaint {
        Some(how) if matches!(question, Question::Http { .. }) && how == "HTTP 400" => {
            "it answers 400 whatever comes first: name a host that it serves with --host, and a path with --path".into()
        }
        Some(how) => format!(
            "it answers, but not what was expected ({how}); asked was {asked}: say what its clients send with --send, \
             and with --expect what it answers"
        ),
        None => format!(
            "it ends every connection; asked was {asked}: it may take connections or headers from certain addresses \
             only (run this where preface runs, or with --source), or speak another protocol (--send, --expect)"
        ),
    }
}

/// A part of an answer for people, quoted: its first line, or the longest text in what is not text.
pub fn excerpt(bytes: &[u8]) -> String {
    const BYTES_MAX: usize = 60;
    let is_text = |byte: &u8| byte.is_ascii_graphic() || *byte == b' ';
    let part = match bytes.iter().all(|byte| is_text(byte) || byte.is_ascii_whitespace() || !byte.is_ascii()) {
        true => bytes.split(|byte| *byte == b'\n').find(|line| !line.trim_ascii().is_empty()),
        false => bytes.split(|byte| !is_text(byte)).max_by_key(|run| run.len()).filter(|run| run.len() > 6),
    };
    let part = part.unwrap_or(bytes);
    let text = if part.trim_ascii().is_empty() { part } else { part.trim_ascii_end() };
    let shown = &text[..text.len().min(BYTES_MAX)];
    format!("\"{}{}\"", shown.escape_ascii(), if shown.len() < text.len() { "..." } else { "" })
}
