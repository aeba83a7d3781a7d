//! Auto-standby on the command line: its status, its hold, and the flags of its policy.

use clap::{Args, Subcommand};
use reqwest::Method;
use serde_json::{Value, json};
use stead_schemas::api::AutoStandbyView;

use super::client::Client;
use super::show::{line, print};
use super::{Failure, Output};

#[derive(Debug, Subcommand)]
pub(crate) enum AutoStandby {
    /// Show the state: who is connected, and when the instance goes to standby.
    Status { name: String },
    /// Put the standby off for another idle timeout.
    Hold { name: String },
}

#[derive(Debug, Args)]
#[expect(clippy::struct_field_names, reason = "the names are the words of the command line")]
pub(crate) struct Policy {
    /// Go to standby when no client is connected; =false switches it off.
    #[arg(long, num_args = 0..=1, default_missing_value = "true", require_equals = true)]
    auto_standby_enabled: Option<bool>,
    /// Time without connections before the standby, such as 10m.
    #[arg(long)]
    auto_standby_idle_timeout: Option<String>,
    /// A subnet whose connections are ignored; may be given several times.
    #[arg(long)]
    auto_standby_ignore_source_cidr: Vec<String>,
    /// A port whose connections are ignored; may be given several times.
    #[arg(long)]
    auto_standby_ignore_destination_port: Vec<u16>,
    /// Restore the instance on a connection; =false leaves it in standby.
    #[arg(long, num_args = 0..=1, default_missing_value = "true", require_equals = true)]
    auto_standby_wake_on_traffic: Option<bool>,
}

impl Policy {
    /// Adds the given flags to a request. A timeout alone switches auto-standby on.
    pub(super) fn put(&self, body: &mut Value) {
        let mut policy = json!({});
        let mut set = |key: &str, value: Option<Value>| {
            if let Some(value) = value {
                policy[key] = value;
            }
        };
        let is_on = self.auto_standby_enabled.or(self.auto_standby_idle_timeout.as_ref().map(|_| true));
        set("enabled", is_on.map(Value::from));
        set("idle_timeout", self.auto_standby_idle_timeout.as_deref().map(Value::from));
        set("wake_on_traffic", self.auto_standby_wake_on_traffic.map(Value::from));
        let cidrs = &self.auto_standby_ignore_source_cidr;
        set("ignore_source_cidrs", (!cidrs.is_empty()).then(|| json!(cidrs)));
        let ports = &self.auto_standby_ignore_destination_port;
        set("ignore_destination_ports", (!ports.is_empty()).then(|| json!(ports)));
        if policy != json!({}) {
            body["auto_standby"] = policy;
        }
    }
}

pub(super) async fn auto_standby(client: &Client, verb: AutoStandby, output: Output) -> Result<(), Failure> {
    let view = match &verb {
        AutoStandby::Status { name } => status(client, name).await?,
        AutoStandby::Hold { name } => {
            client.post(&["instances", name, "auto-standby", "hold"], &json!({})).await?
        }
    };
    if output == Output::Table {
        facts(&view).iter().for_each(|(key, value)| line(&format!("{key:<20} {value}")));
        return Ok(());
    }
    print(&view, output, &[], Vec::new)
}

pub(super) async fn status(client: &Client, name: &str) -> Result<AutoStandbyView, Failure> {
    client.json(client.request(Method::GET, &["instances", name, "auto-standby", "status"])).await
}

/// Returns the wire's word for a value.
fn word(value: impl serde::Serialize) -> String {
    serde_json::to_value(value).ok().and_then(|word| word.as_str().map(str::to_owned)).unwrap_or_default()
}

fn facts(view: &AutoStandbyView) -> Vec<(&'static str, String)> {
    let mut facts = vec![
        ("Status", word(view.status)),
        ("Reason", word(view.reason)),
        ("Connections", view.active_inbound_connections.to_string()),
        ("Wake on traffic", view.wake_on_traffic.to_string()),
    ];
    let times = [
        ("Idle since", view.idle_since),
        ("Last connection", view.last_inbound_activity_at),
        ("Standby at", view.next_standby_at),
        ("Held until", view.hold_until),
        ("Woken at", view.woken_at),
    ];
    facts.extend(view.idle_timeout.map(|timeout| ("Idle timeout", timeout.to_string())));
    facts.extend(view.countdown_remaining.map(|left| ("Remaining", left.to_string())));
    facts.extend(times.into_iter().filter_map(|(key, at)| Some((key, at?.to_string()))));
    facts.extend(view.error.clone().map(|error| ("Error", error)));
    facts
}

/// Returns a summary in one line for `describe`.
pub(super) fn summary(view: &AutoStandbyView) -> String {
    let mut text = format!("{}, {} connections", word(view.status), view.active_inbound_connections);
    if let Some(at) = view.next_standby_at {
        text.push_str(&format!(", standby at {at}"));
    }
    if let Some(at) = view.woken_at {
        text.push_str(&format!(", woken by a connection at {at}"));
    }
    text
}
