//! Starting a VMM from a saved memory, and taking over the memory of a snapshot.
//!
//! The saved RAM is mapped privately: a page is read when it is first needed, and forks share the pages that
//! none of them has written to. Compressed RAM is decompressed into an anonymous file.
//! Guarantees: no guest runs on from RAM that this daemon has neither written nor read as a whole.

use jiff::Timestamp;
use stead_controllers::host::{AdoptPlan, HostError, HostErrorKind, LaunchPlan, Vmms, VolumeDisk};
use tokio::task::JoinHandle;

use super::attached::Attached;
use super::dispatch::Choice;
use super::driver::{Content, Saved, Start};
use super::hypervisors::Hypervisors;
use super::launch::HostRam;
use super::record::{GuestOrigin, Mapping, Record};
use crate::host::directories::last_line;
use crate::memory::{FileMark, Manifest, MemoryDir, Origin, RamFile};
use crate::snapshots::check_whole;

impl Hypervisors {
    /// Restores a VM and leaves it paused. When that fails, nothing of the VM is left, and its memory stays
    /// saved.
    pub(super) async fn launch_saved(&self, plan: &LaunchPlan) -> Result<(), HostError> {
        self.check_nothing_there(&plan.owner)?;
        let restored = self.load_memory(plan).await;
        if restored.is_err() {
            // Clearing away in passes of its own would count as progress, and the end of the process as
            // news: a restore that always fails would be tried again at once for ever.
            self.lock().remove(&plan.owner);
            self.kill(&plan.owner).await?;
            self.release(&plan.owner).await?;
        }
        restored
    }

    async fn load_memory(&self, plan: &LaunchPlan) -> Result<(), HostError> {
        let refused = |why: String| refused(plan, why);
        let memory = self.memory_dir(&plan.owner);
        let manifest = memory.manifest()?.ok_or_else(|| refused("no memory is saved".to_owned()))?;
        let origin = manifest.origin.clone();
        let choice = self.choose(plan)?;
        Self::require(&plan.owner, &choice, |has| has.standby, "restore the VM of")?;
        let machine_type = choice.machine_type.name;
        if origin.machine != machine_type {
            let saved_on = origin.machine;
            return Err(refused(format!(
                "its memory was saved of a VM on {saved_on}, not on {machine_type}"
            )));
        }
        if origin.device_set > choice.driver.device_set() {
            return Err(refused(
                "its memory was saved with devices that only a later version gives".to_owned(),
            ));
        }
        let failed = |error| HostError::io("observe the disks of", plan.owner.as_str(), error);
        if !plan.volumes.iter().eq(origin.volumes.iter().map(|volume| &volume.disk)) {
            return Err(refused("its memory was saved with other volumes".to_owned()));
        }
        if !self.is_as_saved(&plan.overlay, &origin).map_err(failed)? {
            return Err(refused("its disk was written to after its memory was saved".to_owned()));
        }
        let (ram, state) = loaded(memory.clone(), manifest.clone(), plan).await?;
        // While the VMM starts: it reads its RAM only when the device state is loaded.
        let checking = self.begin_check(plan, memory.clone(), &manifest, &ram)?;
        let ram = match ram {
            RamFile::Own(file) => HostRam { file, mapping: Mapping::Own },
            RamFile::Saved(file) => HostRam { file, mapping: Mapping::Private },
        };
        let mut record = Record::new(plan, machine_type, saved_guest(&origin, &choice));
        record.volume_sizes = self.volume_sizes(&plan.volumes).map_err(failed)?;
        let files = self.start_files(plan, &record)?;
        let start = files.start(plan, &choice, Content::Saved, Some(&ram));
        let attached = self.start(&start, &choice, record, Some(&ram)).await;
        // However the start went: nothing writes to the RAM any more after this.
        let checked = checking.await.map_err(|error| refused(error.to_string()))?;
        let attached = attached?;
        checked?;
        self.load_state(&start, &attached, &origin, &state, &memory).await
    }

    /// Decompresses compressed RAM. Reads other RAM as a whole, unless this daemon verified the same file.
    fn begin_check(
        &self,
        plan: &LaunchPlan,
        memory: MemoryDir,
        manifest: &Manifest,
        ram: &RamFile,
    ) -> Result<JoinHandle<Result<(), HostError>>, HostError> {
        let (is_verified, manifest) = (self.is_verified(&plan.owner, &memory), manifest.clone());
        let own = match ram {
            RamFile::Own(file) => Some(file.try_clone().map_err(|error| refused(plan, error.to_string()))?),
            RamFile::Saved(_) => None,
        };
        Ok(tokio::task::spawn_blocking(move || match own {
            Some(file) => memory.decompress(&manifest, &file),
            None if is_verified => Ok(()),
            None => memory.check_ram(&manifest),
        }))
    }

    async fn load_state(
        &self,
        start: &Start<'_>,
        attached: &Attached,
        origin: &Origin,
        state: &[u8],
        memory: &MemoryDir,
    ) -> Result<(), HostError> {
        let failed = |why: String| {
            let why = format!("{why}: {}", last_line(&start.paths.vmm_log()));
            HostError::new(HostErrorKind::Transient, "restore the VM of", start.plan.owner.as_str())
                .because(why)
        };
        let version =
            self.on_session(attached, async |session| session.version().await).await.map_err(failed)?;
        if version != origin.version {
            let (title, saved_by) = (attached.choice.driver.title(), &origin.version);
            let why = format!("its memory was saved by {title} {saved_by}, this is {version}");
            return Err(refused(start.plan, why));
        }
        let saved = Saved { state, state_file: &memory.saved_state(), start };
        self.on_session(attached, async |session| session.load(&saved).await).await.map_err(failed)
    }

    /// Makes the memory of a snapshot the saved memory of another instance.
    pub(super) async fn adopt_snapshot(&self, plan: &AdoptPlan) -> Result<(), HostError> {
        let failed = |why: String| {
            HostError::new(HostErrorKind::Transient, "take over a memory for", plan.owner.as_str())
                .because(why)
        };
        let from = MemoryDir::for_snapshot(&self.config.data_dir, &plan.snapshot);
        let missing =
            || HostError::new(HostErrorKind::Missing, "take over the memory of", plan.snapshot.as_str());
        let manifest = from.manifest()?.ok_or_else(missing)?;
        if let Some(choice) = self.config.drivers.by_record(Some(&manifest.origin.machine)) {
            Self::require(&plan.owner, &choice, |has| has.fork_memory, "take over a memory for")?;
        }
        // Before its RAM counts as verified.
        check_whole(&from, &plan.snapshot)?;
        let unseen = |error| HostError::io("observe the disks of", plan.owner.as_str(), error);
        let overlay = FileMark::of(&(self.config.disk)(&plan.overlay)).map_err(unseen)?;
        // Others come when the VM runs.
        let was_there = |disk: &&VolumeDisk| {
            manifest.origin.volumes.iter().any(|volume| volume.disk.number == disk.number)
        };
        let volumes: Vec<_> = plan.volumes.iter().filter(was_there).cloned().collect();
        let volumes = self.mark_volumes(&volumes).map_err(unseen)?;
        let origin = Origin {
            standby: plan.standby,
            run: plan.run,
            launch: plan.launch,
            launched_at: Timestamp::now(),
            overlay,
            volumes,
            is_adopted: true,
            ..manifest.origin.clone()
        };
        let is_verified = self.is_verified(&plan.snapshot, &from);
        let to = self.memory_dir(&plan.owner);
        let (source, target) = (from.clone(), to.clone());
        let adopted = tokio::task::spawn_blocking(move || {
            if !is_verified {
                from.check_ram(&manifest)?;
            }
            to.begin()?;
            let ram = to.keep_shared(&from, &manifest)?;
            to.prove(origin, ram)?;
            to.publish()
        });
        adopted.await.map_err(|error| failed(error.to_string()))??;
        self.set_verified(&plan.snapshot, &source);
        self.set_verified(&plan.owner, &target);
        Ok(())
    }
}

/// Returns the guest that continues from a saved memory.
fn saved_guest(origin: &Origin, choice: &Choice) -> GuestOrigin {
    GuestOrigin {
        run: origin.run,
        device_set: origin.device_set,
        token: origin.token.clone(),
        // A memory that was taken over begins now: its guest has sent nothing under this name.
        launched_at: if origin.is_adopted { Timestamp::now() } else { origin.launched_at },
        kernel_files: origin.kernel_files.clone(),
        queues: origin.queues,
        // Not a part of the memory: it is in the VMM that loads it.
        has_disk_limit: choice.machine_type.capabilities.io_limits,
    }
}

fn refused(plan: &LaunchPlan, why: String) -> HostError {
    HostError::new(HostErrorKind::Permanent, "restore the VM of", plan.owner.as_str()).because(why)
}

async fn loaded(
    memory: MemoryDir,
    manifest: Manifest,
    plan: &LaunchPlan,
) -> Result<(RamFile, Vec<u8>), HostError> {
    let loaded = tokio::task::spawn_blocking(move || memory.load(&manifest)).await;
    loaded.map_err(|error| refused(plan, error.to_string()))?
}
