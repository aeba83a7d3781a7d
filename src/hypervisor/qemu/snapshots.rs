//! Snapshots: memory and disk of one moment, each in a directory of its own.
//!
//! ```text
//! snapshots/UID/saved/     disk.ext4, volume-*.ext4, snapshot.json; and of a VM's memory ram, state,
//!                          manifest.json
//! ```
//! Guarantees: `saved` appears whole, durably, by one rename. A VM that runs is held only while its
//! state, its RAM and its disk are copied; sums and fsyncs come after.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use stead_controllers::host::{
    CapturePlan, Captured, GuestPhase, HostError, HostErrorKind, Snapshots, VmmState,
};
use stead_schemas::compression::Compression;
use stead_schemas::names::Uid;
use stead_schemas::numbers::StandbyNo;
use stead_schemas::quantity::Bytes;
use stead_schemas::snapshot::{PackingState, SnapshotKind};

use super::manifest::{Origin, RamKept};
use super::memory::{MemoryDir, length};
use super::places::Record;
use super::saving::{on_thread, proved};
use super::{Qemu, uids_in};
use crate::host::disks::Ext4Files;
use crate::host::{files, sparse};

const MANIFEST: &str = "snapshot.json";

/// What a snapshot is of.
#[derive(Debug, Serialize, Deserialize)]
struct Manifest {
    kind: SnapshotKind,
    captured_at: Timestamp,
    disk_bytes: u64,
    /// Of those that volumes were written to.
    #[serde(default)]
    volume_bytes: BTreeMap<Uid, u64>,
}

impl Snapshots for Qemu {
    async fn list(&self) -> Result<Vec<Uid>, HostError> {
        uids_in(&self.config.data_dir.join("snapshots"))
    }

    async fn inspect(&self, snapshot: &Uid) -> Result<Option<Captured>, HostError> {
        let dir = self.snapshot_dir(snapshot);
        if !dir.exists()? {
            return Ok(None);
        }
        let Some(manifest) = dir.read::<Manifest>(MANIFEST)? else { return Ok(Some(Captured::Loose)) };
        let is_whole = is_whole(&dir, &manifest)?;
        let Manifest { kind, captured_at, .. } = manifest;
        let size = Bytes(allocated_in(&dir));
        let packing = match dir.manifest()? {
            _ if self.packer.is_going(snapshot) => PackingState::Packing,
            Some(memory) => dir.packing(&memory),
            None => PackingState::Plain,
        };
        Ok(Some(if is_whole {
            Captured::Whole { kind, size, captured_at, packing }
        } else {
            Captured::Loose
        }))
    }

    async fn measure(&self, plan: &CapturePlan) -> Result<Bytes, HostError> {
        let failed = |error| HostError::io("measure", plan.source.as_str(), error);
        let mut disks = 0;
        for disk in std::iter::once(&plan.disk).chain(&plan.volumes) {
            disks += fs::metadata((self.config.disk)(disk)).map_err(failed)?.blocks() * 512;
        }
        let attached = self.lock().get(&plan.source).cloned();
        let memory = match (plan.kind, attached) {
            (SnapshotKind::Standby, Some(attached)) => {
                self.bytes_to_save(&plan.source, &attached, &self.snapshot_dir(&plan.snapshot)).await?.0
            }
            // What is saved already is shared.
            (SnapshotKind::Standby, None) | (SnapshotKind::Stopped, _) => 0,
        };
        Ok(Bytes(memory.saturating_add(disks)))
    }

    async fn capture(&self, plan: &CapturePlan) -> Result<(), HostError> {
        let dir = self.snapshot_dir(&plan.snapshot);
        let begin = dir.clone();
        on_thread(&plan.snapshot, move || begin.begin()).await?;
        let source = self.memory_dir(&plan.source);
        let is_saved = source.exists()?;
        let is_proved = !is_saved || self.is_proved(&plan.source, &source);
        let taken = match plan.kind {
            SnapshotKind::Stopped => self.capture_stopped(plan, &dir).await.map(|()| None),
            SnapshotKind::Standby if is_saved => self.capture_saved(plan, &dir).await.map(Some),
            SnapshotKind::Standby => self.capture_running(plan, &dir).await.map(Some),
        };
        let captured = match taken {
            Ok(memory) => seal(plan, &dir, memory).await,
            Err(error) => Err(error),
        };
        match captured {
            // Its first fork reads nothing that was just written.
            Ok(()) if is_proved => self.has_proved(&plan.snapshot, &dir),
            Ok(()) => {}
            Err(_) => on_thread(&plan.snapshot, move || dir.discard()).await?,
        }
        captured
    }

    async fn compress(&self, snapshot: &Uid, how: Compression) -> Result<(), HostError> {
        self.packer.begin(snapshot, self.snapshot_dir(snapshot), how)
    }

    async fn remove(&self, snapshot: &Uid) -> Result<(), HostError> {
        self.proved().remove(snapshot);
        self.packer.end(snapshot).await;
        let dir = self.snapshot_dir(snapshot);
        // Freeing the blocks of large files takes a while.
        on_thread(snapshot, move || dir.discard()).await
    }
}

/// Nothing was taken from what was published, or cut off.
fn is_whole(dir: &MemoryDir, manifest: &Manifest) -> Result<bool, HostError> {
    let disks = manifest.volume_bytes.iter().map(|(of, bytes)| (Some(of), *bytes));
    for (of, bytes) in std::iter::once((None, manifest.disk_bytes)).chain(disks) {
        let disk = length(&dir.saved(&Ext4Files::in_snapshot(of)));
        if disk.map_err(dir.failed("look at the disks in"))? != Some(bytes) {
            return Ok(false);
        }
    }
    let has_memory = || dir.manifest()?.map_or(Ok(false), |memory| dir.is_whole(&memory));
    Ok(manifest.kind == SnapshotKind::Stopped || has_memory()?)
}

impl Qemu {
    /// Whoever begins with a snapshot looks that it is still as it was taken.
    pub(super) fn check_whole(&self, snapshot: &Uid) -> Result<(), HostError> {
        let dir = self.snapshot_dir(snapshot);
        let is_whole = match dir.read::<Manifest>(MANIFEST)? {
            Some(manifest) => is_whole(&dir, &manifest)?,
            None => false,
        };
        let damaged =
            || HostError::new(HostErrorKind::Permanent, "begin with the snapshot", snapshot.as_str());
        if is_whole { Ok(()) } else { Err(damaged().because("its files are not what was taken")) }
    }

    fn snapshot_dir(&self, snapshot: &Uid) -> MemoryDir {
        MemoryDir::of_snapshot(&self.config.data_dir, snapshot)
    }

    /// Holds a VM that runs for as long as the copies take, and lets it run on whatever comes of them.
    async fn capture_running(
        &self,
        plan: &CapturePlan,
        dir: &MemoryDir,
    ) -> Result<(Origin, RamKept), HostError> {
        let _turn = self.turns.take(&plan.source).await;
        let attached = self.find_attached(&plan.source)?;
        let is_of_run =
            Record::read(&self.places(&plan.source))?.is_some_and(|record| record.run == plan.run);
        let is_up = self.vmm_state(&plan.source, &attached).await == VmmState::Running
            && attached.control.view().phase == GuestPhase::Ready;
        if !is_of_run || !is_up || self.memory_dir(&plan.source).exists()? {
            return Err(conflict(plan, "its source does not run as it did"));
        }
        let begun = self.begin_ram(&plan.source, &attached, dir).await?;
        let held = self.on_monitor(&attached, async |monitor| monitor.pause().await).await;
        let taken = match held {
            Ok(()) => {
                // No standby's: whoever takes it over gives it the number of its own.
                match self.take_memory(&plan.source, &attached, dir, begun, StandbyNo(0)).await {
                    // The VMM has flushed its disks since it is held.
                    Ok(memory) => self.copy_disks(plan, dir).await.map(|()| memory),
                    Err(error) => Err(error),
                }
            }
            Err(why) => Err(conflict(plan, &why)),
        };
        self.let_run_on(&plan.source, &attached).await;
        taken
    }

    /// Of a source in standby: its files, shared, and a copy of the disk that nobody writes to.
    async fn capture_saved(
        &self,
        plan: &CapturePlan,
        dir: &MemoryDir,
    ) -> Result<(Origin, RamKept), HostError> {
        let _turn = self.turns.take(&plan.source).await;
        let memory = self.memory_dir(&plan.source);
        let manifest = memory.manifest()?.ok_or_else(|| conflict(plan, "its memory is not saved"))?;
        let origin = manifest.origin.clone();
        if origin.run != plan.run {
            return Err(conflict(plan, "its memory is of another run"));
        }
        let to = dir.clone();
        let kept = on_thread(&plan.snapshot, move || to.keep_shared(&memory, &manifest)).await?;
        self.copy_disks(plan, dir).await?;
        let is_as_saved =
            self.is_as_saved(&plan.disk, &origin).map_err(dir.failed("look at the disks for"))?;
        if !is_as_saved {
            return Err(conflict(plan, "one of its disks is newer than its memory"));
        }
        Ok((origin, kept))
    }

    async fn capture_stopped(&self, plan: &CapturePlan, dir: &MemoryDir) -> Result<(), HostError> {
        let _turn = self.turns.take(&plan.source).await;
        if Record::read(&self.places(&plan.source))?.is_some() {
            return Err(conflict(plan, "its source is not down"));
        }
        self.copy_disks(plan, dir).await
    }

    async fn copy_disks(&self, plan: &CapturePlan, dir: &MemoryDir) -> Result<(), HostError> {
        let pair = |of: Option<&Uid>, disk: &Uid| {
            ((self.config.disk)(disk), dir.saving(&Ext4Files::in_snapshot(of)))
        };
        let mut pairs = vec![pair(None, &plan.disk)];
        pairs.extend(plan.volumes.iter().map(|disk| pair(Some(disk), disk)));
        let copy = move || pairs.iter().try_for_each(|(from, to)| copy_file(from, to));
        let copied = tokio::task::spawn_blocking(copy).await;
        copied.unwrap_or_else(|error| Err(io::Error::other(error))).map_err(dir.failed("copy the disks to"))
    }
}

fn copy_file(from: &Path, to: &Path) -> io::Result<()> {
    sparse::copy(&File::open(from)?, &File::create_new(to)?)
}

/// A file's length, once it is durable.
fn synced_bytes(path: &Path) -> io::Result<u64> {
    let file = File::open(path)?;
    file.sync_all()?;
    Ok(file.metadata()?.len())
}

/// Makes what was taken durable, and then the snapshot.
async fn seal(
    plan: &CapturePlan,
    dir: &MemoryDir,
    memory: Option<(Origin, RamKept)>,
) -> Result<(), HostError> {
    let (of_thread, volumes) = (dir.clone(), plan.volumes.clone());
    let synced = tokio::task::spawn_blocking(move || {
        let bytes = |of: Option<&Uid>| synced_bytes(&of_thread.saving(&Ext4Files::in_snapshot(of)));
        let volumes = volumes.iter().map(|disk| Ok((disk.clone(), bytes(Some(disk))?)));
        Ok((bytes(None)?, volumes.collect::<io::Result<BTreeMap<_, _>>>()?))
    });
    let synced = synced.await.unwrap_or_else(|error| Err(io::Error::other(error)));
    let (disk_bytes, volume_bytes) = synced.map_err(dir.failed("make durable"))?;
    let captured_at = memory.as_ref().map_or_else(Timestamp::now, |(origin, _)| origin.saved_at);
    if let Some((origin, ram)) = memory {
        proved(&plan.source, dir.clone(), origin, ram).await?;
    }
    let manifest = Manifest { kind: plan.kind, captured_at, disk_bytes, volume_bytes };
    let bytes = serde_json::to_vec_pretty(&manifest).unwrap_or_default();
    let publish = dir.clone();
    let written = move || {
        files::write_whole(&publish.saving(MANIFEST), &bytes, 0o600)?;
        publish.publish()
    };
    on_thread(&plan.snapshot, written).await
}

fn conflict(plan: &CapturePlan, why: &str) -> HostError {
    HostError::new(HostErrorKind::Conflict, "capture", plan.source.as_str()).because(why)
}

fn allocated_in(dir: &MemoryDir) -> u64 {
    let Ok(entries) = fs::read_dir(dir.saved("")) else { return 0 };
    entries.flatten().filter_map(|entry| entry.metadata().ok()).map(|file| file.blocks() * 512).sum()
}
