//! `preface drain`, `disable` and `enable`: an operator's orders about upstreams.

use std::time::Duration;

use anyhow::{Context as _, bail};
use serde_json::Value;

use super::client::{self, Client, encoded};

/// An order is carried out between two turns of the control loop.
const TIMEOUT: Duration = Duration::from_secs(30);

/// Between two looks at what is still open.
const LOOK_EVERY: Duration = Duration::from_millis(250);

/// Which upstreams.
#[derive(clap::Args, Debug)]
pub struct Target {
    /// Name of the pool
    #[arg(value_name = "POOL")]
    pool: String,
    /// One upstream, as in the configuration or the status: 10.0.0.30:80; without a port: every port of it.
    /// Without an address: all of the pool
    #[arg(value_name = "ADDRESS")]
    address: Option<String>,
}

/// Give upstreams no new connections; open ones stay
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Survives reloads, not a restart. `preface enable` takes it back.

Examples:
  preface drain ingress 10.0.0.30:80 --wait && ssh 10.0.0.30 reboot
  preface drain ingress 10.0.0.30 --timeout 10m --wait")]
pub struct DrainArgs {
    #[command(flatten)]
    target: Target,
    /// Reset what is still open after this long: 30s, 10m
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration)]
    timeout: Option<Duration>,
    /// Return when the last connection is gone
    #[arg(long)]
    wait: bool,
    #[command(flatten)]
    client: client::Options,
}

/// Give upstreams no new connections and reset open ones now
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Survives reloads, not a restart. `preface enable` takes it back.

Example:
  preface disable ingress 10.0.0.30:80")]
pub struct DisableArgs {
    #[command(flatten)]
    target: Target,
    #[command(flatten)]
    client: client::Options,
}

/// Take back drain and disable
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Whether an enabled upstream gets connections is then for its health to say.

Examples:
  preface enable ingress 10.0.0.30:80
  preface enable ingress")]
pub struct EnableArgs {
    #[command(flatten)]
    target: Target,
    #[command(flatten)]
    client: client::Options,
}

/// `preface drain`
pub fn drain(args: DrainArgs) -> anyhow::Result<()> {
    let client = args.client.client()?;
    let query = args.timeout.map(|timeout| format!("?timeout={}ms", timeout.as_millis())).unwrap_or_default();
    let open = give(&client, &args.target, &format!("drain{query}"))?;
    if args.wait {
        wait(&client, &args.target.pool, open)?;
    }
    Ok(())
}

/// `preface disable`
pub fn disable(args: DisableArgs) -> anyhow::Result<()> {
    give(&args.client.client()?, &args.target, "disable").map(drop)
}

/// `preface enable`
pub fn enable(args: EnableArgs) -> anyhow::Result<()> {
    give(&args.client.client()?, &args.target, "enable").map(drop)
}

/// An upstream and its open connections.
type Open = (String, u64);

/// Where an order for an upstream, or for all of a pool, is posted.
pub(super) fn path(pool: &str, address: Option<&str>, order: &str) -> String {
    let pool = encoded(pool);
    match address {
        Some(address) => format!("/pools/{pool}/upstreams/{}/{order}", encoded(address)),
        None => format!("/pools/{pool}/{order}"),
    }
}

/// Give the order, print what became of which upstream, and return these.
fn give(client: &Client, target: &Target, order: &str) -> anyhow::Result<Vec<Open>> {
    let reply = client.post(&path(&target.pool, target.address.as_deref(), order), TIMEOUT)?.json()?;
    let upstreams = upstreams(&reply["upstreams"]).with_context(|| format!("{client} answered no upstreams"))?;
    let admin = reply["admin"].as_str().unwrap_or_default();
    let lines: String = upstreams.iter().map(|open| format!("{} {admin}, {}\n", open.0, counted(open.1))).collect();
    super::print(&lines)?;
    Ok(upstreams)
}

/// Wait until nothing is open any more. Who takes the order back meanwhile ends the wait with an error.
fn wait(client: &Client, pool: &str, mut open: Vec<Open>) -> anyhow::Result<()> {
    let addresses: Vec<String> = open.iter().map(|(address, _)| address.clone()).collect();
    loop {
        let total: u64 = open.iter().map(|(_, count)| count).sum();
        if total == 0 {
            return super::print("drained\n");
        }
        std::thread::sleep(LOOK_EVERY);
        let status = client.get("/status", TIMEOUT)?.json()?;
        open = still_open(&status, pool, &addresses).with_context(|| format!("cannot wait for {client}"))?;
        let now: u64 = open.iter().map(|(_, count)| count).sum();
        if now != total && now > 0 {
            super::print(&format!("{}\n", counted(now)))?;
        }
    }
}

/// What the status says about these upstreams.
fn still_open(status: &Value, pool: &str, addresses: &[String]) -> anyhow::Result<Vec<Open>> {
    let pools = status["pools"].as_object().context("its status has no pools")?;
    let listed = pools.get(pool).and_then(|pool| pool["upstreams"].as_array()).map_or(&[][..], Vec::as_slice);
    let mut open = Vec::new();
    for address in addresses {
        let Some(upstream) = listed.iter().find(|upstream| upstream["address"] == address.as_str()) else {
            bail!("{address} was removed from the configuration; its connections have the pool's drain_timeout");
        };
        if upstream["admin"] == "enabled" {
            bail!("{address} was enabled again");
        }
        open.push((address.clone(), upstream["open"].as_u64().context("its status counts no connections")?));
    }
    Ok(open)
}

fn upstreams(list: &Value) -> anyhow::Result<Vec<Open>> {
    let list = list.as_array().context("no list of upstreams")?;
    let upstream = |value: &Value| Some((value["address"].as_str()?.to_owned(), value["open"].as_u64()?));
    list.iter().map(|value| upstream(value).with_context(|| format!("not an upstream: {value}"))).collect()
}

fn counted(open: u64) -> String {
    match open {
        0 => "no open connection".to_owned(),
        1 => "1 open connection".to_owned(),
        open => format!("{open} open connections"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn status(admin: &str, open: u64) -> Value {
        json!({ "pools": { "ingress": { "upstreams": [
            { "address": "10.0.0.30:80", "admin": admin, "open": open },
            { "address": "10.0.0.31:80", "admin": "enabled", "open": 7 },
        ] } } })
    }

    #[test]
    fn waits_for_the_upstreams_of_the_order_only() {
        let addresses = ["10.0.0.30:80".to_owned()];
        let open = still_open(&status("draining", 2), "ingress", &addresses).unwrap();
        assert_eq!(open, [("10.0.0.30:80".to_owned(), 2)]);
    }

    #[test]
    fn a_wait_that_cannot_end_is_an_error() {
        let addresses = ["10.0.0.30:80".to_owned()];
        let error = |status, pool| still_open(&status, pool, &addresses).unwrap_err().to_string();
        assert_eq!(error(status("enabled", 2), "ingress"), "10.0.0.30:80 was enabled again");
        let removed = "10.0.0.30:80 was removed from the configuration; its connections have the pool's drain_timeout";
        assert_eq!(error(status("draining", 2), "removed"), removed);
        assert!(still_open(&json!({}), "ingress", &addresses).is_err(), "a status of another shape proves nothing");
    }
}
