//! Taking the device state and the RAM of a VM that is held: for its standby, or for a snapshot.
//!
//! ```text
//! an anonymous RAM     copied as a whole
//! a RAM mapped from    its file taken over, or copied before the VM is held; then the VM's own pages,
//! what was saved       which are few
//! ```

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;

use jiff::Timestamp;
use stead_controllers::host::{HostError, HostErrorKind, Memory, SavedMemory, VmmState, VolumeDisk};
use stead_schemas::names::Uid;
use stead_schemas::numbers::StandbyNo;
use stead_schemas::quantity::Bytes;
use stead_schemas::snapshot::PackingState;

use super::manifest::{FileMark, Origin, RamKept, VolumeMark};
use super::memory::MemoryDir;
use super::own_pages::OwnPages;
use super::places::{Mapping, Record};
use super::ram::ram_of;
use super::{Attached, Qemu, control};
use crate::host::files;

/// Device state is 220 KiB.
const STATE_BYTES_MAX: u64 = 64 << 20;

impl Qemu {
    /// What is saved of an instance, and how far its compression is.
    pub(super) fn seen_memory(&self, owner: &Uid) -> Result<Option<Memory>, HostError> {
        let memory = self.memory_dir(owner);
        Ok(match memory.seen()? {
            Some(Memory::Saved(saved)) if self.packer.is_going(owner) => {
                Some(Memory::Saved(SavedMemory { packing: PackingState::Packing, ..saved }))
            }
            // Of a VM that a reboot ended.
            None if memory.has_rest()? && Record::read(&self.places(owner))?.is_none() => Some(Memory::Loose),
            seen => seen,
        })
    }

    /// Saves the memory of a paused VM, or resumes it.
    pub(super) async fn save_memory(&self, owner: &Uid, standby: StandbyNo) -> Result<(), HostError> {
        let attached = self.find_attached(owner)?;
        let memory = self.memory_dir(owner);
        let saved = async {
            if self.vmm_state(owner, &attached).await != VmmState::Paused {
                return Err(transient(owner, "it is not paused".to_owned()));
            }
            let begin = memory.clone();
            on_thread(owner, move || begin.begin()).await?;
            let begun = self.begin_ram(owner, &attached, &memory).await?;
            let (origin, ram) = self.take_memory(owner, &attached, &memory, begun, standby).await?;
            proved(owner, memory.clone(), origin, ram).await?;
            let publish = memory.clone();
            on_thread(owner, move || publish.publish()).await?;
            self.has_proved(owner, &memory);
            if let Ok(ram) = ram_of(attached.identity.pid) {
                attached.held_ram.hold(ram);
            }
            Ok(())
        };
        let saved = saved.await;
        if saved.is_err() {
            // A memory that is saved and a VM that runs must never meet.
            on_thread(owner, move || memory.unsave()).await?;
            self.let_run_on(owner, &attached).await;
        }
        saved
    }

    /// A VM that was held for a save runs on; one that does not is found paused.
    pub(super) async fn let_run_on(&self, owner: &Uid, attached: &Attached) {
        let resumed = self.on_monitor(attached, async |monitor| monitor.resume().await);
        if let Err(error) = resumed.await {
            tracing::warn!(%owner, error, "a VM that was held is still paused");
        }
        attached.control.forgive();
        // Its clock stood still. A channel that is full is reconnected to, with the time told again.
        let _ = attached.control.ask(control::clock(), |_| {});
    }

    /// What of the RAM can be kept before a VM is held.
    pub(super) async fn begin_ram(
        &self,
        owner: &Uid,
        attached: &Attached,
        memory: &MemoryDir,
    ) -> Result<Option<RamKept>, HostError> {
        let needed = self.bytes_to_save(owner, attached, memory).await?;
        self.check_room(owner, needed)?;
        match self.record_to_save(owner)?.mapping {
            Mapping::Own => Ok(None),
            Mapping::Private => {
                let (memory, running) = (memory.clone(), self.memory_dir(owner));
                on_thread(owner, move || memory.begin_with_mapped(&running)).await.map(Some)
            }
        }
    }

    /// How much a save of this VM's RAM writes, at most.
    pub(super) async fn bytes_to_save(
        &self,
        owner: &Uid,
        attached: &Attached,
        memory: &MemoryDir,
    ) -> Result<Bytes, HostError> {
        let (record, pid) = (self.record_to_save(owner)?, attached.identity.pid);
        let (memory, running, of_thread) = (memory.clone(), self.memory_dir(owner), owner.clone());
        let measure = move || {
            let bytes = match record.mapping {
                Mapping::Own => ram_of(pid).and_then(|ram| ram.metadata()).map(|ram| ram.blocks() * 512),
                Mapping::Private => own_pages(pid, &record)
                    .map(|pages| pages.bytes().saturating_add(memory.bytes_to_copy(&running))),
            };
            let failed = |error| HostError::io("measure the memory of", of_thread.as_str(), error);
            bytes.map(Bytes).map_err(failed)
        };
        on_thread(owner, measure).await
    }

    fn record_to_save(&self, owner: &Uid) -> Result<Record, HostError> {
        let record = Record::read(&self.places(owner))?;
        record.ok_or_else(|| transient(owner, "it is gone".to_owned()))
    }

    /// Puts device state and RAM of a VM that is held into a save in progress, under a number.
    pub(super) async fn take_memory(
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
            // Which of the two it would wake with is not known.
            return Err(transient(owner, "its guest is becoming another".to_owned()));
        }
        // Side by side, and both to their end: the guest is held for as long.
        let keeping = on_thread(owner, {
            let (owner, memory, record, pid) =
                (owner.clone(), memory.clone(), record.clone(), attached.identity.pid);
            let io = move |error| HostError::io("save the VM of", owner.as_str(), error);
            move || match begun {
                Some(begun) => memory.keep_own(&own_pages(pid, &record).map_err(io)?, begun),
                None => memory.keep_ram(&ram_of(pid).map_err(io)?),
            }
        });
        let (version, kept) = tokio::join!(self.take_state(owner, attached, memory), keeping);
        let version = version?;
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
            backend: "qemu".to_owned(),
            version,
            machine: record.board.as_str().to_owned(),
            kernel: kernel.vmlinux.clone(),
            initrd: initrd.clone(),
            overlay: FileMark::of(&(self.config.disk)(overlay)).map_err(io)?,
            volumes: self.mark_volumes(&record.volumes).map_err(io)?,
            kernel_files: record.kernel_files.clone(),
            is_adopted: false,
        };
        Ok((origin, kept?))
    }

    /// Disks of volumes, as they are now.
    pub(super) fn mark_volumes(&self, disks: &[VolumeDisk]) -> io::Result<Vec<VolumeMark>> {
        disks.iter().map(|disk| VolumeMark::of(disk, &(self.config.disk)(&disk.disk))).collect()
    }

    /// No disk was written to since a memory was saved that knows what is there.
    pub(super) fn is_as_saved(&self, overlay: &Uid, origin: &Origin) -> io::Result<bool> {
        let volumes: Vec<_> = origin.volumes.iter().map(|volume| volume.disk.clone()).collect();
        let is_overlay = FileMark::of(&(self.config.disk)(overlay))? == origin.overlay;
        Ok(is_overlay && self.mark_volumes(&volumes)? == origin.volumes)
    }

    /// Before the disk is touched: a copy that would fill it takes room from others until it fails.
    fn check_room(&self, owner: &Uid, needed: Bytes) -> Result<(), HostError> {
        let (free, reserve) = (files::free_bytes(&self.config.data_dir), self.config.disk_reserve);
        if free.0 >= needed.0.saturating_add(reserve.0) {
            return Ok(());
        }
        let why = format!("{needed} are needed; {free} are free, of which {reserve} are kept in reserve");
        Err(HostError::new(HostErrorKind::Exhausted, "save the VM of", owner.as_str()).because(why))
    }

    /// The device state. The VMM's version.
    async fn take_state(
        &self,
        owner: &Uid,
        attached: &Attached,
        memory: &MemoryDir,
    ) -> Result<String, HostError> {
        let file = memory.saving_state();
        let written = self.on_monitor(attached, async |monitor| {
            monitor.save_state(&file).await?;
            monitor.version().await
        });
        let version = written.await.map_err(|why| transient(owner, why))?;
        let seen = fs::metadata(&file).map_err(|error| transient(owner, error.to_string()))?;
        if seen.len() > STATE_BYTES_MAX {
            let why = format!("the device state is larger than {STATE_BYTES_MAX} bytes");
            return Err(transient(owner, why));
        }
        Ok(version)
    }
}

fn own_pages(pid: u32, record: &Record) -> io::Result<OwnPages> {
    OwnPages::of(pid, record.ram_inode, record.memory.mib_ceil() << 20)
}

/// What waits for the disk does so on a thread: all passes over VMs are polled by one task.
pub(super) async fn on_thread<T: Send + 'static>(
    owner: &Uid,
    work: impl FnOnce() -> Result<T, HostError> + Send + 'static,
) -> Result<T, HostError> {
    let ended = |error: tokio::task::JoinError| {
        HostError::new(HostErrorKind::Transient, "work on the files of", owner.as_str()).because(error)
    };
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|error| Err(ended(error)))
}

/// What was taken is made durable and known; the VM need not be held for that.
pub(super) async fn proved(
    owner: &Uid,
    memory: MemoryDir,
    origin: Origin,
    ram: RamKept,
) -> Result<(), HostError> {
    on_thread(owner, move || memory.prove(origin, ram)).await
}

pub(super) fn transient(owner: &Uid, why: String) -> HostError {
    HostError::new(HostErrorKind::Transient, "save the VM of", owner.as_str()).because(why)
}
