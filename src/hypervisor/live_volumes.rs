//! Volumes that come, grow and go while a VM runs.
//!
//! Guarantees: the record of a VM's volumes says which disk is being put in or taken out before the VMM is asked, and what
//! is there afterwards. After a crash in between, the disk is taken out first.

use std::collections::BTreeMap;
use std::fs;
use std::io;

use rustix::process::{Pid, Resource, Rlimit, prlimit};
use serde::{Deserialize, Serialize};
use stead_controllers::host::{HostError, HostErrorKind, VolumeDisk};
use stead_schemas::names::Uid;
use stead_schemas::quantity::Bytes;

use super::attached::Attached;
use super::hypervisors::Hypervisors;
use super::process::{file_size_max, largest_file};
use super::record::{Record, VmPaths};
use crate::host::files;

/// The disks of volumes that are in a VM.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct LiveVolumes {
    /// The disks, by their numbers.
    pub(super) volumes: Vec<VolumeDisk>,
    /// The number of a disk of which it is not known whether it is there, or a part of it.
    pub(super) unsure: Option<u32>,
    /// Sizes with which the VMM knows the disks, in bytes, by their numbers.
    #[serde(default)]
    pub(super) sizes: BTreeMap<u32, Bytes>,
}

impl LiveVolumes {
    /// Reads the volumes of a VM: those of its launch, unless they changed since.
    pub(super) fn of(record: &Record, paths: &VmPaths) -> Result<Self, HostError> {
        let path = paths.live_volumes();
        let failed = |error| HostError::io("read", path.display().to_string(), error);
        match fs::read(&path) {
            Ok(bytes) => serde_json::from_slice(&bytes).map_err(|error| failed(error.into())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let (volumes, sizes) = (record.volumes.clone(), record.volume_sizes.clone());
                Ok(Self { volumes, unsure: None, sizes })
            }
            Err(error) => Err(failed(error)),
        }
    }

    fn write(&self, paths: &VmPaths) -> Result<(), HostError> {
        let bytes = serde_json::to_vec(self).unwrap_or_default();
        // Not synced: the process that it describes ends with the host.
        files::write_passing(&paths.live_volumes(), &bytes, 0o600)
    }

    /// Returns the volumes while nothing is known of the disk of this number.
    fn unsure(mut self, number: u32) -> Self {
        self.volumes.retain(|volume| volume.number != number);
        self.sizes.remove(&number);
        Self { unsure: Some(number), ..self }
    }
}

impl Hypervisors {
    /// Puts the disk of a volume into a running VM.
    pub(super) async fn add_volume(&self, owner: &Uid, volume: &VolumeDisk) -> Result<(), HostError> {
        let refused = |kind| HostError::new(kind, "put a volume into the VM of", owner.as_str());
        let (attached, paths) = (self.find_attached(owner)?, self.paths(owner));
        Self::require(owner, &attached.choice, |has| has.live_volumes, "put a volume into the VM of")?;
        let record = Record::read(&paths)?.ok_or_else(|| refused(HostErrorKind::Missing))?;
        let before = LiveVolumes::of(&record, &paths)?;
        let is_taken = before.volumes.iter().any(|other| other.number == volume.number);
        if is_taken || before.unsure.is_some() {
            return Err(refused(HostErrorKind::Conflict).because("another disk may have its number"));
        }
        let file = self.volume_file(volume);
        let mut after = before.clone();
        after.volumes.push(volume.clone());
        after.volumes.sort_by_key(|volume| volume.number);
        let failed = |error| HostError::io("put a volume into the VM of", owner.as_str(), error);
        after.sizes.extend(self.volume_sizes(std::slice::from_ref(volume)).map_err(failed)?);
        self.allow_disks(&attached, &record, &after).map_err(failed)?;
        before.unsure(volume.number).write(&paths)?;
        let added = self.on_session(&attached, async |session| session.add_volume(&file).await).await;
        added.map_err(|why| refused(HostErrorKind::Transient).because(why))?;
        after.write(&paths)
    }

    /// Takes the disk of a volume out of a running VM, or what is there of it.
    pub(super) async fn remove_volume(&self, owner: &Uid, number: u32) -> Result<(), HostError> {
        let refused = |kind| HostError::new(kind, "take a volume out of the VM of", owner.as_str());
        let (attached, paths) = (self.find_attached(owner)?, self.paths(owner));
        Self::require(owner, &attached.choice, |has| has.live_volumes, "take a volume out of the VM of")?;
        let record = Record::read(&paths)?.ok_or_else(|| refused(HostErrorKind::Missing))?;
        let unsure = LiveVolumes::of(&record, &paths)?.unsure(number);
        unsure.write(&paths)?;
        let removed = self.on_session(&attached, async |session| session.remove_volume(number).await).await;
        removed.map_err(|why| refused(HostErrorKind::Transient).because(why))?;
        LiveVolumes { unsure: None, ..unsure }.write(&paths)
    }

    /// Lets a running VM use the disk of a volume as far as its file reaches, which is at least this size.
    pub(super) async fn grow_volume(&self, owner: &Uid, number: u32, size: Bytes) -> Result<(), HostError> {
        let refused = |kind| HostError::new(kind, "grow a volume in the VM of", owner.as_str());
        let (attached, paths) = (self.find_attached(owner)?, self.paths(owner));
        Self::require(owner, &attached.choice, |has| has.live_volumes, "grow a volume in the VM of")?;
        let record = Record::read(&paths)?.ok_or_else(|| refused(HostErrorKind::Missing))?;
        let mut volumes = LiveVolumes::of(&record, &paths)?;
        let volume = volumes.volumes.iter().find(|volume| volume.number == number && !volume.is_read_only);
        let volume = volume.ok_or_else(|| refused(HostErrorKind::Missing))?;
        let failed = |error| HostError::io("grow a volume in the VM of", owner.as_str(), error);
        // The VMM cuts a file that is longer than what it is asked for.
        let present = self.volume_sizes(std::slice::from_ref(volume)).map_err(failed)?;
        let present = present.get(&number).copied().filter(|present| *present >= size);
        let present =
            present.ok_or_else(|| refused(HostErrorKind::Transient).because("its file is smaller"))?;
        self.allow_disks(&attached, &record, &volumes).map_err(failed)?;
        let grown =
            self.on_session(&attached, async |session| session.grow_volume(number, present).await).await;
        grown.map_err(|why| refused(HostErrorKind::Transient).because(why))?;
        volumes.sizes.insert(number, present);
        volumes.write(&paths)
    }

    /// Returns the lengths of the files of disks, by the numbers of the disks.
    pub(super) fn volume_sizes(&self, volumes: &[VolumeDisk]) -> io::Result<BTreeMap<u32, Bytes>> {
        let size = |volume: &VolumeDisk| {
            let file = fs::metadata((self.config.disk)(&volume.disk))?;
            Ok((volume.number, Bytes(file.len())))
        };
        volumes.iter().map(size).collect()
    }

    /// Lets a VMM write to all its disks as far as their files reach.
    fn allow_disks(&self, attached: &Attached, record: &Record, volumes: &LiveVolumes) -> io::Result<()> {
        let disks = volumes.volumes.iter().map(|volume| &volume.disk).chain(&record.overlay);
        let largest = largest_file(disks.map(|disk| (self.config.disk)(disk)))?;
        allow_file_size(attached.identity.pid, file_size_max(largest, self.config.console_log_max))
    }
}

/// Lets a VMM write files up to this size, in bytes. Where it may do so already, no privilege is needed.
fn allow_file_size(pid: u32, size: u64) -> io::Result<()> {
    let limits = fs::read_to_string(format!("/proc/{pid}/limits"))?;
    if file_size_limit(&limits).is_none_or(|present| present >= size) {
        return Ok(());
    }
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
    let pid = pid.ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))?;
    prlimit(Some(pid), Resource::Fsize, Rlimit { current: Some(size), maximum: Some(size) })?;
    Ok(())
}

/// Reads the size of the largest file that a process may write, in bytes, from its `/proc/PID/limits`; `None` without a
/// limit.
fn file_size_limit(limits: &str) -> Option<u64> {
    let line = limits.lines().find_map(|line| line.strip_prefix("Max file size"))?;
    line.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limit_of_a_process_is_read() {
        let limits = |size: &str| {
            format!(
                "Limit          Soft Limit   Hard Limit   Units\nMax cpu time   unlimited   unlimited   seconds\n\
                     Max file size             {size}             unlimited            bytes\n"
            )
        };
        assert_eq!(file_size_limit(&limits("10737418240")), Some(10_737_418_240));
        assert_eq!(file_size_limit(&limits("unlimited")), None);
        let own = fs::read_to_string("/proc/self/limits").expect("read");
        let present = rustix::process::getrlimit(Resource::Fsize).current;
        assert_eq!(file_size_limit(&own), present);
    }
}
