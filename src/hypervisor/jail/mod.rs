//! The walls around every VMM, whatever its driver.
//!
//! ```text
//! mod          Jail: all that the child needs, prepared by the daemon before the child exists
//! build        from the needs of a driver to a Jail; opens the files that are handed over
//! carrier      the same for the process that carries mediated egress
//! spawn        the child: its clone, its report, and its end
//! enter        the system calls of the child, in their order
//! view         the mount namespace with the program and its files
//! libraries    the shared libraries of a program
//! filters      the seccomp programs
//! opens        files that a VMM opens by a path while it starts, and gets as descriptors
//! users        the user ids of VMMs
//! seen         the walls around a process, as the kernel reports them
//! ```
//!
//! A VMM is the first process of its own pid, network, IPC, UTS and cgroup namespaces, under a user id of its own
//! that owns no file. It has no capability and can get none. It sees a read-only file system with its program,
//! the program's libraries and data, and nothing else: no `/proc`, no devices, no sockets, and no directory that
//! can be written to. Everything that belongs to a VM is a descriptor that the daemon opened.
//! Guarantees: a step that fails ends the child before the program of the VMM runs.
//! Assumes: Linux 5.14 for seccomp's passing of descriptors. What a kernel lacks besides is left out, and
//! reported.

mod build;
mod carrier;
mod enter;
mod filters;
mod libraries;
mod opens;
mod seen;
mod spawn;
mod users;
mod view;

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, OwnedFd, RawFd};
use std::sync::Arc;

pub(crate) use self::build::Given;
pub use self::build::Jails;
pub(crate) use self::carrier::CarrierCommand;
pub use self::seen::{host_walls, missing_walls};
pub use self::spawn::Spawned;
pub(crate) use self::spawn::spawn;
pub use self::users::{USERS, UserRange};
use crate::host::cgroup::Group;

/// Descriptors from this number on are those of the daemon's preparations; the numbers below are free in the
/// child for what the VMM gets. A VMM has 2 descriptors for each disk and some 10 more, at most 61 together.
pub(crate) const PREPARED_FIRST: RawFd = 64;

/// Moves a descriptor out of the way of the numbers that the child gives.
fn prepared(file: impl Into<OwnedFd>) -> io::Result<OwnedFd> {
    Ok(rustix::io::fcntl_dupfd_cloexec(file.into().as_fd(), PREPARED_FIRST)?)
}

/// The description of one VMM's process: everything is prepared, so that the child only makes system calls.
#[derive(Debug)]
pub(crate) struct Jail {
    program: CString,
    /// The arguments, the name of the program first.
    arguments: Vec<CString>,
    /// The standard input, output and error.
    standard: [OwnedFd; 3],
    /// The descriptors of the VMM, in the order of their numbers.
    given: Vec<OwnedFd>,
    /// A descriptor that keeps its number, for a VMM without walls.
    kept: Option<RawFd>,
    /// Resources and the limits on them.
    limits: Vec<(u32, u64)>,
    group: Group,
    /// The walls, or `None` for a VMM that reaches the whole host.
    walls: Option<Walls>,
}

/// The walls around one VMM.
#[derive(Debug)]
struct Walls {
    user: u32,
    /// The namespaces of its own, as flags of clone.
    namespaces: u64,
    view: Arc<view::View>,
    filters: Option<filters::Filters>,
    /// Files that are opened by a path while the VMM starts.
    opens: Vec<(CString, OwnedFd)>,
}
