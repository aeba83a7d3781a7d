//! Volumes: file systems on their own disks, mounted in the program's root.
//!
//! All volumes are mounted while the initial root is still the root, where the program does not see the layers of an
//! overlay. They move to their paths after the switch: the links of a path are then those of the image.

use std::ffi::CString;
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use rustix::fs::CWD;
use rustix::mount::{
    MountFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags, mount, mount_remount, move_mount, open_tree,
    unmount,
};
use stead_schemas::guest::VolumeMount;

use crate::BootError;
use crate::devices::{disk_of_serial, wait_for};
use crate::grow::mount_writable;
use crate::inside;

/// A volume that is mounted and not yet at its path.
#[derive(Debug)]
pub(crate) struct Tree {
    mount: VolumeMount,
    tree: OwnedFd,
}

/// Paths of the mounted volumes, for the remount at the end.
static MOUNTED: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());

fn failed<'a, E: std::fmt::Display>(path: &'a str) -> impl FnOnce(E) -> BootError + 'a {
    move |error| BootError::new("volumes", format!("{path}: {error}"))
}

/// Mounts the volumes out of the program's sight, in the order in which they are moved to their paths.
pub(crate) fn mount_all(mounts: &[VolumeMount]) -> Result<Vec<Tree>, BootError> {
    let of = |(index, mount): (usize, &VolumeMount)| {
        let scratch = PathBuf::from(format!("/volumes/{index}"));
        let tree = mount_one(&scratch, mount)?;
        Ok(Tree { mount: mount.clone(), tree })
    };
    mounts.iter().enumerate().map(of).collect()
}

fn mount_one(scratch: &Path, request: &VolumeMount) -> Result<OwnedFd, BootError> {
    let disk = scratch.join("disk");
    mount_disk(&request.disk, &disk, request.is_read_only).map_err(|error| error.at(&request.path))?;
    let Some(upper) = &request.upper else { return clone_of(&disk).map_err(failed(&request.path)) };
    let over = scratch.join("over");
    mount_disk(upper, &over, false).map_err(|error| error.at(&request.path))?;
    let (merged, written, work) = (scratch.join("merged"), over.join("upper"), over.join("work"));
    for dir in [&merged, &written, &work] {
        fs::create_dir_all(dir).map_err(failed(&request.path))?;
    }
    // The upper directory over the root of the volume begins with the owner and mode of that root.
    let root = fs::metadata(&disk).map_err(failed(&request.path))?;
    take_over(&root, &written).map_err(failed(&request.path))?;
    let options =
        format!("lowerdir={},upperdir={},workdir={}", disk.display(), written.display(), work.display());
    let options = CString::new(options).map_err(failed(&request.path))?;
    mount("overlay", &merged, "overlay", MountFlags::NOATIME, Some(options.as_c_str()))
        .map_err(failed(&request.path))?;
    clone_of(&merged).map_err(failed(&request.path))
}

fn mount_disk(serial: &str, at: &Path, is_read_only: bool) -> Result<(), BootError> {
    let device = wait_for("a volume's disk", || disk_of_serial(serial))?;
    fs::create_dir_all(at).map_err(failed(serial))?;
    if !is_read_only {
        return mount_writable(&device, at).map_err(failed(serial));
    }
    // A volume left unclean by its last writer cannot be repaired here: it is read as it is.
    mount(&device, at, "ext4", MountFlags::RDONLY, None)
        .or_else(|_| mount(&device, at, "ext4", MountFlags::RDONLY, Some(c"noload")))
        .map_err(failed(serial))
}

/// Returns the mounted tree as a clone that is detached from its mount point.
fn clone_of(at: &Path) -> rustix::io::Result<OwnedFd> {
    let tree = open_tree(CWD, at, OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC)?;
    unmount(at, UnmountFlags::DETACH)?;
    Ok(tree)
}

/// Moves the volumes to their paths. The program's root is the root by now.
pub(crate) fn mount_trees(trees: Vec<Tree>) -> Result<(), BootError> {
    for Tree { mount, tree } in trees {
        let path = &mount.path;
        // A link of the image is followed: nothing can be mounted over the link itself.
        let mount_trees = inside::resolve(Path::new("/"), path).map_err(failed(path))?;
        fs::create_dir_all(&mount_trees).map_err(failed(path))?;
        let covered = fs::metadata(&mount_trees).map_err(failed(path))?;
        move_mount(&tree, "", CWD, &mount_trees, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
            .map_err(failed(path))?;
        if !mount.is_read_only && is_empty(&mount_trees).map_err(failed(path))? {
            take_over(&covered, &mount_trees).map_err(failed(path))?;
        }
        MOUNTED.lock().unwrap_or_else(PoisonError::into_inner).push(mount_trees);
    }
    Ok(())
}

/// Gives a new volume the owner and mode of the directory that it covers.
fn take_over(from: &fs::Metadata, to: &Path) -> io::Result<()> {
    chown(to, Some(from.uid()), Some(from.gid()))?;
    fs::set_permissions(to, fs::Permissions::from_mode(from.mode() & 0o7777))
}

fn is_empty(path: &Path) -> io::Result<bool> {
    let mut names = fs::read_dir(path)?;
    Ok(names.all(|entry| entry.is_ok_and(|entry| entry.file_name() == "lost+found")))
}

/// Remounts the volumes read-only before power-off: they are clean unless a process holds them.
pub(crate) fn settle() {
    for path in MOUNTED.lock().unwrap_or_else(PoisonError::into_inner).iter().rev() {
        let _ = mount_remount(path, MountFlags::RDONLY, "");
    }
}
