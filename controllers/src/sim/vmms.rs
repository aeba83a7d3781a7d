//! Simulated VMMs with guests that boot, ask, run, end and report it, in virtual time.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use stead_schemas::capabilities::VmmCapabilities;
use stead_schemas::guest::MountedVolumes;
use stead_schemas::instance::{Exit, Hypervisor};
use stead_schemas::limits::{CARD_QUEUES_MAX, VCPUS_MAX, VOLUME_DEVICES_MAX};
use stead_schemas::names::{LinkName, Uid};
use stead_schemas::numbers::{LaunchId, RunNo};
use stead_schemas::quantity::{Bytes, Rate};

use super::World;
use super::program::Program;
use super::written::Known;
use crate::host::{
    GuestMemory, GuestPhase, GuestView, HostError, HostErrorKind, LaunchPlan, Machine, MachineChange,
    VmmLimits, VmmState, Vmms,
};

/// A VMM process, or its leftovers.
#[derive(Debug, Clone)]
pub(super) struct Vmm {
    pub(super) run: RunNo,
    pub(super) hypervisor: Hypervisor,
    pub(super) state: VmmState,
    pub(super) pid: u32,
    pub(super) launch: LaunchId,
    /// Time of the launch, as the wall clock showed it then.
    pub(super) shown_launched_at: Timestamp,
    pub(super) launched_at: Timestamp,
    pub(super) configured_at: Option<Timestamp>,
    pub(super) program: Program,
    pub(super) shutdown_at: Option<Timestamp>,
    pub(super) acknowledged_at: Option<Timestamp>,
    pub(super) tap: Option<LinkName>,
    pub(super) address: Option<Ipv4Addr>,
    pub(super) is_network_cut: bool,
    pub(super) disk_rate: Option<Rate>,
    has_headers: bool,
    pub(super) paused_at: Option<Timestamp>,
    /// Time for which it was paused or saved so far, which its guest does not notice.
    slept: SignedDuration,
    /// Disks of the VM, the root's first.
    pub(super) disks: Vec<Known>,
    /// Number of a disk of a volume of which a part may be there.
    pub(super) unsure_volume: Option<u32>,
    /// Sizes with which it knows the disks of volumes, by their numbers.
    pub(super) volume_sizes: BTreeMap<u32, Bytes>,
    /// The volumes of the guest, once it is configured.
    pub(super) volumes: Option<MountedVolumes>,
    pub(super) incarnation: Option<String>,
    /// The hotplug memory of the guest, once it is configured.
    pub(super) memory: Option<GuestMemory>,
    pub(super) has_unused_memory: bool,
    /// True if its RAM is that of a saved file.
    pub(super) is_restored: bool,
    pub(super) limits: VmmLimits,
    /// True if the kernel ended it because memory was short.
    pub(super) is_out_of_memory: bool,
}

const BOOT: Duration = Duration::from_millis(1500);
pub(super) const START: Duration = Duration::from_millis(300);
pub(super) const STOP: Duration = Duration::from_millis(400);
pub(super) const POWER_OFF: Duration = Duration::from_millis(200);

/// Returns the capabilities of simulated VMs.
pub(super) fn capabilities(hypervisor: Hypervisor) -> VmmCapabilities {
    match hypervisor {
        Hypervisor::QemuMicrovm => VmmCapabilities { resize_memory: false, ..CAPABILITIES },
        _ => CAPABILITIES,
    }
}

/// The capabilities of simulated VMs of most hypervisors.
const CAPABILITIES: VmmCapabilities = VmmCapabilities {
    standby: true,
    fork_memory: true,
    replace_tap: true,
    resize_memory: true,
    io_limits: true,
    live_volumes: true,
    devices: false,
    volume_devices_max: VOLUME_DEVICES_MAX,
    vcpus_max: VCPUS_MAX,
    card_queues_max: CARD_QUEUES_MAX,
};

impl Vmm {
    pub(super) fn is_alive(&self) -> bool {
        self.state != VmmState::Dead
    }

    /// Returns the guest's own time.
    pub(super) fn time(&self, now: Timestamp) -> Timestamp {
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
            disk_limit: self.disk_rate.into(),
            returns_memory: !self.is_restored,
            has_unused_memory: self.has_unused_memory,
            volumes: self.disks.iter().skip(1).map(|known| known.disk.clone()).collect(),
            unsure_volume: self.unsure_volume,
            volume_sizes: self.volume_sizes.clone(),
            has_live_volumes: true,
            missing_walls: std::collections::BTreeSet::new(),
            has_headers: self.has_headers,
            is_out_of_memory: self.is_out_of_memory,
            guest: GuestView {
                phase,
                exit,
                is_shutdown_requested: self.shutdown_at.is_some(),
                is_exit_acknowledged: self.acknowledged_at.is_some(),
                incarnation: self.incarnation.clone(),
                identity_error: None,
                identity_sent: None,
                memory: self.memory.clone(),
                memory_asked: None,
                volumes: self.volumes.clone(),
                volumes_asked: None,
                is_unresponsive: false,
            },
        }
    }
}

impl World {
    /// Runs one verb on a VMM that must exist.
    pub(super) async fn on_vmm<T>(
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

impl Vmms for World {
    fn capabilities(&self, hypervisor: Hypervisor) -> Option<VmmCapabilities> {
        Some(capabilities(hypervisor))
    }

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
            state.put_over(&plan.owner, &plan.overlay, &plan.rootfs);
            let volume_sizes = state.volume_sizes(&disks);
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
                    disk_rate: plan.disk_rate,
                    has_headers: plan.wants_headers,
                    paused_at: None,
                    slept: SignedDuration::ZERO,
                    disks,
                    unsure_volume: None,
                    volume_sizes,
                    volumes: None,
                    incarnation: None,
                    memory: None,
                    has_unused_memory: false,
                    is_restored: false,
                    limits: plan.limits,
                    is_out_of_memory: false,
                },
            );
            Ok(())
        })
        .await?;
        self.announce_in(&plan.owner, BOOT);
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

    async fn change(&self, owner: &Uid, change: &MachineChange) -> Result<(), HostError> {
        if let MachineChange::AddVolume(disk) = change {
            return self.add_volume(owner, disk).await;
        }
        self.verb("change the VM of", owner.as_str(), |state| {
            let missing = || HostError::new(HostErrorKind::Missing, "change the VM of", owner.as_str());
            if matches!(change, MachineChange::Tap(tap) if !state.links.contains_key(tap)) {
                return Err(missing());
            }
            let vmm = state.machines.get_mut(owner).ok_or_else(missing)?;
            match change {
                MachineChange::Tap(_) => vmm.is_network_cut = false,
                MachineChange::DiskRate(rate) => vmm.disk_rate = *rate,
                MachineChange::UnusedMemory => vmm.has_unused_memory = false,
                MachineChange::AddVolume(_) => {}
                MachineChange::RemoveVolume(number) => vmm.remove_volume(*number),
                MachineChange::GrowVolume(number, size) => vmm.grow_volume(*number, *size),
            }
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
}

fn plus(at: Timestamp, delay: Duration) -> Timestamp {
    let delay = SignedDuration::try_from(delay).unwrap_or(SignedDuration::MAX);
    at.saturating_add(delay).unwrap_or(Timestamp::MAX)
}
