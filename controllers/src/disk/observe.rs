//! Observations of a disk.

use stead_schemas::disk::Disk;
use stead_schemas::meta::Object;
use stead_schemas::names::Uid;
use stead_schemas::snapshot::{Snapshot, SnapshotPhase};

use super::DiskReconciler;
use crate::host::{DiskFile, Disks, Host, HostError, Space};

/// The file of a disk, and the free space while there is no file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Observed {
    pub file: Option<DiskFile>,
    /// The free space, read only if a file may have to be made.
    pub space: Option<Space>,
    /// The progress of the snapshot that the disk begins as a copy of.
    pub source: Option<SourceSeen>,
}

/// The state of a snapshot to copy from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SourceSeen {
    Pending,
    Ready,
    /// The snapshot failed or is gone.
    Lost,
}

pub(super) async fn observe<H: Host>(
    reconciler: &DiskReconciler<H>,
    uid: &Uid,
    object: Option<&Object<Disk>>,
) -> Result<Observed, HostError> {
    let file = reconciler.host.disks().inspect(uid).await?;
    let space = match file {
        Some(_) => None,
        None => Some(reconciler.host.disks().space().await?),
    };
    let snapshot = object.and_then(|object| object.spec.source.as_ref());
    let source = snapshot.map(|snapshot| match reconciler.store.get::<Snapshot>(snapshot) {
        None => SourceSeen::Lost,
        Some(snapshot) => match snapshot.status.phase {
            SnapshotPhase::Pending => SourceSeen::Pending,
            SnapshotPhase::Ready => SourceSeen::Ready,
            SnapshotPhase::Failed => SourceSeen::Lost,
        },
    });
    Ok(Observed { file, space, source })
}
