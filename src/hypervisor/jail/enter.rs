//! The steps of the child between its clone and its program.
//!
//! Never: allocates, takes a lock, or returns. Another thread of the daemon may have held any lock when the child
//! was made. So there are only system calls here, on values that were prepared before.
#![expect(unsafe_code, reason = "between clone and exec there are only system calls")]

use std::ffi::{c_char, c_int, c_long, c_ulong};
use std::os::fd::{AsRawFd, RawFd};

use super::{Jail, Walls};
use crate::hypervisor::driver::FIRST_DESCRIPTOR;

/// The parts of a child that a failure is reported of. The number of a part is its position here.
pub(super) const STEPS: [&str; 12] = [
    "begin a session",
    "enter the control group",
    "set the badness for the out-of-memory killer",
    "set signals",
    "set limits",
    "take descriptors",
    "enter namespaces",
    "give up rights",
    "restrict file access",
    "filter system calls",
    "report the filter",
    "run the program",
];

/// First byte of a message that brings the listener of the filter; a failure is the number of a step.
pub(super) const HAS_LISTENER: u8 = u8::MAX;
/// Value of `oom_score_adj` of a VMM: half of the memory of the host on top of its own use, so that VMMs end before
/// the host's services, and the largest of them first.
const OOM_SCORE: &[u8] = b"500";
/// Number of the last capability that the kernel's interface has room for.
const CAPABILITY_LAST: usize = 63;
/// Version 3 of the structure of capset(2).
const CAPABILITY_VERSION: u32 = 0x2008_0522;

/// A step that failed, and the error number.
struct Failure(u8, c_int);

/// Runs the program of the jail, or reports why not and ends. `arguments` are the pointers to the arguments, with a
/// null pointer at the end.
pub(super) fn enter(jail: &Jail, arguments: &[*const c_char], report: RawFd) -> ! {
    let Failure(step, error) = match steps(jail, arguments, report) {
        Ok(never) => match never {},
        Err(failure) => failure,
    };
    let [a, b, c, d] = error.to_ne_bytes();
    let message = [step, a, b, c, d];
    // SAFETY: the message outlives the call, and the child has nothing to run after it.
    unsafe {
        libc::write(report, message.as_ptr().cast(), message.len());
        libc::_exit(127)
    }
}

fn steps(
    jail: &Jail,
    arguments: &[*const c_char],
    report: RawFd,
) -> Result<std::convert::Infallible, Failure> {
    at(0, call(libc::SYS_setsid, [0; 5]))?;
    for entry in &jail.group.entries {
        at(1, write(entry.as_raw_fd(), b"0"))?;
    }
    at(2, set_oom_score())?;
    at(3, set_signals())?;
    at(4, set_limits(jail))?;
    at(5, take_descriptors(jail))?;
    if let Some(walls) = &jail.walls {
        at(6, enter_namespaces(walls))?;
        at(7, give_up_rights(walls.user))?;
        if let Some(rules) = &walls.view.rules {
            at(8, call(libc::SYS_landlock_restrict_self, [number(rules.as_raw_fd()), 0, 0, 0, 0]))?;
        }
        let listener = at(9, filter(walls))?;
        if let Some(listener) = listener {
            at(10, send(report, listener))?;
        }
    }
    let none: *const c_char = std::ptr::null();
    let run = [jail.program.as_ptr() as usize, arguments.as_ptr() as usize, (&raw const none) as usize, 0, 0];
    match at(11, call(libc::SYS_execve, run)) {
        Ok(_) => Err(Failure(11, 0)),
        Err(failure) => Err(failure),
    }
}

fn at<T>(step: u8, done: Result<T, c_int>) -> Result<T, Failure> {
    done.map_err(|error| Failure(step, error))
}

/// Makes a system call. It is not made by a function of the C library where that would do more than the call.
fn call(function: c_long, arguments: [usize; 5]) -> Result<usize, c_int> {
    let [a, b, c, d, e] = arguments;
    // SAFETY: each caller passes the arguments of the call; pointers among them are to values that outlive it.
    let result = unsafe { libc::syscall(function, a, b, c, d, e) };
    usize::try_from(result).map_err(|_| last_error())
}

fn last_error() -> c_int {
    // SAFETY: the error number is a value of the thread.
    unsafe { *libc::__errno_location() }
}

/// Converts a descriptor or a flag to an argument of a call.
fn number(value: impl TryInto<usize>) -> usize {
    value.try_into().unwrap_or(usize::MAX)
}

fn write(to: RawFd, bytes: &[u8]) -> Result<usize, c_int> {
    call(libc::SYS_write, [number(to), bytes.as_ptr() as usize, bytes.len(), 0, 0])
}

fn set_oom_score() -> Result<(), c_int> {
    // An absolute path, so the first argument is not used.
    let path = c"/proc/self/oom_score_adj";
    let flags = number(libc::O_WRONLY | libc::O_CLOEXEC);
    let file = call(libc::SYS_openat, [0, path.as_ptr() as usize, flags, 0, 0])?;
    let written = call(libc::SYS_write, [file, OOM_SCORE.as_ptr() as usize, OOM_SCORE.len(), 0, 0]);
    call(libc::SYS_close, [file, 0, 0, 0, 0])?;
    written.map(drop)
}

/// Lets a write beyond the limit on files fail instead of ending the VMM: an ignored signal stays ignored over exec.
/// Everything else is as in a new process.
fn set_signals() -> Result<(), c_int> {
    for (signal, handler) in [(libc::SIGXFSZ, libc::SIG_IGN), (libc::SIGPIPE, libc::SIG_DFL)] {
        // SAFETY: no handler is installed, and no other thread is in the child.
        if unsafe { libc::signal(signal, handler) } == libc::SIG_ERR {
            return Err(last_error());
        }
    }
    // SAFETY: the set is initialised by sigemptyset, and outlives the call.
    unsafe {
        let mut none = std::mem::zeroed();
        libc::sigemptyset(&raw mut none);
        match libc::sigprocmask(libc::SIG_SETMASK, &raw const none, std::ptr::null_mut()) {
            0 => Ok(()),
            _ => Err(last_error()),
        }
    }
}

fn set_limits(jail: &Jail) -> Result<(), c_int> {
    for &(resource, limit) in &jail.limits {
        let limit = libc::rlimit64 { rlim_cur: limit, rlim_max: limit };
        call(libc::SYS_prlimit64, [0, number(resource), (&raw const limit) as usize, 0, 0])?;
    }
    Ok(())
}

/// Gives the descriptors their numbers. All others are closed by exec.
fn take_descriptors(jail: &Jail) -> Result<(), c_int> {
    let all = jail.standard.iter().chain(&jail.given);
    let mut next = 0;
    for file in all {
        // The numbers differ: those of what was prepared begin above.
        call(libc::SYS_dup3, [number(file.as_raw_fd()), next, 0, 0, 0])?;
        next += 1;
    }
    debug_assert!(next >= number(FIRST_DESCRIPTOR));
    call(libc::SYS_close_range, [next, number(u32::MAX), number(libc::CLOSE_RANGE_CLOEXEC), 0, 0])?;
    if let Some(kept) = jail.kept {
        call(libc::SYS_fcntl, [number(kept), number(libc::F_SETFD), 0, 0, 0])?;
    }
    Ok(())
}

fn enter_namespaces(walls: &Walls) -> Result<(), c_int> {
    // The pid, network, IPC and UTS namespaces are those of the clone. This one begins at the group of the child.
    if walls.namespaces & number(libc::CLONE_NEWCGROUP) as u64 != 0 {
        call(libc::SYS_unshare, [number(libc::CLONE_NEWCGROUP), 0, 0, 0, 0])?;
    }
    if walls.namespaces & number(libc::CLONE_NEWUTS) as u64 != 0 {
        let name = b"vm";
        call(libc::SYS_sethostname, [name.as_ptr() as usize, name.len(), 0, 0, 0])?;
    }
    // A keyring of its own; a kernel without keyrings has none to protect.
    let keyring = call(libc::SYS_keyctl, [number(libc::KEYCTL_JOIN_SESSION_KEYRING), 0, 0, 0, 0]);
    if keyring.is_err_and(|error| error != libc::ENOSYS) {
        return Err(libc::EPERM);
    }
    let view = number(walls.view.namespace.as_raw_fd());
    call(libc::SYS_setns, [view, number(libc::CLONE_NEWNS), 0, 0, 0])?;
    call(libc::SYS_chdir, [c"/".as_ptr() as usize, 0, 0, 0, 0]).map(drop)
}

#[repr(C)]
struct CapabilityHeader {
    version: u32,
    pid: c_int,
}

/// Becomes an unprivileged user for ever. The functions of the C library would change all threads of the daemon's
/// copy, of which the child has none.
fn give_up_rights(user: u32) -> Result<(), c_int> {
    let prctl = |option: c_int, value: usize| call(libc::SYS_prctl, [number(option), value, 0, 0, 0]);
    for capability in 0..=CAPABILITY_LAST {
        match prctl(libc::PR_CAPBSET_DROP, capability) {
            Ok(_) => {}
            // The kernel has fewer.
            Err(libc::EINVAL) => break,
            Err(error) => return Err(error),
        }
    }
    prctl(libc::PR_CAP_AMBIENT, number(libc::PR_CAP_AMBIENT_CLEAR_ALL))?;
    // A program of user 0 gets no capabilities, and none becomes ambient; the child cannot change that again.
    let bits = libc::SECBIT_NOROOT
        | libc::SECBIT_NOROOT_LOCKED
        | libc::SECBIT_KEEP_CAPS_LOCKED
        | libc::SECBIT_NO_CAP_AMBIENT_RAISE
        | libc::SECBIT_NO_CAP_AMBIENT_RAISE_LOCKED;
    prctl(libc::PR_SET_SECUREBITS, number(bits))?;
    let id = number(user);
    call(libc::SYS_setgroups, [0; 5])?;
    call(libc::SYS_setresgid, [id, id, id, 0, 0])?;
    call(libc::SYS_setresuid, [id, id, id, 0, 0])?;
    let header = CapabilityHeader { version: CAPABILITY_VERSION, pid: 0 };
    // Effective, permitted and inheritable ones, of two words each.
    let none = [0_u32; 6];
    call(libc::SYS_capset, [(&raw const header) as usize, none.as_ptr() as usize, 0, 0, 0])?;
    prctl(libc::PR_SET_NO_NEW_PRIVS, 1).map(drop)
}

/// Installs the filters and returns the listener of the second one.
fn filter(walls: &Walls) -> Result<Option<RawFd>, c_int> {
    const SET_MODE_FILTER: usize = 1;
    let install = |filter: &[seccompiler::sock_filter], flags: c_ulong| {
        let program = libc::sock_fprog {
            len: u16::try_from(filter.len()).unwrap_or(0),
            // The layout is that of the kernel, as in libc.
            filter: filter.as_ptr().cast_mut().cast(),
        };
        call(libc::SYS_seccomp, [SET_MODE_FILTER, number(flags), (&raw const program) as usize, 0, 0])
    };
    let Some(filters) = &walls.filters else { return Ok(None) };
    install(&filters.refused, 0)?;
    if walls.opens.is_empty() {
        return install(&filters.opens, 0).map(|_| None);
    }
    let listener = install(&filters.opens, libc::SECCOMP_FILTER_FLAG_NEW_LISTENER)?;
    Ok(RawFd::try_from(listener).ok())
}

/// Room for the header and one descriptor of a control message.
#[repr(C, align(8))]
struct Control([u8; 24]);

fn send(report: RawFd, descriptor: RawFd) -> Result<(), c_int> {
    let mut tag = [HAS_LISTENER];
    let mut bytes = libc::iovec { iov_base: tag.as_mut_ptr().cast(), iov_len: tag.len() };
    let mut control = Control([0; 24]);
    // SAFETY: a message of zeros is an empty one. The control message has room for its header and one descriptor:
    // CMSG_SPACE(4) is 24. All values outlive the call.
    unsafe {
        let mut message: libc::msghdr = std::mem::zeroed();
        message.msg_iov = &raw mut bytes;
        message.msg_iovlen = 1;
        message.msg_control = (&raw mut control).cast();
        message.msg_controllen = libc::CMSG_SPACE(4) as usize;
        let header = libc::CMSG_FIRSTHDR(&raw const message);
        (*header).cmsg_level = libc::SOL_SOCKET;
        (*header).cmsg_type = libc::SCM_RIGHTS;
        (*header).cmsg_len = libc::CMSG_LEN(4) as usize;
        libc::CMSG_DATA(header).cast::<RawFd>().write_unaligned(descriptor);
        if libc::sendmsg(report, &raw const message, 0) < 0 { Err(last_error()) } else { Ok(()) }
    }
}
