//! Where things of one VM are, and the record that finds its process again.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use stead_controllers::host::{HostError, VolumeDisk};
use stead_schemas::guest::Token;
use stead_schemas::names::{LinkName, Uid};
use stead_schemas::numbers::{LaunchId, RunNo};
use stead_schemas::quantity::Bytes;

use super::board::Board;
use super::command;
use super::tokens::NewToken;
use crate::host::files;
use crate::host::process::{self, Identity};

/// Directories of one VM.
#[derive(Debug, Clone)]
pub(super) struct Places {
    /// On tmpfs by default: a reboot empties it. 0700, and so are the sockets in it.
    runtime: PathBuf,
    /// Outlives the VM; goes with the instance.
    pub(super) logs: PathBuf,
}

impl Places {
    pub(super) fn new(run_dir: &Path, data_dir: &Path, owner: &Uid) -> Self {
        Self {
            runtime: run_dir.join("vm").join(owner.as_str()),
            logs: data_dir.join("logs").join(owner.as_str()),
        }
    }
    pub(super) fn runtime(&self) -> &Path {
        &self.runtime
    }
    pub(super) fn record(&self) -> PathBuf {
        self.runtime.join("machine.json")
    }
    pub(super) fn monitor(&self) -> PathBuf {
        self.runtime.join("qmp.sock")
    }
    pub(super) fn control(&self) -> PathBuf {
        self.runtime.join("control.sock")
    }
    /// Through which the device state passes to a VMM.
    pub(super) fn migration(&self) -> PathBuf {
        self.runtime.join("state.sock")
    }
    pub(super) fn console_log(&self) -> PathBuf {
        self.logs.join("app.log")
    }
    /// What the console's log was before it reached its limit.
    pub(super) fn older_console_log(&self) -> PathBuf {
        self.logs.join("app.log.1")
    }
    pub(super) fn vmm_log(&self) -> PathBuf {
        self.logs.join("vmm.log")
    }
}

/// Written before the process is spawned, and again when its identity is known.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Record {
    pub(super) run: RunNo,
    /// Absent in the records of daemons that knew a launch by its time: see `number_launch`.
    #[serde(default)]
    pub(super) launch: LaunchId,
    #[serde(default)]
    pub(super) board: Board,
    pub(super) token: Token,
    /// Until the guest that was told of it has said it.
    #[serde(default)]
    pub(super) new_token: Option<NewToken>,
    pub(super) launched_at: Timestamp,
    pub(super) identity: Option<Identity>,
    pub(super) tap: Option<LinkName>,
    /// Whose disk it writes to.
    pub(super) overlay: Option<Uid>,
    #[serde(default)]
    pub(super) memory: Bytes,
    #[serde(default)]
    pub(super) mapping: Mapping,
    /// Of the file that is mapped.
    #[serde(default)]
    pub(super) ram_inode: u64,
    #[serde(default)]
    pub(super) volumes: Vec<VolumeDisk>,
    /// The disk with modules and headers of its kernel, if it was given one.
    #[serde(default, alias = "headers")]
    pub(super) kernel_files: Option<PathBuf>,
}

/// How a VMM has its RAM.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Mapping {
    /// An anonymous file of its own, which a save reads.
    #[default]
    Own,
    /// What was saved, privately: what was written since is in pages of the VMM's own.
    Private,
}

/// The number of a launch, or of one that was recorded by its time alone.
pub(super) fn number_launch(launch: LaunchId, launched_at: Timestamp) -> LaunchId {
    if launch == LaunchId::default() { launched_at.into() } else { launch }
}

impl Record {
    pub(super) fn write(&self, places: &Places) -> Result<(), HostError> {
        let bytes = serde_json::to_vec(self).unwrap_or_default();
        // The process that it is about ends with the host.
        files::write_passing(&places.record(), &bytes, 0o600)
    }

    /// `None` when there is no runtime directory. A directory whose record a crash kept from being
    /// written stands for a machine that never was: run 0, no process.
    pub(super) fn read(places: &Places) -> Result<Option<Self>, HostError> {
        let path = places.record();
        match fs::read(&path) {
            Ok(bytes) => {
                let mut record = serde_json::from_slice(&bytes).unwrap_or_else(|_| Self::never_was());
                record.launch = number_launch(record.launch, record.launched_at);
                Ok(Some(record))
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let is_there = places.runtime.try_exists();
                let is_there =
                    is_there.map_err(|error| HostError::io("read", path.display().to_string(), error));
                Ok(is_there?.then(Self::never_was))
            }
            Err(error) => Err(HostError::io("read", path.display().to_string(), error)),
        }
    }

    /// Of the file that it maps privately.
    pub(super) fn mapped_inode(&self) -> Option<u64> {
        (self.mapping == Mapping::Private).then_some(self.ram_inode)
    }

    pub(super) fn never_was() -> Self {
        Self {
            run: RunNo(0),
            launch: LaunchId::default(),
            board: Board::default(),
            token: Token(String::new()),
            new_token: None,
            launched_at: Timestamp::UNIX_EPOCH,
            identity: None,
            tap: None,
            overlay: None,
            memory: Bytes(0),
            mapping: Mapping::Own,
            ram_inode: 0,
            volumes: Vec::new(),
            kernel_files: None,
        }
    }

    /// The live process of this machine. One that a crash kept from being recorded is found by its
    /// command line.
    pub(super) fn process(&self, places: &Places) -> Result<Option<Identity>, HostError> {
        let found = match &self.identity {
            Some(identity) => identity.is_alive().map(|is_alive| is_alive.then(|| identity.clone())),
            None => {
                let mark = command::mark(places);
                process::find_by_argument(|argument| argument == mark)
            }
        };
        found.map_err(|error| {
            HostError::io("look for the VMM of", places.runtime.display().to_string(), error)
        })
    }
}
