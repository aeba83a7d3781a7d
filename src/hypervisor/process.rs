//! The process of a VMM: how it is spawned, found again, and its end noticed.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::{OwnedFd, RawFd};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

use stead_controllers::host::{HostError, VmmLimits};
use stead_schemas::names::Uid;
use stead_schemas::quantity::Bytes;
use tokio::task::JoinHandle;

use super::driver::VmmCommand;
use super::jail::{self, Given, Jails, Spawned};
use super::record::{Record, VmPaths};
use crate::guest_channel::Changed;
use crate::host::cgroup::{Cgroups, Group, SpawnLimits};
use crate::host::process::{Identity, find_by_argument};

/// Delay between two attempts to reach a VMM that starts.
const START_POLL: Duration = Duration::from_micros(500);
/// Delay before a VMM is moved into its control group.
const GROUP_DELAY: Duration = Duration::from_secs(2);

/// Largest number of threads of a VMM whose driver names none.
const THREADS_MAX: u64 = 256;
/// Tasks of a group beside the threads of its VMM: those of the kernel that move the guest's frames.
const STARTING_TASKS: u64 = 32;

/// Returns the largest size in bytes of a file that a VMM writes. A disk that grows meanwhile is as large as before for
/// this VMM, and the console's log must be able to reach the length at which it is rotated.
pub(crate) fn file_size_max(largest: u64, console_log_max: Bytes) -> u64 {
    largest.max(console_log_max.0.saturating_mul(2))
}

/// The start of one VMM.
#[derive(Debug)]
pub struct SpawnPlan {
    pub owner: Uid,
    pub paths: VmPaths,
    /// Largest file that the VMM writes, in bytes.
    pub file_size_max: u64,
    /// The RAM that the host made, and the number of the descriptor that a VMM without walls knows it by.
    pub ram: Option<(OwnedFd, RawFd)>,
    /// The user of a VMM behind walls.
    pub user: Option<u32>,
    /// The limits of its control group, or `None` for a group that only counts.
    pub limits: Option<VmmLimits>,
}

/// Spawns a VMM behind its walls, in a session of its own, so that it outlives the daemon, and in its control group.
/// The bound on each of its files limits the console's log while no daemon rotates it: what a guest prints beyond is
/// dropped. Waits for the disk and for the child.
///
/// # Errors
/// Returns an error when a file cannot be opened, or a step of the child failed. Nothing runs then.
pub fn spawn(jails: &Jails, cgroups: &Cgroups, vmm: VmmCommand, plan: SpawnPlan) -> io::Result<Spawned> {
    let append = |path: &Path| File::options().create(true).append(true).open(path);
    let log = append(&plan.paths.vmm_log())?;
    let output =
        if vmm.has_console_on_stdout { append(&plan.paths.console_log())? } else { log.try_clone()? };
    let threads = vmm.needs.as_ref().map_or(THREADS_MAX, |needs| needs.threads_max);
    let limits = plan.limits.map(|vmm| SpawnLimits { vmm, tasks: threads + STARTING_TASKS });
    let group = cgroups.prepare(plan.owner.as_str(), limits).unwrap_or_else(|error| {
        tracing::warn!(owner = %plan.owner, %error, "the VMM is in no control group of its own");
        Group::default()
    });
    let (ram, kept) = plan.ram.map_or((None, None), |(ram, number)| (Some(ram), Some(number)));
    let given = Given {
        standard: [File::open("/dev/null")?, output, log],
        kept: kept.filter(|_| plan.user.is_none()),
        ram,
        group,
        user: plan.user,
        file_size_max: plan.file_size_max,
    };
    jail::spawn(jails.build(vmm, given)?)
}

/// Finds the live process of a record. A process that a crash kept from being recorded is found by one of
/// the arguments `marks`.
pub(crate) fn find(
    record: &Record,
    paths: &VmPaths,
    marks: impl FnOnce() -> Vec<String>,
) -> Result<Option<Identity>, HostError> {
    let found = match &record.identity {
        Some(identity) => identity.is_alive().map(|is_alive| is_alive.then(|| identity.clone())),
        None => {
            let marks = marks();
            find_by_argument(record.user, |argument| marks.iter().any(|mark| mark == argument))
        }
    };
    found.map_err(|error| HostError::io("find the VMM of", paths.runtime().display().to_string(), error))
}

/// Notifies when the process has ended.
pub(crate) fn watch_exit(owner: &Uid, identity: &Identity, changed: &Changed) -> io::Result<JoinHandle<()>> {
    let pidfd = identity.open()?;
    let (owner, changed) = (owner.clone(), changed.clone());
    Ok(tokio::spawn(async move {
        if let Some(pidfd) = pidfd {
            pidfd.exited().await;
        }
        changed(&owner);
    }))
}

/// Moves a VMM of an earlier version into its control group, later: the kernel starts no thread anywhere while it
/// moves a process, and the boot or restore is likely over by then. VMMs of this version begin in their groups.
pub(crate) fn enter_group(cgroups: &Cgroups, owner: &Uid, identity: &Identity) {
    let (cgroups, owner, identity) = (cgroups.clone(), owner.clone(), identity.clone());
    let enter = move || {
        // The group of a process whose state cannot be read does no harm.
        if !identity.is_alive().unwrap_or(true) {
            return;
        }
        let entered = cgroups.enter(owner.as_str(), identity.pid);
        if !identity.is_alive().unwrap_or(true) {
            // The VM may have been released already. The group of another VM is not empty, and stays.
            let _ = cgroups.remove(owner.as_str());
        } else if let Err(error) = entered {
            tracing::warn!(%owner, %error, "the VMM is in no control group of its own");
        }
    };
    tokio::spawn(async move {
        tokio::time::sleep(GROUP_DELAY).await;
        drop(tokio::task::spawn_blocking(enter).await);
    });
}

/// Ends the last line of an earlier boot, so that the first line of the next begins a line.
pub(crate) fn end_line(log: &Path) -> io::Result<()> {
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

/// Asks until there is an answer. The socket appears within milliseconds, a moment before the VMM listens
/// on it, and there is no event to wait for.
pub(crate) async fn first_answer<T, Answer: Future<Output = Option<T>>>(
    socket: &Path,
    ask: impl Fn() -> Answer,
) -> T {
    loop {
        // Where the path cannot be examined, the question finds out.
        if socket.try_exists().unwrap_or(true)
            && let Some(answer) = ask().await
        {
            return answer;
        }
        tokio::time::sleep(START_POLL).await;
    }
}

/// Returns the length in bytes of the largest of these files.
pub(crate) fn largest_file(paths: impl IntoIterator<Item = impl AsRef<Path>>) -> io::Result<u64> {
    paths.into_iter().try_fold(0, |largest, path| Ok(fs::metadata(path)?.len().max(largest)))
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
    async fn a_socket_that_is_there_and_does_not_listen_yet_is_tried_again() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("monitor");
        let bound = UnixSocket::new_stream().expect("a socket");
        bound.bind(&path).expect("bound");
        let (bound, listener) = (Mutex::new(Some(bound)), Mutex::new(None));
        let answered = first_answer(&path, || async {
            let connected = UnixStream::connect(&path).await.ok();
            // Refused once: only now does the VMM listen.
            if let Some(bound) = bound.lock().expect("whole").take() {
                assert!(connected.is_none(), "nothing listens yet");
                *listener.lock().expect("whole") = Some(bound.listen(1).expect("listens"));
            }
            connected
        })
        .await;
        assert!(answered.peer_addr().is_ok());
    }
}
