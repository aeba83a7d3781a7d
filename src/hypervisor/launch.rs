//! Starting a VMM.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use stead_controllers::host::{HostError, HostErrorKind, LaunchPlan, VmmState, VolumeDisk};
use stead_schemas::names::Uid;
use stead_schemas::numbers::DeviceSet;
use stead_schemas::quantity::Bytes;

use super::attached::Attached;
use super::dispatch::Choice;
use super::driver::{Content, Ram, RamAccess, Start, VmmCommand, VolumeFile};
use super::hypervisors::Hypervisors;
use super::jail::Spawned;
use super::process::{self, SpawnPlan, end_line, file_size_max, first_answer, largest_file};
use super::record::{GuestOrigin, Mapping, Record, VmPaths};
use super::save::on_thread;
use super::taps::check_tap;
use crate::guest_channel::new_token;
use crate::host::directories::{last_line, make_private_dir};
use crate::host::kernel::Kernel;
use crate::host::process::Identity;
use crate::host::tap::has_vhost_net;
use crate::memory::{EARLIER_QUEUES, fresh_ram};

/// Time limit for a VMM's first answer. It takes 30 ms, or a second under load.
const START_DEADLINE: Duration = Duration::from_secs(30);

/// The RAM file of a VM, and how the VMM maps it.
#[derive(Debug)]
pub(super) struct HostRam {
    pub(super) file: File,
    pub(super) mapping: Mapping,
}

/// Paths of what a VM is started from. A driver gets them as a [`Start`].
pub(super) struct StartFiles {
    kernel: Kernel,
    initrd: PathBuf,
    device_set: DeviceSet,
    rootfs: PathBuf,
    overlay: PathBuf,
    volumes: Vec<VolumeFile>,
    kernel_files: Option<PathBuf>,
    queues: u16,
    has_vhost_net: bool,
    paths: VmPaths,
    has_walls: bool,
}

impl StartFiles {
    pub(super) fn start<'a>(
        &'a self,
        plan: &'a LaunchPlan,
        choice: &Choice,
        content: Content,
        ram: Option<&HostRam>,
    ) -> Start<'a> {
        Start {
            plan,
            machine_type: choice.machine_type,
            device_set: self.device_set,
            paths: &self.paths,
            kernel: &self.kernel,
            initrd: &self.initrd,
            rootfs: &self.rootfs,
            overlay: &self.overlay,
            volumes: &self.volumes,
            kernel_files: self.kernel_files.as_deref(),
            queues: self.queues,
            has_vhost_net: self.has_vhost_net,
            content,
            ram: ram.map(|ram| Ram { descriptor: ram.file.as_raw_fd(), mapping: ram.mapping }),
            has_walls: self.has_walls,
        }
    }
}

/// Returns the number of pairs of queues of the card of a VM that boots: one for each processor, where its TAP can have
/// several.
fn queues(plan: &LaunchPlan, choice: &Choice) -> u16 {
    let most = choice.machine_type.capabilities.card_queues_max;
    match &plan.network {
        Some(card) if card.has_queues => u16::try_from(plan.vcpus).unwrap_or(u16::MAX).clamp(1, most),
        Some(_) | None => 1,
    }
}

impl Hypervisors {
    pub(super) async fn launch_fresh(&self, plan: &LaunchPlan) -> Result<(), HostError> {
        let failed = |error| HostError::io("prepare a VM for", plan.owner.as_str(), error);
        let choice = self.choose(plan)?;
        let guest = GuestOrigin {
            run: plan.run,
            device_set: choice.driver.device_set(),
            token: new_token().map_err(failed)?,
            launched_at: Timestamp::now(),
            kernel_files: self.config.boot_files.get()?.0.guest_disk(plan.wants_headers),
            queues: queues(plan, &choice),
            has_disk_limit: choice.machine_type.capabilities.io_limits,
        };
        let mut record = Record::new(plan, choice.machine_type.name, guest);
        record.volume_sizes = self.volume_sizes(&plan.volumes).map_err(failed)?;
        end_line(&self.paths(&plan.owner).console_log()).map_err(failed)?;
        let ram = match choice.driver.ram_access() {
            RamAccess::Host => {
                let file = fresh_ram(memory_size(plan)).map_err(failed)?;
                Some(HostRam { file, mapping: Mapping::Own })
            }
            RamAccess::Vmm => None,
        };
        let files = self.start_files(plan, &record)?;
        let start = files.start(plan, &choice, Content::Fresh, ram.as_ref());
        let attached = self.start(&start, &choice, record, ram.as_ref()).await?;
        let failed = |why: String| {
            HostError::new(HostErrorKind::Transient, "start a VM for", plan.owner.as_str()).because(why)
        };
        self.on_session(&attached, async |session| session.set_up(&start).await).await.map_err(failed)
    }

    /// Finds the driver that a plan needs.
    pub(super) fn choose(&self, plan: &LaunchPlan) -> Result<Choice, HostError> {
        self.config.drivers.by_hypervisor(plan.hypervisor).ok_or_else(|| {
            let refused = HostError::new(HostErrorKind::Unsupported, "launch a VM for", plan.owner.as_str());
            refused.because(format!("{} is not driven on this host", plan.hypervisor.as_str()))
        })
    }

    pub(super) fn check_nothing_there(&self, owner: &Uid) -> Result<(), HostError> {
        match Record::read(&self.paths(owner))? {
            None => Ok(()),
            Some(_) => Err(HostError::new(HostErrorKind::Conflict, "launch over the VM of", owner.as_str())),
        }
    }

    /// Finds all files that a VM is started from.
    pub(super) fn start_files(&self, plan: &LaunchPlan, record: &Record) -> Result<StartFiles, HostError> {
        let config = &self.config;
        let (kernel, initrd) = config.boot_files.get()?;
        Ok(StartFiles {
            kernel,
            initrd,
            device_set: record.device_set,
            rootfs: (config.rootfs)(&plan.rootfs),
            overlay: (config.disk)(&plan.overlay),
            volumes: plan.volumes.iter().map(|volume| self.volume_file(volume)).collect(),
            kernel_files: record.kernel_files.clone(),
            queues: record.queues.unwrap_or(EARLIER_QUEUES),
            has_vhost_net: plan.network.is_some() && has_vhost_net(),
            paths: self.paths(&plan.owner),
            has_walls: config.jails.has_walls(),
        })
    }

    /// Finds the file of a volume's disk.
    pub(super) fn volume_file(&self, volume: &VolumeDisk) -> VolumeFile {
        let path = (self.config.disk)(&volume.disk);
        VolumeFile { path, is_read_only: volume.is_read_only, number: volume.number }
    }

    /// Spawns the VMM and waits until it answers.
    pub(super) async fn start(
        &self,
        start: &Start<'_>,
        choice: &Choice,
        mut record: Record,
        ram: Option<&HostRam>,
    ) -> Result<Arc<Attached>, HostError> {
        let (plan, paths) = (start.plan, start.paths);
        let failed = |error| HostError::io("prepare a VM for", plan.owner.as_str(), error);
        self.check_nothing_there(&plan.owner)?;
        if let Some(why) = self.config.accelerator.problem() {
            let refused = HostError::new(HostErrorKind::Unsupported, "start a VM for", plan.owner.as_str());
            return Err(refused.because(why));
        }
        if let Some(card) = &plan.network {
            check_tap(&card.tap)?;
        }
        for dir in [paths.runtime(), paths.logs()] {
            make_private_dir(dir).map_err(failed)?;
        }
        if let Some(ram) = ram {
            (record.mapping, record.ram_inode) = (ram.mapping, ram.file.metadata().map_err(failed)?.ino());
        }
        let command = choice.driver.command(start);
        if command.needs.is_some() && start.has_walls {
            record.user = Some(self.config.jails.user(plan).map_err(failed)?);
        }
        record.write(paths)?;
        let mut child = self.spawn(start, choice, command, record.user, ram).await?;
        let Some(identity) = Identity::of(child.pid).map_err(failed)? else {
            let died = HostError::new(HostErrorKind::Transient, "start a VMM for", plan.owner.as_str());
            return Err(died.because(last_line(&paths.vmm_log())));
        };
        record.identity = Some(identity.clone());
        record.write(paths)?;
        let (attached, _) = self.attach(&plan.owner, choice, &record, &identity)?;
        // The child is not awaited after that; it is reaped when it ends while this daemon lives. Nor can it open
        // files for writing after that.
        self.await_start(start, &mut child, &attached).await?;
        Ok(attached)
    }

    async fn spawn(
        &self,
        start: &Start<'_>,
        choice: &Choice,
        command: VmmCommand,
        user: Option<u32>,
        ram: Option<&HostRam>,
    ) -> Result<Spawned, HostError> {
        let (config, plan) = (&self.config, start.plan);
        let owner = plan.owner.clone();
        let failed = move |error| HostError::io("start a VMM for", owner.as_str(), error);
        let disks = plan.disks();
        let mut largest =
            largest_file(disks.iter().map(|disk| (config.disk)(&disk.disk))).map_err(&failed)?;
        match choice.driver.ram_access() {
            // The RAM file has its length already, and is written to by pages.
            RamAccess::Host => {}
            RamAccess::Vmm => largest = largest.max(memory_size(plan).0),
        }
        let ram = ram.map(|ram| Ok((ram.file.as_fd().try_clone_to_owned()?, ram.file.as_raw_fd())));
        let spawning = SpawnPlan {
            owner: plan.owner.clone(),
            paths: start.paths.clone(),
            file_size_max: file_size_max(largest, config.console_log_max),
            ram: ram.transpose().map_err(&failed)?,
            user,
            limits: Some(plan.limits),
        };
        let config = config.clone();
        on_thread(&plan.owner, move || {
            process::spawn(&config.jails, &config.cgroups, command, spawning).map_err(failed)
        })
        .await
    }

    /// Waits until the VMM answers, or has ended.
    async fn await_start(
        &self,
        start: &Start<'_>,
        child: &mut Spawned,
        attached: &Attached,
    ) -> Result<(), HostError> {
        let (owner, paths) = (&start.plan.owner, start.paths);
        let failed = |why: String| {
            HostError::new(HostErrorKind::Transient, "start a VMM for", owner.as_str()).because(why)
        };
        let socket = attached.choice.driver.socket(paths);
        let answers = first_answer(&socket, || async {
            let state = self.vmm_state(owner, attached).await;
            (!matches!(state, VmmState::Unreachable(_))).then_some(())
        });
        let opens = async {
            match &child.opens {
                Some(opens) => opens.answer().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            never = opens => match never {},
            status = &mut child.ended => {
                let status = status.unwrap_or_else(|_| "it ended".to_owned());
                Err(failed(format!("{status}: {}", last_line(&paths.vmm_log()))))
            }
            state = tokio::time::timeout(START_DEADLINE, answers) => match state {
                Ok(()) => Ok(()),
                Err(_) => Err(failed(format!("no answer within {} s", START_DEADLINE.as_secs()))),
            },
        }
    }
}

/// Returns the memory of a VM in whole megabytes, as VMMs count it.
pub(super) fn memory_size(plan: &LaunchPlan) -> Bytes {
    Bytes(plan.memory.mib_ceil() << 20)
}
