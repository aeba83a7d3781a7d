//! Requests to take memory back from instances, and their answers.

use std::time::Duration;

use jiff::Timestamp;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::fields::Fields;
use super::schema::Time;
use crate::instance::Hypervisor;
use crate::limits::{RECLAIM_HOLD_DEFAULT, RECLAIM_HOLD_MAX, RECLAIM_REASON_CHARS_MAX};
use crate::quantity::GoDuration;
use crate::validate::{FieldErrors, printable};

const INVALID: &str = "invalid_request";

/// The body of `POST /resources/memory/reclaim`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReclaimRequest {
    pub bytes: u64,
    /// Time for which the instances do not get the memory again.
    pub hold_for: Duration,
    pub is_dry_run: bool,
    /// The reason, for the daemon's log; perhaps empty.
    pub reason: String,
}

impl ReclaimRequest {
    /// Reads the body.
    ///
    /// # Errors
    /// Returns every problem of the body.
    pub fn read(body: Value) -> Result<Self, FieldErrors> {
        let mut errors = FieldErrors::default();
        let mut fields = Fields::body(body, &mut errors);
        let bytes = fields.count("reclaim_bytes", &mut errors);
        if bytes.is_none() && errors.is_empty() {
            errors.push("reclaim_bytes", INVALID, "is required");
        }
        let hold_for: Option<GoDuration> = fields.parsed("hold_for", INVALID, &mut errors);
        let hold_for = hold_for.map_or(RECLAIM_HOLD_DEFAULT, |GoDuration(hold)| hold);
        if hold_for.is_zero() || hold_for > RECLAIM_HOLD_MAX {
            let hours = RECLAIM_HOLD_MAX.as_secs() / 3600;
            errors.push("hold_for", INVALID, format!("must be more than zero, and at most {hours}h"));
        }
        let is_dry_run = fields.flag("dry_run", &mut errors).unwrap_or(false);
        let reason = fields.text("reason", &mut errors).unwrap_or_default();
        if reason.chars().count() > RECLAIM_REASON_CHARS_MAX {
            let message = format!("must have at most {RECLAIM_REASON_CHARS_MAX} characters");
            errors.push("reason", INVALID, message);
        }
        fields.finish(&mut errors);
        match bytes {
            Some(bytes) if errors.is_empty() => {
                Ok(Self { bytes, hold_for, is_dry_run, reason: printable(&reason, RECLAIM_REASON_CHARS_MAX) })
            }
            _ => Err(errors),
        }
    }
}

/// The answer to a request to take memory back.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[schemars(rename = "MemoryReclaimResponse")]
pub struct MemoryReclaim {
    /// Bytes that were asked for.
    pub requested_reclaim_bytes: u64,
    /// Bytes that the instances should give back, in whole blocks.
    pub planned_reclaim_bytes: u64,
    /// Bytes that they had given back when the answer was written.
    pub applied_reclaim_bytes: u64,
    /// Memory of the host that programs can still get, in bytes.
    pub host_available_bytes: u64,
    /// `pressure` if programs of the host wait for memory, else `healthy`.
    pub host_pressure_state: PressureState,
    /// Instances that give memory back, and those that cannot.
    pub actions: Vec<MemoryReclaimAction>,
    /// Time until which the instances do not get the memory again; absent without any, and for a dry run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<Time>")]
    pub hold_until: Option<Timestamp>,
}

/// The pressure on the memory of a host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum PressureState {
    Healthy,
    Pressure,
}

/// The part of one instance.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct MemoryReclaimAction {
    /// Id of the instance.
    pub instance_id: String,
    /// Name of the instance.
    pub instance_name: String,
    /// Program that runs the VM.
    pub hypervisor: Hypervisor,
    /// Progress.
    pub status: ReclaimStatus,
    /// Memory of the guest with all of its hotplug memory, in bytes.
    pub assigned_memory_bytes: u64,
    /// Memory that the guest used before, in bytes.
    pub previous_target_guest_memory_bytes: u64,
    /// Memory that it should use, in bytes.
    pub planned_target_guest_memory_bytes: u64,
    /// Memory that it uses now, in bytes.
    pub target_guest_memory_bytes: u64,
    /// Memory that is never taken back, in bytes.
    pub protected_floor_bytes: u64,
    /// Bytes that it has given back.
    pub applied_reclaim_bytes: u64,
    /// Reason why it has not given back what it should.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// The progress of one instance.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[schemars(rename = "MemoryReclaimStatus")]
#[serde(rename_all = "snake_case")]
pub enum ReclaimStatus {
    /// A dry run: nothing was done.
    Planned,
    /// All of it was given back.
    Applied,
    /// The guest has not given back all of it yet.
    Pending,
    /// The host cannot get memory of this instance back while its VM runs.
    Unsupported,
}
