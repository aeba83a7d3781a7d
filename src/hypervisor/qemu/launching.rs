//! Starting a VMM.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use stead_controllers::host::{HostError, HostErrorKind, LaunchPlan, VmmState};
use stead_schemas::names::Uid;
use stead_schemas::quantity::Bytes;

use super::board::Board;
use super::places::{Mapping, Places, Record};
use super::ram::fresh_ram;
use super::{Attached, Identity, Qemu, check_tap, command, last_line, make_private_dir, new_token, spawning};
use crate::host::tsc;

/// Until QEMU answers on its monitor: 30 ms, a second under load.
const START_DEADLINE: Duration = Duration::from_secs(30);
const START_POLL: Duration = Duration::from_micros(500);
/// To the move of a VMM into its control group.
const GROUP_DELAY: Duration = Duration::from_secs(2);

/// What is in the VMM's memory when it starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Content {
    Fresh,
    /// Device state is still to come, and RAM before it.
    Saved,
}

/// RAM of a VMM, and how it has it.
#[derive(Debug)]
pub(super) struct Ram {
    pub(super) file: File,
    pub(super) mapping: Mapping,
    pub(super) content: Content,
}

impl Qemu {
    pub(super) async fn launch_fresh(&self, plan: &LaunchPlan) -> Result<(), HostError> {
        let failed = |error| HostError::io("prepare a VM for", plan.owner.as_str(), error);
        let record = Record {
            run: plan.run,
            launch: plan.launch,
            board: board(plan)?,
            token: new_token().map_err(failed)?,
            new_token: None,
            launched_at: Timestamp::now(),
            identity: None,
            tap: plan.network.as_ref().map(|card| card.tap.clone()),
            overlay: Some(plan.overlay.clone()),
            memory: plan.memory,
            mapping: Mapping::Own,
            ram_inode: 0,
            volumes: plan.volumes.clone(),
            kernel_files: self.config.boot_files.get()?.0.guest_disk(plan.wants_headers),
        };
        end_line(&self.places(&plan.owner).console_log()).map_err(failed)?;
        let file = fresh_ram(memory_size(plan)).map_err(failed)?;
        let ram = Ram { file, mapping: Mapping::Own, content: Content::Fresh };
        self.start(plan, record, &ram).await.map(drop)
    }

    pub(super) fn check_nothing_there(&self, owner: &Uid) -> Result<(), HostError> {
        match Record::read(&self.places(owner))? {
            None => Ok(()),
            Some(_) => Err(HostError::new(HostErrorKind::Conflict, "launch over the VM of", owner.as_str())),
        }
    }

    /// Spawns the VMM and waits until it answers.
    pub(super) async fn start(
        &self,
        plan: &LaunchPlan,
        mut record: Record,
        ram: &Ram,
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
        (record.mapping, record.ram_inode) = (ram.mapping, ram.file.metadata().map_err(failed)?.ino());
        record.write(&places)?;
        let mut child = self.spawn(plan, &places, ram, &record)?;
        let identity = child.id().map_or(Ok(None), Identity::of);
        let Some(identity) = identity.map_err(failed)? else {
            let died = HostError::new(HostErrorKind::Transient, "start a VMM for", plan.owner.as_str());
            return Err(died.because(last_line(&places.vmm_log())));
        };
        record.identity = Some(identity.clone());
        record.write(&places)?;
        let (attached, _) = self.attach(&plan.owner, &record, &identity)?;
        // The child is then left alone; the runtime reaps it when it ends while this daemon lives.
        self.await_start(&plan.owner, &mut child, &attached).await?;
        self.enter_group(&plan.owner, &identity);
        Ok(attached)
    }

    /// The group is a mark and accounting: nobody waits for it, and a host that refuses it still runs the
    /// VM. The kernel lets no thread start anywhere while it moves a process, so that is done when
    /// what was waited for is likely over.
    pub(super) fn enter_group(&self, owner: &Uid, identity: &Identity) {
        let (config, owner, identity) = (self.config.clone(), owner.clone(), identity.clone());
        let enter = move || {
            // The cgroup of a process that cannot be looked at does no harm.
            if !identity.is_alive().unwrap_or(true) {
                return;
            }
            let entered = config.cgroups.enter(owner.as_str(), identity.pid);
            if !identity.is_alive().unwrap_or(true) {
                // Whoever released it may have been here before; another's group is not empty.
                let _ = config.cgroups.remove(owner.as_str());
            } else if let Err(error) = entered {
                tracing::warn!(%owner, %error, "the VMM is in no control group of its own");
            }
        };
        tokio::spawn(async move {
            tokio::time::sleep(GROUP_DELAY).await;
            drop(tokio::task::spawn_blocking(enter).await);
        });
    }

    /// Starts the process, in a session of its own.
    fn spawn(
        &self,
        plan: &LaunchPlan,
        places: &Places,
        ram: &Ram,
        record: &Record,
    ) -> Result<tokio::process::Child, HostError> {
        let config = &self.config;
        let (kernel, initrd) = config.boot_files.get()?;
        let volumes: Vec<_> =
            plan.volumes.iter().map(|volume| ((config.disk)(&volume.disk), volume.is_read_only)).collect();
        let ingredients = command::Ingredients {
            board: record.board,
            kernel: &kernel,
            initrd: &initrd,
            rootfs: &(config.rootfs)(&plan.rootfs),
            overlay: &(config.disk)(&plan.overlay),
            volumes: &volumes,
            ram: ram.file.as_raw_fd(),
            mapping: ram.mapping,
            accelerator: config.accelerator,
            tsc_khz: tsc::khz(),
            content: ram.content,
            kernel_files: record.kernel_files.as_deref(),
        };
        let failed = |error| HostError::io("start a VMM for", plan.owner.as_str(), error);
        let log = File::options().create(true).append(true).open(places.vmm_log()).map_err(failed)?;
        let mut command = tokio::process::Command::new(&config.binary);
        command
            .args(command::arguments(plan, places, &ingredients))
            .env_clear()
            .current_dir("/")
            .kill_on_drop(false);
        command.stdin(Stdio::null()).stdout(log.try_clone().map_err(failed)?).stderr(log);
        let mut largest = 0;
        for disk in plan.disks() {
            largest = largest.max(fs::metadata((config.disk)(&disk.disk)).map_err(failed)?.len());
        }
        // RAM is not among what this bounds: its file has its length, and is written to by pages.
        let file_size_max = spawning::file_size_max(largest, config.console_log_max);
        spawning::prepare(&mut command, file_size_max, ram.file.as_raw_fd());
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
        let answers = first_answer(&socket, || async {
            let state = self.vmm_state(owner, attached).await;
            (!matches!(state, VmmState::Unreachable(_))).then_some(())
        });
        tokio::select! {
            biased;
            status = child.wait() => {
                let status = status.map_or_else(|error| error.to_string(), |status| status.to_string());
                Err(failed(format!("{status}: {}", last_line(&self.places(owner).vmm_log()))))
            }
            state = tokio::time::timeout(START_DEADLINE, answers) => match state {
                Ok(()) => Ok(()),
                Err(_) => Err(failed(format!("no answer within {} s", START_DEADLINE.as_secs()))),
            },
        }
    }
}

/// Ends the last line of an earlier boot, so that the first one of the next stands apart.
fn end_line(log: &Path) -> io::Result<()> {
    let file = match File::options().read(true).append(true).open(log) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        file => file?,
    };
    let mut last = [0];
    match file.metadata()?.len().checked_sub(1) {
        Some(at) => file.read_exact_at(&mut last, at)?,
        None => return Ok(()),
    }
    if last == *b"\n" { Ok(()) } else { (&file).write_all(b"\n") }
}

/// Asks until there is an answer. The socket appears within milliseconds, a moment before anybody
/// listens on it; there is no event to wait for.
async fn first_answer<T, F: Future<Output = Option<T>>>(socket: &Path, ask: impl Fn() -> F) -> T {
    loop {
        // Where it cannot be looked for, the question tells.
        if socket.try_exists().unwrap_or(true)
            && let Some(answer) = ask().await
        {
            return answer;
        }
        tokio::time::sleep(START_POLL).await;
    }
}

/// The board that a plan asks for.
pub(super) fn board(plan: &LaunchPlan) -> Result<Board, HostError> {
    Board::of(plan.hypervisor).ok_or_else(|| {
        let unsupported = HostError::new(HostErrorKind::Unsupported, "launch a VM for", plan.owner.as_str());
        unsupported.because(format!("{} is not driven on this host", plan.hypervisor.as_str()))
    })
}

/// As QEMU is told: whole megabytes.
pub(super) fn memory_size(plan: &LaunchPlan) -> Bytes {
    Bytes(plan.memory.mib_ceil() << 20)
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use tokio::net::{UnixSocket, UnixStream};

    use super::*;

    #[test]
    fn the_last_line_of_an_earlier_boot_is_ended_once() {
        let dir = tempfile::tempdir().expect("a directory");
        let log = dir.path().join("app.log");
        end_line(&log).expect("none is there");
        assert!(!log.exists());
        for (before, after) in [("", ""), ("one", "one\n"), ("one\n", "one\n")] {
            fs::write(&log, before).expect("written");
            end_line(&log).expect("ended");
            assert_eq!(fs::read_to_string(&log).expect("there"), after);
        }
    }

    #[tokio::test]
    async fn a_monitor_that_is_there_and_does_not_listen_yet_is_asked_again() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("monitor");
        let bound = UnixSocket::new_stream().expect("a socket");
        bound.bind(&path).expect("bound");
        let (bound, listener) = (Mutex::new(Some(bound)), Mutex::new(None));
        let answered = first_answer(&path, || async {
            let connected = UnixStream::connect(&path).await.ok();
            // Refused once: only now does QEMU come to it.
            if let Some(bound) = bound.lock().expect("whole").take() {
                assert!(connected.is_none(), "nobody listens yet");
                *listener.lock().expect("whole") = Some(bound.listen(1).expect("listens"));
            }
            connected
        })
        .await;
        assert!(answered.peer_addr().is_ok());
    }
}
