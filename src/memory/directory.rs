//! The directory of a saved memory: RAM and device state of an instance in standby, or of a snapshot.
//!
//! ```text
//! memory/UID/saving/          RAM, device state and manifest while they are written: not yet a saved memory
//! memory/UID/saved/           the same, complete: made by one rename, undone by another
//! memory/UID/running/         the RAM that a VM maps: not a saved memory, removed with the VMM
//! snapshots/UID/...           the same layout, with disks beside the memory
//! ```
//! Guarantees: `saved` exists only when RAM, state and manifest are on the disk. The `saved` of an
//! instance is removed durably before a VM runs on from it. Holes and zeros of the RAM are holes of the
//! file. A changed byte is found by the first restore or fork of a daemon that has not verified the file
//! itself, or finds it written to since. Files in `saved` are never written to, so they may be shared.
//! A file in `running` is written to only when it has no other name, and only where its VM has dirty
//! pages.
//! Assumes: nothing but this daemon writes here.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use serde::Deserialize;
use sha2::{Digest as _, Sha256};
use stead_controllers::host::{HostError, HostErrorKind, Memory, SavedMemory, VolumeDisk};
use stead_schemas::compression::Compression;
use stead_schemas::names::Uid;
use stead_schemas::quantity::Bytes;
use stead_schemas::snapshot::CompressionState;
use tracing::warn;

use super::compression;
use super::manifest::{FileMark, Manifest, Origin, Proof, RamKept, number_launch};
use super::ram::{copy_ram, fresh_ram, sum_ram};
use crate::host::directories::{make_private_dir, remove_dir, remove_file};
use crate::host::files;

pub(crate) const RAM: &str = "ram";
/// The compressed RAM. Beside `ram` it is a remainder of a crash, and `ram` is used.
/// Limit on the device state, in bytes. It has 220 KiB.
pub(crate) const STATE_BYTES_MAX: u64 = 64 << 20;
const COMPRESSED: &str = "ram.packed";
const COMPRESSING: &str = "ram.packing";
const SAVING: &str = "saving";
const SAVED: &str = "saved";
const DISCARDED: &str = "discarded";
pub(crate) const RUNNING: &str = "running";
pub(crate) const STATE: &str = "state";
pub(crate) const MANIFEST: &str = "manifest.json";

/// The RAM that a VMM is started with.
#[derive(Debug)]
pub(crate) enum RamFile {
    /// An anonymous file of this VM alone, which still has to be filled.
    Own(File),
    /// The saved file, mapped privately: the writes of the VM do not reach it.
    Saved(File),
}

/// The memory directory of one instance, or the directory of one snapshot.
#[derive(Debug, Clone)]
pub(crate) struct MemoryDir {
    pub(crate) directory: PathBuf,
}

/// Returns the length of a file, or `None` when there is no such file.
pub(crate) fn length(path: &Path) -> io::Result<Option<u64>> {
    match fs::metadata(path) {
        Ok(file) => Ok(Some(file.len())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

impl MemoryDir {
    pub(crate) fn new(data_dir: &Path, owner: &Uid) -> Self {
        Self { directory: data_dir.join("memory").join(owner.as_str()) }
    }

    pub(crate) fn for_snapshot(data_dir: &Path, snapshot: &Uid) -> Self {
        Self { directory: data_dir.join("snapshots").join(snapshot.as_str()) }
    }

    /// Returns the path of a file of a save in progress.
    pub(crate) fn saving(&self, name: &str) -> PathBuf {
        self.directory.join(SAVING).join(name)
    }

    /// Returns the path of a file of the saved memory.
    pub(crate) fn saved(&self, name: &str) -> PathBuf {
        self.directory.join(SAVED).join(name)
    }

    pub(crate) fn saving_state(&self) -> PathBuf {
        self.saving(STATE)
    }

    pub(crate) fn saving_ram(&self) -> PathBuf {
        self.saving(RAM)
    }

    pub(crate) fn saved_state(&self) -> PathBuf {
        self.saved(STATE)
    }

    /// Returns whether there is a saved memory or an incomplete one. A directory that cannot be read is an
    /// error and not an absent memory: the VM that was saved in it would be booted anew.
    pub(crate) fn exists(&self) -> Result<bool, HostError> {
        let failed = self.failed("observe the memory in");
        let entries = match fs::read_dir(&self.directory) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
            Err(error) => return Err(failed(error)),
        };
        let names =
            entries.map(|entry| Ok(entry?.file_name())).collect::<io::Result<Vec<_>>>().map_err(&failed)?;
        // A device state beside the RAM of a VM is the rest of a memory whose removal failed.
        let has_rest = self.directory.join(RUNNING).join(STATE).try_exists().map_err(&failed)?;
        Ok(names.is_empty() || has_rest || names.iter().any(|name| name != RUNNING))
    }

    /// Returns whether the directory exists at all, also when it holds only what a dead VM left.
    pub(crate) fn has_remainder(&self) -> Result<bool, HostError> {
        self.directory.try_exists().map_err(self.failed("observe the memory in"))
    }

    pub(crate) fn failed(&self, operation: &'static str) -> impl Fn(io::Error) -> HostError + '_ {
        move |error| HostError::io(operation, self.directory.display().to_string(), error)
    }

    fn damaged(&self, why: &str) -> HostError {
        let subject = self.directory.display().to_string();
        HostError::new(HostErrorKind::Permanent, "restore the memory in", subject).because(why)
    }

    /// Reports the saved memory as the port `Memories` shows it.
    pub(crate) fn observe(&self) -> Result<Option<Memory>, HostError> {
        if !self.exists()? {
            return Ok(None);
        }
        Ok(Some(self.manifest()?.map_or(Memory::Incomplete, |manifest| {
            Memory::Saved(SavedMemory {
                standby: manifest.origin.standby,
                run: manifest.origin.run,
                launch: manifest.origin.launch,
                compression_state: self.compression(&manifest),
                volumes: manifest.origin.volumes.iter().map(|volume| volume.disk.number).collect(),
            })
        })))
    }

    /// Reports how the RAM is stored. Only the compressor knows whether a compression is under way.
    pub(crate) fn compression(&self, manifest: &Manifest) -> CompressionState {
        let plain = Bytes(manifest.proof.ram_bytes);
        match fs::metadata(self.saved(COMPRESSED)) {
            Ok(compressed) if !self.saved(RAM).exists() => {
                CompressionState::Compressed { compressed: Bytes(compressed.len()), plain }
            }
            _ => CompressionState::Plain,
        }
    }

    pub(crate) fn name(&self) -> String {
        self.directory.display().to_string()
    }

    /// Replaces the RAM with its compressed form. When `stop` is set, it leaves everything as it was.
    pub(crate) fn compress(&self, how: Compression, stop: &AtomicBool) -> Result<(), HostError> {
        let failed = self.failed("compress the memory in");
        let (ram, unfinished) = (self.saved(RAM), self.saved(COMPRESSING));
        remove_file(&unfinished).map_err(&failed)?;
        let compressed = File::open(&ram).and_then(|ram| {
            let to = File::options().read(true).write(true).create_new(true).open(&unfinished)?;
            compression::compress(&ram, &to, how, stop)
        });
        if let Err(error) = compressed {
            remove_file(&unfinished).map_err(&failed)?;
            return Err(failed(error));
        }
        let sync = || File::open(self.directory.join(SAVED)).and_then(|saved| saved.sync_all());
        fs::rename(&unfinished, self.saved(COMPRESSED)).and_then(|()| sync()).map_err(&failed)?;
        fs::remove_file(&ram).and_then(|()| sync()).map_err(&failed)
    }

    /// Decompresses the RAM into an empty file, and checks it.
    pub(crate) fn decompress(&self, manifest: &Manifest, ram: &File) -> Result<(), HostError> {
        let failed = self.failed("restore the memory in");
        let compressed = File::open(self.saved(COMPRESSED)).map_err(&failed)?;
        compression::decompress(&compressed, ram).map_err(&failed)?;
        self.check(ram, manifest)
    }

    /// Reads and checks the whole RAM, unless it is compressed: compressed RAM is checked by every restore.
    pub(crate) fn check_ram(&self, manifest: &Manifest) -> Result<(), HostError> {
        match File::open(self.saved(RAM)) {
            Ok(ram) => self.check(&ram, manifest),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(self.failed("check the memory in")(error)),
        }
    }

    fn check(&self, ram: &File, manifest: &Manifest) -> Result<(), HostError> {
        let Proof { ram_bytes, ram_sum, .. } = manifest.proof;
        match sum_ram(ram).map_err(self.failed("check the memory in"))? == (ram_bytes, ram_sum) {
            true => Ok(()),
            false => Err(self.damaged("the RAM is not what was saved")),
        }
    }

    /// Returns the mark of the saved RAM file, or `None` when the RAM is compressed or missing.
    pub(crate) fn ram_mark(&self) -> Option<FileMark> {
        FileMark::of(&self.saved(RAM)).ok()
    }

    /// Returns the manifest of the saved memory. An unreadable manifest means "no saved memory".
    pub(crate) fn manifest(&self) -> Result<Option<Manifest>, HostError> {
        let mut manifest = self.read::<Manifest>(MANIFEST)?;
        if let Some(Manifest { origin, .. }) = &mut manifest {
            origin.launch = number_launch(origin.launch, origin.launched_at);
            VolumeDisk::number_earlier(origin.volumes.iter_mut().map(|volume| &mut volume.disk));
        }
        Ok(manifest)
    }

    /// Returns whether the files exist with their lengths. Their sums are checked when they are used.
    pub(crate) fn is_whole(&self, manifest: &Manifest) -> Result<bool, HostError> {
        let Proof { state_bytes, ram_bytes, .. } = manifest.proof;
        let length = |name| length(&self.saved(name)).map_err(self.failed("observe the memory in"));
        // The compressed file has sums of its own. It replaces the plain one, which is looked for first.
        let has_ram = match length(RAM)? {
            Some(bytes) => bytes == ram_bytes,
            None => length(COMPRESSED)?.is_some(),
        };
        Ok(length(STATE)? == Some(state_bytes) && has_ram)
    }

    pub(crate) fn read<T: for<'a> Deserialize<'a>>(&self, name: &str) -> Result<Option<T>, HostError> {
        match fs::read(self.saved(name)) {
            Ok(bytes) => Ok(serde_json::from_slice(&bytes)
                .inspect_err(
                    |error| warn!(directory = %self.directory.display(), %error, "an unreadable file of a saved memory is ignored"),
                )
                .ok()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(self.failed("read the memory in")(error)),
        }
    }

    /// Makes an empty directory for a save.
    pub(crate) fn begin(&self) -> Result<(), HostError> {
        // A memory that is still there is older than the VM, which has run on since.
        self.unsave()?;
        make_private_dir(&self.directory.join(SAVING)).map_err(self.failed("save the memory in"))
    }

    /// Stores a copy of the RAM of a paused VM.
    pub(crate) fn keep_ram(&self, ram: &File) -> Result<RamKept, HostError> {
        let copied = File::create_new(self.saving(RAM)).and_then(|to| copy_ram(ram, &to));
        let (bytes, sum) = copied.map_err(self.failed("save the memory in"))?;
        Ok(RamKept { bytes, sum })
    }

    /// Measures a RAM file that the VMM itself wrote into the save in progress.
    pub(crate) fn keep_written(&self) -> Result<RamKept, HostError> {
        let summed = File::open(self.saving(RAM)).and_then(|ram| sum_ram(&ram));
        let (bytes, sum) = summed.map_err(self.failed("save the memory in"))?;
        Ok(RamKept { bytes, sum })
    }

    /// Shares the files of another saved memory by hard links.
    pub(crate) fn keep_shared(&self, from: &Self, manifest: &Manifest) -> Result<RamKept, HostError> {
        let failed = self.failed("share a memory with");
        fs::hard_link(from.saved(STATE), self.saving(STATE)).map_err(&failed)?;
        let Proof { ram_bytes, ram_sum, .. } = manifest.proof;
        // A compression may end in between: then only the compressed file is there.
        match fs::hard_link(from.saved(RAM), self.saving(RAM)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                fs::hard_link(from.saved(COMPRESSED), self.saving(COMPRESSED)).map_err(&failed)?;
            }
            linked => linked.map_err(&failed)?,
        }
        Ok(RamKept { bytes: ram_bytes, sum: ram_sum })
    }

    /// Makes state and RAM durable, and then writes the manifest with their sums.
    pub(crate) fn prove(&self, origin: Origin, ram: RamKept) -> Result<(), HostError> {
        let failed = self.failed("save the memory in");
        // A VMM may still have the file, and could make it longer than memory.
        let mut state = Vec::new();
        let file = File::open(self.saving(STATE)).map_err(&failed)?;
        file.take(STATE_BYTES_MAX + 1).read_to_end(&mut state).map_err(&failed)?;
        if state.len() as u64 > STATE_BYTES_MAX {
            let why = format!("the device state is larger than {STATE_BYTES_MAX} bytes");
            return Err(failed(io::Error::other(why)));
        }
        let (state_bytes, state_sha256) = state_sum(&state);
        File::open(self.saving(STATE)).and_then(|state| state.sync_all()).map_err(&failed)?;
        let file = match File::open(self.saving(RAM)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => File::open(self.saving(COMPRESSED)),
            opened => opened,
        };
        file.and_then(|file| file.sync_all()).map_err(&failed)?;
        let proof = Proof { state_bytes, state_sha256, ram_bytes: ram.bytes, ram_sum: ram.sum };
        let bytes = serde_json::to_vec_pretty(&Manifest { origin, proof }).unwrap_or_default();
        files::write_whole(&self.saving(MANIFEST), &bytes, 0o600)
    }

    /// Makes the finished save the saved memory, durably, in one step.
    pub(crate) fn publish(&self) -> Result<(), HostError> {
        let failed = self.failed("save the memory in");
        fs::rename(self.directory.join(SAVING), self.directory.join(SAVED)).map_err(&failed)?;
        self.sync()
    }

    /// Opens the RAM (or an empty file for RAM that is compressed) and reads the device state.
    pub(crate) fn load(&self, manifest: &Manifest) -> Result<(RamFile, Vec<u8>), HostError> {
        let failed = self.failed("restore the memory in");
        let Proof { state_bytes, state_sha256, ram_bytes, .. } = &manifest.proof;
        let state = File::open(self.saved(STATE)).map_err(&failed)?;
        let (mut bytes, mut state) = (Vec::new(), state.take(state_bytes.saturating_add(1)));
        state.read_to_end(&mut bytes).map_err(&failed)?;
        if state_sum(&bytes) != (*state_bytes, state_sha256.clone()) {
            return Err(self.damaged("the device state is not what was saved"));
        }
        let ram = match File::open(self.saved(RAM)) {
            Ok(ram) if ram.metadata().map_err(&failed)?.len() != *ram_bytes => {
                return Err(self.damaged("the RAM is not what was saved"));
            }
            Ok(ram) => RamFile::Saved(ram),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                RamFile::Own(fresh_ram(Bytes(*ram_bytes)).map_err(&failed)?)
            }
            Err(error) => return Err(failed(error)),
        };
        Ok((ram, bytes))
    }

    /// Invalidates the saved memory durably, and then removes all its files.
    pub(crate) fn discard(&self) -> Result<(), HostError> {
        self.unsave()?;
        remove_dir(&self.directory).map_err(self.failed("discard the memory in"))
    }

    /// Invalidates the saved memory durably, and removes it and any save in progress.
    pub(crate) fn unsave(&self) -> Result<(), HostError> {
        let remove =
            |name: &str| remove_dir(&self.directory.join(name)).map_err(self.failed("discard the memory in"));
        remove(DISCARDED)?;
        self.move_saved_to(DISCARDED)?;
        remove(DISCARDED)?;
        remove(SAVING)?;
        self.remove_empty()
    }

    pub(crate) fn remove_empty(&self) -> Result<(), HostError> {
        match fs::remove_dir(&self.directory).map_err(|error| (error.kind(), error)) {
            // The directory still holds the RAM that a VM maps.
            Ok(()) | Err((io::ErrorKind::NotFound | io::ErrorKind::DirectoryNotEmpty, _)) => Ok(()),
            Err((_, error)) => Err(self.failed("discard the memory in")(error)),
        }
    }

    /// Renames the saved memory, durably, in one step: it is no longer a saved memory.
    pub(crate) fn move_saved_to(&self, name: &str) -> Result<(), HostError> {
        match fs::rename(self.directory.join(SAVED), self.directory.join(name)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            renamed => {
                renamed.map_err(self.failed("discard the memory in"))?;
                self.sync()
            }
        }
    }

    fn sync(&self) -> Result<(), HostError> {
        // The entry of this directory is in the directory above.
        let above = self.directory.parent().unwrap_or(&self.directory);
        let sync = |directory: &Path| File::open(directory).and_then(|directory| directory.sync_all());
        sync(&self.directory).and_then(|()| sync(above)).map_err(self.failed("make durable"))
    }
}

fn state_sum(state: &[u8]) -> (u64, String) {
    (state.len() as u64, hex::encode(Sha256::digest(state)))
}
