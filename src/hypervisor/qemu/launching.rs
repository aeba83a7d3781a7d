//! Starting a VMM: fresh, or from a saved memory; and saving one.

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use stead_controllers::host::{HostError, HostErrorKind, LaunchPlan, Machines, VmmState};
use stead_schemas::names::Uid;
use stead_schemas::quantity::Bytes;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};

use super::memory::{FileMark, Origin, fresh_ram, ram_of};
use super::places::{Places, Record};
use super::{
    Attached, Identity, Qemu, check_tap, command, control, last_line, make_private_dir, new_token, spawning,
};

/// Until QEMU answers on its monitor: 30 ms, a second under load.
const START_DEADLINE: Duration = Duration::from_secs(30);
const START_POLL: Duration = Duration::from_millis(2);
/// For the device state to pass, in either direction: 10 ms, a second under load.
const STATE_DEADLINE: Duration = Duration::from_secs(30);
/// Device state without RAM is 330 KiB.
const STATE_BYTES_MAX: u64 = 64 << 20;

/// What is in the VMM's memory when it starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Content {
    Fresh,
    Saved,
}

impl Qemu {
    pub(super) async fn launch_fresh(&self, plan: &LaunchPlan) -> Result<(), HostError> {
        let failed = |error| HostError::io("prepare a VM for", plan.owner.as_str(), error);
        let record = Record {
            run: plan.run,
            token: new_token().map_err(failed)?,
            launched_at: Timestamp::now(),
            identity: None,
            tap: plan.network.as_ref().map(|card| card.tap.clone()),
            overlay: Some(plan.overlay.clone()),
        };
        let ram = fresh_ram(memory_size(plan)).map_err(failed)?;
        self.start(plan, record, &ram, Content::Fresh).await.map(drop)
    }

    /// Leaves the VM paused, or nothing of it; what it came from stays saved.
    pub(super) async fn launch_saved(&self, plan: &LaunchPlan) -> Result<(), HostError> {
        self.check_nothing_there(&plan.owner)?;
        let restored = self.load_memory(plan).await;
        if restored.is_err() {
            // Clearing away in passes of its own would count as progress, and hearing of this end as
            // news: a restore that always fails would be tried again at once for ever.
            self.lock().remove(&plan.owner);
            self.kill(&plan.owner).await?;
            self.release(&plan.owner).await?;
        }
        restored
    }

    async fn load_memory(&self, plan: &LaunchPlan) -> Result<(), HostError> {
        let refused = |why: String| {
            HostError::new(HostErrorKind::Permanent, "restore the VM of", plan.owner.as_str()).because(why)
        };
        let memory = self.memory_dir(&plan.owner);
        let manifest = memory.manifest()?.ok_or_else(|| refused("no memory is saved".to_owned()))?;
        let origin = manifest.origin.clone();
        let overlay = FileMark::of(&(self.config.disk)(&plan.overlay))
            .map_err(|error| HostError::io("look at the disk of", plan.owner.as_str(), error))?;
        if overlay != origin.overlay {
            return Err(refused("its disk was written to after its memory was saved".to_owned()));
        }
        let loaded = tokio::task::spawn_blocking(move || memory.load(&manifest)).await;
        let (ram, state) = loaded.map_err(|error| refused(error.to_string()))??;
        let record = Record {
            run: origin.run,
            token: origin.token,
            launched_at: origin.launched_at,
            identity: None,
            tap: plan.network.as_ref().map(|card| card.tap.clone()),
            overlay: Some(plan.overlay.clone()),
        };
        let attached = self.start(plan, record, &ram, Content::Saved).await?;
        let failed = |why: String| {
            let why = format!("{why}: {}", last_line(&self.places(&plan.owner).vmm_log()));
            HostError::new(HostErrorKind::Transient, "restore the VM of", plan.owner.as_str()).because(why)
        };
        let version =
            self.on_monitor(&attached, async |monitor| monitor.version().await).await.map_err(failed)?;
        if version != origin.version {
            let why = format!("its memory was saved by QEMU {}, this is {version}", origin.version);
            return Err(refused(why));
        }
        let socket = self.places(&plan.owner).migration();
        let loaded = async {
            self.on_monitor(&attached, async |monitor| monitor.begin_load(&socket).await).await?;
            let mut stream = UnixStream::connect(&socket).await.map_err(|error| error.to_string())?;
            stream.write_all(&state).await.map_err(|error| error.to_string())?;
            stream.shutdown().await.map_err(|error| error.to_string())?;
            self.on_monitor(&attached, async |monitor| monitor.migrated().await).await
        };
        tokio::time::timeout(STATE_DEADLINE, loaded).await.unwrap_or_else(|_| Err(late())).map_err(failed)
    }

    fn check_nothing_there(&self, owner: &Uid) -> Result<(), HostError> {
        match Record::read(&self.places(owner))? {
            None => Ok(()),
            Some(_) => Err(HostError::new(HostErrorKind::Conflict, "launch over the VM of", owner.as_str())),
        }
    }

    /// Spawns the VMM and waits until it answers.
    async fn start(
        &self,
        plan: &LaunchPlan,
        mut record: Record,
        ram: &File,
        content: Content,
    ) -> Result<Arc<Attached>, HostError> {
        let places = self.places(&plan.owner);
        let failed = |error| HostError::io("prepare a VM for", plan.owner.as_str(), error);
        self.check_nothing_there(&plan.owner)?;
        if let Some(card) = &plan.network {
            check_tap(&card.tap)?;
        }
        for dir in [places.runtime(), &places.logs] {
            make_private_dir(dir).map_err(failed)?;
        }
        record.write(&places)?;
        let mut child = self.spawn(plan, &places, ram, content)?;
        let identity = child.id().and_then(Identity::of);
        let Some(identity) = identity else {
            let died = HostError::new(HostErrorKind::Transient, "start a VMM for", plan.owner.as_str());
            return Err(died.because(last_line(&places.vmm_log())));
        };
        record.identity = Some(identity.clone());
        record.write(&places)?;
        // The group is a mark and accounting: a host that refuses it still runs the VM.
        if let Err(error) = self.config.cgroups.enter(plan.owner.as_str(), identity.pid) {
            tracing::warn!(owner = %plan.owner, %error, "the VMM is in no control group of its own");
        }
        let (attached, _) = self.attach(&plan.owner, &record, &identity)?;
        // The child is then left alone; the runtime reaps it when it ends while this daemon lives.
        self.await_start(&plan.owner, &mut child, &attached).await?;
        Ok(attached)
    }

    /// Starts the process, in a session of its own.
    fn spawn(
        &self,
        plan: &LaunchPlan,
        places: &Places,
        ram: &File,
        content: Content,
    ) -> Result<tokio::process::Child, HostError> {
        let config = &self.config;
        let (kernel, initrd) = config.boot_files.get()?;
        let ingredients = command::Ingredients {
            kernel: &kernel,
            initrd: &initrd,
            rootfs: &(config.rootfs)(&plan.rootfs),
            overlay: &(config.disk)(&plan.overlay),
            ram: ram.as_raw_fd(),
            accelerator: config.accelerator,
            content,
        };
        let failed = |error| HostError::io("start a VMM for", plan.owner.as_str(), error);
        let log = File::options().create(true).append(true).open(places.vmm_log()).map_err(failed)?;
        let mut command = tokio::process::Command::new(&config.binary);
        command.args(command::arguments(plan, places, &ingredients)).current_dir("/").kill_on_drop(false);
        command.stdin(Stdio::null()).stdout(log.try_clone().map_err(failed)?).stderr(log);
        let overlay = fs::metadata((config.disk)(&plan.overlay)).map_err(failed)?.len();
        // RAM is not among what this bounds: its file has its length, and is written to by pages.
        let file_size_max = spawning::file_size_max(overlay, config.console_log_max);
        spawning::prepare(&mut command, file_size_max, ram.as_raw_fd());
        command.spawn().map_err(failed)
    }

    /// Waits until the VMM answers on its monitor, or has ended.
    async fn await_start(
        &self,
        owner: &Uid,
        child: &mut tokio::process::Child,
        attached: &Attached,
    ) -> Result<(), HostError> {
        let failed = |why: String| {
            HostError::new(HostErrorKind::Transient, "start a VMM for", owner.as_str()).because(why)
        };
        let socket = self.places(owner).monitor();
        let answers = async {
            // The socket appears within milliseconds; there is no event to wait for.
            while !socket.exists() {
                tokio::time::sleep(START_POLL).await;
            }
            self.vmm_state(owner, attached).await
        };
        tokio::select! {
            biased;
            status = child.wait() => {
                let status = status.map_or_else(|error| error.to_string(), |status| status.to_string());
                Err(failed(format!("{status}: {}", last_line(&self.places(owner).vmm_log()))))
            }
            state = tokio::time::timeout(START_DEADLINE, answers) => match state {
                Ok(VmmState::Unreachable(why)) => Err(failed(why)),
                Ok(_) => Ok(()),
                Err(_) => Err(failed(format!("no answer within {} s", START_DEADLINE.as_secs()))),
            },
        }
    }

    /// Saves the memory of a paused VM, or resumes it.
    pub(super) async fn save_memory(&self, owner: &Uid, generation: u64) -> Result<(), HostError> {
        let attached = self.find_attached(owner)?;
        let saved = self.write_memory(owner, generation, &attached).await;
        if saved.is_err() {
            // A memory that is saved and a VM that runs must never meet.
            self.memory_dir(owner).discard()?;
            let resumed = self.on_monitor(&attached, async |monitor| {
                monitor.cancel().await;
                monitor.resume().await
            });
            if let Err(error) = resumed.await {
                tracing::warn!(%owner, error, "a VM whose memory could not be saved is still paused");
            }
            let _ = attached.control.ask(control::clock(), |_| {});
        }
        saved
    }

    async fn write_memory(&self, owner: &Uid, generation: u64, attached: &Attached) -> Result<(), HostError> {
        let failed = |why: String| {
            HostError::new(HostErrorKind::Transient, "save the VM of", owner.as_str()).because(why)
        };
        let io = |error| HostError::io("save the VM of", owner.as_str(), error);
        let (memory, places) = (self.memory_dir(owner), self.places(owner));
        let record = Record::read(&places)?.ok_or_else(|| failed("it is gone".to_owned()))?;
        if self.vmm_state(owner, attached).await != VmmState::Paused {
            return Err(failed("it is not paused".to_owned()));
        }
        memory.begin()?;
        let socket = places.migration();
        super::remove_file(&socket).map_err(io)?;
        let listener = UnixListener::bind(&socket).map_err(io)?;
        let written = async {
            self.on_monitor(attached, async |monitor| monitor.begin_save(&socket).await).await?;
            let (stream, _) = listener.accept().await.map_err(|error| error.to_string())?;
            let mut file =
                tokio::fs::File::create(memory.saving_state()).await.map_err(|error| error.to_string())?;
            let mut stream = stream.take(STATE_BYTES_MAX + 1);
            let count = tokio::io::copy(&mut stream, &mut file).await.map_err(|error| error.to_string())?;
            file.flush().await.map_err(|error| error.to_string())?;
            if count > STATE_BYTES_MAX {
                return Err(format!("the device state is larger than {STATE_BYTES_MAX} bytes"));
            }
            self.on_monitor(attached, async |monitor| monitor.migrated().await).await?;
            self.on_monitor(attached, async |monitor| monitor.version().await).await
        };
        let version = tokio::time::timeout(STATE_DEADLINE, written).await;
        let version = version.unwrap_or_else(|_| Err(late())).map_err(failed)?;
        super::remove_file(&socket).map_err(io)?;
        let (kernel, initrd) = self.config.boot_files.get()?;
        let overlay =
            record.overlay.as_ref().ok_or_else(|| failed("its record is older than saving".to_owned()))?;
        let overlay = FileMark::of(&(self.config.disk)(overlay)).map_err(io)?;
        let origin = Origin {
            generation,
            run: record.run,
            launched_at: record.launched_at,
            saved_at: Timestamp::now(),
            token: record.token,
            backend: "qemu".to_owned(),
            version,
            machine: command::MACHINE.to_owned(),
            kernel: kernel.vmlinux.clone(),
            initrd: initrd.clone(),
            overlay,
        };
        let ram = ram_of(attached.identity.pid).map_err(io)?;
        let published = tokio::task::spawn_blocking(move || memory.publish(&ram, origin)).await;
        published.map_err(|error| failed(error.to_string()))?
    }
}

/// As QEMU is told: whole megabytes.
fn memory_size(plan: &LaunchPlan) -> Bytes {
    Bytes(plan.memory.mib_ceil() << 20)
}

fn late() -> String {
    format!("not done within {} s", STATE_DEADLINE.as_secs())
}
