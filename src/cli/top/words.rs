//! PURE. Numbers, times and names as short as a terminal's column needs them.

/// A point in time: seconds since 1970.
#[derive(Clone, Copy, Debug, PartialEq, PartialOrd)]
pub struct Time(f64);

impl Time {
    /// RFC 3339.
    pub fn parse(text: &str) -> Option<Time> {
        let time = humantime::parse_rfc3339(text).ok()?;
        let since = time.duration_since(humantime::parse_rfc3339("1970-01-01T00:00:00Z").ok()?).ok()?;
        Some(Time(since.as_secs_f64()))
    }

    /// Never negative.
    pub fn seconds_since(self, earlier: Time) -> u64 {
        (self.0 - earlier.0).max(0.0) as u64
    }

    /// Of the day, UTC.
    pub fn clock(self) -> String {
        let seconds = self.0 as u64 % 86_400;
        format!("{:02}:{:02}:{:02}", seconds / 3600, seconds / 60 % 60, seconds % 60)
    }
}

/// "12m", "3h 5m", "2d 4h"
pub fn span(seconds: u64) -> String {
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{}m", seconds / 60),
        3600..86_400 => format!("{}h {}m", seconds / 3600, seconds / 60 % 60),
        _ => format!("{}d {}h", seconds / 86_400, seconds / 3600 % 24),
    }
}

/// At most five characters.
pub fn count(value: Option<u64>) -> String {
    value.map_or_else(|| "-".to_owned(), |value| if value < 100_000 { value.to_string() } else { scaled(value as f64) })
}

/// At most five characters: 0, 0.2, 12, 1.5k.
pub fn rate(value: Option<f64>) -> String {
    match value {
        None => "-".to_owned(),
        Some(value) if value < 9.95 && value.fract() > 0.04 => format!("{value:.1}"),
        Some(value) if value < 9_999.5 => format!("{value:.0}"),
        Some(value) => scaled(value),
    }
}

fn scaled(value: f64) -> String {
    let (value, unit) = [(1e9, "G"), (1e6, "M")]
        .into_iter()
        .find(|(size, _)| value >= *size * 0.9995)
        .map_or((value / 1e3, "k"), |(size, unit)| (value / size, unit));
    if value < 99.95 { format!("{value:.1}{unit}") } else { format!("{value:.0}{unit}") }
}

/// At most eight characters: 12B, 1.5KiB, 230MiB.
pub fn bytes(value: Option<f64>) -> String {
    let Some(mut value) = value else { return "-".to_owned() };
    let mut units = ["B", "KiB", "MiB", "GiB"].into_iter();
    let mut unit = "B";
    for next in units.by_ref() {
        unit = next;
        if value < 1000.0 || next == "GiB" {
            break;
        }
        value /= 1024.0;
    }
    if unit == "B" || value >= 99.95 { format!("{value:.0}{unit}") } else { format!("{value:.1}{unit}") }
}

/// Milliseconds in at most six characters: 0.21ms, 12ms, 3.4s.
pub fn milliseconds(value: Option<f64>) -> String {
    match value {
        None => "-".to_owned(),
        Some(value) if value < 0.995 => format!("{value:.2}ms"),
        Some(value) if value < 9.95 => format!("{value:.1}ms"),
        Some(value) if value < 999.5 => format!("{value:.0}ms"),
        Some(value) if value < 99_500.0 => format!("{:.1}s", value / 1e3),
        Some(value) => format!("{:.0}s", value / 1e3),
    }
}

/// The end of a text that is too long: of an address that is what tells it from others.
pub fn tail(text: &str, width: usize) -> String {
    let length = text.chars().count();
    if length <= width {
        return text.to_owned();
    }
    let rest = text.chars().skip(length + 1 - width);
    std::iter::once('…').chain(rest).collect()
}

/// Lines of at most this width, broken at spaces; the first begins with `mark`, the others are as far in.
pub fn wrap(text: &str, width: usize, mark: &str) -> Vec<String> {
    let indent = " ".repeat(mark.chars().count());
    let mut lines = vec![mark.to_owned()];
    for word in text.split(' ').filter(|word| !word.is_empty()) {
        let line = lines.last_mut().expect("there is a first one");
        let is_empty = line.chars().count() == indent.len();
        if !is_empty && line.chars().count() + 1 + word.chars().count() > width {
            lines.push(format!("{indent}{word}"));
            continue;
        }
        if !is_empty {
            line.push(' ');
        }
        line.push_str(word);
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_fit_their_columns() {
        let counts = [0, 7, 99_999, 100_000, 999_999, 1_234_567, 99_999_999, u64::from(u32::MAX)];
        assert_eq!(counts.map(|value| count(Some(value))), ["0", "7", "99999", "100k", "1.0M", "1.2M", "100M", "4.3G"]);
        let rates = [0.0, 0.2, 3.0, 9.97, 99.5, 9_999.0, 12_345.0];
        assert_eq!(rates.map(|value| rate(Some(value))), ["0", "0.2", "3", "10", "100", "9999", "12.3k"]);
        let sizes = [0.0, 999.0, 1000.0, 150_000.0, 3e6, 2e12];
        assert_eq!(sizes.map(|value| bytes(Some(value))), ["0B", "999B", "1.0KiB", "146KiB", "2.9MiB", "1863GiB"]);
        let times = [0.0, 0.204, 0.996, 4.5, 120.0, 3_400.0, 120_000.0];
        assert_eq!(
            times.map(|value| milliseconds(Some(value))),
            ["0.00ms", "0.20ms", "1.0ms", "4.5ms", "120ms", "3.4s", "120s"]
        );
        assert_eq!([count(None), rate(None), bytes(None), milliseconds(None)], ["-"; 4].map(str::to_owned));
    }

    #[test]
    fn times_are_spans_and_clocks() {
        assert_eq!([5, 65, 3_900, 190_000].map(span), ["5s", "1m", "1h 5m", "2d 4h"]);
        let time = Time::parse("2026-11-21T04:38:07.120Z").unwrap();
        assert_eq!(time.clock(), "04:38:07");
        assert_eq!(time.seconds_since(Time::parse("2026-11-21T04:37:00Z").unwrap()), 67);
        assert_eq!(Time::parse("yesterday"), None);
    }

    #[test]
    fn long_lines_are_broken_at_spaces() {
        assert_eq!(wrap("one two three four", 9, "! "), ["! one two", "  three", "  four"]);
        assert_eq!(wrap("abcdefghijklm no", 5, "- "), ["- abcdefghijklm", "  no"]);
        assert_eq!(wrap("", 0, "! "), ["! "]);
    }

    #[test]
    fn of_a_long_name_the_end_stays() {
        assert_eq!(tail("[2001:db8::1]:443", 9), "…::1]:443");
        assert_eq!(tail("10.0.0.1:80", 11), "10.0.0.1:80");
    }
}
