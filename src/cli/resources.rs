//! `stead resources`: what the host has, and what is promised of it.

use clap::Args;
use stead_schemas::api::{ResourceAllocation, ResourceStatus, Resources};
use stead_schemas::quantity::{Bytes, Rate};

use super::client::Client;
use super::show::print;
use super::{Failure, Output};

#[derive(Debug, Args)]
pub(crate) struct ShowResources {
    /// Print what each instance holds.
    #[arg(long)]
    instances: bool,
}

pub(super) async fn resources(client: &Client, show: ShowResources, output: Output) -> Result<(), Failure> {
    let seen: Resources = client.get(&["resources"]).await?;
    if show.instances {
        let header = ["NAME", "CPUS", "MEMORY", "DISK", "DISK RATE", "DOWNLOAD", "UPLOAD"];
        return print(&seen.allocations, output, &header, || seen.allocations.iter().map(holder).collect());
    }
    let header = ["RESOURCE", "CAPACITY", "RESERVED", "FACTOR", "LIMIT", "ALLOCATED", "AVAILABLE"];
    print(&seen, output, &header, || {
        let plain = |amount: u64| amount.to_string();
        let size = |amount: u64| Bytes(amount).to_string();
        let rate = |amount: u64| Rate(amount).to_string();
        vec![
            row("cpu", &seen.cpu, plain),
            row("memory", &seen.memory, size),
            row("disk", &seen.disk, size),
            row("network", &seen.network, rate),
            row("disk rate", &seen.disk_io, rate),
        ]
    })
}

/// Makes the row of a resource. A resource of unknown capacity has no limit.
fn row(name: &str, status: &ResourceStatus, amount: impl Fn(u64) -> String) -> Vec<String> {
    let known = |value: String| if status.capacity == 0 { "-".to_owned() } else { value };
    vec![
        name.to_owned(),
        known(amount(status.capacity)),
        if status.reserve == 0 { "-".to_owned() } else { amount(status.reserve) },
        status.oversub_ratio.to_string(),
        if status.capacity == 0 { "none".to_owned() } else { amount(status.effective_limit) },
        amount(status.allocated),
        known(amount(status.available)),
    ]
}

fn holder(held: &ResourceAllocation) -> Vec<String> {
    let rate = |bps: u64| if bps == 0 { "-".to_owned() } else { Rate(bps).to_string() };
    vec![
        held.instance_name.clone(),
        held.cpu.to_string(),
        Bytes(held.memory_bytes).to_string(),
        Bytes(held.disk_bytes).to_string(),
        rate(held.disk_io_bps),
        rate(held.network_download_bps),
        rate(held.network_upload_bps),
    ]
}
