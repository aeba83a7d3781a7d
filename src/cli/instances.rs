//! Verbs on instances.

use std::collections::BTreeMap;
use std::time::Duration;

use clap::Args;
use reqwest::Method;
use serde_json::{Value, json};
use stead_schemas::api::{Instance, RestartView, WaitForState};
use stead_schemas::condition::{self, ConditionType};
use stead_schemas::instance::State;
use stead_schemas::limits::WAIT_MAX;
use stead_schemas::policy::{RestartBlocked, RestartReason};
use stead_schemas::quantity::GoDuration;

use super::arguments::{for_each, pair};
use super::client::Client;
use super::instance_table::show_all;
use super::policies::Policies;
use super::show::{age, line, print, shown};
use super::{Failure, Output, auto_standby, bandwidth, credentials, health, hotplug, images, volumes};

/// Time for an instance to reach the state that a verb asks for; a boot on a busy host takes less.
const ARRIVAL_MAX: Duration = Duration::from_secs(120);
/// Time for a response beyond the time that the server was asked to wait.
const ANSWER_MAX: Duration = Duration::from_secs(10);

#[derive(Debug, Args)]
pub(crate) struct Run {
    image: String,
    /// The instance's name; by default the image's last word and a number.
    #[arg(long)]
    name: Option<String>,
    /// An environment variable, as KEY=VALUE.
    #[arg(short, long = "env", value_parser = pair)]
    env: Vec<(String, String)>,
    #[arg(short, long)]
    memory: Option<String>,
    #[arg(long)]
    cpus: Option<u32>,
    #[arg(long)]
    overlay_size: Option<String>,
    /// The entrypoint, a single word; replaces the image's entrypoint.
    #[arg(long)]
    entrypoint: Option<String>,
    #[arg(long)]
    no_network: bool,
    /// The hypervisor: qemu or qemu-microvm, as the host has them (see GET /capabilities).
    #[arg(long)]
    hypervisor: Option<String>,
    /// Pull policy: `missing` asks the registry only if no image is here under the name; `always` asks it
    /// every time.
    #[arg(long)]
    pull: Option<String>,
    /// A mount: VOLUME:PATH, VOLUME:PATH:ro or VOLUME:PATH:overlay=SIZE.
    #[arg(short, long = "volume")]
    volumes: Vec<volumes::Mount>,
    /// A tag, as KEY=VALUE.
    #[arg(short = 'l', long = "tag", value_parser = pair)]
    tags: Vec<(String, String)>,
    #[command(flatten)]
    egress: credentials::Egress,
    #[command(flatten)]
    bandwidth: bandwidth::Bandwidth,
    #[command(flatten)]
    hotplug: hotplug::Hotplug,
    #[command(flatten)]
    policies: Policies,
    /// Return as soon as the spec is stored.
    #[arg(short, long)]
    detach: bool,
    /// The program and its arguments; replaces the image's.
    #[arg(trailing_var_arg = true)]
    cmd: Vec<String>,
}

#[derive(Debug, Args)]
pub(crate) struct Ps {
    /// List instances in this state only.
    #[arg(long)]
    state: Option<State>,
    /// Print names only, one a line.
    #[arg(short, long)]
    quiet: bool,
    /// A tag, as KEY=VALUE; all tags must match.
    #[arg(short = 'l', long = "tag", value_parser = pair)]
    tags: Vec<(String, String)>,
}

#[derive(Debug, Args)]
pub(crate) struct Logs {
    pub(super) name: String,
    #[arg(long, default_value_t = 100)]
    pub(super) tail: u32,
    /// Continue with the lines that are written from now on.
    #[arg(short, long)]
    pub(super) follow: bool,
    /// The log: app (the console), vmm, stead (the daemon's actions for the instance), or egress.
    #[arg(short, long, default_value = "app")]
    pub(super) source: String,
    /// Print control characters unchanged, even at a terminal.
    #[arg(long)]
    pub(super) raw: bool,
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
    /// A Go duration, such as 90s.
    #[arg(long, default_value = "60s")]
    timeout: String,
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
    if let Some(pull) = &run.pull {
        set("pull", json!(pull));
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
    run.egress.put(&mut body)?;
    run.bandwidth.put(&mut body);
    run.hotplug.put(&mut body);
    run.policies.put(&mut body)?;
    Ok(body)
}

/// Makes a name from the repository's last component and this process's id.
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
        instance = arrived(client, &instance.id, State::Running).await?;
    }
    show_all(std::slice::from_ref(&instance), output)?;
    if run.detach { Ok(()) } else { check(&instance, State::Running) }
}

/// Waits for this state, and returns the instance, whether it reached the state or not.
async fn arrived(client: &Client, id: &str, state: State) -> Result<Instance, Failure> {
    wait_for(client, id, state, ARRIVAL_MAX).await?;
    client.get(&["instances", id]).await
}

/// Checks whether a verb did what it was asked for; for a program that ended at once, its own exit code
/// decides.
fn check(instance: &Instance, wanted: State) -> Result<(), Failure> {
    let Instance { name, state, .. } = instance;
    if *state == wanted {
        return Ok(());
    }
    let ready = condition::find(&instance.conditions, ConditionType::Ready).map(|one| one.message.clone());
    let why = instance.exit_message.clone().filter(|why| !why.is_empty()).or(ready).unwrap_or_default();
    match (wanted, state, instance.exit_code) {
        (State::Running, State::Stopped, Some(0)) => Ok(()),
        (State::Running, State::Stopped, code) => Err(Failure::Ended {
            code: code.and_then(|code| u8::try_from(code).ok()).filter(|&code| code > 0).unwrap_or(1),
            text: format!("{name} ended: {why}; it is kept: stead logs {name}, stead rm {name}"),
        }),
        (_, State::Stopped, _) => Err(Failure::Other(format!("{name} is Stopped: {why}"))),
        _ => {
            Err(Failure::TimedOut(format!("{name} is {state:?}, not {wanted:?} yet: stead describe {name}")))
        }
    }
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
    facts.extend(hotplug::summary(&instance).map(|memory| ("Hotplug", memory)));
    facts.extend(instance.disk_io_bps.clone().map(|rate| ("Disk limit", rate)));
    facts.extend(instance.network.egress.as_ref().map(|egress| ("Egress", credentials::summary(egress))));
    facts.extend(bandwidth::summary(&instance.network).map(|limits| ("Bandwidth", limits)));
    facts.extend(instance.vmm_pid.map(|pid| ("VMM process", pid.to_string())));
    facts.extend(instance.health_status.as_ref().and_then(health::summary).map(|health| ("Health", health)));
    facts.extend(instance.restart_status.as_ref().map(|restart| ("Restarts", restarts(restart))));
    facts.extend(instance.started_at.map(|at| ("Started", at.to_string())));
    facts.extend(instance.stopped_at.map(|at| ("Stopped", at.to_string())));
    facts.extend(instance.exit_message.clone().map(|message| ("Exit", message)));
    if instance.auto_standby.is_some() {
        let view = auto_standby::status(client, &instance.id).await?;
        facts.push(("Auto-standby", auto_standby::summary(&view)));
    }
    for (key, value) in facts {
        line(&shown(&format!("{key:<12} {value}")));
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

pub(super) async fn each(
    client: &Client,
    names: &[String],
    verb: &str,
    output: Output,
) -> Result<(), Failure> {
    let wanted = match verb {
        "stop" => State::Stopped,
        "standby" => State::Standby,
        _ => State::Running,
    };
    let mut instances: Vec<Instance> = Vec::new();
    let all = for_each(names, async |name| {
        let mut instance: Instance = client.post(&["instances", name, verb], &json!({})).await?;
        if instance.state != wanted {
            // The time for the verb's own response was over.
            instance = arrived(client, &instance.id, wanted).await?;
        }
        instances.push(instance.clone());
        check(&instance, wanted)
    })
    .await;
    if !instances.is_empty() {
        show_all(&instances, output)?;
    }
    all
}

pub(super) async fn rm(client: &Client, rm: Rm) -> Result<(), Failure> {
    for_each(&rm.names, async |name| {
        let graceful = if rm.force { "false" } else { "true" };
        let request =
            client.request(Method::DELETE, &["instances", name]).query(&[("graceful_shutdown", graceful)]);
        client.send(request).await?;
        line(name);
        Ok(())
    })
    .await
}

/// Waits in pieces that the server allows, and through restarts of the server.
async fn wait_for(
    client: &Client,
    name: &str,
    state: State,
    at_most: Duration,
) -> Result<WaitForState, Failure> {
    let deadline = tokio::time::Instant::now() + at_most;
    let state = format!("{state:?}");
    loop {
        let left = deadline.saturating_duration_since(tokio::time::Instant::now());
        let piece = left.clamp(Duration::from_millis(1), WAIT_MAX);
        let ask = async || {
            let query = [("state", &*state), ("timeout", &*format!("{}ms", piece.as_millis()))];
            let request = client.request(Method::GET, &["instances", name, "wait"]).query(&query);
            // The request is sent once: a repeat would wait for the same time again.
            let response = client.stream(request.timeout(piece + ANSWER_MAX)).await?;
            client.answer::<WaitForState>(response).await
        };
        let seen = client.until_there(left, Duration::from_millis(500), ask).await?;
        if !seen.timed_out || tokio::time::Instant::now() >= deadline {
            return Ok(seen);
        }
    }
}

pub(super) async fn wait(client: &Client, wait: WaitFor) -> Result<(), Failure> {
    let GoDuration(at_most) =
        wait.timeout.parse().map_err(|error| Failure::Usage(format!("--timeout {error}")))?;
    // By id: the instance may get another name in the meantime.
    let instance: Instance = client
        .until_there(at_most, Duration::from_millis(500), async || {
            client.get(&["instances", &wait.name]).await
        })
        .await?;
    let seen = wait_for(client, &instance.id, wait.state, at_most).await?;
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
