//! Tests of the life-cycle table, and of its properties against a model of a machine.

mod clocks;
mod cuts;
mod ends;
mod live_volumes;
mod model;
mod pending;
mod room;
mod vmm_limits;

use std::collections::BTreeMap;
use std::time::Duration;

use jiff::Timestamp;
use proptest::prelude::*;
use stead_schemas::condition::{self, Condition, ConditionStatus, ConditionType, Reason};
use stead_schemas::image::ImageConfig;
use stead_schemas::instance::{
    Allocated, Exit, Hypervisor, Instance, InstanceSpec, InstanceStatus, Pending, Power, PowerCause, Rates,
    State, VmmDeath,
};
use stead_schemas::limits;
use stead_schemas::meta::{Meta, Object};
use stead_schemas::names::{Name, Platform, Uid};
use stead_schemas::numbers::{Generation, GrantNo, LaunchId, RunNo, StandbyNo};
use stead_schemas::policy::{RestartPolicy, RestartStatus, RestartWhen};
use stead_schemas::quantity::Bytes;
use stead_schemas::snapshot::CompressionState;

use super::guest_config::machine_id;
use super::plan::plan;
use super::program::argv;
use super::status::status;
use super::{Action, Observed, Parts};
use crate::host::{DiskLimit, GuestPhase, GuestView, Machine, Memory, SavedMemory, VmmState};
use crate::runtime::{Desired, Outcome, PassEnd, Plan};

pub(super) fn uid() -> Uid {
    "tz4a98xxat96iws9zmbrgj3a".parse().expect("valid")
}

pub(super) fn at(seconds: i64) -> Timestamp {
    Timestamp::from_second(1_700_000_000 + seconds).expect("valid")
}

pub(crate) fn instance(power: Power, run: u64, ended_run: u64) -> Object<Instance> {
    let digest = format!("sha256:{}", "a".repeat(64)).parse().expect("valid");
    Object {
        meta: Meta {
            uid: uid(),
            name: Name::resource("web").expect("valid"),
            tags: BTreeMap::new(),
            generation: Generation(1),
            resource_version: 1,
            created_at: at(0),
            deletion_requested_at: None,
            finalizers: ["vm".to_owned()].into(),
            owner: None,
        },
        spec: InstanceSpec {
            image: "alpine".parse().expect("valid"),
            platform: Platform::LinuxAmd64,
            vcpus: 1,
            memory: Bytes(256 << 20),
            hotplug: Bytes(0),
            hotplugged: None,
            memory_hold: None,
            overlay: Bytes(1 << 30),
            rates: Rates::default(),
            env: BTreeMap::new(),
            entrypoint: None,
            cmd: None,
            has_network: false,
            hypervisor: Hypervisor::Qemu,
            skip_guest_agent: false,
            skip_kernel_headers: false,
            pull: 0,
            image_version: 0,
            restart: RestartPolicy::default(),
            health: None,
            health_version: 0,
            expires_at: None,
            auto_standby: None,
            hold_until: None,
            pending: Pending::default(),
            power,
            power_by: PowerCause::Client,
            power_since: at(0),
            run: RunNo(run),
            standby: StandbyNo(0),
            grant: GrantNo(1),
            is_forced: false,
            origin: None,
            snapshot_policy: None,
            compression: None,
            volumes: Vec::new(),
            allocated: Allocated { image: uid(), disk: uid(), nic: None, cid: 3 },
            egress: None,
        },
        status: InstanceStatus {
            image_digest: Some(digest),
            ended_run: RunNo(ended_run),
            ..InstanceStatus::default()
        },
    }
}

pub(crate) fn machine(vmm: VmmState, phase: GuestPhase) -> Machine {
    let pid = (vmm != VmmState::Dead).then_some(7);
    let guest = GuestView {
        phase,
        exit: None,
        is_shutdown_requested: false,
        is_exit_acknowledged: false,
        incarnation: None,
        identity_error: None,
        identity_sent: None,
        memory: None,
        memory_asked: None,
        volumes: None,
        volumes_asked: None,
        is_unresponsive: false,
    };
    Machine {
        owner: uid(),
        run: RunNo(1),
        hypervisor: Hypervisor::Qemu,
        vmm,
        pid,
        launch: LaunchId(1),
        launched_at: at(0),
        listening_since: at(0),
        is_network_cut: false,
        disk_limit: DiskLimit::Unlimited,
        returns_memory: true,
        has_unused_memory: false,
        volumes: Vec::new(),
        unsure_volume: None,
        volume_sizes: BTreeMap::new(),
        has_live_volumes: true,
        missing_walls: std::collections::BTreeSet::new(),
        has_headers: true,
        is_out_of_memory: false,
        guest,
    }
}

pub(super) fn seen(machine: Option<Machine>) -> Observed {
    let config = ImageConfig { cmd: vec!["/bin/sh".to_owned()], ..ImageConfig::default() };
    let parts = Parts { image_config: Some(config), is_disk_ready: true, ..Parts::default() };
    Observed {
        uid: uid(),
        machine,
        has_records: true,
        memory: None,
        probe: None,
        parts,
        inbound: None,
        listener: None,
        limits: None,
        short_of: None,
    }
}

pub(super) fn name(plan: &Plan<Action>) -> String {
    match plan {
        Plan::Converged => "Converged".to_owned(),
        Plan::Act(actions) => format!("{:?}", actions[0]).split(['(', ' ']).next().unwrap_or("").to_owned(),
        Plan::Record(record) => format!("Record {:?}", record.reason),
        Plan::Wait(wait) => format!("Wait {:?}", wait.reason),
        Plan::Refuse(refusal) => format!("Refuse {:?}", refusal.reason),
    }
}

#[test]
fn every_machine_state_has_its_next_step() {
    use GuestPhase::{AwaitingConfig, Configured, Exited, Ready, Silent};
    use VmmState::{Created, Dead, Paused, Running, Shutdown, Stalled};
    let up = || instance(Power::Running, 1, 0);
    let stop = || instance(Power::Stopped, 1, 0);
    let mut forced = stop();
    forced.spec.is_forced = true;
    let exit = || Some(Exit { code: Some(0), message: String::new(), is_boot_failure: false });
    let exited = |is_exit_acknowledged| {
        let mut machine = machine(Running, Exited);
        machine.guest.exit = exit();
        machine.guest.is_exit_acknowledged = is_exit_acknowledged;
        machine
    };
    let dead_recorded = || {
        let mut object = up();
        object.status.vmm_deaths = 1;
        object.status.last_death =
            Some(VmmDeath { launch: LaunchId(1), noticed_at: at(1), is_out_of_memory: false });
        object
    };
    let was_up = |mut object: Object<Instance>| {
        (object.status.started_at, object.status.started_launch) = (Some(at(1)), Some(LaunchId(1)));
        object
    };
    let table = [
        (up(), None, "Launch"),
        (up(), Some(machine(Created, Silent)), "Kill"),
        (up(), Some(machine(Paused, Ready)), "Resume"),
        (up(), Some(machine(Stalled(Bytes(1 << 20)), Ready)), "Wait DiskFull"),
        (up(), Some(machine(Stalled(limits::DISK_ROOM_MIN), Ready)), "Resume"),
        (up(), Some(machine(Running, Silent)), "Wait WaitingForGuest"),
        (up(), Some(machine(Running, AwaitingConfig)), "Configure"),
        (up(), Some(machine(Running, Configured)), "Wait WaitingForGuest"),
        (up(), Some(machine(Running, Ready)), "Converged"),
        (up(), Some(exited(false)), "Record ProgramExited"),
        (up(), Some(machine(Shutdown, Ready)), "Record ProgramExited"),
        (up(), Some(machine(Dead, Ready)), "Record VmmDied"),
        (dead_recorded(), Some(machine(Dead, Ready)), "Release"),
        (up(), Some(machine(VmmState::Unreachable("no answer".to_owned()), Ready)), "Wait ObservationFailed"),
        (instance(Power::Running, 1, 1), Some(exited(false)), "AcknowledgeExit"),
        (instance(Power::Running, 1, 1), Some(exited(true)), "Wait Converging"),
        (instance(Power::Running, 1, 1), Some(machine(Shutdown, Ready)), "Kill"),
        (instance(Power::Running, 1, 1), None, "Converged"),
        (stop(), Some(machine(Running, Ready)), "Shutdown"),
        (stop(), Some(machine(Running, Silent)), "Kill"),
        (stop(), Some(machine(Running, AwaitingConfig)), "Kill"),
        // The guest's system runs, and has started another agent.
        (was_up(up()), Some(machine(Running, AwaitingConfig)), "Configure"),
        (was_up(stop()), Some(machine(Running, AwaitingConfig)), "Configure"),
        (was_up(stop()), Some(machine(Running, Configured)), "Shutdown"),
        // Data that the guest has not written yet is written before the VM ends.
        (stop(), Some(machine(Paused, Ready)), "Resume"),
        (stop(), Some(machine(Stalled(Bytes(0)), Ready)), "Wait DiskFull"),
        (stop(), Some(machine(Stalled(limits::DISK_ROOM_MIN), Ready)), "Resume"),
        (forced, Some(machine(Stalled(limits::DISK_ROOM_MIN), Ready)), "Kill"),
        (stop(), Some(exited(false)), "Record ProgramExited"),
        (stop(), Some(machine(Dead, Ready)), "Release"),
        (stop(), None, "Converged"),
        // A machine of an earlier run is removed before the wanted run starts.
        (instance(Power::Running, 2, 1), Some(machine(Shutdown, Ready)), "Kill"),
        (instance(Power::Running, 2, 1), Some(machine(Dead, Ready)), "Release"),
    ];
    for (object, machine, expected) in table {
        let plan = plan(&Desired::Present(&object), &seen(machine.clone()), at(2).into());
        assert_eq!(name(&plan), expected, "{:?} {:?}", object.spec.power, machine);
    }
}

#[test]
fn every_step_to_standby_and_back_has_its_next_one() {
    use GuestPhase::{Ready, Silent};
    use VmmState::{Created, Dead, Paused, Running};
    let of = |power, generation| {
        let mut object = instance(power, 1, 0);
        object.spec.standby = generation;
        (object.status.started_at, object.status.started_launch) = (Some(at(1)), Some(LaunchId(1)));
        object
    };
    let down = || of(Power::Standby, StandbyNo(1));
    let back = || of(Power::Running, StandbyNo(1));
    let recorded = || {
        let mut object = down();
        object.status.state = State::Standby;
        object
    };
    // The program was not observed running yet: if the VM were paused before that, it would be resumed for
    // ever.
    let fresh = || {
        let mut object = down();
        (object.status.started_at, object.status.started_launch) = (None, None);
        object
    };
    let saved = |standby| {
        Some(Memory::Saved(SavedMemory {
            standby: StandbyNo(standby),
            run: RunNo(1),
            launch: LaunchId(1),
            compression_state: CompressionState::Plain,
            volumes: Vec::new(),
        }))
    };
    let incomplete = || Some(Memory::Incomplete);
    let table = [
        (down(), Some(machine(Running, Ready)), None, "Pause"),
        (fresh(), Some(machine(Running, Ready)), None, "Record Converging"),
        (fresh(), Some(machine(Paused, Ready)), None, "Resume"),
        (down(), Some(machine(Running, Ready)), incomplete(), "DiscardMemory"),
        (down(), Some(machine(Paused, Ready)), None, "Save"),
        (down(), Some(machine(Paused, Ready)), incomplete(), "Save"),
        (down(), Some(machine(Paused, Ready)), saved(1), "Kill"),
        (down(), Some(machine(Dead, Ready)), saved(1), "Record Converging"),
        (recorded(), Some(machine(Dead, Ready)), saved(1), "Release"),
        (back(), Some(machine(Dead, Ready)), saved(1), "Release"),
        (down(), None, saved(1), "Converged"),
        (down(), None, incomplete(), "DiscardMemory"),
        // The VMM died before its memory was saved: the instance boots, and is saved then.
        (down(), None, None, "Launch"),
        (back(), None, saved(1), "Restore"),
        (back(), Some(machine(Created, Silent)), saved(1), "Kill"),
        (back(), Some(machine(Paused, Silent)), saved(1), "DiscardMemory"),
        (back(), Some(machine(Paused, Silent)), None, "Resume"),
        (back(), Some(machine(Running, Ready)), incomplete(), "DiscardMemory"),
        // A VM never continues from the memory of an earlier standby.
        (of(Power::Running, StandbyNo(2)), None, saved(1), "DiscardMemory"),
        (of(Power::Standby, StandbyNo(2)), Some(machine(Paused, Ready)), saved(1), "DiscardMemory"),
        (back(), Some(machine(Running, Ready)), saved(1), "DiscardMemory"),
        (of(Power::Stopped, StandbyNo(1)), None, saved(1), "DiscardMemory"),
    ];
    for (object, machine, memory, expected) in table {
        let mut seen = seen(machine);
        seen.memory = memory;
        let plan = plan(&Desired::Present(&object), &seen, at(2).into());
        assert_eq!(name(&plan), expected, "{:?} {seen:?}", object.spec.power);
    }
}

#[test]
fn deletion_is_a_plan_toward_nothing() {
    let mut object = instance(Power::Running, 1, 0);
    object.meta.deletion_requested_at = Some(at(100));
    let deleting =
        |machine, now| name(&plan(&Desired::Absent(Some(&object)), &seen(machine), at(now).into()));
    let running = || machine(VmmState::Running, GuestPhase::Ready);
    assert_eq!(deleting(Some(running()), 101), "Shutdown");
    assert_eq!(deleting(Some(running()), 110), "Kill", "the grace is over");
    assert_eq!(deleting(Some(machine(VmmState::Dead, GuestPhase::Ready)), 101), "Release");
    assert_eq!(deleting(None, 101), "DiscardRecords");
    let orphan = |machine| name(&plan(&Desired::Absent(None), &seen(machine), at(1).into()));
    assert_eq!(orphan(Some(running())), "Kill");
}

#[test]
fn a_launch_waits_for_each_part_and_names_it() {
    let object = instance(Power::Running, 1, 0);
    let waits = |seen: &Observed| name(&plan(&Desired::Present(&object), seen, at(1).into()));
    let mut without = seen(None);
    without.parts.image_config = None;
    without.parts.image_trouble = Some((Reason::ImageNotFound, "gone".to_owned()));
    assert_eq!(waits(&without), "Wait ImageNotFound");
    let mut without = seen(None);
    without.parts.is_disk_ready = false;
    assert_eq!(waits(&without), "Wait WaitingForDisk");
    without.parts.disk_trouble = Some("no room".to_owned());
    let reported = plan(&Desired::Present(&object), &without, at(1).into());
    assert!(
        matches!(&reported, Plan::Wait(wait) if wait.message.ends_with("being made: no room")),
        "{reported:?}"
    );
    let mut without = seen(None);
    without.parts.image_config = Some(ImageConfig::default());
    assert_eq!(waits(&without), "Refuse ImageInvalid");
    let mut networked = object.clone();
    networked.spec.has_network = true;
    assert_eq!(
        name(&plan(&Desired::Present(&networked), &seen(None), at(1).into())),
        "Wait WaitingForNetwork"
    );
}

#[test]
fn repeated_deaths_delay_the_next_start_and_the_first_does_not() {
    let mut object = instance(Power::Running, 1, 0);
    let mut planned = |deaths, now| {
        object.status.vmm_deaths = deaths;
        object.status.last_death =
            Some(VmmDeath { launch: LaunchId(1), noticed_at: at(10), is_out_of_memory: false });
        name(&plan(&Desired::Present(&object), &seen(None), at(now).into()))
    };
    assert_eq!(planned(1, 10), "Launch");
    assert_eq!(planned(2, 10), "Wait VmmDied");
    assert_eq!(planned(2, 11), "Launch");
    assert_eq!(planned(5, 17), "Wait VmmDied");
    assert_eq!(planned(5, 18), "Launch");
    assert_eq!(planned(4_000_000_000, 310), "Launch", "the delay has a ceiling");
}

#[test]
fn entrypoint_and_cmd_override_as_docker_has_it() {
    let words = |text: &str| text.split_whitespace().map(ToOwned::to_owned).collect::<Vec<_>>();
    let image = ImageConfig { entrypoint: words("/entry"), cmd: words("a b"), ..ImageConfig::default() };
    let mut spec = instance(Power::Running, 1, 0).spec;
    let mut run = |entrypoint: Option<&str>, cmd: Option<&str>| {
        spec.entrypoint = entrypoint.map(words);
        spec.cmd = cmd.map(words);
        argv(&spec, &image).join(" ")
    };
    assert_eq!(run(None, None), "/entry a b");
    assert_eq!(run(None, Some("c")), "/entry c");
    assert_eq!(run(Some("/other"), None), "/other");
    assert_eq!(run(Some("/other"), Some("c")), "/other c");
    assert_eq!(run(Some(""), Some("c")), "c");
}

#[test]
fn an_end_is_recorded_once_with_its_cause() {
    let end = PassEnd { now: at(5).into(), outcome: Outcome::Converged };
    let mut exited = machine(VmmState::Running, GuestPhase::Exited);
    exited.guest.exit = Some(Exit { code: Some(3), message: "exited".to_owned(), is_boot_failure: false });
    let first = status(&instance(Power::Running, 1, 0), Some(&seen(Some(exited))), &end);
    assert_eq!((first.ended_run, first.exit.as_ref().and_then(|exit| exit.code)), (RunNo(1), Some(3)));
    let object = Object { status: first.clone(), ..instance(Power::Running, 1, 0) };
    let second = status(&object, Some(&seen(None)), &end);
    assert_eq!((second.exit, second.state), (first.exit, State::Stopped));
    let deadline = i64::try_from(limits::GUEST_BOOT_DEADLINE.as_secs()).expect("short");
    let late = PassEnd { now: at(deadline + 1).into(), outcome: Outcome::Converged };
    let silent = Some(seen(Some(machine(VmmState::Running, GuestPhase::Silent))));
    let timed_out = status(&instance(Power::Running, 1, 0), silent.as_ref(), &late);
    assert!(timed_out.exit.is_some_and(|exit| exit.is_boot_failure));
}

#[test]
fn unknown_is_reported_only_while_nothing_can_be_observed_and_with_its_error() {
    let outcome = Outcome::Failed {
        kind: crate::host::HostErrorKind::Transient,
        message: "cannot inspect".to_owned(),
        attempt: 1,
    };
    let end = PassEnd { now: at(5).into(), outcome };
    let object = instance(Power::Running, 1, 0);
    let blind = status(&object, None, &end);
    assert_eq!((blind.state, blind.state_error.as_deref()), (State::Unknown, Some("cannot inspect")));
    let sighted = status(&Object { status: blind, ..object }, Some(&seen(None)), &end);
    assert_eq!((sighted.state, sighted.state_error), (State::Created, None));
}
