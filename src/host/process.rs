//! Processes that are not our children: their identity, their death, and how to end them.
//!
//! Guarantees: a process is identified by pid, start time and boot id together, so that a recycled pid is never taken
//! for it. Signals go through a pidfd that was checked after it was opened.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::{OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, Signal, pidfd_getfd, pidfd_open, pidfd_send_signal};
use serde::{Deserialize, Serialize};
use stead_controllers::host::{HostError, HostErrorKind};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Length of a command line that is searched, in bytes. That of a VMM has some 5 kB.
const LINE_BYTES_MAX: u64 = 1 << 20;
/// Time limit for the end of a killed process. The kernel has to free its memory.
const DEATH_WAIT: Duration = Duration::from_secs(20);

/// The identity of a process of one boot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Identity {
    pub(crate) pid: u32,
    /// Start time in clock ticks after boot (field 22 of `/proc/PID/stat`).
    pub(crate) start_time: u64,
    pub(crate) boot_id: String,
}

impl Identity {
    /// Returns the identity of the process that has this pid now.
    ///
    /// # Errors
    /// Returns an error when it cannot be determined, for example without a free descriptor.
    pub(crate) fn of(pid: u32) -> io::Result<Option<Self>> {
        let Some(stat) = Stat::read(pid)?.filter(|stat| !stat.is_ended) else { return Ok(None) };
        Ok(Some(Self { pid, start_time: stat.start_time, boot_id: boot_id()? }))
    }

    /// Returns `true` if the process still runs.
    ///
    /// # Errors
    /// Returns an error when it cannot be determined: a VM whose process cannot be inspected is not dead, and a
    /// second VM beside it would write to the same disk.
    pub(crate) fn is_alive(&self) -> io::Result<bool> {
        let is_same = |stat: Stat| !stat.is_ended && stat.start_time == self.start_time;
        Ok(self.boot_id == boot_id()? && Stat::read(self.pid)?.is_some_and(is_same))
    }

    /// Opens a descriptor of this very process. Returns `None` when it is gone.
    pub(crate) fn open(&self) -> io::Result<Option<Pidfd>> {
        let raw = i32::try_from(self.pid).ok().and_then(Pid::from_raw);
        let Some(pid) = raw else { return Ok(None) };
        match pidfd_open(pid, PidfdFlags::NONBLOCK) {
            // The identity is checked after opening: from here on the descriptor refers to this process.
            Ok(fd) if self.is_alive()? => register(fd).map(|fd| Some(Pidfd(fd))),
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
    // SAFETY: an OwnedFd is open and refers to the same file until it is dropped. The AsyncFd that owns it drops it
    // after it has deregistered it.
    let registered = unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) };
    Ok(registered?)
}

/// A watched process, ours or foreign.
#[derive(Debug)]
pub(crate) struct Pidfd(AsyncFd<OwnedFd>);

impl Pidfd {
    /// Returns when the process has ended. The future may be dropped and requested again.
    pub(crate) async fn exited(&self) {
        // Readable means ended, permanently. An error can only come from a runtime that ends.
        let _ = self.0.readable().await;
    }

    /// Duplicates a descriptor of the process: both refer to the same open file.
    ///
    /// # Errors
    /// Returns an error when the process has no such descriptor, or its descriptors are out of this daemon's reach.
    pub(crate) fn descriptor(&self, number: RawFd) -> io::Result<OwnedFd> {
        Ok(pidfd_getfd(&self.0, number, PidfdGetfdFlags::empty())?)
    }
}

struct Stat {
    start_time: u64,
    /// True for a zombie or a process being torn down, which executes nothing any more.
    is_ended: bool,
}

impl Stat {
    /// Reads the state of a process. Returns `None` when there is no such process.
    fn read(pid: u32) -> io::Result<Option<Self>> {
        let text = fs::read(format!("/proc/{pid}/stat"));
        let Some(text) = of_process(text)? else { return Ok(None) };
        let stat = Self::parse(&String::from_utf8_lossy(&text));
        stat.map(Some).ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "not a process's state"))
    }

    fn parse(text: &str) -> Option<Self> {
        // The name in parentheses may contain anything. The text after its last parenthesis has a fixed format.
        let (_, rest) = text.rsplit_once(')')?;
        let fields: Vec<&str> = rest.split_whitespace().collect();
        let is_ended = matches!(*fields.first()?, "Z" | "X" | "x");
        Some(Self { start_time: fields.get(19)?.parse().ok()?, is_ended })
    }
}

/// Converts a read of a process. Returns `None` when there is no such process any more.
pub(crate) fn of_process<T>(read: io::Result<T>) -> io::Result<Option<T>> {
    match read {
        Ok(read) => Ok(Some(read)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        // The process ended between opening and reading.
        Err(error) if error.raw_os_error() == Some(rustix::io::Errno::SRCH.raw_os_error()) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Returns the id of the current boot of the kernel.
fn boot_id() -> io::Result<String> {
    Ok(fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_owned())
}

/// Finds the process whose command line has an argument that `is_ours` accepts, and which runs as this user if one is
/// given: a process can write anything into its own command line. It finds processes that a crash left unrecorded.
///
/// # Errors
/// Returns an error when a process could not be inspected, because it might be the one.
pub(crate) fn find_by_argument(
    user: Option<u32>,
    is_ours: impl Fn(&str) -> bool,
) -> io::Result<Option<Identity>> {
    for entry in fs::read_dir("/proc")? {
        let pid = entry?.file_name().to_str().and_then(|name| name.parse::<u32>().ok());
        let Some(pid) = pid else { continue };
        let line = of_process(command_line(pid))?.unwrap_or_default();
        let is_one =
            line.split(|&byte| byte == 0).any(|argument| std::str::from_utf8(argument).is_ok_and(&is_ours));
        if !is_one || (user.is_some() && user_of(pid)? != user) {
            continue;
        }
        if let Some(identity) = Identity::of(pid)? {
            return Ok(Some(identity));
        }
    }
    Ok(None)
}

/// Returns the beginning of the command line of a process, which decides itself how much it calls its command line.
fn command_line(pid: u32) -> io::Result<Vec<u8>> {
    let mut line = Vec::new();
    File::open(format!("/proc/{pid}/cmdline"))?.take(LINE_BYTES_MAX).read_to_end(&mut line)?;
    Ok(line)
}

/// Returns the arguments of a process; none if it is gone.
pub(crate) fn arguments(pid: u32) -> io::Result<Vec<String>> {
    let line = of_process(command_line(pid))?.unwrap_or_default();
    let words = line.split(|&byte| byte == 0).map(|word| String::from_utf8_lossy(word).into_owned());
    Ok(words.collect())
}

/// Returns the real user id of a process. Returns `None` when there is no such process.
fn user_of(pid: u32) -> io::Result<Option<u32>> {
    let status = of_process(fs::read_to_string(format!("/proc/{pid}/status")))?.unwrap_or_default();
    let ids = status.lines().find_map(|line| line.strip_prefix("Uid:"));
    Ok(ids.and_then(|ids| ids.split_whitespace().next()?.parse().ok()))
}

/// Returns the path of a program, so that its start need not search for it.
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
        let identity = Identity::of(child.id()).expect("looked at").expect("it lives");
        let foreign = Identity { start_time: identity.start_time + 1, ..identity.clone() };
        assert!(!foreign.is_alive().expect("looked at"));
        foreign.kill().await.expect("killing what is gone is nothing");
        let other_boot = Identity { boot_id: "another".to_owned(), ..identity.clone() };
        assert!(!other_boot.is_alive().expect("looked at"));
        assert!(identity.is_alive().expect("looked at"));
        identity.kill().await.expect("killed");
        assert!(!identity.is_alive().expect("looked at"), "a zombie is not alive");
        child.wait().expect("reaped");
    }
}
