//! What a VMM's process is given before it becomes QEMU: a session, a bound on its files, no core dump,
//! its RAM.

use std::io;
use std::os::fd::{BorrowedFd, RawFd};

use rustix::io::FdFlags;
use rustix::process::{Resource, Rlimit, setrlimit};
use stead_schemas::quantity::Bytes;

/// What a VMM's files may grow to: its disks are as long as they will ever be, and a console's log must
/// be able to reach the length at which it is rotated.
pub(super) fn file_size_max(largest_disk: u64, console_log_max: Bytes) -> u64 {
    largest_disk.max(console_log_max.0.saturating_mul(2))
}

/// A session of its own, so that it outlives the daemon, and a bound on each of its files, which
/// holds for the console's log while no daemon rotates it: what a guest prints beyond is dropped. The
/// file `ram` stays open in it, under the same number.
#[expect(unsafe_code, reason = "pre_exec is the one way to set these for the child alone")]
pub(super) fn prepare(command: &mut tokio::process::Command, file_size_max: u64, ram: RawFd) {
    let in_child = move || {
        rustix::process::setsid()?;
        // Open in this child only: every other process that is started closes it.
        // SAFETY: the caller holds the file until the child was started.
        let ram = unsafe { BorrowedFd::borrow_raw(ram) };
        rustix::io::fcntl_setfd(ram, FdFlags::empty())?;
        // A write beyond the limit shall fail, not end the VMM. An ignored signal stays so over exec.
        // SAFETY: no handler is installed, and no other thread is in the child.
        if unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) } == libc::SIG_ERR {
            return Err(io::Error::last_os_error());
        }
        // A dump of the VMM would hold what the guest has in memory, and be as large.
        let none = Rlimit { current: Some(0), maximum: Some(0) };
        setrlimit(Resource::Core, none)?;
        let both = Rlimit { current: Some(file_size_max), maximum: Some(file_size_max) };
        setrlimit(Resource::Fsize, both).map_err(io::Error::from)
    };
    // SAFETY: runs between fork and exec in the child, which has one thread; it makes system calls
    // and allocates nothing.
    unsafe {
        command.pre_exec(in_child);
    }
}
