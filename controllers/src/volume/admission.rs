//! What may become of a request on a volume, and who may mount it.
//!
//! Guarantees: who writes to a volume is alone with it; what is only read does not change while it is
//! mounted, or while a snapshot of an instance that read it is there.

use std::sync::Arc;

use stead_schemas::api::VolumeCreate;
use stead_schemas::disk::{Disk, DiskPurpose, DiskSpec};
use stead_schemas::instance::Instance;
use stead_schemas::meta::{Kind, Object, OwnerRef, Tags};
use stead_schemas::names::{Name, Uid};
use stead_schemas::quantity::Bytes;
use stead_schemas::references::{Ref, Role};
use stead_schemas::snapshot::Snapshot;
use stead_schemas::volume::{Volume, VolumeMount, VolumeSpec};

use crate::store::{New, Tx, TxError, absent};

/// Why a request was refused; each has its code on the wire.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum VolumeRefused {
    #[error("{0}")]
    NotFound(String),
    /// Of a request that names another object than its path.
    #[error("there is no volume {0:?}")]
    NoSuchVolume(String),
    #[error("a volume named {0} exists already")]
    NameTaken(Name),
    #[error("the id {0} is taken")]
    IdTaken(Uid),
    #[error("{0}")]
    InsufficientResources(String),
    #[error("{0}")]
    Conflict(String),
}

impl From<TxError> for VolumeRefused {
    fn from(error: TxError) -> Self {
        match error {
            TxError::NotFound { kind, uid } | TxError::Deleting { kind, uid } => {
                Self::NotFound(absent(kind, uid))
            }
            TxError::NameTaken { name, .. } => Self::NameTaken(name),
            TxError::UidTaken { uid, .. } => Self::IdTaken(uid),
            TxError::TooMany { .. } => Self::InsufficientResources(error.to_string()),
            TxError::Stale { .. } | TxError::Unreadable { .. } => Self::Conflict(error.to_string()),
        }
    }
}

/// A volume that is to be made.
pub(crate) struct Wish {
    pub(crate) id: Option<Uid>,
    /// Its id when nobody named it.
    pub(crate) name: Option<Name>,
    pub(crate) size: Bytes,
    pub(crate) tags: Tags,
    pub(crate) owner: Option<OwnerRef>,
    /// The snapshot, and its disk, that it begins as a copy of.
    pub(crate) source: Option<(Uid, Uid)>,
}

/// Stores the wish for a new volume, empty.
///
/// # Errors
/// `NameTaken`, `IdTaken`, `InsufficientResources`.
pub fn create(tx: &mut Tx<'_>, wish: VolumeCreate) -> Result<Arc<Object<Volume>>, VolumeRefused> {
    let VolumeCreate { id, name, size, tags } = wish;
    begin(tx, Wish { id, name: Some(name), size, tags, owner: None, source: None })
}

/// Likewise of any.
pub(crate) fn begin(tx: &mut Tx<'_>, wish: Wish) -> Result<Arc<Object<Volume>>, VolumeRefused> {
    let Wish { id, name, size, tags, owner, source } = wish;
    let uid = id.unwrap_or_else(|| tx.next_uid());
    let disk = content(tx, &uid, size, source)?;
    let name = name.unwrap_or_else(|| Name::from(&uid));
    let spec = VolumeSpec { size, disk };
    Ok(tx.create::<Volume>(New { uid: Some(uid), name, tags, owner, spec })?)
}

/// A disk for a volume.
fn content(
    tx: &mut Tx<'_>,
    volume: &Uid,
    size: Bytes,
    source: Option<(Uid, Uid)>,
) -> Result<Uid, VolumeRefused> {
    let (source, source_disk) = source.unzip();
    let spec = DiskSpec { size, purpose: DiskPurpose::Volume, source, source_disk };
    let uid = tx.next_uid();
    let owner = Some(OwnerRef { kind: Volume::NAME.to_owned(), uid: volume.clone() });
    let new = New { name: Name::from(&uid), uid: Some(uid), tags: Tags::new(), owner, spec };
    Ok(tx.create::<Disk>(new)?.meta.uid.clone())
}

fn no_volume(uid: &Uid) -> VolumeRefused {
    VolumeRefused::NotFound(absent(Volume::NAME, uid))
}

/// Has a copy of a snapshot's disk take the place of a volume's content, which is gone with that.
pub(crate) fn rewind(tx: &mut Tx<'_>, volume: &Uid, snapshot: Uid, disk: Uid) -> Result<(), VolumeRefused> {
    let object = tx.get::<Volume>(volume).ok_or_else(|| no_volume(volume))?;
    let disk = content(tx, volume, object.spec.size, Some((snapshot, disk)))?;
    tx.update_spec::<Volume>(volume, None, |spec| spec.disk = disk)?;
    tx.request_deletion::<Disk>(&object.spec.disk)?;
    Ok(())
}

/// Asks for a volume to be gone, with its content.
///
/// # Errors
/// `NotFound`; `Conflict` while an instance mounts it, even one that is being deleted, or a snapshot
/// needs it.
pub fn delete(tx: &mut Tx<'_>, uid: &Uid) -> Result<(), VolumeRefused> {
    let object = tx.get::<Volume>(uid).ok_or_else(|| no_volume(uid))?;
    let mounts = [Role::Writes, Role::Reads].map(|role| Ref::to::<Volume>(role, uid));
    let mounting = mounts.iter().find_map(|mount| tx.find_referring::<Instance>(mount, |_| true));
    if let Some(instance) = mounting {
        let message = format!("volume {} is mounted in instance {}", object.meta.name, instance.meta.name);
        return Err(VolumeRefused::Conflict(message));
    }
    if let Some(message) = held(tx, &object) {
        return Err(VolumeRefused::Conflict(message));
    }
    tx.request_deletion::<Volume>(uid)?;
    Ok(())
}

/// The live volume of an id or a name.
///
/// # Errors
/// `NoSuchVolume`.
pub fn find(tx: &Tx<'_>, word: &str) -> Result<Arc<Object<Volume>>, VolumeRefused> {
    let by_id = word.parse::<Uid>().ok().and_then(|uid| tx.get::<Volume>(&uid));
    let found = by_id.or_else(|| Name::resource(word).ok().and_then(|name| tx.find::<Volume>(&name)));
    let found = found.filter(|volume| !volume.meta.is_deleting());
    found.ok_or_else(|| VolumeRefused::NoSuchVolume(stead_schemas::validate::printable(word, 64)))
}

/// Whether an instance may mount a volume beside all who have it already.
///
/// # Errors
/// `Conflict`, which names who is in the way.
pub fn check_free(
    tx: &Tx<'_>,
    volume: &Object<Volume>,
    instance: &Uid,
    is_writing: bool,
) -> Result<(), VolumeRefused> {
    // One that is being deleted has it no longer; its VM is waited for before another one starts.
    let is_other = |other: &Object<Instance>| other.meta.uid != *instance && !other.meta.is_deleting();
    let clashes = [(Role::Writes, "written to"), (Role::Reads, "read")];
    for (role, how) in clashes.into_iter().filter(|(role, _)| is_writing || *role == Role::Writes) {
        let mount = Ref::to::<Volume>(role, &volume.meta.uid);
        if let Some(other) = tx.find_referring::<Instance>(&mount, is_other) {
            let message = format!("volume {} is {how} by instance {}", volume.meta.name, other.meta.name);
            return Err(VolumeRefused::Conflict(message));
        }
    }
    match held(tx, volume).filter(|_| is_writing) {
        Some(message) => Err(VolumeRefused::Conflict(message)),
        None => Ok(()),
    }
}

/// The snapshot that needs a volume as it is: an instance that reads it, and knows what is there, is
/// to go on from it.
fn held(tx: &Tx<'_>, volume: &Object<Volume>) -> Option<String> {
    let reads = Ref::to::<Volume>(Role::Reads, &volume.meta.uid);
    let snapshot = tx.find_referring::<Snapshot>(&reads, |_| true)?;
    let (name, uid) = (&volume.meta.name, &snapshot.meta.uid);
    Some(format!("volume {name} is needed as it is by snapshot {uid} of {}", snapshot.spec.source_name))
}

pub(crate) fn mount_of<'a>(mounts: &'a [VolumeMount], volume: &Uid) -> Option<&'a VolumeMount> {
    mounts.iter().find(|mount| mount.volume == *volume)
}
