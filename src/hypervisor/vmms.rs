//! The port `Vmms`: VMs of this host, whatever their driver.
//!
//! Guarantees: a VMM has a session of its own and outlives the daemon. It is found again by its runtime
//! directory, and its process by pid, start time and boot id. `inspect` reports the present state, from the
//! kernel, from the VMM and from the guest.
//! Cancel/crash: `launch` writes its record before it spawns; a process that was spawned and not
//! recorded is found by its command line.

use std::collections::BTreeSet;
use std::time::Duration;

use stead_controllers::host::{
    DiskLimit, HostError, HostErrorKind, LaunchPlan, Machine, MachineChange, Memory, VmmState, Vmms,
};
use stead_schemas::capabilities::VmmCapabilities;
use stead_schemas::instance::Hypervisor;
use stead_schemas::names::{LinkName, Uid};
use stead_schemas::quantity::Rate;

use super::attached::Attached;
use super::hypervisors::Hypervisors;
use super::jail::missing_walls;
use super::live_volumes::LiveVolumes;
use super::process;
use super::record::Record;
use super::save::on_thread;
use super::taps::{attach_lost, check_tap, has_tap};
use super::unused_memory;
use crate::guest_channel::{clock, silent};
use crate::host::directories::{remove_dir, uids_in};
use crate::host::kernel::Kernel;
use crate::host::process::Identity;
use crate::host::tap::Frames;

/// Time limit for a guest's first answer, which takes milliseconds. Without an answer the guest is reported as
/// booting.
const FIRST_ANSWER_WAIT: Duration = Duration::from_millis(500);

impl Hypervisors {
    /// Observes a VM whose process lives.
    async fn inspect_live(
        &self,
        owner: &Uid,
        record: &Record,
        identity: &Identity,
        machine: &mut Machine,
    ) -> Result<(), HostError> {
        machine.pid = Some(identity.pid);
        let Some(choice) = self.config.drivers.by_record(record.machine_type.as_deref()) else {
            let name = record.machine_type.as_deref().unwrap_or_default();
            machine.vmm = VmmState::Unreachable(format!("no driver has the machine type {name}"));
            return Ok(());
        };
        let (attached, is_new) = self.attach(owner, &choice, record, identity)?;
        if is_new {
            process::enter_group(&self.config.cgroups, owner, identity);
            // The guest of an earlier daemon's VM answers at once, or still boots.
            attached.channel.first_answer(FIRST_ANSWER_WAIT).await;
        }
        machine.listening_since = attached.since;
        machine.vmm = self.vmm_state(owner, &attached).await;
        machine.guest = attached.channel.judged(machine.vmm == VmmState::Running);
        let has_network = record.tap.as_ref().map_or(Ok(true), |tap| has_tap(identity.pid, tap.as_str()));
        let failed = |error| HostError::io("observe the network of", owner.as_str(), error);
        machine.is_network_cut = !has_network.map_err(failed)?;
        machine.returns_memory = unused_memory::is_returned(record, &attached);
        machine.has_unused_memory = unused_memory::can_be_taken_back(record, &attached, &self.paths(owner));
        machine.has_live_volumes = choice.driver.has_live_volumes(record.device_set);
        machine.disk_limit = self.disk_limit(record, &attached, &machine.vmm).await;
        let failed = |error| HostError::io("observe the walls of", owner.as_str(), error);
        machine.missing_walls = missing_walls(identity.pid).map_err(failed)?.unwrap_or_default();
        Ok(())
    }
}

impl Hypervisors {
    /// Observes the limit of the disks of a VM. A VMM that does not answer now cannot be changed either.
    async fn disk_limit(&self, record: &Record, attached: &Attached, vmm: &VmmState) -> DiskLimit {
        if !record.has_disk_limit || *vmm != VmmState::Running {
            return DiskLimit::Fixed;
        }
        let rate = self.on_session(attached, async |session| session.disk_rate().await).await;
        rate.map_or(DiskLimit::Fixed, DiskLimit::from)
    }

    /// Connects the card of a running VM to another TAP.
    async fn replace_tap(&self, owner: &Uid, tap: &LinkName) -> Result<(), HostError> {
        let attached = self.find_attached(owner)?;
        Self::require(owner, &attached.choice, |has| has.replace_tap, "reconnect the VM of")?;
        check_tap(tap)?;
        let refused = |kind| HostError::new(kind, "reconnect the VM of", owner.as_str());
        let record = Record::read(&self.paths(owner))?.ok_or_else(|| refused(HostErrorKind::Missing))?;
        let frames = match record.queues {
            Some(_) => {
                let frames = self.on_session(&attached, async |session| session.frames().await).await;
                frames.map_err(|why| refused(HostErrorKind::Transient).because(why))?
            }
            // A card behind a hub has no offloads.
            None => Frames::PLAIN,
        };
        let failed = |error| HostError::io("reconnect the VM of", owner.as_str(), error);
        let process = attached.identity.open().map_err(failed)?;
        let process = process.ok_or_else(|| refused(HostErrorKind::Missing).because("its VMM ended"))?;
        let (pid, name, tap) = (attached.identity.pid, owner.clone(), tap.clone());
        on_thread(owner, move || {
            let failed = |error| HostError::io("reconnect the VM of", name.as_str(), error);
            attach_lost(pid, &process, &tap, frames).map_err(failed)
        })
        .await?;
        let resumed = self.on_session(&attached, async |session| session.resume_card().await).await;
        resumed.map_err(|why| refused(HostErrorKind::Transient).because(why))
    }

    /// Limits the disks of a running VM, or ends their limit.
    async fn limit_disks(&self, owner: &Uid, rate: Option<Rate>) -> Result<(), HostError> {
        let attached = self.find_attached(owner)?;
        Self::require(owner, &attached.choice, |has| has.io_limits, "limit the disks of")?;
        let limited = self.on_session(&attached, async |session| session.limit_disks(rate).await).await;
        limited.map_err(|why| {
            HostError::new(HostErrorKind::Transient, "limit the disks of", owner.as_str()).because(why)
        })
    }
}

impl Vmms for Hypervisors {
    fn capabilities(&self, hypervisor: Hypervisor) -> Option<VmmCapabilities> {
        self.config.drivers.capabilities(hypervisor)
    }

    async fn list(&self) -> Result<Vec<Uid>, HostError> {
        let mut owners = uids_in(&self.config.run_dir.join("vm"))?;
        owners.extend(uids_in(&self.config.data_dir.join("logs"))?);
        owners.extend(uids_in(&self.config.data_dir.join("memory"))?);
        owners.sort();
        owners.dedup();
        Ok(owners)
    }

    async fn inspect(&self, owner: &Uid) -> Result<Option<Machine>, HostError> {
        let paths = self.paths(owner);
        let Some(record) = Record::read(&paths)? else {
            self.lock().remove(owner);
            return Ok(None);
        };
        let drivers = &self.config.drivers;
        // A VM without a driver can still be ended; any hypervisor will do for what is shown of it.
        let choice = drivers.by_record(record.machine_type.as_deref()).or_else(|| drivers.by_record(None));
        let unsupported = || HostError::new(HostErrorKind::Unsupported, "inspect the VM of", owner.as_str());
        let volumes = LiveVolumes::of(&record, &paths)?;
        let mut machine = Machine {
            owner: owner.clone(),
            run: record.run,
            hypervisor: choice.ok_or_else(unsupported)?.machine_type.hypervisor,
            vmm: VmmState::Dead,
            pid: None,
            launch: record.launch,
            launched_at: record.launched_at,
            listening_since: record.launched_at,
            is_network_cut: false,
            disk_limit: DiskLimit::Fixed,
            returns_memory: false,
            has_unused_memory: false,
            volumes: volumes.volumes,
            unsure_volume: volumes.unsure,
            volume_sizes: volumes.sizes,
            has_live_volumes: false,
            missing_walls: BTreeSet::new(),
            has_headers: record.kernel_files.as_deref().is_some_and(Kernel::has_headers),
            is_out_of_memory: false,
            guest: silent(),
        };
        if let Some(identity) = self.find_process(&record, &paths)? {
            self.inspect_live(owner, &record, &identity, &mut machine).await?;
        } else {
            machine.is_out_of_memory = self.config.cgroups.was_out_of_memory(owner.as_str());
            if let Some(attached) = self.lock().get(owner) {
                // The last state of the guest of a VMM that just died is still true.
                machine.guest = attached.channel.view();
            }
        }
        Ok(Some(machine))
    }

    async fn launch(&self, plan: &LaunchPlan) -> Result<(), HostError> {
        let _lock = self.locks.take(&plan.owner).await;
        self.launch_fresh(plan).await
    }

    async fn pause(&self, owner: &Uid) -> Result<(), HostError> {
        let _lock = self.locks.take(owner).await;
        let attached = self.find_attached(owner)?;
        let paused = self.on_session(&attached, async |session| session.pause().await).await;
        paused.map_err(|why| {
            HostError::new(HostErrorKind::Transient, "pause the VM of", owner.as_str()).because(why)
        })
    }

    async fn resume(&self, owner: &Uid) -> Result<(), HostError> {
        let _lock = self.locks.take(owner).await;
        let attached = self.find_attached(owner)?;
        let refused = |kind| HostError::new(kind, "resume the VM of", owner.as_str());
        if matches!(self.memory_dir(owner).observe()?, Some(Memory::Saved(_))) {
            return Err(refused(HostErrorKind::Conflict).because("its memory is saved"));
        }
        let resumed = self.on_session(&attached, async |session| session.resume().await).await;
        resumed.map_err(|why| refused(HostErrorKind::Transient).because(why))?;
        attached.channel.forgive();
        // The guest's clock stood still. A channel that is full is reconnected, which sends the time again.
        let _ = attached.channel.ask(clock(), |_| {});
        Ok(())
    }

    async fn change(&self, owner: &Uid, change: &MachineChange) -> Result<(), HostError> {
        let _lock = self.locks.take(owner).await;
        match change {
            MachineChange::Tap(tap) => self.replace_tap(owner, tap).await,
            MachineChange::DiskRate(rate) => self.limit_disks(owner, *rate).await,
            MachineChange::UnusedMemory => self.take_memory_back(owner).await,
            MachineChange::AddVolume(volume) => self.add_volume(owner, volume).await,
            MachineChange::RemoveVolume(number) => self.remove_volume(owner, *number).await,
            MachineChange::GrowVolume(number, size) => self.grow_volume(owner, *number, *size).await,
        }
    }

    async fn kill(&self, owner: &Uid) -> Result<(), HostError> {
        let paths = self.paths(owner);
        let Some(record) = Record::read(&paths)? else { return Ok(()) };
        match self.find_process(&record, &paths)? {
            Some(identity) => identity.kill().await,
            None => Ok(()),
        }
    }

    async fn release(&self, owner: &Uid) -> Result<(), HostError> {
        let paths = self.paths(owner);
        let record = Record::read(&paths)?;
        if record.map_or(Ok(None), |record| self.find_process(&record, &paths))?.is_some() {
            return Err(HostError::new(HostErrorKind::Conflict, "release the living VM of", owner.as_str()));
        }
        self.lock().remove(owner);
        let (config, memory, name) = (self.config.clone(), self.memory_dir(owner), owner.clone());
        let release = move || {
            let failed = |error| HostError::io("release the VM of", name.as_str(), error);
            config.cgroups.remove(name.as_str()).map_err(failed)?;
            memory.forget_running()?;
            remove_dir(paths.runtime()).map_err(failed)
        };
        on_thread(owner, release).await
    }
}
