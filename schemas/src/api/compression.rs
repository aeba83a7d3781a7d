//! Compression on the wire: `{"enabled": true, "algorithm": "zstd", "level": 1}`.

use std::ops::RangeInclusive;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::fields::Fields;
use crate::compression::{Algorithm, Compression, SnapshotPolicy};
use crate::limits::TTL_MAX;
use crate::quantity::GoDuration;
use crate::validate::FieldErrors;

const INVALID: &str = "invalid_snapshot_compression";
const INVALID_DELAY: &str = "invalid_compression_delay";

/// The compression that a request asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CompressionAsked {
    /// The request does not mention compression: the instance's policy applies.
    Unsaid,
    Off,
    On(Compression),
}

impl CompressionAsked {
    /// Returns the requested compression, or the policy's when the request does not mention it.
    #[must_use]
    pub fn or(self, policy: Option<Compression>) -> Option<Compression> {
        match self {
            Self::Unsaid => policy,
            Self::Off => None,
            Self::On(compression) => Some(compression),
        }
    }
}

/// Reads `compression`; its problems carry the code `invalid_snapshot_compression`.
pub(super) fn read(fields: &mut Fields, errors: &mut FieldErrors) -> CompressionAsked {
    let Some(mut object) = fields.object("compression", errors) else { return CompressionAsked::Unsaid };
    let path = object.path("enabled");
    let is_enabled = object.flag("enabled", errors);
    if is_enabled.is_none() {
        errors.push(path, INVALID, "is required: true or false");
    }
    let algorithm = match object.text("algorithm", errors).as_deref() {
        None | Some("zstd") => Algorithm::Zstd,
        Some("lz4") => Algorithm::Lz4,
        Some(_) => {
            errors.push(object.path("algorithm"), INVALID, "must be zstd or lz4");
            Algorithm::Zstd
        }
    };
    let level = level(&mut object, levels(algorithm), errors);
    object.finish(errors);
    match is_enabled {
        Some(true) => CompressionAsked::On(Compression {
            algorithm,
            level: level.unwrap_or(*levels(algorithm).start()),
        }),
        Some(false) | None => CompressionAsked::Off,
    }
}

/// Returns the range of levels of an algorithm. Its first level is the default.
fn levels(algorithm: Algorithm) -> RangeInclusive<u32> {
    match algorithm {
        Algorithm::Zstd => 1..=19,
        Algorithm::Lz4 => 0..=9,
    }
}

fn level(object: &mut Fields, levels: RangeInclusive<u32>, errors: &mut FieldErrors) -> Option<u32> {
    let given = object.take("level")?;
    let level =
        given.as_u64().and_then(|level| u32::try_from(level).ok()).filter(|level| levels.contains(level));
    if level.is_none() {
        let (low, high) = (levels.start(), levels.end());
        errors.push(object.path("level"), INVALID, format!("must be a whole number from {low} to {high}"));
    }
    level
}

/// Reads a Go duration from zero to `TTL_MAX`.
pub(super) fn delay(fields: &mut Fields, key: &str, errors: &mut FieldErrors) -> Option<GoDuration> {
    let given: GoDuration = fields.parsed(key, INVALID_DELAY, errors)?;
    if given.0 > TTL_MAX {
        errors.push(fields.path(key), INVALID_DELAY, format!("must be at most {}", GoDuration(TTL_MAX)));
        return None;
    }
    Some(given)
}

/// Reads `snapshot_policy` of a create request.
pub(super) fn policy(fields: &mut Fields, errors: &mut FieldErrors) -> Option<SnapshotPolicy> {
    let mut object = fields.object("snapshot_policy", errors)?;
    let compression = read(&mut object, errors).or(None);
    let delay = delay(&mut object, "standby_compression_delay", errors);
    object.finish(errors);
    Some(SnapshotPolicy { compression, delay })
}

/// The optional body of `POST …/standby`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StandbyRequest {
    pub compression: CompressionAsked,
    pub delay: Option<GoDuration>,
}

impl StandbyRequest {
    /// A request that sets nothing.
    pub const PLAIN: Self = Self { compression: CompressionAsked::Unsaid, delay: None };

    /// Reads the body; an empty body sets nothing.
    ///
    /// # Errors
    /// Returns every problem of the body.
    pub fn read(body: Value) -> Result<Self, FieldErrors> {
        let mut errors = FieldErrors::default();
        if body.is_null() {
            return Ok(Self::PLAIN);
        }
        let mut fields = Fields::body(body, &mut errors);
        let compression = read(&mut fields, &mut errors);
        let delay = delay(&mut fields, "compression_delay", &mut errors);
        fields.finish(&mut errors);
        errors.into_result().map(|()| Self { compression, delay })
    }
}

/// Compression as clients read it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[schemars(rename = "SnapshotCompression")]
pub struct CompressionView {
    /// True if memory is compressed.
    pub enabled: bool,
    /// Algorithm of the compression.
    pub algorithm: Algorithm,
    /// Level of the compression.
    pub level: u32,
}

impl From<Compression> for CompressionView {
    fn from(Compression { algorithm, level }: Compression) -> Self {
        Self { enabled: true, algorithm, level }
    }
}

/// The `snapshot_policy` that clients read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[schemars(rename = "SnapshotPolicy")]
pub struct SnapshotPolicyView {
    /// Compression of snapshots and standbys.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub compression: Option<CompressionView>,
    /// Time between a standby and its compression.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub standby_compression_delay: Option<GoDuration>,
}

impl From<SnapshotPolicy> for SnapshotPolicyView {
    fn from(policy: SnapshotPolicy) -> Self {
        Self { compression: policy.compression.map(Into::into), standby_compression_delay: policy.delay }
    }
}
