//! `preface reload`: has the running process load its file again, and says what came of it.

use std::time::Duration;

use anyhow::{Context as _, bail};
use serde_json::Value;

use super::client;

/// Binding and building take milliseconds; a resolver may take its time.
const TIMEOUT: Duration = Duration::from_secs(30);

/// Load the configuration again; print what changed, or its errors
#[derive(clap::Args, Debug)]
#[command(after_help = "\
The running process loads the file that it was started with. A file with errors changes nothing.
Exit status 0: what the file says is in force; 1: it was refused, or nobody answered.

Example:
  preface check /etc/preface/preface.toml && preface reload")]
pub struct Args {
    #[command(flatten)]
    client: client::Options,
}

/// Asks, and prints the outcome.
pub fn run(args: Args) -> anyhow::Result<()> {
    let client = args.client.client()?;
    let answer = client.post("/reload", TIMEOUT)?;
    if !matches!(answer.status, 200 | 422) {
        bail!("{client} did not reload: {}", answer.error());
    }
    let report: Value = serde_json::from_str(&answer.text).with_context(|| format!("{client} answered no report"))?;
    for warning in texts(&report, "warnings") {
        eprintln!("{warning}\n");
    }
    super::print(&outcome(&report)?)
}

/// What to print, or the errors.
fn outcome(report: &Value) -> anyhow::Result<String> {
    let lines = |key: &str| texts(report, key).map(|line| format!("  {line}\n")).collect::<String>();
    let pending = lines("pending");
    match report["outcome"].as_str() {
        Some("applied") => {
            let took = report["duration_ms"].as_f64().unwrap_or_default();
            Ok(format!("applied in {took:.1} ms\n{}{pending}", lines("changes")))
        }
        Some("unchanged") if pending.is_empty() => Ok("unchanged: the file says what is in force already\n".to_owned()),
        Some("unchanged") => Ok(format!("unchanged, and not all that the file says is in force:\n{pending}")),
        _ => {
            let errors: Vec<&str> = texts(report, "errors").collect();
            bail!("the reload was refused, and what ran goes on\n\n{}", errors.join("\n\n"))
        }
    }
}

fn texts<'a>(report: &'a Value, key: &str) -> impl Iterator<Item = &'a str> {
    report[key].as_array().into_iter().flatten().filter_map(Value::as_str)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn says_what_came_of_it() {
        let applied =
            json!({ "outcome": "applied", "changes": ["pool a: added", "pool b: removed"], "duration_ms": 3.21 });
        assert_eq!(outcome(&applied).unwrap(), "applied in 3.2 ms\n  pool a: added\n  pool b: removed\n");
        let unchanged = json!({ "outcome": "unchanged", "changes": [] });
        assert_eq!(outcome(&unchanged).unwrap(), "unchanged: the file says what is in force already\n");
        let line = "runtime: workers 2 -> 3 (applies at the next start)";
        let pending = json!({ "outcome": "unchanged", "changes": [], "pending": [line] });
        let said = outcome(&pending).unwrap();
        assert_eq!(said, format!("unchanged, and not all that the file says is in force:\n  {line}\n"));
        let refused = json!({ "outcome": "refused", "errors": ["first", "second"] });
        let error = outcome(&refused).unwrap_err().to_string();
        assert_eq!(error, "the reload was refused, and what ran goes on\n\nfirst\n\nsecond");
    }
}
