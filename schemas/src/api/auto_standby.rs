//! Auto-standby on the wire: the policy, and the state that is reported for it.

use ipnet::IpNet;
use jiff::Timestamp;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::fields::Fields;
use super::schema::Time;
use crate::instance::{Instance, Power, PowerCause, State};
use crate::limits;
use crate::meta::Object;
use crate::network::NicSpec;
use crate::policy::{AutoStandbyPolicy, IdleStatus};
use crate::quantity::GoDuration;
use crate::validate::FieldErrors;

const INVALID: &str = "invalid_auto_standby";
/// Longest text of a subnet, in bytes: eight groups, a prefix and some zeros.
const CIDR_BYTES_MAX: usize = 64;
/// The tracking mode that is reported: the host's table of TCP connections is read when something may be
/// due.
const TRACKING: &str = "conntrack_table_tcp";

/// Reads `auto_standby`; returns `None` when the request does not contain it.
pub(super) fn policy(fields: &mut Fields, errors: &mut FieldErrors) -> Option<AutoStandbyPolicy> {
    let mut policy = fields.object_of("auto_standby", INVALID, errors)?;
    let enabled = policy.flag_of("enabled", INVALID, errors).unwrap_or(false);
    let idle_timeout = timeout(&mut policy, enabled, errors);
    let wake_on_traffic = policy.flag_of("wake_on_traffic", INVALID, errors).unwrap_or(false);
    let ignore_source_cidrs = cidrs(&mut policy, errors);
    let ignore_destination_ports = ports(&mut policy, errors);
    policy.finish(errors);
    Some(AutoStandbyPolicy {
        enabled,
        idle_timeout,
        ignore_source_cidrs,
        ignore_destination_ports,
        wake_on_traffic,
    })
}

fn timeout(policy: &mut Fields, is_required: bool, errors: &mut FieldErrors) -> Option<GoDuration> {
    let path = policy.path("idle_timeout");
    let is_given = policy.has("idle_timeout");
    let given: Option<GoDuration> = policy.parsed("idle_timeout", INVALID, errors);
    let (low, high) = (limits::IDLE_TIMEOUT_MIN, limits::TTL_MAX);
    match given {
        Some(timeout) if !(low..=high).contains(&timeout.0) => {
            let message = format!("must be from {} to {}", GoDuration(low), GoDuration(high));
            errors.push(path, INVALID, message);
            None
        }
        None if is_required && !is_given => {
            errors.push(path, INVALID, "is required when enabled");
            None
        }
        given => given,
    }
}

fn cidrs(policy: &mut Fields, errors: &mut FieldErrors) -> Vec<IpNet> {
    let path = policy.path("ignore_source_cidrs");
    let texts = policy.texts_of("ignore_source_cidrs", INVALID, limits::IGNORES_MAX, CIDR_BYTES_MAX, errors);
    let mut cidrs = Vec::new();
    for (index, text) in texts.unwrap_or_default().iter().enumerate() {
        match text.parse::<IpNet>() {
            // A subnet is compared and shown without host bits.
            Ok(cidr) => cidrs.push(cidr.trunc()),
            Err(_) => {
                let message = "must be a subnet such as 10.0.0.0/8 or 2001:db8::/32";
                errors.push(format!("{path}[{index}]"), INVALID, message);
            }
        }
    }
    cidrs
}

fn ports(policy: &mut Fields, errors: &mut FieldErrors) -> Vec<u16> {
    let path = policy.path("ignore_destination_ports");
    let items = policy.list_of("ignore_destination_ports", INVALID, errors).unwrap_or_default();
    if items.len() > limits::IGNORES_MAX {
        let message = format!("has {} entries; at most {} are allowed", items.len(), limits::IGNORES_MAX);
        errors.push(path, INVALID, message);
        return Vec::new();
    }
    let mut ports = Vec::new();
    for (index, item) in items.iter().enumerate() {
        let port = item.as_u64().and_then(|number| u16::try_from(number).ok()).filter(|&port| port > 0);
        match port {
            Some(port) => ports.push(port),
            None => errors.push(format!("{path}[{index}]"), INVALID, "must be a port, 1 to 65535"),
        }
    }
    ports
}

/// The state of auto-standby, in a single word.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum AutoStandbyState {
    Unsupported,
    Disabled,
    Ineligible,
    Active,
    IdleCountdown,
    ReadyForStandby,
    StandbyRequested,
    Error,
}

/// The reason of a state of auto-standby.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum AutoStandbyReason {
    UnsupportedPlatform,
    PolicyMissing,
    PolicyDisabled,
    InstanceNotRunning,
    NetworkDisabled,
    MissingIp,
    HasVgpu,
    ActiveInboundConnections,
    IdleTimeoutNotElapsed,
    ObserverError,
    ReadyForStandby,
}

/// The response to `GET …/auto-standby/status` and `POST …/auto-standby/hold`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[schemars(rename = "AutoStandbyStatus")]
pub struct AutoStandbyView {
    /// True if the host can observe connections.
    pub supported: bool,
    /// True if the instance has a policy.
    pub configured: bool,
    /// True if the policy is on.
    pub enabled: bool,
    /// True if the instance goes to standby when it is idle for long enough.
    pub eligible: bool,
    /// State of auto-standby.
    pub status: AutoStandbyState,
    /// Reason of the state.
    pub reason: AutoStandbyReason,
    /// Number of connections of clients.
    pub active_inbound_connections: u32,
    /// Way in which connections are observed.
    pub tracking_mode: String,
    /// Time without a connection before the standby.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub idle_timeout: Option<GoDuration>,
    /// Time since which no client is connected.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<Time>")]
    pub idle_since: Option<Timestamp>,
    /// Time at which a client was last connected.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<Time>")]
    pub last_inbound_activity_at: Option<Timestamp>,
    /// Time of the standby if no client connects.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<Time>")]
    pub next_standby_at: Option<Timestamp>,
    /// Time left until the standby.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub countdown_remaining: Option<GoDuration>,
    /// Time until which a client put the standby off.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<Time>")]
    pub hold_until: Option<Timestamp>,
    /// An addition to Hypeman's API: true if a connection restores the instance.
    pub wake_on_traffic: bool,
    /// An addition to Hypeman's API: time at which a connection last restored the instance; kept until the power state in the
    /// spec changes again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<Time>")]
    pub woken_at: Option<Timestamp>,
    /// An addition to Hypeman's API: the reason why connections could not be observed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

impl AutoStandbyView {
    /// Converts a record to its wire form; `port` is the port that the record names.
    #[must_use]
    pub fn of(object: &Object<Instance>, port: Option<&NicSpec>, now: Timestamp) -> Self {
        let Object { spec, status, .. } = object;
        let policy = spec.auto_standby.as_ref();
        let due = due(object);
        let (state, reason) = stand(object, port, due, now);
        let is_counting =
            matches!(state, AutoStandbyState::IdleCountdown | AutoStandbyState::ReadyForStandby);
        let due = due.filter(|_| is_counting);
        let remaining = due.map(|at| at.duration_since(now).try_into().unwrap_or_default());
        Self {
            supported: !status.idle.is_unsupported,
            configured: policy.is_some(),
            enabled: policy.is_some_and(|policy| policy.enabled),
            eligible: is_counting || state == AutoStandbyState::Active,
            status: state,
            reason,
            active_inbound_connections: status.idle.connections,
            tracking_mode: TRACKING.to_owned(),
            idle_timeout: policy.and_then(|policy| policy.idle_timeout),
            idle_since: status.idle.idle_since,
            last_inbound_activity_at: status.idle.last_inbound_at,
            next_standby_at: due,
            countdown_remaining: remaining.map(GoDuration),
            hold_until: spec.hold_until.filter(|&at| at > now),
            wake_on_traffic: policy.is_some_and(AutoStandbyPolicy::is_waking),
            woken_at: Some(spec.power_since).filter(|_| spec.power_by == PowerCause::Traffic),
            error: status.idle.error.clone(),
        }
    }
}

/// Returns when the instance goes to standby if no client connects; `None` while a client is connected or the
/// countdown does not run.
fn due(object: &Object<Instance>) -> Option<Timestamp> {
    object.spec.standby_due(&object.status.idle)
}

fn stand(
    object: &Object<Instance>,
    port: Option<&NicSpec>,
    due: Option<Timestamp>,
    now: Timestamp,
) -> (AutoStandbyState, AutoStandbyReason) {
    use AutoStandbyReason as Why;
    use AutoStandbyState as Is;
    let Object { spec, status, .. } = object;
    let IdleStatus { connections, error, is_unsupported, .. } = &status.idle;
    let is_on_its_way = spec.power == Power::Standby && spec.power_by == PowerCause::Idle;
    match &spec.auto_standby {
        None => (Is::Disabled, Why::PolicyMissing),
        Some(policy) if !policy.enabled => (Is::Disabled, Why::PolicyDisabled),
        Some(_) if *is_unsupported => (Is::Unsupported, Why::UnsupportedPlatform),
        Some(_) if !spec.has_network => (Is::Ineligible, Why::NetworkDisabled),
        Some(_) if port.is_none() => (Is::Ineligible, Why::MissingIp),
        Some(_) if is_on_its_way && status.state != State::Standby => {
            (Is::StandbyRequested, Why::ReadyForStandby)
        }
        Some(_) if status.state != State::Running || spec.power != Power::Running => {
            (Is::Ineligible, Why::InstanceNotRunning)
        }
        Some(_) if error.is_some() => (Is::Error, Why::ObserverError),
        Some(_) if *connections > 0 => (Is::Active, Why::ActiveInboundConnections),
        Some(_) if due.is_some_and(|due| due <= now) => (Is::ReadyForStandby, Why::ReadyForStandby),
        Some(_) => (Is::IdleCountdown, Why::IdleTimeoutNotElapsed),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn read(value: Value) -> (Option<AutoStandbyPolicy>, Vec<(String, &'static str)>) {
        let mut errors = FieldErrors::default();
        let mut fields = Fields::body(json!({ "auto_standby": value }), &mut errors);
        let policy = policy(&mut fields, &mut errors);
        (policy, errors.iter().map(|error| (error.path.clone(), error.code)).collect())
    }

    #[test]
    fn a_policy_is_read_with_both_address_families_and_compares_as_it_reads() {
        let (policy, problems) = read(json!({
            "enabled": true, "idle_timeout": "1m30s", "wake_on_traffic": true,
            "ignore_source_cidrs": ["10.1.2.3/8", "2001:db8::1/32"], "ignore_destination_ports": [22, 65535],
        }));
        assert_eq!(problems, []);
        let policy = policy.expect("given");
        let address = |text: &str| text.parse().expect("an address");
        for (source, port, counts) in [
            ("192.0.2.1", 80, true),
            ("192.0.2.1", 22, false),
            ("192.0.2.1", 65535, false),
            ("10.200.0.1", 80, false),
            ("::ffff:10.0.0.1", 80, false),
            ("2001:db8:5::1", 80, false),
            ("2001:db9::1", 80, true),
        ] {
            assert_eq!(policy.counts(address(source), port), counts, "{source} {port}");
        }
        assert!(policy.is_waking() && policy.timeout().is_some());
        let off = AutoStandbyPolicy { enabled: false, ..policy.clone() };
        assert!(!off.is_waking() && off.timeout().is_none());
        let text = serde_json::to_value(&policy).expect("encodes");
        assert_eq!(text["ignore_source_cidrs"], json!(["10.0.0.0/8", "2001:db8::/32"]));
        assert_eq!(serde_json::from_value::<AutoStandbyPolicy>(text).ok(), Some(policy));
    }

    #[test]
    fn every_problem_of_a_policy_has_its_path_and_the_contracts_code() {
        let long: Vec<u16> = (1..=257).collect();
        for (value, path) in [
            (json!({ "enabled": true }), "idle_timeout"),
            (json!({ "enabled": true, "idle_timeout": "999ms" }), "idle_timeout"),
            (json!({ "enabled": true, "idle_timeout": "87601h" }), "idle_timeout"),
            (json!({ "idle_timeout": "soon" }), "idle_timeout"),
            (json!({ "enabled": 1 }), "enabled"),
            (json!({ "wake_on_traffic": "yes" }), "wake_on_traffic"),
            (json!({ "ignore_source_cidrs": ["10.0.0.0/33"] }), "ignore_source_cidrs[0]"),
            (json!({ "ignore_source_cidrs": ["10.0.0.0/8", 7] }), "ignore_source_cidrs[1]"),
            (json!({ "ignore_source_cidrs": "10.0.0.0/8" }), "ignore_source_cidrs"),
            (json!({ "ignore_destination_ports": [0] }), "ignore_destination_ports[0]"),
            (json!({ "ignore_destination_ports": [80, 65536] }), "ignore_destination_ports[1]"),
            (json!({ "ignore_destination_ports": long }), "ignore_destination_ports"),
        ] {
            let (_, problems) = read(value.clone());
            assert_eq!(problems, [(format!("auto_standby.{path}"), INVALID)], "{value}");
        }
        let (policy, problems) = read(json!({ "enabled": true, "idle_timeout": "1s" }));
        assert!(policy.is_some() && problems.is_empty(), "{problems:?}");
        assert_eq!(read(json!({ "enabled": false })).1, []);
        assert_eq!(read(json!("on")).1, [("auto_standby".to_owned(), INVALID)]);
    }
}
