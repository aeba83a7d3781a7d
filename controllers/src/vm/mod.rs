//! The VM reconciler: one instance, one VMM process, one run of a program.
//!
//! Guarantees: a run that ended by itself is not started again; a VMM that died unasked is, with
//! growing delays; an end is recorded in the status before the guest is told that it may go; no
//! state is a trap, every one converges to the wish.
//! Assumes: image, disk and port are made by their own reconcilers; this one reads their statuses.
//! Never: kills by bare pid, reads the console, or keeps anything between passes.
//! Cancel/crash: every action is found again by `inspect`; what a status had not recorded yet is
//! observed again, since guests repeat their end until it is acknowledged.
//!
//! ```text
//! nothing --Launch--> Silent --> AwaitingConfig --Configure--> Configured --> Ready
//!    ^                  |  boot deadline                           |             |
//!    |                  v                                          v             v
//!    +--Release-- Dead <--Kill-- Shutdown <--AcknowledgeExit-- (end recorded) Exited
//! ```
//!
//! A fork begins with --Adopt--> nothing but memory (recorded, so that it happens once), is restored
//! as from a standby, and is Running only when its guest has said that it is who it shall be (Assume).
//!
//! Standby: Ready --Pause--> Paused --Save--> Paused and saved --Kill, Release--> nothing but memory;
//! back: --Restore--> Paused and saved --DiscardMemory--> Paused --Resume--> Ready. A saved memory is
//! discarded before its VM runs, so that none is ever older than the disk it goes with.
//!
//! Health: Ready --BeginProbe--> probed --EndProbe--> before anything is done to its VM.
//!
//! By itself: --StandBy--> the wish is to be in standby; a connection that comes before the process
//! is gone has the wish be to run again (--Wake-->). In standby the door is watched (--Watch-->);
//! a knock is a --Wake-->, then --Unwatch, Restore--> as above, and --HandOver--> when it runs.

mod addresses;
pub mod admission;
#[cfg(test)]
mod connections;
mod doors;
mod facts;
mod failed_forks;
pub mod forks;
mod guest_config;
mod health;
mod idle;
pub mod mounts;
mod observe;
mod plan;
mod remarks;
mod restarts;
mod status;
mod steps;
#[cfg(test)]
pub(crate) mod tests;
mod volumes;
pub mod waking;

use jiff::Timestamp;
use stead_schemas::compression::Compression;
use stead_schemas::guest;
use stead_schemas::instance::{Instance, InstanceStatus, Power, PowerCause};
use stead_schemas::meta::Object;
use stead_schemas::names::{LinkName, Uid};
use stead_schemas::numbers::{Generation, StandbyNo};

use crate::host::{
    AdoptPlan, Doors, Host, HostError, HostErrorKind, LaunchPlan, Machines, NetworkCard, ProbePlan, Probes,
};
use crate::runtime::{Desired, Moment, PassEnd, Plan, Reconciler};
use crate::store::{Store, Tx};

pub use observe::{Blind, Observed, OriginSeen, Parts, PortSeen};
#[cfg(test)]
pub(crate) use tests::{instance as example, machine as example_machine};
pub use volumes::VolumesSeen;

/// Capabilities of the VM reconciler.
#[derive(Debug)]
pub struct Vms<H> {
    pub host: H,
    pub store: Store,
}

/// One step on a VMM.
#[derive(Debug, Clone, PartialEq, strum::IntoStaticStr, strum::VariantNames)]
pub enum Action {
    Launch(Box<LaunchPlan>),
    Configure(Uid, Box<guest::Config>),
    Resume(Uid),
    Pause(Uid),
    /// For the standby of this number.
    Save(Uid, StandbyNo),
    Restore(Box<LaunchPlan>),
    DiscardMemory(Uid),
    Compress(Uid, Compression),
    /// The memory of a snapshot becomes the saved one.
    Adopt(Box<AdoptPlan>),
    /// A guest that goes on from another's memory is told who it is.
    Assume(Uid, Box<guest::Assumed>),
    Reconnect(Uid, LinkName),
    Shutdown(Uid),
    AcknowledgeExit(Uid),
    Kill(Uid),
    Release(Uid),
    DiscardRecords(Uid),
    BeginProbe(Box<ProbePlan>),
    EndProbe(Uid),
    /// The instance's time is over, or it can never begin: its deletion is asked for.
    Expire(Uid),
    /// Nobody was connected for long enough, under the wish of this generation: standby is asked for.
    StandBy(Uid, Generation),
    /// The standby of this number is over, or comes to nothing: running is asked for.
    Wake {
        uid: Uid,
        standby: StandbyNo,
        by: PowerCause,
    },
    Watch(Uid, Box<NetworkCard>),
    Unwatch(Uid),
    HandOver(Uid),
}

impl<H> Vms<H> {
    /// Changes the wish, where it still is what was planned from.
    async fn wish(
        &self,
        operation: &'static str,
        uid: &Uid,
        change: impl FnOnce(&mut Tx<'_>, &Uid) -> Result<(), admission::Refused> + Send + 'static,
    ) -> Result<(), HostError> {
        let of_transaction = uid.clone();
        let changed = self.store.transact(move |tx| change(tx, &of_transaction)).await;
        changed.map_err(|error| {
            HostError::new(HostErrorKind::Transient, operation, uid.as_str()).because(error.to_string())
        })
    }
}

impl<H: Host> Reconciler for Vms<H> {
    type Kind = Instance;
    type Observed = Observed;
    type Action = Action;

    async fn observe(&self, uid: &Uid, object: Option<&Object<Instance>>) -> Result<Observed, HostError> {
        observe::observe(self, uid, object).await
    }

    fn plan(desired: &Desired<'_, Instance>, seen: &Observed, now: Moment) -> Plan<Action> {
        plan::plan(desired, seen, now)
    }

    async fn act(&self, action: &Action) -> Result<(), HostError> {
        match action {
            Action::Launch(plan) => self.host.machines().launch(plan).await,
            Action::Configure(uid, config) => self.host.machines().configure(uid, config).await,
            Action::Resume(uid) => self.host.machines().resume(uid).await,
            Action::Pause(uid) => self.host.machines().pause(uid).await,
            Action::Save(uid, standby) => self.host.machines().save(uid, *standby).await,
            Action::Restore(plan) => self.host.machines().restore(plan).await,
            Action::DiscardMemory(uid) => self.host.machines().discard_memory(uid).await,
            Action::Compress(uid, how) => self.host.machines().compress_memory(uid, *how).await,
            Action::Adopt(plan) => self.host.machines().adopt_memory(plan).await,
            Action::Assume(uid, assumed) => self.host.machines().assume(uid, assumed).await,
            Action::Reconnect(uid, tap) => self.host.machines().reconnect(uid, tap).await,
            Action::Shutdown(uid) => self.host.machines().shutdown(uid).await,
            Action::AcknowledgeExit(uid) => self.host.machines().acknowledge_exit(uid).await,
            Action::Kill(uid) => self.host.machines().kill(uid).await,
            Action::Release(uid) => self.host.machines().release(uid).await,
            Action::DiscardRecords(uid) => self.host.machines().discard_records(uid).await,
            Action::BeginProbe(plan) => self.host.probes().begin(plan).await,
            Action::EndProbe(uid) => self.host.probes().end(uid).await,
            Action::Expire(uid) => self.wish("delete the expired instance", uid, admission::expire).await,
            Action::StandBy(uid, generation) => {
                let generation = *generation;
                let stand_by = move |tx: &mut Tx<'_>, uid: &Uid| waking::stand_by(tx, uid, generation);
                self.wish("have in standby", uid, stand_by).await
            }
            Action::Wake { uid, standby, by } => {
                let (standby, by) = (*standby, *by);
                let wake = move |tx: &mut Tx<'_>, uid: &Uid| waking::wake(tx, uid, standby, by);
                self.wish("wake", uid, wake).await
            }
            Action::Watch(uid, card) => self.host.doors().watch(uid, card).await,
            Action::Unwatch(uid) => self.host.doors().unwatch(uid).await,
            Action::HandOver(uid) => self.host.doors().hand_over(uid).await,
        }
    }

    fn status(object: &Object<Instance>, seen: Option<&Observed>, end: &PassEnd) -> InstanceStatus {
        status::status(object, seen, end)
    }

    fn remarks(object: &Object<Instance>, next: &InstanceStatus) -> Vec<String> {
        remarks::remarks(object, next)
    }

    fn next_look(object: &Object<Instance>, now: Timestamp) -> Option<Timestamp> {
        let compression = object.spec.compression.filter(|_| object.spec.power == Power::Standby);
        let compression = compression.map(|wish| wish.not_before);
        let times = [object.spec.expires_at, compression, idle::next_look(object)];
        times.into_iter().flatten().filter(|&at| at > now && !object.meta.is_deleting()).min()
    }

    async fn owned(&self) -> Result<Vec<Uid>, HostError> {
        let mut owned = self.host.machines().list().await?;
        owned.extend(self.host.probes().list().await?);
        owned.sort();
        owned.dedup();
        Ok(owned)
    }
}
