//! PURE. What the doctor found out, for people and for machines.

use std::fmt::Write as _;

use serde_json::{Value, json};

use super::advice::{self, OPTIONAL, checks, conclusion, found, found_word, toml, word};
use super::compare::{Finding, Role};
use super::judge::{Diagnosis, Expectation};
use super::speed::Speed;
use crate::address::Address;

/// In the lines to copy.
const POOL: &str = "NAME";

/// One upstream, for people.
pub fn diagnosis_text(address: &Address, diagnosis: &Diagnosis) -> String {
    let mut text = format!("{address}, asked: {}\n\n", asked(diagnosis));
    let mut rows = vec![["sent first".to_owned(), "bytes".to_owned(), "what it did".to_owned()]];
    for (exchange, outcome) in &diagnosis.outcomes {
        rows.push([exchange.attempt.name().to_owned(), exchange.header.len().to_string(), outcome.describe()]);
    }
    text += &columns(&rows, "  ");
    let _ = writeln!(text, "\n{}", capital(&conclusion(&diagnosis.expects)));
    if let Some(speed) = Speed::of(diagnosis) {
        let _ = writeln!(text, "{}", speed.describe());
    }
    if matches!(diagnosis.expects, Expectation::Optional(_)) {
        let _ = writeln!(text, "Send it: {OPTIONAL}.");
    }
    let lines = toml(diagnosis, POOL, &address.to_string());
    if !lines.is_empty() {
        text += "\nIn the configuration:\n";
        for line in lines {
            let _ = writeln!(text, "{}", format!("  {line}").trim_end());
        }
    }
    let notes = checks(diagnosis);
    if !notes.is_empty() {
        text += "\nHealth checks:\n";
        for note in notes {
            let _ = writeln!(text, "  - {note}");
        }
    }
    text
}

/// One upstream, for machines.
pub fn diagnosis_json(address: &Address, diagnosis: &Diagnosis) -> Value {
    let mut value = json!({ "address": address });
    for (key, part) in diagnosis_parts(diagnosis) {
        value[key] = part;
    }
    value["toml"] = json!(toml(diagnosis, POOL, &address.to_string()).join("\n"));
    value["health_checks"] = json!(checks(diagnosis));
    value
}

fn asked(diagnosis: &Diagnosis) -> String {
    match diagnosis.greeting() {
        Some(_) => "nothing, it speaks first".to_owned(),
        None => diagnosis.question.describe(),
    }
}

fn diagnosis_parts(diagnosis: &Diagnosis) -> Vec<(&'static str, Value)> {
    let tries: Vec<Value> = diagnosis
        .outcomes
        .iter()
        .map(|(exchange, outcome)| {
            json!({
                "header": exchange.attempt.word(),
                "bytes": exchange.header.len(),
                "outcome": outcome.word(),
                "detail": outcome.describe(),
                "ms": (exchange.duration.as_secs_f64() * 10_000.0).round() / 10.0,
            })
        })
        .collect();
    vec![
        ("asked", json!(asked(diagnosis))),
        ("tries", json!(tries)),
        ("expects", json!(found_word(&diagnosis.expects))),
        ("conclusion", json!(conclusion(&diagnosis.expects))),
        ("proxy_protocol", json!(advice::version(&diagnosis.expects).map(word))),
        ("connect_ms", json!(Speed::of(diagnosis).map(|speed| (speed.connect_ms * 10.0).round() / 10.0))),
        ("answer_ms", json!(Speed::of(diagnosis).map(|speed| (speed.answer_ms * 10.0).round() / 10.0))),
    ]
}

/// Every upstream of a file, for people.
pub fn findings_text(findings: &[Finding]) -> String {
    let heads = ["pool", "upstream", "configured", "found", "verdict"];
    let mut rows = vec![heads.map(str::to_owned)];
    for finding in findings {
        let target = &finding.target;
        rows.push([
            target.pool.clone(),
            target.address.to_string(),
            target.describe_configured(),
            found(&finding.diagnosis.expects),
            finding.verdict().to_owned(),
        ]);
    }
    let mut text = columns(&rows, "");
    for finding in findings {
        let target = &finding.target;
        for change in &finding.changes {
            let _ = writeln!(text, "\npool {}, {}: {}", target.pool, target.address, change.what);
            let _ = match (&change.now, &change.then) {
                (Some(now), Some(then)) => writeln!(text, "  {}: change\n    {now}\n  to\n    {then}", change.place),
                (Some(now), None) => writeln!(text, "  {}: take out\n    {now}", change.place),
                (None, Some(then)) => writeln!(text, "  {}: write\n    {then}", change.place),
                (None, None) => writeln!(text, "  {}: take them out", change.place),
            };
        }
        if let Some(slow) = &finding.slow {
            let _ = writeln!(text, "\npool {}, {}: {slow}", target.pool, target.address);
        }
        if finding.is_unjudged() {
            let why = conclusion(&finding.diagnosis.expects);
            let _ = writeln!(text, "\npool {}, {}: {why}", target.pool, target.address);
        }
    }
    text
}

/// Every upstream of a file, for machines.
pub fn findings_json(findings: &[Finding]) -> Value {
    let one = |finding: &Finding| {
        let target = &finding.target;
        let changes = finding.changes.iter().map(
            |change| json!({ "what": change.what, "place": change.place, "now": change.now, "then": change.then }),
        );
        let mut value = json!({
            "pool": target.pool,
            "upstream": target.address,
            "role": if target.role == Role::Check { "check" } else { "traffic" },
            "configured": target.describe_configured(),
            "verdict": finding.verdict(),
            "changes": changes.collect::<Vec<_>>(),
            "slow": finding.slow,
        });
        for (key, part) in diagnosis_parts(&finding.diagnosis) {
            value[key] = part;
        }
        value
    };
    json!({ "upstreams": findings.iter().map(one).collect::<Vec<_>>() })
}

fn columns<const COUNT: usize>(rows: &[[String; COUNT]], indent: &str) -> String {
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let mut text = String::new();
    for row in rows {
        let cells: Vec<String> =
            row.iter().enumerate().map(|(column, cell)| format!("{cell:<width$}", width = width(column))).collect();
        let _ = writeln!(text, "{indent}{}", cells.join("  ").trim_end());
    }
    text
}

fn capital(text: &str) -> String {
    let mut chars = text.chars();
    chars.next().map_or_else(String::new, |first| first.to_uppercase().chain(chars).collect::<String>() + ".")
}
