//! Follows the host's requests for volumes while the program runs.
//!
//! Guarantees: a request is reported when it was carried out as far as possible, each time with what is really mounted.
//! While a part of it does not succeed, it is tried again, less and less often.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use stead_schemas::guest::{MountedVolumes, VolumeMount};

use super::difference::{difference, obstacle};
use super::mount::{self, Devices, Tree};
use super::recognise::is_same_but_path;
use super::unmount::unmount_one;
use super::{MOUNTED, Mounted, Registry, mountinfo, scratch};
use crate::control::Control;
use crate::devices::{DEVICE_WAIT, DeviceNumber, disk_of_serial};
use crate::grow::fill_disk;
use crate::{inside, modules};

/// Delays between attempts, which double while a part of the request does not succeed.
const RETRY_FIRST: Duration = Duration::from_millis(200);
const RETRY_MAX: Duration = Duration::from_secs(5);
/// Limit on the characters of a problem's text.
const TEXT_MAX: usize = 300;

/// The parts with which requests are carried out.
pub(super) struct Follower<'a> {
    pub(super) registry: &'a Registry,
    /// Finds the device of a disk by its serial number.
    pub(super) find: &'a dyn Fn(&str) -> Option<PathBuf>,
}

/// Starts the thread that mounts and unmounts volumes as the host asks.
pub(crate) fn start(control: &Control) {
    let control = control.clone();
    let work = move || follow(&control, &Follower { registry: &MOUNTED, find: &disk_of_serial });
    if let Err(error) = std::thread::Builder::new().name("volumes".to_owned()).spawn(work) {
        crate::log_line(&format!("the volumes stay as they are: {error}"));
    }
}

fn follow(control: &Control, follower: &Follower<'_>) {
    let mut requested = follower.registry.volumes(&[]);
    let mut report = MountedVolumes {
        requested: requested.clone(),
        mounted: requested.clone(),
        fills_disks: true,
        ..MountedVolumes::default()
    };
    let (mut number, mut delay) = (0, None);
    loop {
        let wait = match control.wait_for_volumes(number, &report, delay) {
            Some(request) => {
                (number, requested, delay) = (request.number, request.volumes, None);
                DEVICE_WAIT
            }
            None => Duration::ZERO,
        };
        report = follower.attempt(&requested, wait);
        delay = retry_delay(delay, !report.problems.is_empty());
    }
}

/// Returns the time until the next attempt, or `None` if there is nothing left to do.
fn retry_delay(before: Option<Duration>, has_problems: bool) -> Option<Duration> {
    let next = before.map_or(RETRY_FIRST, |before| (before * 2).min(RETRY_MAX));
    has_problems.then_some(next)
}

impl Follower<'_> {
    /// Carries out a request as far as possible. Disks that are missing have this time to appear.
    pub(super) fn attempt(&self, requested: &[VolumeMount], wait: Duration) -> MountedVolumes {
        self.take_request(requested);
        let mut problems = self.forget_unmounted(requested);
        let work = difference(&self.registry.all(), requested);
        for mounted in work.unmount {
            match unmount_one(&mounted, self.find) {
                Ok(()) => self.registry.remove(&mounted),
                Err(text) => drop(problems.insert(mounted.volume.path, text)),
            }
        }
        let (deadline, mut missing) = (Instant::now() + wait, Vec::new());
        for volume in work.mount {
            let at =
                inside::resolve(Path::new("/"), &volume.path).unwrap_or_else(|_| volume.path.clone().into());
            let done = match obstacle(&at, &self.registry.all(), requested, &missing) {
                Some(text) => Err(text),
                None => self.mount(&volume, deadline),
            };
            if let Err(text) = done {
                missing.push(at);
                problems.entry(volume.path).or_insert(text);
            }
        }
        for (path, text) in self.fill_disks() {
            problems.entry(path).or_insert(text);
        }
        let mounted = self.registry.volumes(requested);
        let problems = problems.into_iter().map(|(path, text)| (path, one_line(&text))).collect();
        MountedVolumes { requested: requested.to_vec(), mounted, problems, fills_disks: true }
    }

    /// Takes over the paths of a request for volumes whose paths are known with all links resolved, and the sizes of disks
    /// that grew.
    fn take_request(&self, requested: &[VolumeMount]) {
        for mounted in self.registry.all() {
            let is_it = |volume: &&VolumeMount| {
                is_same_but_path(volume, &mounted.volume)
                    && inside::resolve(Path::new("/"), &volume.path).is_ok_and(|at| at == mounted.at)
            };
            if requested.contains(&mounted.volume) {
                continue;
            }
            let is_grown = |volume: &&VolumeMount| mounted.volume.is_same_but_size(volume);
            if let Some(volume) = requested.iter().find(is_grown).or_else(|| requested.iter().find(is_it)) {
                self.registry.rename(&mounted, volume);
            }
        }
    }

    /// Lets the file systems of volumes grow to the requested sizes of their disks. Returns the reasons why some do not.
    fn fill_disks(&self) -> BTreeMap<String, String> {
        let mut problems = BTreeMap::new();
        for mounted in self.registry.all() {
            let Some(size) = mounted.volume.size else { continue };
            let filled = File::open(&mounted.at).and_then(|top| match top.metadata() {
                Ok(seen) if DeviceNumber::of(seen.dev()) == mounted.device => {
                    let device = (self.find)(&mounted.volume.disk).ok_or(io::ErrorKind::NotFound)?;
                    fill_disk(&top, &device, size)
                }
                _ => Err(io::Error::other("something else is mounted there")),
            });
            if let Err(error) = filled {
                let text = format!("the file system does not grow: {error}");
                problems.insert(mounted.volume.path, text);
            }
        }
        problems
    }

    /// Forgets requested volumes that were unmounted in the guest, so that they are mounted again. Returns the reasons
    /// why disks of such volumes are in use.
    fn forget_unmounted(&self, requested: &[VolumeMount]) -> BTreeMap<String, String> {
        let mut problems = BTreeMap::new();
        let Ok(mounts) = mountinfo::own() else { return problems };
        let is_there = |mounted: &Mounted| mounts.iter().any(|mount| mounted.is_it(mount));
        for mounted in self.registry.all() {
            if !is_there(&mounted) && requested.contains(&mounted.volume) {
                match unmount_one(&mounted, self.find) {
                    Ok(()) => self.registry.remove(&mounted),
                    Err(text) => drop(problems.insert(mounted.volume.path, text)),
                }
            }
        }
        problems
    }

    fn mount(&self, volume: &VolumeMount, deadline: Instant) -> Result<(), String> {
        modules::load_for_volumes().map_err(|error| error.reason)?;
        let devices = Devices::wait(volume, deadline, self.find).map_err(|error| error.reason)?;
        let tree = scratch::compose(&devices, volume).map_err(|error| error.reason)?;
        let attached = mount::attach(Tree { volume: volume.clone(), tree });
        self.registry.add(attached.map_err(|error| error.to_string())?);
        Ok(())
    }
}

/// Returns text as one line of limited length.
fn one_line(text: &str) -> String {
    text.chars().map(|letter| if letter.is_control() { '?' } else { letter }).take(TEXT_MAX).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attempts_are_made_less_and_less_often_and_end_with_the_problems() {
        let mut delays = vec![retry_delay(None, true)];
        while delays.len() < 7 {
            delays.push(retry_delay(delays[delays.len() - 1], true));
        }
        let millis: Vec<_> = delays.iter().map(|delay| delay.map(|delay| delay.as_millis())).collect();
        assert_eq!(millis, [200, 400, 800, 1600, 3200, 5000, 5000].map(Some));
        assert_eq!((retry_delay(None, false), retry_delay(Some(RETRY_MAX), false)), (None, None));
    }

    #[test]
    fn a_problem_is_one_line() {
        assert_eq!(one_line("used by a\nb\u{1b}[0m (1)"), "used by a?b?[0m (1)");
        assert_eq!(one_line(&"\u{e4}".repeat(TEXT_MAX + 1)).chars().count(), TEXT_MAX);
    }
}
