//! The file system of VMMs: a mount namespace with a program and its files, and nothing else.
//!
//! All VMMs with the same program and files share one view. Nothing in it can be changed, so they share no more than
//! they would in views of their own, and a VMM enters it by one system call instead of some sixty mounts.
//! The daemon makes a view when it first needs it, in a thread that enters a new mount namespace. A view lives as
//! long as a VMM uses it, also when the daemon has ended.

use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use landlock::{
    ABI, Access, AccessFs, AccessNet, PathBeneath, Ruleset, RulesetAttr, RulesetCreatedAttr, Scope,
};
use rustix::fs::{CWD, Mode, OFlags};
use rustix::mount::{
    MountFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags, mount, mount_change,
    mount_remount, move_mount, open_tree, unmount,
};
use rustix::thread::UnshareFlags;

use super::prepared;

/// A mount namespace, held by its descriptor.
#[derive(Debug)]
pub(super) struct View {
    pub(super) namespace: OwnedFd,
    /// The rules of landlock that allow reading here and nothing else, or `None` where the kernel has no landlock.
    pub(super) rules: Option<OwnedFd>,
}

/// Options of the file system that holds the mount points. Names take no more than its size.
const SIZE: &std::ffi::CStr = c"size=1m,mode=755";

impl View {
    /// Makes a view of these files and directories, at the paths that they have on the host. `point` is a directory
    /// that exists; nothing is seen of the mount there outside of the new namespace. A program with a network may connect.
    ///
    /// # Errors
    /// The error of a mount, with the path.
    pub(super) fn make(point: &Path, files: Vec<PathBuf>, has_network: bool) -> io::Result<Self> {
        let point = point.to_owned();
        let made = std::thread::Builder::new().spawn(move || make(&point, &files, has_network))?.join();
        made.unwrap_or_else(|_| Err(io::Error::other("the thread that makes a view ended")))
    }
}

fn make(point: &Path, files: &[PathBuf], has_network: bool) -> io::Result<View> {
    #[expect(unsafe_code, reason = "a thread with a mount namespace of its own; the others keep theirs")]
    // SAFETY: the thread shares its descriptors with the others as before, and ends after it has made the view.
    unsafe {
        rustix::thread::unshare_unsafe(UnshareFlags::FS | UnshareFlags::NEWNS)?;
    }
    // Since the call above this is the mask of this thread alone: VMMs have to read the directories.
    rustix::process::umask(Mode::from_raw_mode(0o022));
    let namespace = File::open("/proc/thread-self/ns/mnt")?;
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)?;
    // Before the mount below can hide one of them.
    let sources = files.iter().map(|path| source(path)).collect::<io::Result<Vec<_>>>()?;
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    mount("tmpfs", point, "tmpfs", flags, Some(SIZE))?;
    rustix::process::chdir(point)?;
    for (path, (mounted, is_directory)) in files.iter().zip(&sources) {
        let show = || show(path, mounted, *is_directory);
        show().map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", path.display())))?;
    }
    // The old root is mounted over the new one, and then goes.
    rustix::process::pivot_root(".", ".")?;
    unmount(".", UnmountFlags::DETACH)?;
    rustix::process::chdir("/")?;
    mount_remount("/", MountFlags::BIND | MountFlags::RDONLY | flags, "")?;
    let root = rustix::fs::open("/", OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    let rules = rules(root, has_network)?.map(prepared).transpose()?;
    Ok(View { namespace: prepared(namespace)?, rules })
}

/// Clones the mount of a file or directory. Returns whether it is a directory. Others than root must be able to
/// read it.
fn source(path: &Path) -> io::Result<(OwnedFd, bool)> {
    const READ_BY_OTHERS: u32 = 0o004;
    let failed = |error: io::Error| io::Error::new(error.kind(), format!("{}: {error}", path.display()));
    let meta = fs::metadata(path).map_err(failed)?;
    if meta.permissions().mode() & READ_BY_OTHERS == 0 {
        return Err(failed(io::Error::new(io::ErrorKind::PermissionDenied, "not readable for all users")));
    }
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let cloned = open_tree(CWD, path, flags).map_err(io::Error::from).map_err(failed)?;
    Ok((cloned, meta.is_dir()))
}

/// Mounts a clone at its path below the current directory, for reading only.
fn show(path: &Path, mounted: &OwnedFd, is_directory: bool) -> io::Result<()> {
    let relative = path.strip_prefix("/").map_err(|_| io::Error::other("not an absolute path"))?;
    if is_directory {
        fs::create_dir_all(relative)?;
    } else {
        fs::create_dir_all(relative.parent().unwrap_or(relative))?;
        File::create(relative)?;
    }
    move_mount(mounted, "", CWD, relative, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?;
    let flags = MountFlags::BIND | MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NODEV;
    Ok(mount_remount(relative, flags, "")?)
}

/// Makes the rules of landlock: below the root a program reads and runs files. Without a network it connects to no TCP
/// port. It connects to no abstract socket and signals no process outside, as far as the kernel can forbid that.
fn rules(root: OwnedFd, has_network: bool) -> io::Result<Option<OwnedFd>> {
    const NEWEST: ABI = ABI::V6;
    let net = if has_network { AccessNet::BindTcp.into() } else { AccessNet::from_all(NEWEST) };
    let rules = Ruleset::default()
        .handle_access(AccessFs::from_all(NEWEST))
        .and_then(|rules| rules.handle_access(net))
        .and_then(|rules| rules.scope(Scope::from_all(NEWEST)))
        .and_then(Ruleset::create)
        .and_then(|rules| rules.add_rule(PathBeneath::new(root, AccessFs::from_read(ABI::V1))));
    rules.map(Option::<OwnedFd>::from).map_err(io::Error::other)
}
