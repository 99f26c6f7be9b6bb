//! The Prometheus text format 0.0.4, of whatever families it is handed; knows no pool.

pub mod latency;

use std::fmt::Write;
use std::ops::Range;

use latency::Buckets;

/// What `/metrics` answers as its `Content-Type`.
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Metric families, written one after the other. Each family must be written once and as a whole: the format wants
/// its lines together.
#[derive(Debug, Default)]
pub struct Families {
    text: String,
}

/// A family that takes samples.
#[derive(Debug)]
pub struct Family<'a> {
    text: &'a mut String,
    name: &'a str,
}

/// What a sample is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Value {
    /// Counts, exact up to 2^64 here; Prometheus keeps 2^53 of it.
    Integer(u64),
    /// Seconds, ratios.
    Float(f64),
}

impl Families {
    /// No family yet.
    pub fn new() -> Families {
        Families::default()
    }

    /// A family that only grows while the process runs; its name ends with `_total`.
    pub fn counter<'a>(&'a mut self, name: &'a str, help: &str) -> Family<'a> {
        debug_assert!(name.ends_with("_total"), "the counter {name} does not end with _total");
        self.family(name, help, "counter")
    }

    /// A family that goes up and down; a unit in its name comes last (`_seconds`, `_bytes`).
    pub fn gauge<'a>(&'a mut self, name: &'a str, help: &str) -> Family<'a> {
        debug_assert!(!name.ends_with("_total"), "the gauge {name} is named like a counter");
        self.family(name, help, "gauge")
    }

    /// A family of distributions; its name ends with their unit, `_seconds`.
    pub fn histogram<'a>(&'a mut self, name: &'a str, help: &str) -> Family<'a> {
        debug_assert!(name.ends_with("_seconds"), "the histogram {name} does not end with its unit");
        self.family(name, help, "histogram")
    }

    fn family<'a>(&'a mut self, name: &'a str, help: &str, kind: &str) -> Family<'a> {
        debug_assert!(is_name(name), "{name:?} cannot name a metric");
        debug_assert!(!self.text.contains(&format!("# TYPE {name} ")), "the family {name} is written twice");
        let _ = write!(self.text, "# HELP {name} ");
        for character in help.chars() {
            match character {
                '\\' => self.text.push_str("\\\\"),
                '\n' => self.text.push_str("\\n"),
                other => self.text.push(other),
            }
        }
        let _ = writeln!(self.text, "\n# TYPE {name} {kind}");
        Family { text: &mut self.text, name }
    }

    /// The whole text.
    pub fn into_text(self) -> String {
        self.text
    }
}

impl Family<'_> {
    /// One sample. No two of a family have the same labels.
    pub fn sample(&mut self, labels: &[(&str, &str)], value: impl Into<Value>) -> &mut Self {
        self.write("", labels, value.into());
        self
    }

    /// One distribution, with these of its buckets.
    pub fn distribution(&mut self, labels: &[(&str, &str)], buckets: &Buckets, shown: Range<usize>) -> &mut Self {
        let count = buckets.count();
        let finite = buckets.cumulative(shown);
        for (bound, below) in finite.chain([(f64::INFINITY, count)]) {
            let bound = if bound.is_finite() { bound.to_string() } else { "+Inf".to_owned() };
            let labels: Vec<(&str, &str)> = labels.iter().copied().chain([("le", bound.as_str())]).collect();
            self.write("_bucket", &labels, below.into());
        }
        self.write("_sum", labels, buckets.sum_seconds().into());
        self.write("_count", labels, count.into());
        self
    }

    fn write(&mut self, suffix: &str, labels: &[(&str, &str)], value: Value) {
        self.text.push_str(self.name);
        self.text.push_str(suffix);
        for (index, (label, label_value)) in labels.iter().enumerate() {
            debug_assert!(is_name(label) && !label.contains(':'), "{label:?} cannot name a label");
            self.text.push(if index == 0 { '{' } else { ',' });
            self.text.push_str(label);
            self.text.push_str("=\"");
            push_label_value(self.text, label_value);
            self.text.push('"');
        }
        self.text.push_str(if labels.is_empty() { " " } else { "} " });
        push_value(self.text, value);
        self.text.push('\n');
    }
}

fn push_label_value(text: &mut String, value: &str) {
    for character in value.chars() {
        match character {
            '\\' => text.push_str("\\\\"),
            '"' => text.push_str("\\\""),
            '\n' => text.push_str("\\n"),
            other => text.push(other),
        }
    }
}

fn push_value(text: &mut String, value: Value) {
    let _ = match value {
        Value::Integer(integer) => write!(text, "{integer}"),
        // Rust writes "inf"; the format says "+Inf", as Go's ParseFloat reads it.
        Value::Float(float) if float.is_infinite() => write!(text, "{}Inf", if float > 0.0 { '+' } else { '-' }),
        Value::Float(float) => write!(text, "{float}"),
    };
}

fn is_name(name: &str) -> bool {
    let is_first = |c: char| c.is_ascii_alphabetic() || c == '_' || c == ':';
    name.starts_with(is_first) && name.chars().all(|c| is_first(c) || c.is_ascii_digit())
}

impl From<u64> for Value {
    fn from(value: u64) -> Value {
        Value::Integer(value)
    }
}

impl From<u32> for Value {
    fn from(value: u32) -> Value {
        Value::Integer(u64::from(value))
    }
}

impl From<usize> for Value {
    fn from(value: usize) -> Value {
        Value::Integer(value as u64)
    }
}

impl From<bool> for Value {
    fn from(value: bool) -> Value {
        Value::Integer(u64::from(value))
    }
}

impl From<f64> for Value {
    fn from(value: f64) -> Value {
        Value::Float(value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn writes_families_with_escaped_labels_and_help() {
        let mut families = Families::new();
        families
            .counter("preface_connections_total", "Connections accepted.")
            .sample(&[("listener", "web"), ("end", "client.relay.closed")], 12u64)
            .sample(&[("listener", "a\"b\\c\nd"), ("end", "")], u64::MAX);
        families.gauge("preface_ready", "1 while \\ready\nto serve.").sample(&[], true);
        families
            .gauge("preface_reload_seconds", "Odd values.")
            .sample(&[("of", "last")], 0.25)
            .sample(&[("of", "plus")], f64::INFINITY)
            .sample(&[("of", "minus")], f64::NEG_INFINITY)
            .sample(&[("of", "none")], f64::NAN);
        families.gauge("preface_upstreams", "None yet.");
        insta::assert_snapshot!(families.into_text(), @r#"
        # HELP preface_connections_total Connections accepted.
        # TYPE preface_connections_total counter
        preface_connections_total{listener="web",end="client.relay.closed"} 12
        preface_connections_total{listener="a\"b\\c\nd",end=""} 18446744073709551615
        # HELP preface_ready 1 while \\ready\nto serve.
        # TYPE preface_ready gauge
        preface_ready 1
        # HELP preface_reload_seconds Odd values.
        # TYPE preface_reload_seconds gauge
        preface_reload_seconds{of="last"} 0.25
        preface_reload_seconds{of="plus"} +Inf
        preface_reload_seconds{of="minus"} -Inf
        preface_reload_seconds{of="none"} NaN
        # HELP preface_upstreams None yet.
        # TYPE preface_upstreams gauge
        "#);
    }

    #[test]
    fn writes_a_distribution_as_cumulative_buckets() {
        let mut buckets = Buckets::default();
        for milliseconds in [1, 2, 2, 7000] {
            buckets.record(std::time::Duration::from_millis(milliseconds));
        }
        let mut families = Families::new();
        families.histogram("preface_x_seconds", "Waits.").distribution(&[("pool", "p")], &buckets, 2..6);
        insta::assert_snapshot!(families.into_text(), @r#"
        # HELP preface_x_seconds Waits.
        # TYPE preface_x_seconds histogram
        preface_x_seconds_bucket{pool="p",le="0.0005"} 0
        preface_x_seconds_bucket{pool="p",le="0.001"} 1
        preface_x_seconds_bucket{pool="p",le="0.0025"} 3
        preface_x_seconds_bucket{pool="p",le="0.005"} 3
        preface_x_seconds_bucket{pool="p",le="+Inf"} 4
        preface_x_seconds_sum{pool="p"} 7.005
        preface_x_seconds_count{pool="p"} 4
        "#);
    }

    #[test]
    fn names_follow_the_data_model() {
        for good in ["a", "_a", "a:b", "preface_x_total", "A9"] {
            assert!(is_name(good), "{good}");
        }
        for bad in ["", "9a", "a-b", "a b", "ä", "a.b"] {
            assert!(!is_name(bad), "{bad}");
        }
    }

    #[test]
    #[should_panic(expected = "written twice")]
    fn a_family_is_written_once() {
        let mut families = Families::new();
        families.gauge("preface_ready", "Once.");
        families.gauge("preface_ready", "Twice.");
    }
}
