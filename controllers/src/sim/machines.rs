//! Simulated VMMs with guests that boot, ask, run, end and report it, in virtual time.

use std::net::Ipv4Addr;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use stead_schemas::compression::Compression;
use stead_schemas::guest;
use stead_schemas::instance::{Exit, Hypervisor};
use stead_schemas::names::{LinkName, Uid};
use stead_schemas::numbers::{LaunchId, RunNo, StandbyNo};
use stead_schemas::snapshot::PackingState;

use super::World;
use super::memories::MemoryFile;
use super::program::Program;
use super::snapshots::PACKED;
use super::written::Known;
use crate::host::{
    AdoptPlan, GuestPhase, GuestView, HostError, HostErrorKind, LaunchPlan, Machine, Machines, Memory,
    VmmState,
};

/// A VMM process, or its leftovers.
#[derive(Debug, Clone)]
pub(super) struct Vmm {
    pub(super) run: RunNo,
    hypervisor: Hypervisor,
    pub(super) state: VmmState,
    pid: u32,
    pub(super) launch: LaunchId,
    /// Time of the launch, as the wall clock showed it then.
    shown_launched_at: Timestamp,
    pub(super) launched_at: Timestamp,
    configured_at: Option<Timestamp>,
    program: Program,
    shutdown_at: Option<Timestamp>,
    acknowledged_at: Option<Timestamp>,
    pub(super) tap: Option<LinkName>,
    pub(super) address: Option<Ipv4Addr>,
    pub(super) is_network_cut: bool,
    has_headers: bool,
    pub(super) paused_at: Option<Timestamp>,
    /// Time for which it was paused or saved so far, which its guest does not notice.
    slept: SignedDuration,
    /// Disks of the VM, the root's first.
    pub(super) disks: Vec<Known>,
    incarnation: Option<String>,
}

const BOOT: Duration = Duration::from_millis(1500);
const START: Duration = Duration::from_millis(300);
const STOP: Duration = Duration::from_millis(400);
const POWER_OFF: Duration = Duration::from_millis(200);

impl Vmm {
    pub(super) fn is_alive(&self) -> bool {
        self.state != VmmState::Dead
    }

    /// Returns the guest's own time.
    fn time(&self, now: Timestamp) -> Timestamp {
        self.paused_at.unwrap_or(now).saturating_sub(self.slept).unwrap_or(now)
    }

    /// Stops the vCPUs from now on.
    pub(super) fn hold(&mut self, now: Timestamp) {
        if self.state == VmmState::Running {
            self.paused_at = Some(now);
            self.state = VmmState::Paused;
        }
    }

    /// Returns a paused copy of its current state.
    pub(super) fn paused_copy(&self, now: Timestamp) -> Self {
        let mut copy = self.clone();
        copy.hold(now);
        copy
    }

    /// Lets the vCPUs run from now on.
    fn run(&mut self, now: Timestamp) {
        if let Some(since) = self.paused_at.take() {
            self.slept = self.slept.saturating_add(now.duration_since(since));
        }
        self.state = VmmState::Running;
    }

    /// Returns when the program ended or will end, with its code; `None` if it never ends.
    fn ends_at(&self) -> Option<(Timestamp, i32)> {
        let started = plus(self.configured_at?, START);
        let by_itself = match self.program {
            Program::Ends { code, after } => Some((plus(started, after), code)),
            Program::Forever | Program::Hangs | Program::Sickens { .. } => None,
        };
        let asked = self.shutdown_at.map(|at| (plus(at, STOP).max(started), 143));
        match (by_itself, asked) {
            (Some(a), Some(b)) => Some(a.min(b)),
            (a, b) => a.or(b),
        }
    }

    /// Makes the agent forget its configuration, as if it was replaced; an end that it had seen stays
    /// reported.
    pub(super) fn forget(&mut self, now: Timestamp) {
        if self.ends_at().is_none_or(|(at, _)| self.time(now) < at) {
            (self.configured_at, self.shutdown_at, self.incarnation) = (None, None, None);
        }
    }

    /// True if a probe succeeds.
    pub(super) fn is_well(&self, now: Timestamp) -> bool {
        let now = self.time(now);
        let Some(configured_at) = self.configured_at.filter(|_| self.state == VmmState::Running) else {
            return false;
        };
        let started = plus(configured_at, START);
        let is_over = self.ends_at().is_some_and(|(at, _)| now >= at);
        let is_sick = matches!(self.program, Program::Sickens { after } if now >= plus(started, after));
        now >= started && !is_over && !is_sick && self.program != Program::Hangs
    }

    /// Returns the state that is visible from outside at a time.
    pub(super) fn seen(&self, owner: &Uid, now: Timestamp) -> Machine {
        let now = self.time(now);
        let is_booted = now >= plus(self.launched_at, BOOT);
        let (phase, exit) = match (self.configured_at, self.ends_at()) {
            (Some(_), Some((at, code))) if now >= at && self.program != Program::Hangs => {
                let message = format!("exited with code {code}");
                (GuestPhase::Exited, Some(Exit { code: Some(code), message, is_boot_failure: false }))
            }
            (Some(at), _) if now >= plus(at, START) && self.program != Program::Hangs => {
                (GuestPhase::Ready, None)
            }
            (Some(_), _) => (GuestPhase::Configured, None),
            (None, _) if is_booted => (GuestPhase::AwaitingConfig, None),
            (None, _) => (GuestPhase::Silent, None),
        };
        let is_off = self.acknowledged_at.is_some_and(|at| now >= plus(at, POWER_OFF));
        let vmm = match &self.state {
            VmmState::Running if is_off => VmmState::Shutdown,
            state => state.clone(),
        };
        Machine {
            owner: owner.clone(),
            run: self.run,
            hypervisor: self.hypervisor,
            pid: self.is_alive().then_some(self.pid),
            vmm,
            launch: self.launch,
            launched_at: self.shown_launched_at,
            listening_since: self.shown_launched_at,
            is_network_cut: self.is_network_cut,
            has_headers: self.has_headers,
            guest: GuestView {
                phase,
                exit,
                is_shutdown_requested: self.shutdown_at.is_some(),
                is_exit_acknowledged: self.acknowledged_at.is_some(),
                incarnation: self.incarnation.clone(),
                assume_error: None,
                identity_told: None,
                is_unresponsive: false,
            },
        }
    }
}

impl World {
    /// Runs one verb on a VMM that must exist.
    async fn on_vmm<T>(
        &self,
        operation: &'static str,
        owner: &Uid,
        effect: impl FnOnce(&mut Vmm) -> Result<T, HostError>,
    ) -> Result<T, HostError> {
        self.verb(operation, owner.as_str(), |state| {
            let missing = || HostError::new(HostErrorKind::Missing, operation, owner.as_str());
            effect(state.machines.get_mut(owner).ok_or_else(missing)?)
        })
        .await
    }
}

impl Machines for World {
    async fn list(&self) -> Result<Vec<Uid>, HostError> {
        self.verb("list", "machines", |state| {
            let mut owners: Vec<Uid> =
                state.machines.keys().chain(&state.records).chain(state.memories.keys()).cloned().collect();
            owners.sort();
            owners.dedup();
            Ok(owners)
        })
        .await
    }

    async fn inspect(&self, owner: &Uid) -> Result<Option<Machine>, HostError> {
        let now = self.time();
        self.verb("inspect machine", owner.as_str(), |state| {
            Ok(state.machines.get(owner).map(|vmm| vmm.seen(owner, now)))
        })
        .await
    }

    async fn has_records(&self, owner: &Uid) -> Result<bool, HostError> {
        self.verb("inspect records", owner.as_str(), |state| Ok(state.records.contains(owner))).await
    }

    async fn launch(&self, plan: &LaunchPlan) -> Result<(), HostError> {
        let now = self.time();
        self.verb("launch", plan.owner.as_str(), |state| {
            let refuse = |kind, why: &str| HostError::new(kind, "launch", plan.owner.as_str()).because(why);
            if state.machines.contains_key(&plan.owner) {
                return Err(refuse(HostErrorKind::Conflict, "a machine is there"));
            }
            let mut disks = Known::of(plan.disks().into_iter());
            if !state.stored.contains_key(&plan.rootfs) || !state.has_disks(&disks) {
                return Err(refuse(HostErrorKind::Missing, "a disk is not there"));
            }
            let is_tap_missing =
                plan.network.as_ref().is_some_and(|card| !state.links.contains_key(&card.tap));
            if is_tap_missing {
                return Err(refuse(HostErrorKind::Missing, "the tap is not there"));
            }
            if plan.network.as_ref().is_some_and(|card| state.is_watched(&card.tap)) {
                return Err(refuse(HostErrorKind::Conflict, "the tap is in use"));
            }
            // A VM that boots knows nothing of its disks yet.
            state.begin_to_write(&plan.owner, &mut disks);
            state.next_pid += 1;
            // A crash between spawn and start leaves a process whose vCPUs never ran.
            let vmm =
                if state.rng.chance(state.faults.after) { VmmState::Created } else { VmmState::Running };
            state.records.insert(plan.owner.clone());
            state.machines.insert(
                plan.owner.clone(),
                Vmm {
                    run: plan.run,
                    hypervisor: plan.hypervisor,
                    state: vmm,
                    pid: state.next_pid,
                    launch: plan.launch,
                    shown_launched_at: self.shown(now),
                    launched_at: now,
                    configured_at: None,
                    program: Program::Forever,
                    shutdown_at: None,
                    acknowledged_at: None,
                    tap: plan.network.as_ref().map(|card| card.tap.clone()),
                    address: plan.network.as_ref().map(|card| card.address),
                    is_network_cut: false,
                    has_headers: plan.wants_headers,
                    paused_at: None,
                    slept: SignedDuration::ZERO,
                    disks,
                    incarnation: None,
                },
            );
            Ok(())
        })
        .await?;
        self.announce_in(&plan.owner, BOOT);
        Ok(())
    }

    async fn configure(&self, owner: &Uid, config: &guest::Config) -> Result<(), HostError> {
        let now = self.time();
        let program = Program::of(&config.argv);
        self.on_vmm("configure", owner, |vmm| {
            let now = vmm.time(now);
            vmm.configured_at.get_or_insert(now);
            vmm.program = program;
            vmm.incarnation = Some(config.incarnation.clone());
            Ok(())
        })
        .await?;
        self.announce_in(owner, START);
        if let Program::Ends { after, .. } = program {
            self.announce_in(owner, START + after);
        }
        Ok(())
    }

    async fn assume(&self, owner: &Uid, assumed: &guest::Assumed) -> Result<(), HostError> {
        self.on_vmm("assume", owner, |vmm| {
            vmm.incarnation = Some(assumed.incarnation.clone());
            Ok(())
        })
        .await
    }

    async fn shutdown(&self, owner: &Uid) -> Result<(), HostError> {
        let now = self.time();
        self.on_vmm("shut down", owner, |vmm| {
            let now = vmm.time(now);
            vmm.shutdown_at.get_or_insert(now);
            Ok(())
        })
        .await?;
        self.announce_in(owner, STOP);
        Ok(())
    }

    async fn acknowledge_exit(&self, owner: &Uid) -> Result<(), HostError> {
        let now = self.time();
        self.on_vmm("acknowledge exit", owner, |vmm| {
            let now = vmm.time(now);
            vmm.acknowledged_at.get_or_insert(now);
            Ok(())
        })
        .await?;
        self.announce_in(owner, POWER_OFF);
        Ok(())
    }

    async fn reconnect(&self, owner: &Uid, tap: &LinkName) -> Result<(), HostError> {
        self.verb("reconnect", owner.as_str(), |state| {
            let missing = || HostError::new(HostErrorKind::Missing, "reconnect", owner.as_str());
            if !state.links.contains_key(tap) {
                return Err(missing());
            }
            state.machines.get_mut(owner).ok_or_else(missing)?.is_network_cut = false;
            Ok(())
        })
        .await
    }

    async fn resume(&self, owner: &Uid) -> Result<(), HostError> {
        let now = self.time();
        let ends_in = self
            .verb("resume", owner.as_str(), |state| {
                let refuse = |kind| HostError::new(kind, "resume", owner.as_str());
                if state.memories.get(owner).is_some_and(|memory| memory.saved.is_some()) {
                    return Err(refuse(HostErrorKind::Conflict));
                }
                let vmm = state.machines.get(owner).ok_or_else(|| refuse(HostErrorKind::Missing))?;
                let (is_paused, mut disks) = (vmm.state == VmmState::Paused, vmm.disks.clone());
                if is_paused && !state.begin_to_write(owner, &mut disks) {
                    state.corrupted.push(owner.clone());
                }
                let vmm = state.machines.get_mut(owner).ok_or_else(|| refuse(HostErrorKind::Missing))?;
                if is_paused {
                    vmm.disks = disks;
                    vmm.run(now);
                }
                Ok(vmm.ends_at().map(|(at, _)| at.duration_since(vmm.time(now))))
            })
            .await?;
        if let Some(delay) = ends_in.and_then(|delay| Duration::try_from(delay).ok()) {
            self.announce_in(owner, delay);
        }
        Ok(())
    }

    async fn pause(&self, owner: &Uid) -> Result<(), HostError> {
        let now = self.time();
        self.arrive_by_chance(owner);
        self.on_vmm("pause", owner, |vmm| {
            vmm.hold(now);
            Ok(())
        })
        .await
    }

    async fn memory(&self, owner: &Uid) -> Result<Option<Memory>, HostError> {
        self.verb("inspect memory", owner.as_str(), |state| {
            Ok(state.memories.get(owner).map(MemoryFile::seen))
        })
        .await
    }

    async fn save(&self, owner: &Uid, standby: StandbyNo) -> Result<(), HostError> {
        self.verb("save", owner.as_str(), |state| {
            let refuse = |kind| HostError::new(kind, "save", owner.as_str());
            let vmm = state.machines.get(owner).ok_or_else(|| refuse(HostErrorKind::Missing))?;
            if vmm.state != VmmState::Paused {
                return Err(refuse(HostErrorKind::Conflict));
            }
            // A crash in the middle leaves an incomplete memory.
            let is_cut = state.rng.chance(state.faults.after);
            let saved = (!is_cut).then(|| (standby, vmm.clone()));
            if !is_cut {
                state.note_save(owner, standby);
            }
            state.memories.insert(owner.clone(), MemoryFile { saved, packing: PackingState::Plain });
            if is_cut { Err(refuse(HostErrorKind::Transient)) } else { Ok(()) }
        })
        .await
    }

    async fn restore(&self, plan: &LaunchPlan) -> Result<(), HostError> {
        self.verb("restore", plan.owner.as_str(), |state| {
            let refuse = |kind| HostError::new(kind, "restore", plan.owner.as_str());
            if state.machines.contains_key(&plan.owner) {
                return Err(refuse(HostErrorKind::Conflict));
            }
            let saved = state.memories.get(&plan.owner).and_then(|memory| memory.saved.clone());
            let (_, mut vmm) = saved.ok_or_else(|| refuse(HostErrorKind::Missing))?;
            if vmm.hypervisor != plan.hypervisor {
                return Err(refuse(HostErrorKind::Permanent));
            }
            if plan.network.as_ref().is_some_and(|card| !state.links.contains_key(&card.tap)) {
                return Err(refuse(HostErrorKind::Missing));
            }
            if plan.network.as_ref().is_some_and(|card| state.is_watched(&card.tap)) {
                return Err(refuse(HostErrorKind::Conflict));
            }
            state.next_pid += 1;
            (vmm.pid, vmm.is_network_cut) = (state.next_pid, false);
            (vmm.tap, vmm.address) =
                plan.network.as_ref().map(|card| (card.tap.clone(), card.address)).unzip();
            vmm.state =
                if state.rng.chance(state.faults.after) { VmmState::Created } else { VmmState::Paused };
            state.machines.insert(plan.owner.clone(), vmm);
            Ok(())
        })
        .await
    }

    async fn adopt_memory(&self, plan: &AdoptPlan) -> Result<(), HostError> {
        let now = self.time();
        self.verb("adopt memory", plan.owner.as_str(), |state| {
            let refuse = |kind| HostError::new(kind, "adopt memory", plan.owner.as_str());
            let captured = state.captured_vmm(&plan.snapshot).cloned();
            let mut vmm = captured.ok_or_else(|| refuse(HostErrorKind::Missing))?;
            let disks = plan.disks();
            if disks.len() != vmm.disks.len() {
                return Err(refuse(HostErrorKind::Permanent));
            }
            vmm.disks.iter_mut().zip(disks).for_each(|(known, disk)| known.disk = disk);
            if !state.has_disks(&vmm.disks) {
                return Err(refuse(HostErrorKind::Missing));
            }
            (vmm.run, vmm.launch) = (plan.run, plan.launch);
            (vmm.launched_at, vmm.shown_launched_at) = (now, self.shown(now));
            let is_cut = state.rng.chance(state.faults.after);
            let saved = (!is_cut).then_some((plan.standby, vmm));
            state.memories.insert(plan.owner.clone(), MemoryFile { saved, packing: PackingState::Plain });
            if is_cut { Err(refuse(HostErrorKind::Transient)) } else { Ok(()) }
        })
        .await
    }

    async fn compress_memory(&self, owner: &Uid, _: Compression) -> Result<(), HostError> {
        self.verb("compress memory", owner.as_str(), |state| {
            let missing = || HostError::new(HostErrorKind::Missing, "compress memory", owner.as_str());
            state.memories.get_mut(owner).ok_or_else(missing)?.packing = PACKED;
            Ok(())
        })
        .await
    }

    async fn discard_memory(&self, owner: &Uid) -> Result<(), HostError> {
        self.verb("discard memory", owner.as_str(), |state| {
            state.memories.remove(owner);
            Ok(())
        })
        .await
    }

    async fn kill(&self, owner: &Uid) -> Result<(), HostError> {
        self.verb("kill", owner.as_str(), |state| {
            if let Some(vmm) = state.machines.get_mut(owner) {
                vmm.state = VmmState::Dead;
            }
            Ok(())
        })
        .await
    }

    async fn release(&self, owner: &Uid) -> Result<(), HostError> {
        self.verb("release", owner.as_str(), |state| {
            if state.machines.get(owner).is_some_and(Vmm::is_alive) {
                return Err(HostError::new(HostErrorKind::Conflict, "release", owner.as_str()));
            }
            state.machines.remove(owner);
            Ok(())
        })
        .await
    }

    async fn discard_records(&self, owner: &Uid) -> Result<(), HostError> {
        self.verb("discard records", owner.as_str(), |state| {
            state.records.remove(owner);
            Ok(())
        })
        .await
    }
}

fn plus(at: Timestamp, delay: Duration) -> Timestamp {
    let delay = SignedDuration::try_from(delay).unwrap_or(SignedDuration::MAX);
    at.saturating_add(delay).unwrap_or(Timestamp::MAX)
}
