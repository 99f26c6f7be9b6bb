//! The command line: what there is, and how a command ends. Exit status 0: done; 1: failed; 2: wrong usage.

pub mod capture;
pub mod check;
pub mod client;
pub mod completions;
pub mod decode;
pub mod demo;
pub mod doctor;
pub mod health;
pub mod man;
pub mod order;
pub mod reload;
pub mod run;
pub mod schema;
pub mod top;
pub mod upgrade;
pub mod whoami;

use std::io::{self, Write};
use std::process::ExitCode;

use anyhow::Context as _;
use clap::Parser;

/// The configuration file where neither `--config` nor `$PREFACE_CONFIG` names one.
pub const CONFIG_FILE: &str = "/etc/preface/preface.toml";

/// A layer-4 load balancer that introduces every connection with a PROXY protocol header
#[derive(Debug, Parser)]
#[command(
    name = "preface",
    version,
    arg_required_else_help = true,
    after_help = "\
Begin with `preface demo`: it needs no file and no rights.
Exit status: 0 done, 1 failed, 2 wrong usage."
)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

/// The subcommands; each file documents its own.
#[derive(Debug, clap::Subcommand)]
enum Command {
    Run(run::Args),
    Check(check::Args),
    Demo(demo::Args),
    Whoami(whoami::Args),
    Decode(decode::Args),
    Doctor(doctor::Args),
    Top(top::Args),
    Reload(reload::Args),
    Upgrade(upgrade::Args),
    Drain(order::DrainArgs),
    Disable(order::DisableArgs),
    Enable(order::EnableArgs),
    Health(health::Args),
    Schema(schema::Args),
    Completions(completions::Args),
    Man(man::Args),
}

/// The whole program. Wrong usage ends the process in here, with status 2.
pub fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Run(args) => run::run(args),
        Command::Check(args) => check::run(args),
        Command::Demo(args) => demo::run(args),
        Command::Whoami(args) => whoami::run(args),
        Command::Decode(args) => decode::run(args),
        Command::Doctor(args) => doctor::run(args),
        Command::Top(args) => top::run(args),
        Command::Reload(args) => reload::run(args),
        Command::Upgrade(args) => upgrade::run(args),
        Command::Drain(args) => order::drain(args),
        Command::Disable(args) => order::disable(args),
        Command::Enable(args) => order::enable(args),
        Command::Health(args) => health::run(args),
        Command::Schema(args) => schema::run(args),
        Command::Completions(args) => completions::run(args),
        Command::Man(args) => man::run(args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Nobody may be reading; the exit status still tells.
            let _ = writeln!(io::stderr(), "preface: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Print to standard output. A reader that has seen enough (`| head`) is no error.
fn print(text: &str) -> anyhow::Result<()> {
    match io::stdout().write_all(text.as_bytes()).and_then(|()| io::stdout().flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            Err(error).context("cannot write to standard output")
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn every_subcommand_has_a_help_text() {
        let mut command = Cli::command();
        command.build();
        insta::assert_snapshot!("help_preface", command.render_help());
        for subcommand in command.get_subcommands_mut().filter(|subcommand| subcommand.get_name() != "help") {
            let help = subcommand.render_long_help().to_string();
            assert!(help.lines().all(|line| line.chars().count() <= 120), "{help}");
            insta::assert_snapshot!(format!("help_{}", subcommand.get_name()), help);
        }
    }

    #[test]
    fn arguments_are_consistent() {
        Cli::command().debug_assert();
    }
}
