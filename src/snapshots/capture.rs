//! The port `Snapshots`: capturing memory and disks of one moment, and reporting the existing snapshots.
//!
//! Guarantees: a running VM is paused only while its state, its RAM and its disks are copied; checksums and
//! fsyncs follow afterwards.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use jiff::Timestamp;
use stead_controllers::host::{
    CapturePlan, Captured, GuestPhase, HostError, HostErrorKind, Snapshots, VmmState,
};
use stead_schemas::compression::Compression;
use stead_schemas::names::Uid;
use stead_schemas::numbers::StandbyNo;
use stead_schemas::quantity::Bytes;
use stead_schemas::snapshot::{CompressionState, SnapshotKind};

use super::files::{MANIFEST, Manifest, is_whole};
use crate::host::directories::uids_in;
use crate::host::disks::Ext4Files;
use crate::host::{files, sparse};
use crate::hypervisor::{Hypervisors, on_thread, prove};
use crate::memory::{MemoryDir, Origin, RamKept};

impl Snapshots for Hypervisors {
    async fn list(&self) -> Result<Vec<Uid>, HostError> {
        uids_in(&self.config.data_dir.join("snapshots"))
    }

    async fn inspect(&self, snapshot: &Uid) -> Result<Option<Captured>, HostError> {
        let dir = self.snapshot_dir(snapshot);
        if !dir.exists()? {
            return Ok(None);
        }
        let Some(manifest) = dir.read::<Manifest>(MANIFEST)? else { return Ok(Some(Captured::Incomplete)) };
        let is_whole = is_whole(&dir, &manifest)?;
        let Manifest { kind, captured_at, .. } = manifest;
        let size = Bytes(allocated_in(&dir));
        let compression_state = match dir.manifest()? {
            _ if self.compressor.is_in_progress(snapshot) => CompressionState::Compressing,
            Some(memory) => dir.compression(&memory),
            None => CompressionState::Plain,
        };
        Ok(Some(if is_whole {
            Captured::Whole { kind, size, captured_at, compression_state }
        } else {
            Captured::Incomplete
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
            // The files of a saved memory are shared.
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
        let is_verified = !is_saved || self.is_verified(&plan.source, &source);
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
            // The first fork need not read what was just written.
            Ok(()) if is_verified => self.set_verified(&plan.snapshot, &dir),
            Ok(()) => {}
            Err(_) => on_thread(&plan.snapshot, move || dir.discard()).await?,
        }
        captured
    }

    async fn compress(&self, snapshot: &Uid, how: Compression) -> Result<(), HostError> {
        self.compressor.begin(snapshot, self.snapshot_dir(snapshot), how)
    }

    async fn remove(&self, snapshot: &Uid) -> Result<(), HostError> {
        self.forget_verified(snapshot);
        self.compressor.end(snapshot).await;
        let dir = self.snapshot_dir(snapshot);
        // Freeing the blocks of large files takes a while.
        on_thread(snapshot, move || dir.discard()).await
    }
}

impl Hypervisors {
    fn snapshot_dir(&self, snapshot: &Uid) -> MemoryDir {
        MemoryDir::for_snapshot(&self.config.data_dir, snapshot)
    }

    /// Pauses a running VM for as long as the copies take, and resumes it also when they fail.
    async fn capture_running(
        &self,
        plan: &CapturePlan,
        dir: &MemoryDir,
    ) -> Result<(Origin, RamKept), HostError> {
        let _lock = self.locks.take(&plan.source).await;
        let attached = self.find_attached(&plan.source)?;
        Self::require(&plan.source, &attached.choice, |has| has.standby, "capture")?;
        let is_same_run = self.recorded_run(&plan.source)? == Some(plan.run);
        let is_up = self.vmm_state(&plan.source, &attached).await == VmmState::Running
            && attached.channel.view().phase == GuestPhase::Ready;
        if !is_same_run || !is_up || self.memory_dir(&plan.source).exists()? {
            return Err(conflict(plan, "its source does not run as it did"));
        }
        let begun = self.begin_ram(&plan.source, &attached, dir).await?;
        let paused = self.on_session(&attached, async |session| session.pause().await).await;
        let taken = match paused {
            Ok(()) => {
                // No number: an instance that takes the memory over sets its own.
                match self.take_memory(&plan.source, &attached, dir, begun, StandbyNo(0)).await {
                    // The VMM flushed the disks when it was paused.
                    Ok(memory) => self.copy_disks(plan, dir).await.map(|()| memory),
                    Err(error) => Err(error),
                }
            }
            Err(why) => Err(conflict(plan, &why)),
        };
        self.let_run_on(&plan.source, &attached).await;
        taken
    }

    /// Captures a source in standby: shares the files of its memory, and copies its disks, which nothing
    /// writes to.
    async fn capture_saved(
        &self,
        plan: &CapturePlan,
        dir: &MemoryDir,
    ) -> Result<(Origin, RamKept), HostError> {
        let _lock = self.locks.take(&plan.source).await;
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
            self.is_as_saved(&plan.disk, &origin).map_err(dir.failed("observe the disks for"))?;
        if !is_as_saved {
            return Err(conflict(plan, "one of its disks is newer than its memory"));
        }
        Ok((origin, kept))
    }

    async fn capture_stopped(&self, plan: &CapturePlan, dir: &MemoryDir) -> Result<(), HostError> {
        let _lock = self.locks.take(&plan.source).await;
        if self.recorded_run(&plan.source)?.is_some() {
            return Err(conflict(plan, "its source is not down"));
        }
        self.copy_disks(plan, dir).await
    }

    async fn copy_disks(&self, plan: &CapturePlan, dir: &MemoryDir) -> Result<(), HostError> {
        let pair = |volume: Option<&Uid>, disk: &Uid| {
            ((self.config.disk)(disk), dir.saving(&Ext4Files::in_snapshot(volume)))
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

/// Makes a file durable. Returns its length in bytes.
fn synced_bytes(path: &Path) -> io::Result<u64> {
    let file = File::open(path)?;
    file.sync_all()?;
    Ok(file.metadata()?.len())
}

/// Makes the captured files durable, and then publishes the snapshot.
async fn seal(
    plan: &CapturePlan,
    dir: &MemoryDir,
    memory: Option<(Origin, RamKept)>,
) -> Result<(), HostError> {
    let (synced_dir, volumes) = (dir.clone(), plan.volumes.clone());
    let synced = tokio::task::spawn_blocking(move || {
        let bytes = |volume: Option<&Uid>| synced_bytes(&synced_dir.saving(&Ext4Files::in_snapshot(volume)));
        let volumes = volumes.iter().map(|disk| Ok((disk.clone(), bytes(Some(disk))?)));
        Ok((bytes(None)?, volumes.collect::<io::Result<_>>()?))
    });
    let synced = synced.await.unwrap_or_else(|error| Err(io::Error::other(error)));
    let (disk_bytes, volume_bytes) = synced.map_err(dir.failed("make durable"))?;
    let captured_at = memory.as_ref().map_or_else(Timestamp::now, |(origin, _)| origin.saved_at);
    if let Some((origin, ram)) = memory {
        prove(&plan.source, dir.clone(), origin, ram).await?;
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
