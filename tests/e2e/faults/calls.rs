//! The system calls that can fail for lack of a resource, the objects of each, and their possible errors.

use std::fs;
use std::os::unix::fs::FileExt;

use libc::{c_long, seccomp_notif};
use rustix::io::Errno;

use super::filter::When;

/// Limit on the length of a path that is read from a call, in bytes.
const PATH_BYTES: usize = 4096;

/// The object of a call.
#[derive(Debug, Clone, Copy)]
enum Object {
    /// A path in the second argument, relative to the descriptor in the first.
    At,
    /// A path in the first argument.
    Path,
    /// The file of a descriptor in this argument.
    Descriptor(usize),
    /// The path in the last two arguments: the target of a rename or link.
    To(usize),
    /// A new descriptor of any kind.
    New,
}

/// Errors for lack of descriptors or memory.
const DESCRIPTORS: &[Errno] = &[Errno::MFILE, Errno::NOMEM];
const OPENING: &[Errno] = &[Errno::MFILE, Errno::IO, Errno::NOMEM];
const MAKING: &[Errno] = &[Errno::NOSPC, Errno::MFILE, Errno::IO, Errno::NOMEM];
const WRITING: &[Errno] = &[Errno::NOSPC, Errno::IO];
const NAMING: &[Errno] = &[Errno::NOSPC, Errno::IO, Errno::NOMEM];
const READING: &[Errno] = &[Errno::IO, Errno::NOMEM];
const MAPPING: &[Errno] = &[Errno::NOMEM];

/// Flags of an open that may create a file.
const MAKES: u64 = (libc::O_CREAT | (libc::O_TMPFILE & !libc::O_DIRECTORY)) as u64;

/// Calls, by number and name. Those that create files are recognised when they are read.
const CALLS: &[(c_long, &str, When, Object, &[Errno])] = &[
    (libc::SYS_openat, "open", When::Always, Object::At, OPENING),
    (libc::SYS_write, "write", When::Above(0, 2), Object::Descriptor(0), WRITING),
    (libc::SYS_pwrite64, "write", When::Always, Object::Descriptor(0), WRITING),
    (libc::SYS_writev, "write", When::Above(0, 2), Object::Descriptor(0), WRITING),
    (libc::SYS_pwritev, "write", When::Always, Object::Descriptor(0), WRITING),
    (libc::SYS_read, "read", When::Above(0, 2), Object::Descriptor(0), READING),
    (libc::SYS_pread64, "read", When::Always, Object::Descriptor(0), READING),
    (libc::SYS_readv, "read", When::Always, Object::Descriptor(0), READING),
    (libc::SYS_fsync, "sync", When::Always, Object::Descriptor(0), WRITING),
    (libc::SYS_fdatasync, "sync", When::Always, Object::Descriptor(0), WRITING),
    (libc::SYS_sync_file_range, "sync", When::Always, Object::Descriptor(0), WRITING),
    (libc::SYS_syncfs, "sync", When::Always, Object::Descriptor(0), WRITING),
    (libc::SYS_ftruncate, "truncate", When::Always, Object::Descriptor(0), WRITING),
    (libc::SYS_fallocate, "allocate", When::Always, Object::Descriptor(0), WRITING),
    (libc::SYS_copy_file_range, "copy", When::Always, Object::Descriptor(2), WRITING),
    (libc::SYS_sendfile, "copy", When::Always, Object::Descriptor(0), WRITING),
    (libc::SYS_ioctl, "clone", When::Is(1, 0x4004_9409), Object::Descriptor(0), WRITING),
    (libc::SYS_lseek, "seek", When::Above(2, 2), Object::Descriptor(0), READING),
    (libc::SYS_getdents64, "list", When::Always, Object::Descriptor(0), READING),
    (libc::SYS_statx, "stat", When::Always, Object::At, READING),
    (libc::SYS_newfstatat, "stat", When::Always, Object::At, READING),
    (libc::SYS_fstat, "stat", When::Always, Object::Descriptor(0), READING),
    (libc::SYS_statfs, "space", When::Always, Object::Path, READING),
    (libc::SYS_fstatfs, "space", When::Always, Object::Descriptor(0), READING),
    (libc::SYS_readlinkat, "readlink", When::Always, Object::At, READING),
    (libc::SYS_flock, "lock", When::Always, Object::Descriptor(0), MAPPING),
    (libc::SYS_fchmod, "mode", When::Always, Object::Descriptor(0), WRITING),
    (libc::SYS_fchmodat, "mode", When::Always, Object::At, WRITING),
    (libc::SYS_fchown, "owner", When::Always, Object::Descriptor(0), WRITING),
    (libc::SYS_fchownat, "owner", When::Always, Object::At, WRITING),
    (libc::SYS_utimensat, "times", When::Always, Object::At, WRITING),
    (libc::SYS_mkdirat, "mkdir", When::Always, Object::At, NAMING),
    (libc::SYS_unlinkat, "remove", When::Always, Object::At, READING),
    (libc::SYS_renameat, "rename", When::Always, Object::To(2), NAMING),
    (libc::SYS_renameat2, "rename", When::Always, Object::To(2), NAMING),
    (libc::SYS_linkat, "link", When::Always, Object::To(2), NAMING),
    (libc::SYS_symlinkat, "link", When::Always, Object::To(1), NAMING),
    (libc::SYS_mknodat, "make", When::Always, Object::At, NAMING),
    (libc::SYS_mmap, "map", When::IsNot(4, u32::MAX), Object::Descriptor(4), MAPPING),
    (libc::SYS_socket, "socket", When::Always, Object::New, DESCRIPTORS),
    (libc::SYS_socketpair, "socketpair", When::Always, Object::New, DESCRIPTORS),
    (libc::SYS_accept4, "accept", When::Always, Object::New, DESCRIPTORS),
    (libc::SYS_pipe2, "pipe", When::Always, Object::New, DESCRIPTORS),
    (libc::SYS_memfd_create, "memfd", When::Always, Object::New, DESCRIPTORS),
    (libc::SYS_eventfd2, "eventfd", When::Always, Object::New, DESCRIPTORS),
    (libc::SYS_epoll_create1, "epoll", When::Always, Object::New, DESCRIPTORS),
    (libc::SYS_timerfd_create, "timerfd", When::Always, Object::New, DESCRIPTORS),
    (libc::SYS_inotify_init1, "inotify", When::Always, Object::New, DESCRIPTORS),
    (libc::SYS_inotify_add_watch, "watch", When::Always, Object::To(0), &[Errno::NOSPC, Errno::NOMEM]),
    (libc::SYS_pidfd_open, "pidfd", When::Always, Object::New, DESCRIPTORS),
    (libc::SYS_fcntl, "dup", When::Is(1, libc::F_DUPFD_CLOEXEC as u32), Object::New, DESCRIPTORS),
    #[cfg(target_arch = "x86_64")]
    (libc::SYS_open, "open", When::Always, Object::Path, OPENING),
    #[cfg(target_arch = "x86_64")]
    (libc::SYS_stat, "stat", When::Always, Object::Path, READING),
    #[cfg(target_arch = "x86_64")]
    (libc::SYS_lstat, "stat", When::Always, Object::Path, READING),
    #[cfg(target_arch = "x86_64")]
    (libc::SYS_readlink, "readlink", When::Always, Object::Path, READING),
    #[cfg(target_arch = "x86_64")]
    (libc::SYS_chmod, "mode", When::Always, Object::Path, WRITING),
    #[cfg(target_arch = "x86_64")]
    (libc::SYS_chown, "owner", When::Always, Object::Path, WRITING),
    #[cfg(target_arch = "x86_64")]
    (libc::SYS_mkdir, "mkdir", When::Always, Object::Path, NAMING),
    #[cfg(target_arch = "x86_64")]
    (libc::SYS_rmdir, "remove", When::Always, Object::Path, READING),
    #[cfg(target_arch = "x86_64")]
    (libc::SYS_unlink, "remove", When::Always, Object::Path, READING),
    #[cfg(target_arch = "x86_64")]
    (libc::SYS_truncate, "truncate", When::Always, Object::Path, WRITING),
    #[cfg(target_arch = "x86_64")]
    (libc::SYS_rename, "rename", When::Always, Object::To(0), NAMING),
    #[cfg(target_arch = "x86_64")]
    (libc::SYS_link, "link", When::Always, Object::To(0), NAMING),
    #[cfg(target_arch = "x86_64")]
    (libc::SYS_symlink, "link", When::Always, Object::To(0), NAMING),
];

/// Lists the calls that the filter reports.
pub(crate) fn asked_about() -> Vec<(c_long, When)> {
    CALLS.iter().map(|(number, _, when, _, _)| (*number, *when)).collect()
}

/// A class of calls: the call and its object, such as `write DATA/db/db`. Names that differ from run to run are
/// unified.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Class {
    /// Name of the program, if it is not the daemon.
    pub(crate) program: Option<String>,
    pub(crate) call: &'static str,
    pub(crate) target: String,
}

impl std::fmt::Display for Class {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if let Some(program) = &self.program {
            write!(f, "[{program}] ")?;
        }
        write!(f, "{} {}", self.call, self.target)
    }
}

impl Class {
    /// Returns the errors that this call can give. An object that is on no disk cannot be full or broken.
    pub(crate) fn errors(&self) -> Vec<Errno> {
        let all = match self.call {
            "create" => MAKING,
            call => CALLS.iter().find(|known| known.1 == call).map_or(&[][..], |known| known.4),
        };
        let is_on_disk = self.target.starts_with("DATA") || self.target.starts_with("RUN");
        let can_be = |error: &&Errno| {
            is_on_disk || !matches!(**error, Errno::NOSPC | Errno::IO) || self.call == "watch"
        };
        let some: Vec<Errno> = all.iter().filter(can_be).copied().collect();
        if some.is_empty() { MAPPING.to_vec() } else { some }
    }
}

/// The directories of a daemon.
#[derive(Debug, Clone)]
pub(crate) struct Roots {
    pub(crate) data: String,
    pub(crate) run: String,
}

/// Reads a class without its program. Returns `None` for calls that do not matter.
pub(crate) fn read(asked: &seccomp_notif, roots: &Roots) -> Option<(&'static str, String)> {
    let (_, call, _, object, _) = CALLS.iter().find(|known| known.0 == c_long::from(asked.data.nr))?;
    let (pid, arguments) = (asked.pid, asked.data.args);
    let path = match *object {
        Object::New => return Some((call, "*".to_owned())),
        Object::Descriptor(at) => of_descriptor(pid, arguments[at])?,
        Object::Path => text(pid, arguments[0])?,
        Object::At => at(pid, arguments[0], arguments[1])?,
        // `rename` and `link` have no directories in their arguments; in the `*at` calls one precedes the second
        // path.
        Object::To(0) => text(pid, arguments[1])?,
        Object::To(to) => at(pid, arguments[to], arguments[to + 1])?,
    };
    let is_open = *call == "open";
    let flags = if matches!(object, Object::Path) { arguments[1] } else { arguments[2] };
    let call = if is_open && flags & MAKES != 0 { "create" } else { call };
    Some((call, normal(&path, roots)?))
}

fn of_descriptor(pid: u32, descriptor: u64) -> Option<String> {
    // A descriptor is an int.
    let descriptor = descriptor & u64::from(u32::MAX);
    let path = fs::read_link(format!("/proc/{pid}/fd/{descriptor}")).ok()?;
    Some(path.to_string_lossy().into_owned())
}

fn text(pid: u32, address: u64) -> Option<String> {
    let memory = fs::File::open(format!("/proc/{pid}/mem")).ok()?;
    let mut bytes = vec![0; PATH_BYTES];
    let count = memory.read_at(&mut bytes, address).ok()?;
    let end = bytes[..count].iter().position(|byte| *byte == 0)?;
    Some(String::from_utf8_lossy(&bytes[..end]).into_owned())
}

fn at(pid: u32, directory: u64, path: u64) -> Option<String> {
    let path = text(pid, path).unwrap_or_default();
    if path.starts_with('/') {
        return Some(path);
    }
    let is_here = directory & u64::from(u32::MAX) == u64::from(libc::AT_FDCWD.cast_unsigned());
    let base = if is_here {
        fs::read_link(format!("/proc/{pid}/cwd")).ok()?.to_string_lossy().into_owned()
    } else {
        of_descriptor(pid, directory)?
    };
    Some(if path.is_empty() { base } else { format!("{base}/{path}") })
}

/// File that the C library's allocator reads once, at a moment of its own. Without it, it gives no memory back.
const OF_THE_ALLOCATOR: &str = "/proc/sys/vm/overcommit_memory";

/// Returns a path without the parts that differ from run to run, or `None` for files that do not matter: sockets,
/// pipes, the libraries that a program loads, and what the allocator reads.
fn normal(path: &str, roots: &Roots) -> Option<String> {
    let path = path.trim_end_matches('/');
    let path = match (path.strip_prefix(&roots.data), path.strip_prefix(&roots.run)) {
        (Some(rest), _) => format!("DATA{rest}"),
        (_, Some(rest)) => format!("RUN{rest}"),
        _ if path.starts_with("/memfd:") => return Some("memfd".to_owned()),
        _ if path == OF_THE_ALLOCATOR => return None,
        _ if path.starts_with("/proc/") => path.to_owned(),
        _ if path.starts_with("/sys/") => return Some("/sys".to_owned()),
        _ if path.starts_with("/dev/net") => return Some("/dev/net/tun".to_owned()),
        _ => return None,
    };
    Some(path.split('/').map(name).collect::<Vec<_>>().join("/"))
}

/// Returns a name without the parts that belong to one object or run, or are random.
fn name(name: &str) -> String {
    if name.starts_with(".tmp") || name.starts_with('#') {
        return "TEMPORARY".to_owned();
    }
    // The name of a TAP fills the interface name behind the prefix of the site.
    if name.len() == 12 && name.starts_with(crate::harness::TAP_PREFIX) {
        return "TAP".to_owned();
    }
    let in_part = |part: &str| {
        let is = |of: fn(&u8) -> bool| part.as_bytes().iter().all(of);
        match part.len() {
            24 if is(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit()) => "UID".to_owned(),
            32.. if is(u8::is_ascii_hexdigit) => "DIGEST".to_owned(),
            8.. if is(u8::is_ascii_hexdigit) => "N".to_owned(),
            1.. if is(u8::is_ascii_digit) => "N".to_owned(),
            _ => part.to_owned(),
        }
    };
    let name = name.strip_suffix(" (deleted)").unwrap_or(name);
    let mut out = String::new();
    for part in name.split_inclusive(['.', '-', ':', '_']) {
        let end = part.len() - usize::from(part.ends_with(['.', '-', ':', '_']));
        out.push_str(&in_part(&part[..end]));
        out.push_str(&part[end..]);
    }
    out
}
