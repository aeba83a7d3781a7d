//! What is known of a saved memory, in a file beside it: what it was saved of, and how it is known again.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use stead_controllers::host::VolumeDisk;
use stead_schemas::guest::Token;
use stead_schemas::numbers::{LaunchId, RunNo, StandbyNo};

/// What was saved, and what a restore must find again.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Manifest {
    #[serde(flatten)]
    pub(super) origin: Origin,
    #[serde(flatten)]
    pub(super) proof: Proof,
}

/// What a memory was saved of, and for.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Origin {
    #[serde(rename = "generation")]
    pub(super) standby: StandbyNo,
    pub(super) run: RunNo,
    /// As the record of the machine has it.
    #[serde(default)]
    pub(super) launch: LaunchId,
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
    /// In the order in which its guest knows them.
    #[serde(default)]
    pub(super) volumes: Vec<VolumeMark>,
    /// The disk of the kernel's files that its guest has mounted: a restore gives it the same.
    #[serde(default, alias = "headers")]
    pub(super) kernel_files: Option<PathBuf>,
    /// Taken over from a snapshot: its files are that one's too.
    #[serde(default)]
    pub(super) is_adopted: bool,
}

/// The RAM of a saved memory: its length, and the sum that it is known again by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct RamKept {
    pub(super) bytes: u64,
    pub(super) sum: u64,
}

/// How the files are known again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Proof {
    pub(super) state_bytes: u64,
    pub(super) state_sha256: String,
    pub(super) ram_bytes: u64,
    pub(super) ram_sum: u64,
}

/// A volume's disk as it was, or what was written over one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct VolumeMark {
    #[serde(flatten)]
    pub(super) disk: VolumeDisk,
    mark: FileMark,
}

impl VolumeMark {
    pub(super) fn of(disk: &VolumeDisk, path: &Path) -> io::Result<Self> {
        Ok(Self { disk: disk.clone(), mark: FileMark::of(path)? })
    }
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
