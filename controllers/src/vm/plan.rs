//! From wish and observation to the next steps; the life-cycle table of a VM.

use jiff::Timestamp;
use stead_schemas::condition::{self, ConditionStatus, ConditionType, Reason};
use stead_schemas::guest;
use stead_schemas::image::ImageConfig;
use stead_schemas::instance::{Instance, InstanceSpec, Power, PowerCause, Secret, State};
use stead_schemas::limits;
use stead_schemas::meta::Object;
use stead_schemas::names::Uid;
use stead_schemas::numbers::{LaunchId, RunNo};
use stead_schemas::policy::RestartReason;
use stead_schemas::quantity::Bytes;
use stead_schemas::snapshot::PackingState;

use super::becoming::{
    incarnation, is_another, is_prepared, is_used_up, plan_adopt, plan_assume, plan_used_up,
};
use super::restarts::Follows;
use super::{Action, Observed, doors, failed_forks, health, idle, restarts, volumes};
use crate::host::{GuestPhase, LaunchPlan, Machine, VmmState};
use crate::runtime::{Desired, Moment, Plan, Record, Refusal, Wait, after};

pub(super) fn plan(desired: &Desired<'_, Instance>, seen: &Observed, now: Moment) -> Plan<Action> {
    let planned = match health::plan_probe(desired, seen, now) {
        Some(step) => act(step),
        None => plan_machine(desired, seen, now),
    };
    doors::leave_first(desired, seen, planned)
}

fn plan_machine(desired: &Desired<'_, Instance>, seen: &Observed, now: Moment) -> Plan<Action> {
    match desired {
        Desired::Absent(object) => match &seen.machine {
            Some(machine) => plan_down(*object, machine, seen, now),
            None if seen.memory.is_some() => act(Action::DiscardMemory(seen.uid.clone())),
            None if seen.has_records => act(Action::DiscardRecords(seen.uid.clone())),
            None => Plan::Converged,
        },
        Desired::Present(object) if object.spec.expires_at.is_some_and(|at| at <= now.at()) => {
            act(Action::Expire(seen.uid.clone()))
        }
        Desired::Present(object) if failed_forks::has_failed(object, seen) => {
            failed_forks::plan_failed(object, seen, now)
        }
        Desired::Present(object) if is_used_up(object, seen) => plan_used_up(object, seen, now),
        Desired::Present(object) if idle::is_void(object, seen) => idle::wake(object, PowerCause::Client),
        Desired::Present(object) => match (&seen.machine, wanted_run(object)) {
            (None, Some(_)) if object.awaits_memory().is_some() => plan_adopt(object, seen),
            (None, Some(_)) if seen.saved(object).is_some() && object.spec.power == Power::Standby => {
                match doors::plan_asleep(object, seen) {
                    Plan::Converged => plan_kept(object, seen, now),
                    planned => planned,
                }
            }
            (None, Some(run)) if seen.saved(object).is_some() || seen.memory.is_none() => {
                plan_launch(object, seen, run, now)
            }
            // Of a run that is over, or of a save that came to nothing.
            (None, _) if seen.memory.is_some() => act(Action::DiscardMemory(seen.uid.clone())),
            (None, _) => Plan::Converged,
            (Some(machine), Some(run)) if machine.run == run && !is_spent(object, machine) => {
                plan_up(object, machine, seen, now)
            }
            (Some(machine), _) => plan_down(Some(object), machine, seen, now),
        },
    }
}

/// The run that shall be going on, or be kept in standby; `None` when the wish is to be down, or the
/// run has ended.
#[must_use]
pub fn wanted_run(object: &Object<Instance>) -> Option<RunNo> {
    let InstanceSpec { power, run, .. } = &object.spec;
    let is_wanted = match power {
        // What is to be saved has to run first.
        Power::Running | Power::Standby | Power::Warm => *run > object.status.ended_run,
        Power::Stopped => false,
    };
    (is_wanted && !object.meta.is_deleting()).then_some(*run)
}

/// The end of this launch was recorded, and another launch of the same run follows.
pub(super) fn is_spent(object: &Object<Instance>, machine: &Machine) -> bool {
    object.status.ended_launch == Some(machine.launch)
}

/// How this machine's run ended, as far as it can be told now; what `status` records.
pub(super) fn has_ended(object: &Object<Instance>, machine: &Machine, now: Moment) -> bool {
    let is_over = machine.guest.exit.is_some() || machine.vmm == VmmState::Shutdown;
    is_over || (machine.vmm == VmmState::Running && is_boot_overdue(object, machine, now))
}

/// A guest that waits for us is not overdue, nor is one that ran before and is not heard yet by
/// this daemon.
pub(super) fn is_boot_overdue(object: &Object<Instance>, machine: &Machine, now: Moment) -> bool {
    let is_awaited = matches!(machine.guest.phase, GuestPhase::Silent | GuestPhase::Configured);
    is_awaited && !has_started(object, machine) && now.at() >= boot_deadline(machine, now)
}

/// The program of this launch was seen running once, by this daemon or an earlier one.
pub(super) fn has_started(object: &Object<Instance>, machine: &Machine) -> bool {
    match object.status.started_launch {
        Some(launch) => launch == machine.launch,
        // Recorded by a daemon that did not number launches yet.
        None => object.status.started_at.is_some_and(|at| at >= machine.launched_at),
    }
}

/// A guest that booted while no daemon listened gets a moment to say so.
fn boot_deadline(machine: &Machine, now: Moment) -> Timestamp {
    now.end(machine.launched_at, limits::GUEST_BOOT_DEADLINE).max(heard_by(machine, now))
}

/// Until when it says nothing of a guest that this daemon has not heard it.
pub(super) fn heard_by(machine: &Machine, now: Moment) -> Timestamp {
    now.end(machine.listening_since, limits::GUEST_HEARD_GRACE)
}

/// Everything is there, or the first thing that is missing.
fn plan_launch(object: &Object<Instance>, seen: &Observed, run: RunNo, now: Moment) -> Plan<Action> {
    let parts = &seen.parts;
    let Some(digest) = &object.status.image_digest else {
        // Pinned by the status of this pass.
        return match &parts.image_trouble {
            Some((reason, message)) => wait(*reason, message.clone(), None),
            None => record(Reason::WaitingForImage, "recording the image's content"),
        };
    };
    let Some(config) = &parts.image_config else {
        let (reason, message) = parts.image_trouble.clone().unwrap_or((
            Reason::WaitingForImage,
            format!("the content {digest} of image {} is not on this host", object.spec.image),
        ));
        return wait(reason, message, None);
    };
    if argv(&object.spec, config).is_empty() {
        let message = "neither the image nor the instance names a program: give entrypoint or cmd".to_owned();
        return Plan::Refuse(Refusal { reason: Reason::ImageInvalid, message });
    }
    if !parts.is_disk_ready {
        return wait_for_disk(seen, "the root overlay is being made");
    }
    if let Some(why) = &parts.volumes.trouble {
        return wait(Reason::WaitingForDisk, why.clone(), None);
    }
    if object.spec.has_network && !parts.port.as_ref().is_some_and(|port| port.is_ready) {
        let trouble = parts.port.as_ref().and_then(|port| port.trouble.clone());
        let message = trouble.unwrap_or_else(|| "the network port is being made".to_owned());
        return wait(Reason::WaitingForNetwork, message, None);
    }
    if let Some(until) = restarts::next_attempt(&object.status, now).filter(|&until| now.at() < until) {
        let (reason, message) = match object.status.restart.last_reason {
            None => (Reason::ProgramExited, "the program ended; it is started again after a delay"),
            Some(RestartReason::HealthCheckFailed) => (
                Reason::HealthCheckFailed,
                "the health check failed; the program is started again after a delay",
            ),
        };
        return wait(reason, message, Some(until));
    }
    if let Some(until) = relaunch_at(object, now).filter(|&until| now.at() < until) {
        return wait(Reason::VmmDied, "the VMM died; it is started again after a delay", Some(until));
    }
    let saved = seen.saved(object);
    let plan = Box::new(LaunchPlan {
        owner: object.meta.uid.clone(),
        run,
        launch: saved.map_or(object.status.launch.next(), |saved| saved.launch),
        hypervisor: object.spec.hypervisor,
        vcpus: object.spec.vcpus,
        memory: object.spec.memory,
        rootfs: digest.clone(),
        overlay: object.spec.allocated.disk.clone(),
        cid: object.spec.allocated.cid,
        network: parts.port.as_ref().map(|port| port.card.clone()),
        wants_headers: !object.spec.skip_kernel_headers,
        volumes: parts.volumes.disks.clone(),
    });
    act(if saved.is_some() { Action::Restore(plan) } else { Action::Launch(plan) })
}

/// In standby: compressed when that is due.
fn plan_kept(object: &Object<Instance>, seen: &Observed, now: Moment) -> Plan<Action> {
    let packing = seen.saved(object).map(|saved| saved.packing);
    match (object.spec.compression, packing) {
        (Some(wish), Some(PackingState::Plain)) if now.at() >= wish.not_before => {
            act(Action::Compress(object.meta.uid.clone(), wish.how))
        }
        _ => Plan::Converged,
    }
}

/// A machine of the wanted run: bring it to a running program, or record how it ended.
fn plan_up(object: &Object<Instance>, machine: &Machine, seen: &Observed, now: Moment) -> Plan<Action> {
    let uid = || object.meta.uid.clone();
    match &machine.vmm {
        // A crash between spawn and start: nothing ran yet, so nothing is lost by a fresh one.
        VmmState::Created => act(Action::Kill(uid())),
        VmmState::Paused => plan_paused(object, machine, seen),
        VmmState::Stalled(free) => plan_stalled(object, *free, None, now),
        // Whatever is kept is not of a VM that runs.
        VmmState::Running if seen.memory.is_some() => act(Action::DiscardMemory(uid())),
        VmmState::Dead if seen.saved(object).is_some() && object.spec.power == Power::Standby => {
            plan_just_asleep(object, seen)
        }
        VmmState::Dead if seen.saved(object).is_some() => act(Action::Release(uid())),
        VmmState::Dead => match &object.status.last_death {
            Some(death) if death.launch == machine.launch => act(Action::Release(uid())),
            _ => record(Reason::VmmDied, "recording the death of the VMM"),
        },
        VmmState::Unreachable(_) => plan_unreachable(object, machine, now),
        _ if has_ended(object, machine, now) => record(Reason::ProgramExited, "recording the program's end"),
        VmmState::Shutdown => act(Action::Kill(uid())),
        VmmState::Running => match machine.guest.phase {
            GuestPhase::Ready if machine.is_network_cut => plan_reconnect(object, seen),
            GuestPhase::Ready if is_another(object, machine) => plan_assume(object, machine, seen),
            GuestPhase::Ready if object.is_pooled() => act(Action::Pause(uid())),
            // Paused before that, it would be resumed to be seen running.
            GuestPhase::Ready if object.spec.power == Power::Standby && !has_started(object, machine) => {
                record(Reason::Converging, "recording that the program started")
            }
            GuestPhase::Ready if object.spec.power == Power::Standby => {
                let disturbance = idle::disturbance(object, seen);
                disturbance.map_or_else(|| act(Action::Pause(uid())), |by| idle::wake(object, by))
            }
            GuestPhase::Ready if doors::is_knocked(seen) => act(Action::HandOver(uid())),
            GuestPhase::Ready => match health::failed(object, seen, now) {
                Some((_, Follows::Restart { .. })) => {
                    record(Reason::HealthCheckFailed, "recording that the health check failed")
                }
                Some((_, Follows::Nothing | Follows::NoMore)) | None => idle::plan_running(object, seen, now),
            },
            GuestPhase::AwaitingConfig => plan_configure(object, seen),
            _ if has_started(object, machine) => {
                let until = Some(heard_by(machine, now)).filter(|&until| now.at() < until);
                wait(Reason::WaitingForGuest, "the guest is not heard yet", until)
            }
            GuestPhase::Silent | GuestPhase::Configured | GuestPhase::Exited => {
                wait(Reason::WaitingForGuest, "the guest is booting", Some(boot_deadline(machine, now)))
            }
        },
    }
}

/// Its door is watched and its state told at once: what the VMM left behind is in nobody's way.
fn plan_just_asleep(object: &Object<Instance>, seen: &Observed) -> Plan<Action> {
    match doors::plan_asleep(object, seen) {
        Plan::Converged if object.status.state != State::Standby => {
            record(Reason::Converging, "recording that it is in standby")
        }
        Plan::Converged => act(Action::Release(object.meta.uid.clone())),
        planned => planned,
    }
}

/// A guest that boots, or an agent that its system began again.
fn plan_configure(object: &Object<Instance>, seen: &Observed) -> Plan<Action> {
    match guest_config(object, seen) {
        Some(config) => act(Action::Configure(object.meta.uid.clone(), Box::new(config))),
        None => wait(Reason::WaitingForImage, "the image's parameters are not readable", None),
    }
}

pub(super) fn guest_network(seen: &Observed) -> Option<guest::NetworkConfig> {
    seen.parts.port.as_ref().map(|port| guest::NetworkConfig {
        address: port.card.address,
        prefix: port.prefix,
        mac: Some(port.card.mac),
        gateway: port.gateway,
        dns: port.dns.clone(),
        resolver: port.resolver.clone(),
        mtu: port.mtu,
    })
}

/// Between running and standby, in either direction. Whoever paused it: a wish to run resumes it.
fn plan_paused(object: &Object<Instance>, machine: &Machine, seen: &Observed) -> Plan<Action> {
    let uid = || object.meta.uid.clone();
    let is_standby = object.spec.power == Power::Standby;
    // Until its process goes a standby can be undone, and whoever came in between is answered.
    if let Some(by) = idle::disturbance(object, seen) {
        return idle::wake(object, by);
    }
    match seen.saved(object) {
        Some(_) if is_standby => act(Action::Kill(uid())),
        _ if seen.has_saved() => act(Action::DiscardMemory(uid())),
        // An end is recorded, not saved.
        _ if is_standby && machine.guest.exit.is_none() && has_started(object, machine) => {
            act(Action::Save(uid(), object.spec.standby))
        }
        // Held until it is taken.
        _ if object.is_pooled() && is_prepared(object, machine) => Plan::Converged,
        _ => act(Action::Resume(uid())),
    }
}

/// Its write is done again when there is room, or given up at the end of its grace.
fn plan_stalled(
    object: &Object<Instance>,
    free: Bytes,
    grace_end: Option<Timestamp>,
    now: Moment,
) -> Plan<Action> {
    if free >= limits::DISK_ROOM_MIN {
        return act(Action::Resume(object.meta.uid.clone()));
    }
    let look = now.after(limits::DISK_FULL_RETRY);
    let message = format!("the guest waits with a write to its disk: {free} are free on the host's");
    wait(Reason::DiskFull, message, Some(grace_end.map_or(look, |end| end.min(look))))
}

/// The TAP went under a running guest: its card is plugged into the one that takes its place.
fn plan_reconnect(object: &Object<Instance>, seen: &Observed) -> Plan<Action> {
    match &seen.parts.port {
        Some(port) if port.is_ready => act(Action::Reconnect(object.meta.uid.clone(), port.card.tap.clone())),
        _ => wait(Reason::WaitingForNetwork, "the network port is being made again", None),
    }
}

/// A machine that shall not be: the guest gets its grace, then the process ends, then its traces.
fn plan_down(
    object: Option<&Object<Instance>>,
    machine: &Machine,
    seen: &Observed,
    now: Moment,
) -> Plan<Action> {
    let uid = || machine.owner.clone();
    match &machine.vmm {
        VmmState::Dead => act(Action::Release(uid())),
        // What waits in the guest's memory is written only when it runs on; its grace counts all the same.
        VmmState::Paused if object.is_some_and(|object| !is_grace_over(object, now)) => {
            match seen.has_saved() {
                true => act(Action::DiscardMemory(uid())),
                false => act(Action::Resume(uid())),
            }
        }
        VmmState::Stalled(free) => match object.filter(|object| !is_grace_over(object, now)) {
            Some(object) => plan_stalled(object, *free, Some(grace_end(object, now)), now),
            None => act(Action::Kill(uid())),
        },
        VmmState::Created | VmmState::Shutdown | VmmState::Paused | VmmState::Unreachable(_) => {
            act(Action::Kill(uid()))
        }
        VmmState::Running => match object {
            // No record, so no one's program: an orphan of a lost store.
            None => act(Action::Kill(uid())),
            Some(object) => plan_graceful(object, machine, seen, now),
        },
    }
}

fn plan_graceful(object: &Object<Instance>, machine: &Machine, seen: &Observed, now: Moment) -> Plan<Action> {
    let uid = || machine.owner.clone();
    let deadline = grace_end(object, now);
    let guest = &machine.guest;
    if is_grace_over(object, now) {
        return act(Action::Kill(uid()));
    }
    match (guest.phase, has_started(object, machine)) {
        (GuestPhase::Silent, true) => {
            return wait(Reason::Converging, "the guest is not heard yet", Some(deadline));
        }
        // To be asked to end it has to know whom to believe.
        (GuestPhase::AwaitingConfig, true) => return plan_configure(object, seen),
        (GuestPhase::Silent | GuestPhase::AwaitingConfig, false) => return act(Action::Kill(uid())),
        (GuestPhase::Configured | GuestPhase::Ready | GuestPhase::Exited, _) => {}
    }
    if guest.exit.is_some() {
        let is_recorded =
            object.meta.is_deleting() || object.status.ended_run >= machine.run || is_spent(object, machine);
        return match (is_recorded, guest.is_exit_acknowledged) {
            (false, _) => record(Reason::ProgramExited, "recording the program's end"),
            (true, false) => act(Action::AcknowledgeExit(uid())),
            (true, true) => wait(Reason::Converging, "the guest is powering off", Some(deadline)),
        };
    }
    if guest.is_shutdown_requested {
        return wait(Reason::Converging, "the program was asked to end", Some(deadline));
    }
    act(Action::Shutdown(uid()))
}

/// Until when the guest may take its time.
fn grace_end(object: &Object<Instance>, now: Moment) -> Timestamp {
    let asked_at = now.since(object.meta.deletion_requested_at.unwrap_or(object.spec.power_since));
    // Twice the grace: the guest's own timer ends the program first, and its end still arrives.
    // A program that ends by itself has its guest's power-off still before it, however long ago
    // the last wish was: what it wrote is on the disk only then.
    let ready = condition::find(&object.status.conditions, ConditionType::Ready);
    let down_since = ready.filter(|ready| ready.status != ConditionStatus::True);
    let since = down_since.map_or(asked_at, |ready| asked_at.max(now.since(ready.last_transition_time)));
    let since = object.status.ended_launch_at.map_or(since, |ended_at| since.max(now.since(ended_at)));
    after(since, limits::SHUTDOWN_GRACE * 2)
}

fn is_grace_over(object: &Object<Instance>, now: Moment) -> bool {
    object.spec.is_forced || now.at() >= grace_end(object, now)
}

fn plan_unreachable(object: &Object<Instance>, machine: &Machine, now: Moment) -> Plan<Action> {
    let since = object.status.unreachable_since.unwrap_or(now.at());
    let until = now.end(since, limits::UNREACHABLE_GRACE);
    if now.at() >= until {
        return act(Action::Kill(machine.owner.clone()));
    }
    wait(Reason::ObservationFailed, "the VMM does not answer; it is ended after a grace", Some(until))
}

/// When a VMM that died may be started again: at once after the first death, then with doubling
/// delays.
fn relaunch_at(object: &Object<Instance>, now: Moment) -> Option<Timestamp> {
    let death = object.status.last_death?;
    let doublings = object.status.vmm_deaths.checked_sub(2)?.min(16);
    let delay = limits::RELAUNCH_DELAY_FIRST.saturating_mul(1 << doublings).min(limits::RELAUNCH_DELAY_MAX);
    Some(now.end(death.noticed_at, delay))
}

/// Docker's rule: an entrypoint of the instance replaces the image's entrypoint and its cmd.
pub(super) fn argv(spec: &InstanceSpec, image: &ImageConfig) -> Vec<String> {
    let (entrypoint, default_cmd) = match &spec.entrypoint {
        Some(entrypoint) => (entrypoint, &[][..]),
        None => (&image.entrypoint, image.cmd.as_slice()),
    };
    let cmd = spec.cmd.as_deref().unwrap_or(default_cmd);
    entrypoint.iter().chain(cmd).cloned().collect()
}

fn guest_config(object: &Object<Instance>, seen: &Observed) -> Option<guest::Config> {
    let (image, machine) = (seen.parts.image_config.as_ref()?, seen.machine.as_ref()?);
    let of_image = image.env.iter().map(|(key, value)| (key.clone(), Secret(value.clone())));
    let of_instance = object.spec.env.iter().map(|(key, value)| (key.clone(), value.clone()));
    Some(guest::Config {
        hostname: object.meta.name.to_string(),
        machine_id: machine_id(&object.meta.uid, machine.launch),
        instance: object.meta.uid.to_string(),
        argv: argv(&object.spec, image),
        env: of_image.chain(of_instance).collect(),
        working_dir: image.working_dir.clone(),
        user: image.user.clone(),
        stop_signal: image.stop_signal.clone(),
        shutdown_grace_millis: u64::try_from(limits::SHUTDOWN_GRACE.as_millis()).unwrap_or(u64::MAX),
        network: guest_network(seen),
        volumes: volumes::guest_mounts(&object.spec),
        has_agent: !object.spec.skip_guest_agent,
        incarnation: incarnation(object),
    })
}

/// The machine id of a launch: the uid as a number, which it is in base 36 (24 digits are below 2^124),
/// with the number of the launch in its low bits. No launch of an instance has the id of another.
pub(super) fn machine_id(uid: &Uid, launch: LaunchId) -> String {
    let number = uid.as_str().bytes().fold(0u128, |number, byte| {
        let digit = char::from(byte).to_digit(36).unwrap_or(0);
        number.wrapping_mul(36).wrapping_add(u128::from(digit))
    });
    format!("{:032x}", number ^ u128::from(launch.0))
}

/// With the disk's own word, if it has one.
pub(super) fn wait_for_disk(seen: &Observed, what: &str) -> Plan<Action> {
    let message = match &seen.parts.disk_trouble {
        Some(trouble) => format!("{what}: {trouble}"),
        None => what.to_owned(),
    };
    wait(Reason::WaitingForDisk, message, None)
}

pub(super) fn act(action: Action) -> Plan<Action> {
    Plan::Act(vec![action])
}

pub(super) fn record(reason: Reason, what: &'static str) -> Plan<Action> {
    Plan::Record(Record { reason, what })
}

pub(super) fn wait(reason: Reason, message: impl Into<String>, until: Option<Timestamp>) -> Plan<Action> {
    Plan::Wait(Wait { reason, message: message.into(), until })
}
