//! Compression of memory that is kept: of standbys and of snapshots.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::quantity::GoDuration;

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Algorithm {
    #[default]
    Zstd,
    Lz4,
}

/// How memory is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Compression {
    pub algorithm: Algorithm,
    /// zstd: 1 to 19. lz4: 0, the fast one, to 9.
    pub level: u32,
}

/// What an instance's standbys and snapshots do when nothing is said with them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotPolicy {
    pub compression: Option<Compression>,
    /// Between a standby and its compression: one that is short costs nothing then.
    pub delay: Option<GoDuration>,
}

/// Of one standby: chosen when it is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct CompressionWish {
    pub how: Compression,
    pub not_before: Timestamp,
}
