//! Taking the device state and the RAM of a VM that is held: for its standby, or for a snapshot.

use std::os::unix::fs::MetadataExt;
use std::time::Duration;

use jiff::Timestamp;
use stead_controllers::host::{HostError, HostErrorKind, Memory, SavedMemory, VmmState};
use stead_schemas::names::Uid;
use stead_schemas::quantity::Bytes;
use stead_schemas::snapshot::PackingState;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixListener;

use super::manifest::{FileMark, Origin, RamKept};
use super::memory::MemoryDir;
use super::places::{Mapping, Record};
use super::ram::ram_of;
use super::{Attached, Qemu, command, control};
use crate::host::files;

/// For the device state to pass, in either direction: 10 ms, a second under load.
const STATE_DEADLINE: Duration = Duration::from_secs(30);
/// And for each of these much of RAM that passes with it: a hundredth of what is usual.
const RAM_PER_SECOND: u64 = 8 << 20;
/// Device state without RAM is 330 KiB.
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
            None if memory.has_rest() && Record::read(&self.places(owner))?.is_none() => Some(Memory::Loose),
            seen => seen,
        })
    }

    /// Saves the memory of a paused VM, or resumes it.
    pub(super) async fn save_memory(&self, owner: &Uid, generation: u64) -> Result<(), HostError> {
        let attached = self.find_attached(owner)?;
        let memory = self.memory_dir(owner);
        let saved = async {
            if self.vmm_state(owner, &attached).await != VmmState::Paused {
                return Err(transient(owner, "it is not paused".to_owned()));
            }
            memory.begin()?;
            let (origin, ram) = self.take_memory(owner, &attached, &memory, generation).await?;
            proved(owner, memory.clone(), origin, ram).await?;
            memory.publish()?;
            if let Ok(ram) = ram_of(attached.identity.pid) {
                attached.held_ram.hold(ram);
            }
            Ok(())
        };
        let saved = saved.await;
        if saved.is_err() {
            // A memory that is saved and a VM that runs must never meet.
            memory.discard()?;
            self.let_run_on(owner, &attached).await;
        }
        saved
    }

    /// A VM that was held for a save runs on; one that does not is found paused.
    pub(super) async fn let_run_on(&self, owner: &Uid, attached: &Attached) {
        let resumed = self.on_monitor(attached, async |monitor| {
            monitor.cancel().await;
            monitor.resume().await
        });
        if let Err(error) = resumed.await {
            tracing::warn!(%owner, error, "a VM that was held is still paused");
        }
        // Its clock stood still. A channel that is full is reconnected to, with the time told again.
        let _ = attached.control.ask(control::clock(), |_| {});
    }

    /// Puts device state and RAM of a VM that is held into a save in progress, under a number.
    pub(super) async fn take_memory(
        &self,
        owner: &Uid,
        attached: &Attached,
        memory: &MemoryDir,
        generation: u64,
    ) -> Result<(Origin, RamKept), HostError> {
        let io = |error| HostError::io("save the VM of", owner.as_str(), error);
        let record = Record::read(&self.places(owner))?;
        let record = record.ok_or_else(|| transient(owner, "it is gone".to_owned()))?;
        if record.new_token.is_some() {
            // Which of the two it would wake with is not known.
            return Err(transient(owner, "its guest is becoming another".to_owned()));
        }
        let is_own = record.mapping != Mapping::Private;
        let ram = is_own.then(|| ram_of(attached.identity.pid)).transpose().map_err(io)?;
        if let Some(ram) = &ram {
            self.check_room(owner, memory, ram.metadata().map_err(io)?.blocks() * 512)?;
        }
        // Side by side, and both to their end: the guest is held for as long.
        let keeping = ram.map(|ram| {
            let memory = memory.clone();
            tokio::task::spawn_blocking(move || memory.keep_ram(&ram))
        });
        let version = self.take_state(owner, attached, memory, &record).await;
        let kept = match keeping {
            Some(kept) => kept.await.map_err(|error| transient(owner, error.to_string()))?,
            None => Ok(RamKept::InState),
        };
        let version = version?;
        let (kernel, initrd) = self.config.boot_files.get()?;
        let overlay = record.overlay.as_ref();
        let overlay =
            overlay.ok_or_else(|| transient(owner, "its record is older than saving".to_owned()))?;
        let origin = Origin {
            generation,
            run: record.run,
            launched_at: record.launched_at,
            saved_at: Timestamp::now(),
            token: record.token,
            backend: "qemu".to_owned(),
            version,
            machine: command::MACHINE.to_owned(),
            kernel: kernel.vmlinux.clone(),
            initrd: initrd.clone(),
            overlay: FileMark::of(&(self.config.disk)(overlay)).map_err(io)?,
            headers: record.headers.clone(),
            is_adopted: false,
        };
        Ok((origin, kept?))
    }

    /// Before the disk is touched: a copy that would fill it takes room from others until it fails.
    fn check_room(&self, owner: &Uid, memory: &MemoryDir, ram_bytes: u64) -> Result<(), HostError> {
        let needed = Bytes(ram_bytes.saturating_sub(memory.bytes_to_go_on_from()));
        let (free, reserve) = (files::free_bytes(&self.config.data_dir), self.config.disk_reserve);
        if free.0 >= needed.0.saturating_add(reserve.0) {
            return Ok(());
        }
        let why = format!("{needed} are needed; {free} are free, of which {reserve} are kept in reserve");
        Err(HostError::new(HostErrorKind::Exhausted, "save the VM of", owner.as_str()).because(why))
    }

    /// The device state, and RAM that is not in a file of its own. The VMM's version.
    async fn take_state(
        &self,
        owner: &Uid,
        attached: &Attached,
        memory: &MemoryDir,
        record: &Record,
    ) -> Result<String, HostError> {
        let io = |error| HostError::io("save the VM of", owner.as_str(), error);
        let socket = self.places(owner).migration();
        super::remove_file(&socket).map_err(io)?;
        let listener = UnixListener::bind(&socket).map_err(io)?;
        let with_ram = record.mapping == Mapping::Private;
        let bytes_max = STATE_BYTES_MAX + if with_ram { record.memory.0 + record.memory.0 / 64 } else { 0 };
        let written = async {
            self.on_monitor(attached, async |monitor| monitor.begin_save(&socket, with_ram).await).await?;
            let (stream, _) = listener.accept().await.map_err(|error| error.to_string())?;
            let mut file =
                tokio::fs::File::create(memory.saving_state()).await.map_err(|error| error.to_string())?;
            let mut stream = stream.take(bytes_max + 1);
            let count = tokio::io::copy(&mut stream, &mut file).await.map_err(|error| error.to_string())?;
            file.flush().await.map_err(|error| error.to_string())?;
            if count > bytes_max {
                return Err(format!("the device state is larger than {bytes_max} bytes"));
            }
            self.on_monitor(attached, async |monitor| monitor.migrated().await).await?;
            self.on_monitor(attached, async |monitor| monitor.version().await).await
        };
        let deadline = state_deadline(with_ram.then_some(record.memory));
        let version = tokio::time::timeout(deadline, written).await.unwrap_or_else(|_| Err(late(deadline)));
        super::remove_file(&socket).map_err(io)?;
        version.map_err(|why| transient(owner, why))
    }
}

/// What was taken is made durable and known; the VM need not be held for that.
pub(super) async fn proved(
    owner: &Uid,
    memory: MemoryDir,
    origin: Origin,
    ram: RamKept,
) -> Result<(), HostError> {
    let proved = tokio::task::spawn_blocking(move || memory.prove(origin, ram)).await;
    proved.map_err(|error| transient(owner, error.to_string()))?
}

pub(super) fn transient(owner: &Uid, why: String) -> HostError {
    HostError::new(HostErrorKind::Transient, "save the VM of", owner.as_str()).because(why)
}

/// For state to pass, and the RAM that passes with it.
pub(super) fn state_deadline(ram: Option<Bytes>) -> Duration {
    STATE_DEADLINE + Duration::from_secs(ram.map_or(0, |Bytes(bytes)| bytes / RAM_PER_SECOND))
}

pub(super) fn late(deadline: Duration) -> String {
    format!("not done within {} s", deadline.as_secs())
}
