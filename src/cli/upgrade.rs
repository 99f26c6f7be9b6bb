//! `preface upgrade`: has the running process put a new one in its place, and says what came of it.

use std::time::Duration;

use anyhow::{Context as _, bail};
use serde_json::Value;

use super::client;

/// The new process is ready within 12 s, or is ended; letting go and taking over may take some seconds more.
const TIMEOUT: Duration = Duration::from_secs(30);

/// Replace the running program without losing a connection
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Put the new file where the old one is, then run this. The running process starts it with the same
arguments, hands it every listening socket once it is ready, serves the connections that it has, at
most for runtime.stop_timeout, and ends. The new process reads the configuration file itself. If it
does not become ready, its errors are printed and the old one goes on. SIGUSR2 does the same.
Exit status 0: the new process serves; 1: the old one goes on, or nobody answered.

Example:
  install -m 0755 preface.new /usr/bin/preface && preface upgrade")]
pub struct Args {
    #[command(flatten)]
    client: client::Options,
}

/// Asks, and prints the outcome.
pub fn run(args: Args) -> anyhow::Result<()> {
    let client = args.client.client()?;
    let answer = client.post("/upgrade", TIMEOUT)?;
    if !matches!(answer.status, 200 | 422) {
        bail!("{client} did not upgrade: {}", answer.error());
    }
    let report: Value = serde_json::from_str(&answer.text).with_context(|| format!("{client} answered no report"))?;
    super::print(&outcome(&report)?)
}

/// What to print, or the errors.
fn outcome(report: &Value) -> anyhow::Result<String> {
    let text = |key: &str| report[key].as_str().unwrap_or("?").to_owned();
    if report["outcome"] != "upgraded" {
        let errors: Vec<&str> = report["errors"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
        bail!("no upgrade, and what ran goes on\n\n{}", errors.join("\n\n"));
    }
    let (pid, open) = (&report["pid"], report["open"].as_u64().unwrap_or_default());
    let took = report["duration_ms"].as_f64().unwrap_or_default();
    let rest = match open {
        0 => "the old process has none left and ends".to_owned(),
        1 => "the old process ends with its last one".to_owned(),
        open => format!("the old process ends with the last of its {open}"),
    };
    let version = text("version");
    Ok(format!("upgraded in {took:.0} ms: process {pid} (preface {version}) takes every new connection; {rest}\n"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn says_what_came_of_it() {
        let mut report = json!({
            "outcome": "upgraded", "pid": 4711, "version": "0.2.0", "open": 3, "errors": [], "duration_ms": 48.6
        });
        let start = "upgraded in 49 ms: process 4711 (preface 0.2.0) takes every new connection; ";
        assert_eq!(outcome(&report).unwrap(), format!("{start}the old process ends with the last of its 3\n"));
        report["open"] = json!(0);
        assert_eq!(outcome(&report).unwrap(), format!("{start}the old process has none left and ends\n"));
        let failed = json!({ "outcome": "failed", "pid": 1, "errors": ["it ended: exit status: 1", "cannot read x"] });
        let error = outcome(&failed).unwrap_err().to_string();
        assert_eq!(error, "no upgrade, and what ran goes on\n\nit ended: exit status: 1\n\ncannot read x");
    }
}
