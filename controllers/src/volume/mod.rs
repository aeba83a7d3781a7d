//! The volume reconciler: says of a volume whether its disk is there.
//!
//! Guarantees: a volume that is deleted takes its disk along, which goes when its record has gone.
//! Never: touches the host: its disk is the disk reconciler's, its mounts are the instances'.
//! Cancel/crash: there is nothing to be cut short.

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

/// There is no step: all of them are the disk's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {}

/// What its disk says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Observed {
    /// Why it is not there; `None` when it is.
    pub trouble: Option<String>,
    /// That its content went missing, or whatever else somebody has to see to.
    pub degraded: Option<(Reason, String)>,
}

impl Reconciler for VolumeReconciler {
    type Kind = Volume;
    type Observed = Observed;
    type Action = Action;

    const ACTIONS: &'static [&'static str] = &[];

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

    fn action_name(action: &Action) -> &'static str {
        match *action {}
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

    /// Nothing of it is on the host.
    async fn owned(&self) -> Result<Vec<Uid>, HostError> {
        Ok(Vec::new())
    }
}

/// What keeps a disk from being used.
fn trouble(disk: Option<&Object<Disk>>) -> Option<String> {
    let Some(disk) = disk else { return Some("its disk is gone".to_owned()) };
    if condition::is_ready(&disk.status.conditions) {
        return None;
    }
    let said = condition::find(&disk.status.conditions, ConditionType::Ready);
    let said = said.map(|ready| ready.message.clone()).filter(|message| !message.is_empty());
    Some(said.unwrap_or_else(|| "its disk is being made".to_owned()))
}

fn degraded(disk: &Object<Disk>) -> Option<(Reason, String)> {
    let said = condition::find(&disk.status.conditions, ConditionType::Degraded);
    let said = said.filter(|said| said.status == ConditionStatus::True)?;
    Some((said.reason, said.message.clone()))
}
