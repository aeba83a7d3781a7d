//! What is there of a disk.

use stead_schemas::names::Uid;

use super::DiskReconciler;
use crate::host::{DiskFile, Disks, HostError, Space};

/// The file, and the room for one while there is none.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Observed {
    pub file: Option<DiskFile>,
    /// Read only when a file may have to be made.
    pub space: Option<Space>,
}

pub(super) async fn observe<D: Disks>(
    reconciler: &DiskReconciler<D>,
    uid: &Uid,
) -> Result<Observed, HostError> {
    let file = reconciler.disks.inspect(uid).await?;
    let space = match file {
        Some(_) => None,
        None => Some(reconciler.disks.space().await?),
    };
    Ok(Observed { file, space })
}
