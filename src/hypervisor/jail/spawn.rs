//! The child: its clone, its report, and its end.

use std::ffi::c_char;
use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};

use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SocketFlags, SocketType, recvmsg,
    socketpair,
};
use rustix::process::{Signal, WaitId, WaitIdOptions, WaitIdStatus, pidfd_send_signal, waitid};
use tokio::sync::oneshot;

use super::enter::{HAS_LISTENER, STEPS, enter};
use super::opens::Opens;
use super::{Jail, prepared};
use crate::host::process::register;

/// CLONE_INTO_CGROUP: the constant of libc is too narrow for its value.
const INTO_CGROUP: u64 = 0x2_0000_0000;

/// A VMM that runs its program. It is reaped when it ends, while this daemon lives.
#[derive(Debug)]
pub struct Spawned {
    pub pid: u32,
    /// The way in which the process ended.
    pub ended: oneshot::Receiver<String>,
    /// Answers the opens of a VMM that starts.
    pub(crate) opens: Option<Opens>,
}

/// Spawns the VMM of a jail, and returns when its program runs. Waits for the child.
///
/// # Errors
/// The error of the child's step that failed, named.
pub(crate) fn spawn(jail: Jail) -> io::Result<Spawned> {
    let flags = SocketFlags::CLOEXEC;
    let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
    // Out of the way of the numbers that the child gives.
    let theirs = prepared(theirs)?;
    let (pid, process) = clone(&jail, theirs.as_raw_fd())?;
    drop(theirs);
    let listener = match run(&ours) {
        Ok(listener) => listener,
        Err(error) => {
            let _ = waitid(WaitId::PidFd(process.as_fd()), WaitIdOptions::EXITED);
            return Err(error);
        }
    };
    let for_failure = process.try_clone()?;
    let watched = watch(pid, process, listener, jail);
    if watched.is_err() {
        // Nobody would notice its end.
        let _ = pidfd_send_signal(&for_failure, Signal::KILL);
        let _ = waitid(WaitId::PidFd(for_failure.as_fd()), WaitIdOptions::EXITED);
    }
    watched
}

fn watch(pid: u32, process: OwnedFd, listener: Option<OwnedFd>, jail: Jail) -> io::Result<Spawned> {
    let opens = match (listener, jail.walls) {
        (Some(listener), Some(walls)) => Some(Opens::new(listener, pid, walls.opens)?),
        _ => None,
    };
    Ok(Spawned { pid, ended: reap(process)?, opens })
}

/// Receives the report of a child: the listener of its filter, and then nothing more when its program runs.
fn run(report: &OwnedFd) -> io::Result<Option<OwnedFd>> {
    let mut listener = None;
    loop {
        let mut bytes = [0; 5];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let received =
            recvmsg(report, &mut [IoSliceMut::new(&mut bytes)], &mut control, RecvFlags::CMSG_CLOEXEC);
        let length = match received {
            Ok(message) => message.bytes,
            Err(rustix::io::Errno::INTR) => continue,
            Err(error) => return Err(error.into()),
        };
        let passed = control.drain().find_map(|message| match message {
            RecvAncillaryMessage::ScmRights(mut files) => files.next(),
            _ => None,
        });
        match (length, bytes[0]) {
            (0, _) => return Ok(listener),
            (_, HAS_LISTENER) => listener = passed,
            (_, step) => {
                let [_, a, b, c, d] = bytes;
                let error = io::Error::from_raw_os_error(i32::from_ne_bytes([a, b, c, d]));
                let step = STEPS.get(usize::from(step)).copied().unwrap_or("start");
                return Err(io::Error::new(error.kind(), format!("{step}: {error}")));
            }
        }
    }
}

/// Makes the child, which never returns from here. Signals wait meanwhile: a handler of the daemon must not run in
/// the child, because it would write to the daemon's pipes.
#[expect(unsafe_code, reason = "no library makes a process in namespaces and a control group of its own")]
fn clone(jail: &Jail, report: RawFd) -> io::Result<(u32, OwnedFd)> {
    let mut arguments: Vec<*const c_char> = jail.arguments.iter().map(|argument| argument.as_ptr()).collect();
    arguments.push(std::ptr::null());
    let mut pidfd: RawFd = -1;
    // SAFETY: all zero is a valid value: nothing is requested.
    let mut request: libc::clone_args = unsafe { std::mem::zeroed() };
    request.pidfd = (&raw mut pidfd) as u64;
    request.exit_signal = libc::SIGCHLD as u64;
    request.flags = libc::CLONE_PIDFD as u64;
    if let Some(walls) = &jail.walls {
        // The cgroup namespace begins at the group of the process that makes it: the child does that itself.
        request.flags |= walls.namespaces & !(libc::CLONE_NEWCGROUP as u64);
    }
    if let Some(group) = &jail.group.directory {
        request.flags |= INTO_CGROUP;
        request.cgroup = u64::from(group.as_raw_fd().cast_unsigned());
    }
    // SAFETY: the signal sets are initialised by the calls. The child gets a copy of the memory, and only makes
    // system calls in `enter`. The pidfd that the kernel returns belongs to nobody else.
    unsafe {
        let (mut all, mut before) = (std::mem::zeroed(), std::mem::zeroed());
        libc::sigfillset(&raw mut all);
        libc::pthread_sigmask(libc::SIG_SETMASK, &raw const all, &raw mut before);
        let pid = libc::syscall(libc::SYS_clone3, &raw const request, size_of::<libc::clone_args>());
        if pid == 0 {
            enter(jail, &arguments, report);
        }
        let error = io::Error::last_os_error();
        libc::pthread_sigmask(libc::SIG_SETMASK, &raw const before, std::ptr::null_mut());
        match u32::try_from(pid) {
            Ok(pid) => Ok((pid, OwnedFd::from_raw_fd(pidfd))),
            Err(_) => Err(io::Error::new(error.kind(), format!("make a process: {error}"))),
        }
    }
}

/// Collects the status of the process when it ends.
fn reap(process: OwnedFd) -> io::Result<oneshot::Receiver<String>> {
    let process = register(process)?;
    let (report, ended) = oneshot::channel();
    tokio::spawn(async move {
        let _ = process.readable().await;
        let status =
            waitid(WaitId::PidFd(process.get_ref().as_fd()), WaitIdOptions::EXITED | WaitIdOptions::NOHANG);
        let _ = report.send(match status {
            Ok(Some(status)) => in_words(&status),
            Ok(None) => "its end was not reported".to_owned(),
            Err(error) => error.to_string(),
        });
    });
    Ok(ended)
}

fn in_words(status: &WaitIdStatus) -> String {
    match (status.exit_status(), status.terminating_signal()) {
        (Some(code), _) => format!("exit status: {code}"),
        (None, Some(signal)) => format!("signal: {signal}"),
        (None, None) => "it ended".to_owned(),
    }
}
