//! `preface run`: serves a configuration file.

use std::path::PathBuf;

use anyhow::Context as _;

use crate::server::upgrade::Program;

/// Serve a configuration file until told to stop
#[derive(clap::Args, Debug)]
#[command(after_help = "\
The file is watched: a change applies at once and to new connections; a file with errors changes
nothing. The log goes to standard output.

Signals: HUP loads the file again, USR2 upgrades (see `preface upgrade --help`), TERM and INT stop
gracefully, a second one stops at once.

Examples:
  preface run --config ./preface.toml
  PREFACE_CONFIG=/config/preface.toml preface run")]
pub struct Args {
    /// Configuration file
    #[arg(long, value_name = "FILE", env = "PREFACE_CONFIG", hide_env_values = true, default_value = super::CONFIG_FILE)]
    pub config: PathBuf,
}

/// Serves.
pub fn run(args: Args) -> anyhow::Result<()> {
    let program = Program::of_this_process().context("cannot find out which program this is; is /proc mounted?");
    crate::server::run(args.config, Some(program?))
}
