//! Facts of an instance and its VM as pure predicates: the desired state, the actual state, and the
//! comparison of the two. Plans, statuses and admission decide by these predicates and classify nothing
//! themselves.

use jiff::Timestamp;
use stead_schemas::capabilities::VmmCapabilities;
use stead_schemas::goal::Goal;
use stead_schemas::instance::{Instance, Power, PowerCause};
use stead_schemas::limits;
use stead_schemas::meta::Object;
use stead_schemas::numbers::StandbyNo;

use super::Observed;
use crate::host::{GuestPhase, Machine, Memory, SavedMemory, VmmState};
use crate::runtime::{Desired, Moment};

/// Returns the goal of an instance. Without a record the goal is `Absent`.
pub(super) fn goal(desired: &Desired<'_, Instance>) -> Goal {
    match desired {
        Desired::Absent(_) => Goal::Absent,
        Desired::Present(object) => object.goal(),
    }
}

/// The actual state of an instance's VM, compared with its goal.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Situation<'a> {
    /// No VM and no memory exist.
    Nothing,
    /// No VM exists, and the memory cannot be used: it is from another run or standby, or its save was cut
    /// short.
    UselessMemory,
    /// No VM exists, but the memory that the run continues from does.
    Saved(&'a SavedMemory),
    /// A VM exists and is of the launch that should continue.
    Wanted(&'a Machine),
    /// A VM exists that should be removed: it is of another run, of a launch that ended, or of an instance
    /// that should have no VM.
    Unwanted(&'a Machine),
}

impl<'a> Situation<'a> {
    pub(super) fn of(desired: &Desired<'_, Instance>, seen: &'a Observed) -> Self {
        let object = match desired {
            Desired::Present(object) => Some(*object),
            Desired::Absent(_) => None,
        };
        match &seen.machine {
            Some(machine) if object.is_some_and(|object| is_wanted(object, machine)) => Self::Wanted(machine),
            Some(machine) => Self::Unwanted(machine),
            None => match object.and_then(|object| seen.saved(object)) {
                Some(saved) => Self::Saved(saved),
                None if seen.memory.is_some() => Self::UselessMemory,
                None => Self::Nothing,
            },
        }
    }
}

/// True if the machine is of the run that should continue, and of a launch of that run that did not end.
pub(super) fn is_wanted(object: &Object<Instance>, machine: &Machine) -> bool {
    object.goal().run() == Some(machine.run) && !is_spent(object, machine)
}

/// True if the end of this launch is recorded and another launch of the same run follows.
pub(super) fn is_spent(object: &Object<Instance>, machine: &Machine) -> bool {
    object.status.ended_launch == Some(machine.launch)
}

/// True if this machine's launch ended, or failed to start in time; `status` records it.
pub(super) fn has_ended(object: &Object<Instance>, machine: &Machine, now: Moment) -> bool {
    let is_over = machine.guest.exit.is_some() || machine.vmm == VmmState::Shutdown;
    is_over || (machine.vmm == VmmState::Running && is_boot_overdue(object, machine, now))
}

/// True if the guest did not report in time that its program started. A guest that waits for this daemon is
/// not overdue, and neither is a guest that ran before and has not reported to this daemon yet.
pub(super) fn is_boot_overdue(object: &Object<Instance>, machine: &Machine, now: Moment) -> bool {
    let is_awaited = matches!(machine.guest.phase, GuestPhase::Silent | GuestPhase::Configured);
    is_awaited && !has_started(object, machine) && now.at() >= boot_deadline(machine, now)
}

/// True if a daemon observed the program of this launch running.
pub(super) fn has_started(object: &Object<Instance>, machine: &Machine) -> bool {
    match object.status.started_launch {
        Some(launch) => launch == machine.launch,
        // The record is from a daemon that did not number launches yet.
        None => object.status.started_at.is_some_and(|at| at >= machine.launched_at),
    }
}

/// The time until which a guest may boot. A guest that booted while no daemon listened gets a moment to report.
pub(super) fn boot_deadline(machine: &Machine, now: Moment) -> Timestamp {
    now.end(machine.launched_at, limits::GUEST_BOOT_DEADLINE).max(answer_deadline(machine, now))
}

/// The time until which silence towards this daemon does not mean that the guest is silent.
pub(super) fn answer_deadline(machine: &Machine, now: Moment) -> Timestamp {
    now.end(machine.listening_since, limits::GUEST_ANSWER_GRACE)
}

/// True if the VM lost its TAP and its hypervisor cannot connect it to the TAP that replaces the lost one: only
/// another launch gives it a network again. A VM that goes to standby is connected when it is restored.
pub(super) fn is_cut_off(object: &Object<Instance>, machine: &Machine, seen: &Observed) -> bool {
    let is_staying = object.spec.power != Power::Standby;
    machine.is_network_cut && lacks(seen, |has| has.replace_tap) && is_staying && is_up(machine)
}

/// True if the hypervisor is known not to have a capability.
pub(super) fn lacks(seen: &Observed, has: impl FnOnce(VmmCapabilities) -> bool) -> bool {
    seen.parts.capabilities.is_some_and(|declared| !has(declared))
}

/// True if a program runs whose memory could be saved as it is.
pub(super) fn is_up(machine: &Machine) -> bool {
    let guest = &machine.guest;
    machine.vmm == VmmState::Running && guest.phase == GuestPhase::Ready && guest.exit.is_none()
}

/// True if a standby that was begun can still be completed: its memory is saved, or its VM can be saved.
pub(super) fn can_stand_by(object: &Object<Instance>, seen: &Observed) -> bool {
    let is_savable = |machine: &Machine| {
        matches!(machine.vmm, VmmState::Running | VmmState::Paused)
            && machine.run == object.spec.run
            && machine.guest.exit.is_none()
            && has_started(object, machine)
    };
    seen.saved(object).is_some() || seen.machine.as_ref().is_some_and(is_savable)
}

/// True if the instance should be in standby because no client was connected, and not because a client asked.
pub(super) fn is_idle_standby(object: &Object<Instance>) -> bool {
    object.spec.power == Power::Standby && object.spec.power_by == PowerCause::Idle
}

/// True if the guest still has the identity of the instance whose memory it continues from.
pub(super) fn is_another(object: &Object<Instance>, machine: &Machine) -> bool {
    // A guest that boots receives its identity at once; only a restored memory can have another identity.
    object.spec.origin.is_some() && machine.guest.incarnation.as_ref() != Some(&incarnation(object))
}

/// Returns the name of an instance's life since its last boot or since the snapshot that it began with. A
/// pooled instance has no name of its own yet.
pub(super) fn incarnation(object: &Object<Instance>) -> String {
    let life = object.spec.origin.as_ref().map_or(StandbyNo(0), |origin| origin.standby);
    let unnamed = if object.is_pooled() { "-unnamed" } else { "" };
    format!("{}-{life}{unnamed}", object.meta.uid)
}

/// True if a pooled instance has all of its identity except the name. The guest reports it or, where the VM
/// has been paused since, the record shows it.
pub(super) fn is_prepared(object: &Object<Instance>, machine: &Machine) -> bool {
    !is_another(object, machine) || object.status.prepared_launch == Some(machine.launch)
}

/// True if no fork will take a pooled instance. Either its VM ended: its disk has changed since the memory
/// that it began with, and a fork does not ask for a boot. Or its guest cannot take over its identity.
pub(super) fn is_used_up(object: &Object<Instance>, seen: &Observed) -> bool {
    let is_alive = seen.machine.as_ref().is_some_and(|machine| machine.vmm != VmmState::Dead);
    let has_ended = object.status.adopted != StandbyNo(0)
        && object.awaits_memory().is_none()
        && seen.saved(object).is_none()
        && !is_alive;
    object.is_pooled() && (has_ended || identity_error(object, seen).is_some())
}

/// Returns the reason why a running guest cannot take over the instance's identity.
pub(super) fn identity_error<'a>(object: &Object<Instance>, seen: &'a Observed) -> Option<&'a str> {
    let is_waiting = |machine: &&Machine| is_up(machine) && is_another(object, machine);
    seen.machine.as_ref().filter(is_waiting)?.guest.identity_error.as_deref()
}

impl Observed {
    /// Returns the memory that the run continues from under the present spec. Any other memory belongs to a
    /// run that is over.
    #[must_use]
    pub fn saved(&self, object: &Object<Instance>) -> Option<&SavedMemory> {
        let is_current = |saved: &&SavedMemory| {
            (saved.run, saved.standby) == (object.spec.run, object.spec.standby)
                && object.status.ended_launch != Some(saved.launch)
        };
        match &self.memory {
            Some(Memory::Saved(saved)) => Some(saved).filter(is_current),
            Some(Memory::Incomplete) | None => None,
        }
    }

    /// Returns true if any complete memory exists, even of an older standby.
    #[must_use]
    pub fn has_saved(&self) -> bool {
        matches!(self.memory, Some(Memory::Saved(_)))
    }
}
