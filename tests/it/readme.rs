//! What the README says is true: its TOML is valid, its commands exist, and its tables of ends and of log fields are the
//! program's.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, SystemTime};

use preface::address::Client;
use preface::config::{self, LogFormat};
use preface::log::{ConnectionLine, connection_line, connection_start_line, session_line, session_start_line};
use preface::termination::{DropReason, Termination};

const README: &str = include_str!("../../README.md");

/// The fenced blocks of one language, each with the line on which it begins.
fn blocks(language: &str) -> Vec<(usize, String)> {
    let mut found: Vec<(usize, String)> = Vec::new();
    let mut open: Option<&str> = None;
    for (index, line) in README.lines().enumerate() {
        match (line.strip_prefix("```"), open) {
            (Some(opened), None) => {
                open = Some(opened);
                if opened == language {
                    found.push((index + 2, String::new()));
                }
            }
            (Some(_), Some(_)) => open = None,
            (None, Some(opened)) if opened == language => {
                let (_, text) = found.last_mut().expect("a block is open");
                text.push_str(line);
                text.push('\n');
            }
            (None, _) => {}
        }
    }
    assert_eq!(open, None, "a block of the README is not closed");
    found
}

/// The command lines of a section: those that say at their end what they need that is not here, and those that a test runs.
pub fn commands(section: &str, needs: &[&str]) -> (Vec<&'static str>, Vec<&'static str>) {
    let (_, text) = README.split_once(&format!("\n## {section}\n")).expect("the section");
    let text = text.split("\n## ").next().expect("its end");
    let blocks = text.split("```sh\n").skip(1).map(|block| block.split("```").next().expect("the block's end"));
    let lines = blocks.flat_map(str::lines).filter(|line| !line.is_empty());
    lines.partition(|line| needs.iter().any(|what| line.ends_with(&format!("needs {what}"))))
}

/// The cells of the table that begins with this header line, row by row.
fn table(header: &str) -> Vec<Vec<String>> {
    let mut lines = README.lines().skip_while(|line| *line != header);
    assert!(lines.next().is_some(), "no table in the README begins with {header:?}");
    let rows = lines.skip(1).take_while(|line| line.starts_with('|'));
    rows.map(|row| row.trim_matches('|').split('|').map(|cell| cell.trim().to_owned()).collect()).collect()
}

#[test]
fn toml_examples_are_valid_and_draw_no_warning() {
    let examples = blocks("toml");
    assert!(examples.len() >= 5, "only {} TOML examples found", examples.len());
    for (line, toml) in examples {
        let parsed = config::parse("README.md", &toml).unwrap_or_else(|errors| panic!("README.md:{line}: {errors:?}"));
        assert!(parsed.warnings.is_empty(), "README.md:{line}: {:?}", parsed.warnings);
    }
}

#[test]
fn begins_with_the_two_commands() {
    let commands: Vec<String> = blocks("sh").into_iter().take(2).map(|(_, text)| text).collect();
    assert_eq!(commands, ["cargo run --release -- demo\n", "tests/run\n"]);
}

/// `preface drain web --wait` in a shell block, a table or running text: the subcommand exists and knows its flags.
#[test]
fn commands_exist_with_their_flags() {
    let shell = blocks("sh");
    let lines = shell.iter().flat_map(|(_, text)| text.lines().map(|line| line.split('#').next().unwrap_or("")));
    let quoted = README.split('`').skip(1).step_by(2).filter(|quoted| quoted.starts_with("preface "));
    let mut seen = 0;
    for line in lines.chain(quoted) {
        let line = line.trim().trim_start_matches("sudo ");
        let Some(arguments) = line.strip_prefix("preface ").or(line.strip_prefix("cargo run --release -- ")) else {
            continue;
        };
        let mut words = arguments.split_whitespace();
        let subcommand = words.next().expect("a subcommand");
        let output =
            Command::new(env!("CARGO_BIN_EXE_preface")).args([subcommand, "--help"]).output().expect("it runs");
        assert!(output.status.success(), "{line:?}: {}", String::from_utf8_lossy(&output.stderr));
        let help = String::from_utf8_lossy(&output.stdout);
        for flag in words.filter(|word| word.starts_with("--")) {
            assert!(help.contains(flag), "{line:?}: {subcommand} has no {flag}:\n{help}");
        }
        seen += 1;
    }
    assert!(seen >= 8, "only {seen} commands found");
}

#[test]
fn links_and_paths_exist() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    for target in README.split("](").skip(1).map(|rest| rest.split(')').next().unwrap_or("")) {
        match target.strip_prefix('#') {
            Some(anchor) => assert!(headings().contains(&anchor.to_owned()), "no heading for #{anchor}"),
            None => assert!(root.join(target).exists(), "{target} does not exist"),
        }
    }
    let words = README.split(|c: char| c.is_whitespace() || "`(),;|:'\"".contains(c));
    let paths: BTreeSet<&str> = words.map(|word| word.trim_end_matches('.')).filter(|word| is_path(word)).collect();
    assert!(paths.len() > 10, "{paths:?}");
    for path in paths {
        assert!(root.join(path).exists(), "{path} does not exist");
    }
}

/// A file or directory of the repository.
fn is_path(word: &str) -> bool {
    let is_below = ["config/", "deploy/", "tests/", "benches/", "src/"].iter().any(|top| word.starts_with(top));
    is_below && word.chars().all(|c| c.is_ascii_alphanumeric() || "/._-".contains(c))
}

/// Headings as anchors: lower case, spaces to hyphens, punctuation gone.
fn headings() -> Vec<String> {
    let titles = README.lines().filter_map(|line| line.strip_prefix("## "));
    let keep = |c: char| c.is_alphanumeric() || c == ' ' || c == '-';
    titles.map(|title| title.to_lowercase().replace(|c| !keep(c), "").replace(' ', "-")).collect()
}

#[test]
fn the_table_of_ends_is_the_code() {
    let documented: Vec<String> = table("| end | what happened | what to do |")
        .into_iter()
        .map(|row| row[0].trim_matches('`').to_owned())
        .collect();
    let known: Vec<String> = Termination::ALL.iter().map(Termination::to_string).collect();
    assert_eq!(documented, known);
}

#[test]
fn the_log_fields_are_the_code() {
    let ended = ConnectionLine {
        time: SystemTime::UNIX_EPOCH,
        id: "id",
        listener: "web",
        client: Client::Ip("192.0.2.1:1".parse().expect("an address")),
        local: None,
        pool: None,
        upstream: None,
        header: None,
        bytes_in: 0,
        bytes_out: 0,
        connect: None,
        first_byte: None,
        duration: Duration::ZERO,
        attempts: 0,
        end: Termination::Denied,
    };
    let line = connection_line(LogFormat::Text, &ended);
    let keys = |line: &str| -> Vec<String> {
        line.split_whitespace().map(|field| field.split('=').next().unwrap_or("").to_owned()).collect()
    };
    let documented: Vec<String> =
        table("| field | meaning |").into_iter().map(|row| row[0].trim_matches('`').to_owned()).collect();
    assert_eq!(documented, keys(&session_line(LogFormat::Text, &ended, [0, 0])), "the table of fields");
    let (_, sample) = blocks("text").into_iter().next().expect("a sample line");
    assert_eq!(keys(&sample), keys(&line), "the sample line");
}

#[test]
fn the_table_of_reasons_is_the_code() {
    let rows = table("| reason | what | what to do |");
    assert!(rows.iter().all(|row| row.len() == 3 && row.iter().all(|cell| !cell.is_empty())), "{rows:?}");
    let documented: Vec<&str> = rows.iter().map(|row| row[0].trim_matches('`')).collect();
    let known: Vec<&str> = DropReason::ALL.iter().map(|reason| reason.as_str()).collect();
    assert_eq!(documented, known);
}

/// `start_and_end` is documented with the event of each line, and with the fields that it shares with the line of the end.
#[test]
fn the_lines_of_a_begin_are_the_code() {
    let client = "192.0.2.1:1".parse().expect("an address");
    let time = SystemTime::UNIX_EPOCH;
    let connection = connection_start_line(LogFormat::Text, time, "id", "web", Client::Ip(client));
    let session = session_start_line(LogFormat::Text, time, "id", "web", client);
    let (_, after) = README.split_once("\n`start_and_end` adds one ").expect("the README says what it adds");
    let documented = after.split(". ").next().expect("a sentence");
    for line in [&connection, &session] {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let [_, "level=info", event, rest @ ..] = fields.as_slice() else { panic!("{line}") };
        assert!(documented.contains(&format!("`{event}`")), "{event} is not in {documented:?}");
        for field in rest {
            let key = field.split('=').next().expect("a key");
            assert!(documented.contains(&format!("`{key}`")), "{key} is not in {documented:?}");
        }
    }
}

#[test]
fn the_table_of_alerts_is_the_file() {
    let alerts = include_str!("../../deploy/prometheus/alerts.yaml");
    let lines = || alerts.lines().map(str::trim);
    let names = lines().filter_map(|line| line.strip_prefix("- alert: "));
    let severities = lines().filter_map(|line| line.strip_prefix("labels: { severity: ")?.strip_suffix(" }"));
    let known: Vec<(String, String)> = names.zip(severities).map(|(a, b)| (a.to_owned(), b.to_owned())).collect();
    let rows = table("| alert | severity | fires when |").into_iter();
    let documented: Vec<_> = rows.map(|row| (row[0].trim_matches('`').to_owned(), row[1].clone())).collect();
    assert_eq!(documented, known);
}

/// The names are read from the code that writes them, so a metric that nobody documented fails here.
#[test]
fn the_table_of_metrics_is_the_code() {
    let code = include_str!("../../src/server/exposition.rs");
    let known: Vec<&str> =
        code.split('"').skip(1).step_by(2).filter(|literal| literal.starts_with("preface_")).collect();
    let documented: Vec<String> =
        table("| metric | labels | what |").into_iter().map(|row| row[0].trim_matches('`').to_owned()).collect();
    assert_eq!(documented, known);
}

/// Whoever measures again (`benches/compare/run --keep`) puts the new tables here, too.
#[test]
fn the_figures_are_those_of_the_last_comparison() {
    let results = include_str!("../../benches/compare/results/table.md");
    for section in ["## Summary\n\n", "## Targets\n\n"] {
        let (_, rest) = results.split_once(section).expect("the results have it");
        let table = rest.split("\n\n").next().expect("a table");
        assert!(README.contains(table), "the README has other figures than {section}{table}");
    }
}
