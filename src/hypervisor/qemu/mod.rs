//! QEMU behind the port `Machines`.
//!
//! Guarantees: a VMM has a session of its own and outlives the daemon; it is found again by its
//! runtime directory, and meant by pid, start time and boot id; what `inspect` tells is the present truth, from the kernel, from QMP and from the guest.
//! Cancel/crash: `launch` writes its record before it spawns; a process that was spawned and not
//! recorded is found by its command line.

mod board;
mod command;
mod console;
mod control;
mod dirs;
#[cfg(feature = "fuzzing")]
pub(crate) mod fuzzing;
mod heartbeat;
#[cfg(test)]
mod hostile;
mod launching;
mod manifest;
mod mapped;
mod memory;
mod monitor;
#[cfg(test)]
mod monitor_tests;
mod notes;
mod own_pages;
mod packer;
mod packing;
mod places;
mod ram;
mod restoring;
mod saving;
mod snapshots;
mod spawning;
mod taps;
mod tokens;
mod turns;

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use jiff::Timestamp;
use stead_controllers::host::{
    AdoptPlan, GuestPhase, HostError, HostErrorKind, LaunchPlan, Machine, Machines, Memory, VmmState,
};
use stead_schemas::compression::Compression;
use stead_schemas::guest::{self, Request, Seed, ToGuest, Token};
use stead_schemas::names::{Digest, LinkName, Uid};
use stead_schemas::numbers::StandbyNo;
use stead_schemas::quantity::Bytes;
use tokio::task::JoinHandle;

pub use self::board::hypervisors;
use self::control::Control;
use self::dirs::{last_line, make_private_dir, remove_dir, remove_file, uids_in};
use self::manifest::FileMark;
use self::memory::MemoryDir;
use self::monitor::Monitor;
use self::packer::Packer;
use self::places::{Places, Record};
use self::ram::HeldRam;
use self::saving::on_thread;
use self::taps::{check_tap, has_tap};
use self::tokens::Tokens;
use self::turns::Turns;
use crate::agent::{AgentError, AgentStream};
use crate::host::boot_files::BootFiles;
use crate::host::cgroup::Cgroups;
use crate::host::files;
use crate::host::kernel::Kernel;
use crate::host::process::Identity;
use crate::host::watch_directories::DirectoryWatches;
use crate::hypervisor::{Accelerator, Changed, Noted};

/// What the driver has to know.
pub struct QemuConfig {
    pub binary: PathBuf,
    pub run_dir: PathBuf,
    pub data_dir: PathBuf,
    pub boot_files: BootFiles,
    pub accelerator: Accelerator,
    /// A console's log goes on in a new file from here.
    pub console_log_max: Bytes,
    /// Tells when a console's log was written to.
    pub watches: DirectoryWatches,
    pub cgroups: Cgroups,
    /// Where the root file system of a digest and the disk of an owner are.
    pub rootfs: Box<dyn Fn(&Digest) -> PathBuf + Send + Sync>,
    pub disk: Box<dyn Fn(&Uid) -> PathBuf + Send + Sync>,
    /// Of the disk, kept free by saves for the store and the logs.
    pub disk_reserve: Bytes,
    pub changed: Changed,
    /// Takes lines of a guest for its instance's log; at once.
    pub noted: Noted,
}

/// The driver; clones share their connections.
#[derive(Clone)]
pub struct Qemu {
    config: Arc<QemuConfig>,
    attached: Arc<Mutex<BTreeMap<Uid, Arc<Attached>>>>,
    turns: Arc<Turns>,
    packer: Packer,
    /// Of instances and snapshots: the saved RAM that this daemon has written or found to be right.
    proved: Arc<Mutex<BTreeMap<Uid, FileMark>>>,
}

impl std::fmt::Debug for QemuConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("QemuConfig").field("run_dir", &self.run_dir).finish_non_exhaustive()
    }
}

impl std::fmt::Debug for Qemu {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Qemu").field("run_dir", &self.config.run_dir).finish_non_exhaustive()
    }
}

/// Connections to one live VM.
struct Attached {
    identity: Identity,
    control: Control,
    since: Timestamp,
    monitor: tokio::sync::Mutex<Option<Monitor>>,
    held_ram: HeldRam,
    exit_watch: JoinHandle<()>,
    /// Keeps the console's log bounded; set right after this value is shared.
    console_watch: OnceLock<JoinHandle<()>>,
}

impl Drop for Attached {
    fn drop(&mut self) {
        self.exit_watch.abort();
        if let Some(watch) = self.console_watch.get() {
            watch.abort();
        }
    }
}

/// For a guest's pool, which holds as much.
const SEED_BYTES: usize = 32;
/// A guest answers within milliseconds; one that does not is found by its state, as Initializing.
const FIRST_WORD_WAIT: Duration = Duration::from_millis(500);

impl Qemu {
    /// Looks at nothing yet: machines of an earlier daemon are attached when they are inspected.
    #[must_use]
    pub fn new(config: QemuConfig) -> Self {
        let packer = Packer::new(config.changed.clone());
        Self {
            packer,
            config: Arc::new(config),
            attached: Arc::default(),
            turns: Arc::default(),
            proved: Arc::default(),
        }
    }

    #[must_use]
    pub fn accelerator(&self) -> Accelerator {
        self.config.accelerator
    }

    /// The console's log of an instance.
    #[must_use]
    pub fn console_log(data_dir: &Path, owner: &Uid) -> PathBuf {
        Places::new(Path::new(""), data_dir, owner).console_log()
    }

    /// Opens a stream to the agent in the VM of an instance.
    ///
    /// # Errors
    /// When no program runs there, or its guest is not reached now.
    pub async fn open_stream(&self, owner: &Uid, request: Request) -> Result<AgentStream, AgentError> {
        let attached = self.lock().get(owner).cloned().ok_or(AgentError::NotReady)?;
        attached.control.open(request).await
    }

    fn places(&self, owner: &Uid) -> Places {
        Places::new(&self.config.run_dir, &self.config.data_dir, owner)
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<Uid, Arc<Attached>>> {
        self.attached.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn proved(&self) -> MutexGuard<'_, BTreeMap<Uid, FileMark>> {
        self.proved.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn find_attached(&self, owner: &Uid) -> Result<Arc<Attached>, HostError> {
        let missing = || HostError::new(HostErrorKind::Missing, "reach the VM of", owner.as_str());
        self.lock().get(owner).cloned().ok_or_else(missing)
    }

    /// Connects to a live process, once; whether it was now.
    fn attach(
        &self,
        owner: &Uid,
        record: &Record,
        identity: &Identity,
    ) -> Result<(Arc<Attached>, bool), HostError> {
        let mut attached = self.lock();
        if let Some(old) = attached.get(owner).filter(|old| old.identity == *identity) {
            return Ok((old.clone(), false));
        }
        let places = self.places(owner);
        let changed = self.config.changed.clone();
        let pidfd =
            identity.open().map_err(|error| HostError::io("watch the VM of", owner.as_str(), error))?;
        let exit_watch = tokio::spawn({
            let (owner, changed) = (owner.clone(), changed.clone());
            async move {
                if let Some(pidfd) = pidfd {
                    pidfd.exited().await;
                }
                changed(&owner);
            }
        });
        let tokens = Tokens::new(places.clone(), record);
        let noted = self.config.noted.clone();
        let control = Control::start(places.control(), owner.clone(), tokens, changed, noted);
        let new = Arc::new(Attached {
            identity: identity.clone(),
            control,
            since: Timestamp::now(),
            monitor: tokio::sync::Mutex::new(None),
            held_ram: HeldRam::default(),
            exit_watch,
            console_watch: OnceLock::new(),
        });
        let (max, watches) = (self.config.console_log_max, self.config.watches.clone());
        let watch = tokio::spawn(console::keep_bounded(places, max, watches, Arc::downgrade(&new)));
        // Empty until here: this value was shared with nobody yet.
        let _ = new.console_watch.set(watch);
        attached.insert(owner.clone(), new.clone());
        Ok((new, true))
    }

    async fn vmm_state(&self, owner: &Uid, attached: &Attached) -> VmmState {
        let mut monitor = attached.monitor.lock().await;
        if monitor.as_ref().is_none_or(Monitor::is_spent) {
            // QEMU serves one connection at a time.
            *monitor = None;
            match Monitor::connect(&self.places(owner).monitor(), owner, &self.config.changed).await {
                Ok(connected) => *monitor = Some(connected),
                Err(error) => return VmmState::Unreachable(error),
            }
        }
        let Some(connected) = monitor.as_ref() else { return VmmState::Unreachable(String::new()) };
        match connected.state(|| files::free_bytes(&self.config.data_dir)).await {
            Ok(state) => state,
            Err(error) => {
                *monitor = None;
                VmmState::Unreachable(error)
            }
        }
    }

    fn memory_dir(&self, owner: &Uid) -> MemoryDir {
        MemoryDir::new(&self.config.data_dir, owner)
    }

    /// Runs a few commands on the monitor that `vmm_state` connected.
    async fn on_monitor<T>(
        &self,
        attached: &Attached,
        work: impl AsyncFnOnce(&Monitor) -> Result<T, String>,
    ) -> Result<T, String> {
        let monitor = attached.monitor.lock().await;
        work(monitor.as_ref().ok_or("no connection")?).await
    }
}

impl Machines for Qemu {
    async fn list(&self) -> Result<Vec<Uid>, HostError> {
        let mut owners = uids_in(&self.config.run_dir.join("vm"))?;
        owners.extend(uids_in(&self.config.data_dir.join("logs"))?);
        owners.extend(uids_in(&self.config.data_dir.join("memory"))?);
        owners.sort();
        owners.dedup();
        Ok(owners)
    }

    async fn inspect(&self, owner: &Uid) -> Result<Option<Machine>, HostError> {
        let places = self.places(owner);
        let Some(record) = Record::read(&places)? else {
            self.lock().remove(owner);
            return Ok(None);
        };
        let mut machine = Machine {
            owner: owner.clone(),
            run: record.run,
            hypervisor: record.board.hypervisor(),
            vmm: VmmState::Dead,
            pid: None,
            launch: record.launch,
            launched_at: record.launched_at,
            listening_since: record.launched_at,
            is_network_cut: false,
            has_headers: record.kernel_files.as_deref().is_some_and(Kernel::has_headers),
            guest: control::silent(),
        };
        if let Some(identity) = record.process(&places)? {
            let (attached, is_new) = self.attach(owner, &record, &identity)?;
            if is_new {
                self.enter_group(owner, &identity);
                // One that an earlier daemon left: what it is in, it says at once or boots still.
                attached.control.first_word(FIRST_WORD_WAIT).await;
            }
            machine.listening_since = attached.since;
            machine.pid = Some(identity.pid);
            machine.vmm = self.vmm_state(owner, &attached).await;
            machine.guest = attached.control.judged(machine.vmm == VmmState::Running);
            let has_network = record.tap.as_ref().map_or(Ok(true), |tap| has_tap(identity.pid, tap.as_str()));
            let failed = |error| HostError::io("look at the network of", owner.as_str(), error);
            machine.is_network_cut = !has_network.map_err(failed)?;
        } else if let Some(attached) = self.lock().get(owner) {
            // What the guest said last is still true of a VMM that just died.
            machine.guest = attached.control.view();
        }
        Ok(Some(machine))
    }

    async fn has_records(&self, owner: &Uid) -> Result<bool, HostError> {
        let logs = self.places(owner).logs;
        logs.try_exists().map_err(|error| HostError::io("look for", logs.display().to_string(), error))
    }

    async fn launch(&self, plan: &LaunchPlan) -> Result<(), HostError> {
        let _turn = self.turns.take(&plan.owner).await;
        self.launch_fresh(plan).await
    }

    async fn pause(&self, owner: &Uid) -> Result<(), HostError> {
        let _turn = self.turns.take(owner).await;
        let attached = self.find_attached(owner)?;
        let paused = self.on_monitor(&attached, async |monitor| monitor.pause().await).await;
        paused.map_err(|why| {
            HostError::new(HostErrorKind::Transient, "pause the VM of", owner.as_str()).because(why)
        })
    }

    async fn memory(&self, owner: &Uid) -> Result<Option<Memory>, HostError> {
        self.seen_memory(owner)
    }

    async fn compress_memory(&self, owner: &Uid, how: Compression) -> Result<(), HostError> {
        self.packer.begin(owner, self.memory_dir(owner), how)
    }

    async fn save(&self, owner: &Uid, standby: StandbyNo) -> Result<(), HostError> {
        let _turn = self.turns.take(owner).await;
        self.save_memory(owner, standby).await
    }

    async fn restore(&self, plan: &LaunchPlan) -> Result<(), HostError> {
        let _turn = self.turns.take(&plan.owner).await;
        self.packer.end(&plan.owner).await;
        self.launch_saved(plan).await
    }

    async fn discard_memory(&self, owner: &Uid) -> Result<(), HostError> {
        self.packer.end(owner).await;
        self.proved().remove(owner);
        let (memory, places) = (self.memory_dir(owner), self.places(owner));
        let discard = move || match Record::read(&places)? {
            Some(record) => memory.consume(record.mapped_inode()),
            None => memory.discard(),
        };
        on_thread(owner, discard).await
    }

    async fn adopt_memory(&self, plan: &AdoptPlan) -> Result<(), HostError> {
        self.adopt(plan).await
    }

    async fn assume(&self, owner: &Uid, assumed: &guest::Assumed) -> Result<(), HostError> {
        let attached = self.find_attached(owner)?;
        let failed = |why: String| {
            HostError::new(HostErrorKind::Transient, "name the guest of", owner.as_str()).because(why)
        };
        let seed = Seed(random::<SEED_BYTES>().map_err(|error| failed(error.to_string()))?.to_vec());
        // Known before it is told: this daemon may end in between, or the guest's answer be lost.
        let new_token = attached.control.tokens().begin(&assumed.incarnation)?;
        let token = attached.control.token();
        let request = ToGuest::Assume { token, new_token, seed, assumed: Box::new(assumed.clone()) };
        let told = Some(assumed.incarnation.clone());
        attached.control.ask(request, |view| view.identity_told = told).map_err(failed)
    }

    async fn configure(&self, owner: &Uid, config: &guest::Config) -> Result<(), HostError> {
        let attached = self.find_attached(owner)?;
        let token = attached.control.token();
        let failed = |error| HostError::io("configure the guest of", owner.as_str(), error);
        let seed = Seed(random::<SEED_BYTES>().map_err(failed)?.to_vec());
        let request = ToGuest::Configure { token, seed, config: Box::new(config.clone()) };
        // The channel would drop it again and again.
        if let Err(too_large) = guest::Frame::control(&request) {
            let error = HostError::new(HostErrorKind::Permanent, "configure the guest of", owner.as_str());
            return Err(error.because(format!("its command and environment are too long: {too_large}")));
        }
        let asked = attached.control.ask(request, |view| view.phase = view.phase.max(GuestPhase::Configured));
        asked.map_err(|why| {
            HostError::new(HostErrorKind::Transient, "configure the guest of", owner.as_str()).because(why)
        })
    }

    async fn shutdown(&self, owner: &Uid) -> Result<(), HostError> {
        let attached = self.find_attached(owner)?;
        let request = ToGuest::Shutdown { token: attached.control.token() };
        let asked = attached.control.ask(request, |view| view.is_shutdown_requested = true);
        asked.map_err(|why| {
            HostError::new(HostErrorKind::Transient, "shut down the guest of", owner.as_str()).because(why)
        })
    }

    async fn acknowledge_exit(&self, owner: &Uid) -> Result<(), HostError> {
        let attached = self.find_attached(owner)?;
        let request = ToGuest::AcknowledgeExit { token: attached.control.token() };
        let asked = attached.control.ask(request, |view| view.is_exit_acknowledged = true);
        asked.map_err(|why| {
            HostError::new(HostErrorKind::Transient, "answer the guest of", owner.as_str()).because(why)
        })
    }

    async fn reconnect(&self, owner: &Uid, tap: &LinkName) -> Result<(), HostError> {
        let attached = self.find_attached(owner)?;
        check_tap(tap)?;
        let failed = |why: String| {
            HostError::new(HostErrorKind::Transient, "reconnect the VM of", owner.as_str()).because(why)
        };
        self.on_monitor(&attached, async |monitor| monitor.plug(tap).await).await.map_err(failed)
    }

    async fn resume(&self, owner: &Uid) -> Result<(), HostError> {
        let _turn = self.turns.take(owner).await;
        let attached = self.find_attached(owner)?;
        let refused = |kind| HostError::new(kind, "resume the VM of", owner.as_str());
        if matches!(self.memory_dir(owner).seen()?, Some(Memory::Saved(_))) {
            return Err(refused(HostErrorKind::Conflict).because("its memory is saved"));
        }
        let resumed = self.on_monitor(&attached, async |monitor| monitor.resume().await).await;
        resumed.map_err(|why| refused(HostErrorKind::Transient).because(why))?;
        attached.control.forgive();
        // Its clock stood still. A channel that is full is reconnected to, with the time told again.
        let _ = attached.control.ask(control::clock(), |_| {});
        Ok(())
    }

    async fn kill(&self, owner: &Uid) -> Result<(), HostError> {
        let places = self.places(owner);
        let Some(record) = Record::read(&places)? else { return Ok(()) };
        match record.process(&places)? {
            Some(identity) => identity.kill().await,
            None => Ok(()),
        }
    }

    async fn release(&self, owner: &Uid) -> Result<(), HostError> {
        let places = self.places(owner);
        let record = Record::read(&places)?;
        if record.map_or(Ok(None), |record| record.process(&places))?.is_some() {
            return Err(HostError::new(HostErrorKind::Conflict, "release the living VM of", owner.as_str()));
        }
        self.lock().remove(owner);
        let (config, memory, of_thread) = (self.config.clone(), self.memory_dir(owner), owner.clone());
        let release = move || {
            let failed = |error| HostError::io("release the VM of", of_thread.as_str(), error);
            config.cgroups.remove(of_thread.as_str()).map_err(failed)?;
            memory.forget_running()?;
            remove_dir(places.runtime()).map_err(failed)
        };
        on_thread(owner, release).await
    }

    async fn discard_records(&self, owner: &Uid) -> Result<(), HostError> {
        let (logs, of_thread) = (self.places(owner).logs, owner.clone());
        let failed = move |error| HostError::io("discard the logs of", of_thread.as_str(), error);
        on_thread(owner, move || remove_dir(&logs).map_err(failed)).await
    }
}

fn new_token() -> io::Result<Token> {
    Ok(Token(hex::encode(random::<16>()?)))
}

fn random<const LENGTH: usize>() -> io::Result<[u8; LENGTH]> {
    let mut bytes = [0u8; LENGTH];
    io::Read::read_exact(&mut fs::File::open("/dev/urandom")?, &mut bytes)?;
    Ok(bytes)
}
