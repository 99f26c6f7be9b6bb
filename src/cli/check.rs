//! `preface check FILE...`: says everything that is wrong with configuration files, without binding an address.

use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};

use crate::config::{self, Style};
use crate::discovery::surroundings;

/// Validate configuration files without binding an address
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Exit status 0: every file can be used (there may be warnings); 1: a file has errors, and each one was shown.

Example:
  preface check /etc/preface/preface.toml && preface reload")]
pub struct Args {
    /// Configuration files
    #[arg(required = true, value_name = "FILE")]
    pub files: Vec<PathBuf>,
}

/// What there is to say about one file.
#[derive(Debug)]
pub struct Outcome {
    /// Errors and warnings, each rendered.
    pub reports: Vec<String>,
    /// `FILE: ok`, or how many errors it has.
    pub summary: String,
    /// It can be used.
    pub is_ok: bool,
}

/// Checks one file.
pub fn check(path: &Path, style: Style) -> Outcome {
    let count = |count: usize, what: &str| format!("{count} {what}{}", if count == 1 { "" } else { "s" });
    let file = path.display();
    match config::load(path, &surroundings::for_check()) {
        Ok(parsed) => {
            let summary = match parsed.warnings.len() {
                0 => format!("{file}: ok"),
                warnings => format!("{file}: ok, {}", count(warnings, "warning")),
            };
            Outcome { reports: parsed.warnings.render(style), summary, is_ok: true }
        }
        Err(error) => {
            let summary = format!("{file}: {}", count(error.len(), "error"));
            Outcome { reports: error.render(style), summary, is_ok: false }
        }
    }
}

/// Checks every file: reports on standard error, a line for each good file on standard output. An error if a file
/// cannot be used.
pub fn run(args: Args) -> anyhow::Result<()> {
    let style = if std::io::stderr().is_terminal() { Style::Terminal } else { Style::Plain };
    let outcomes: Vec<Outcome> = args.files.iter().map(|file| check(file, style)).collect();
    let mut bad = Vec::new();
    for outcome in outcomes {
        for report in &outcome.reports {
            // Nobody may be reading; the exit status still tells.
            let _ = writeln!(std::io::stderr(), "{report}\n");
        }
        match outcome.is_ok {
            true => drop(writeln!(std::io::stdout(), "{}", outcome.summary)),
            false => bad.push(outcome.summary),
        }
    }
    if bad.is_empty() {
        return Ok(());
    }
    anyhow::bail!("{}", bad.join("; "))
}
