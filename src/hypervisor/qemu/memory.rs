//! The RAM of a VM as a file, and what makes it a saved memory.
//!
//! ```text
//! memory/UID/ram              guest RAM, shared with the VMM that maps it
//! memory/UID/saving/          device state and manifest being written: counts as nothing
//! memory/UID/saved/           the same, complete: made by one rename, unmade by another
//! ```
//! Guarantees: `saved` is there only when RAM, state and manifest are on the disk; it is gone, for
//! good, before a VM runs on from it. RAM has its blocks reserved, so a full disk stops a launch and
//! never a running guest.
//! Assumes: nobody else writes here. A changed byte is found: of the state always, of the RAM after a
//! reboot of the host; within one boot the page cache is the RAM.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use rustix::fs::{FallocateFlags, SeekFrom, fallocate, fstatfs, seek};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use stead_controllers::host::{HostError, HostErrorKind, Memory, SavedMemory};
use stead_schemas::guest::Token;
use stead_schemas::names::Uid;
use stead_schemas::quantity::Bytes;

use crate::host::files;
use crate::host::process::boot_id;

const RAM: &str = "ram";
const SAVING: &str = "saving";
const SAVED: &str = "saved";
const DISCARDED: &str = "discarded";
const STATE: &str = "state";
const MANIFEST: &str = "manifest.json";
/// Of guest RAM, for what is zero and what is not.
const BLOCK: usize = 4096;
/// statfs(2), `TMPFS_MAGIC`: blocks reserved there are memory taken.
const TMPFS: i64 = 0x0102_1994;

/// What was saved, and what a restore must find again.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Manifest {
    pub(super) generation: u64,
    pub(super) run: u64,
    pub(super) launched_at: Timestamp,
    pub(super) saved_at: Timestamp,
    /// The guest knows its host by it.
    pub(super) token: Token,
    pub(super) backend: String,
    /// Version of the VMM: its device state is for itself.
    pub(super) version: String,
    pub(super) machine: String,
    pub(super) kernel: PathBuf,
    pub(super) initrd: PathBuf,
    pub(super) overlay: FileMark,
    /// Within this boot of the host the page cache is the truth.
    boot_id: String,
    state_bytes: u64,
    state_sha256: String,
    ram_bytes: u64,
    ram_crc32: u32,
}

/// A file as it was: any write since shows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct FileMark {
    inode: u64,
    bytes: u64,
    changed: (i64, i64),
}

impl FileMark {
    pub(super) fn of(path: &Path) -> io::Result<Self> {
        let seen = fs::metadata(path)?;
        Ok(Self { inode: seen.ino(), bytes: seen.len(), changed: (seen.mtime(), seen.mtime_nsec()) })
    }
}

/// The memory directory of one instance.
#[derive(Debug, Clone)]
pub(super) struct MemoryDir {
    directory: PathBuf,
}

impl MemoryDir {
    pub(super) fn new(data_dir: &Path, owner: &Uid) -> Self {
        Self { directory: data_dir.join("memory").join(owner.as_str()) }
    }

    pub(super) fn ram(&self) -> PathBuf {
        self.directory.join(RAM)
    }

    /// Where the device state of a save in progress goes.
    pub(super) fn saving_state(&self) -> PathBuf {
        self.directory.join(SAVING).join(STATE)
    }

    pub(super) fn saved_state(&self) -> PathBuf {
        self.directory.join(SAVED).join(STATE)
    }

    fn failed(&self, operation: &'static str) -> impl Fn(io::Error) -> HostError + '_ {
        move |error| HostError::io(operation, self.directory.display().to_string(), error)
    }

    pub(super) fn seen(&self) -> Result<Option<Memory>, HostError> {
        if !self.directory.exists() {
            return Ok(None);
        }
        Ok(Some(self.manifest()?.map_or(Memory::Loose, |manifest| {
            Memory::Saved(SavedMemory {
                generation: manifest.generation,
                run: manifest.run,
                launched_at: manifest.launched_at,
            })
        })))
    }

    /// Of the saved memory; one that cannot be read is none.
    pub(super) fn manifest(&self) -> Result<Option<Manifest>, HostError> {
        match fs::read(self.directory.join(SAVED).join(MANIFEST)) {
            Ok(bytes) => Ok(serde_json::from_slice(&bytes).ok()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(self.failed("read the memory in")(error)),
        }
    }

    /// An empty RAM of this size, its blocks reserved.
    pub(super) fn create(&self, size: Bytes) -> Result<(), HostError> {
        let failed = self.failed("make the memory in");
        super::make_private_dir(&self.directory).map_err(&failed)?;
        super::remove_file(&self.ram()).map_err(&failed)?;
        let file = File::options().create_new(true).write(true).open(self.ram()).map_err(&failed)?;
        file.set_len(size.0).map_err(&failed)?;
        let is_tmpfs = fstatfs(&file).is_ok_and(|seen| i128::from(seen.f_type) == i128::from(TMPFS));
        if !is_tmpfs {
            fallocate(&file, FallocateFlags::empty(), 0, size.0).map_err(|error| failed(error.into()))?;
        }
        Ok(())
    }

    /// An empty place for a save.
    pub(super) fn begin(&self) -> Result<(), HostError> {
        let failed = self.failed("save the memory in");
        let saving = self.directory.join(SAVING);
        super::remove_dir(&saving).map_err(&failed)?;
        super::make_private_dir(&saving).map_err(&failed)
    }

    /// Makes what was written since [`Self::begin`] the saved memory: proved, durable, in one step.
    pub(super) fn publish(&self, mut manifest: Manifest) -> Result<(), HostError> {
        let failed = self.failed("save the memory in");
        let saving = self.directory.join(SAVING);
        let ram = File::open(self.ram()).map_err(&failed)?;
        ram.sync_all().map_err(&failed)?;
        let state = File::open(saving.join(STATE)).map_err(&failed)?;
        state.sync_all().map_err(&failed)?;
        manifest.boot_id = boot_id();
        (manifest.state_bytes, manifest.state_sha256) = state_sum(&state).map_err(&failed)?;
        (manifest.ram_bytes, manifest.ram_crc32) = ram_sum(&ram).map_err(&failed)?;
        let bytes = serde_json::to_vec_pretty(&manifest).unwrap_or_default();
        files::write_whole(&saving.join(MANIFEST), &bytes, 0o600)?;
        fs::rename(&saving, self.directory.join(SAVED)).map_err(&failed)?;
        self.sync()
    }

    /// Whether the files are what the manifest says; the text tells what is not.
    pub(super) fn verify(&self, manifest: &Manifest) -> Result<(), HostError> {
        let failed = self.failed("verify the memory in");
        let refused = |why: &str| {
            HostError::new(
                HostErrorKind::Permanent,
                "restore the memory in",
                self.directory.display().to_string(),
            )
            .because(why)
        };
        let state = File::open(self.saved_state()).map_err(&failed)?;
        if state_sum(&state).map_err(&failed)? != (manifest.state_bytes, manifest.state_sha256.clone()) {
            return Err(refused("the device state is not what was saved"));
        }
        let ram = File::open(self.ram()).map_err(&failed)?;
        let is_same = match manifest.boot_id == boot_id() {
            true => ram.metadata().map_err(&failed)?.len() == manifest.ram_bytes,
            false => ram_sum(&ram).map_err(&failed)? == (manifest.ram_bytes, manifest.ram_crc32),
        };
        if is_same { Ok(()) } else { Err(refused("the RAM is not what was saved")) }
    }

    /// The saved memory is none from here on, whatever crashes.
    pub(super) fn unpublish(&self) -> Result<(), HostError> {
        let failed = self.failed("discard the memory in");
        let discarded = self.directory.join(DISCARDED);
        super::remove_dir(&discarded).map_err(&failed)?;
        match fs::rename(self.directory.join(SAVED), &discarded) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            renamed => renamed.map_err(&failed)?,
        }
        if self.directory.exists() {
            self.sync()?;
        }
        super::remove_dir(&discarded).map_err(&failed)?;
        super::remove_dir(&self.directory.join(SAVING)).map_err(&failed)
    }

    /// Nothing is left.
    pub(super) fn remove(&self) -> Result<(), HostError> {
        super::remove_dir(&self.directory).map_err(self.failed("remove the memory in"))
    }

    fn sync(&self) -> Result<(), HostError> {
        let synced = File::open(&self.directory).and_then(|directory| directory.sync_all());
        synced.map_err(self.failed("make durable"))
    }
}

impl Manifest {
    pub(super) fn new(
        saved: SavedMemory,
        token: Token,
        version: String,
        machine: &str,
        kernel: PathBuf,
        initrd: PathBuf,
        overlay: FileMark,
    ) -> Self {
        Self {
            generation: saved.generation,
            run: saved.run,
            launched_at: saved.launched_at,
            saved_at: Timestamp::now(),
            token,
            backend: "qemu".to_owned(),
            version,
            machine: machine.to_owned(),
            kernel,
            initrd,
            overlay,
            boot_id: String::new(),
            state_bytes: 0,
            state_sha256: String::new(),
            ram_bytes: 0,
            ram_crc32: 0,
        }
    }
}

fn state_sum(mut file: &File) -> io::Result<(u64, String)> {
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes)?;
    Ok((u64::try_from(bytes.len()).unwrap_or(u64::MAX), hex::encode(Sha256::digest(&bytes))))
}

/// Length, and a sum of where the blocks are that are not zero and what is in them: the same for
/// holes and for zeros, and holes are not read.
fn ram_sum(file: &File) -> io::Result<(u64, u32)> {
    let length = file.metadata()?.len();
    let mut sum = flate2::Crc::new();
    let mut buffer = vec![0u8; 256 * BLOCK];
    let zero = [0u8; BLOCK];
    let mut at = 0;
    while at < length {
        // ENXIO: no data up to the end.
        let Ok(data) = seek(file, SeekFrom::Data(at)) else { break };
        let end = seek(file, SeekFrom::Hole(data))?;
        at = data;
        while at < end {
            let wanted = usize::try_from(end - at).unwrap_or(usize::MAX).min(buffer.len());
            file.read_exact_at(&mut buffer[..wanted], at)?;
            for (index, block) in buffer[..wanted].chunks(BLOCK).enumerate() {
                if *block != zero[..block.len()] {
                    sum.update(&(at + (index * BLOCK) as u64).to_le_bytes());
                    sum.update(block);
                }
            }
            at += wanted as u64;
        }
    }
    Ok((length, sum.sum()))
}
