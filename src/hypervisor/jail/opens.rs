//! Files that a VMM opens by a path for writing while it starts.
//!
//! The RAM and a device such as `/dev/kvm` are opened by a VMM itself, by a path. A path of the host would need a
//! file that the VMM's user may write to; a saved RAM is shared by forks, which must not change it. So the filter
//! stops such an open, and the daemon answers it with a descriptor that it opened as it should be: a saved RAM for
//! reading only.
//! Guarantees: a VMM gets only the descriptors that it was started for, whatever path it asks for. When this value is
//! dropped, the VMM can open no file for writing any more.

use std::convert::Infallible;
use std::ffi::{CStr, CString};
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tokio::io::unix::AsyncFd;

use crate::host::process::register;

/// Flags of answers, which libc has as wider numbers than the fields of the answers: SECCOMP_USER_NOTIF_FLAG_CONTINUE and
/// SECCOMP_ADDFD_FLAG_SEND of `linux/seccomp.h`.
const CONTINUE: u32 = 1 << 0;
const ADD_AND_ANSWER: u32 = 1 << 1;
/// Longest path that is compared, in bytes.
const PATH_BYTES_MAX: usize = 256;

/// Answers the opens of one VMM.
#[derive(Debug)]
pub(crate) struct Opens {
    listener: AsyncFd<OwnedFd>,
    memory: File,
    files: Vec<(CString, OwnedFd)>,
}

impl Opens {
    pub(super) fn new(listener: OwnedFd, pid: u32, files: Vec<(CString, OwnedFd)>) -> io::Result<Self> {
        let memory = File::open(format!("/proc/{pid}/mem"))?;
        Ok(Self { listener: register(listener)?, memory, files })
    }

    /// Answers until the process ends, and waits for ever then. May be dropped at any time.
    pub(crate) async fn answer(&self) -> Infallible {
        loop {
            let Ok(mut ready) = self.listener.readable().await else { return std::future::pending().await };
            match self.has_request() {
                Ok(true) => {
                    if let Err(error) = self.answer_one() {
                        tracing::warn!(%error, "a VMM that starts could not open a file");
                    }
                }
                Ok(false) => ready.clear_ready(),
                Err(_) => return std::future::pending().await,
            }
        }
    }

    /// Returns whether a request waits. The request itself is received without a wait then.
    fn has_request(&self) -> io::Result<bool> {
        let mut polled = [PollFd::new(self.listener.get_ref(), PollFlags::IN)];
        poll(&mut polled, Some(&Timespec { tv_sec: 0, tv_nsec: 0 }))?;
        let events = polled[0].revents();
        if !events.contains(PollFlags::IN) && events.contains(PollFlags::HUP) {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        Ok(events.contains(PollFlags::IN))
    }

    #[expect(unsafe_code, reason = "no library has the requests of a listener with descriptors")]
    fn answer_one(&self) -> io::Result<()> {
        let listener = self.listener.as_raw_fd();
        // SAFETY: all zero is what the kernel asks for, and it fills in the rest.
        let mut request: libc::seccomp_notif = unsafe { std::mem::zeroed() };
        // SAFETY: the value has the layout of the request.
        if unsafe { libc::ioctl(listener, libc::SECCOMP_IOCTL_NOTIF_RECV as _, &raw mut request) } != 0 {
            return absent(io::Error::last_os_error());
        }
        let file = self.path(&request).ok().and_then(|path| self.file(&path));
        let Some(file) = file else {
            // The kernel opens it as if there were no filter. That fails behind the other walls.
            let mut response = libc::seccomp_notif_resp { id: request.id, val: 0, error: 0, flags: CONTINUE };
            // SAFETY: the value has the layout of the request.
            let sent =
                unsafe { libc::ioctl(listener, libc::SECCOMP_IOCTL_NOTIF_SEND as _, &raw mut response) };
            return if sent == 0 { Ok(()) } else { absent(io::Error::last_os_error()) };
        };
        let added = libc::seccomp_notif_addfd {
            id: request.id,
            flags: ADD_AND_ANSWER,
            srcfd: file.as_raw_fd().cast_unsigned(),
            newfd: 0,
            newfd_flags: libc::O_CLOEXEC.cast_unsigned(),
        };
        // SAFETY: the value has the layout of the request. The descriptor is copied into the VMM.
        let sent = unsafe { libc::ioctl(listener, libc::SECCOMP_IOCTL_NOTIF_ADDFD as _, &raw const added) };
        if sent < 0 { absent(io::Error::last_os_error()) } else { Ok(()) }
    }

    /// Reads the path of a request. What another thread of the VMM writes there meanwhile changes only which of its
    /// own files it gets.
    fn path(&self, request: &libc::seccomp_notif) -> io::Result<CString> {
        let argument = if is_openat(request.data.nr) { 1 } else { 0 };
        let mut bytes = [0; PATH_BYTES_MAX];
        let length = self.memory.read_at(&mut bytes, request.data.args[argument])?;
        let path = CStr::from_bytes_until_nul(&bytes[..length]).map_err(io::Error::other)?;
        Ok(path.to_owned())
    }

    fn file(&self, path: &CString) -> Option<&OwnedFd> {
        self.files.iter().find(|(known, _)| known == path).map(|(_, file)| file)
    }
}

fn is_openat(call: libc::c_int) -> bool {
    libc::c_long::from(call) == libc::SYS_openat
}

/// A VMM that ended meanwhile needs no answer.
fn absent(error: io::Error) -> io::Result<()> {
    if error.raw_os_error() == Some(libc::ENOENT) { Ok(()) } else { Err(error) }
}
