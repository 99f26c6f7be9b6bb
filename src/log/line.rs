//! How a line looks: logfmt or JSON, the same keys in the same order.

use std::fmt::{self, Display, Write};
use std::net::SocketAddr;
use std::time::{Duration, SystemTime};

use crate::address::{Address, Client};
use crate::config::LogFormat;
use crate::termination::Termination;

/// One line under construction.
#[derive(Debug)]
pub struct Line {
    text: String,
    format: LogFormat,
}

impl Line {
    /// A line with its time, level and event.
    pub fn new(format: LogFormat, time: SystemTime, level: &str, event: &str) -> Line {
        let mut line = Line { text: String::with_capacity(512), format };
        if format == LogFormat::Json {
            line.text.push('{');
        }
        line.plain("time", humantime::format_rfc3339_millis(time));
        line.plain("level", level);
        line.string("event", event);
        line
    }

    /// Text of any kind.
    pub fn string(&mut self, key: &str, value: &str) {
        self.key(key);
        match self.format {
            LogFormat::Text if !needs_quotes(value) => self.text.push_str(value),
            _ => push_quoted(&mut self.text, value),
        }
    }

    /// A number or boolean: bare in both formats.
    pub fn number(&mut self, key: &str, value: impl Display) {
        self.key(key);
        let _ = write!(self.text, "{value}");
    }

    /// What it never came to.
    pub fn nothing(&mut self, key: &str) {
        self.key(key);
        self.text.push_str(match self.format {
            LogFormat::Text => "-",
            LogFormat::Json => "null",
        });
    }

    /// Text that is known to need no escaping in either format: addresses, times, our own words.
    fn plain(&mut self, key: &str, value: impl Display) {
        self.key(key);
        let _ = match self.format {
            LogFormat::Text => write!(self.text, "{value}"),
            LogFormat::Json => write!(self.text, "\"{value}\""),
        };
    }

    fn plain_or_nothing(&mut self, key: &str, value: Option<impl Display>) {
        match value {
            Some(value) => self.plain(key, value),
            None => self.nothing(key),
        }
    }

    fn address_or_nothing(&mut self, key: &str, value: Option<&Address>) {
        match value {
            Some(Address::Ip(address)) => self.plain(key, address),
            // A path may have anything in it.
            Some(address @ Address::Unix(_)) => self.string(key, &address.to_string()),
            None => self.nothing(key),
        }
    }

    fn milliseconds_or_nothing(&mut self, key: &str, value: Option<Duration>) {
        match value {
            Some(value) => self.number(key, Milliseconds(value)),
            None => self.nothing(key),
        }
    }

    fn key(&mut self, key: &str) {
        match self.format {
            LogFormat::Text => {
                if !self.text.is_empty() {
                    self.text.push(' ');
                }
                self.text.push_str(key);
                self.text.push('=');
            }
            LogFormat::Json => {
                if self.text.len() > 1 {
                    self.text.push(',');
                }
                push_quoted(&mut self.text, key);
                self.text.push(':');
            }
        }
    }

    /// The line with its newline.
    pub fn finish(mut self) -> String {
        if self.format == LogFormat::Json {
            self.text.push('}');
        }
        self.text.push('\n');
        self.text
    }
}

/// What the line of one finished connection says. `None` is what it never came to.
#[derive(Clone, Copy, Debug)]
pub struct ConnectionLine<'a> {
    /// When it ended.
    pub time: SystemTime,
    /// Its ULID; the same as in the header's UNIQUE_ID.
    pub id: &'a str,
    /// Name of the listener.
    pub listener: &'a str,
    /// Who connected.
    pub client: Client,
    /// The address it connected to.
    pub local: Option<&'a Address>,
    /// Name of the pool.
    pub pool: Option<&'a str>,
    /// The last upstream that was tried.
    pub upstream: Option<&'a Address>,
    /// "v1", "v2", or "off" where that upstream gets none.
    pub header: Option<&'a str>,
    /// From the client to the upstream, without the header.
    pub bytes_in: u64,
    /// From the upstream to the client.
    pub bytes_out: u64,
    /// Duration of the connect that succeeded.
    pub connect: Option<Duration>,
    /// From accept to the upstream's first byte.
    pub first_byte: Option<Duration>,
    /// From accept to the end.
    pub duration: Duration,
    /// Upstreams tried.
    pub attempts: u32,
    /// The cause of its end.
    pub end: Termination,
}

/// The line of one finished connection, its newline included.
pub fn connection_line(format: LogFormat, connection: &ConnectionLine) -> String {
    ended_line(format, "connection", connection, None)
}

/// The line of one finished UDP session, its newline included: as of a connection, and the datagrams in and out.
pub fn session_line(format: LogFormat, session: &ConnectionLine, datagrams: [u64; 2]) -> String {
    ended_line(format, "session", session, Some(datagrams))
}

fn ended_line(format: LogFormat, event: &str, connection: &ConnectionLine, datagrams: Option<[u64; 2]>) -> String {
    let mut line = Line::new(format, connection.time, "info", event);
    line.plain("id", connection.id);
    line.string("listener", connection.listener);
    line.plain("client", connection.client);
    line.address_or_nothing("local", connection.local);
    match connection.pool {
        Some(pool) => line.string("pool", pool),
        None => line.nothing("pool"),
    }
    line.address_or_nothing("upstream", connection.upstream);
    line.plain_or_nothing("header", connection.header);
    line.number("bytes_in", connection.bytes_in);
    line.number("bytes_out", connection.bytes_out);
    if let Some([datagrams_in, datagrams_out]) = datagrams {
        line.number("datagrams_in", datagrams_in);
        line.number("datagrams_out", datagrams_out);
    }
    line.milliseconds_or_nothing("connect_ms", connection.connect);
    line.milliseconds_or_nothing("first_byte_ms", connection.first_byte);
    line.number("duration_ms", Milliseconds(connection.duration));
    line.number("attempts", connection.attempts);
    line.plain("end", connection.end);
    line.finish()
}

/// The line of a session that begins, its newline included.
pub fn session_start_line(format: LogFormat, time: SystemTime, id: &str, listener: &str, client: SocketAddr) -> String {
    start_line(format, "session_start", time, id, listener, client.into())
}

/// The line of a connection that begins (`log.connections = "start_and_end"`), its newline included.
pub fn connection_start_line(format: LogFormat, time: SystemTime, id: &str, listener: &str, client: Client) -> String {
    start_line(format, "connection_start", time, id, listener, client)
}

fn start_line(format: LogFormat, event: &str, time: SystemTime, id: &str, listener: &str, client: Client) -> String {
    let mut line = Line::new(format, time, "info", event);
    line.plain("id", id);
    line.string("listener", listener);
    line.plain("client", client);
    line.finish()
}

/// Milliseconds with microseconds as the fraction, without floating point.
struct Milliseconds(Duration);

impl Display for Milliseconds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let micros = self.0.as_micros();
        write!(f, "{}.{:03}", micros / 1000, micros % 1000)
    }
}

/// Would a reader of logfmt misread the bare value? A lone "-" stands for "nothing", so a real one is quoted.
fn needs_quotes(value: &str) -> bool {
    let odd = |c: char| c.is_whitespace() || c.is_control() || matches!(c, '"' | '=' | '\\') || is_line_break(c);
    value.is_empty() || value == "-" || value.chars().any(odd)
}

/// JSON's rules; text follows them too, so one line stays one line whatever a value holds.
fn push_quoted(text: &mut String, value: &str) {
    text.push('"');
    for character in value.chars() {
        push_escaped(text, character);
    }
    text.push('"');
}

fn push_escaped(text: &mut String, character: char) {
    match character {
        '"' => text.push_str("\\\""),
        '\\' => text.push_str("\\\\"),
        '\n' => text.push_str("\\n"),
        '\r' => text.push_str("\\r"),
        '\t' => text.push_str("\\t"),
        other if other.is_control() || is_line_break(other) => {
            let _ = write!(text, "\\u{:04x}", u32::from(other));
        }
        other => text.push(other),
    }
}

/// LINE SEPARATOR and PARAGRAPH SEPARATOR end a line for some readers.
fn is_line_break(character: char) -> bool {
    matches!(character, '\u{2028}' | '\u{2029}')
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

    fn at_noon() -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_millis(1_795_235_880_123)
    }

    static LOCAL: Address =
        Address::Ip(SocketAddr::new(IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1)), 80));
    static UPSTREAM: Address = Address::Ip(SocketAddr::new(IpAddr::V4(Ipv4Addr::new(10, 0, 0, 30)), 80));

    fn whole() -> ConnectionLine<'static> {
        ConnectionLine {
            time: at_noon(),
            id: "01KAJ4C0ZJ7Q0V3M8X2T5R9WBE",
            listener: "web",
            client: Client::Ip("203.0.113.7:51234".parse().unwrap()),
            local: Some(&LOCAL),
            pool: Some("ingress"),
            upstream: Some(&UPSTREAM),
            header: Some("v2"),
            bytes_in: 78,
            bytes_out: u64::MAX,
            connect: Some(Duration::from_micros(412)),
            first_byte: Some(Duration::from_micros(3_007)),
            duration: Duration::from_secs(12),
            attempts: 2,
            end: Termination::ClientClosed,
        }
    }

    fn cut_short() -> ConnectionLine<'static> {
        ConnectionLine {
            local: None,
            pool: None,
            upstream: None,
            header: None,
            bytes_in: 0,
            bytes_out: 0,
            connect: None,
            first_byte: None,
            attempts: 0,
            end: Termination::Denied,
            ..whole()
        }
    }

    #[test]
    fn a_connection_has_the_documented_fields_in_order() {
        let lines: String = [
            connection_line(LogFormat::Text, &whole()),
            connection_line(LogFormat::Text, &cut_short()),
            connection_line(LogFormat::Json, &whole()),
            connection_line(LogFormat::Json, &cut_short()),
        ]
        .concat();
        insta::assert_snapshot!(lines, @r#"
        time=2026-11-21T04:38:00.123Z level=info event=connection id=01KAJ4C0ZJ7Q0V3M8X2T5R9WBE listener=web client=203.0.113.7:51234 local=[2001:db8::1]:80 pool=ingress upstream=10.0.0.30:80 header=v2 bytes_in=78 bytes_out=18446744073709551615 connect_ms=0.412 first_byte_ms=3.007 duration_ms=12000.000 attempts=2 end=client.relay.closed
        time=2026-11-21T04:38:00.123Z level=info event=connection id=01KAJ4C0ZJ7Q0V3M8X2T5R9WBE listener=web client=203.0.113.7:51234 local=- pool=- upstream=- header=- bytes_in=0 bytes_out=0 connect_ms=- first_byte_ms=- duration_ms=12000.000 attempts=0 end=preface.accept.denied
        {"time":"2026-11-21T04:38:00.123Z","level":"info","event":"connection","id":"01KAJ4C0ZJ7Q0V3M8X2T5R9WBE","listener":"web","client":"203.0.113.7:51234","local":"[2001:db8::1]:80","pool":"ingress","upstream":"10.0.0.30:80","header":"v2","bytes_in":78,"bytes_out":18446744073709551615,"connect_ms":0.412,"first_byte_ms":3.007,"duration_ms":12000.000,"attempts":2,"end":"client.relay.closed"}
        {"time":"2026-11-21T04:38:00.123Z","level":"info","event":"connection","id":"01KAJ4C0ZJ7Q0V3M8X2T5R9WBE","listener":"web","client":"203.0.113.7:51234","local":null,"pool":null,"upstream":null,"header":null,"bytes_in":0,"bytes_out":0,"connect_ms":null,"first_byte_ms":null,"duration_ms":12000.000,"attempts":0,"end":"preface.accept.denied"}
        "#);
    }

    #[test]
    fn text_quotes_what_could_be_misread() {
        let mut line = Line::new(LogFormat::Text, at_noon(), "warn", "odd one");
        for (key, value) in [
            ("empty", ""),
            ("dash", "-"),
            ("plain", "a-b.c:d/e[f]'g'"),
            ("space", "a b"),
            ("equals", "a=b"),
            ("quote", "a\"b"),
            ("backslash", "a\\b"),
            ("lines", "a\nb\r\tc"),
            ("control", "\u{1b}[31m\u{0}\u{85}\u{2028}"),
            ("unicode", "grüße"),
        ] {
            line.string(key, value);
        }
        let text = line.finish();
        assert_eq!(text.lines().count(), 1);
        insta::assert_snapshot!(text, @r#"time=2026-11-21T04:38:00.123Z level=warn event="odd one" empty="" dash="-" plain=a-b.c:d/e[f]'g' space="a b" equals="a=b" quote="a\"b" backslash="a\\b" lines="a\nb\r\tc" control="\u001b[31m\u0000\u0085\u2028" unicode=grüße"#);
    }

    #[test]
    fn json_holds_every_character() {
        let every: String = (0..0x300u32).chain(0x2020..0x2030).filter_map(char::from_u32).collect();
        let mut line = Line::new(LogFormat::Json, at_noon(), "info", &every);
        line.string(&every, &every);
        let text = line.finish();
        assert_eq!(text.matches('\n').count(), 1);
        let value: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(value["event"], every.as_str());
        assert_eq!(value[&every], every.as_str());
    }
}
