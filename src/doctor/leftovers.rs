//! Host objects with our marks that exist although no daemon runs.
//!
//! A running daemon finds and removes objects without an owner by itself, so they are counted only when none
//! runs.

use std::fs;
use std::path::Path;

use stead_controllers::host::{LinkKind, Links};

use super::Finding;
use super::data::Daemon;
use crate::config::Config;
use crate::host::Scope;
use crate::host::netlink::Netlink;

pub(super) async fn examine(config: &Config, daemon: &Daemon) -> Vec<Finding> {
    if *daemon != Daemon::Ended {
        return Vec::new();
    }
    let mut found = Vec::new();
    let machines = entries(&config.run_dir.join("vm"));
    if machines > 0 {
        found.push(format!("{machines} VMs in {}", config.run_dir.join("vm").display()));
    }
    match links(config).await {
        Ok([0, 0, 0]) => {}
        Ok([bridges, taps, ifbs]) => found.push(format!("{bridges} bridges, {taps} TAPs, {ifbs} IFBs")),
        Err(_) => {}
    }
    if found.is_empty() {
        return vec![Finding::ok("leftovers", "nothing of an ended daemon is on this host")];
    }
    vec![Finding::warning(
        "leftovers",
        format!("without a daemon there are: {}", found.join("; ")),
        "start the daemon: it adopts what belongs to its instances and removes the rest",
    )]
}

fn entries(directory: &Path) -> usize {
    fs::read_dir(directory).map_or(0, Iterator::count)
}

/// Counts our links by kind.
async fn links(config: &Config) -> Result<[usize; 3], stead_controllers::host::HostError> {
    let links = Netlink::new(Scope::new(config.bridge.as_str())?)?.list().await?;
    let count = |kind| links.iter().filter(|link| link.kind == kind).count();
    Ok([LinkKind::Bridge, LinkKind::Tap, LinkKind::Ifb].map(count))
}
