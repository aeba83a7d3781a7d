//! The files of a snapshot, beside those of a memory, and whether they are whole.

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use stead_controllers::host::{HostError, HostErrorKind};
use stead_schemas::names::Uid;
use stead_schemas::snapshot::SnapshotKind;

use crate::host::disks::Ext4Files;
use crate::memory::{MemoryDir, length};

pub(super) const MANIFEST: &str = "snapshot.json";

/// The manifest of a snapshot.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Manifest {
    pub(super) kind: SnapshotKind,
    pub(super) captured_at: Timestamp,
    pub(super) disk_bytes: u64,
    /// Lengths of the disks of volumes that were writable.
    #[serde(default)]
    pub(super) volume_bytes: BTreeMap<Uid, u64>,
}

/// Returns whether all files of a published snapshot still have their lengths.
pub(super) fn is_whole(dir: &MemoryDir, manifest: &Manifest) -> Result<bool, HostError> {
    let disks = manifest.volume_bytes.iter().map(|(volume, bytes)| (Some(volume), *bytes));
    for (volume, bytes) in std::iter::once((None, manifest.disk_bytes)).chain(disks) {
        let disk = length(&dir.saved(&Ext4Files::in_snapshot(volume)));
        if disk.map_err(dir.failed("observe the disks in"))? != Some(bytes) {
            return Ok(false);
        }
    }
    let has_memory = || dir.manifest()?.map_or(Ok(false), |memory| dir.is_whole(&memory));
    Ok(manifest.kind == SnapshotKind::Stopped || has_memory()?)
}

/// Checks that a snapshot is still as it was captured, before a VM begins with it.
pub(crate) fn check_whole(dir: &MemoryDir, snapshot: &Uid) -> Result<(), HostError> {
    let is_whole = match dir.read::<Manifest>(MANIFEST)? {
        Some(manifest) => is_whole(dir, &manifest)?,
        None => false,
    };
    let damaged = || HostError::new(HostErrorKind::Permanent, "begin with the snapshot", snapshot.as_str());
    if is_whole { Ok(()) } else { Err(damaged().because("its files are not what was captured")) }
}
