//! Mounts volumes: a disk, or an overlay of two disks, is composed out of sight and then moved to its path.
//!
//! At boot all volumes are composed while the initial root is still the root, where the program does not see the layers
//! of an overlay. They move to their paths after the switch: the links of a path are then those of the image.

use std::ffi::CString;
use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt, fchown};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{CWD, Dir, Mode, OFlags, openat};
use rustix::mount::{
    MountFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags, mount, move_mount, open_tree, unmount,
};
use stead_schemas::guest::VolumeMount;

use super::{MOUNTED, Mounted};
use crate::devices::{DEVICE_WAIT, DeviceNumber, disk_of_serial, search_disk, wait_until};
use crate::grow::mount_writable;
use crate::{BootError, inside, modules};

/// Time between two queries for the disk of a volume. The kernel needs tenths of a second for a disk that was plugged in.
const DISK_POLL: Duration = Duration::from_millis(5);
/// Time after which the kernel is made to search for a disk. Before that it may still have to notice that another disk of
/// the same number was taken out.
const SEARCH_AFTER: Duration = Duration::from_secs(1);

/// A volume that is mounted and not yet at its path.
#[derive(Debug)]
pub(crate) struct Tree {
    pub(super) volume: VolumeMount,
    pub(super) tree: OwnedFd,
}

/// The devices of a volume.
#[derive(Debug)]
pub(super) struct Devices {
    disk: PathBuf,
    upper: Option<PathBuf>,
}

fn failed<'a, E: std::fmt::Display>(what: &'a str) -> impl FnOnce(E) -> BootError + 'a {
    move |error| BootError::new("volumes", format!("{what}: {error}"))
}

fn refused(error: impl std::fmt::Display) -> BootError {
    BootError::new("volumes", error)
}

/// Mounts the volumes out of the program's sight, in the order in which they are moved to their paths.
pub(crate) fn mount_all(volumes: &[VolumeMount]) -> Result<Vec<Tree>, BootError> {
    if volumes.is_empty() {
        return Ok(Vec::new());
    }
    modules::load_for_volumes()?;
    let one = |(index, volume): (usize, &VolumeMount)| {
        let scratch = PathBuf::from(format!("/volumes/{index}"));
        let devices = Devices::wait(volume, Instant::now() + DEVICE_WAIT, &disk_of_serial);
        let tree = devices.and_then(|devices| compose(&scratch, &devices, volume));
        Ok(Tree { volume: volume.clone(), tree: tree.map_err(|error| error.at(&volume.path))? })
    };
    volumes.iter().enumerate().map(one).collect()
}

impl Devices {
    /// Waits until the disks of a volume are there.
    pub(super) fn wait(
        volume: &VolumeMount,
        deadline: Instant,
        find: &dyn Fn(&str) -> Option<PathBuf>,
    ) -> Result<Self, BootError> {
        let wait = |serial: &str| {
            let (search_at, mut is_searched) = (Instant::now() + SEARCH_AFTER, false);
            wait_until(deadline, DISK_POLL, "a volume's disk", || {
                let found = find(serial);
                if found.is_none() && !is_searched && Instant::now() >= search_at {
                    search_disk(serial);
                    is_searched = true;
                }
                found
            })
        };
        let disk = wait(&volume.disk)?;
        Ok(Self { disk, upper: volume.upper.as_deref().map(wait).transpose()? })
    }
}

/// Mounts the file systems of a volume below a scratch directory. Only the returned tree of them stays mounted.
pub(super) fn compose(scratch: &Path, devices: &Devices, volume: &VolumeMount) -> Result<OwnedFd, BootError> {
    // An overlay shows the name of this directory in mountinfo(5), where `recognise` finds its lower disk.
    let disk = scratch.join(&volume.disk);
    mount_disk(&devices.disk, &disk, volume.is_read_only).map_err(failed(&volume.disk))?;
    let (Some(serial), Some(device)) = (&volume.upper, &devices.upper) else {
        return clone_of(&disk).map_err(refused);
    };
    let over = scratch.join("over");
    mount_disk(device, &over, false).map_err(failed(serial))?;
    let tree = compose_overlay(scratch, serial, &disk, &over).map_err(refused)?;
    // The overlay has clones of its layers. Their disks would not be free after it while these are mounted.
    for layer in [&over, &disk] {
        unmount(layer, UnmountFlags::DETACH).map_err(refused)?;
    }
    Ok(tree)
}

/// Mounts an overlay of two mounted disks.
fn compose_overlay(scratch: &Path, serial: &str, disk: &Path, over: &Path) -> io::Result<OwnedFd> {
    let (merged, written, work) = (scratch.join("merged"), over.join("upper"), over.join("work"));
    for dir in [&merged, &written, &work] {
        fs::create_dir_all(dir)?;
    }
    // The upper directory over the root of the volume begins with the owner and mode of that root.
    take_over(&fs::metadata(disk)?, &File::open(&written)?)?;
    let options =
        format!("lowerdir={},upperdir={},workdir={}", disk.display(), written.display(), work.display());
    let options = CString::new(options)?;
    // The source is a name only. An overlay shows it in mountinfo(5).
    mount(serial, &merged, "overlay", MountFlags::NOATIME, Some(options.as_c_str()))?;
    Ok(clone_of(&merged)?)
}

fn mount_disk(device: &Path, at: &Path, is_read_only: bool) -> io::Result<()> {
    fs::create_dir_all(at)?;
    if !is_read_only {
        return mount_writable(device, at);
    }
    // A volume left unclean by its last writer cannot be repaired here: it is read as it is.
    mount(device, at, "ext4", MountFlags::RDONLY, None)
        .or_else(|_| mount(device, at, "ext4", MountFlags::RDONLY, Some(c"noload")))?;
    Ok(())
}

/// Returns the mounted tree as a clone that is detached from its mount point.
fn clone_of(at: &Path) -> rustix::io::Result<OwnedFd> {
    let tree = open_tree(CWD, at, OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC)?;
    unmount(at, UnmountFlags::DETACH)?;
    Ok(tree)
}

/// Moves the volumes to their paths. The program's root is the root by now.
pub(crate) fn mount_trees(trees: Vec<Tree>) -> Result<(), BootError> {
    for tree in trees {
        let path = tree.volume.path.clone();
        MOUNTED.add(attach(tree).map_err(failed(&path))?);
    }
    Ok(())
}

/// Moves a volume to its path.
pub(super) fn attach(Tree { volume, tree }: Tree) -> io::Result<Mounted> {
    // A link of the image is followed: nothing can be mounted over the link itself.
    let at = inside::resolve(Path::new("/"), &volume.path)?;
    fs::create_dir_all(&at)?;
    let top = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let top = File::from(openat(&tree, ".", top, Mode::empty())?);
    if !volume.is_read_only && is_empty(&top)? {
        take_over(&fs::metadata(&at)?, &top)?;
    }
    let device = DeviceNumber::of(top.metadata()?.dev());
    move_mount(&tree, "", CWD, &at, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?;
    Ok(Mounted { volume, at, device })
}

/// Gives a new volume the owner and mode of the directory that it covers.
fn take_over(from: &fs::Metadata, to: &File) -> io::Result<()> {
    fchown(to, Some(from.uid()), Some(from.gid()))?;
    to.set_permissions(fs::Permissions::from_mode(from.mode() & 0o7777))
}

fn is_empty(directory: &File) -> io::Result<bool> {
    let unimportant = [&b"."[..], b"..", b"lost+found"];
    for entry in Dir::read_from(directory)? {
        if !unimportant.contains(&entry?.file_name().to_bytes()) {
            return Ok(false);
        }
    }
    Ok(true)
}
