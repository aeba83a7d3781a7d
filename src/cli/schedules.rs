//! Verbs on the snapshot schedule of an instance.

use std::collections::BTreeMap;

use clap::Subcommand;
use reqwest::Method;
use serde_json::{Value, json};
use stead_schemas::api::SnapshotSchedule;

use super::arguments::pair;
use super::client::Client;
use super::show::{age, line, print};
use super::{Failure, Output};

#[derive(Debug, Subcommand)]
pub(crate) enum ScheduleVerb {
    /// Take snapshots of an instance periodically.
    Set {
        instance: String,
        /// Time between two snapshots, such as 1h; at least 1m.
        #[arg(long, value_name = "TIME")]
        every: String,
        /// Number of newest snapshots that are kept.
        #[arg(long, value_name = "COUNT", required_unless_present = "keep_for")]
        keep: Option<u32>,
        /// Age up to which snapshots are kept.
        #[arg(long, value_name = "TIME")]
        keep_for: Option<String>,
        /// Prefix of the snapshots' names.
        #[arg(long)]
        name_prefix: Option<String>,
        /// A tag of the snapshots, as KEY=VALUE.
        #[arg(short = 'l', long = "tag", value_parser = pair)]
        tags: Vec<(String, String)>,
    },
    /// Print the schedule of an instance.
    Get { instance: String },
    /// Take no more snapshots; existing ones stay.
    #[command(visible_alias = "delete")]
    Rm { instance: String },
}

pub(super) async fn schedule(client: &Client, verb: ScheduleVerb, output: Output) -> Result<(), Failure> {
    let path = |instance: &str| ["instances".to_owned(), instance.to_owned(), "snapshot-schedule".to_owned()];
    let request = |method, instance: &str| {
        let path = path(instance);
        client.request(method, &path.each_ref().map(String::as_str))
    };
    match verb {
        ScheduleVerb::Set { instance, every, keep, keep_for, name_prefix, tags } => {
            let tags: BTreeMap<_, _> = tags.into_iter().collect();
            let body: Value = json!({
                "interval": every,
                "retention": { "max_count": keep, "max_age": keep_for },
                "name_prefix": name_prefix,
                "metadata": tags,
            });
            show(&client.json(request(Method::PUT, &instance).json(&body)).await?, output)
        }
        ScheduleVerb::Get { instance } => show(&client.json(request(Method::GET, &instance)).await?, output),
        ScheduleVerb::Rm { instance } => {
            client.send(request(Method::DELETE, &instance)).await?;
            line(&instance);
            Ok(())
        }
    }
}

fn show(schedule: &SnapshotSchedule, output: Output) -> Result<(), Failure> {
    print(schedule, output, &["INTERVAL", "KEEP", "KEEP FOR", "NEXT", "LAST", "SNAPSHOT", "NOTE"], || {
        let retention = &schedule.retention;
        let or_dash = |text: Option<String>| text.unwrap_or_else(|| "-".to_owned());
        vec![vec![
            schedule.interval.to_string(),
            or_dash(retention.max_count.map(|count| count.to_string())),
            or_dash(retention.max_age.map(|age| age.to_string())),
            schedule.next_run_at.to_string(),
            or_dash(schedule.last_run_at.map(age)),
            or_dash(schedule.last_snapshot_id.clone()),
            schedule.last_error.clone().unwrap_or_default(),
        ]]
    })
}
