//! The volume reconciler: it reports whether the disk of a volume exists.
//!
//! Guarantees: the disk of a deleted volume is removed once the volume's record is gone.
//! Never: changes the host. The disk belongs to the disk reconciler, and the mounts belong to the instances.
//! Cancel/crash: there is no step that could be cut short.
//!
//! ```text
//! its disk does not exist: Creating      its disk is Ready: Available
//! deleted: refused while an instance mounts it, else the record goes, and the disk with it
//! ```

pub mod admission;
#[cfg(test)]
mod tests;

use stead_schemas::condition::{self, ConditionStatus, ConditionType, Reason};
use stead_schemas::disk::Disk;
use stead_schemas::meta::Object;
use stead_schemas::names::Uid;
use stead_schemas::volume::{Volume, VolumeStatus};

use crate::host::HostError;
use crate::runtime::{Desired, Moment, PassEnd, Plan, Reconciler, Wait, conditions};
use crate::store::Store;

/// Capabilities of the volume reconciler.
#[derive(Debug)]
pub struct VolumeReconciler {
    pub store: Store,
}

/// The empty set of steps: all steps belong to the disk.
#[derive(Debug, Clone, PartialEq, Eq, strum::IntoStaticStr, strum::VariantNames)]
pub enum Action {}

/// The state of the volume's disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Observed {
    /// The reason why the disk cannot be used; `None` if it can.
    pub trouble: Option<String>,
    /// The loss of the content, or another problem that an operator has to solve.
    pub degraded: Option<(Reason, String)>,
}

impl Reconciler for VolumeReconciler {
    type Kind = Volume;
    type Observed = Observed;
    type Action = Action;

    async fn observe(&self, _: &Uid, object: Option<&Object<Volume>>) -> Result<Observed, HostError> {
        let disk = object.and_then(|object| self.store.get::<Disk>(&object.spec.disk));
        Ok(Observed { trouble: trouble(disk.as_deref()), degraded: disk.as_deref().and_then(degraded) })
    }

    fn plan(desired: &Desired<'_, Volume>, seen: &Observed, _: Moment) -> Plan<Action> {
        match (desired, &seen.trouble) {
            (Desired::Absent(_), _) | (_, None) => Plan::Converged,
            (Desired::Present(_), Some(why)) => {
                Plan::Wait(Wait { reason: Reason::WaitingForDisk, message: why.clone(), until: None })
            }
        }
    }

    async fn act(&self, action: &Action) -> Result<(), HostError> {
        match *action {}
    }

    fn status(object: &Object<Volume>, seen: Option<&Observed>, end: &PassEnd) -> VolumeStatus {
        let (generation, previous) = (object.meta.generation, &object.status.conditions);
        let mut all = conditions::standard(previous, generation, end);
        if let Some((reason, message)) = seen.and_then(|seen| seen.degraded.as_ref()) {
            conditions::degrade(&mut all, previous, (*reason, message), generation, end.now.at());
        }
        VolumeStatus { conditions: all, observed_generation: generation }
    }

    /// Returns no uids, because nothing of this kind is on the host.
    async fn owned(&self) -> Result<Vec<Uid>, HostError> {
        Ok(Vec::new())
    }
}

/// Returns the reason why a disk cannot be used.
fn trouble(disk: Option<&Object<Disk>>) -> Option<String> {
    let Some(disk) = disk else { return Some("its disk is gone".to_owned()) };
    if disk.is_ready() {
        return None;
    }
    let found = condition::find(&disk.status.conditions, ConditionType::Ready);
    let found = found.map(|ready| ready.message.clone()).filter(|message| !message.is_empty());
    Some(found.unwrap_or_else(|| "its disk is being made".to_owned()))
}

fn degraded(disk: &Object<Disk>) -> Option<(Reason, String)> {
    let found = condition::find(&disk.status.conditions, ConditionType::Degraded);
    let found = found.filter(|found| found.status == ConditionStatus::True)?;
    Some((found.reason, found.message.clone()))
}
