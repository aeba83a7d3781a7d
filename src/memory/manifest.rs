//! The manifest beside a saved memory: what was saved, and how its files are verified.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use stead_controllers::host::VolumeDisk;
use stead_schemas::guest::Token;
use stead_schemas::numbers::{DeviceSet, LaunchId, RunNo, StandbyNo};

/// The manifest of a saved memory: its origin, and what a restore has to find again.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Manifest {
    #[serde(flatten)]
    pub(crate) origin: Origin,
    #[serde(flatten)]
    pub(crate) proof: Proof,
}

/// The VM that a memory was saved from, and the request that it was saved for.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Origin {
    #[serde(rename = "generation")]
    pub(crate) standby: StandbyNo,
    pub(crate) run: RunNo,
    /// The number of the launch, as in the record of the VM.
    #[serde(default)]
    pub(crate) launch: LaunchId,
    pub(crate) launched_at: Timestamp,
    pub(crate) saved_at: Timestamp,
    /// The token by which the guest authenticates its host.
    pub(crate) token: Token,
    /// The name of the driver.
    pub(crate) backend: String,
    /// Version of the VMM. Only the same version can load its device state.
    pub(crate) version: String,
    /// The name of the machine type, as in the record of a launch.
    pub(crate) machine: String,
    /// The set of the guest's devices, the first in manifests from before there were others.
    #[serde(default)]
    pub(crate) device_set: DeviceSet,
    pub(crate) kernel: PathBuf,
    pub(crate) initrd: PathBuf,
    pub(crate) overlay: FileMark,
    /// The volumes, in the order in which the guest numbers them.
    #[serde(default)]
    pub(crate) volumes: Vec<VolumeMark>,
    /// The disk with the kernel's modules and headers that the guest has mounted. A restore attaches the same disk.
    #[serde(default, alias = "headers")]
    pub(crate) kernel_files: Option<PathBuf>,
    /// Number of pairs of queues of the network card, which a restore has to give the guest again.
    #[serde(default = "earlier_queues")]
    pub(crate) queues: u16,
    /// True when the memory was taken over from a snapshot, which shares its files.
    #[serde(default)]
    pub(crate) is_adopted: bool,
}

/// Length in bytes and checksum of a saved RAM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct RamKept {
    pub(crate) bytes: u64,
    pub(crate) sum: u64,
}

/// Number of pairs of queues of the cards of earlier daemons' VMs, whose records and memories name none.
pub(crate) const EARLIER_QUEUES: u16 = 1;

fn earlier_queues() -> u16 {
    EARLIER_QUEUES
}

/// Returns the number of a launch. A launch that was recorded by its time alone is numbered by that time.
pub(crate) fn number_launch(launch: LaunchId, launched_at: Timestamp) -> LaunchId {
    if launch == LaunchId::default() { launched_at.into() } else { launch }
}

/// Lengths and checksums of the files of a saved memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Proof {
    pub(crate) state_bytes: u64,
    pub(crate) state_sha256: String,
    pub(crate) ram_bytes: u64,
    pub(crate) ram_sum: u64,
}

/// A volume's disk (or the disk of one instance's writes over it) as it was at the save.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct VolumeMark {
    #[serde(flatten)]
    pub(crate) disk: VolumeDisk,
    mark: FileMark,
}

impl VolumeMark {
    pub(crate) fn of(disk: &VolumeDisk, path: &Path) -> io::Result<Self> {
        Ok(Self { disk: disk.clone(), mark: FileMark::of(path)? })
    }

    /// True if the disk, as seen now, has the content that it had under an earlier mark.
    pub(crate) fn has_content_of(&self, earlier: &Self) -> bool {
        self.disk == earlier.disk && self.mark.has_content_of(&earlier.mark)
    }
}

/// Identity, length and modification time of a file: a later write changes the time.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct FileMark {
    inode: u64,
    bytes: u64,
    changed: (i64, i64),
}

impl FileMark {
    pub(crate) fn of(path: &Path) -> io::Result<Self> {
        let seen = fs::metadata(path)?;
        Ok(Self { inode: seen.ino(), bytes: seen.len(), changed: (seen.mtime(), seen.mtime_nsec()) })
    }

    /// True if the file of this mark, as seen now, has the content that it had under an earlier mark. A disk may have grown
    /// since, which keeps its content and its time.
    pub(crate) fn has_content_of(&self, earlier: &Self) -> bool {
        self.inode == earlier.inode && self.changed == earlier.changed && self.bytes >= earlier.bytes
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    #[test]
    fn manifests_of_earlier_releases_are_read_and_written_alike() {
        let mark = json!({"inode": 1, "bytes": 2, "changed": [3, 4]});
        let latest = json!({
            "generation": 5, "run": 2, "launch": 9, "launched_at": "2026-01-01T00:00:00Z",
            "saved_at": "2026-01-01T00:00:01Z", "token": "t", "backend": "driver", "version": "7.2.22 (Debian)",
            "machine": "q35", "device_set": 1, "kernel": "/k", "initrd": "/i", "overlay": mark,
            "volumes": [{"disk": "tz4a98xxat96iws9zmbrgj3b", "is_read_only": false, "number": 3, "mark": mark}],
            "kernel_files": "/h", "queues": 4, "is_adopted": true,
            "state_bytes": 6, "state_sha256": "ab", "ram_bytes": 7, "ram_sum": 8,
        });
        let manifest: Manifest = serde_json::from_value(latest.clone()).expect("as it is written");
        assert_eq!(serde_json::to_value(&manifest).expect("written"), latest);
        // Disks of volumes had no numbers: they were numbered by their order.
        let mut unnumbered = latest.clone();
        let volume = json!({"disk": "tz4a98xxat96iws9zmbrgj3b", "is_read_only": true, "mark": mark});
        unnumbered["volumes"] = json!([volume, volume]);
        let mut manifest: Manifest = serde_json::from_value(unnumbered).expect("as it was written");
        VolumeDisk::number_earlier(manifest.origin.volumes.iter_mut().map(|volume| &mut volume.disk));
        let numbers: Vec<u32> = manifest.origin.volumes.iter().map(|volume| volume.disk.number).collect();
        assert_eq!(numbers, [0, 1]);
        // Without fields that came later, and with an older name.
        let mut first = latest;
        let fields = first.as_object_mut().expect("an object");
        for field in ["device_set", "volumes", "is_adopted", "kernel_files", "launch", "queues"] {
            fields.remove(field);
        }
        fields.insert("headers".to_owned(), Value::from("/h"));
        let manifest: Manifest = serde_json::from_value(first).expect("as it was written");
        assert_eq!(manifest.origin.kernel_files.as_deref(), Some(Path::new("/h")));
        assert!(manifest.origin.volumes.is_empty() && !manifest.origin.is_adopted);
        assert_eq!(manifest.origin.queues, 1, "the only card that there was");
        assert_eq!(manifest.origin.device_set, DeviceSet(0), "the first");
    }
}
