//! The volumes that another process mounted, recognised among the mounts. An agent beside an image's init has not
//! mounted those of the boot, and knows nothing of those that an earlier agent mounted.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use stead_schemas::guest::{Config, VolumeMount};

use super::mountinfo::{self, Mount};
use super::{MOUNTED, Mounted};
use crate::devices::{DeviceNumber, serial_of_disk};
use crate::inside;

/// Beginning of the serial numbers of volumes' disks.
const VOLUME_DISK: &str = "stead.volume.";

/// Finds the mounted volumes of this guest. The configuration knows the paths of its volumes as they were given.
pub(crate) fn find_mounted(config: &Config) {
    let mounts = mountinfo::own().unwrap_or_else(|error| {
        crate::log_line(&format!("the mounted volumes are not known: {error}"));
        Vec::new()
    });
    let resolve = |path: &str| inside::resolve(Path::new("/"), path).ok();
    *MOUNTED.lock() = recognise(&mounts, &config.volumes, serial_of_disk, resolve);
}

/// Returns the volumes among these mounts, those of the configuration first.
pub(super) fn recognise(
    mounts: &[Mount],
    configured: &[VolumeMount],
    serial_of: impl Fn(DeviceNumber) -> Option<String>,
    resolve: impl Fn(&str) -> Option<PathBuf>,
) -> Vec<Mounted> {
    let mut found: Vec<Mounted> = mounts.iter().filter_map(|mount| volume_of(mount, &serial_of)).collect();
    let mut volumes = Vec::new();
    for volume in configured {
        let at = resolve(&volume.path);
        let is_it = |one: &Mounted| Some(&one.at) == at.as_ref() && is_same_but_path(&one.volume, volume);
        if let Some(index) = found.iter().position(is_it) {
            volumes.push(Mounted { volume: volume.clone(), ..found.remove(index) });
        }
    }
    volumes.append(&mut found);
    // The first mount of a disk is ours. Others were made in the guest.
    let mut disks = BTreeSet::new();
    volumes.retain(|one| disks.insert(one.volume.disk.clone()));
    volumes
}

/// Returns whether two volumes have the same disks and are mounted in the same way.
pub(super) fn is_same_but_path(one: &VolumeMount, other: &VolumeMount) -> bool {
    one.is_same_but_size(&VolumeMount { path: one.path.clone(), ..other.clone() })
}

fn volume_of(mount: &Mount, serial_of: impl Fn(DeviceNumber) -> Option<String>) -> Option<Mounted> {
    if mount.root != Path::new("/") {
        return None;
    }
    let (disk, is_read_only, upper) = match mount.kind.as_str() {
        "ext4" => (serial_of(mount.device)?, mount.is_read_only, None),
        // The disk under an overlay is always only read.
        "overlay" => (lower_disk(&mount.options)?, true, Some(mount.source.clone())),
        _ => return None,
    };
    let is_ours = |serial: &String| serial.starts_with(VOLUME_DISK);
    if !is_ours(&disk) || upper.as_ref().is_some_and(|upper| !is_ours(upper)) {
        return None;
    }
    let path = mount.at.to_str()?.to_owned();
    let volume = VolumeMount { path, disk, is_read_only, upper, size: None };
    Some(Mounted { volume, at: mount.at.clone(), device: mount.device })
}

/// Returns the serial number of the disk under an overlay, whose directory is named by it.
fn lower_disk(options: &str) -> Option<String> {
    let lower = options.split(',').find_map(|option| option.strip_prefix("lowerdir="))?;
    Some(Path::new(lower).file_name()?.to_str()?.to_owned())
}

#[cfg(test)]
mod tests {
    use stead_schemas::guest::volume_disk;

    use super::*;

    const TEXT: &str = "\
21 1 0:20 / / rw - overlay overlay rw,lowerdir=/lower,upperdir=/upper/upper
30 21 8:0 / /run/data rw,noatime shared:5 - ext4 /dev/sda rw
31 21 8:16 / /ro ro - ext4 /dev/sdb ro
32 21 0:50 / /both rw,noatime - overlay stead.volume.3 rw,lowerdir=/sys/stead.volume.2,upperdir=/sys/over/upper
33 21 8:0 / /again rw - ext4 /dev/sda rw
34 21 8:16 /sub /part ro - ext4 /dev/sdb ro
35 21 7:0 / /loop rw - ext4 /dev/loop0 rw
36 21 254:0 / /image rw - ext4 /dev/vda rw
37 21 0:51 / /users rw - overlay stead.volume.3 rw,lowerdir=/home/x,upperdir=/home/y
";

    fn serial(device: DeviceNumber) -> Option<String> {
        match (device.major, device.minor) {
            (8, minor) => Some(volume_disk(minor / 16)),
            (254, 0) => Some("stead.overlay".to_owned()),
            _ => None,
        }
    }

    fn volume(path: &str, disk: u32, is_read_only: bool, upper: Option<u32>) -> VolumeMount {
        VolumeMount {
            path: path.to_owned(),
            disk: volume_disk(disk),
            is_read_only,
            upper: upper.map(volume_disk),
            size: None,
        }
    }

    fn found(configured: &[VolumeMount]) -> Vec<VolumeMount> {
        // The image has a link from /var/run.
        let resolve = |path: &str| Some(PathBuf::from(path.strip_prefix("/var").unwrap_or(path)));
        let found = recognise(&mountinfo::parse(TEXT.as_bytes()), configured, serial, resolve);
        found.into_iter().map(|one| one.volume).collect()
    }

    #[test]
    fn mounted_volumes_are_found_with_the_paths_of_the_configuration() {
        let both = volume("/both", 2, true, Some(3));
        let read_only = volume("/ro", 1, true, None);
        assert_eq!(found(&[]), [volume("/run/data", 0, false, None), read_only.clone(), both.clone()]);
        let configured = [both.clone(), volume("/var/run/data", 0, false, None)];
        assert_eq!(found(&configured), [both.clone(), configured[1].clone(), read_only.clone()]);
        // The guest's own mount of a disk counts as the volume only if it is at its path.
        let moved = volume("/again", 0, false, None);
        assert_eq!(found(std::slice::from_ref(&moved)), [moved, read_only.clone(), both.clone()]);
        let others = [
            volume("/ro", 1, false, None),
            volume("/both", 2, true, Some(4)),
            volume("/none", 5, true, None),
        ];
        assert_eq!(found(&others), [volume("/run/data", 0, false, None), read_only, both]);
    }

    #[test]
    fn disks_of_volumes_are_known_by_their_serial_numbers() {
        assert!(volume_disk(7).starts_with(VOLUME_DISK));
        assert_eq!(
            lower_disk("rw,upperdir=/a,lowerdir=/sys/stead.volume.2").as_deref(),
            Some("stead.volume.2")
        );
        assert_eq!((lower_disk("rw"), lower_disk("lowerdir=/")), (None, None));
    }
}
