//! The difference between the mounted volumes and the requested ones, and the order in which it is carried out.

use std::path::{Path, PathBuf};

use stead_schemas::guest::VolumeMount;

use super::Mounted;

/// The work for a request.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Difference {
    /// Volumes to unmount, inner paths first.
    pub(super) unmount: Vec<Mounted>,
    /// Volumes to mount, outer paths first.
    pub(super) mount: Vec<VolumeMount>,
}

/// Returns the work that makes the mounted volumes the requested ones. A volume that changes is in both lists, except one
/// whose disk grew.
pub(super) fn difference(mounted: &[Mounted], requested: &[VolumeMount]) -> Difference {
    let is_kept = |one: &&Mounted| requested.iter().any(|volume| one.volume.is_same_but_size(volume));
    let mut unmount: Vec<Mounted> = mounted.iter().filter(|one| !is_kept(one)).cloned().collect();
    unmount.sort_by(|one, other| other.at.cmp(&one.at));
    let is_mounted = |volume: &&VolumeMount| mounted.iter().any(|one| one.volume.is_same_but_size(volume));
    let mut mount: Vec<VolumeMount> =
        requested.iter().filter(|volume| !is_mounted(volume)).cloned().collect();
    mount.sort_by(|one, other| Path::new(&one.path).cmp(Path::new(&other.path)));
    Difference { unmount, mount }
}

/// Returns the reason why a volume cannot be mounted at a path now: it would hide another one, or would be mounted in a
/// directory that is not its own.
pub(super) fn obstacle(
    at: &Path,
    mounted: &[Mounted],
    requested: &[VolumeMount],
    missing: &[PathBuf],
) -> Option<String> {
    for one in mounted {
        let path = &one.volume.path;
        if one.at != at && one.at.starts_with(at) {
            return Some(format!("the volume at {path} is mounted there already and would be hidden"));
        }
        if at.starts_with(&one.at) && !requested.contains(&one.volume) {
            return Some(format!("the volume at {path} could not be unmounted"));
        }
    }
    let outer = missing.iter().find(|path| at.starts_with(path));
    outer.map(|path| format!("the volume at {} could not be mounted", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::DeviceNumber;

    fn volume(path: &str, disk: &str) -> VolumeMount {
        VolumeMount {
            path: path.to_owned(),
            disk: disk.to_owned(),
            is_read_only: false,
            upper: None,
            size: None,
        }
    }

    fn mounted(path: &str, disk: &str) -> Mounted {
        Mounted { volume: volume(path, disk), at: path.into(), device: DeviceNumber { major: 8, minor: 0 } }
    }

    #[test]
    fn inner_volumes_are_unmounted_first_and_outer_ones_mounted_first() {
        let there = ["/a", "/a/b", "/a-b", "/kept", "/a/b/c"].map(|path| mounted(path, path));
        let requested =
            [volume("/z/y", "1"), volume("/kept", "/kept"), volume("/z", "2"), volume("/z-a", "3")];
        let Difference { unmount, mount } = difference(&there, &requested);
        assert_eq!(
            unmount.iter().map(|one| &*one.volume.path).collect::<Vec<_>>(),
            ["/a-b", "/a/b/c", "/a/b", "/a"]
        );
        assert_eq!(mount.iter().map(|one| &*one.path).collect::<Vec<_>>(), ["/z", "/z/y", "/z-a"]);
        let none = Difference { unmount: vec![], mount: vec![] };
        assert_eq!(difference(&there, &there.clone().map(|one| one.volume)), none);
        assert_eq!(difference(&[], &[]), none);
    }

    #[test]
    fn a_volume_that_changes_is_unmounted_and_mounted_anew() {
        let before = mounted("/a", "1");
        let changes: [fn(&mut VolumeMount); 4] = [
            |volume| volume.disk = "2".to_owned(),
            |volume| volume.is_read_only = true,
            |volume| volume.upper = Some("2".to_owned()),
            |volume| volume.path = "/b".to_owned(),
        ];
        for change in changes {
            let mut after = before.volume.clone();
            change(&mut after);
            let expected = Difference { unmount: vec![before.clone()], mount: vec![after.clone()] };
            assert_eq!(difference(std::slice::from_ref(&before), &[after]), expected);
        }
        let grown = VolumeMount { size: Some(1 << 30), ..before.volume.clone() };
        assert_eq!(difference(&[before], &[grown]), Difference { unmount: vec![], mount: vec![] });
    }

    #[test]
    fn no_volume_hides_another_or_is_mounted_where_it_does_not_belong() {
        let kept = mounted("/a/b", "1");
        let requested = [kept.volume.clone()];
        let obstacle = |at: &str, requested: &[VolumeMount], missing: &[&str]| {
            let missing: Vec<PathBuf> = missing.iter().map(PathBuf::from).collect();
            obstacle(Path::new(at), std::slice::from_ref(&kept), requested, &missing)
        };
        let hidden = "the volume at /a/b is mounted there already and would be hidden";
        assert_eq!(obstacle("/a", &requested, &[]).as_deref(), Some(hidden));
        for free in ["/a/b/c", "/a/c", "/a/bc", "/c"] {
            assert_eq!(obstacle(free, &requested, &["/d"]), None, "{free}");
        }
        let busy = "the volume at /a/b could not be unmounted";
        assert_eq!(obstacle("/a/b", &[], &[]).as_deref(), Some(busy));
        assert_eq!(obstacle("/a/b/c", &[], &[]).as_deref(), Some(busy));
        let missing = "the volume at /c could not be mounted";
        assert_eq!(obstacle("/c/d", &requested, &["/c"]).as_deref(), Some(missing));
    }
}
