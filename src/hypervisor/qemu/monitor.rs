//! QMP: the run state, a few commands, and events as notifications.
//!
//! There is one connection, which is kept: QEMU serves one client at a time. Every exchange has a deadline:
//! a stopped process accepts a connection and never answers.

use std::fs::File;
use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use qapi::futures::{QapiService, QmpStreamTokio};
use qapi::qmp::{self, QmpCommand};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use stead_schemas::quantity::Rate;
use tokio::io::{AsyncRead, ReadBuf, WriteHalf};
use tokio::net::UnixStream;
use tokio::task::JoinHandle;

use super::command::CONSOLE;
use super::throttle::{LIMITS, Limits, THROTTLE_PATH};
use crate::host::tap::{Frames, OFFLOAD_CHECKSUM, OFFLOAD_CONGESTION, OFFLOAD_TCP4, OFFLOAD_TCP6};
use crate::hypervisor::driver::{Notify, RunState};

/// Time limit for an answer. QEMU answers in a millisecond; a host under load takes longer.
const DEADLINE: Duration = Duration::from_secs(2);

/// Delay between two polls of a device state that is being loaded.
const MIGRATION_POLL: Duration = Duration::from_millis(1);

/// Time limit for saving or loading a device state, which takes 5 ms, or a second under load.
pub(super) const STATE_DEADLINE: Duration = Duration::from_secs(30);

/// Length of the longest line that is read, in bytes: a hundred times that of QEMU's longest answer.
const LINE_BYTES_MAX: usize = 1 << 20;

type Service = QapiService<QmpStreamTokio<WriteHalf<UnixStream>>>;

/// Name of a network card among the virtio devices.
const NETWORK_CARD: &str = "virtio-net";

/// Name of the device state among the descriptors that were passed for one use.
const STATE: &str = "state";

/// A negotiated connection.
pub(super) struct Monitor {
    service: Service,
    /// The connection, on which descriptors are passed.
    connection: OwnedFd,
    events: JoinHandle<()>,
    /// QEMU keeps files that were passed while the VM was paused.
    has_files: AtomicBool,
    /// A command is in progress, or its answer came too late. The client can send no other command then.
    is_waiting: AtomicBool,
}

impl std::fmt::Debug for Monitor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Monitor").finish_non_exhaustive()
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        self.events.abort();
    }
}

impl Monitor {
    pub(super) async fn connect(socket: &Path, notify: &Notify) -> Result<Self, String> {
        let stream =
            within(DEADLINE, async { UnixStream::connect(socket).await.map_err(|error| error.to_string()) });
        Self::negotiated(stream.await?, notify).await
    }

    /// Reads the greeting of a VMM and answers it.
    pub(super) async fn negotiated(stream: UnixStream, notify: &Notify) -> Result<Self, String> {
        let connection = stream.as_fd().try_clone_to_owned().map_err(|error| error.to_string())?;
        let connected = within(DEADLINE, async {
            let (read, write) = tokio::io::split(stream);
            let read = Lines { inner: read, length: 0 };
            let negotiation =
                QmpStreamTokio::open_split(read, write).await.map_err(|error| error.to_string())?;
            negotiation.negotiate().await.map_err(|error| error.to_string())
        })
        .await?;
        let (service, mut events) = connected.into_parts();
        let notify = notify.clone();
        let events = tokio::spawn(async move {
            use futures::StreamExt;
            while let Some(Ok(_)) = events.next().await {
                notify();
            }
            notify();
        });
        Ok(Self {
            service,
            connection,
            events,
            has_files: AtomicBool::new(false),
            is_waiting: AtomicBool::new(false),
        })
    }

    pub(super) async fn state(&self) -> Result<RunState, String> {
        Ok(run_state(self.execute(qmp::query_status {}).await?.status))
    }

    /// Returns the form of the frames that the driver in the guest chose. Before there is a driver, and from a version
    /// that does not report it, that is whole frames: a guest must not get work that it did not take over.
    pub(super) async fn frames(&self) -> Result<Frames, String> {
        match self.card().await {
            Ok(card) => {
                let features = card.guest_features;
                let all = [features.dev_features.unwrap_or_default(), features.transports].concat();
                Ok(chosen_frames(all.iter().map(String::as_str)))
            }
            Err(error) if self.is_spent() => Err(error),
            Err(error) => {
                tracing::warn!(error, "the offloads of a network card are not known, and are left out");
                Ok(Frames { header: Frames::LONG_HEADER, ..Frames::PLAIN })
            }
        }
    }

    /// Lets the kernel read a TAP again if it moves the frames: it stopped when the TAP was removed, and begins when
    /// the VM is resumed.
    pub(super) async fn resume_card(&self) -> Result<(), String> {
        let is_moved_by_kernel = self.card().await.map_or(true, |card| card.vhost_started);
        if is_moved_by_kernel && self.state().await? == RunState::Running {
            self.pause().await?;
            self.resume().await?;
        }
        Ok(())
    }

    /// Returns the state of the network card.
    async fn card(&self) -> Result<qmp::VirtioStatus, String> {
        let devices = self.execute(qmp::x_query_virtio {}).await?;
        let card = devices.into_iter().find(|device| device.name == NETWORK_CARD);
        let path = card.ok_or_else(|| "there is no network card".to_owned())?.path;
        self.execute(qmp::x_query_virtio_status { path }).await
    }

    /// Returns the limit of the disks, or `None` without one.
    pub(super) async fn disk_rate(&self) -> Result<Option<Rate>, String> {
        let (path, property) = (THROTTLE_PATH.to_owned(), LIMITS.to_owned());
        let limits = self.execute(qmp::qom_get { path, property }).await?;
        let limits: Limits = serde_json::from_value(limits).map_err(|error| error.to_string())?;
        Ok(limits.rate())
    }

    /// Sets the limit of the disks, or removes it.
    pub(super) async fn limit_disks(&self, rate: Option<Rate>) -> Result<(), String> {
        let (path, property) = (THROTTLE_PATH.to_owned(), LIMITS.to_owned());
        let value = serde_json::to_value(Limits::of(rate)).map_err(|error| error.to_string())?;
        self.execute(qmp::qom_set { path, property, value }).await.map(drop)
    }

    /// Continues the console in this file; the open file stays whole under its new name.
    pub(super) async fn reopen_console(&self, log: &File) -> Result<(), String> {
        self.with_file(log, async |out| {
            let base = qmp::ChardevCommon { logappend: None, logfile: None };
            let file = qmp::ChardevFile { base, append: Some(true), in_: None, out };
            let backend = qmp::ChardevBackend::file(qmp::ChardevFileWrapper { data: file });
            let change = qmp::chardev_change { backend, id: CONSOLE.to_owned() };
            self.execute(change).await.map(drop)
        })
        .await
    }

    /// Passes a descriptor, which the next command takes. QEMU keeps the last one that it received. It comes
    /// with a byte that separates commands, and never with one of a command.
    fn pass(&self, file: impl AsFd) -> Result<(), String> {
        if self.is_spent() {
            return Err("an earlier command was not answered".to_owned());
        }
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let files = [file.as_fd()];
        control.push(SendAncillaryMessage::ScmRights(&files));
        let sent = sendmsg(&self.connection, &[IoSlice::new(b"\n")], &mut control, SendFlags::NOSIGNAL);
        sent.map(drop).map_err(|error| format!("pass a descriptor: {error}"))
    }

    /// Passes a descriptor for one use under a name.
    async fn pass_by_name(&self, name: &str, file: impl AsFd) -> Result<(), String> {
        self.pass(file)?;
        self.execute(qmp::getfd { fdname: name.to_owned() }).await.map(drop)
    }

    /// Passes a file for a command that opens a file by its path. QEMU has no more of it afterwards than what
    /// the command opened.
    async fn with_file(
        &self,
        file: &File,
        command: impl AsyncFnOnce(String) -> Result<(), String>,
    ) -> Result<(), String> {
        self.pass(file)?;
        let added = self.execute(qmp::add_fd { fdset_id: None, opaque: None }).await?;
        let done = command(format!("/dev/fdset/{}", added.fdset_id)).await;
        let removed = self.execute(qmp::remove_fd { fd: Some(added.fd), fdset_id: added.fdset_id }).await;
        done.and(removed.map(drop))
    }

    /// Passes a file that QEMU keeps, with its description. Returns the name by which commands refer to it.
    pub(super) async fn pass_file(&self, file: &File, description: String) -> Result<String, String> {
        self.pass(file)?;
        let added = self.execute(qmp::add_fd { fdset_id: None, opaque: Some(description) }).await?;
        Ok(format!("/dev/fdset/{}", added.fdset_id))
    }

    pub(super) async fn resume(&self) -> Result<(), String> {
        self.execute(qmp::cont {}).await?;
        if self.has_files.swap(false, Ordering::AcqRel) {
            // However many files a VMM claims to have.
            let _ = tokio::time::timeout(DEADLINE, self.close_files()).await;
        }
        Ok(())
    }

    /// Lets QEMU close what it has left of files that were passed while the VM was paused: it closes files of a
    /// running VM only. What stays open is closed with the connection.
    async fn close_files(&self) {
        let sets = self.execute(qmp::query_fdsets {}).await.unwrap_or_default();
        for set in sets {
            // Those of the command line have a description, and are in use.
            for file in set.fds.iter().filter(|file| file.opaque.is_none()) {
                let removal = qmp::remove_fd { fd: Some(file.fd), fdset_id: set.fdset_id };
                let _ = self.execute(removal).await;
            }
        }
    }

    pub(super) async fn pause(&self) -> Result<(), String> {
        self.execute(qmp::stop {}).await.map(drop)
    }

    /// Returns the major, minor and micro number, and the name of the package.
    pub(super) async fn version(&self) -> Result<String, String> {
        let qmp::VersionInfo { package, qemu } = self.execute(qmp::query_version {}).await?;
        Ok(format!("{}.{}.{} {package}", qemu.major, qemu.minor, qemu.micro).trim_end().to_owned())
    }

    /// Writes the device state of a paused VM into this file. Its disks were flushed when it was paused.
    ///
    /// The command has the name of its first user. It is the only command that leaves out the RAM, whatever
    /// process maps it, and it is the same on every accelerator. It leaves out the firmware's memory as well, which
    /// is not read after a boot: the tables for the guest are in the guest's RAM, and a reset ends the VM.
    pub(super) async fn save_state(&self, file: &File) -> Result<(), String> {
        self.has_files.store(true, Ordering::Release);
        self.with_file(file, async |filename| {
            let save = qmp::xen_save_devices_state { filename, live: Some(false) };
            self.execute_within(STATE_DEADLINE, save).await.map(drop)
        })
        .await
    }

    /// Makes the process read the device state from this socket.
    pub(super) async fn begin_load(&self, socket: impl AsFd) -> Result<(), String> {
        self.pass_by_name(STATE, socket).await?;
        let uri = Some(format!("fd:{STATE}"));
        self.execute(qmp::migrate_incoming { uri, channels: None, exit_on_error: None }).await.map(drop)
    }

    /// Waits until the whole device state is loaded, or has failed to.
    pub(super) async fn migrated(&self) -> Result<(), String> {
        loop {
            let info = self.execute(qmp::query_migrate {}).await?;
            match info.status {
                Some(qmp::MigrationStatus::completed) => return Ok(()),
                Some(qmp::MigrationStatus::failed | qmp::MigrationStatus::cancelled) => {
                    return Err(info
                        .error_desc
                        .unwrap_or_else(|| "the device state was not loaded".to_owned()));
                }
                // The process still reads; every event could be missed.
                _ => tokio::time::sleep(MIGRATION_POLL).await,
            }
        }
    }

    pub(super) async fn execute<T: QmpCommand>(&self, command: T) -> Result<T::Ok, String> {
        self.execute_within(DEADLINE, command).await
    }

    async fn execute_within<T: QmpCommand>(&self, deadline: Duration, command: T) -> Result<T::Ok, String> {
        // The client panics at a second command without a number of its own, which a VMM may forbid, and ends
        // the connection at an answer that is no longer awaited.
        if self.is_waiting.swap(true, Ordering::AcqRel) {
            return Err("an earlier command was not answered".to_owned());
        }
        let answer = tokio::time::timeout(deadline, self.service.execute(command)).await;
        let answer = answer.map_err(|_| late(deadline))?;
        self.is_waiting.store(false, Ordering::Release);
        answer.map_err(|error| error.to_string())
    }

    /// Returns whether an answer did not come, so that no command can be sent any more. Another connection
    /// may work.
    pub(super) fn is_spent(&self) -> bool {
        self.is_waiting.load(Ordering::Acquire)
    }
}

/// A reader that fails at a line without an end instead of collecting it.
struct Lines<T> {
    inner: T,
    /// Length of the line so far, in bytes.
    length: usize,
}

impl<T: AsyncRead + Unpin> AsyncRead for Lines<T> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        ready!(Pin::new(&mut self.inner).poll_read(context, buffer))?;
        let new = &buffer.filled()[before..];
        self.length = match new.iter().rposition(|&byte| byte == b'\n') {
            Some(at) => new.len() - at - 1,
            None => self.length + new.len(),
        };
        if self.length > LINE_BYTES_MAX {
            return Poll::Ready(Err(io::Error::new(io::ErrorKind::InvalidData, "a line is too long")));
        }
        Poll::Ready(Ok(()))
    }
}

async fn within<T>(deadline: Duration, work: impl Future<Output = Result<T, String>>) -> Result<T, String> {
    let answer = tokio::time::timeout(deadline, work).await;
    answer.unwrap_or_else(|_| Err(late(deadline)))
}

fn late(deadline: Duration) -> String {
    format!("no answer within {} s", deadline.as_secs())
}

/// Returns the form of the frames that features of virtio stand for.
pub(super) fn chosen_frames<'a>(features: impl Iterator<Item = &'a str>) -> Frames {
    let mut frames = Frames::PLAIN;
    for feature in features {
        let name = feature.split(':').next().unwrap_or_default();
        frames.offloads |= match name {
            "VIRTIO_NET_F_MRG_RXBUF" | "VIRTIO_F_VERSION_1" => {
                frames.header = Frames::LONG_HEADER;
                0
            }
            "VIRTIO_NET_F_GUEST_CSUM" => OFFLOAD_CHECKSUM,
            "VIRTIO_NET_F_GUEST_TSO4" => OFFLOAD_TCP4,
            "VIRTIO_NET_F_GUEST_TSO6" => OFFLOAD_TCP6,
            "VIRTIO_NET_F_GUEST_ECN" => OFFLOAD_CONGESTION,
            _ => 0,
        };
    }
    frames
}

fn run_state(state: qmp::RunState) -> RunState {
    use qmp::RunState as Run;
    match state {
        Run::running | Run::suspended => RunState::Running,
        Run::prelaunch | Run::inmigrate => RunState::Created,
        Run::paused
        | Run::debug
        | Run::save_vm
        | Run::restore_vm
        | Run::postmigrate
        | Run::finish_migrate
        | Run::colo => RunState::Paused,
        // Only for lack of space: any other error is reported to the guest.
        Run::io_error => RunState::NoSpace,
        // Nothing runs any more and nothing will: the process only waits to be ended.
        Run::shutdown | Run::guest_panicked | Run::internal_error | Run::watchdog => RunState::Shutdown,
    }
}
