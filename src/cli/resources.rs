//! `stead resources`: what the host has, what is promised of it, and memory that is taken back.

use clap::{Args, Subcommand};
use reqwest::Method;
use serde_json::{Value, json};
use stead_schemas::api::{
    MemoryReclaim, MemoryReclaimAction, ReclaimStatus, ResourceAllocation, ResourceStatus, Resources,
};
use stead_schemas::quantity::{Bytes, Rate};

use super::client::Client;
use super::show::print;
use super::{Failure, Output};

#[derive(Debug, Args)]
pub(crate) struct ShowResources {
    /// Print what each instance holds.
    #[arg(long)]
    instances: bool,
    #[command(subcommand)]
    verb: Option<ResourceVerb>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum ResourceVerb {
    /// Take hotplug memory back from instances for a while, from those first that use most.
    ReclaimMemory(ReclaimMemory),
}

#[derive(Debug, Args)]
pub(crate) struct ReclaimMemory {
    /// Memory that the host needs, such as 2GB.
    size: Bytes,
    /// Time for which the instances do not get it again, as a Go duration such as 10m.
    #[arg(long)]
    hold_for: Option<String>,
    /// Reason, for the log of the daemon.
    #[arg(long)]
    reason: Option<String>,
    /// Print what would be done, and do nothing.
    #[arg(long)]
    dry_run: bool,
}

async fn reclaim(client: &Client, asked: ReclaimMemory, output: Output) -> Result<(), Failure> {
    let mut body = json!({ "reclaim_bytes": asked.size.0, "dry_run": asked.dry_run });
    for (key, value) in [("hold_for", asked.hold_for), ("reason", asked.reason)] {
        if let Some(value) = value {
            body[key] = Value::from(value);
        }
    }
    let request = client.request(Method::POST, &["resources", "memory", "reclaim"]).json(&body);
    let seen: MemoryReclaim = client.json(request).await?;
    let header = ["NAME", "STATUS", "BEFORE", "NOW", "SHOULD USE", "FLOOR"];
    print(&seen, output, &header, || seen.actions.iter().map(share).collect())
}

fn share(action: &MemoryReclaimAction) -> Vec<String> {
    let status = match action.status {
        ReclaimStatus::Planned => "planned",
        ReclaimStatus::Applied => "applied",
        ReclaimStatus::Pending => "pending",
        ReclaimStatus::Unsupported => "unsupported",
    };
    let size = |bytes| Bytes(bytes).to_string();
    vec![
        action.instance_name.clone(),
        status.to_owned(),
        size(action.previous_target_guest_memory_bytes),
        size(action.target_guest_memory_bytes),
        size(action.planned_target_guest_memory_bytes),
        size(action.protected_floor_bytes),
    ]
}

pub(super) async fn resources(client: &Client, show: ShowResources, output: Output) -> Result<(), Failure> {
    if let Some(ResourceVerb::ReclaimMemory(asked)) = show.verb {
        return reclaim(client, asked, output).await;
    }
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
