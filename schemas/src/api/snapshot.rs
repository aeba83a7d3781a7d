//! Snapshots and forks on the wire.

use jiff::Timestamp;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::compression::{self, CompressionAsked, CompressionView};
use super::fields::Fields;
use super::instance::hypervisor;
use super::schema::{TagMap, Time};
use crate::instance::{Hypervisor, Power, State};
use crate::limits::POOL_MAX;
use crate::meta::{Object, Tags};
use crate::names::Name;
use crate::node::NodeOffer;
use crate::snapshot::{CompressionState, Snapshot as Kind, SnapshotKind, SnapshotPhase};
use crate::validate::{FieldErrors, tags as check_tags};

const INVALID: &str = "invalid_request";

/// The body of `POST /instances/{id}/snapshots`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SnapshotCreate {
    pub kind: SnapshotKind,
    pub name: Option<Name>,
    pub tags: Tags,
    pub compression: CompressionAsked,
    /// An addition to Hypeman's API: number of forks to hold ready.
    pub pool: u32,
}

impl SnapshotCreate {
    /// Reads the body.
    ///
    /// # Errors
    /// Returns every problem of the body.
    pub fn read(body: Value) -> Result<Self, FieldErrors> {
        let mut errors = FieldErrors::default();
        let mut fields = Fields::body(body, &mut errors);
        let kind = fields.required_text("kind", &mut errors).and_then(|word| {
            let kind = parse_kind(&word);
            if kind.is_none() {
                errors.push("kind", INVALID, "must be Standby or Stopped");
            }
            kind
        });
        let name = name(&mut fields, &mut errors);
        let tags = fields.map("tags", &mut errors).unwrap_or_default();
        check_tags(&mut errors, "tags", &tags);
        let compression = compression::read(&mut fields, &mut errors);
        let pool = pool(&mut fields, &mut errors).unwrap_or(0);
        if pool > 0 && kind == Some(SnapshotKind::Stopped) {
            errors.push("pool_size", INVALID, "needs a snapshot of the kind Standby");
        }
        fields.finish(&mut errors);
        match kind {
            Some(kind) if errors.is_empty() => Ok(Self { kind, name, tags, compression, pool }),
            _ => Err(errors),
        }
    }
}

/// The body of `PATCH /snapshots/{id}`, an additive operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SnapshotPatch {
    pub pool: u32,
}

impl SnapshotPatch {
    /// Reads the body.
    ///
    /// # Errors
    /// Returns every problem of the body.
    pub fn read(body: Value) -> Result<Self, FieldErrors> {
        let mut errors = FieldErrors::default();
        let mut fields = Fields::body(body, &mut errors);
        let pool = pool(&mut fields, &mut errors);
        if pool.is_none() && errors.is_empty() {
            errors.push("pool_size", INVALID, "is required");
        }
        fields.finish(&mut errors);
        match pool {
            Some(pool) if errors.is_empty() => Ok(Self { pool }),
            _ => Err(errors),
        }
    }
}

fn pool(fields: &mut Fields, errors: &mut FieldErrors) -> Option<u32> {
    fields.number("pool_size", 0..=POOL_MAX, errors)
}

/// The body of `POST /instances/{id}/fork`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ForkCreate {
    pub name: Name,
    pub from_running: bool,
    pub target: Option<Power>,
}

impl ForkCreate {
    /// Reads the body.
    ///
    /// # Errors
    /// Returns every problem of the body.
    pub fn read(body: Value) -> Result<Self, FieldErrors> {
        let mut errors = FieldErrors::default();
        let mut fields = Fields::body(body, &mut errors);
        let name = required_name(&mut fields, &mut errors);
        let from_running = fields.flag("from_running", &mut errors).unwrap_or(false);
        let target = target(&mut fields, &mut errors);
        fields.finish(&mut errors);
        match name {
            Some(name) if errors.is_empty() => Ok(Self { name, from_running, target }),
            _ => Err(errors),
        }
    }
}

/// The body of `POST /snapshots/{id}/fork`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SnapshotFork {
    pub name: Name,
    pub target: Option<Power>,
    /// The hypervisor of the fork; the snapshot's when the request does not name one.
    pub hypervisor: Option<Hypervisor>,
}

impl SnapshotFork {
    /// Reads the body.
    ///
    /// # Errors
    /// Returns every problem of the body.
    pub fn read(body: Value, node: &NodeOffer) -> Result<Self, FieldErrors> {
        let mut errors = FieldErrors::default();
        let mut fields = Fields::body(body, &mut errors);
        let name = required_name(&mut fields, &mut errors);
        let target = target(&mut fields, &mut errors);
        let hypervisor = hypervisor(&mut fields, "target_hypervisor", node, &mut errors);
        fields.finish(&mut errors);
        match name {
            Some(name) if errors.is_empty() => Ok(Self { name, target, hypervisor }),
            _ => Err(errors),
        }
    }
}

/// The body of `POST /instances/{id}/snapshots/{snapshot}/restore`; an empty body asks for the defaults.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SnapshotRestore {
    pub target: Option<Power>,
    /// The hypervisor to use; the snapshot's when the request does not name one.
    pub hypervisor: Option<Hypervisor>,
}

impl SnapshotRestore {
    /// Reads the body.
    ///
    /// # Errors
    /// Returns every problem of the body.
    pub fn read(body: Value, node: &NodeOffer) -> Result<Self, FieldErrors> {
        let mut errors = FieldErrors::default();
        if body.is_null() {
            return Ok(Self { target: None, hypervisor: None });
        }
        let mut fields = Fields::body(body, &mut errors);
        let target = target(&mut fields, &mut errors);
        let hypervisor = hypervisor(&mut fields, "target_hypervisor", node, &mut errors);
        fields.finish(&mut errors);
        errors.into_result().map(|()| Self { target, hypervisor })
    }
}

/// Parses a kind: one of the two words, case-sensitive.
#[must_use]
pub fn parse_kind(word: &str) -> Option<SnapshotKind> {
    serde_json::from_value(Value::String(word.to_owned())).ok()
}

fn required_name(fields: &mut Fields, errors: &mut FieldErrors) -> Option<Name> {
    let name = fields.required_text("name", errors)?;
    errors.take("name", INVALID, Name::new_resource(&name))
}

fn name(fields: &mut Fields, errors: &mut FieldErrors) -> Option<Name> {
    let name = fields.text("name", errors)?;
    errors.take("name", INVALID, Name::new_resource(&name))
}

/// Reads the power state that the instance should end up in.
fn target(fields: &mut Fields, errors: &mut FieldErrors) -> Option<Power> {
    let power = match fields.text("target_state", errors)?.as_str() {
        "Running" => Some(Power::Running),
        "Stopped" => Some(Power::Stopped),
        "Standby" => Some(Power::Standby),
        _ => None,
    };
    if power.is_none() {
        errors.push(fields.path("target_state"), INVALID, "must be Running, Standby or Stopped");
    }
    power
}

/// A snapshot as clients read it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Snapshot {
    /// Id of the snapshot.
    pub id: String,
    /// Name of the snapshot, unique among the snapshots of its source.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Kind of the snapshot.
    pub kind: SnapshotKind,
    /// Time at which it was taken.
    #[schemars(with = "Time")]
    pub created_at: Timestamp,
    /// Size of its files, in bytes.
    pub size_bytes: u64,
    /// Hypervisor of the instance that it was taken of.
    pub source_hypervisor: Hypervisor,
    /// Id of that instance.
    pub source_instance_id: String,
    /// Name of that instance at the time.
    pub source_instance_name: String,
    /// Tags of the snapshot.
    #[schemars(with = "TagMap")]
    pub tags: Tags,
    /// Compression that was asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub compression: Option<CompressionView>,
    /// State of the compression: none, compressing, compressed or error.
    pub compression_state: String,
    /// Reason why the compression failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub compression_error: Option<String>,
    /// Size of the compressed memory, in bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub compressed_size_bytes: Option<u64>,
    /// Size of the memory before its compression, in bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uncompressed_size_bytes: Option<u64>,
    /// An addition to Hypeman's API: number of forks to hold ready; `pool_ready` is the number that is ready now.
    pub pool_size: u32,
    /// Number of forks that are ready now.
    pub pool_ready: u32,
    /// An addition to Hypeman's API: the reason why fewer are ready, if something is wrong.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pool_error: Option<String>,
    /// An addition to Hypeman's API: the phase: pending, ready or failed.
    pub status: SnapshotPhase,
    /// Reason why the snapshot failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

impl Snapshot {
    /// Converts a record to its wire form.
    #[must_use]
    pub fn of(object: &Object<Kind>) -> Self {
        let Object { meta, spec, status } = object;
        let (compression_state, sizes) = match status.compression_state {
            CompressionState::Plain if status.compression_error.is_some() => ("error", None),
            CompressionState::Plain => ("none", None),
            CompressionState::Compressing => ("compressing", None),
            CompressionState::Compressed { compressed, plain } => ("compressed", Some((compressed, plain))),
        };
        Self {
            id: meta.uid.to_string(),
            name: spec.name.as_ref().map(ToString::to_string),
            kind: spec.kind,
            created_at: status.captured_at.unwrap_or(meta.created_at),
            size_bytes: status.size.0,
            source_hypervisor: spec.instance.hypervisor,
            source_instance_id: spec.source.to_string(),
            source_instance_name: spec.source_name.to_string(),
            tags: meta.tags.clone(),
            compression: spec.compression.map(Into::into),
            compression_state: compression_state.to_owned(),
            compression_error: status.compression_error.clone(),
            compressed_size_bytes: sizes.map(|(compressed, _)| compressed.0),
            uncompressed_size_bytes: sizes.map(|(_, plain)| plain.0),
            pool_size: spec.pool,
            pool_ready: status.warm,
            pool_error: status.pool_error.clone(),
            status: status.phase,
            error: status.error.clone(),
        }
    }
}

/// Returns the state that an instance with this power state in its spec ends up in.
#[must_use]
pub fn state_of(power: Power) -> State {
    match power {
        Power::Running => State::Running,
        Power::Stopped => State::Stopped,
        Power::Standby => State::Standby,
        Power::Warm => State::Paused,
    }
}
