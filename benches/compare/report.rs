//! From samples to a table in Markdown and to JSON.

use std::fmt::Write;

use serde_json::{Map, Value, json};

use super::measure::Machine;
use super::peers::Kind;
use super::rows::Target;
use super::run::{Entry, Result};

/// Everything that was found out.
pub struct Report {
    /// Day and time, UTC.
    pub date: String,
    /// The command that repeats it.
    pub command: String,
    /// Where.
    pub machine: Machine,
    /// Of the candidates that took part.
    pub versions: Vec<(String, String)>,
    /// Runs of each candidate in each row.
    pub repetitions: usize,
    /// The rows.
    pub results: Vec<Result>,
}

/// Median and extremes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Spread {
    /// The middle one, or the mean of the two in the middle.
    pub median: f64,
    /// The least.
    pub min: f64,
    /// The greatest.
    pub max: f64,
}

impl Spread {
    /// `None` without values.
    pub fn of(mut values: Vec<f64>) -> Option<Spread> {
        values.retain(|value| value.is_finite());
        values.sort_by(f64::total_cmp);
        let (&min, &max) = (values.first()?, values.last()?);
        let median = f64::midpoint(values[(values.len() - 1) / 2], values[values.len() / 2]);
        Some(Spread { median, min, max })
    }
}

impl Entry {
    /// One figure over all its runs.
    pub fn spread(&self, key: &str) -> Option<Spread> {
        Spread::of(self.samples.iter().filter_map(|sample| sample.get(key).copied()).collect())
    }
}

impl Result {
    fn median(&self, kind: Kind, key: &str) -> Option<f64> {
        let entry = self.entries.iter().find(|entry| entry.contestant.kind == kind)?;
        // Half a row would be compared with whole ones.
        if entry.failure.is_some() {
            return None;
        }
        Some(entry.spread(key)?.median)
    }

    /// What a target's comparison came to; `None` if one that it needs is missing.
    pub fn outcome(&self, target: &Target) -> Option<f64> {
        let own = self.median(target.of, target.key)?;
        if target.against.is_empty() {
            return Some(own);
        }
        let best = target.against.iter().filter_map(|&kind| self.median(kind, target.against_key)).reduce(f64::min)?;
        (best > 0.0).then_some(own / best)
    }
}

impl Report {
    /// The machine, in a line.
    pub fn place(&self) -> String {
        let Machine { cpu, cpus, kernel, system } = &self.machine;
        format!("{cpu}, {cpus} CPU{}, Linux {kernel}, {system}", if *cpus == 1 { "" } else { "s" })
    }

    /// The versions, in a line.
    pub fn programs(&self) -> String {
        self.versions.iter().map(|(name, version)| format!("{name} {version}")).collect::<Vec<_>>().join(", ")
    }

    /// For people.
    pub fn markdown(&self) -> String {
        let mut text = format!(
            "# preface beside others\n\n{} on {}.\n{}.\n`{}`, {} {} of each, interleaved; median [least - greatest].\n\n\
             One worker each, on a processor of its own; generator and backend on {}. Every candidate sends PROXY protocol v2; \
             nginx v1, the only version that its stream module writes, and none on datagrams. The backend checks each header. CPU seconds are \
             those of all the candidate's threads; \"whole machine\" has generator, backend and the kernel's own threads in \
             it. Nothing logs connections unless it says so. \"direct\" is generator and backend without anything between: \
             the bound. Where the candidate keeps clearly less than a core busy, the generator or the round trip was the \
             limit, not the candidate.\n\n",
            self.date,
            self.place(),
            self.programs(),
            self.command,
            self.repetitions,
            if self.repetitions == 1 { "run" } else { "runs" },
            match self.machine.cpus {
                1 => "the same one",
                2 => "the other",
                _ => "two others",
            },
        );
        self.summary(&mut text);
        self.targets(&mut text);
        self.results.iter().for_each(|result| table(&mut text, result));
        text
    }

    /// The first figure of each row, one column a candidate.
    fn summary(&self, text: &mut String) {
        const SHOWN: [Kind; 6] =
            [Kind::Preface, Kind::Haproxy, Kind::HaproxyTuned, Kind::Nginx, Kind::NginxTuned, Kind::Envoy];
        let compared = |result: &&Result| !result.entries.iter().any(|entry| entry.contestant.scaling);
        let results: Vec<&Result> = self.results.iter().filter(compared).collect();
        if results.is_empty() {
            return;
        }
        text.push_str(
            "## Summary\n\n| less is better | preface | HAProxy | HAProxy tuned | nginx | nginx tuned | Envoy |\n\
             |---|---:|---:|---:|---:|---:|---:|\n",
        );
        for result in results {
            let metric = &result.row.work.metrics()[0];
            let cells = SHOWN.map(|kind| result.median(kind, metric.key).map_or("-".to_owned(), number));
            let _ = writeln!(
                text,
                "| {}: {} | **{}** | {} |",
                result.row.title,
                metric.title,
                cells[0],
                cells[1..].join(" | ")
            );
        }
        text.push('\n');
    }

    fn targets(&self, text: &mut String) {
        let mut lines = String::new();
        for result in &self.results {
            for target in &result.row.targets {
                let Some(outcome) = result.outcome(target) else { continue };
                let verdict = if outcome <= target.max { "reached" } else { "**missed**" };
                let (title, what) = (&result.row.title, target.text);
                let _ = writeln!(lines, "| {title} | {what} | {outcome:.2} | {} | {verdict} |", target.max);
            }
        }
        if !lines.is_empty() {
            text.push_str("## Targets\n\n| work | comparison | measured | at most | |\n|---|---|---:|---:|---|\n");
            text.push_str(&lines);
            text.push('\n');
        }
    }

    /// For programs: every sample.
    pub fn json(&self) -> Value {
        let rows: Vec<Value> = self.results.iter().map(row_json).collect();
        let versions: Map<String, Value> =
            self.versions.iter().map(|(name, version)| (name.clone(), json!(version))).collect();
        let Machine { cpu, cpus, kernel, system } = &self.machine;
        json!({
            "date": self.date,
            "command": self.command,
            "machine": { "cpu": cpu, "cpus": cpus, "kernel": kernel, "system": system },
            "versions": versions,
            "repetitions": self.repetitions,
            "rows": rows,
        })
    }
}

fn table(text: &mut String, result: &Result) {
    let shown = |key: &str| result.entries.iter().any(|entry| entry.spread(key).is_some());
    let metrics: Vec<_> = result.row.work.metrics().iter().filter(|metric| shown(metric.key)).collect();
    let titles: Vec<&str> = metrics.iter().map(|metric| metric.title).collect();
    let primary = result.row.work.metrics()[0].key;
    let preface = result.median(Kind::Preface, primary).filter(|_| !result.entries[0].contestant.scaling);
    let _ = writeln!(text, "## {}\n", result.row.title);
    let ratio = if preface.is_some() { " preface / it |" } else { "" };
    let _ = writeln!(text, "| | {} |{ratio}", titles.join(" | "));
    let _ = writeln!(text, "|---|{}{}", "---:|".repeat(metrics.len()), if preface.is_some() { "---:|" } else { "" });
    for entry in &result.entries {
        let label = entry.contestant.label();
        if let Some(failure) = &entry.failure {
            let _ = writeln!(text, "| {label} | failed: {} |", failure.replace(['|', '\n'], " "));
            continue;
        }
        let label = if entry.contestant.kind == Kind::Preface { format!("**{label}**") } else { label };
        let cells = metrics.iter().map(|metric| cell(entry.spread(metric.key))).collect::<Vec<_>>().join(" | ");
        let _ = write!(text, "| {label} | {cells} |");
        if let Some(preface) = preface {
            let ratio = entry.spread(primary).filter(|_| entry.contestant.kind != Kind::Preface);
            let _ = write!(text, " {} |", ratio.map_or("-".into(), |its| format!("{:.2}", preface / its.median)));
        }
        text.push('\n');
    }
    text.push('\n');
}

fn cell(spread: Option<Spread>) -> String {
    let Some(Spread { median, min, max }) = spread else { return "-".to_owned() };
    if min == max {
        return number(median);
    }
    format!("{} [{} - {}]", number(median), number(min), number(max))
}

/// Three digits that count.
pub fn number(value: f64) -> String {
    match value.abs() {
        size if size.fract() == 0.0 => format!("{value}"),
        size if size < 0.1 => format!("{value:.4}"),
        size if size < 1.0 => format!("{value:.3}"),
        size if size < 10.0 => format!("{value:.2}"),
        size if size < 100.0 => format!("{value:.1}"),
        _ => format!("{value:.0}"),
    }
}

fn row_json(result: &Result) -> Value {
    let units: Map<String, Value> =
        result.row.work.metrics().iter().map(|metric| (metric.key.to_owned(), json!(metric.title))).collect();
    let entries: Vec<Value> = result.entries.iter().map(|entry| entry_json(result, entry)).collect();
    let targets: Vec<Value> = result
        .row
        .targets
        .iter()
        .map(|target| {
            let outcome = result.outcome(target);
            let reached = outcome.map(|outcome| outcome <= target.max);
            json!({ "comparison": target.text, "measured": outcome, "at_most": target.max, "reached": reached })
        })
        .collect();
    json!({
        "name": result.row.name,
        "title": result.row.title,
        "metrics": units,
        "candidates": entries,
        "targets": targets,
    })
}

fn entry_json(result: &Result, entry: &Entry) -> Value {
    let header = result.row.work.header(entry.contestant.kind).map_or("none", |version| version.as_str());
    json!({
        "name": entry.contestant.label(),
        "workers": entry.contestant.workers,
        "header": header,
        "failure": entry.failure,
        "samples": entry.samples,
    })
}
