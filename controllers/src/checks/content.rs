//! Invariants of the content that images and snapshots keep on disk. They are part of `checks` and so
//! independent of every plan.

use std::collections::BTreeSet;

use jiff::Timestamp;
use stead_schemas::image::{ImagePhase, ImageSource};
use stead_schemas::limits::FAILURE_KEPT;
use stead_schemas::meta::Object;
use stead_schemas::names::Digest;
use stead_schemas::snapshot::{Snapshot, SnapshotPhase, SnapshotPurpose};

use super::{Broken, HostSnapshot, Records, live};
use crate::host::Captured;
use crate::runtime::after;

/// Checks that the content that images refer to exists, and no other content.
pub(crate) fn images(broken: &mut Broken, records: &Records, host: &HostSnapshot) {
    let mut referred: BTreeSet<&Digest> = BTreeSet::new();
    for image in &records.images {
        if let ImageSource::Local { digest } = &image.spec.source {
            referred.insert(digest);
        }
        referred.extend(&image.status.digest);
        let is_here = image.status.digest.as_ref().is_some_and(|digest| host.images.contains(digest));
        if image.status.phase == ImagePhase::Ready && !is_here {
            broken.push(format!("image {} says ready, but its content is not here", image.meta.name));
        }
        if !matches!(image.status.phase, ImagePhase::Ready | ImagePhase::Failed) {
            broken.push(format!("image {} is still {:?}", image.meta.name, image.status.phase));
        }
    }
    for instance in &records.instances {
        referred.extend(&instance.status.image_digest);
        referred.extend(instance.status.next_image.iter().map(|next| &next.digest));
        referred.extend(instance.spec.origin.iter().filter_map(|origin| origin.image_digest.as_ref()));
    }
    for snapshot in &records.snapshots {
        referred.extend(&snapshot.spec.image_digest);
    }
    for digest in &host.images {
        if !referred.contains(digest) {
            broken.push(format!("content {digest} is left over"));
        }
    }
}

/// Checks that every snapshot is complete, or failed with nothing left of it, and that a snapshot that served
/// a fork is gone.
pub(crate) fn snapshots(broken: &mut Broken, records: &Records, host: &HostSnapshot, now: Timestamp) {
    for snapshot in &records.snapshots {
        let (uid, phase) = (&snapshot.meta.uid, snapshot.status.phase);
        let captured = host.snapshots.get(uid);
        let is_as_reported = match phase {
            SnapshotPhase::Pending => false,
            SnapshotPhase::Ready => {
                matches!(captured, Some(Captured::Whole { kind, .. }) if *kind == snapshot.spec.kind)
            }
            SnapshotPhase::Failed => captured.is_none(),
        };
        if !is_as_reported {
            broken.push(format!("snapshot {uid} is said to be {phase:?} and is {captured:?}"));
        }
        let all_pooled = records.instances.iter().filter(|instance| {
            instance.is_pooled() && instance.meta.owner.as_ref().is_some_and(|owner| owner.uid == *uid)
        });
        let (all_pooled, desired) =
            (all_pooled.count(), if phase == SnapshotPhase::Ready { snapshot.spec.pool } else { 0 });
        if all_pooled != usize::try_from(desired).unwrap_or(usize::MAX) {
            broken.push(format!(
                "the pool of snapshot {uid} has {all_pooled} instances and should have {desired}"
            ));
        }
        if snapshot.was_never_taken() && !is_failure_kept(snapshot, now) {
            broken.push(format!(
                "snapshot {uid} was never taken and is still kept: {:?}",
                snapshot.status.error
            ));
        }
        if snapshot.spec.purpose == SnapshotPurpose::Fork {
            broken.push(format!("snapshot {uid} of a fork is left over"));
        }
    }
    for uid in host.snapshots.keys() {
        if !records.snapshots.iter().any(|snapshot| snapshot.meta.uid == *uid) {
            broken.push(format!("files of snapshot {uid} are left over"));
        }
    }
}

/// Checks that every failed snapshot has a reason for clients that ask for it.
pub(crate) fn failures(broken: &mut Broken, records: &Records) {
    for snapshot in records.snapshots.iter().filter(|one| one.status.phase == SnapshotPhase::Failed) {
        let status = &snapshot.status;
        if status.error.as_ref().is_none_or(String::is_empty) || status.failed_at.is_none() {
            broken.push(format!("snapshot {} failed without a reason: {status:?}", snapshot.meta.uid));
        }
    }
}

/// True if the record of a failure may still be read by the client that asked for the snapshot.
fn is_failure_kept(snapshot: &Object<Snapshot>, now: Timestamp) -> bool {
    snapshot.status.failed_at.is_some_and(|at| now < after(at, FAILURE_KEPT))
}

/// Checks that no fork is left that can never begin, because the snapshot of its disk failed or is gone.
pub(crate) fn forks(broken: &mut Broken, records: &Records, now: Timestamp) {
    for instance in live(&records.instances) {
        let Some(origin) = instance.spec.origin.as_ref().filter(|origin| origin.is_fork) else { continue };
        let snapshot = records.snapshots.iter().find(|one| one.meta.uid == origin.snapshot);
        let is_lost = snapshot
            .is_none_or(|one| one.status.phase == SnapshotPhase::Failed && !is_failure_kept(one, now));
        let disk = records.disks.iter().find(|disk| disk.meta.uid == instance.spec.allocated.disk);
        if is_lost && disk.is_some_and(|disk| !disk.status.was_created) {
            broken.push(format!("fork {} can never begin and is still there", instance.meta.uid));
        }
    }
}
