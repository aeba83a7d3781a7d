//! Verbs on instances.

use std::collections::BTreeMap;

use clap::Args;
use futures::StreamExt;
use reqwest::Method;
use serde_json::{Value, json};
use stead_schemas::api::{Instance, RestartView, WaitForState};
use stead_schemas::condition::{self, ConditionStatus, ConditionType};
use stead_schemas::instance::State;
use stead_schemas::policy::{RestartBlocked, RestartReason};

use super::client::Client;
use super::policies::Policies;
use super::show::{age, line, print};
use super::{Failure, Output, auto_standby, health, images, volumes};

#[derive(Debug, Args)]
pub(crate) struct Run {
    image: String,
    /// Default: the image's last word and a few digits.
    #[arg(long)]
    name: Option<String>,
    /// KEY=VALUE
    #[arg(short, long = "env", value_parser = pair)]
    env: Vec<(String, String)>,
    #[arg(short, long)]
    memory: Option<String>,
    #[arg(long)]
    cpus: Option<u32>,
    #[arg(long)]
    overlay_size: Option<String>,
    /// One word; replaces the image's entrypoint.
    #[arg(long)]
    entrypoint: Option<String>,
    #[arg(long)]
    no_network: bool,
    /// qemu or qemu-microvm, as the host has them (see GET /capabilities)
    #[arg(long)]
    hypervisor: Option<String>,
    /// VOLUME:PATH, VOLUME:PATH:ro or VOLUME:PATH:overlay=SIZE
    #[arg(short, long = "volume")]
    volumes: Vec<volumes::Mount>,
    /// KEY=VALUE
    #[arg(short = 'l', long = "tag", value_parser = pair)]
    tags: Vec<(String, String)>,
    #[command(flatten)]
    policies: Policies,
    /// Return as soon as the wish is stored.
    #[arg(short, long)]
    detach: bool,
    /// The program and its arguments; replaces the image's.
    #[arg(trailing_var_arg = true)]
    cmd: Vec<String>,
}

#[derive(Debug, Args)]
pub(crate) struct Ps {
    /// Only instances in this state.
    #[arg(long)]
    state: Option<State>,
    /// Only names, one a line.
    #[arg(short, long)]
    quiet: bool,
    /// KEY=VALUE; all must match.
    #[arg(short = 'l', long = "tag", value_parser = pair)]
    tags: Vec<(String, String)>,
}

#[derive(Debug, Args)]
pub(crate) struct Logs {
    name: String,
    #[arg(long, default_value_t = 100)]
    tail: u32,
    /// Go on with what is written from now on.
    #[arg(short, long)]
    follow: bool,
    /// app (the console), vmm, or stead (what the daemon did for it)
    #[arg(short, long, default_value = "app")]
    source: String,
}

#[derive(Debug, Args)]
pub(crate) struct Rm {
    #[arg(required = true)]
    names: Vec<String>,
    /// Give the program no time to end.
    #[arg(short, long)]
    force: bool,
}

#[derive(Debug, Args)]
pub(crate) struct WaitFor {
    name: String,
    #[arg(long = "for", default_value = "Running")]
    state: State,
    /// A Go duration, at most 5m.
    #[arg(long, default_value = "60s")]
    timeout: String,
}

pub(super) fn pair(text: &str) -> Result<(String, String), String> {
    text.split_once('=')
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .ok_or_else(|| "must be KEY=VALUE".to_owned())
}

fn body(run: &Run) -> Result<Value, Failure> {
    let mut body = json!({
        "image": run.image,
        "name": run.name.clone().unwrap_or_else(|| generated_name(&run.image)),
    });
    let mut set = |key: &str, value: Value| body[key] = value;
    let map = |pairs: &[(String, String)]| json!(pairs.iter().cloned().collect::<BTreeMap<_, _>>());
    if !run.env.is_empty() {
        set("env", map(&run.env));
    }
    if !run.tags.is_empty() {
        set("tags", map(&run.tags));
    }
    if let Some(memory) = &run.memory {
        set("size", json!(memory));
    }
    if let Some(cpus) = run.cpus {
        set("vcpus", json!(cpus));
    }
    if let Some(size) = &run.overlay_size {
        set("overlay_size", json!(size));
    }
    if let Some(entrypoint) = &run.entrypoint {
        set("entrypoint", json!([entrypoint]));
    }
    if !run.cmd.is_empty() {
        set("cmd", json!(run.cmd));
    }
    if let Some(hypervisor) = &run.hypervisor {
        set("hypervisor", json!(hypervisor));
    }
    if run.no_network {
        set("network", json!({"enabled": false}));
    }
    if !run.volumes.is_empty() {
        set("volumes", run.volumes.iter().map(volumes::Mount::entry).collect());
    }
    run.policies.put(&mut body)?;
    Ok(body)
}

/// The repository's last component, made a name, with the process's number.
fn generated_name(image: &str) -> String {
    let last = image.rsplit('/').next().unwrap_or("vm");
    let word: String = last.chars().take_while(char::is_ascii_alphanumeric).take(40).collect();
    let word = if word.is_empty() { "vm".to_owned() } else { word.to_ascii_lowercase() };
    format!("{word}-{}", std::process::id())
}

pub(super) async fn run(client: &Client, run: Run, output: Output) -> Result<(), Failure> {
    let mut instance: Instance = client.post(&["instances"], &body(&run)?).await?;
    if !run.detach {
        images::show_progress(client, &instance.image).await?;
        let id = instance.id.clone();
        let query = [("state", "Running"), ("timeout", "2m")];
        let request = client.request(Method::GET, &["instances", &id, "wait"]).query(&query);
        let _: WaitForState = client.json(request.timeout(std::time::Duration::from_secs(130))).await?;
        instance = client.get(&["instances", &id]).await?;
    }
    show_all(&[instance], output)
}

pub(super) fn show_all(instances: &[Instance], output: Output) -> Result<(), Failure> {
    print(&instances, output, &["NAME", "STATE", "IMAGE", "ADDRESS", "CPUS", "MEMORY", "AGE", "NOTE"], || {
        instances.iter().map(row).collect()
    })
}

fn row(instance: &Instance) -> Vec<String> {
    let ready = condition::find(&instance.conditions, ConditionType::Ready);
    let note = ready
        .filter(|ready| ready.status != ConditionStatus::True)
        .map_or("", |ready| ready.message.as_str());
    vec![
        instance.name.clone(),
        format!("{:?}", instance.state),
        instance.image.clone(),
        instance.network.ip.clone().unwrap_or_else(|| "-".to_owned()),
        instance.vcpus.to_string(),
        instance.size.clone(),
        age(instance.created_at),
        note.to_owned(),
    ]
}

pub(super) async fn ps(client: &Client, ps: Ps, output: Output) -> Result<(), Failure> {
    let mut query: Vec<(String, String)> =
        ps.tags.iter().map(|(key, value)| (format!("tags[{key}]"), value.clone())).collect();
    query.extend(ps.state.map(|state| ("state".to_owned(), format!("{state:?}"))));
    let instances: Vec<Instance> =
        client.json(client.request(Method::GET, &["instances"]).query(&query)).await?;
    if ps.quiet {
        instances.iter().for_each(|instance| line(&instance.name));
        return Ok(());
    }
    show_all(&instances, output)
}

pub(super) async fn get(client: &Client, name: &str, output: Output) -> Result<(), Failure> {
    let instance: Instance = client.get(&["instances", name]).await?;
    show_all(&[instance], output)
}

pub(super) async fn describe(client: &Client, name: &str) -> Result<(), Failure> {
    let instance: Instance = client.get(&["instances", name]).await?;
    let mut facts = vec![
        ("Name", instance.name.clone()),
        ("Id", instance.id.clone()),
        ("Image", instance.image.clone()),
        ("State", format!("{:?}", instance.state)),
        ("Hypervisor", instance.hypervisor.as_str().to_owned()),
        ("Created", instance.created_at.to_string()),
        (
            "Size",
            format!("{} CPUs, {} memory, {} overlay", instance.vcpus, instance.size, instance.overlay_size),
        ),
        ("Generation", format!("{}, observed {}", instance.generation, instance.observed_generation)),
    ];
    facts.extend(instance.network.ip.clone().map(|ip| ("Address", ip)));
    facts.extend(instance.vmm_pid.map(|pid| ("VMM process", pid.to_string())));
    facts.extend(instance.health_status.as_ref().and_then(health::told).map(|health| ("Health", health)));
    facts.extend(instance.restart_status.as_ref().map(|restart| ("Restarts", restarts(restart))));
    facts.extend(instance.started_at.map(|at| ("Started", at.to_string())));
    facts.extend(instance.stopped_at.map(|at| ("Stopped", at.to_string())));
    facts.extend(instance.exit_message.clone().map(|message| ("Exit", message)));
    if instance.auto_standby.is_some() {
        let view = auto_standby::status(client, &instance.id).await?;
        facts.push(("Auto-standby", auto_standby::summary(&view)));
    }
    for (key, value) in facts {
        line(&format!("{key:<12} {value}"));
    }
    line("Conditions:");
    let rows = || {
        let row = |condition: &condition::Condition| {
            vec![
                format!("  {:?}", condition.kind),
                format!("{:?}", condition.status),
                format!("{:?}", condition.reason),
                age(condition.last_transition_time),
                condition.message.clone(),
            ]
        };
        instance.conditions.iter().map(row).collect()
    };
    print(&(), Output::Table, &["  TYPE", "STATUS", "REASON", "SINCE", "MESSAGE"], rows)
}

fn restarts(restart: &RestartView) -> String {
    let mut text = format!("{} in a row", restart.attempts);
    if let Some(reason) = restart.last_reason {
        text.push_str(match reason {
            RestartReason::HealthCheckFailed => ", the last because the health check failed",
        });
    }
    if let Some(at) = restart.next_attempt_at {
        text.push_str(&format!(", the next at {at}"));
    }
    if let Some(blocked) = restart.blocked_reason {
        text.push_str(match blocked {
            RestartBlocked::ManualStop => "; stopped by hand",
            RestartBlocked::MaxAttemptsExceeded => "; no more are allowed",
        });
    }
    text
}

pub(super) async fn logs(client: &Client, logs: Logs) -> Result<(), Failure> {
    let follow = if logs.follow { "true" } else { "false" }.to_owned();
    let query = [("tail", logs.tail.to_string()), ("source", logs.source), ("follow", follow)];
    let request = client.request(Method::GET, &["instances", &logs.name, "logs"]).query(&query);
    let mut chunks = client.stream(request).await?.bytes_stream();
    let mut rest = Vec::new();
    while let Some(chunk) = chunks.next().await {
        rest.extend_from_slice(&chunk.map_err(|error| Failure::Other(error.to_string()))?);
        while let Some(end) = rest.iter().position(|&byte| byte == b'\n') {
            let event: Vec<u8> = rest.drain(..=end).collect();
            if let Some(json) = event.strip_prefix(b"data: ") {
                line(&serde_json::from_slice::<String>(json).unwrap_or_default());
            }
        }
    }
    Ok(())
}

pub(super) async fn each(
    client: &Client,
    names: &[String],
    verb: &str,
    output: Output,
) -> Result<(), Failure> {
    if names.is_empty() {
        return Err(Failure::Usage(format!("{verb}: give at least one name")));
    }
    let mut instances: Vec<Instance> = Vec::new();
    for name in names {
        instances.push(client.post(&["instances", name, verb], &json!({})).await?);
    }
    show_all(&instances, output)
}

pub(super) async fn rm(client: &Client, rm: Rm) -> Result<(), Failure> {
    for name in &rm.names {
        let graceful = if rm.force { "false" } else { "true" };
        let request =
            client.request(Method::DELETE, &["instances", name]).query(&[("graceful_shutdown", graceful)]);
        client.send(request).await?;
        line(name);
    }
    Ok(())
}

pub(super) async fn wait(client: &Client, wait: WaitFor) -> Result<(), Failure> {
    let query = [("state", format!("{:?}", wait.state)), ("timeout", wait.timeout)];
    let request = client.request(Method::GET, &["instances", &wait.name, "wait"]).query(&query);
    let seen: WaitForState = client.json(request.timeout(std::time::Duration::from_secs(310))).await?;
    line(&format!("{:?}", seen.state));
    match seen {
        WaitForState { timed_out: true, .. } => {
            Err(Failure::TimedOut(format!("{} is not {:?} yet", wait.name, wait.state)))
        }
        seen if seen.state != wait.state => {
            Err(Failure::Other(format!("{} will not become {:?}", wait.name, wait.state)))
        }
        _ => Ok(()),
    }
}
