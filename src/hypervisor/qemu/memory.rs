//! What makes the RAM and the device state of a VM a saved memory: of an instance in standby, or of a
//! snapshot.
//!
//! ```text
//! memory/UID/saving/          RAM, device state and manifest being written: counts as nothing
//! memory/UID/saved/           the same, complete: made by one rename, unmade by another
//! memory/UID/running/         the RAM that a VM maps: counts as nothing, goes with the VMM
//! snapshots/UID/...           likewise, with a disk beside them
//! ```
//! Guarantees: `saved` is there only when RAM, state and manifest are on the disk; that of an instance
//! is gone, for good, before a VM runs on from it. Holes and zeros of the RAM are holes of the file.
//! A changed byte is found by the first restore or fork of a daemon that has not proved the file
//! itself, or finds it written to since. Files in `saved` are never written to, so they may be shared;
//! one in `running` is written to when it has no other name, and then only where its VM has pages of
//! its own.
//! Assumes: nobody else writes here.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use serde::Deserialize;
use sha2::{Digest as _, Sha256};
use stead_controllers::host::{HostError, HostErrorKind, Memory, SavedMemory};
use stead_schemas::compression::Compression;
use stead_schemas::names::Uid;
use stead_schemas::quantity::Bytes;
use stead_schemas::snapshot::PackingState;
use tracing::warn;

use super::manifest::{FileMark, Manifest, Origin, Proof, RamKept};
use super::packing;
use super::places::number_launch;
use super::ram::{copy_ram, fresh_ram, sum_ram};
use crate::host::files;

pub(super) const RAM: &str = "ram";
/// The same, compressed; beside `ram` it is a rest of a crash, and `ram` counts.
const PACKED: &str = "ram.packed";
const PACKING: &str = "ram.packing";
const SAVING: &str = "saving";
const SAVED: &str = "saved";
const DISCARDED: &str = "discarded";
pub(super) const RUNNING: &str = "running";
pub(super) const STATE: &str = "state";
pub(super) const MANIFEST: &str = "manifest.json";

/// RAM to start a VMM with.
#[derive(Debug)]
pub(super) enum RamFile {
    /// Its own, still to be filled.
    Own(File),
    /// As it was saved: what is written to it stays private.
    Saved(File),
}

/// The memory directory of one instance, or the directory of one snapshot.
#[derive(Debug, Clone)]
pub(super) struct MemoryDir {
    pub(super) directory: PathBuf,
}

/// Length of a file; `None` when there is none.
pub(super) fn length(path: &Path) -> io::Result<Option<u64>> {
    match fs::metadata(path) {
        Ok(file) => Ok(Some(file.len())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

impl MemoryDir {
    pub(super) fn new(data_dir: &Path, owner: &Uid) -> Self {
        Self { directory: data_dir.join("memory").join(owner.as_str()) }
    }

    pub(super) fn of_snapshot(data_dir: &Path, snapshot: &Uid) -> Self {
        Self { directory: data_dir.join("snapshots").join(snapshot.as_str()) }
    }

    /// A file of a save in progress.
    pub(super) fn saving(&self, name: &str) -> PathBuf {
        self.directory.join(SAVING).join(name)
    }

    /// A file of what is saved.
    pub(super) fn saved(&self, name: &str) -> PathBuf {
        self.directory.join(SAVED).join(name)
    }

    pub(super) fn saving_state(&self) -> PathBuf {
        self.saving(STATE)
    }

    /// Anything that counts, or a rest of it. What cannot be looked at is not absent: a VM that was saved
    /// would be booted anew.
    pub(super) fn exists(&self) -> Result<bool, HostError> {
        let failed = self.failed("look at the memory in");
        let entries = match fs::read_dir(&self.directory) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
            Err(error) => return Err(failed(error)),
        };
        let names =
            entries.map(|entry| Ok(entry?.file_name())).collect::<io::Result<Vec<_>>>().map_err(failed)?;
        Ok(names.is_empty() || names.iter().any(|name| name != RUNNING))
    }

    /// With what a VM left that is gone.
    pub(super) fn has_rest(&self) -> Result<bool, HostError> {
        self.directory.try_exists().map_err(self.failed("look at the memory in"))
    }

    pub(super) fn failed(&self, operation: &'static str) -> impl Fn(io::Error) -> HostError + '_ {
        move |error| HostError::io(operation, self.directory.display().to_string(), error)
    }

    fn damaged(&self, why: &str) -> HostError {
        let subject = self.directory.display().to_string();
        HostError::new(HostErrorKind::Permanent, "restore the memory in", subject).because(why)
    }

    pub(super) fn seen(&self) -> Result<Option<Memory>, HostError> {
        if !self.exists()? {
            return Ok(None);
        }
        Ok(Some(self.manifest()?.map_or(Memory::Loose, |manifest| {
            Memory::Saved(SavedMemory {
                standby: manifest.origin.standby,
                run: manifest.origin.run,
                launch: manifest.origin.launch,
                packing: self.packing(&manifest),
            })
        })))
    }

    /// How the RAM is kept; `Packing` is for the one to say who knows what goes on.
    pub(super) fn packing(&self, manifest: &Manifest) -> PackingState {
        let plain = Bytes(manifest.proof.ram_bytes);
        match fs::metadata(self.saved(PACKED)) {
            Ok(packed) if !self.saved(RAM).exists() => {
                PackingState::Packed { packed: Bytes(packed.len()), plain }
            }
            _ => PackingState::Plain,
        }
    }

    pub(super) fn name(&self) -> String {
        self.directory.display().to_string()
    }

    /// Puts the RAM's compressed form in its place. Told to stop, it leaves all as it was.
    pub(super) fn pack(&self, how: Compression, stop: &AtomicBool) -> Result<(), HostError> {
        let failed = self.failed("compress the memory in");
        let (ram, packing) = (self.saved(RAM), self.saved(PACKING));
        super::remove_file(&packing).map_err(&failed)?;
        let packed = File::open(&ram).and_then(|ram| {
            let to = File::options().read(true).write(true).create_new(true).open(&packing)?;
            packing::pack(&ram, &to, how, stop)
        });
        if let Err(error) = packed {
            super::remove_file(&packing).map_err(&failed)?;
            return Err(failed(error));
        }
        let sync = || File::open(self.directory.join(SAVED)).and_then(|saved| saved.sync_all());
        fs::rename(&packing, self.saved(PACKED)).and_then(|()| sync()).map_err(&failed)?;
        fs::remove_file(&ram).and_then(|()| sync()).map_err(&failed)
    }

    /// Unpacks the RAM into a file of its own, and checks it.
    pub(super) fn unpack(&self, manifest: &Manifest, ram: &File) -> Result<(), HostError> {
        let failed = self.failed("restore the memory in");
        let packed = File::open(self.saved(PACKED)).map_err(&failed)?;
        packing::unpack(&packed, ram).map_err(&failed)?;
        self.check(ram, manifest)
    }

    /// Reads the RAM as a whole, where it is not packed: that is checked by every restore.
    pub(super) fn check_ram(&self, manifest: &Manifest) -> Result<(), HostError> {
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

    /// The file of the RAM that is saved, as it is; none of one that is packed.
    pub(super) fn ram_mark(&self) -> Option<FileMark> {
        FileMark::of(&self.saved(RAM)).ok()
    }

    /// Of the saved memory; one that says nothing we know is none.
    pub(super) fn manifest(&self) -> Result<Option<Manifest>, HostError> {
        let mut manifest = self.read::<Manifest>(MANIFEST)?;
        if let Some(Manifest { origin, .. }) = &mut manifest {
            origin.launch = number_launch(origin.launch, origin.launched_at);
        }
        Ok(manifest)
    }

    /// Whether the files are there, in their lengths; their sums are for whoever uses them.
    pub(super) fn is_whole(&self, manifest: &Manifest) -> Result<bool, HostError> {
        let Proof { state_bytes, ram_bytes, .. } = manifest.proof;
        let length = |name| length(&self.saved(name)).map_err(self.failed("look at the memory in"));
        // The packed one is known by its own sums; it takes the place of the other, which is looked for first.
        let has_ram = match length(RAM)? {
            Some(bytes) => bytes == ram_bytes,
            None => length(PACKED)?.is_some(),
        };
        Ok(length(STATE)? == Some(state_bytes) && has_ram)
    }

    pub(super) fn read<T: for<'a> Deserialize<'a>>(&self, name: &str) -> Result<Option<T>, HostError> {
        match fs::read(self.saved(name)) {
            Ok(bytes) => Ok(serde_json::from_slice(&bytes)
                .inspect_err(
                    |error| warn!(directory = %self.directory.display(), %error, "what was saved is lost"),
                )
                .ok()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(self.failed("read the memory in")(error)),
        }
    }

    /// An empty place for a save.
    pub(super) fn begin(&self) -> Result<(), HostError> {
        // What is still there is of no use to a VM that has run on.
        self.unsave()?;
        super::make_private_dir(&self.directory.join(SAVING)).map_err(self.failed("save the memory in"))
    }

    /// Keeps a copy of the RAM of a VM that is held.
    pub(super) fn keep_ram(&self, ram: &File) -> Result<RamKept, HostError> {
        let copied = File::create_new(self.saving(RAM)).and_then(|to| copy_ram(ram, &to));
        let (bytes, sum) = copied.map_err(self.failed("save the memory in"))?;
        Ok(RamKept { bytes, sum })
    }

    /// Keeps what another has saved, by the same files.
    pub(super) fn keep_shared(&self, from: &Self, manifest: &Manifest) -> Result<RamKept, HostError> {
        let failed = self.failed("share a memory with");
        fs::hard_link(from.saved(STATE), self.saving(STATE)).map_err(&failed)?;
        let Proof { ram_bytes, ram_sum, .. } = manifest.proof;
        // A compression may end in between: then the one is there and the other is not.
        match fs::hard_link(from.saved(RAM), self.saving(RAM)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                fs::hard_link(from.saved(PACKED), self.saving(PACKED)).map_err(&failed)?;
            }
            linked => linked.map_err(&failed)?,
        }
        Ok(RamKept { bytes: ram_bytes, sum: ram_sum })
    }

    /// Makes state and RAM durable, and then the manifest that knows them again.
    pub(super) fn prove(&self, origin: Origin, ram: RamKept) -> Result<(), HostError> {
        let failed = self.failed("save the memory in");
        let state = fs::read(self.saving(STATE)).map_err(&failed)?;
        let (state_bytes, state_sha256) = state_sum(&state);
        File::open(self.saving(STATE)).and_then(|state| state.sync_all()).map_err(&failed)?;
        let file = match File::open(self.saving(RAM)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => File::open(self.saving(PACKED)),
            opened => opened,
        };
        file.and_then(|file| file.sync_all()).map_err(&failed)?;
        let proof = Proof { state_bytes, state_sha256, ram_bytes: ram.bytes, ram_sum: ram.sum };
        let bytes = serde_json::to_vec_pretty(&Manifest { origin, proof }).unwrap_or_default();
        files::write_whole(&self.saving(MANIFEST), &bytes, 0o600)
    }

    /// Makes what was proved the saved one, durably, in one step.
    pub(super) fn publish(&self) -> Result<(), HostError> {
        let failed = self.failed("save the memory in");
        fs::rename(self.directory.join(SAVING), self.directory.join(SAVED)).map_err(&failed)?;
        self.sync()
    }

    /// The RAM, or a place for one that is packed, and the device state.
    pub(super) fn load(&self, manifest: &Manifest) -> Result<(RamFile, Vec<u8>), HostError> {
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

    /// What is saved is nothing from here on, whatever crashes; then nothing is left of it.
    pub(super) fn discard(&self) -> Result<(), HostError> {
        self.unsave()?;
        super::remove_dir(&self.directory).map_err(self.failed("discard the memory in"))
    }

    /// Nothing is saved, nor being saved.
    pub(super) fn unsave(&self) -> Result<(), HostError> {
        let remove = |name: &str| {
            super::remove_dir(&self.directory.join(name)).map_err(self.failed("discard the memory in"))
        };
        remove(DISCARDED)?;
        self.move_saved_to(DISCARDED)?;
        remove(DISCARDED)?;
        remove(SAVING)?;
        self.remove_empty()
    }

    pub(super) fn remove_empty(&self) -> Result<(), HostError> {
        match fs::remove_dir(&self.directory).map_err(|error| (error.kind(), error)) {
            // What is in it goes on being there.
            Ok(()) | Err((io::ErrorKind::NotFound | io::ErrorKind::DirectoryNotEmpty, _)) => Ok(()),
            Err((_, error)) => Err(self.failed("discard the memory in")(error)),
        }
    }

    /// Unmakes what is saved, durably, in one step.
    pub(super) fn move_saved_to(&self, name: &str) -> Result<(), HostError> {
        match fs::rename(self.directory.join(SAVED), self.directory.join(name)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            renamed => {
                renamed.map_err(self.failed("discard the memory in"))?;
                self.sync()
            }
        }
    }

    fn sync(&self) -> Result<(), HostError> {
        // Its own name is in the directory above.
        let above = self.directory.parent().unwrap_or(&self.directory);
        let sync = |directory: &Path| File::open(directory).and_then(|directory| directory.sync_all());
        sync(&self.directory).and_then(|()| sync(above)).map_err(self.failed("make durable"))
    }
}

fn state_sum(state: &[u8]) -> (u64, String) {
    (state.len() as u64, hex::encode(Sha256::digest(state)))
}
