//! The processes that use a mounted volume, for messages to people.
//!
//! Guarantees: no file of a process is opened and no file system is asked, so none can delay the answer; a process whose
//! files under `/proc` cannot be read in time is left out.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use rustix::fs::{AtFlags, CWD, StatxFlags, statx};

use super::mountinfo;
use crate::devices::DeviceNumber;

const PROCESSES: &str = "/proc";
/// Time limit for a search.
const SEARCH: Duration = Duration::from_secs(1);
/// Limit on the bytes of memory mappings that are read of a process. Programs with many libraries have some dozens of KB.
const MAPPINGS_BYTES_MAX: u64 = 1 << 20;
/// Limit on the bytes of a process's name. The kernel's own limit is 15.
const NAME_BYTES_MAX: u64 = 64;

/// True while a search runs. One that is stuck in the kernel is not followed by others.
static IS_SEARCHING: AtomicBool = AtomicBool::new(false);

/// A volume as processes show their use of it.
#[derive(Debug, Clone)]
pub(super) struct Used {
    /// Numbers of its file system and of its disks.
    pub(super) devices: BTreeSet<DeviceNumber>,
    /// Number of the mount in this mount namespace.
    pub(super) mount: Option<u64>,
}

/// A process that uses a volume.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Holder {
    pid: u32,
    name: String,
}

impl Holder {
    fn of(pid: u32) -> Self {
        let mut name = Vec::new();
        let file = File::open(format!("{PROCESSES}/{pid}/comm"));
        let _ = file.and_then(|file| file.take(NAME_BYTES_MAX).read_to_end(&mut name));
        Self { pid, name: String::from_utf8_lossy(&name).trim().to_owned() }
    }
}

/// Returns text that names the processes that use the volume.
pub(super) fn users(used: &Used) -> String {
    let used = used.clone();
    let found = in_time(move |deadline| {
        let mut pids = processes().filter(|&pid| is_user(pid, &used, deadline));
        let first = pids.next().map(Holder::of);
        (first, pids.count())
    });
    match found {
        Some((Some(holder), others)) => text(&holder, others),
        Some((None, _)) | None => "it is in use".to_owned(),
    }
}

/// Returns text that names a reason why the disk of an unmounted volume is in use.
pub(super) fn users_of_disk(used: &Used) -> String {
    let devices = used.devices.clone();
    let found = in_time(move |deadline| elsewhere(&devices, deadline)).flatten();
    match found {
        Some((None, at)) => format!("it is still mounted at {}", at.display()),
        Some((Some(holder), at)) => {
            format!("it is still mounted at {} for {} ({})", at.display(), holder.name, holder.pid)
        }
        None => users(used),
    }
}

fn text(holder: &Holder, others: usize) -> String {
    let Holder { pid, name } = holder;
    match others {
        0 => format!("used by {name} ({pid})"),
        1 => format!("used by {name} ({pid}) and 1 other process"),
        _ => format!("used by {name} ({pid}) and {others} other processes"),
    }
}

/// Runs a search in a thread of its own. Returns `None` if it is not done in time.
fn in_time<T: Send + 'static>(search: impl FnOnce(Instant) -> T + Send + 'static) -> Option<T> {
    if IS_SEARCHING.swap(true, Ordering::AcqRel) {
        return None;
    }
    let (sender, found) = mpsc::sync_channel(1);
    let work = move || {
        let result = search(Instant::now() + SEARCH);
        IS_SEARCHING.store(false, Ordering::Release);
        let _ = sender.send(result);
    };
    if std::thread::Builder::new().name("holders".to_owned()).spawn(work).is_err() {
        IS_SEARCHING.store(false, Ordering::Release);
    }
    // The deadline ends most searches; a process that cannot be read does not delay this one either.
    found.recv_timeout(2 * SEARCH).ok()
}

fn processes() -> impl Iterator<Item = u32> {
    let entries = fs::read_dir(PROCESSES).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok())
}

fn is_user(pid: u32, used: &Used, deadline: Instant) -> bool {
    let process = PathBuf::from(format!("{PROCESSES}/{pid}"));
    let is_late = || Instant::now() >= deadline;
    if is_late() {
        return false;
    }
    let is_at = |link: &Path| is_on(link, used);
    let open = || fs::read_dir(process.join("fd")).into_iter().flatten().flatten();
    ["cwd", "root", "exe"].iter().any(|link| is_at(&process.join(link)))
        || open().take_while(|_| !is_late()).any(|file| is_at(&file.path()))
        || is_mapped(&process.join("maps"), &used.devices)
}

/// Returns whether a link of a process leads to a file of the volume. No file system is asked: some wait for a server.
fn is_on(link: &Path, used: &Used) -> bool {
    let flags = AtFlags::NO_AUTOMOUNT | AtFlags::STATX_DONT_SYNC;
    let Ok(file) = statx(CWD, link, flags, StatxFlags::TYPE | StatxFlags::MNT_ID) else { return false };
    let has_mount = StatxFlags::from_bits_retain(file.stx_mask).contains(StatxFlags::MNT_ID);
    let device = DeviceNumber { major: file.stx_dev_major, minor: file.stx_dev_minor };
    // A file on an overlay can have a number of its own; then its mount tells where it is.
    used.devices.contains(&device) || (has_mount && used.mount == Some(file.stx_mnt_id))
}

fn is_mapped(mappings: &Path, devices: &BTreeSet<DeviceNumber>) -> bool {
    let mut text = Vec::new();
    let file = File::open(mappings);
    let _ = file.and_then(|file| file.take(MAPPINGS_BYTES_MAX).read_to_end(&mut text));
    String::from_utf8_lossy(&text).lines().filter_map(mapped_device).any(|device| devices.contains(&device))
}

/// Returns the device in a line of mappings: addresses, rights, offset, device, inode, path.
fn mapped_device(line: &str) -> Option<DeviceNumber> {
    let mut words = line.split_whitespace().skip(3);
    let device = DeviceNumber::parse(words.next()?, 16)?;
    // Memory without a file has no inode.
    (words.next()? != "0").then_some(device)
}

/// Finds a mount of the devices: first in this mount namespace, then in those of other processes.
fn elsewhere(devices: &BTreeSet<DeviceNumber>, deadline: Instant) -> Option<(Option<Holder>, PathBuf)> {
    let at = |mounts: Vec<mountinfo::Mount>| {
        mounts.into_iter().find(|mount| devices.contains(&mount.device)).map(|mount| mount.at)
    };
    if let Some(at) = mountinfo::own().ok().and_then(at) {
        return Some((None, at));
    }
    let mut seen = BTreeSet::new();
    for pid in processes().take_while(|_| Instant::now() < deadline) {
        let process = PathBuf::from(format!("{PROCESSES}/{pid}"));
        let Ok(namespace) = fs::read_link(process.join("ns/mnt")) else { continue };
        if !seen.insert(namespace) {
            continue;
        }
        if let Some(at) = mountinfo::read(&process.join("mountinfo")).ok().and_then(at) {
            return Some((Some(Holder::of(pid)), at));
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_holder_and_the_number_of_others_are_named() {
        let holder = Holder { pid: 12, name: "postgres".to_owned() };
        assert_eq!(text(&holder, 0), "used by postgres (12)");
        assert_eq!(text(&holder, 1), "used by postgres (12) and 1 other process");
        assert_eq!(text(&holder, 7), "used by postgres (12) and 7 other processes");
    }

    #[test]
    fn mapped_files_name_their_device() {
        let number = DeviceNumber { major: 8, minor: 31 };
        for (line, expected) in [
            ("7f0-7f1 r-xp 00000000 08:1f 131 /data/lib x.so", Some(number)),
            ("7f0-7f1 rw-p 00000000 00:00 0 [heap]", None),
            ("7f0-7f1 rw-p 00000000", None),
            ("", None),
        ] {
            assert_eq!(mapped_device(line), expected, "{line}");
        }
    }

    #[test]
    fn this_process_uses_its_own_program() {
        let program = fs::metadata("/proc/self/exe").expect("it is there");
        let device = DeviceNumber::of(std::os::unix::fs::MetadataExt::dev(&program));
        let deadline = Instant::now() + 60 * SEARCH;
        let used = Used { devices: [device].into(), mount: None };
        assert!(is_on(Path::new("/proc/self/exe"), &used) && is_user(std::process::id(), &used, deadline));
        let unused = Used { devices: [DeviceNumber { major: 0, minor: 0 }].into(), mount: None };
        assert!(!is_user(std::process::id(), &unused, deadline));
        assert_eq!(Holder::of(std::process::id()).pid, std::process::id());
        assert_eq!(Holder::of(u32::MAX).name, "");
    }
}
