//! The life-cycle table as a table, and its properties against a model of a machine.

use std::collections::BTreeMap;
use std::time::Duration;

use jiff::Timestamp;
use proptest::prelude::*;
use stead_schemas::condition::{self, Condition, ConditionStatus, ConditionType, Reason};
use stead_schemas::image::ImageConfig;
use stead_schemas::instance::{
    Allocated, Exit, Hypervisor, Instance, InstanceSpec, InstanceStatus, Power, PowerCause, State, VmmDeath,
};
use stead_schemas::limits;
use stead_schemas::meta::{Meta, Object};
use stead_schemas::names::{Name, Platform, Uid};
use stead_schemas::policy::{RestartPolicy, RestartStatus, RestartWhen};
use stead_schemas::quantity::Bytes;
use stead_schemas::snapshot::PackingState;

use super::plan::{argv, machine_id, plan};
use super::status::status;
use super::{Action, Observed, Parts};
use crate::host::{GuestPhase, GuestView, Machine, Memory, SavedMemory, VmmState};
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
            generation: 1,
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
            overlay: Bytes(1 << 30),
            env: BTreeMap::new(),
            entrypoint: None,
            cmd: None,
            has_network: false,
            hypervisor: Hypervisor::Qemu,
            skip_guest_agent: false,
            skip_kernel_headers: false,
            pull: 0,
            restart: RestartPolicy::default(),
            health: None,
            health_version: 0,
            expires_at: None,
            auto_standby: None,
            hold_until: None,
            power,
            power_by: PowerCause::Client,
            power_since: at(0),
            run,
            standby: 0,
            is_forced: false,
            origin: None,
            snapshot_policy: None,
            compression: None,
            volumes: Vec::new(),
            allocated: Allocated { image: uid(), disk: uid(), port: None, cid: 3 },
        },
        status: InstanceStatus { image_digest: Some(digest), ended_run, ..InstanceStatus::default() },
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
        assume_error: None,
        identity_told: None,
        is_unresponsive: false,
    };
    Machine {
        owner: uid(),
        run: 1,
        hypervisor: Hypervisor::Qemu,
        vmm,
        pid,
        launched_at: at(0),
        listening_since: at(0),
        is_network_cut: false,
        has_headers: true,
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
        door: None,
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
        object.status.last_death = Some(VmmDeath { launched_at: at(0), noticed_at: at(1) });
        object
    };
    let was_up = |mut object: Object<Instance>| {
        object.status.started_at = Some(at(1));
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
        // Its system runs, and has begun another agent.
        (was_up(up()), Some(machine(Running, AwaitingConfig)), "Configure"),
        (was_up(stop()), Some(machine(Running, AwaitingConfig)), "Configure"),
        (was_up(stop()), Some(machine(Running, Configured)), "Shutdown"),
        // What its guest has not written yet is written before it ends.
        (stop(), Some(machine(Paused, Ready)), "Resume"),
        (stop(), Some(machine(Stalled(Bytes(0)), Ready)), "Wait DiskFull"),
        (stop(), Some(machine(Stalled(limits::DISK_ROOM_MIN), Ready)), "Resume"),
        (forced, Some(machine(Stalled(limits::DISK_ROOM_MIN), Ready)), "Kill"),
        (stop(), Some(exited(false)), "Record ProgramExited"),
        (stop(), Some(machine(Dead, Ready)), "Release"),
        (stop(), None, "Converged"),
        // A machine of an earlier run makes room for the wanted one.
        (instance(Power::Running, 2, 1), Some(machine(Shutdown, Ready)), "Kill"),
        (instance(Power::Running, 2, 1), Some(machine(Dead, Ready)), "Release"),
    ];
    for (object, machine, expected) in table {
        let plan = plan(&Desired::Present(&object), &seen(machine.clone()), at(2));
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
        object.status.started_at = Some(at(1));
        object
    };
    let down = || of(Power::Standby, 1);
    let back = || of(Power::Running, 1);
    let recorded = || {
        let mut object = down();
        object.status.state = State::Standby;
        object
    };
    // Its program was not seen running yet: paused before that, it would be resumed for ever.
    let fresh = || {
        let mut object = down();
        object.status.started_at = None;
        object
    };
    let saved = |generation| {
        Some(Memory::Saved(SavedMemory {
            generation,
            run: 1,
            launched_at: at(0),
            packing: PackingState::Plain,
        }))
    };
    let loose = || Some(Memory::Loose);
    let table = [
        (down(), Some(machine(Running, Ready)), None, "Pause"),
        (fresh(), Some(machine(Running, Ready)), None, "Record Converging"),
        (fresh(), Some(machine(Paused, Ready)), None, "Resume"),
        (down(), Some(machine(Running, Ready)), loose(), "DiscardMemory"),
        (down(), Some(machine(Paused, Ready)), None, "Save"),
        (down(), Some(machine(Paused, Ready)), loose(), "Save"),
        (down(), Some(machine(Paused, Ready)), saved(1), "Kill"),
        (down(), Some(machine(Dead, Ready)), saved(1), "Record Converging"),
        (recorded(), Some(machine(Dead, Ready)), saved(1), "Release"),
        (back(), Some(machine(Dead, Ready)), saved(1), "Release"),
        (down(), None, saved(1), "Converged"),
        (down(), None, loose(), "DiscardMemory"),
        // A VMM that died before its memory was saved: booted, and saved then.
        (down(), None, None, "Launch"),
        (back(), None, saved(1), "Restore"),
        (back(), Some(machine(Created, Silent)), saved(1), "Kill"),
        (back(), Some(machine(Paused, Silent)), saved(1), "DiscardMemory"),
        (back(), Some(machine(Paused, Silent)), None, "Resume"),
        (back(), Some(machine(Running, Ready)), loose(), "DiscardMemory"),
        // Nothing of an earlier standby is ever gone on from.
        (of(Power::Running, 2), None, saved(1), "DiscardMemory"),
        (of(Power::Standby, 2), Some(machine(Paused, Ready)), saved(1), "DiscardMemory"),
        (back(), Some(machine(Running, Ready)), saved(1), "DiscardMemory"),
        (of(Power::Stopped, 1), None, saved(1), "DiscardMemory"),
    ];
    for (object, machine, memory, expected) in table {
        let mut seen = seen(machine);
        seen.memory = memory;
        let plan = plan(&Desired::Present(&object), &seen, at(2));
        assert_eq!(name(&plan), expected, "{:?} {seen:?}", object.spec.power);
    }
}

#[test]
fn deletion_is_a_plan_toward_nothing() {
    let mut object = instance(Power::Running, 1, 0);
    object.meta.deletion_requested_at = Some(at(100));
    let deleting = |machine, now| name(&plan(&Desired::Absent(Some(&object)), &seen(machine), at(now)));
    let running = || machine(VmmState::Running, GuestPhase::Ready);
    assert_eq!(deleting(Some(running()), 101), "Shutdown");
    assert_eq!(deleting(Some(running()), 110), "Kill", "the grace is over");
    assert_eq!(deleting(Some(machine(VmmState::Dead, GuestPhase::Ready)), 101), "Release");
    assert_eq!(deleting(None, 101), "DiscardRecords");
    let orphan = |machine| name(&plan(&Desired::Absent(None), &seen(machine), at(1)));
    assert_eq!(orphan(Some(running())), "Kill");
}

#[test]
fn a_launch_waits_for_each_part_and_says_for_which() {
    let object = instance(Power::Running, 1, 0);
    let waits = |seen: &Observed| name(&plan(&Desired::Present(&object), seen, at(1)));
    let mut without = seen(None);
    without.parts.image_config = None;
    without.parts.image_trouble = Some((Reason::ImageNotFound, "gone".to_owned()));
    assert_eq!(waits(&without), "Wait ImageNotFound");
    let mut without = seen(None);
    without.parts.is_disk_ready = false;
    assert_eq!(waits(&without), "Wait WaitingForDisk");
    without.parts.disk_trouble = Some("no room".to_owned());
    let told = plan(&Desired::Present(&object), &without, at(1));
    assert!(matches!(&told, Plan::Wait(wait) if wait.message.ends_with("being made: no room")), "{told:?}");
    let mut without = seen(None);
    without.parts.image_config = Some(ImageConfig::default());
    assert_eq!(waits(&without), "Refuse ImageInvalid");
    let mut networked = object.clone();
    networked.spec.has_network = true;
    assert_eq!(name(&plan(&Desired::Present(&networked), &seen(None), at(1))), "Wait WaitingForNetwork");
}

#[test]
fn repeated_deaths_delay_the_next_start_and_the_first_does_not() {
    let mut object = instance(Power::Running, 1, 0);
    let mut planned = |deaths, now| {
        object.status.vmm_deaths = deaths;
        object.status.last_death = Some(VmmDeath { launched_at: at(0), noticed_at: at(10) });
        name(&plan(&Desired::Present(&object), &seen(None), at(now)))
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
    let end = PassEnd { now: at(5), outcome: Outcome::Converged };
    let mut exited = machine(VmmState::Running, GuestPhase::Exited);
    exited.guest.exit = Some(Exit { code: Some(3), message: "exited".to_owned(), is_boot_failure: false });
    let first = status(&instance(Power::Running, 1, 0), Some(&seen(Some(exited))), &end);
    assert_eq!((first.ended_run, first.exit.as_ref().and_then(|exit| exit.code)), (1, Some(3)));
    let object = Object { status: first.clone(), ..instance(Power::Running, 1, 0) };
    let second = status(&object, Some(&seen(None)), &end);
    assert_eq!((second.exit, second.state), (first.exit, State::Stopped));
    let late = PassEnd { now: at(121), outcome: Outcome::Converged };
    let silent = Some(seen(Some(machine(VmmState::Running, GuestPhase::Silent))));
    let timed_out = status(&instance(Power::Running, 1, 0), silent.as_ref(), &late);
    assert!(timed_out.exit.is_some_and(|exit| exit.is_boot_failure));
}

#[test]
fn unknown_is_said_only_while_nothing_can_be_observed_and_with_its_error() {
    let outcome = Outcome::Failed {
        kind: crate::host::HostErrorKind::Transient,
        message: "cannot inspect".to_owned(),
        attempt: 1,
    };
    let end = PassEnd { now: at(5), outcome };
    let object = instance(Power::Running, 1, 0);
    let blind = status(&object, None, &end);
    assert_eq!((blind.state, blind.state_error.as_deref()), (State::Unknown, Some("cannot inspect")));
    let sighted = status(&Object { status: blind, ..object }, Some(&seen(None)), &end);
    assert_eq!((sighted.state, sighted.state_error), (State::Created, None));
}

/// A model of the port: what a machine does when an action is taken, and by itself.
#[derive(Debug, Clone)]
struct Model {
    object: Object<Instance>,
    machine: Option<Machine>,
    has_records: bool,
    now: Timestamp,
}

impl Model {
    fn seen(&self) -> Observed {
        Observed { has_records: self.has_records, ..seen(self.machine.clone()) }
    }

    fn apply(&mut self, action: &Action) {
        let machine = self.machine.as_mut();
        match (action, machine) {
            (Action::Launch(plan), None) => {
                let fresh = Machine {
                    run: plan.run,
                    launched_at: self.now,
                    ..super::tests::machine(VmmState::Running, GuestPhase::Silent)
                };
                (self.machine, self.has_records) = (Some(fresh), true);
            }
            (Action::Configure(..), Some(machine)) => machine.guest.phase = GuestPhase::Configured,
            (Action::Resume(_), Some(machine)) => machine.vmm = VmmState::Running,
            (Action::Shutdown(_), Some(machine)) => machine.guest.is_shutdown_requested = true,
            (Action::AcknowledgeExit(_), Some(machine)) => machine.guest.is_exit_acknowledged = true,
            (Action::Kill(_), Some(machine)) => (machine.vmm, machine.pid) = (VmmState::Dead, None),
            (Action::Release(_), Some(machine)) => {
                assert_eq!(machine.vmm, VmmState::Dead, "only the dead are released");
                self.machine = None;
            }
            (Action::DiscardRecords(_), None) => self.has_records = false,
            (action, machine) => panic!("{action:?} on {machine:?}"),
        }
    }

    /// The guest gets on by itself.
    fn live(&mut self) {
        let Some(machine) = &mut self.machine else { return };
        if machine.vmm != VmmState::Running {
            return;
        }
        let guest = &mut machine.guest;
        if guest.is_exit_acknowledged {
            machine.vmm = VmmState::Shutdown;
        } else if guest.is_shutdown_requested {
            guest.phase = GuestPhase::Exited;
            guest.exit = Some(Exit { code: Some(143), message: String::new(), is_boot_failure: false });
        } else {
            guest.phase = match guest.phase {
                GuestPhase::Silent => GuestPhase::AwaitingConfig,
                GuestPhase::Configured => GuestPhase::Ready,
                phase => phase,
            };
        }
    }

    /// One pass; only the first `steps` actions are taken, as if the daemon then died. Whether it
    /// changed anything.
    fn pass(&mut self, steps: usize) -> bool {
        let is_deleting = self.object.meta.is_deleting();
        let desired =
            if is_deleting { Desired::Absent(Some(&self.object)) } else { Desired::Present(&self.object) };
        let planned = plan(&desired, &self.seen(), self.now);
        let outcome = match &planned {
            Plan::Converged => Outcome::Converged,
            Plan::Act(_) => Outcome::Acting,
            Plan::Record(record) => Outcome::Recording(record.clone()),
            Plan::Wait(wait) => Outcome::Waiting(wait.clone()),
            Plan::Refuse(refusal) => Outcome::Refused(refusal.clone()),
        };
        if let Plan::Act(actions) = &planned {
            actions.iter().take(steps).for_each(|action| self.apply(action));
        }
        let end = PassEnd { now: self.now, outcome };
        let next = status(&self.object, Some(&self.seen()), &end);
        let changed = next != self.object.status || matches!(planned, Plan::Act(_));
        self.object.status = next;
        changed
    }

    fn settle(&mut self) {
        for _ in 0..64 {
            let changed = self.pass(usize::MAX);
            let before = self.machine.clone();
            self.live();
            self.now = self.now.saturating_add(jiff::SignedDuration::from_secs(1)).expect("in range");
            // What the guest did after the pass is for the next one to see.
            let wants_more = before != self.machine
                || self.machine.as_ref().is_some_and(|machine| {
                    machine.vmm != VmmState::Running || machine.guest.phase != GuestPhase::Ready
                });
            if !changed && !wants_more {
                return;
            }
        }
    }
}

prop_compose! {
    fn any_machine()(
        vmm in prop_oneof![
            Just(VmmState::Created), Just(VmmState::Running), Just(VmmState::Paused),
            Just(VmmState::Shutdown), Just(VmmState::Dead), Just(VmmState::Unreachable("mute".to_owned())),
        ],
        phase in prop_oneof![
            Just(GuestPhase::Silent), Just(GuestPhase::AwaitingConfig), Just(GuestPhase::Configured),
            Just(GuestPhase::Ready), Just(GuestPhase::Exited),
        ],
        run in 1u64..3,
        is_shutdown_requested: bool,
        is_exit_acknowledged: bool,
        age in 0i64..200,
    ) -> Machine {
        let exit = (phase == GuestPhase::Exited)
            .then(|| Exit { code: Some(1), message: String::new(), is_boot_failure: false });
        let guest = GuestView { phase, exit, is_shutdown_requested, is_exit_acknowledged, incarnation: None, assume_error: None, identity_told: None, is_unresponsive: false };
        Machine { run, guest, launched_at: at(200 - age), ..machine(vmm, phase) }
    }
}

proptest! {
    #[test]
    fn from_any_state_every_wish_is_reached_and_stays(
        machine in proptest::option::of(any_machine()),
        power in prop_oneof![Just(Power::Running), Just(Power::Stopped)],
        run in 1u64..3,
        ended in 0u64..3,
        is_deleting: bool,
        is_forced: bool,
        cut in 0usize..2,
    ) {
        let mut object = instance(power, run, ended.min(run));
        object.spec.is_forced = is_forced;
        object.spec.power_since = at(195);
        object.meta.deletion_requested_at = is_deleting.then(|| at(195));
        let mut model = Model { object, machine, has_records: true, now: at(200) };
        // The daemon dies within a plan, and plans anew.
        model.pass(cut);
        model.settle();
        let planned = model.pass(usize::MAX);
        prop_assert!(!planned, "settled: {model:?}");
        let status = &model.object.status;
        if is_deleting {
            prop_assert!(model.machine.is_none() && !model.has_records, "nothing is left: {model:?}");
        } else if power == Power::Running && status.ended_run < run {
            let machine = model.machine.as_ref().expect("it shall run");
            prop_assert_eq!((&machine.vmm, machine.run), (&VmmState::Running, run));
            prop_assert_eq!(status.state, State::Running);
        } else {
            prop_assert!(model.machine.is_none(), "{:?}", model);
            prop_assert_eq!(status.state, State::Stopped);
        }
    }
}

#[test]
fn the_boot_deadline_is_longer_than_the_slowest_boot_seen() {
    // recipes.md: 2 s under TCG; a loaded host was seen to take ten times that.
    assert!(limits::GUEST_BOOT_DEADLINE > Duration::from_secs(20));
}

#[test]
fn a_guest_that_ran_before_is_neither_overdue_nor_killed_while_a_new_daemon_has_not_heard_it() {
    let long_after = at(3600);
    let silent = || seen(Some(machine(VmmState::Running, GuestPhase::Silent)));
    let mut object = instance(Power::Running, 1, 0);
    object.status.state = State::Running;
    object.status.started_at = Some(at(2));
    let step = plan(&Desired::Present(&object), &silent(), long_after);
    assert!(matches!(&step, Plan::Wait(wait) if wait.until.is_none()), "{step:?}");
    let end = PassEnd { now: long_after, outcome: Outcome::Converged };
    let told = status(&object, Some(&silent()), &end);
    assert_eq!((told.ended_run, told.exit, told.state), (0, None, State::Initializing));
    let mut just_attached = machine(VmmState::Running, GuestPhase::Silent);
    just_attached.listening_since = at(3599);
    let just_attached = seen(Some(just_attached));
    let step = plan(&Desired::Present(&object), &just_attached, long_after);
    assert!(matches!(&step, Plan::Wait(wait) if wait.until == Some(at(3609))), "{step:?}");
    assert_eq!(
        status(&object, Some(&just_attached), &end).state,
        State::Running,
        "nothing was heard of a change"
    );
    object.status.state = State::Initializing;
    assert_eq!(status(&object, Some(&just_attached), &end).state, State::Initializing);
    object.status.state = State::Running;
    let again = seen(Some(machine(VmmState::Running, GuestPhase::Ready)));
    assert_eq!(status(&object, Some(&again), &end).started_at, Some(at(2)));
    // Asked to stop, it still has its grace.
    object.spec.power = Power::Stopped;
    object.spec.power_since = at(3599);
    assert_eq!(name(&plan(&Desired::Present(&object), &silent(), long_after)), "Wait Converging");
    assert_eq!(name(&plan(&Desired::Present(&object), &silent(), at(3609))), "Kill");
    // One that never started is overdue.
    let object = instance(Power::Running, 1, 0);
    assert_eq!(status(&object, Some(&silent()), &end).ended_run, 1);
}

#[test]
fn a_boot_that_outlived_its_daemon_is_overdue_only_after_the_next_one_listened_for_a_moment() {
    let object = instance(Power::Running, 1, 0);
    let mut booted = machine(VmmState::Running, GuestPhase::Silent);
    booted.listening_since = at(3600);
    let ended_run = |now| {
        let end = PassEnd { now, outcome: Outcome::Converged };
        status(&object, Some(&seen(Some(booted.clone()))), &end).ended_run
    };
    let grace = i64::try_from(limits::GUEST_HEARD_GRACE.as_secs()).expect("seconds");
    assert_eq!((ended_run(at(3599 + grace)), ended_run(at(3600 + grace))), (0, 1));
    let step = plan(&Desired::Present(&object), &seen(Some(booted.clone())), at(3600));
    assert!(matches!(&step, Plan::Wait(wait) if wait.until == Some(at(3600 + grace))), "{step:?}");
}

#[test]
fn the_end_of_a_long_run_is_acknowledged_before_the_process_is_ended() {
    let mut object = instance(Power::Running, 1, 1);
    let exit = Exit { code: Some(0), message: String::new(), is_boot_failure: false };
    let mut machine = machine(VmmState::Running, GuestPhase::Exited);
    machine.guest.exit = Some(exit);
    let ready = |status| Condition {
        kind: ConditionType::Ready,
        status,
        reason: Reason::ProgramExited,
        message: String::new(),
        observed_generation: 1,
        last_transition_time: at(3600),
    };
    object.status.conditions = vec![ready(ConditionStatus::False)];
    let step =
        |machine: &Machine, now| name(&plan(&Desired::Present(&object), &seen(Some(machine.clone())), now));
    assert_eq!(step(&machine, at(3600)), "AcknowledgeExit");
    machine.guest.is_exit_acknowledged = true;
    assert_eq!(step(&machine, at(3601)), "Wait Converging");
    assert_eq!(step(&machine, at(3611)), "Kill");
}

/// The status after a launch of age `age` ended with `code`.
fn after_end(object: &Object<Instance>, code: i32, age: i64) -> InstanceStatus {
    let mut ended = machine(VmmState::Running, GuestPhase::Exited);
    (ended.launched_at, ended.listening_since) = (at(10_000 - age), at(10_000 - age));
    ended.guest.exit = Some(Exit { code: Some(code), message: String::new(), is_boot_failure: false });
    let end = PassEnd { now: at(10_000), outcome: Outcome::Acting };
    status(object, Some(&seen(Some(ended))), &end)
}

#[test]
fn restarts_follow_their_policy() {
    use stead_schemas::policy::RestartWhen::{Always, Never, OnFailure};
    // Policy, allowed attempts, attempts so far, exit code, age of the launch in seconds;
    // the seconds until the next attempt, or none when the run has ended.
    let table = [
        (Never, 0, 0, 1, 5, None),
        (OnFailure, 0, 0, 0, 5, None),
        (OnFailure, 0, 0, 1, 5, Some(5)),
        (OnFailure, 0, 1, 137, 5, Some(10)),
        (Always, 0, 2, 0, 5, Some(20)),
        (Always, 0, 60, 0, 5, Some(300)),
        (Always, 3, 2, 0, 5, Some(20)),
        (Always, 3, 3, 0, 5, None),
        // It ran for long enough: the count begins anew.
        (Always, 3, 3, 0, 600, Some(5)),
    ];
    for (when, max_attempts, attempts, code, age, expected) in table {
        let mut object = instance(Power::Running, 1, 0);
        object.spec.restart = RestartPolicy { when, max_attempts, ..RestartPolicy::default() };
        object.status.restart = RestartStatus { run: 1, attempts, ..RestartStatus::default() };
        let status = after_end(&object, code, age);
        let next = status.restart.next_attempt_at.map(|next| next.duration_since(at(10_000)).as_secs());
        let case = format!("{when:?} {attempts} of {max_attempts}, code {code}, age {age}");
        assert_eq!((next, status.ended_run), (expected, u64::from(expected.is_none())), "{case}");
        assert_eq!(status.exit.map(|exit| exit.code), Some(Some(code)), "{case}");
    }
}

#[test]
fn a_restart_waits_for_its_time_and_its_old_machine_goes_first() {
    let mut object = instance(Power::Running, 1, 0);
    object.spec.restart = RestartPolicy { when: RestartWhen::Always, ..RestartPolicy::default() };
    object.status = after_end(&object, 1, 5);
    let mut old = machine(VmmState::Running, GuestPhase::Exited);
    old.launched_at = at(9_995);
    old.guest.exit.clone_from(&object.status.exit);
    let plan_at = |object: &Object<Instance>, machine: Option<Machine>, now: i64| {
        name(&plan(&Desired::Present(object), &seen(machine), at(now)))
    };
    assert_eq!(plan_at(&object, Some(old.clone()), 10_001), "AcknowledgeExit");
    old.vmm = VmmState::Dead;
    assert_eq!(plan_at(&object, Some(old), 10_001), "Release");
    assert_eq!(plan_at(&object, None, 10_004), "Wait ProgramExited");
    assert_eq!(plan_at(&object, None, 10_005), "Launch");
    object.spec.power = Power::Stopped;
    assert_eq!(plan_at(&object, None, 10_005), "Converged");
    object.spec.expires_at = Some(at(10_006));
    assert_eq!(plan_at(&object, None, 10_005), "Converged");
    assert_eq!(plan_at(&object, None, 10_006), "Expire");
}

proptest! {
    #[test]
    fn no_two_instances_and_no_two_boots_share_a_machine_id(
        one in "[a-z][a-z0-9]{23}", other in "[a-z][a-z0-9]{23}", first in 0i64..4_000_000_000, later in 0i64..4_000_000_000,
    ) {
        let [one, other]: [Uid; 2] = [one, other].map(|text| text.parse().expect("a uid"));
        let (first, later) = (at(first), at(later));
        prop_assert_eq!(machine_id(&one, first) == machine_id(&other, first), one == other);
        prop_assert_eq!(machine_id(&one, first) == machine_id(&one, later), first == later);
        prop_assert_eq!(machine_id(&one, later).len(), 32);
    }
}

#[test]
fn a_machine_id_is_made_of_the_uid_and_of_its_boot() {
    assert_eq!(machine_id(&uid(), Timestamp::UNIX_EPOCH), "0e108452948b257ed4bcbd32f6ebeba6");
    assert_ne!(machine_id(&uid(), at(1)), machine_id(&uid(), at(0)));
    let last: Uid = "z".repeat(24).parse().expect("valid");
    assert_eq!(machine_id(&last, Timestamp::UNIX_EPOCH), format!("{:032x}", 36u128.pow(24) - 1));
}

#[test]
fn a_guest_without_the_headers_it_wants_is_told_of_and_runs() {
    let end = PassEnd { now: at(1), outcome: Outcome::Converged };
    let poor = || {
        let mut machine = machine(VmmState::Running, GuestPhase::Ready);
        machine.has_headers = false;
        seen(Some(machine))
    };
    let told =
        |status: &InstanceStatus| condition::find(&status.conditions, ConditionType::KernelHeaders).cloned();
    let mut object = instance(Power::Running, 1, 0);
    object.status = status(&object, Some(&poor()), &end);
    let lack = told(&object.status).expect("told");
    assert_eq!((lack.status, lack.reason), (ConditionStatus::False, Reason::KernelHeadersMissing));
    assert!(condition::is_ready(&object.status.conditions), "it runs all the same");
    // While nobody can look it stays as it was; with a machine that has them, or none, it is over.
    assert_eq!(told(&status(&object, None, &end)), Some(lack));
    let rich = seen(Some(machine(VmmState::Running, GuestPhase::Ready)));
    assert_eq!(told(&status(&object, Some(&rich), &end)), None);
    assert_eq!(told(&status(&object, Some(&seen(None)), &end)), None);
    object.spec.skip_kernel_headers = true;
    assert_eq!(told(&status(&object, Some(&poor()), &end)), None);
}

#[test]
fn a_guest_that_does_not_answer_is_running_and_not_ready_until_it_does() {
    let end = PassEnd { now: at(1), outcome: Outcome::Converged };
    let unresponsive = |vmm| {
        let mut machine = machine(vmm, GuestPhase::Ready);
        machine.guest.is_unresponsive = true;
        seen(Some(machine))
    };
    let mut object = instance(Power::Running, 1, 0);
    object.status = status(&object, Some(&unresponsive(VmmState::Running)), &end);
    let ready = condition::find(&object.status.conditions, ConditionType::Ready).expect("told");
    assert_eq!(object.status.state, State::Running);
    assert_eq!((ready.status, ready.reason), (ConditionStatus::False, Reason::AgentUnreachable));
    // One that stands still, or answers again, is another matter.
    let paused = status(&object, Some(&unresponsive(VmmState::Paused)), &end);
    assert!(paused.conditions.iter().all(|condition| condition.reason != Reason::AgentUnreachable));
    let answers = seen(Some(machine(VmmState::Running, GuestPhase::Ready)));
    assert!(condition::is_ready(&status(&object, Some(&answers), &end).conditions));
}
