//! `benches/compare/run`: preface beside HAProxy, nginx and Envoy, on the same work, in turn.

pub mod backend;
pub mod bare;
pub mod datagrams;
pub mod load;
pub mod measure;
pub mod peers;
pub mod plot;
pub mod report;
pub mod rows;
pub mod run;
pub mod watch;
pub mod wire;

use std::fs;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, bail};
use clap::Parser;
use rustix::process::{Resource, Rlimit, setrlimit};

use peers::{Kind, Setup};
use report::Report;
use rows::{Amounts, Row};
use run::Arena;

/// Descriptors that 9,500 connections and their other ends need, with room.
const DESCRIPTORS: u64 = 65_536;

/// Compares preface with other balancers. `benches/compare/run` builds and installs what this needs.
#[derive(Clone, Debug, Parser)]
#[command(name = "benches/compare/run", no_binary_name = true)]
pub struct Options {
    /// Rows: bulk, pingpong, short, watched, udp, idle, reload, scaling, or what --list shows
    #[arg(long, value_delimiter = ',')]
    rows: Vec<String>,
    /// Candidates: direct, preface, preface-log-on, preface-watched, bare, haproxy, nginx, envoy; -tuned for a tuned one alone
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// Runs of each candidate in each row [default: 5, quick 2, smoke 1]
    #[arg(long)]
    repetitions: Option<usize>,
    /// Less work a run: all rows in under 3 minutes
    #[arg(long, conflicts_with = "smoke")]
    quick: bool,
    /// Hardly any work: does it all start and answer?
    #[arg(long)]
    smoke: bool,
    /// The program under test
    #[arg(long, default_value = "target/release/preface")]
    preface: PathBuf,
    /// Envoy's program
    #[arg(long, default_value = "target/compare/envoy/envoy/_bin/envoy")]
    envoy: PathBuf,
    /// Where table.md, results.json and plot.svg go
    #[arg(long, default_value = "target/compare")]
    output: PathBuf,
    /// List the rows and end
    #[arg(long)]
    list: bool,
}

impl Options {
    /// From words as on the command line.
    pub fn from_words(words: &[&str]) -> Result<Options, clap::Error> {
        Options::try_parse_from(words)
    }

    fn amounts(&self) -> (Amounts, usize) {
        let (amounts, repetitions) = match (self.quick, self.smoke) {
            (true, _) => (Amounts::QUICK, 2),
            (_, true) => (Amounts::SMOKE, 1),
            _ => (Amounts::FULL, 5),
        };
        (amounts, self.repetitions.unwrap_or(repetitions).max(1))
    }

    /// The rows that were asked for, with the candidates that were.
    fn chosen(&self) -> anyhow::Result<Vec<Row>> {
        let mut kinds = Vec::new();
        for word in &self.only {
            let found = Kind::matching(word);
            if found.is_empty() {
                bail!("no candidate named \"{word}\"; there are: {}", peers::ALL.map(Kind::name).join(", "));
            }
            kinds.extend(found);
        }
        let mut rows = rows::all(measure::cpus().len());
        let meant = |row: &Row, word: &str| {
            row.name.strip_prefix(word).is_some_and(|rest| rest.is_empty() || rest.starts_with('-'))
        };
        if let Some(word) = self.rows.iter().find(|&word| !rows.iter().any(|row| meant(row, word))) {
            let names: Vec<&str> = rows.iter().map(|row| row.name.as_str()).collect();
            bail!("no row named \"{word}\"; there are: {}", names.join(", "));
        }
        rows.retain(|row| self.rows.is_empty() || self.rows.iter().any(|word| meant(row, word)));
        for row in &mut rows {
            if kinds.contains(&Kind::Headerless) {
                row.contestants.push(rows::Contestant { kind: Kind::Headerless, workers: 1, scaling: false });
            }
            row.contestants.retain(|contestant| kinds.is_empty() || kinds.contains(&contestant.kind));
        }
        rows.retain(|row| !row.contestants.is_empty());
        Ok(rows)
    }
}

/// Runs what was asked for and writes the three files. Answers with the candidates that failed.
pub fn compare(options: &Options, words: &[String]) -> anyhow::Result<Vec<String>> {
    let rows = options.chosen()?;
    let (amounts, repetitions) = options.amounts();
    let directory = tempfile::Builder::new().prefix("preface-compare-").tempdir()?;
    peers::remove_with_signals(directory.path());
    let setup = Setup {
        preface: fs::canonicalize(&options.preface).with_context(|| options.preface.display().to_string())?,
        envoy: options.envoy.clone(),
        directory: directory.path().to_owned(),
        upstream: SocketAddr::from(([127, 0, 0, 1], 0)),
        cpus: vec![],
        workers: 1,
        reloads: false,
        datagrams: false,
    };
    let begun = Instant::now();
    let versions = versions(&setup, &rows);
    let machine = measure::machine();
    let mut arena = Arena::new(setup, amounts)?;
    let results = rows.iter().map(|row| arena.run(row, repetitions)).collect();
    let date = humantime::format_rfc3339_seconds(SystemTime::now()).to_string().replace('T', " ").replace('Z', " UTC");
    let command = ["benches/compare/run".to_owned()].iter().chain(words).cloned().collect::<Vec<_>>().join(" ");
    let report = Report { date, command, machine, versions, repetitions, results };
    fs::create_dir_all(&options.output)?;
    let output = |name: &str| options.output.join(name);
    fs::write(output("table.md"), report.markdown())?;
    fs::write(output("results.json"), format!("{:#}\n", report.json()))?;
    fs::write(output("plot.svg"), plot::svg(&report))?;
    let took = Duration::from_secs(begun.elapsed().as_secs());
    eprintln!("{} after {}", output("{table.md,results.json,plot.svg}").display(), humantime::format_duration(took));
    let entries = report.results.iter().flat_map(|result| result.entries.iter().map(move |entry| (result, entry)));
    let failed = |(result, entry): (&run::Result, &run::Entry)| {
        let failure = entry.failure.as_ref()?;
        Some(format!("{}: {}: {failure}", result.row.name, entry.contestant.label()))
    };
    Ok(entries.filter_map(failed).collect())
}

/// Of the programs that take part.
fn versions(setup: &Setup, rows: &[Row]) -> Vec<(String, String)> {
    let takes_part = |kinds: &[Kind]| {
        rows.iter().any(|row| row.contestants.iter().any(|contestant| kinds.contains(&contestant.kind)))
    };
    let haproxy = peers::find("haproxy").unwrap_or_default();
    let nginx = peers::find("nginx").unwrap_or_default();
    let programs = [
        ("preface", &setup.preface, "--version", &[Kind::Preface, Kind::PrefaceLog, Kind::Watched][..]),
        ("HAProxy", &haproxy, "-v", &[Kind::Haproxy, Kind::HaproxyTuned]),
        ("nginx", &nginx, "-v", &[Kind::Nginx, Kind::NginxTuned]),
        ("Envoy", &setup.envoy, "--version", &[Kind::Envoy]),
    ];
    let mut found = Vec::new();
    for (name, program, argument, kinds) in programs {
        if takes_part(kinds) {
            let version = measure::version(program, argument).unwrap_or_else(|| "(not there)".to_owned());
            found.push((name.to_owned(), version));
        }
    }
    found
}

/// Ends everything that was started when we are told to end.
fn end_with_signals() -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    std::thread::spawn(move || {
        runtime.block_on(async {
            use tokio::signal::unix::{SignalKind, signal};
            let (Ok(mut interrupt), Ok(mut terminate), Ok(mut hangup)) =
                (signal(SignalKind::interrupt()), signal(SignalKind::terminate()), signal(SignalKind::hangup()))
            else {
                return;
            };
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
                _ = hangup.recv() => {}
            }
            peers::clean_up();
        });
    });
    Ok(())
}

fn compare_from_command_line(words: Vec<String>) -> anyhow::Result<ExitCode> {
    let options = match Options::try_parse_from(&words) {
        Ok(options) => options,
        Err(error) => error.exit(),
    };
    if options.list {
        for row in options.chosen()? {
            let labels: Vec<String> = row.contestants.iter().map(rows::Contestant::label).collect();
            println!("{:20} {} ({})", row.name, row.title, labels.join(", "));
        }
        return Ok(ExitCode::SUCCESS);
    }
    // Allowed to root; else what there is must do, and fewer connections are idle.
    let _ = setrlimit(Resource::Nofile, Rlimit { current: Some(DESCRIPTORS), maximum: Some(DESCRIPTORS) });
    preface::net::limits::raise_descriptor_limit();
    end_with_signals()?;
    let failed = compare(&options, &words)?;
    if failed.is_empty() {
        return Ok(ExitCode::SUCCESS);
    }
    eprintln!("failed:\n  {}", failed.join("\n  "));
    Ok(ExitCode::FAILURE)
}

fn main() -> anyhow::Result<ExitCode> {
    // Cargo adds --bench when it runs this itself.
    let words: Vec<String> = std::env::args().skip(1).filter(|word| word != "--bench").collect();
    if let [word, address, upstream] = words.as_slice()
        && word == "bare"
    {
        bare::run(address.parse()?, upstream.parse()?)?;
        return Ok(ExitCode::SUCCESS);
    }
    compare_from_command_line(words)
}
