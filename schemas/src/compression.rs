//! Compression of memory that is kept for standbys and snapshots.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::quantity::GoDuration;

/// An algorithm of compression.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "wire", derive(schemars::JsonSchema))]
#[serde(rename_all = "lowercase")]
#[cfg_attr(feature = "wire", schemars(rename = "CompressionAlgorithm"))]
pub enum Algorithm {
    #[default]
    Zstd,
    Lz4,
}

/// The algorithm and level of a compression.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Compression {
    pub algorithm: Algorithm,
    /// Level of the compression: 1 to 19 for zstd; 0 (the fast one) to 9 for lz4.
    pub level: u32,
}

/// The policy for an instance's standbys and snapshots when the request does not mention compression.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotPolicy {
    pub compression: Option<Compression>,
    /// Time between a standby and its compression, so that a short standby costs no compression.
    pub delay: Option<GoDuration>,
}

/// The compression of a particular standby, chosen when the standby is requested.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct DesiredCompression {
    pub how: Compression,
    pub not_before: Timestamp,
}
