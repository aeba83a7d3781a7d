//! Processes that are not our children: identity, death, and the end of one.
//!
//! Guarantees: a process is meant by pid, start time and boot id together, so that a recycled pid
//! is never taken for it; signals go through a pidfd that was checked after it was opened.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::{Deserialize, Serialize};
use stead_controllers::host::{HostError, HostErrorKind};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// How long a killed process may take to go: the kernel has to free its memory.
const DEATH_WAIT: Duration = Duration::from_secs(20);

/// One process of one boot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Identity {
    pub(crate) pid: u32,
    /// Clock ticks after boot (field 22 of `/proc/PID/stat`).
    pub(crate) start_time: u64,
    pub(crate) boot_id: String,
}

impl Identity {
    /// The process that has this pid now.
    pub(crate) fn of(pid: u32) -> Option<Self> {
        let stat = Stat::read(pid).filter(|stat| !stat.is_ended)?;
        Some(Self { pid, start_time: stat.start_time, boot_id: boot_id() })
    }

    pub(crate) fn is_alive(&self) -> bool {
        let is_same = |stat: Stat| !stat.is_ended && stat.start_time == self.start_time;
        self.boot_id == boot_id() && Stat::read(self.pid).is_some_and(is_same)
    }

    /// A descriptor of the very process; `None` when it is gone.
    pub(crate) fn open(&self) -> io::Result<Option<Pidfd>> {
        let raw = i32::try_from(self.pid).ok().and_then(Pid::from_raw);
        let Some(pid) = raw else { return Ok(None) };
        match pidfd_open(pid, PidfdFlags::NONBLOCK) {
            // Checked after opening: from here on the descriptor means this process.
            Ok(fd) if self.is_alive() => register(fd).map(|fd| Some(Pidfd(fd))),
            Ok(_) | Err(rustix::io::Errno::SRCH) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Kills the process and waits until it is gone.
    pub(crate) async fn kill(&self) -> Result<(), HostError> {
        let subject = || format!("process {}", self.pid);
        let pidfd = self.open().map_err(|error| HostError::io("kill", subject(), error))?;
        let Some(pidfd) = pidfd else { return Ok(()) };
        match pidfd_send_signal(&pidfd.0, Signal::KILL) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => {}
            Err(error) => return Err(HostError::io("kill", subject(), error.into())),
        }
        let gone = tokio::time::timeout(DEATH_WAIT, pidfd.exited()).await;
        gone.map_err(|_| HostError::new(HostErrorKind::Transient, "end", subject()))
    }
}

#[expect(unsafe_code, reason = "tokio cannot know that a descriptor stays the same")]
pub(crate) fn register(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an OwnedFd is open and means the same file until it is dropped, which the AsyncFd
    // that owns it does after it has deregistered it.
    let registered = unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) };
    Ok(registered?)
}

/// Watches one process, ours or not.
#[derive(Debug)]
pub(crate) struct Pidfd(AsyncFd<OwnedFd>);

impl Pidfd {
    /// Returns when the process has ended. May be dropped and asked again.
    pub(crate) async fn exited(&self) {
        // Readable means ended, and stays so. An error can only be that of a runtime that ends.
        let _ = self.0.readable().await;
    }
}

struct Stat {
    start_time: u64,
    /// A zombie or a process being torn down: it runs nothing any more.
    is_ended: bool,
}

impl Stat {
    fn read(pid: u32) -> Option<Self> {
        let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The name in parentheses may hold anything; what follows its last one is plain.
        let (_, rest) = text.rsplit_once(')')?;
        let fields: Vec<&str> = rest.split_whitespace().collect();
        let is_ended = matches!(*fields.first()?, "Z" | "X" | "x");
        Some(Self { start_time: fields.get(19)?.parse().ok()?, is_ended })
    }
}

/// Of the running kernel; empty when it cannot be read, which then equals only itself.
pub(crate) fn boot_id() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().to_owned()
}

/// Pids whose command line has an argument that `is_ours` accepts; for what a crash left unrecorded.
pub(crate) fn find_by_argument(is_ours: impl Fn(&str) -> bool) -> Vec<u32> {
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    let pids = entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    pids.filter(|pid| {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        line.split(|&byte| byte == 0).any(|argument| std::str::from_utf8(argument).is_ok_and(&is_ours))
    })
    .collect()
}

/// Where a program is, so that a start need not look for it.
pub(crate) fn find_program(program: &Path) -> Option<PathBuf> {
    if program.components().count() > 1 {
        return program.exists().then(|| program.to_owned());
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).map(|dir| dir.join(program)).find(|found| found.is_file())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_process_is_killed_by_identity_and_a_recycled_pid_is_not() {
        let mut child = std::process::Command::new("sleep").arg("1000").spawn().expect("sleep runs");
        let identity = Identity::of(child.id()).expect("it lives");
        let stranger = Identity { start_time: identity.start_time + 1, ..identity.clone() };
        assert!(!stranger.is_alive());
        stranger.kill().await.expect("killing what is gone is nothing");
        let other_boot = Identity { boot_id: "another".to_owned(), ..identity.clone() };
        assert!(!other_boot.is_alive());
        assert!(identity.is_alive());
        identity.kill().await.expect("killed");
        assert!(!identity.is_alive(), "a zombie is not alive");
        child.wait().expect("reaped");
    }
}
