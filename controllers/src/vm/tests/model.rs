//! A small model of a host: from every situation, each desired state is reached and kept.

use super::*;

/// A model of the port: the effects of actions on a machine, and the machine's own progress.
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
                    launch: plan.launch,
                    launched_at: self.now,
                    ..super::machine(VmmState::Running, GuestPhase::Silent)
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

    /// Advances the guest by one step of its own.
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

    /// Runs a pass and takes only the first `steps` actions, as if the daemon died then. Returns true if the
    /// pass changed anything.
    fn pass(&mut self, steps: usize) -> bool {
        let is_deleting = self.object.meta.is_deleting();
        let desired =
            if is_deleting { Desired::Absent(Some(&self.object)) } else { Desired::Present(&self.object) };
        let planned = plan(&desired, &self.seen(), self.now.into());
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
        let end = PassEnd { now: self.now.into(), outcome };
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
            // Progress that the guest made after the pass is observed by the next pass.
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
        let guest = GuestView { phase, exit, is_shutdown_requested, is_exit_acknowledged, incarnation: None, identity_error: None, identity_sent: None, memory: None, memory_asked: None, volumes: None, volumes_asked: None, is_unresponsive: false };
        Machine { run: RunNo(run), guest, launched_at: at(200 - age), ..machine(vmm, phase) }
    }
}

proptest! {
    #[test]
    fn from_any_state_every_spec_is_reached_and_stays(
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
        // The daemon dies within a plan and plans again.
        model.pass(cut);
        model.settle();
        let planned = model.pass(usize::MAX);
        prop_assert!(!planned, "settled: {model:?}");
        let status = &model.object.status;
        if is_deleting {
            prop_assert!(model.machine.is_none() && !model.has_records, "nothing is left: {model:?}");
        } else if power == Power::Running && status.ended_run < RunNo(run) {
            let machine = model.machine.as_ref().expect("it should run");
            prop_assert_eq!((&machine.vmm, machine.run), (&VmmState::Running, RunNo(run)));
            prop_assert_eq!(status.state, State::Running);
        } else {
            prop_assert!(model.machine.is_none(), "{:?}", model);
            prop_assert_eq!(status.state, State::Stopped);
        }
    }
}
