//! Starting a VMM from a saved memory, and taking over that of a snapshot.
//!
//! RAM of its own is read back into an anonymous file and checked; that of a snapshot is mapped
//! privately, so that forks share what none of them has written to.

use std::fs::File;

use jiff::Timestamp;
use stead_controllers::host::{AdoptPlan, HostError, HostErrorKind, LaunchPlan, Machines};
use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;

use super::launching::{Content, Ram, memory_size};
use super::manifest::{FileMark, Manifest, Origin};
use super::memory::{MemoryDir, RamFile};
use super::places::{Mapping, Record};
use super::ram::fresh_ram;
use super::saving::{late, state_deadline};
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
        let overlay = FileMark::of(&(self.config.disk)(&plan.overlay))
            .map_err(|error| HostError::io("look at the disk of", plan.owner.as_str(), error))?;
        if overlay != origin.overlay {
            return Err(refused("its disk was written to after its memory was saved".to_owned()));
        }
        let (ram, state) = loaded(memory.clone(), manifest.clone(), plan).await?;
        let is_ram_in_state = matches!(ram, RamFile::Empty);
        // Read back while the VMM starts: it looks at it only when it runs on.
        let filling = match &ram {
            RamFile::Own(file) => {
                let file = file.try_clone().map_err(|error| refused(error.to_string()))?;
                tokio::task::spawn_blocking(move || memory.fill(&manifest, &file))
            }
            RamFile::Shared(_) | RamFile::Empty => tokio::task::spawn_blocking(|| Ok(())),
        };
        let ram = ram_for(plan, ram)?;
        let record = Record {
            run: origin.run,
            token: origin.token.clone(),
            new_token: None,
            // One that was taken over begins now: its guest has not been heard of under this name.
            launched_at: if origin.is_adopted { Timestamp::now() } else { origin.launched_at },
            identity: None,
            tap: plan.network.as_ref().map(|card| card.tap.clone()),
            overlay: Some(plan.overlay.clone()),
            memory: plan.memory,
            mapping: ram.mapping,
            headers: origin.headers.clone(),
        };
        let attached = self.start(plan, record, &ram).await;
        // However the start went: nothing is written to its RAM when this has answered.
        let filled = filling.await.map_err(|error| refused(error.to_string()))?;
        let attached = attached?;
        filled?;
        self.load_state(plan, &attached, &origin, state, is_ram_in_state).await
    }

    async fn load_state(
        &self,
        plan: &LaunchPlan,
        attached: &Attached,
        origin: &Origin,
        state: File,
        is_ram_in_state: bool,
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
            self.on_monitor(attached, async |monitor| monitor.begin_load(&socket, is_ram_in_state).await)
                .await?;
            let mut stream = UnixStream::connect(&socket).await.map_err(|error| error.to_string())?;
            let mut state = tokio::fs::File::from_std(state);
            tokio::io::copy(&mut state, &mut stream).await.map_err(|error| error.to_string())?;
            stream.shutdown().await.map_err(|error| error.to_string())?;
            self.on_monitor(attached, async |monitor| monitor.migrated().await).await
        };
        let deadline = state_deadline(is_ram_in_state.then_some(plan.memory));
        tokio::time::timeout(deadline, passed).await.unwrap_or_else(|_| Err(late(deadline))).map_err(failed)
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
        let overlay = FileMark::of(&(self.config.disk)(&plan.overlay))
            .map_err(|error| HostError::io("look at the disk of", plan.owner.as_str(), error))?;
        let origin = Origin {
            generation: plan.generation,
            run: plan.run,
            launched_at: Timestamp::now(),
            overlay,
            is_adopted: true,
            ..manifest.origin.clone()
        };
        let is_checked = self.checked().contains(&plan.snapshot);
        let to = self.memory_dir(&plan.owner);
        let adopted = tokio::task::spawn_blocking(move || {
            if !is_checked {
                from.check_ram(&manifest)?;
            }
            to.begin()?;
            let ram = to.keep_shared(&from, &manifest)?;
            to.prove(origin, ram)?;
            to.publish()
        });
        adopted.await.map_err(|error| failed(error.to_string()))??;
        self.checked().insert(plan.snapshot.clone());
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
) -> Result<(RamFile, File), HostError> {
    let loaded = tokio::task::spawn_blocking(move || memory.load(&manifest)).await;
    loaded.map_err(|error| refused(plan, error.to_string()))?
}

fn ram_for(plan: &LaunchPlan, ram: RamFile) -> Result<Ram, HostError> {
    let (file, mapping) = match ram {
        RamFile::Own(file) => (file, Mapping::Own),
        RamFile::Shared(file) => (file, Mapping::Private),
        RamFile::Empty => {
            let fresh = fresh_ram(memory_size(plan));
            let failed = |error| HostError::io("prepare a VM for", plan.owner.as_str(), error);
            (fresh.map_err(failed)?, Mapping::Own)
        }
    };
    Ok(Ram { file, mapping, content: Content::Saved })
}
