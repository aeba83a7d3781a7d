//! The VM reconciler: one instance, one VMM process, one run of a program.
//!
//! Guarantees: a run that ended by itself is not started again. A VMM that died unexpectedly is started
//! again, with growing delays. An end is recorded in the status before it is acknowledged to the guest. No
//! state is a dead end: every state converges to the spec.
//! Assumes: image, disk and port are made by their own reconcilers; this reconciler reads their statuses.
//! Never: kills by pid alone, reads the console, or keeps state between passes.
//! Cancel/crash: `inspect` finds the result of every action again. An end that no status records yet is
//! observed again, because guests repeat it until it is acknowledged.
//!
//! ```text
//! nothing --Launch--> Silent --> AwaitingConfig --Configure--> Configured --> Ready
//!    ^                  |  boot deadline                           |             |
//!    |                  v                                          v             v
//!    +--Release-- Dead <--Kill-- Shutdown <--AcknowledgeExit-- (end recorded) Exited
//! ```
//!
//! A fork begins with --Adopt--> memory only (recorded, so that it happens once). It is restored as from a
//! standby, and is Running only after its guest has reported that it took over its identity (Assume).
//!
//! Standby: Ready --Pause--> Paused --Save--> Paused and saved --Kill, Release--> memory only; back:
//! --Restore--> Paused and saved --DiscardMemory--> Paused --Resume--> Ready. A saved memory is discarded
//! before its VM runs, so that no memory is ever older than the disk that belongs to it.
//!
//! Health: Ready --BeginProbe--> probed --EndProbe--> Ready, before anything is done to its VM.
//!
//! Volumes: Ready --AddVolume, MountVolumes--> Ready with it; --MountVolumes, RemoveVolume, ForgetVolumes--> without;
//! --GrowVolume, MountVolumes--> Ready with more room.
//!
//! Changes that a running program cannot see wait for the moment in which the instance has no VM: nothing
//! --ApplyChanges--> nothing, with the changed spec. A program that should be started again for a new image runs on
//! until the image is on the host: Ready --ApplyChanges--> Ready, and the spec asks for the next run.
//!
//! Automatic standby: --StandBy--> changes the spec to standby. A connection that arrives before the process
//! is gone changes the spec back to running (--Wake-->). In standby the wake listener is active (--Watch-->).
//! A pending connection causes --Wake-->, then --Unwatch, Restore--> as above, and --HandOver--> when the VM
//! runs.

pub mod admission;
mod confinement;
#[cfg(test)]
mod connections;
mod facts;
mod failed_forks;
mod guest_config;
mod health;
mod idle;
mod live_volumes;
mod log;
mod mediation;
mod memory;
mod observe;
mod passing_condition;
mod pending;
mod plan;
mod program;
mod restarts;
mod room;
mod status;
mod steps;
#[cfg(test)]
pub(crate) mod tests;
mod vmm_limits;
mod volumes;
mod wake;

use jiff::Timestamp;
use stead_schemas::compression::Compression;
use stead_schemas::guest;
use stead_schemas::instance::{Instance, InstanceStatus, Power, PowerCause};
use stead_schemas::meta::Object;
use stead_schemas::names::{LinkName, Uid};
use stead_schemas::numbers::{Generation, StandbyNo};
use stead_schemas::quantity::{Bytes, Rate};

use crate::host::{
    AdoptPlan, Guests, Host, HostError, HostErrorKind, InstanceLogs, LaunchPlan, Limits, MachineChange,
    Memories, NetworkCard, ProbePlan, Probes, VmmLimits, Vmms, VolumeDisk, WakeListeners,
};
use crate::runtime::{Desired, Moment, PassEnd, Plan, Reconciler};
use crate::store::{Store, Tx};

pub use live_volumes::PROBLEM_END;
pub use observe::{Blind, NicSeen, Observed, OriginSeen, Parts};
#[cfg(test)]
pub(crate) use tests::{instance as example, machine as example_machine};
pub use volumes::VolumesSeen;

/// Capabilities of the VM reconciler.
#[derive(Debug)]
pub struct VmReconciler<H> {
    pub host: H,
    pub store: Store,
}

/// A single step on a VMM.
#[derive(Debug, Clone, PartialEq, strum::IntoStaticStr, strum::VariantNames)]
pub enum Action {
    Launch(Box<LaunchPlan>),
    Configure(Uid, Box<guest::Config>),
    Resume(Uid),
    Pause(Uid),
    /// Saves the memory for the standby of this number.
    Save(Uid, StandbyNo),
    Restore(Box<LaunchPlan>),
    DiscardMemory(Uid),
    Compress(Uid, Compression),
    /// Makes the memory of a snapshot the saved memory.
    Adopt(Box<AdoptPlan>),
    /// Sends a guest that continues from another instance's memory its identity.
    TakeIdentity(Uid, Box<guest::NewIdentity>),
    Reconnect(Uid, LinkName),
    LimitDisks(Uid, Option<Rate>),
    /// Asks the guest to use this part of its hotplug memory.
    ResizeMemory(Uid, Bytes),
    /// Takes back the memory that the guest does not use.
    TakeMemory(Uid),
    /// Puts the disk of a volume into the VM.
    AddVolume(Uid, VolumeDisk),
    /// Takes the disk of this number out of the VM.
    RemoveVolume(Uid, u32),
    /// Makes the disk of this number as large as its file in the VM.
    GrowVolume(Uid, u32, Bytes),
    /// Asks the guest to have exactly these volumes mounted.
    MountVolumes(Uid, Vec<guest::VolumeMount>),
    /// Removes the mounts of these volumes from the spec: they were to leave, and the VM has none of their disks.
    ForgetVolumes(Uid, Vec<Uid>),
    /// Sets the limits of the VMM.
    Limit(Uid, VmmLimits),
    Shutdown(Uid),
    AcknowledgeExit(Uid),
    Kill(Uid),
    Release(Uid),
    DiscardRecords(Uid),
    BeginProbe(Box<ProbePlan>),
    EndProbe(Uid),
    /// Requests the deletion of an instance whose time is over, or that can never begin.
    Expire(Uid),
    /// Requests standby because no client was connected for long enough, under the spec of this generation.
    StandBy(Uid, Generation),
    /// Requests running, because the standby of this number is over or cannot be completed.
    Wake {
        uid: Uid,
        standby: StandbyNo,
        by: PowerCause,
    },
    /// Requests room for the VM that the standby of this number needs, because the memory that was saved is lost.
    Regrant {
        uid: Uid,
        standby: StandbyNo,
    },
    /// Carries out the changes that wait for a start, or requests that start, under the spec of this generation.
    ApplyChanges(Uid, Generation),
    Watch(Uid, Box<NetworkCard>),
    Unwatch(Uid),
    HandOver(Uid),
}

impl<H> VmReconciler<H> {
    /// Changes the spec, if it still is the spec that the plan was made from.
    async fn request_change(
        &self,
        operation: &'static str,
        uid: &Uid,
        change: impl FnOnce(&mut Tx<'_>, &Uid) -> Result<(), admission::Refused> + Send + 'static,
    ) -> Result<(), HostError> {
        let moved = uid.clone();
        let changed = self.store.transact(move |tx| change(tx, &moved)).await;
        changed.map_err(|error| {
            HostError::new(HostErrorKind::Transient, operation, uid.as_str()).because(error.to_string())
        })
    }
}

impl<H: Host> VmReconciler<H> {
    /// Changes the running machine.
    async fn change(&self, uid: &Uid, change: MachineChange) -> Result<(), HostError> {
        self.host.vmms().change(uid, &change).await
    }
}

impl<H: Host> Reconciler for VmReconciler<H> {
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
            Action::Launch(plan) => self.host.vmms().launch(plan).await,
            Action::Configure(uid, config) => self.host.guests().configure(uid, config).await,
            Action::Resume(uid) => self.host.vmms().resume(uid).await,
            Action::Pause(uid) => self.host.vmms().pause(uid).await,
            Action::Save(uid, standby) => self.host.memories().save(uid, *standby).await,
            Action::Restore(plan) => self.host.memories().restore(plan).await,
            Action::DiscardMemory(uid) => self.host.memories().discard(uid).await,
            Action::Compress(uid, how) => self.host.memories().compress(uid, *how).await,
            Action::Adopt(plan) => self.host.memories().adopt(plan).await,
            Action::TakeIdentity(uid, identity) => self.host.guests().take_identity(uid, identity).await,
            Action::Reconnect(uid, tap) => self.change(uid, MachineChange::Tap(tap.clone())).await,
            Action::LimitDisks(uid, rate) => self.change(uid, MachineChange::DiskRate(*rate)).await,
            Action::ResizeMemory(uid, hotplugged) => self.host.guests().resize_memory(uid, *hotplugged).await,
            Action::TakeMemory(uid) => self.change(uid, MachineChange::UnusedMemory).await,
            Action::AddVolume(uid, volume) => {
                self.change(uid, MachineChange::AddVolume(volume.clone())).await
            }
            Action::RemoveVolume(uid, number) => self.change(uid, MachineChange::RemoveVolume(*number)).await,
            Action::GrowVolume(uid, number, size) => {
                self.change(uid, MachineChange::GrowVolume(*number, *size)).await
            }
            Action::MountVolumes(uid, volumes) => self.host.guests().mount_volumes(uid, volumes).await,
            Action::ForgetVolumes(uid, volumes) => {
                let volumes = volumes.clone();
                let forget = move |tx: &mut Tx<'_>, uid: &Uid| admission::forget_volumes(tx, uid, &volumes);
                self.request_change("forget volumes of", uid, forget).await
            }
            Action::Limit(uid, limits) => self.host.limits().set(uid, *limits).await,
            Action::Shutdown(uid) => self.host.guests().shutdown(uid).await,
            Action::AcknowledgeExit(uid) => self.host.guests().acknowledge_exit(uid).await,
            Action::Kill(uid) => self.host.vmms().kill(uid).await,
            Action::Release(uid) => self.host.vmms().release(uid).await,
            Action::DiscardRecords(uid) => self.host.instance_logs().remove(uid).await,
            Action::BeginProbe(plan) => self.host.probes().begin(plan).await,
            Action::EndProbe(uid) => self.host.probes().end(uid).await,
            Action::Expire(uid) => {
                self.request_change("delete the expired instance", uid, admission::expire).await
            }
            Action::StandBy(uid, generation) => {
                let generation = *generation;
                let stand_by = move |tx: &mut Tx<'_>, uid: &Uid| admission::stand_by(tx, uid, generation);
                self.request_change("have in standby", uid, stand_by).await
            }
            Action::Wake { uid, standby, by } => {
                let (standby, by) = (*standby, *by);
                let wake = move |tx: &mut Tx<'_>, uid: &Uid| admission::wake(tx, uid, standby, by);
                self.request_change("wake", uid, wake).await
            }
            Action::Regrant { uid, standby } => {
                let standby = *standby;
                let regrant = move |tx: &mut Tx<'_>, uid: &Uid| admission::regrant(tx, uid, standby);
                self.request_change("make room for", uid, regrant).await
            }
            Action::ApplyChanges(uid, generation) => {
                let generation = *generation;
                let apply = move |tx: &mut Tx<'_>, uid: &Uid| admission::apply_changes(tx, uid, generation);
                self.request_change("change", uid, apply).await
            }
            Action::Watch(uid, card) => self.host.wake_listeners().watch(uid, card).await,
            Action::Unwatch(uid) => self.host.wake_listeners().unwatch(uid).await,
            Action::HandOver(uid) => self.host.wake_listeners().hand_over(uid).await,
        }
    }

    fn status(object: &Object<Instance>, seen: Option<&Observed>, end: &PassEnd) -> InstanceStatus {
        status::status(object, seen, end)
    }

    fn notes(object: &Object<Instance>, next: &InstanceStatus) -> Vec<String> {
        log::notes(object, next)
    }

    fn next_poll(object: &Object<Instance>, now: Timestamp) -> Option<Timestamp> {
        let compression = object.spec.compression.filter(|_| object.spec.power == Power::Standby);
        let compression = compression.map(|request_change| request_change.not_before);
        let times = [
            object.spec.expires_at,
            compression,
            idle::next_poll(object),
            room::next_poll(object, now),
            memory::next_poll(object),
        ];
        times.into_iter().flatten().filter(|&at| at > now && !object.meta.is_deleting()).min()
    }

    async fn owned(&self) -> Result<Vec<Uid>, HostError> {
        let mut owned = self.host.vmms().list().await?;
        owned.extend(self.host.probes().list().await?);
        owned.sort();
        owned.dedup();
        Ok(owned)
    }
}
