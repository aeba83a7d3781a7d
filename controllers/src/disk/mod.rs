//! The disk reconciler: one sparse ext4 file per disk.
//!
//! Guarantees: a file is made only if the host's reserve stays free. The loss of a file that went missing is
//! recorded in a condition before a new file is made, and the condition stays. A disk that begins as a copy
//! of a snapshot's disk is copied once the snapshot is taken; after a loss it begins empty.
//! Assumes: disk sizes are overcommitted on purpose, because the files are sparse. The check is for space to
//! begin with, not for the whole apparent size.
//! Never: makes a file smaller, or changes its content: the file system in it grows in the guest that writes to it, which
//! alone has to trust it. A disk is removed only after its owner's record is gone, so that no VM
//! uses it by then.
//! Cancel/crash: a file is complete or absent.
//!
//! ```text
//! nothing --Create | Copy | Take--> file (Ready)      file lost: a condition, then --Create--> empty file
//! file smaller than the spec --Grow--> file
//! deleted, and its owner's record gone: --Remove--> nothing
//! ```

pub(crate) mod admission;
mod observe;
mod plan;
mod status;
#[cfg(test)]
mod tests;

use stead_schemas::disk::{Disk, DiskStatus};
use stead_schemas::meta::Object;
use stead_schemas::names::Uid;
use stead_schemas::quantity::Bytes;

use crate::host::{Disks, Host, HostError};
use crate::runtime::{Desired, Moment, PassEnd, Plan, Reconciler};
use crate::store::Store;

pub use observe::{Observed, SourceSeen};

/// Capabilities of the disk reconciler.
#[derive(Debug)]
pub struct DiskReconciler<H> {
    pub host: H,
    pub store: Store,
}

/// A single step on the disk directory.
#[derive(Debug, Clone, PartialEq, Eq, strum::IntoStaticStr, strum::VariantNames)]
pub enum Action {
    Create { owner: Uid, size: Bytes },
    Copy { owner: Uid, snapshot: Uid, of: Option<Uid>, size: Bytes },
    Take { owner: Uid, prepared: Uid },
    Grow { owner: Uid, size: Bytes },
    Remove { owner: Uid },
}

impl<H: Host> Reconciler for DiskReconciler<H> {
    type Kind = Disk;
    type Observed = Observed;
    type Action = Action;

    async fn observe(&self, uid: &Uid, object: Option<&Object<Disk>>) -> Result<Observed, HostError> {
        observe::observe(self, uid, object).await
    }

    fn plan(desired: &Desired<'_, Disk>, seen: &Observed, now: Moment) -> Plan<Action> {
        plan::plan(desired, seen, now.at())
    }

    async fn act(&self, action: &Action) -> Result<(), HostError> {
        match action {
            Action::Create { owner, size } => self.host.disks().create(owner, *size).await,
            Action::Copy { owner, snapshot, of, size } => {
                self.host.disks().copy(owner, snapshot, of.as_ref(), *size).await
            }
            Action::Take { owner, prepared } => self.host.disks().take(owner, prepared).await,
            Action::Grow { owner, size } => self.host.disks().grow(owner, *size).await,
            Action::Remove { owner } => self.host.disks().remove(owner).await,
        }
    }

    fn status(object: &Object<Disk>, seen: Option<&Observed>, end: &PassEnd) -> DiskStatus {
        status::status(object, seen, end)
    }

    async fn owned(&self) -> Result<Vec<Uid>, HostError> {
        Ok(self.host.disks().list().await?.into_iter().map(|file| file.owner).collect())
    }
}
