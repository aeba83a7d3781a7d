//! The files of one VM that was launched: its paths, and the record that finds its process again.
//!
//! The record is written before the process is spawned, and again when the identity of the process is
//! known. It names its machine type, by which the driver is found; nothing else in it is a driver's.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use stead_controllers::host::{HostError, HostErrorKind, LaunchPlan, VolumeDisk};
use stead_schemas::guest::Token;
use stead_schemas::names::{LinkName, Uid};
use stead_schemas::numbers::{DeviceSet, LaunchId, RunNo};
use stead_schemas::quantity::Bytes;

use crate::guest_channel::{Known, NewToken, Tokens};
use crate::host::files;
use crate::host::process::Identity;
use crate::memory::number_launch;

/// Directories of one VM.
#[derive(Debug, Clone)]
pub struct VmPaths {
    /// The directory of sockets and the record. It is on tmpfs by default, so a reboot empties it. Its mode
    /// is 0700, which protects the sockets in it.
    runtime: PathBuf,
    /// Outlives the VM; removed with the instance.
    logs: PathBuf,
}

impl VmPaths {
    #[must_use]
    pub fn new(run_dir: &Path, data_dir: &Path, owner: &Uid) -> Self {
        Self {
            runtime: run_dir.join("vm").join(owner.as_str()),
            logs: data_dir.join("logs").join(owner.as_str()),
        }
    }

    #[must_use]
    pub fn runtime(&self) -> &Path {
        &self.runtime
    }

    #[must_use]
    pub fn logs(&self) -> &Path {
        &self.logs
    }

    /// Returns the path of a socket of a driver.
    #[must_use]
    pub fn socket(&self, name: &str) -> PathBuf {
        self.runtime.join(name)
    }

    /// Returns the socket of the guest channel.
    #[must_use]
    pub fn control(&self) -> PathBuf {
        self.socket("control.sock")
    }

    #[must_use]
    pub fn console_log(&self) -> PathBuf {
        self.logs.join("app.log")
    }

    /// Returns the console's log that reached its limit last.
    #[must_use]
    pub fn older_console_log(&self) -> PathBuf {
        self.logs.join("app.log.1")
    }

    #[must_use]
    pub fn vmm_log(&self) -> PathBuf {
        self.logs.join("vmm.log")
    }

    /// Returns the file with the number of the last change of the guest's unused memory after which the host took that
    /// memory back.
    pub(crate) fn taken_back(&self) -> PathBuf {
        self.runtime.join("taken-back")
    }

    /// Returns the file with the volumes of a VM in which they changed since its launch.
    pub(crate) fn live_volumes(&self) -> PathBuf {
        self.runtime.join("volumes.json")
    }

    pub(crate) fn record(&self) -> PathBuf {
        self.runtime.join("machine.json")
    }
}

/// The record of one launch.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Record {
    pub(crate) run: RunNo,
    /// The number of the launch. Records of daemons that identified a launch by its time have none: see
    /// [`number_launch`].
    #[serde(default)]
    pub(crate) launch: LaunchId,
    /// Name of the machine type, or `None` in records that are older than the choice of machine types.
    #[serde(default, rename = "board")]
    pub(crate) machine_type: Option<String>,
    /// The set of the guest's devices, the first in records from before there were others.
    #[serde(default)]
    pub(crate) device_set: DeviceSet,
    pub(crate) token: Token,
    /// The token that the guest should take: set from before it is sent until the guest has used it.
    #[serde(default)]
    pub(crate) new_token: Option<NewToken>,
    pub(crate) launched_at: Timestamp,
    pub(crate) identity: Option<Identity>,
    pub(crate) tap: Option<LinkName>,
    /// Number of pairs of queues of the network card. `None` without a card, and for a card behind a hub, which the
    /// VMs of earlier daemons have.
    #[serde(default)]
    pub(crate) queues: Option<u16>,
    /// True if the limit of the disks can be changed while the VM runs. It cannot in VMs of earlier daemons.
    #[serde(default)]
    pub(crate) has_disk_limit: bool,
    /// The owner of the disk that the VM writes to.
    pub(crate) overlay: Option<Uid>,
    #[serde(default)]
    pub(crate) memory: Bytes,
    /// The part of the memory that the guest can give back.
    #[serde(default)]
    pub(crate) hotplug: Bytes,
    #[serde(default)]
    pub(crate) mapping: Mapping,
    /// The inode of the file that the VMM maps.
    #[serde(default)]
    pub(crate) ram_inode: u64,
    /// The volumes of the launch, by their numbers.
    #[serde(default)]
    pub(crate) volumes: Vec<VolumeDisk>,
    /// Sizes that their files had at the launch, in bytes, by their numbers.
    #[serde(default)]
    pub(crate) volume_sizes: BTreeMap<u32, Bytes>,
    /// The disk with modules and headers of the guest's kernel, if the guest has one.
    #[serde(default, alias = "headers")]
    pub(crate) kernel_files: Option<PathBuf>,
    /// The user of the VMM, or `None` when it has no walls.
    #[serde(default)]
    pub(crate) user: Option<u32>,
}

/// The facts about the guest of a launch: at a boot they are new, at a restore they are those of the saved memory.
#[derive(Debug)]
pub(super) struct GuestOrigin {
    pub(super) run: RunNo,
    pub(super) device_set: DeviceSet,
    pub(super) token: Token,
    pub(super) launched_at: Timestamp,
    pub(super) kernel_files: Option<PathBuf>,
    /// Number of pairs of queues of the network card.
    pub(super) queues: u16,
    /// True if the limit of the disks can be changed while the VM runs.
    pub(super) has_disk_limit: bool,
}

/// The way in which a VMM maps its RAM.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Mapping {
    /// An anonymous file of this VM alone, or memory of the VMM itself.
    #[default]
    Own,
    /// The saved file, privately: pages that were written since are dirty pages of the VMM.
    Private,
}

impl Record {
    /// Makes the record of a launch whose process is not spawned yet.
    pub(super) fn new(plan: &LaunchPlan, machine_type: &str, guest: GuestOrigin) -> Self {
        Self {
            run: guest.run,
            launch: plan.launch,
            machine_type: Some(machine_type.to_owned()),
            has_disk_limit: guest.has_disk_limit,
            device_set: guest.device_set,
            token: guest.token,
            launched_at: guest.launched_at,
            tap: plan.network.as_ref().map(|card| card.tap.clone()),
            queues: plan.network.as_ref().map(|_| guest.queues),
            overlay: Some(plan.overlay.clone()),
            memory: plan.memory,
            hotplug: plan.hotplug,
            volumes: plan.volumes.clone(),
            kernel_files: guest.kernel_files,
            ..Self::unwritten()
        }
    }

    pub(crate) fn write(&self, paths: &VmPaths) -> Result<(), HostError> {
        let bytes = serde_json::to_vec(self).unwrap_or_default();
        // Not synced: the process that it describes ends with the host.
        files::write_passing(&paths.record(), &bytes, 0o600)
    }

    /// Reads the record; `None` when there is no runtime directory. A directory without a readable record
    /// is what a crash left of a launch: it is read as a VM of run 0 without a process.
    pub(crate) fn read(paths: &VmPaths) -> Result<Option<Self>, HostError> {
        let path = paths.record();
        match fs::read(&path) {
            Ok(bytes) => {
                let mut record: Self = serde_json::from_slice(&bytes).unwrap_or_else(|_| Self::unwritten());
                record.launch = number_launch(record.launch, record.launched_at);
                VolumeDisk::number_earlier(record.volumes.iter_mut());
                Ok(Some(record))
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let exists = paths.runtime.try_exists();
                let exists = exists.map_err(|error| HostError::io("read", path.display().to_string(), error));
                Ok(exists?.then(Self::unwritten))
            }
            Err(error) => Err(HostError::io("read", path.display().to_string(), error)),
        }
    }

    /// Returns the inode of the file that the VMM maps privately.
    pub(crate) fn mapped_inode(&self) -> Option<u64> {
        (self.mapping == Mapping::Private).then_some(self.ram_inode)
    }

    /// Returns the tokens of the guest channel, which write their changes to this record.
    pub(crate) fn tokens(&self, paths: &VmPaths) -> Tokens {
        let known = Known { token: self.token.clone(), new: self.new_token.clone() };
        let name = paths.record().display().to_string();
        let (paths, subject) = (paths.clone(), name.clone());
        let save = move |known: &Known| {
            let missing = || HostError::new(HostErrorKind::Missing, "record a token in", subject.as_str());
            let mut record = Self::read(&paths)?.ok_or_else(missing)?;
            (record.token, record.new_token) = (known.token.clone(), known.new.clone());
            record.write(&paths)
        };
        Tokens::new(name, known, Box::new(save))
    }

    pub(crate) fn unwritten() -> Self {
        Self {
            run: RunNo(0),
            launch: LaunchId::default(),
            machine_type: None,
            device_set: DeviceSet::default(),
            token: Token(String::new()),
            new_token: None,
            launched_at: Timestamp::UNIX_EPOCH,
            identity: None,
            tap: None,
            queues: None,
            has_disk_limit: false,
            overlay: None,
            memory: Bytes(0),
            hotplug: Bytes(0),
            mapping: Mapping::Own,
            ram_inode: 0,
            volumes: Vec::new(),
            volume_sizes: BTreeMap::new(),
            kernel_files: None,
            user: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn paths(dir: &tempfile::TempDir) -> VmPaths {
        VmPaths::new(dir.path(), dir.path(), &format!("t{:023}", 0).parse().expect("valid"))
    }

    #[test]
    fn a_new_token_is_recorded_and_without_a_record_no_directory_is_made() {
        let dir = tempfile::tempdir().expect("scratch");
        let paths = paths(&dir);
        let old = Token("old".to_owned());
        Record { token: old.clone(), ..Record::unwritten() }.write(&paths).expect("written");
        let tokens = || Record::read(&paths).expect("read").expect("there").tokens(&paths);
        let first = tokens();
        let new = first.begin("life").expect("recorded");
        assert_eq!(tokens().begin("life").expect("recorded"), new, "a later daemon sends the same");
        assert!(first.accept(&new, Some("life")));
        assert_eq!(tokens().current(), new);
        fs::remove_dir_all(paths.runtime()).expect("removed");
        assert!(first.begin("another life").is_err());
        assert!(!paths.runtime().exists());
    }

    #[test]
    fn records_of_earlier_releases_are_read() {
        let dir = tempfile::tempdir().expect("scratch");
        let paths = paths(&dir);
        fs::create_dir_all(paths.runtime()).expect("made");
        let first = r#"{"run":3,"token":"t","launched_at":"2026-01-01T00:00:00Z","identity":null,"tap":null,
            "overlay":null}"#;
        let latest = r#"{"run":4,"board":"microvm","token":"t","new_token":{"token":"n","incarnation":"i"},
            "launched_at":"2026-01-01T00:00:00Z",
            "identity":{"pid":7,"start_time":8,"boot_id":"b"},"tap":"st0","overlay":"tz4a98xxat96iws9zmbrgj3b",
            "memory":268435456,"mapping":"private","ram_inode":9,"volumes":[],"headers":"/h"}"#;
        for (text, run, machine_type) in [(first, 3, None), (latest, 4, Some("microvm"))] {
            fs::write(paths.record(), text).expect("written");
            let record = Record::read(&paths).expect("read").expect("there");
            assert_eq!((record.run, record.machine_type.as_deref()), (RunNo(run), machine_type), "{text}");
        }
        let record = Record::read(&paths).expect("read").expect("there");
        assert_eq!((record.mapped_inode(), record.kernel_files), (Some(9), Some("/h".into())));
    }
}
