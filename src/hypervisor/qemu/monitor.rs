//! QMP: the run state, a few commands, and events as hints.
//!
//! One connection, kept; QEMU serves one client at a time. Every exchange has a deadline: a stopped
//! process accepts and never answers.

use std::io;
use std::path::Path;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use qapi::futures::{QapiService, QmpStreamTokio};
use qapi::qmp::{self, QmpCommand};
use stead_controllers::host::VmmState;
use stead_schemas::names::{LinkName, Uid};
use stead_schemas::quantity::Bytes;
use tokio::io::{AsyncRead, ReadBuf, WriteHalf};
use tokio::net::UnixStream;
use tokio::task::JoinHandle;

use super::command::{CONSOLE, PLUG, TAP};
use crate::hypervisor::Changed;

/// QEMU answers in a millisecond; a host in trouble gets this.
const DEADLINE: Duration = Duration::from_secs(2);

const MIGRATION_POLL: Duration = Duration::from_millis(1);

/// For the device state to pass, in either direction: 5 ms, a second under load.
pub(super) const STATE_DEADLINE: Duration = Duration::from_secs(30);

/// Length of the longest line that is read, in bytes: a hundred times what QEMU says in one.
const LINE_BYTES_MAX: usize = 1 << 20;

type Service = QapiService<QmpStreamTokio<WriteHalf<UnixStream>>>;

/// A negotiated connection.
pub(super) struct Monitor {
    service: Service,
    events: JoinHandle<()>,
    /// A command is under way, or was given up before its answer came: the client has no place for another one
    /// then.
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
    pub(super) async fn connect(socket: &Path, owner: &Uid, changed: &Changed) -> Result<Self, String> {
        let stream =
            within(DEADLINE, async { UnixStream::connect(socket).await.map_err(|error| error.to_string()) });
        Self::negotiated(stream.await?, owner, changed).await
    }

    /// Takes the greeting of a VMM and answers it.
    pub(super) async fn negotiated(
        stream: UnixStream,
        owner: &Uid,
        changed: &Changed,
    ) -> Result<Self, String> {
        let connected = within(DEADLINE, async {
            let (read, write) = tokio::io::split(stream);
            let read = Lines { inner: read, length: 0 };
            let negotiation =
                QmpStreamTokio::open_split(read, write).await.map_err(|error| error.to_string())?;
            negotiation.negotiate().await.map_err(|error| error.to_string())
        })
        .await?;
        let (service, mut events) = connected.into_parts();
        let (owner, changed) = (owner.clone(), changed.clone());
        let events = tokio::spawn(async move {
            use futures::StreamExt;
            while let Some(Ok(_)) = events.next().await {
                changed(&owner);
            }
            changed(&owner);
        });
        Ok(Self { service, events, is_waiting: AtomicBool::new(false) })
    }

    /// `free` tells how much is free where the disks are.
    pub(super) async fn state(&self, free: impl FnOnce() -> Bytes) -> Result<VmmState, String> {
        Ok(match self.execute(qmp::query_status {}).await?.status {
            // Only for want of room: any other error is told to the guest.
            qmp::RunState::io_error => VmmState::Stalled(free()),
            other => state_of(other),
        })
    }

    /// Replaces the TAP that the card's hub is plugged into. What is left of the old one, or of an
    /// earlier try, is removed first; that it is not there is no error.
    pub(super) async fn plug(&self, tap: &LinkName) -> Result<(), String> {
        for id in [PLUG, TAP] {
            let _ = self.execute(qmp::netdev_del { id: id.to_owned() }).await;
        }
        let no = || Some("no".to_owned());
        let options = qmp::NetdevTapOptions {
            ifname: Some(tap.to_string()),
            script: no(),
            downscript: no(),
            ..Default::default()
        };
        let plug = qmp::NetdevHubPortOptions { hubid: 0, netdev: Some(TAP.to_owned()) };
        for netdev in [
            qmp::Netdev::tap { id: TAP.to_owned(), tap: options },
            qmp::Netdev::hubport { id: PLUG.to_owned(), hubport: plug },
        ] {
            self.execute(qmp::netdev_add(netdev)).await?;
        }
        Ok(())
    }

    /// Lets the console go on in the file of this name; what was open stays whole under its new one.
    pub(super) async fn reopen_console(&self, log: &Path) -> Result<(), String> {
        let base = qmp::ChardevCommon { logappend: None, logfile: None };
        let file = qmp::ChardevFile { base, append: Some(true), in_: None, out: log.display().to_string() };
        let backend = qmp::ChardevBackend::file(qmp::ChardevFileWrapper { data: file });
        let change = qmp::chardev_change { backend, id: CONSOLE.to_owned() };
        self.execute(change).await.map(drop)
    }

    pub(super) async fn resume(&self) -> Result<(), String> {
        self.execute(qmp::cont {}).await.map(drop)
    }

    pub(super) async fn pause(&self) -> Result<(), String> {
        self.execute(qmp::stop {}).await.map(drop)
    }

    /// As major, minor and micro number and the packager's word.
    pub(super) async fn version(&self) -> Result<String, String> {
        let qmp::VersionInfo { package, qemu } = self.execute(qmp::query_version {}).await?;
        Ok(format!("{}.{}.{} {package}", qemu.major, qemu.minor, qemu.micro).trim_end().to_owned())
    }

    /// Writes the device state of a VM that is held into this file. What it had to write to its disk is
    /// written since it is held.
    ///
    /// The command's name is that of its first user; it is the one that leaves the RAM out whoever maps
    /// it, and is the same on every accelerator. So it does the firmware's own, which nobody reads after
    /// a boot: what a guest is told of its tables lies in its RAM, and a reset ends its VM.
    pub(super) async fn save_state(&self, file: &Path) -> Result<(), String> {
        let save = qmp::xen_save_devices_state { filename: file.display().to_string(), live: Some(false) };
        self.execute_within(STATE_DEADLINE, save).await.map(drop)
    }

    /// Listens on this socket for the device state.
    pub(super) async fn begin_load(&self, socket: &Path) -> Result<(), String> {
        let uri = Some(format!("unix:{}", socket.display()));
        self.execute(qmp::migrate_incoming { uri, channels: None, exit_on_error: None }).await.map(drop)
    }

    /// Waits until the state has passed as a whole, or has not.
    pub(super) async fn migrated(&self) -> Result<(), String> {
        loop {
            let info = self.execute(qmp::query_migrate {}).await?;
            match info.status {
                Some(qmp::MigrationStatus::completed) => return Ok(()),
                Some(qmp::MigrationStatus::failed | qmp::MigrationStatus::cancelled) => {
                    return Err(info
                        .error_desc
                        .unwrap_or_else(|| "the device state did not pass".to_owned()));
                }
                // The last bytes are read; there is no event that could not be missed.
                _ => tokio::time::sleep(MIGRATION_POLL).await,
            }
        }
    }

    async fn execute<C: QmpCommand>(&self, command: C) -> Result<C::Ok, String> {
        self.execute_within(DEADLINE, command).await
    }

    async fn execute_within<C: QmpCommand>(&self, deadline: Duration, command: C) -> Result<C::Ok, String> {
        // The client panics at a second command without a number of its own, which a VMM may forbid, and ends
        // the connection at an answer that nobody waits for any more.
        if self.is_waiting.swap(true, Ordering::AcqRel) {
            return Err("an earlier command was not answered".to_owned());
        }
        let answer = tokio::time::timeout(deadline, self.service.execute(command)).await;
        let answer = answer.map_err(|_| late(deadline))?;
        self.is_waiting.store(false, Ordering::Release);
        answer.map_err(|error| error.to_string())
    }

    /// Whether no command can be given any more: an answer did not come. Another connection may do.
    pub(super) fn is_spent(&self) -> bool {
        self.is_waiting.load(Ordering::Acquire)
    }
}

/// Reads as far as lines end: what never ends is not gathered.
struct Lines<R> {
    inner: R,
    /// Length of the line so far, in bytes.
    length: usize,
}

impl<R: AsyncRead + Unpin> AsyncRead for Lines<R> {
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

fn state_of(state: qmp::RunState) -> VmmState {
    use qmp::RunState as Run;
    match state {
        Run::running | Run::suspended => VmmState::Running,
        Run::prelaunch | Run::inmigrate => VmmState::Created,
        Run::paused
        | Run::debug
        | Run::save_vm
        | Run::restore_vm
        | Run::postmigrate
        | Run::finish_migrate
        | Run::colo => VmmState::Paused,
        // Nothing runs any more and nothing will: the process only waits to be ended.
        Run::shutdown | Run::guest_panicked | Run::internal_error | Run::io_error | Run::watchdog => {
            VmmState::Shutdown
        }
    }
}
