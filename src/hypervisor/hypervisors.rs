//! The VMs of this host and the connections to those that live.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use jiff::Timestamp;
use stead_controllers::host::{HostError, HostErrorKind, VmmState};
use stead_schemas::capabilities::VmmCapabilities;
use stead_schemas::guest::Request;
use stead_schemas::instance::Hypervisor;
use stead_schemas::names::{Digest, Uid};
use stead_schemas::numbers::RunNo;
use stead_schemas::quantity::Bytes;

use super::WantedAccelerator;
use super::attached::{Attached, Connection};
use super::console;
use super::dispatch::{Choice, Drivers};
use super::driver::{Notify, RunState};
use super::jail::Jails;
use super::process;
use super::record::{Record, VmPaths};
use crate::guest_channel::{AgentError, AgentStream, Changed, GuestChannel, Noted};
use crate::host::boot_files::BootFiles;
use crate::host::cgroup::Cgroups;
use crate::host::files;
use crate::host::process::Identity;
use crate::host::watch_directories::DirectoryWatches;
use crate::locks::Locks;
use crate::memory::{Compressor, FileMark, HeldRam, MemoryDir};

/// The configuration that all VMs of this host share.
pub struct HypervisorsConfig {
    pub drivers: Drivers,
    pub run_dir: PathBuf,
    pub data_dir: PathBuf,
    pub boot_files: BootFiles,
    /// Length at which a console's log is continued in a new file.
    pub console_log_max: Bytes,
    /// Notifies of writes to a console's log.
    pub watches: DirectoryWatches,
    pub cgroups: Cgroups,
    /// The walls around VMMs.
    pub jails: Jails,
    /// The accelerator without which no VM is started.
    pub accelerator: WantedAccelerator,
    /// Returns the path of the root file system of a digest.
    pub rootfs: Box<dyn Fn(&Digest) -> PathBuf + Send + Sync>,
    /// Returns the path of the disk of an owner.
    pub disk: Box<dyn Fn(&Uid) -> PathBuf + Send + Sync>,
    /// Free space that saves leave on the file system for the store and the logs, in bytes.
    pub disk_reserve: Bytes,
    pub changed: Changed,
    /// Receives lines of a guest for its instance's log; must not block.
    pub noted: Noted,
}

/// The VMs of this host; clones share their connections.
#[derive(Clone)]
pub struct Hypervisors {
    pub(crate) config: Arc<HypervisorsConfig>,
    attached: Arc<Mutex<BTreeMap<Uid, Arc<Attached>>>>,
    pub(crate) locks: Arc<Locks>,
    pub(crate) compressor: Compressor,
    /// The saved RAM files that this daemon has written or verified, by instance or snapshot.
    verified: Arc<Mutex<BTreeMap<Uid, FileMark>>>,
}

impl std::fmt::Debug for HypervisorsConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HypervisorsConfig").field("run_dir", &self.run_dir).finish_non_exhaustive()
    }
}

impl std::fmt::Debug for Hypervisors {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Hypervisors").field("run_dir", &self.config.run_dir).finish_non_exhaustive()
    }
}

impl Hypervisors {
    /// Creates the value without observing anything: VMs of an earlier daemon are attached when they are inspected.
    #[must_use]
    pub fn new(config: HypervisorsConfig) -> Self {
        let compressor = Compressor::new(config.changed.clone());
        Self {
            compressor,
            config: Arc::new(config),
            attached: Arc::default(),
            locks: Arc::default(),
            verified: Arc::default(),
        }
    }

    /// Lists all hypervisors that have a driver, whether their programs are installed or not.
    #[must_use]
    pub fn hypervisors(&self) -> Vec<Hypervisor> {
        self.config.drivers.hypervisors()
    }

    /// Returns the path of the console's log of an instance.
    #[must_use]
    pub fn console_log(data_dir: &Path, owner: &Uid) -> PathBuf {
        VmPaths::new(Path::new(""), data_dir, owner).console_log()
    }

    /// Opens a stream to the agent in the VM of an instance.
    ///
    /// # Errors
    /// When no program runs there, or its guest cannot be reached now.
    pub async fn open_stream(&self, owner: &Uid, request: Request) -> Result<AgentStream, AgentError> {
        let attached = self.lock().get(owner).cloned().ok_or(AgentError::NotReady)?;
        attached.channel.open(request).await
    }

    pub(crate) fn paths(&self, owner: &Uid) -> VmPaths {
        VmPaths::new(&self.config.run_dir, &self.config.data_dir, owner)
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, BTreeMap<Uid, Arc<Attached>>> {
        self.attached.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn verified(&self) -> MutexGuard<'_, BTreeMap<Uid, FileMark>> {
        self.verified.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes that this daemon has written the saved RAM as it is, or read it as a whole.
    pub(crate) fn set_verified(&self, owner: &Uid, memory: &MemoryDir) {
        if let Some(mark) = memory.ram_mark() {
            self.verified().insert(owner.clone(), mark);
        }
    }

    pub(crate) fn is_verified(&self, owner: &Uid, memory: &MemoryDir) -> bool {
        memory.ram_mark().is_some_and(|mark| self.verified().get(owner) == Some(&mark))
    }

    pub(crate) fn forget_verified(&self, owner: &Uid) {
        self.verified().remove(owner);
    }

    pub(crate) fn find_attached(&self, owner: &Uid) -> Result<Arc<Attached>, HostError> {
        let missing = || HostError::new(HostErrorKind::Missing, "reach the VM of", owner.as_str());
        self.lock().get(owner).cloned().ok_or_else(missing)
    }

    /// Returns the run of the recorded VM, dead or alive.
    pub(crate) fn recorded_run(&self, owner: &Uid) -> Result<Option<RunNo>, HostError> {
        Ok(Record::read(&self.paths(owner))?.map(|record| record.run))
    }

    /// Finds the live process of a record.
    pub(super) fn find_process(
        &self,
        record: &Record,
        paths: &VmPaths,
    ) -> Result<Option<Identity>, HostError> {
        process::find(record, paths, || self.config.drivers.marks(paths))
    }

    /// Connects to a live process, once. Returns whether it was connected now.
    pub(super) fn attach(
        &self,
        owner: &Uid,
        choice: &Choice,
        record: &Record,
        identity: &Identity,
    ) -> Result<(Arc<Attached>, bool), HostError> {
        let mut attached = self.lock();
        if let Some(old) = attached.get(owner).filter(|old| old.identity == *identity) {
            return Ok((old.clone(), false));
        }
        let paths = self.paths(owner);
        let changed = self.config.changed.clone();
        let exit_watch = process::watch_exit(owner, identity, &changed)
            .map_err(|error| HostError::io("watch the VM of", owner.as_str(), error))?;
        let transport = choice.driver.transport(&paths);
        let noted = self.config.noted.clone();
        let channel = GuestChannel::start(transport, owner.clone(), record.tokens(&paths), changed, noted);
        let new = Arc::new(Attached {
            identity: identity.clone(),
            choice: choice.clone(),
            channel,
            since: Timestamp::now(),
            session: tokio::sync::Mutex::new(None),
            held_ram: HeldRam::default(),
            exit_watch,
            console_watch: OnceLock::new(),
        });
        let (max, watches) = (self.config.console_log_max, self.config.watches.clone());
        let watch = tokio::spawn(console::keep_bounded(paths, max, watches, Arc::downgrade(&new)));
        // Empty until here: the value is not shared yet.
        let _ = new.console_watch.set(watch);
        attached.insert(owner.clone(), new.clone());
        Ok((new, true))
    }

    pub(crate) async fn vmm_state(&self, owner: &Uid, attached: &Attached) -> VmmState {
        let mut session = attached.session.lock().await;
        if session.as_ref().is_none_or(|session| session.is_spent()) {
            // A VMM may serve one connection at a time.
            *session = None;
            let (paths, owner, changed) = (self.paths(owner), owner.clone(), self.config.changed.clone());
            let events: Notify = Arc::new(move || changed(&owner));
            match attached.choice.driver.connect(&paths, &events).await {
                Ok(connected) => *session = Some(Connection(connected)),
                Err(error) => return VmmState::Unreachable(error),
            }
        }
        let Some(connected) = session.as_ref() else { return VmmState::Unreachable(String::new()) };
        match connected.state().await {
            Ok(RunState::Created) => VmmState::Created,
            Ok(RunState::Running) => VmmState::Running,
            Ok(RunState::Paused) => VmmState::Paused,
            Ok(RunState::NoSpace) => VmmState::Stalled(files::free_bytes(&self.config.data_dir)),
            Ok(RunState::Shutdown) => VmmState::Shutdown,
            Err(error) => {
                *session = None;
                VmmState::Unreachable(error)
            }
        }
    }

    pub(crate) fn memory_dir(&self, owner: &Uid) -> MemoryDir {
        MemoryDir::new(&self.config.data_dir, owner)
    }

    /// Runs a few commands on the session that `vmm_state` connected.
    pub(crate) async fn on_session<T>(
        &self,
        attached: &Attached,
        work: impl AsyncFnOnce(&Connection) -> Result<T, String>,
    ) -> Result<T, String> {
        let session = attached.session.lock().await;
        work(session.as_ref().ok_or("no connection")?).await
    }

    /// Refuses a verb that the driver of a VM does not declare.
    pub(crate) fn require(
        owner: &Uid,
        choice: &Choice,
        has: impl FnOnce(&VmmCapabilities) -> bool,
        operation: &'static str,
    ) -> Result<(), HostError> {
        if has(&choice.machine_type.capabilities) {
            return Ok(());
        }
        let refused = HostError::new(HostErrorKind::Unsupported, operation, owner.as_str());
        let hypervisor = choice.machine_type.hypervisor.as_str();
        Err(refused.because(format!("{hypervisor} cannot do that")))
    }
}
