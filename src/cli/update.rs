//! `stead update`: changes an instance, and says when each change applies.

use clap::Args;
use reqwest::Method;
use serde_json::{Value, json};
use stead_schemas::api::{Applies, Instance};

use super::arguments::pair;
use super::bandwidth::Bandwidth;
use super::client::Client;
use super::hotplug::Hotplug;
use super::instance_table::show_all;
use super::policies::Policies;
use super::show::shown;
use super::{Failure, Output};

#[derive(Debug, Args)]
pub(crate) struct Update {
    name: String,
    /// New name, which applies at once.
    #[arg(long = "name")]
    new_name: Option<String>,
    /// New image, from the next start on; files that were written outside of volumes are lost then.
    #[arg(long)]
    image: Option<String>,
    /// Pull policy: `missing` asks the registry only if no image is here under the name; `always` asks it
    /// every time, and begins anew even with the present image.
    #[arg(long)]
    pull: Option<String>,
    /// Connect the instance to the network from its next start on.
    #[arg(long, conflicts_with = "no_network")]
    network: bool,
    /// Disconnect the instance from the network from its next start on.
    #[arg(long)]
    no_network: bool,
    /// New memory, such as 2GB, from the next start on.
    #[arg(short, long)]
    memory: Option<String>,
    /// New size of the writable layer, such as 20GB, from the next start on; it only grows.
    #[arg(long)]
    overlay_size: Option<String>,
    /// New number of virtual processors, from the next start on.
    #[arg(long)]
    cpus: Option<u32>,
    /// A variable that is set from the next start on, as KEY=VALUE.
    #[arg(short, long = "env", value_parser = pair)]
    env: Vec<(String, String)>,
    /// A variable that is removed from the next start on.
    #[arg(long)]
    unset_env: Vec<String>,
    /// New hypervisor, from the next start on.
    #[arg(long)]
    hypervisor: Option<String>,
    /// A tag, as KEY=VALUE; the given tags replace all tags.
    #[arg(short = 'l', long = "tag", value_parser = pair)]
    tags: Vec<(String, String)>,
    #[command(flatten)]
    bandwidth: Bandwidth,
    #[command(flatten)]
    hotplug: Hotplug,
    #[command(flatten)]
    policies: Policies,
    /// Start a program that runs again, so that it sees all changes now.
    #[arg(long)]
    restart_now: bool,
    /// Print what the change would do, and change nothing.
    #[arg(long)]
    dry_run: bool,
    /// The program and its arguments from the next start on.
    #[arg(trailing_var_arg = true)]
    cmd: Vec<String>,
}

impl Update {
    /// Returns the request; the server validates the values.
    fn body(&self) -> Result<Value, Failure> {
        let mut body = json!({});
        let texts = [
            ("name", &self.new_name),
            ("image", &self.image),
            ("pull", &self.pull),
            ("size", &self.memory),
            ("overlay_size", &self.overlay_size),
            ("hypervisor", &self.hypervisor),
        ];
        for (key, value) in texts {
            if let Some(value) = value {
                body[key] = value.as_str().into();
            }
        }
        if self.network || self.no_network {
            body["network"]["enabled"] = self.network.into();
        }
        if let Some(cpus) = self.cpus {
            body["vcpus"] = cpus.into();
        }
        for (key, value) in &self.env {
            body["env"][key] = value.as_str().into();
        }
        for key in &self.unset_env {
            body["env"][key] = Value::Null;
        }
        for (key, value) in &self.tags {
            body["tags"][key] = value.as_str().into();
        }
        if !self.cmd.is_empty() {
            body["cmd"] = json!(self.cmd);
        }
        if self.restart_now {
            body["restart"] = true.into();
        }
        self.bandwidth.put(&mut body);
        self.hotplug.put(&mut body);
        self.policies.put(&mut body)?;
        Ok(body)
    }
}

pub(super) async fn update(client: &Client, update: Update, output: Output) -> Result<(), Failure> {
    let body = update.body()?;
    let mut request = client.request(Method::PATCH, &["instances", &update.name]).json(&body);
    if update.dry_run {
        request = request.query(&[("dry_run", "true")]);
    }
    let instance: Instance = client.json(request).await?;
    // Beside the answer, which programs read from the standard output.
    for (field, applies) in instance.changes.iter().flatten() {
        eprintln!("{}: {}", shown(field), when(*applies));
    }
    show_all(&[instance], output)
}

fn when(applies: Applies) -> &'static str {
    match applies {
        Applies::Now => "applies now",
        Applies::WithRestart => "the program is started again",
        Applies::AtNextStart => "waits for the next start (--restart-now starts the program again)",
    }
}
