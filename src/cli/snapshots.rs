//! Verbs on snapshots, and forks.

use std::collections::BTreeMap;

use clap::{Args, Subcommand};
use reqwest::Method;
use serde_json::{Value, json};
use stead_schemas::api::{Instance, Snapshot};
use stead_schemas::names::Uid;
use stead_schemas::quantity::Bytes;

use super::arguments::pair;
use super::client::Client;
use super::instance_table::show_all as show_instances;
use super::schedules::{self, ScheduleVerb};
use super::show::{age, line, print};
use super::{Failure, Output};

#[derive(Debug, Subcommand)]
pub(crate) enum SnapshotVerb {
    /// Take a snapshot of an instance: of memory and disk (Standby), or of the disk (Stopped).
    Create {
        instance: String,
        #[arg(long, default_value = "Standby")]
        kind: String,
        #[arg(long)]
        name: Option<String>,
        /// A tag, as KEY=VALUE.
        #[arg(short = 'l', long = "tag", value_parser = pair)]
        tags: Vec<(String, String)>,
        /// Number of forks to hold ready.
        #[arg(long)]
        pool: Option<u32>,
    },
    /// Set the number of forks of a snapshot that are held ready.
    Pool { id: String, size: u32 },
    /// List snapshots.
    #[command(visible_alias = "ls")]
    List {
        /// List the snapshots of this instance only, by its name or id; by its id when it is gone.
        #[arg(long)]
        instance: Option<String>,
    },
    /// Print a snapshot.
    Get { id: String },
    /// Restore a stopped instance to a snapshot of it.
    Restore {
        instance: String,
        id: String,
        #[command(flatten)]
        target: Target,
    },
    /// Make an instance from a snapshot.
    Fork {
        id: String,
        #[arg(long)]
        name: String,
        #[command(flatten)]
        target: Target,
    },
    /// Manage periodic snapshots.
    #[command(subcommand)]
    Schedule(ScheduleVerb),
    /// Delete snapshots.
    #[command(visible_alias = "delete")]
    Rm {
        #[arg(required = true)]
        ids: Vec<String>,
    },
}

/// Returns the id of a source, which may be gone while its snapshots exist.
async fn source(client: &Client, word: &str) -> Result<String, Failure> {
    match client.get::<Instance>(&["instances", word]).await {
        Ok(instance) => Ok(instance.id),
        Err(Failure::NotFound(_)) if word.parse::<Uid>().is_ok() => Ok(word.to_owned()),
        Err(failure) => Err(failure),
    }
}

/// Make a copy of an instance in its current state.
#[derive(Debug, Args)]
pub(crate) struct Fork {
    source: String,
    #[arg(long)]
    name: String,
    /// Allow the source to be running; it keeps running.
    #[arg(long)]
    from_running: bool,
    /// The fork's state: Running, Standby or Stopped; by default that of the source.
    #[arg(long)]
    target_state: Option<String>,
}

pub(super) async fn fork(client: &Client, fork: Fork, output: Output) -> Result<(), Failure> {
    let mut body = json!({ "name": fork.name, "from_running": fork.from_running });
    if let Some(state) = fork.target_state {
        body["target_state"] = json!(state);
    }
    let instance: Instance = client.post(&["instances", &fork.source, "fork"], &body).await?;
    show_instances(&[instance], output)
}

/// The desired state and hypervisor of an instance that begins with a snapshot.
#[derive(Debug, Args)]
pub(crate) struct Target {
    /// The desired state: Running, Standby or Stopped.
    #[arg(long)]
    target_state: Option<String>,
    /// The hypervisor: qemu or qemu-microvm; for a snapshot of kind Standby only its own.
    #[arg(long)]
    target_hypervisor: Option<String>,
}

impl Target {
    fn put(self, body: &mut Value) {
        for (key, word) in
            [("target_state", self.target_state), ("target_hypervisor", self.target_hypervisor)]
        {
            if let Some(word) = word {
                body[key] = json!(word);
            }
        }
    }
}

pub(super) async fn snapshot(client: &Client, verb: SnapshotVerb, output: Output) -> Result<(), Failure> {
    match verb {
        SnapshotVerb::Create { instance, kind, name, tags, pool } => {
            let tags: BTreeMap<_, _> = tags.into_iter().collect();
            let mut body = json!({ "kind": kind, "tags": tags });
            if let Some(name) = name {
                body["name"] = json!(name);
            }
            if let Some(pool) = pool {
                body["pool_size"] = json!(pool);
            }
            let snapshot: Snapshot = client.post(&["instances", &instance, "snapshots"], &body).await?;
            show_all(&[snapshot], output)
        }
        SnapshotVerb::Pool { id, size } => {
            let request =
                client.request(Method::PATCH, &["snapshots", &id]).json(&json!({ "pool_size": size }));
            let snapshot: Snapshot = client.json(request).await?;
            show_all(&[snapshot], output)
        }
        SnapshotVerb::List { instance } => {
            let id = match &instance {
                Some(word) => Some(source(client, word).await?),
                None => None,
            };
            let query: Vec<_> = id.iter().map(|id| ("source_instance_id", id)).collect();
            let request = client.request(Method::GET, &["snapshots"]).query(&query);
            let snapshots: Vec<Snapshot> = client.json(request).await?;
            show_all(&snapshots, output)
        }
        SnapshotVerb::Get { id } => {
            let snapshot: Snapshot = client.get(&["snapshots", &id]).await?;
            show_all(&[snapshot], output)
        }
        SnapshotVerb::Restore { instance, id, target } => {
            let mut body = json!({});
            target.put(&mut body);
            let path = ["instances", &instance, "snapshots", &id, "restore"];
            let instance: Instance = client.post(&path, &body).await?;
            show_instances(&[instance], output)
        }
        SnapshotVerb::Fork { id, name, target } => {
            let mut body = json!({ "name": name });
            target.put(&mut body);
            let instance: Instance = client.post(&["snapshots", &id, "fork"], &body).await?;
            show_instances(&[instance], output)
        }
        SnapshotVerb::Schedule(verb) => schedules::schedule(client, verb, output).await,
        SnapshotVerb::Rm { ids } => {
            for id in ids {
                client.send(client.request(Method::DELETE, &["snapshots", &id])).await?;
                line(&id);
            }
            Ok(())
        }
    }
}

fn show_all(snapshots: &[Snapshot], output: Output) -> Result<(), Failure> {
    print(&snapshots, output, &["ID", "NAME", "KIND", "SIZE", "SOURCE", "POOL", "AGE"], || {
        let row = |snapshot: &Snapshot| {
            vec![
                snapshot.id.clone(),
                snapshot.name.clone().unwrap_or_else(|| "-".to_owned()),
                format!("{:?}", snapshot.kind),
                Bytes(snapshot.size_bytes).to_string(),
                snapshot.source_instance_name.clone(),
                format!("{}/{}", snapshot.pool_ready, snapshot.pool_size),
                age(snapshot.created_at),
            ]
        };
        snapshots.iter().map(row).collect()
    })
}
