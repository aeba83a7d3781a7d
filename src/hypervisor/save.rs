//! Saving the device state and the RAM of a paused VM: for its standby, or for a snapshot.
//!
//! ```text
//! an anonymous RAM file            copied as a whole
//! RAM mapped from a saved file     that file taken over, or copied before the VM is paused; then the dirty
//!                                  pages, which are few
//! RAM of the VMM's own             written by the VMM
//! ```

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use jiff::Timestamp;
use stead_controllers::host::{HostError, HostErrorKind, Memory, SavedMemory, VmmState, VolumeDisk};
use stead_schemas::names::Uid;
use stead_schemas::numbers::StandbyNo;
use stead_schemas::quantity::Bytes;
use stead_schemas::snapshot::CompressionState;

use super::attached::Attached;
use super::driver::{RamAccess, SaveFiles};
use super::hypervisors::Hypervisors;
use super::live_volumes::LiveVolumes;
use super::record::{Mapping, Record};
use crate::guest_channel::clock;
use crate::host::files;
use crate::memory::{
    DirtyPages, EARLIER_QUEUES, FileMark, MemoryDir, Origin, RamKept, STATE_BYTES_MAX, VolumeMark, ram_of,
};

impl Hypervisors {
    /// Reports the saved memory of an instance, and whether it is being compressed.
    pub(crate) fn observe_memory(&self, owner: &Uid) -> Result<Option<Memory>, HostError> {
        let memory = self.memory_dir(owner);
        Ok(match memory.observe()? {
            Some(Memory::Saved(saved)) if self.compressor.is_in_progress(owner) => {
                Some(Memory::Saved(SavedMemory { compression_state: CompressionState::Compressing, ..saved }))
            }
            // The files of a VM that a reboot ended.
            None if memory.has_remainder()? && Record::read(&self.paths(owner))?.is_none() => {
                Some(Memory::Incomplete)
            }
            seen => seen,
        })
    }

    /// Saves the memory of a paused VM. When that fails, the VM is resumed.
    pub(crate) async fn save_memory(&self, owner: &Uid, standby: StandbyNo) -> Result<(), HostError> {
        let attached = self.find_attached(owner)?;
        Self::require(owner, &attached.choice, |has| has.standby, "save the VM of")?;
        let memory = self.memory_dir(owner);
        let saved = async {
            if self.vmm_state(owner, &attached).await != VmmState::Paused {
                return Err(transient(owner, "it is not paused".to_owned()));
            }
            let begin = memory.clone();
            on_thread(owner, move || begin.begin()).await?;
            let begun = self.begin_ram(owner, &attached, &memory).await?;
            let (origin, ram) = self.take_memory(owner, &attached, &memory, begun, standby).await?;
            prove(owner, memory.clone(), origin, ram).await?;
            let publish = memory.clone();
            on_thread(owner, move || publish.publish()).await?;
            self.set_verified(owner, &memory);
            if attached.choice.driver.ram_access() == RamAccess::Host
                && let Ok(ram) = ram_of(attached.identity.pid)
            {
                attached.held_ram.hold(ram);
            }
            Ok(())
        };
        let saved = saved.await;
        if saved.is_err() {
            // A VM must not run while its memory is saved.
            on_thread(owner, move || memory.unsave()).await?;
            self.let_run_on(owner, &attached).await;
        }
        saved
    }

    /// Resumes a VM that was paused for a save. A VM that cannot be resumed is found paused later.
    pub(crate) async fn let_run_on(&self, owner: &Uid, attached: &Attached) {
        let resumed = self.on_session(attached, async |session| session.resume().await);
        if let Err(error) = resumed.await {
            tracing::warn!(%owner, error, "a VM that was paused for a save is still paused");
        }
        attached.channel.forgive();
        // The guest's clock stood still. A channel that is full is reconnected, which sends the time again.
        let _ = attached.channel.ask(clock(), |_| {});
    }

    /// Stores as much of the RAM as possible before the VM is paused.
    pub(crate) async fn begin_ram(
        &self,
        owner: &Uid,
        attached: &Attached,
        memory: &MemoryDir,
    ) -> Result<Option<RamKept>, HostError> {
        let needed = self.bytes_to_save(owner, attached, memory).await?;
        self.check_room(owner, needed)?;
        match (attached.choice.driver.ram_access(), self.record_to_save(owner)?.mapping) {
            (RamAccess::Vmm, _) | (RamAccess::Host, Mapping::Own) => Ok(None),
            (RamAccess::Host, Mapping::Private) => {
                let (memory, running) = (memory.clone(), self.memory_dir(owner));
                on_thread(owner, move || memory.begin_with_mapped(&running)).await.map(Some)
            }
        }
    }

    /// Returns how many bytes a save of this VM's RAM writes at most.
    pub(crate) async fn bytes_to_save(
        &self,
        owner: &Uid,
        attached: &Attached,
        memory: &MemoryDir,
    ) -> Result<Bytes, HostError> {
        let (record, pid) = (self.record_to_save(owner)?, attached.identity.pid);
        let access = attached.choice.driver.ram_access();
        let (memory, running, name) = (memory.clone(), self.memory_dir(owner), owner.clone());
        let measure = move || {
            let bytes = match (access, record.mapping) {
                (RamAccess::Vmm, _) => Ok(record.memory.mib_ceil() << 20),
                (RamAccess::Host, Mapping::Own) => {
                    ram_of(pid).and_then(|ram| ram.metadata()).map(|ram| ram.blocks() * 512)
                }
                (RamAccess::Host, Mapping::Private) => dirty_pages(pid, &record)
                    .map(|pages| pages.bytes().saturating_add(memory.bytes_to_copy(&running))),
            };
            let failed = |error| HostError::io("measure the memory of", name.as_str(), error);
            bytes.map(Bytes).map_err(failed)
        };
        on_thread(owner, measure).await
    }

    fn record_to_save(&self, owner: &Uid) -> Result<Record, HostError> {
        let record = Record::read(&self.paths(owner))?;
        record.ok_or_else(|| transient(owner, "it is gone".to_owned()))
    }

    /// Writes device state and RAM of a paused VM into a save in progress, for this standby.
    pub(crate) async fn take_memory(
        &self,
        owner: &Uid,
        attached: &Attached,
        memory: &MemoryDir,
        begun: Option<RamKept>,
        standby: StandbyNo,
    ) -> Result<(Origin, RamKept), HostError> {
        let io = |error| HostError::io("save the VM of", owner.as_str(), error);
        let record = self.record_to_save(owner)?;
        if record.new_token.is_some() {
            // It is not known which of the two tokens the restored guest would have.
            return Err(transient(owner, "its guest is taking another identity".to_owned()));
        }
        let volumes = LiveVolumes::of(&record, &self.paths(owner))?;
        if volumes.unsure.is_some() {
            return Err(transient(owner, "a volume is being put into it, or taken out".to_owned()));
        }
        let (version, kept) = match attached.choice.driver.ram_access() {
            RamAccess::Host => {
                let (memory_of_ram, record, pid, name) =
                    (memory.clone(), record.clone(), attached.identity.pid, owner.clone());
                let io = move |error| HostError::io("save the VM of", name.as_str(), error);
                let keeping = on_thread(owner, move || match begun {
                    Some(begun) => memory_of_ram.keep_dirty(&dirty_pages(pid, &record).map_err(io)?, begun),
                    None => memory_of_ram.keep_ram(&ram_of(pid).map_err(io)?),
                });
                // Side by side, and both to their end: the guest is paused for as long.
                let (version, kept) = tokio::join!(self.save_state(owner, attached, memory, None), keeping);
                (version?, kept?)
            }
            RamAccess::Vmm => {
                let version = self.save_state(owner, attached, memory, Some(memory.saving_ram())).await?;
                let written = memory.clone();
                (version, on_thread(owner, move || written.keep_written()).await?)
            }
        };
        let (kernel, initrd) = self.config.boot_files.get()?;
        let overlay = record.overlay.as_ref();
        let overlay =
            overlay.ok_or_else(|| transient(owner, "its record is older than saving".to_owned()))?;
        let origin = Origin {
            standby,
            run: record.run,
            launch: record.launch,
            launched_at: record.launched_at,
            saved_at: Timestamp::now(),
            token: record.token,
            backend: attached.choice.driver.name().to_owned(),
            version,
            machine: attached.choice.machine_type.name.to_owned(),
            device_set: record.device_set,
            kernel: kernel.vmlinux.clone(),
            initrd: initrd.clone(),
            overlay: FileMark::of(&(self.config.disk)(overlay)).map_err(io)?,
            volumes: self.mark_volumes(&volumes.volumes).map_err(io)?,
            kernel_files: record.kernel_files.clone(),
            queues: record.queues.unwrap_or(EARLIER_QUEUES),
            is_adopted: false,
        };
        Ok((origin, kept))
    }

    /// Marks disks of volumes as they are now.
    pub(crate) fn mark_volumes(&self, disks: &[VolumeDisk]) -> io::Result<Vec<VolumeMark>> {
        disks.iter().map(|disk| VolumeMark::of(disk, &(self.config.disk)(&disk.disk))).collect()
    }

    /// Returns whether no disk was written to since the memory was saved.
    pub(crate) fn is_as_saved(&self, overlay: &Uid, origin: &Origin) -> io::Result<bool> {
        let volumes: Vec<_> = origin.volumes.iter().map(|volume| volume.disk.clone()).collect();
        let overlay = FileMark::of(&(self.config.disk)(overlay))?;
        let are_same = |seen: &[VolumeMark]| {
            seen.iter().zip(&origin.volumes).all(|(seen, saved)| seen.has_content_of(saved))
        };
        Ok(overlay.has_content_of(&origin.overlay) && are_same(&self.mark_volumes(&volumes)?))
    }

    /// Refuses a save without room before anything is written: a copy that fills the disk would take the
    /// room from others until it fails.
    fn check_room(&self, owner: &Uid, needed: Bytes) -> Result<(), HostError> {
        let (free, reserve) = (files::free_bytes(&self.config.data_dir), self.config.disk_reserve);
        if free.0 >= needed.0.saturating_add(reserve.0) {
            return Ok(());
        }
        let why = format!("{needed} are needed; {free} are free, of which {reserve} are kept in reserve");
        Err(HostError::new(HostErrorKind::Exhausted, "save the VM of", owner.as_str()).because(why))
    }

    /// Makes the VMM write its device state, and its RAM if that is requested. Returns the VMM's version.
    async fn save_state(
        &self,
        owner: &Uid,
        attached: &Attached,
        memory: &MemoryDir,
        ram: Option<PathBuf>,
    ) -> Result<String, HostError> {
        let files = SaveFiles { state: memory.saving_state(), ram };
        let written = self.on_session(attached, async |session| {
            session.save(&files).await?;
            session.version().await
        });
        let version = written.await.map_err(|why| transient(owner, why))?;
        let seen = fs::metadata(&files.state).map_err(|error| transient(owner, error.to_string()))?;
        if seen.len() > STATE_BYTES_MAX {
            let why = format!("the device state is larger than {STATE_BYTES_MAX} bytes");
            return Err(transient(owner, why));
        }
        Ok(version)
    }
}

fn dirty_pages(pid: u32, record: &Record) -> io::Result<DirtyPages> {
    DirtyPages::of(pid, record.ram_inode, record.memory.mib_ceil() << 20)
}

/// Runs work that waits for the disk on a thread: one task polls all passes over VMs.
pub(crate) async fn on_thread<T: Send + 'static>(
    owner: &Uid,
    work: impl FnOnce() -> Result<T, HostError> + Send + 'static,
) -> Result<T, HostError> {
    let ended = |error: tokio::task::JoinError| {
        HostError::new(HostErrorKind::Transient, "work on the files of", owner.as_str()).because(error)
    };
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|error| Err(ended(error)))
}

/// Makes a save durable and writes its manifest; the VM need not be paused for that.
pub(crate) async fn prove(
    owner: &Uid,
    memory: MemoryDir,
    origin: Origin,
    ram: RamKept,
) -> Result<(), HostError> {
    on_thread(owner, move || memory.prove(origin, ram)).await
}

pub(crate) fn transient(owner: &Uid, why: String) -> HostError {
    HostError::new(HostErrorKind::Transient, "save the VM of", owner.as_str()).because(why)
}
