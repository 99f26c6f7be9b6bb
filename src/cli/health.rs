//! `preface health`: is the running process ready? The health check of a container.

use std::time::Duration;

use anyhow::bail;

use super::client;

/// Below the 30 s that container engines give a check.
const TIMEOUT: Duration = Duration::from_secs(5);

/// Is the running process ready? For container health checks
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Ready: configured, every listener bound, not stopping. Neither the health of upstreams nor a broken
configuration file counts: what runs goes on.
Exit status 0: ready; 1: not ready, or nobody answered.

Example:
  HEALTHCHECK CMD [\"/preface\", \"health\"]")]
pub struct Args {
    #[command(flatten)]
    client: client::Options,
}

/// Asks.
pub fn run(args: Args) -> anyhow::Result<()> {
    let client = args.client.client()?;
    let answer = client.get("/readyz", TIMEOUT)?;
    match answer.status {
        200 => super::print("ready\n"),
        503 => bail!("not ready: {}", answer.text.trim()),
        _ => bail!("{client} does not answer like preface: {}", answer.error()),
    }
}
