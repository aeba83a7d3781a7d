//! Admission of disks. Only the admission of their owners makes disks.

use stead_schemas::disk::{Disk, DiskSpec};
use stead_schemas::meta::{OwnerRef, Tags};
use stead_schemas::names::{Name, Uid};

use crate::store::{New, Tx, TxError};

/// Stores the spec of a new disk of this owner.
pub(crate) fn new_disk(tx: &mut Tx<'_>, owner: OwnerRef, spec: DiskSpec) -> Result<Uid, TxError> {
    let uid = tx.next_uid();
    let new = New { name: Name::from(&uid), uid: Some(uid), tags: Tags::new(), owner: Some(owner), spec };
    Ok(tx.create::<Disk>(new)?.meta.uid.clone())
}
