//! `stead top`: resource usage of running instances.

use std::collections::BTreeMap;
use std::io::IsTerminal;
use std::time::{Duration, Instant};

use clap::Args;
use reqwest::Method;
use stead_schemas::api::{Instance, InstanceStats};
use stead_schemas::quantity::Bytes;

use super::client::Client;
use super::show::{line, print};
use super::{Failure, Output};

#[derive(Debug, Args)]
pub(crate) struct Top {
    /// Print once and exit; the default when the output is not a terminal.
    #[arg(long)]
    once: bool,
    /// Seconds between two readings.
    #[arg(short, long, default_value_t = 2, value_parser = clap::value_parser!(u64).range(1..=3600))]
    interval: u64,
}

/// Time between the first two readings: a share of the processor needs two.
const FIRST_INTERVAL: Duration = Duration::from_millis(500);
const CLEAR: &str = "\x1b[2J\x1b[H";

pub(super) async fn top(client: &Client, top: Top, output: Output) -> Result<(), Failure> {
    let is_once = top.once || output != Output::Table || !std::io::stdout().is_terminal();
    let mut before = read(client).await?;
    let mut wait = FIRST_INTERVAL;
    loop {
        tokio::time::sleep(wait).await;
        let now = read(client).await?;
        if !is_once {
            line(CLEAR);
        }
        show(&now, &before, output)?;
        if is_once {
            return Ok(());
        }
        (before, wait) = (now, Duration::from_secs(top.interval));
    }
}

struct Reading {
    at: Instant,
    stats: Vec<InstanceStats>,
}

async fn read(client: &Client) -> Result<Reading, Failure> {
    let request = client.request(Method::GET, &["instances"]).query(&[("state", "Running")]);
    let instances: Vec<Instance> = client.json(request).await?;
    let mut stats = Vec::new();
    for instance in instances {
        match client.get(&["instances", &instance.id, "stats"]).await {
            Ok(read) => stats.push(read),
            // The instance was deleted in between.
            Err(Failure::NotFound(_)) => {}
            Err(failure) => return Err(failure),
        }
    }
    Ok(Reading { at: Instant::now(), stats })
}

fn show(now: &Reading, before: &Reading, output: Output) -> Result<(), Failure> {
    let seconds = now.at.duration_since(before.at).as_secs_f64().max(0.001);
    let earlier: BTreeMap<&str, &InstanceStats> =
        before.stats.iter().map(|stats| (stats.instance_id.as_str(), stats)).collect();
    print(&now.stats, output, &["NAME", "CPU", "VCPUS", "MEMORY", "OF", "RECEIVED", "SENT"], || {
        let row = |stats: &InstanceStats| {
            let spent =
                earlier.get(stats.instance_id.as_str()).map(|old| stats.cpu_seconds - old.cpu_seconds);
            let share =
                spent.map_or_else(|| "-".to_owned(), |spent| format!("{:.0}%", spent / seconds * 100.0));
            vec![
                stats.instance_name.clone(),
                share,
                stats.allocated_vcpus.to_string(),
                Bytes(stats.memory_rss_bytes).to_string(),
                Bytes(stats.allocated_memory_bytes).to_string(),
                Bytes(stats.network_rx_bytes).to_string(),
                Bytes(stats.network_tx_bytes).to_string(),
            ]
        };
        now.stats.iter().map(row).collect()
    })
}
