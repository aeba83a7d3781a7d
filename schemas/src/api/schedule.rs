//! Snapshot schedules on the wire.

use jiff::Timestamp;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::fields::Fields;
use super::schema::{TagMap, Time};
use crate::limits;
use crate::meta::{Object, Tags};
use crate::names::Name;
use crate::quantity::GoDuration;
use crate::schedule::{Retention, SnapshotSchedule as Kind};
use crate::validate::{FieldErrors, tags as check_tags};

const INVALID: &str = "invalid_request";

/// The body of `PUT /instances/{id}/snapshot-schedule`, as a document describes it.
#[derive(Debug, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct SnapshotScheduleSet {
    /// Time between two snapshots, from 1 minute to 87600 hours.
    pub interval: GoDuration,
    /// Rule for the deletion of old snapshots.
    pub retention: RetentionRequest,
    /// Beginning of the names of the snapshots; empty for none.
    #[schemars(regex(pattern = r"^([a-z0-9][a-z0-9-]*)?$"), length(max = limits::NAME_PREFIX_BYTES_MAX))]
    pub name_prefix: Option<String>,
    /// Tags of the snapshots.
    pub metadata: Option<TagMap>,
}

/// A rule for the deletion of old snapshots: a count above 0, an age, or both.
#[derive(Debug, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct RetentionRequest {
    /// Number of snapshots that are kept; 0 means that their number is not limited.
    #[schemars(range(min = 0, max = limits::SNAPSHOTS_PER_SOURCE_MAX))]
    pub max_count: Option<u32>,
    /// Age after which a snapshot is deleted, more than 0 and at most 87600 hours.
    pub max_age: Option<GoDuration>,
}

/// The body of `PUT /instances/{id}/snapshot-schedule`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ScheduleRequest {
    pub interval: GoDuration,
    pub retention: Retention,
    pub name_prefix: Option<String>,
    pub metadata: Tags,
}

impl ScheduleRequest {
    /// Reads the body.
    ///
    /// # Errors
    /// Returns every problem of the body.
    pub fn read(body: Value) -> Result<Self, FieldErrors> {
        let mut errors = FieldErrors::default();
        let mut fields = Fields::body(body, &mut errors);
        let interval = interval(&mut fields, &mut errors);
        let retention = retention(&mut fields, &mut errors);
        let name_prefix = name_prefix(&mut fields, &mut errors);
        let metadata = fields.map("metadata", &mut errors).unwrap_or_default();
        check_tags(&mut errors, "metadata", &metadata);
        fields.finish(&mut errors);
        match interval {
            Some(interval) if errors.is_empty() => Ok(Self { interval, retention, name_prefix, metadata }),
            _ => Err(errors),
        }
    }
}

fn interval(fields: &mut Fields, errors: &mut FieldErrors) -> Option<GoDuration> {
    let text = fields.required_text("interval", errors)?;
    let given: GoDuration = errors.take("interval", INVALID, text.parse())?;
    let (min, max) = (limits::SCHEDULE_INTERVAL_MIN, limits::TTL_MAX);
    if !(min..=max).contains(&given.0) {
        let message = format!("must be from {} to {}", GoDuration(min), GoDuration(max));
        errors.push("interval", INVALID, message);
        return None;
    }
    Some(given)
}

fn retention(fields: &mut Fields, errors: &mut FieldErrors) -> Retention {
    let before = errors.iter().count();
    let Some(mut retention) = fields.object("retention", errors) else {
        errors.push("retention", INVALID, "is required");
        return Retention::default();
    };
    let most = u32::try_from(limits::SNAPSHOTS_PER_SOURCE_MAX).unwrap_or(u32::MAX);
    let max_count = retention.number("max_count", 0..=most, errors);
    let max_age: Option<GoDuration> = retention.parsed("max_age", INVALID, errors);
    if max_age.is_some_and(|age| age.0.is_zero() || age.0 > limits::TTL_MAX) {
        let message = format!("must be more than 0s and at most {}", GoDuration(limits::TTL_MAX));
        errors.push("retention.max_age", INVALID, message);
    }
    // A `max_count` of 0 means no bound by count.
    let is_bounded = max_age.is_some() || max_count.is_some_and(|count| count > 0);
    if !is_bounded && errors.iter().count() == before {
        errors.push("retention", INVALID, "needs a max_count above 0 or a max_age");
    }
    retention.finish(errors);
    Retention { max_count, max_age }
}

fn name_prefix(fields: &mut Fields, errors: &mut FieldErrors) -> Option<String> {
    let prefix = fields.text("name_prefix", errors).filter(|prefix| !prefix.is_empty())?;
    // The prefix is checked as it is used: with more characters behind it.
    let is_name =
        prefix.len() <= limits::NAME_PREFIX_BYTES_MAX && Name::resource(&format!("{prefix}-0")).is_ok();
    if !is_name {
        let max = limits::NAME_PREFIX_BYTES_MAX;
        let message = format!("must be at most {max} of a-z, 0-9 and -, and not begin with -");
        errors.push("name_prefix", INVALID, message);
    }
    Some(prefix)
}

/// A schedule as clients read it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct SnapshotSchedule {
    /// Id of the instance.
    pub instance_id: String,
    /// Time between two snapshots.
    pub interval: GoDuration,
    /// Rule for the deletion of old snapshots.
    pub retention: RetentionView,
    /// Time of the next run; in the past when the run is late.
    #[schemars(with = "Time")]
    pub next_run_at: Timestamp,
    /// Time of the creation.
    #[schemars(with = "Time")]
    pub created_at: Timestamp,
    /// Time of the last change by a client.
    #[schemars(with = "Time")]
    pub updated_at: Timestamp,
    /// Beginning of the names of the snapshots.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name_prefix: Option<String>,
    /// Tags of the snapshots.
    #[serde(default, skip_serializing_if = "Tags::is_empty")]
    #[schemars(with = "TagMap")]
    pub metadata: Tags,
    /// Time of the last run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<Time>")]
    pub last_run_at: Option<Timestamp>,
    /// Id of the last snapshot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_snapshot_id: Option<String>,
    /// Reason why the last run failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_error: Option<String>,
}

/// The rule for the deletion of old snapshots.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[schemars(rename = "SnapshotScheduleRetention")]
pub struct RetentionView {
    /// Number of snapshots that are kept.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_count: Option<u32>,
    /// Age after which a snapshot is deleted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_age: Option<GoDuration>,
}

impl SnapshotSchedule {
    /// Converts a record at a given time to its wire form.
    #[must_use]
    pub fn of(object: &Object<Kind>, now: Timestamp) -> Self {
        let Object { meta, spec, status } = object;
        let Retention { max_count, max_age } = spec.retention;
        Self {
            instance_id: spec.instance.to_string(),
            interval: spec.interval,
            retention: RetentionView { max_count, max_age },
            next_run_at: spec.run(status.last_due, now).at(),
            created_at: meta.created_at,
            updated_at: spec.updated_at,
            name_prefix: spec.name_prefix.clone(),
            metadata: spec.metadata.clone(),
            last_run_at: status.last_run_at,
            last_snapshot_id: status.last_snapshot.as_ref().map(ToString::to_string),
            last_error: status.last_error.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::body::tests::{described, read};
    use super::*;

    #[test]
    fn the_described_body_has_the_fields_that_are_read() {
        let body = vec![json!({"interval": "1h", "retention": {}})];
        assert_eq!(described::<SnapshotScheduleSet>(), read(body, ScheduleRequest::read));
    }

    fn problems(body: Value) -> Vec<String> {
        let errors = ScheduleRequest::read(body).err().unwrap_or_default();
        errors.iter().map(|error| error.path.clone()).collect()
    }

    #[test]
    fn a_schedule_needs_an_interval_and_a_bound() {
        let good = json!({ "interval": "1m", "retention": { "max_count": 256 }, "name_prefix": null });
        assert_eq!(problems(good), [""; 0]);
        let full = json!({ "interval": "24h", "retention": { "max_count": 0, "max_age": "1h" },
            "name_prefix": "n".repeat(47), "metadata": { "team": "a" } });
        assert_eq!(problems(full), [""; 0]);
        for (body, paths) in [
            (json!({}), &["interval", "retention"][..]),
            (json!({ "interval": "59s", "retention": { "max_count": 1 } }), &["interval"]),
            (json!({ "interval": "x", "retention": { "max_count": 1 } }), &["interval"]),
            (json!({ "interval": "1m", "retention": {} }), &["retention"]),
            (json!({ "interval": "1m", "retention": { "max_count": 0 } }), &["retention"]),
            (json!({ "interval": "1m", "retention": { "max_count": 257 } }), &["retention.max_count"]),
            (json!({ "interval": "1m", "retention": { "max_age": "0s" } }), &["retention.max_age"]),
            (
                json!({ "interval": "1m", "retention": { "max_count": 1 }, "name_prefix": "n".repeat(48) }),
                &["name_prefix"],
            ),
            (
                json!({ "interval": "1m", "retention": { "max_count": 1 }, "name_prefix": "-x" }),
                &["name_prefix"],
            ),
            (json!({ "interval": "1m", "retention": { "max_count": 1 }, "extra": 1 }), &["extra"]),
        ] {
            assert_eq!(problems(body.clone()), paths, "{body}");
        }
    }
}
