//! A filter on the system calls of a child process that asks this process for the result of each (user notifications
//! of seccomp). No maintained crate has them without a library that is not installed here (`libseccomp` binds to one,
//! `seccompiler` has no notifications), so the two system calls are made directly.
//!
//! All descendants of the child inherit the filter.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command};

use libc::{seccomp_notif, seccomp_notif_resp, sock_filter};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};

/// Offset of the number of the call in `seccomp_data`, in bytes.
const NUMBER: u32 = 0;
/// Offset of the lower half of the first argument; each argument has eight bytes.
const ARGUMENTS: u32 = 16;

/// The condition under which a call is reported.
#[derive(Debug, Clone, Copy)]
pub(crate) enum When {
    Always,
    /// The argument, counted from 0, has the value.
    Is(u32, u32),
    /// The argument has any other value.
    IsNot(u32, u32),
    /// The argument is larger than the value.
    Above(u32, u32),
}

fn statement(code: u32, k: u32) -> sock_filter {
    sock_filter { code: u16::try_from(code).expect("an opcode"), jt: 0, jf: 0, k }
}

fn jump(code: u32, k: u32, jt: u8, jf: u8) -> sock_filter {
    sock_filter { jt, jf, ..statement(libc::BPF_JMP | code | libc::BPF_K, k) }
}

/// Returns a filter program that reports these calls and allows all others.
pub(crate) fn program(calls: &[(libc::c_long, When)]) -> Vec<sock_filter> {
    let load = |at| statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, at);
    let answer = |what| statement(libc::BPF_RET | libc::BPF_K, what);
    let mut program = vec![load(NUMBER)];
    for (number, when) in calls {
        let number = u32::try_from(*number).expect("a number of a call");
        let rule = match *when {
            When::Always => vec![answer(libc::SECCOMP_RET_USER_NOTIF)],
            When::Is(at, value) => vec![load(ARGUMENTS + 8 * at), jump(libc::BPF_JEQ, value, 1, 0)],
            When::IsNot(at, value) => vec![load(ARGUMENTS + 8 * at), jump(libc::BPF_JEQ, value, 0, 1)],
            When::Above(at, value) => vec![load(ARGUMENTS + 8 * at), jump(libc::BPF_JGT, value, 1, 0)],
        };
        let ends = rule.len() > 1;
        let length = u8::try_from(rule.len() + if ends { 2 } else { 0 }).expect("a short rule");
        program.push(jump(libc::BPF_JEQ, number, 0, length));
        program.extend(rule);
        if ends {
            program.extend([answer(libc::SECCOMP_RET_ALLOW), answer(libc::SECCOMP_RET_USER_NOTIF)]);
        }
    }
    program.push(answer(libc::SECCOMP_RET_ALLOW));
    program
}

/// Sets the filter for the calling thread and the program that it executes. Returns the listener for its reports.
#[expect(unsafe_code, reason = "neither std nor rustix has this system call")]
fn install(program: &[sock_filter]) -> io::Result<OwnedFd> {
    let length = u16::try_from(program.len()).map_err(io::Error::other)?;
    let program = libc::sock_fprog { len: length, filter: program.as_ptr().cast_mut() };
    let flags = libc::SECCOMP_FILTER_FLAG_NEW_LISTENER | libc::SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV;
    // SAFETY: the pointer is to a program that lives until the call returns; the kernel only reads it.
    let made =
        unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, flags, &raw const program) };
    match RawFd::try_from(made) {
        // SAFETY: the kernel has just created the descriptor for us.
        Ok(listener) if listener >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(listener) }),
        _ => Err(io::Error::last_os_error()),
    }
}

fn hand_over(to: &UnixStream, listener: &OwnedFd) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let descriptors = [listener.as_fd()];
    control.push(SendAncillaryMessage::ScmRights(&descriptors));
    sendmsg(to, &[IoSlice::new(b"f")], &mut control, SendFlags::empty())?;
    Ok(())
}

fn take_over(from: &UnixStream) -> io::Result<OwnedFd> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    recvmsg(from, &mut [IoSliceMut::new(&mut [0])], &mut control, RecvFlags::CMSG_CLOEXEC)?;
    let descriptors = control.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(descriptors) => Some(descriptors),
        _ => None,
    });
    descriptors.flatten().next().ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
}

/// Starts the command under the filter. It waits at its first reported call.
#[expect(unsafe_code, reason = "pre_exec is the one way to set a filter for the child alone")]
pub(crate) fn spawn(command: &mut Command, program: Vec<sock_filter>) -> io::Result<(Child, OwnedFd)> {
    let (ours, childs) = UnixStream::pair()?;
    let set = move || install(&program).and_then(|listener| hand_over(&childs, &listener));
    // SAFETY: this runs between fork and exec, makes only system calls, and allocates nothing.
    unsafe { command.pre_exec(set) };
    let child = command.spawn()?;
    Ok((child, take_over(&ours)?))
}

/// Returns the next report, or `None` when no filtered process is left.
#[expect(unsafe_code, reason = "neither std nor rustix has this request in a safe form")]
pub(crate) fn next(listener: &OwnedFd) -> Option<seccomp_notif> {
    use rustix::event::{PollFd, PollFlags, poll};
    loop {
        let mut wait = [PollFd::new(listener, PollFlags::IN)];
        match poll(&mut wait, None) {
            Ok(_) if wait[0].revents().contains(PollFlags::IN) => {}
            Err(rustix::io::Errno::INTR) => continue,
            _ => return None,
        }
        // SAFETY: all zeros is a valid value, and the kernel requires it.
        let mut asked: seccomp_notif = unsafe { std::mem::zeroed() };
        // SAFETY: the kernel writes one `seccomp_notif` there.
        let got =
            unsafe { libc::ioctl(listener.as_raw_fd(), libc::SECCOMP_IOCTL_NOTIF_RECV, &raw mut asked) };
        if got == 0 {
            return Some(asked);
        }
        // The calling process was killed before its report could be read.
    }
}

/// Answers a report: the call continues, or fails with this error.
#[expect(unsafe_code, reason = "neither std nor rustix has this request in a safe form")]
pub(crate) fn answer(listener: &OwnedFd, asked: &seccomp_notif, error: Option<rustix::io::Errno>) {
    let mut answer = seccomp_notif_resp { id: asked.id, val: 0, error: 0, flags: 0 };
    match error {
        Some(error) => answer.error = -error.raw_os_error(),
        None => answer.flags = u32::try_from(libc::SECCOMP_USER_NOTIF_FLAG_CONTINUE).expect("one bit"),
    }
    // SAFETY: the kernel reads one `seccomp_notif_resp` there. A process that was killed meanwhile needs no answer.
    unsafe { libc::ioctl(listener.as_raw_fd(), libc::SECCOMP_IOCTL_NOTIF_SEND, &raw mut answer) };
}
