//! The RAM of a VM, and what makes it a saved memory.
//!
//! While a VM lives its RAM is an anonymous file (memfd) shared with the VMM: as fast as memory of its
//! own, where a file on a disk costs a boot a tenth, and open to a save through `/proc`.
//!
//! ```text
//! memory/UID/saving/          RAM, device state and manifest being written: counts as nothing
//! memory/UID/saved/           the same, complete: made by one rename, unmade by another
//! ```
//! Guarantees: `saved` is there only when RAM, state and manifest are on the disk; it is gone, for
//! good, before a VM runs on from it. Holes and zeros of the RAM are holes of the file. A changed
//! byte is found by the restore that reads it.
//! Assumes: nobody else writes here.

use std::fs::{self, File};
use std::io::{self, Read, Seek};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use rustix::fs::{MemfdFlags, SeekFrom, memfd_create, seek};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use stead_controllers::host::{HostError, HostErrorKind, Memory, SavedMemory};
use stead_schemas::guest::Token;
use stead_schemas::names::Uid;
use stead_schemas::quantity::Bytes;
use tracing::warn;

use crate::host::files;

const RAM: &str = "ram";
const SAVING: &str = "saving";
const SAVED: &str = "saved";
const DISCARDED: &str = "discarded";
const STATE: &str = "state";
const MANIFEST: &str = "manifest.json";
/// Of guest RAM, for what is zero and what is not: a page.
const BLOCK: usize = 4096;
/// Of one read.
const CHUNK: usize = 256 * BLOCK;
/// Of the anonymous file; found again as `/memfd:stead-ram` among the VMM's descriptors.
const ANONYMOUS: &str = "stead-ram";

/// What was saved, and what a restore must find again.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Manifest {
    #[serde(flatten)]
    pub(super) origin: Origin,
    #[serde(flatten)]
    proof: Proof,
}

/// What a memory was saved of, and for.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Origin {
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
}

/// How the files are known again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Proof {
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

    /// Where the device state of a save in progress goes.
    pub(super) fn saving_state(&self) -> PathBuf {
        self.directory.join(SAVING).join(STATE)
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
                generation: manifest.origin.generation,
                run: manifest.origin.run,
                launched_at: manifest.origin.launched_at,
            })
        })))
    }

    /// Of the saved memory; one that says nothing we know is none.
    pub(super) fn manifest(&self) -> Result<Option<Manifest>, HostError> {
        match fs::read(self.directory.join(SAVED).join(MANIFEST)) {
            Ok(bytes) => Ok(serde_json::from_slice(&bytes)
                .inspect_err(
                    |error| warn!(directory = %self.directory.display(), %error, "a saved memory is lost"),
                )
                .ok()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(self.failed("read the memory in")(error)),
        }
    }

    /// An empty place for a save.
    pub(super) fn begin(&self) -> Result<(), HostError> {
        let failed = self.failed("save the memory in");
        let saving = self.directory.join(SAVING);
        // What is still there is of no use to a VM that has run on.
        self.discard()?;
        super::make_private_dir(&saving).map_err(&failed)
    }

    /// Makes the RAM, and the state written since [`Self::begin`], the saved memory: durable, in one
    /// step.
    pub(super) fn publish(&self, ram: &File, origin: Origin) -> Result<(), HostError> {
        let failed = self.failed("save the memory in");
        let saving = self.directory.join(SAVING);
        let state = File::open(saving.join(STATE)).map_err(&failed)?;
        let (state_bytes, state_sha256) = state_sum(&state).map_err(&failed)?;
        let kept = File::create_new(saving.join(RAM)).map_err(&failed)?;
        let (ram_bytes, ram_crc32) = copy_ram(ram, &kept).map_err(&failed)?;
        state.sync_all().and_then(|()| kept.sync_all()).map_err(&failed)?;
        let proof = Proof { state_bytes, state_sha256, ram_bytes, ram_crc32 };
        let manifest = Manifest { origin, proof };
        let bytes = serde_json::to_vec_pretty(&manifest).unwrap_or_default();
        files::write_whole(&saving.join(MANIFEST), &bytes, 0o600)?;
        fs::rename(&saving, self.directory.join(SAVED)).map_err(&failed)?;
        self.sync()
    }

    /// The saved RAM, in memory again, and the device state.
    pub(super) fn load(&self, manifest: &Manifest) -> Result<(File, Vec<u8>), HostError> {
        let failed = self.failed("restore the memory in");
        let refused = |why: &str| {
            let subject = self.directory.display().to_string();
            HostError::new(HostErrorKind::Permanent, "restore the memory in", subject).because(why)
        };
        let saved = self.directory.join(SAVED);
        let Proof { state_bytes, state_sha256, ram_bytes, ram_crc32 } = &manifest.proof;
        let mut state = File::open(saved.join(STATE)).map_err(&failed)?;
        if state_sum(&state).map_err(&failed)? != (*state_bytes, state_sha256.clone()) {
            return Err(refused("the device state is not what was saved"));
        }
        let mut bytes = Vec::new();
        state.rewind().and_then(|()| state.read_to_end(&mut bytes)).map_err(&failed)?;
        let ram = anonymous().map_err(&failed)?;
        let kept = File::open(saved.join(RAM)).map_err(&failed)?;
        match copy_ram(&kept, &ram).map_err(&failed)? == (*ram_bytes, *ram_crc32) {
            true => Ok((ram, bytes)),
            false => Err(refused("the RAM is not what was saved")),
        }
    }

    /// The saved memory is none from here on, whatever crashes; then nothing is left of it.
    pub(super) fn discard(&self) -> Result<(), HostError> {
        let failed = self.failed("discard the memory in");
        let discarded = self.directory.join(DISCARDED);
        super::remove_dir(&discarded).map_err(&failed)?;
        match fs::rename(self.directory.join(SAVED), &discarded) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            renamed => {
                renamed.map_err(&failed)?;
                self.sync()?;
            }
        }
        super::remove_dir(&self.directory).map_err(&failed)
    }

    fn sync(&self) -> Result<(), HostError> {
        // Its own name is in the directory above.
        let above = self.directory.parent().unwrap_or(&self.directory);
        let sync = |directory: &Path| File::open(directory).and_then(|directory| directory.sync_all());
        sync(&self.directory).and_then(|()| sync(above)).map_err(self.failed("make durable"))
    }
}

fn state_sum(mut file: &File) -> io::Result<(u64, String)> {
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes)?;
    Ok((u64::try_from(bytes.len()).unwrap_or(u64::MAX), hex::encode(Sha256::digest(&bytes))))
}

/// RAM of this size that nothing was written to yet.
pub(super) fn fresh_ram(size: Bytes) -> io::Result<File> {
    let ram = anonymous()?;
    ram.set_len(size.0)?;
    Ok(ram)
}

fn anonymous() -> io::Result<File> {
    Ok(File::from(memfd_create(ANONYMOUS, MemfdFlags::CLOEXEC)?))
}

/// The RAM of a VMM that lives.
pub(super) fn ram_of(pid: u32) -> io::Result<File> {
    let mark = format!("/memfd:{ANONYMOUS}");
    let is_ram =
        |path: &PathBuf| fs::read_link(path).is_ok_and(|target| target.to_string_lossy().starts_with(&mark));
    let mut descriptors = fs::read_dir(format!("/proc/{pid}/fd"))?.flatten().map(|entry| entry.path());
    let ram =
        descriptors.find(is_ram).ok_or_else(|| io::Error::other("its RAM is not a file that we made"))?;
    File::open(ram)
}

/// Copies what is not zero into an empty file. Its length, and a sum of where those blocks are and
/// what is in them: the same for holes and for zeros.
fn copy_ram(from: &File, to: &File) -> io::Result<(u64, u32)> {
    let length = from.metadata()?.len();
    to.set_len(length)?;
    let mut sum = flate2::Crc::new();
    let mut buffer = vec![0u8; CHUNK];
    let mut at = 0;
    while at < length {
        at = match seek(from, SeekFrom::Data(at)) {
            Ok(data) => data,
            // No data up to the end.
            Err(rustix::io::Errno::NXIO) => break,
            Err(error) => return Err(error.into()),
        };
        let end = seek(from, SeekFrom::Hole(at))?;
        while at < end {
            let wanted = usize::try_from(end - at).unwrap_or(usize::MAX).min(CHUNK);
            from.read_exact_at(&mut buffer[..wanted], at)?;
            copy_blocks(&buffer[..wanted], at, to, &mut sum)?;
            at += wanted as u64;
        }
    }
    Ok((length, sum.sum()))
}

/// Blocks in a row that are not zero go in one write.
fn copy_blocks(bytes: &[u8], at: u64, to: &File, sum: &mut flate2::Crc) -> io::Result<()> {
    let is_zero = |block: &[u8]| block.iter().all(|&byte| byte == 0);
    let mut offset = 0;
    let blocks: Vec<&[u8]> = bytes.chunks(BLOCK).collect();
    for run in blocks.chunk_by(|a, b| is_zero(a) == is_zero(b)) {
        let length: usize = run.iter().map(|block| block.len()).sum();
        if !is_zero(run[0]) {
            let (from, run) = (at + offset as u64, &bytes[offset..offset + length]);
            to.write_all_at(run, from)?;
            for (index, block) in run.chunks(BLOCK).enumerate() {
                sum.update(&(from + (index * BLOCK) as u64).to_le_bytes());
                sum.update(block);
            }
        }
        offset += length;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_has_the_bytes_and_the_sum_of_its_source_and_no_blocks_of_zeros() {
        let (from, to, back) = (
            anonymous().expect("in memory"),
            tempfile::tempfile().expect("in memory"),
            anonymous().expect("in memory"),
        );
        let length = 9 * CHUNK;
        from.set_len(length as u64).expect("in memory");
        for (at, bytes) in [(0, vec![1; 10]), (5000, vec![2; BLOCK * 3]), (CHUNK as u64 * 3 - 7, vec![3; 14])]
        {
            from.write_all_at(&bytes, at).expect("in memory");
        }
        // Written and yet zero.
        from.write_all_at(&vec![0; CHUNK], CHUNK as u64 * 5).expect("in memory");
        let sum = copy_ram(&from, &to).expect("in memory");
        assert_eq!(copy_ram(&to, &back).expect("in memory"), sum);
        let all = |file: &File| {
            let mut bytes = vec![0; length];
            file.read_exact_at(&mut bytes, 0).expect("in memory");
            bytes
        };
        assert!(all(&to) == all(&from) && all(&back) == all(&from));
        assert!(to.metadata().expect("in memory").blocks() * 512 < CHUNK as u64, "zeros are holes");
        to.write_all_at(&[9], CHUNK as u64 * 7).expect("in memory");
        assert_ne!(
            copy_ram(&to, &anonymous().expect("in memory")).expect("in memory"),
            sum,
            "a changed byte shows"
        );
    }
}
