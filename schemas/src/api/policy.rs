//! Policies on the wire: restarts, expiry, and the request that changes them.

use std::collections::BTreeMap;
use std::time::Duration;

use jiff::Timestamp;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::fields::Fields;
use super::schema::Time;
use crate::limits;
use crate::policy::{Expiry, RestartBlocked, RestartPolicy, RestartReason, RestartStatus, RestartWhen};
use crate::quantity::GoDuration;
use crate::validate::FieldErrors;

const RESTART: &str = "invalid_restart_policy";

/// Reads `restart_policy`; returns `None` when the field is absent.
pub(super) fn restart(fields: &mut Fields, errors: &mut FieldErrors) -> Option<RestartPolicy> {
    let mut policy = fields.object("restart_policy", errors)?;
    let default = RestartPolicy::default();
    let when = match policy.text("policy", errors).as_deref() {
        None | Some("never") => RestartWhen::Never,
        Some("always") => RestartWhen::Always,
        Some("on_failure") => RestartWhen::OnFailure,
        Some(_) => {
            errors.push(policy.path("policy"), RESTART, "must be one of never, always, on_failure");
            RestartWhen::Never
        }
    };
    let backoff = duration(&mut policy, "backoff", limits::RESTART_DELAY_MAX, errors);
    let stable_after = duration(&mut policy, "stable_after", limits::TTL_MAX, errors);
    let max_attempts = policy.number("max_attempts", 0..=limits::RESTART_ATTEMPTS_MAX, errors);
    policy.finish(errors);
    Some(RestartPolicy {
        when,
        backoff: backoff.unwrap_or(default.backoff),
        max_attempts: max_attempts.unwrap_or(default.max_attempts),
        stable_after: stable_after.unwrap_or(default.stable_after),
    })
}

fn duration(fields: &mut Fields, key: &str, max: Duration, errors: &mut FieldErrors) -> Option<GoDuration> {
    let given: GoDuration = fields.parsed(key, RESTART, errors)?;
    if given.0.is_zero() || given.0 > max {
        let message = format!("must be more than 0s and at most {}", GoDuration(max));
        errors.push(fields.path(key), RESTART, message);
        return None;
    }
    Some(given)
}

/// Reads `ttl` or `expires_at`; returns `None` when both are absent.
pub(super) fn expiry(fields: &mut Fields, errors: &mut FieldErrors) -> Option<Expiry> {
    let ttl: Option<GoDuration> = fields.parsed("ttl", "invalid_ttl", errors);
    let at: Option<Timestamp> = fields.parsed("expires_at", "invalid_expires_at", errors);
    match (ttl, at) {
        (Some(_), Some(_)) => {
            errors.push(fields.path("ttl"), "invalid_ttl", "and expires_at exclude each other");
            None
        }
        (Some(ttl), None) if ttl.0 > limits::TTL_MAX => {
            let message = format!("must be at most {}", GoDuration(limits::TTL_MAX));
            errors.push(fields.path("ttl"), "invalid_ttl", message);
            None
        }
        (Some(ttl), None) if ttl.0.is_zero() => Some(Expiry::Never),
        (Some(ttl), None) => Some(Expiry::After(ttl.0)),
        (None, Some(at)) => Some(Expiry::At(at)),
        (None, None) => None,
    }
}

/// The `restart_status` that clients read.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[schemars(rename = "RestartStatus")]
pub struct RestartView {
    /// Number of restarts in a row.
    pub attempts: u32,
    /// Time of the last restart.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<Time>")]
    pub last_attempt_at: Option<Timestamp>,
    /// Time of the next restart.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<Time>")]
    pub next_attempt_at: Option<Timestamp>,
    /// Reason why the policy does not act.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub blocked_reason: Option<RestartBlocked>,
    /// Reason of the last restart, when the program did not end by itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_reason: Option<RestartReason>,
}

impl From<&RestartStatus> for RestartView {
    fn from(status: &RestartStatus) -> Self {
        Self {
            attempts: status.attempts,
            last_attempt_at: status.last_attempt_at,
            next_attempt_at: status.next_attempt_at,
            blocked_reason: status.blocked,
            last_reason: status.last_reason,
        }
    }
}

/// Converts states to phases, which are named by the states' lower-cased words.
pub(super) fn phases(durations: &BTreeMap<crate::instance::State, u64>) -> BTreeMap<String, u64> {
    durations.iter().map(|(state, millis)| (phase(*state), *millis)).collect()
}

pub(super) fn phase(state: crate::instance::State) -> String {
    format!("{state:?}").to_lowercase()
}
