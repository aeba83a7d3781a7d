//! Starting a VMM: fresh, or from a saved memory; and saving one.

use std::fs;
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use stead_controllers::host::{HostError, HostErrorKind, LaunchPlan, SavedMemory, VmmState};
use stead_schemas::names::Uid;
use stead_schemas::quantity::Bytes;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};

use super::memory::{FileMark, Manifest};
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

/// Where the VMM's memory begins: empty, or saved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum From {
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
        self.start(plan, record, From::Fresh).await.map(drop)
    }

    /// Leaves the VM paused; what it came from stays saved.
    pub(super) async fn launch_saved(&self, plan: &LaunchPlan) -> Result<(), HostError> {
        let refused = |why: String| {
            HostError::new(HostErrorKind::Permanent, "restore the VM of", plan.owner.as_str()).because(why)
        };
        let memory = self.memory_dir(&plan.owner);
        let manifest = memory.manifest()?.ok_or_else(|| refused("no memory is saved".to_owned()))?;
        let overlay = FileMark::of(&(self.config.disk)(&plan.overlay))
            .map_err(|error| HostError::io("look at the disk of", plan.owner.as_str(), error))?;
        if overlay != manifest.overlay {
            return Err(refused("its disk was written to after its memory was saved".to_owned()));
        }
        let (verified, of_verified) = (memory.clone(), manifest.clone());
        let verified = tokio::task::spawn_blocking(move || verified.verify(&of_verified)).await;
        verified.map_err(|error| refused(error.to_string()))??;
        let record = Record {
            run: manifest.run,
            token: manifest.token.clone(),
            launched_at: manifest.launched_at,
            identity: None,
            tap: plan.network.as_ref().map(|card| card.tap.clone()),
            overlay: Some(plan.overlay.clone()),
        };
        let attached = self.start(plan, record, From::Saved).await?;
        let failed = |why: String| {
            let why = format!("{why}: {}", last_line(&self.places(&plan.owner).vmm_log()));
            HostError::new(HostErrorKind::Transient, "restore the VM of", plan.owner.as_str()).because(why)
        };
        let version =
            self.on_monitor(&attached, async |monitor| monitor.version().await).await.map_err(failed)?;
        if version != manifest.version {
            let why = format!("its memory was saved by QEMU {}, this is {version}", manifest.version);
            return Err(refused(why));
        }
        let state = tokio::fs::read(memory.saved_state()).await.map_err(|error| failed(error.to_string()))?;
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

    /// Spawns the VMM and waits until it answers.
    async fn start(
        &self,
        plan: &LaunchPlan,
        mut record: Record,
        from: From,
    ) -> Result<Arc<Attached>, HostError> {
        let places = self.places(&plan.owner);
        let failed = |error| HostError::io("prepare a VM for", plan.owner.as_str(), error);
        if Record::read(&places)?.is_some() {
            let there = HostError::new(HostErrorKind::Conflict, "launch over the VM of", plan.owner.as_str());
            return Err(there);
        }
        if let Some(card) = &plan.network {
            check_tap(&card.tap)?;
        }
        for dir in [places.runtime(), &places.logs] {
            make_private_dir(dir).map_err(failed)?;
        }
        record.write(&places)?;
        if from == From::Fresh {
            self.memory_dir(&plan.owner).create(memory_size(plan))?;
        }
        let mut child = self.spawn(plan, &places, from)?;
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
        from: From,
    ) -> Result<tokio::process::Child, HostError> {
        let config = &self.config;
        let (kernel, initrd) = config.boot_files.get()?;
        let ingredients = command::Ingredients {
            kernel: &kernel,
            initrd: &initrd,
            rootfs: &(config.rootfs)(&plan.rootfs),
            overlay: &(config.disk)(&plan.overlay),
            ram: &self.memory_dir(&plan.owner).ram(),
            accelerator: config.accelerator,
            from,
        };
        let failed = |error| HostError::io("start a VMM for", plan.owner.as_str(), error);
        let log = fs::File::options().create(true).append(true).open(places.vmm_log()).map_err(failed)?;
        let mut command = tokio::process::Command::new(&config.binary);
        command.args(command::arguments(plan, places, &ingredients)).current_dir("/").kill_on_drop(false);
        command.stdin(Stdio::null()).stdout(log.try_clone().map_err(failed)?).stderr(log);
        let overlay = fs::metadata((config.disk)(&plan.overlay)).map_err(failed)?.len();
        // RAM is not among what this bounds: its file has its length, and is written to by pages.
        spawning::prepare(&mut command, spawning::file_size_max(overlay, config.console_log_max));
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
            self.memory_dir(owner).unpublish()?;
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
        let saved = SavedMemory { generation, run: record.run, launched_at: record.launched_at };
        let manifest = Manifest::new(
            saved,
            record.token.clone(),
            version,
            command::MACHINE,
            kernel.vmlinux.clone(),
            initrd.clone(),
            overlay,
        );
        let published = tokio::task::spawn_blocking(move || memory.publish(manifest)).await;
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
