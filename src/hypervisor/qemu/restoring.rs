//! Starting a VMM from a saved memory, and taking over that of a snapshot.
//!
//! The saved RAM is mapped privately: nothing is read before it is needed, and forks share what none of
//! them has written to. One that is packed is unpacked into an anonymous file.
//! Guarantees: no guest runs on from RAM that this daemon has not proved or read as a whole.

use jiff::Timestamp;
use stead_controllers::host::{AdoptPlan, HostError, HostErrorKind, LaunchPlan, Machines};
use stead_schemas::names::Uid;
use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;
use tokio::task::JoinHandle;

use super::launching::{Content, Ram, board};
use super::manifest::{FileMark, Manifest, Origin};
use super::memory::{MemoryDir, RamFile};
use super::monitor::STATE_DEADLINE;
use super::places::{Mapping, Record};
use super::{Attached, Qemu, last_line};

impl Qemu {
    /// Leaves the VM paused, or nothing of it; what it came from stays saved.
    pub(super) async fn launch_saved(&self, plan: &LaunchPlan) -> Result<(), HostError> {
        self.check_nothing_there(&plan.owner)?;
        let restored = self.load_memory(plan).await;
        if restored.is_err() {
            // Clearing away in passes of its own would count as progress, and hearing of this end as
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
        let board = board(plan)?;
        if origin.machine != board.as_str() {
            let why =
                format!("its memory was saved of a VM on {}, not on {}", origin.machine, board.as_str());
            return Err(refused(why));
        }
        let failed = |error| HostError::io("look at the disks of", plan.owner.as_str(), error);
        if !plan.volumes.iter().eq(origin.volumes.iter().map(|volume| &volume.disk)) {
            return Err(refused("its memory was saved with other volumes".to_owned()));
        }
        if !self.is_as_saved(&plan.overlay, &origin).map_err(failed)? {
            return Err(refused("its disk was written to after its memory was saved".to_owned()));
        }
        let (ram, state) = loaded(memory.clone(), manifest.clone(), plan).await?;
        // While the VMM starts: it looks at its RAM only when the device state comes.
        let checking = self.begin_check(plan, memory, &manifest, &ram)?;
        let ram = match ram {
            RamFile::Own(file) => Ram { file, mapping: Mapping::Own, content: Content::Saved },
            RamFile::Saved(file) => Ram { file, mapping: Mapping::Private, content: Content::Saved },
        };
        let record = Record {
            run: origin.run,
            launch: plan.launch,
            board,
            token: origin.token.clone(),
            new_token: None,
            // One that was taken over begins now: its guest has not been heard of under this name.
            launched_at: if origin.is_adopted { Timestamp::now() } else { origin.launched_at },
            identity: None,
            tap: plan.network.as_ref().map(|card| card.tap.clone()),
            overlay: Some(plan.overlay.clone()),
            memory: plan.memory,
            mapping: ram.mapping,
            ram_inode: 0,
            volumes: plan.volumes.clone(),
            kernel_files: origin.kernel_files.clone(),
        };
        let attached = self.start(plan, record, &ram).await;
        // However the start went: nothing is written to its RAM when this has answered.
        let checked = checking.await.map_err(|error| refused(error.to_string()))?;
        let attached = attached?;
        checked?;
        self.load_state(plan, &attached, &origin, state).await
    }

    /// Unpacks a RAM that is packed; reads another as a whole, unless this daemon proved the very file.
    fn begin_check(
        &self,
        plan: &LaunchPlan,
        memory: MemoryDir,
        manifest: &Manifest,
        ram: &RamFile,
    ) -> Result<JoinHandle<Result<(), HostError>>, HostError> {
        let (is_proved, manifest) = (self.is_proved(&plan.owner, &memory), manifest.clone());
        let own = match ram {
            RamFile::Own(file) => Some(file.try_clone().map_err(|error| refused(plan, error.to_string()))?),
            RamFile::Saved(_) => None,
        };
        Ok(tokio::task::spawn_blocking(move || match own {
            Some(file) => memory.unpack(&manifest, &file),
            None if is_proved => Ok(()),
            None => memory.check_ram(&manifest),
        }))
    }

    async fn load_state(
        &self,
        plan: &LaunchPlan,
        attached: &Attached,
        origin: &Origin,
        state: Vec<u8>,
    ) -> Result<(), HostError> {
        let failed = |why: String| {
            let why = format!("{why}: {}", last_line(&self.places(&plan.owner).vmm_log()));
            HostError::new(HostErrorKind::Transient, "restore the VM of", plan.owner.as_str()).because(why)
        };
        let version =
            self.on_monitor(attached, async |monitor| monitor.version().await).await.map_err(failed)?;
        if version != origin.version {
            let why = format!("its memory was saved by QEMU {}, this is {version}", origin.version);
            return Err(refused(plan, why));
        }
        let socket = self.places(&plan.owner).migration();
        let passed = async {
            self.on_monitor(attached, async |monitor| monitor.begin_load(&socket).await).await?;
            let mut stream = UnixStream::connect(&socket).await.map_err(|error| error.to_string())?;
            stream.write_all(&state).await.map_err(|error| error.to_string())?;
            stream.shutdown().await.map_err(|error| error.to_string())?;
            self.on_monitor(attached, async |monitor| monitor.migrated().await).await
        };
        let late = |_| Err(format!("not done within {} s", STATE_DEADLINE.as_secs()));
        tokio::time::timeout(STATE_DEADLINE, passed).await.unwrap_or_else(late).map_err(failed)
    }

    /// This daemon has written the saved RAM as it is, or read it as a whole.
    pub(super) fn has_proved(&self, whose: &Uid, memory: &MemoryDir) {
        if let Some(mark) = memory.ram_mark() {
            self.proved().insert(whose.clone(), mark);
        }
    }

    pub(super) fn is_proved(&self, whose: &Uid, memory: &MemoryDir) -> bool {
        memory.ram_mark().is_some_and(|mark| self.proved().get(whose) == Some(&mark))
    }

    /// Makes the memory of a snapshot the saved one of another instance.
    pub(super) async fn adopt(&self, plan: &AdoptPlan) -> Result<(), HostError> {
        let failed = |why: String| {
            HostError::new(HostErrorKind::Transient, "take over a memory for", plan.owner.as_str())
                .because(why)
        };
        let from = MemoryDir::of_snapshot(&self.config.data_dir, &plan.snapshot);
        let missing =
            || HostError::new(HostErrorKind::Missing, "take over the memory of", plan.snapshot.as_str());
        let manifest = from.manifest()?.ok_or_else(missing)?;
        // Before its RAM is taken for one that was checked already.
        self.check_whole(&plan.snapshot)?;
        let seen = |error| HostError::io("look at the disks of", plan.owner.as_str(), error);
        let overlay = FileMark::of(&(self.config.disk)(&plan.overlay)).map_err(seen)?;
        let volumes = self.mark_volumes(&plan.volumes).map_err(seen)?;
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
        let is_proved = self.is_proved(&plan.snapshot, &from);
        let to = self.memory_dir(&plan.owner);
        let (source, target) = (from.clone(), to.clone());
        let adopted = tokio::task::spawn_blocking(move || {
            if !is_proved {
                from.check_ram(&manifest)?;
            }
            to.begin()?;
            let ram = to.keep_shared(&from, &manifest)?;
            to.prove(origin, ram)?;
            to.publish()
        });
        adopted.await.map_err(|error| failed(error.to_string()))??;
        self.has_proved(&plan.snapshot, &source);
        self.has_proved(&plan.owner, &target);
        Ok(())
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
