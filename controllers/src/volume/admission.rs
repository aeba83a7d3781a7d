//! Admission of requests on a volume, and the rules for its mounts.
//!
//! Guarantees: an instance that writes to a volume is its only user. A volume that is only read does not
//! change while it is mounted, or while there is a snapshot of an instance that read it.

use std::sync::Arc;

use stead_schemas::api::VolumeCreate;
use stead_schemas::disk::{Disk, DiskPurpose, DiskSpec};
use stead_schemas::instance::Instance;
use stead_schemas::meta::{Kind, Object, OwnerRef, Tags};
use stead_schemas::names::{Name, Uid};
use stead_schemas::quantity::Bytes;
use stead_schemas::references::{Ref, Role};
use stead_schemas::snapshot::{CapturedDisk, Snapshot};
use stead_schemas::validate::printable;
use stead_schemas::volume::{Volume, VolumeMount, VolumeSpec};

use crate::disk::admission::new_disk;
use crate::node::admission::within_room;
use crate::refused::{Refused, RefusedKind};
use crate::store::{New, Tx};

/// Number of characters of an unknown id or name that a refusal repeats.
const WORD_CHARS_MAX: usize = 64;

/// A volume that is to be made.
pub(crate) struct CreateRequest {
    pub(crate) id: Option<Uid>,
    /// The name; `None` means the volume's id.
    pub(crate) name: Option<Name>,
    pub(crate) size: Bytes,
    pub(crate) tags: Tags,
    pub(crate) owner: Option<OwnerRef>,
    pub(crate) content: Content,
}

/// The first content of a volume.
#[derive(Debug)]
pub(crate) enum Content {
    Empty,
    /// A copy of a disk in a snapshot: the snapshot, the disk, and the size of that copy.
    Copy(Uid, Uid, Bytes),
    /// A prepared file of this name.
    Prepared(Uid),
}

/// Stores the spec of a new, empty volume.
///
/// # Errors
/// Returns `AlreadyExists`, `Quota` or `NoRoom`.
pub fn create(tx: &mut Tx<'_>, request: VolumeCreate) -> Result<Arc<Object<Volume>>, Refused> {
    let VolumeCreate { id, name, size, tags } = request;
    let request = CreateRequest { id, name: Some(name), size, tags, owner: None, content: Content::Empty };
    within_room(tx, |tx| begin(tx, request))
}

/// Stores the spec of a new volume that begins as the prepared file of this name.
///
/// # Errors
/// Returns the errors of [`create`].
pub fn create_from(
    tx: &mut Tx<'_>,
    request: VolumeCreate,
    prepared: Uid,
) -> Result<Arc<Object<Volume>>, Refused> {
    let VolumeCreate { id, name, size, tags } = request;
    let content = Content::Prepared(prepared);
    let request = CreateRequest { id, name: Some(name), size, tags, owner: None, content };
    within_room(tx, |tx| begin(tx, request))
}

/// Checks that a volume of the request's id and name can be stored now.
///
/// # Errors
/// Returns `AlreadyExists`.
pub fn check_new(tx: &Tx<'_>, request: &VolumeCreate) -> Result<(), Refused> {
    let has_id = request.id.as_ref().is_some_and(|id| tx.get::<Volume>(id).is_some());
    if has_id || tx.find::<Volume>(&request.name).is_some() {
        let message = format!("a volume of the name {} or of that id exists", request.name);
        return Err(Refused::new(RefusedKind::AlreadyExists, message));
    }
    Ok(())
}

/// Stores the spec of any new volume, with the errors of [`create`].
pub(crate) fn begin(tx: &mut Tx<'_>, request: CreateRequest) -> Result<Arc<Object<Volume>>, Refused> {
    let CreateRequest { id, name, size, tags, owner, content } = request;
    let uid = id.unwrap_or_else(|| tx.next_uid());
    let disk = new_content(tx, &uid, size, content)?;
    let name = name.unwrap_or_else(|| Name::from(&uid));
    let spec = VolumeSpec { size, disk };
    Ok(tx.create::<Volume>(New { uid: Some(uid), name, tags, owner, spec })?)
}

/// Creates a disk for the content of a volume.
fn new_content(tx: &mut Tx<'_>, volume: &Uid, size: Bytes, content: Content) -> Result<Uid, Refused> {
    let empty = DiskSpec::empty(size, DiskPurpose::Volume);
    let spec = match content {
        Content::Empty => empty,
        Content::Copy(snapshot, disk, copied) => DiskSpec {
            source: Some(snapshot),
            source_disk: Some(disk),
            source_size: Some(copied).filter(|copied| *copied < size),
            ..empty
        },
        Content::Prepared(name) => DiskSpec { prepared: Some(name), ..empty },
    };
    let owner = OwnerRef { kind: Volume::NAME.to_owned(), uid: volume.clone() };
    Ok(new_disk(tx, owner, spec)?)
}

/// Replaces the content of a volume by a copy of a snapshot's disk. The present content is lost.
pub(crate) fn rewind(
    tx: &mut Tx<'_>,
    volume: &Uid,
    snapshot: &Uid,
    taken: &CapturedDisk,
) -> Result<(), Refused> {
    let object = tx.get::<Volume>(volume).ok_or_else(|| Refused::absent::<Volume>(volume))?;
    let content = Content::Copy(snapshot.clone(), taken.disk.clone(), taken.size);
    let disk = new_content(tx, volume, object.spec.size, content)?;
    tx.update_spec::<Volume>(volume, None, |spec| spec.disk = disk)?;
    tx.request_deletion::<Disk>(&object.spec.disk)?;
    Ok(())
}

/// Raises the size of a volume. Its file grows at once, and its file system in the guest that writes to it now or next.
///
/// # Errors
/// Returns `NotFound`, `Invalid` for a smaller size, and `NoRoom`.
pub fn grow(tx: &mut Tx<'_>, uid: &Uid, size: Bytes) -> Result<Arc<Object<Volume>>, Refused> {
    let object = tx.get::<Volume>(uid).filter(|volume| !volume.meta.is_deleting());
    let object = object.ok_or_else(|| Refused::absent::<Volume>(uid))?;
    if size < object.spec.size {
        let message = format!(
            "size_gb must be at least the present size of {}: volumes do not shrink",
            object.spec.size
        );
        return Err(Refused::at(RefusedKind::Invalid, "size_gb", message));
    }
    within_room(tx, |tx| {
        tx.update_spec::<Disk>(&object.spec.disk, None, |spec| spec.size = size)?;
        Ok(tx.update_spec::<Volume>(uid, None, |spec| spec.size = size)?)
    })
}

/// Requests the deletion of a volume with its content.
///
/// # Errors
/// Returns `NotFound`, and `Conflict` while an instance mounts the volume, even an instance that is being
/// deleted, or while a snapshot needs it.
pub fn delete(tx: &mut Tx<'_>, uid: &Uid) -> Result<(), Refused> {
    let object = tx.get::<Volume>(uid).ok_or_else(|| Refused::absent::<Volume>(uid))?;
    let mounts = [Role::Writes, Role::Reads].map(|role| Ref::to::<Volume>(role, uid));
    let mounting = mounts.iter().find_map(|mount| tx.find_referring::<Instance>(mount, |_| true));
    if let Some(instance) = mounting {
        let message = format!("volume {} is mounted in instance {}", object.meta.name, instance.meta.name);
        return Err(Refused::conflict(message));
    }
    if let Some(message) = held(tx, &object) {
        return Err(Refused::conflict(message));
    }
    tx.request_deletion::<Volume>(uid)?;
    Ok(())
}

/// Returns the live volume of an id or a name.
///
/// # Errors
/// Returns `NotFound`.
pub fn find(tx: &Tx<'_>, word: &str) -> Result<Arc<Object<Volume>>, Refused> {
    let by_id = word.parse::<Uid>().ok().and_then(|uid| tx.get::<Volume>(&uid));
    let found = by_id.or_else(|| Name::resource(word).ok().and_then(|name| tx.find::<Volume>(&name)));
    let found = found.filter(|volume| !volume.meta.is_deleting());
    found.ok_or_else(|| Refused::absent::<Volume>(printable(word, WORD_CHARS_MAX)))
}

/// Checks that an instance may mount a volume in addition to its present users.
///
/// # Errors
/// Returns `Conflict`, which names the user that is in the way.
pub fn check_free(
    tx: &Tx<'_>,
    volume: &Object<Volume>,
    instance: &Uid,
    is_writing: bool,
) -> Result<(), Refused> {
    // An instance that is being deleted no longer counts as a user; its VM ends before another VM starts.
    let is_other = |other: &Object<Instance>| other.meta.uid != *instance && !other.meta.is_deleting();
    let clashes = [(Role::Writes, "written to"), (Role::Reads, "read")];
    for (role, how) in clashes.into_iter().filter(|(role, _)| is_writing || *role == Role::Writes) {
        let mount = Ref::to::<Volume>(role, &volume.meta.uid);
        if let Some(other) = tx.find_referring::<Instance>(&mount, is_other) {
            let message = format!("volume {} is {how} by instance {}", volume.meta.name, other.meta.name);
            return Err(Refused::conflict(message));
        }
    }
    match held(tx, volume).filter(|_| is_writing) {
        Some(message) => Err(Refused::conflict(message)),
        None => Ok(()),
    }
}

/// Returns the reason if a snapshot needs a volume as it is: an instance that read the volume, and relies on
/// its content, should be able to continue from that snapshot.
fn held(tx: &Tx<'_>, volume: &Object<Volume>) -> Option<String> {
    let reads = Ref::to::<Volume>(Role::Reads, &volume.meta.uid);
    let snapshot = tx.find_referring::<Snapshot>(&reads, |_| true)?;
    let (name, uid) = (&volume.meta.name, &snapshot.meta.uid);
    Some(format!("volume {name} is needed as it is by snapshot {uid} of {}", snapshot.spec.source_name))
}

pub(crate) fn mount_of<'a>(mounts: &'a [VolumeMount], volume: &Uid) -> Option<&'a VolumeMount> {
    mounts.iter().find(|mount| mount.volume == *volume)
}
