//! Limits of a group, in the files of both versions of the kernel's interface.
//!
//! Guarantees: a limit that the kernel has no file for is left out, and shown as unknown.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;

use stead_controllers::host::{LimitsSeen, VmmLimits};
use stead_schemas::quantity::Bytes;

/// Period in which the time of processors is counted, in microseconds: the kernel's default.
const PERIOD_US: u64 = 100_000;
/// Processors of a VMM beside those of its guest: its threads for devices and disks, and those of the kernel that move
/// the guest's frames.
const OWN_CPUS: u64 = 1;
/// Weights of a VM with one processor: the defaults of both versions.
const WEIGHT: u64 = 100;
const SHARES: u64 = 1024;
/// Largest weight for disks that all schedulers take.
const DISK_WEIGHT_MAX: u64 = 1000;

/// A value of a file in a group.
#[derive(Debug, PartialEq, Eq)]
struct Setting {
    /// Hierarchy of version 1; `None` for version 2, which has one for all.
    controller: Option<&'static str>,
    file: &'static str,
    value: String,
}

fn settings(limits: VmmLimits) -> Vec<Setting> {
    let vcpus = u64::from(limits.vcpus);
    let quota = (vcpus + OWN_CPUS).saturating_mul(PERIOD_US);
    let disk_weight = (WEIGHT * vcpus).clamp(1, DISK_WEIGHT_MAX);
    let one = |file, value: String| Setting { controller: None, file, value };
    let of = |controller, file, value: u64| Setting {
        controller: Some(controller),
        file,
        value: value.to_string(),
    };
    vec![
        one("cpu.max", format!("{quota} {PERIOD_US}")),
        one("cpu.weight", (WEIGHT * vcpus).to_string()),
        one("memory.max", limits.memory.0.to_string()),
        // The group is one VMM: it ends as a whole.
        one("memory.oom.group", "1".to_owned()),
        one("io.weight", format!("default {disk_weight}")),
        of("cpu", "cpu.cfs_period_us", PERIOD_US),
        of("cpu", "cpu.cfs_quota_us", quota),
        of("cpu", "cpu.shares", SHARES * vcpus),
        of("memory", "memory.limit_in_bytes", limits.memory.0),
        of("blkio", "blkio.bfq.weight", disk_weight),
        of("blkio", "blkio.weight", disk_weight),
    ]
}

/// Sets the limits of a group in one hierarchy, which `controller` names in version 1.
///
/// # Errors
/// Returns the first error, with its file, after all others were written.
pub(super) fn set(group: &Path, controller: Option<&str>, limits: VmmLimits) -> io::Result<()> {
    let mut result = Ok(());
    for Setting { file, value, .. } in settings(limits).into_iter().filter(|one| one.controller == controller)
    {
        let written = write(group, file, &value);
        result = result.and(written);
    }
    result
}

/// Sets the largest number of tasks of a group.
pub(super) fn set_tasks(group: &Path, tasks: u64) -> io::Result<()> {
    write(group, "pids.max", &tasks.to_string())
}

fn write(group: &Path, file: &str, value: &str) -> io::Result<()> {
    let path = group.join(file);
    // Opened without making it: the kernel refuses that in another way than a file that it does not have.
    let file = File::options().write(true).open(&path);
    match file.and_then(|mut file| file.write_all(value.as_bytes())) {
        // This kernel has no such limit.
        Err(error) if error.kind() == io::ErrorKind::NotFound && group.exists() => Ok(()),
        Err(error) => Err(io::Error::new(error.kind(), format!("{}: {error}", path.display()))),
        Ok(()) => Ok(()),
    }
}

/// Reads the limits of a group in one hierarchy.
pub(super) fn read(group: &Path) -> LimitsSeen {
    let number = |file: &str| {
        let text = fs::read_to_string(group.join(file)).ok()?;
        let word = text.split_whitespace().next()?;
        // No limit is `max` in version 2, and a negative or a huge number in version 1.
        Some(word.parse::<u64>().unwrap_or(u64::MAX))
    };
    let quota = number("cpu.max").or_else(|| number("cpu.cfs_quota_us"));
    let vcpus = quota.map(|quota| (quota / PERIOD_US).saturating_sub(OWN_CPUS));
    let memory = number("memory.max").or_else(|| number("memory.limit_in_bytes"));
    LimitsSeen {
        vcpus: vcpus.map(|vcpus| u32::try_from(vcpus).unwrap_or(u32::MAX)),
        memory: memory.map(Bytes),
    }
}

/// Returns the number of processes of a group that the kernel ended because memory was short; `None` if it does not say.
pub(super) fn memory_kills(group: &Path) -> Option<u64> {
    let shown = ["memory.events", "memory.oom_control"].into_iter();
    let mut shown = shown.filter_map(|file| fs::read_to_string(group.join(file)).ok());
    let text = shown.next()?;
    let count = text.lines().find_map(|line| line.strip_prefix("oom_kill "))?;
    count.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: VmmLimits = VmmLimits { vcpus: 2, memory: Bytes(384 << 20) };

    /// Makes a group of plain files, empty as those of the kernel are full.
    fn group(files: &[&str]) -> tempfile::TempDir {
        let group = tempfile::tempdir().expect("scratch");
        files.iter().for_each(|file| fs::write(group.path().join(file), "").expect("made"));
        group
    }

    #[test]
    fn both_versions_have_their_files_and_what_is_missing_is_left_out() {
        let two = group(&["cpu.max", "cpu.weight", "memory.max", "memory.oom.group", "pids.max"]);
        set(two.path(), None, LIMITS).expect("set");
        set_tasks(two.path(), 70).expect("set");
        let read_of =
            |group: &tempfile::TempDir, file: &str| fs::read_to_string(group.path().join(file)).expect(file);
        assert_eq!(read_of(&two, "cpu.max"), "300000 100000");
        assert_eq!(
            (read_of(&two, "cpu.weight"), read_of(&two, "pids.max")),
            ("200".to_owned(), "70".to_owned())
        );
        assert!(!two.path().join("io.weight").exists(), "no file is made");
        assert_eq!(read(two.path()), LimitsSeen { vcpus: Some(2), memory: Some(LIMITS.memory) });
        let cpu = group(&["cpu.cfs_quota_us", "cpu.cfs_period_us", "cpu.shares"]);
        set(cpu.path(), Some("cpu"), LIMITS).expect("set");
        assert_eq!(
            (read_of(&cpu, "cpu.cfs_quota_us"), read_of(&cpu, "cpu.shares")),
            ("300000".to_owned(), "2048".to_owned())
        );
        assert_eq!(read(cpu.path()), LimitsSeen { vcpus: Some(2), memory: None });
        set(Path::new("/no/such/group"), None, LIMITS).expect_err("there is no group");
    }

    #[test]
    fn a_group_without_limits_is_shown_as_unlimited() {
        let new = group(&[]);
        fs::write(new.path().join("cpu.max"), "max 100000\n").expect("written");
        fs::write(new.path().join("memory.max"), "max\n").expect("written");
        let seen = read(new.path());
        assert_eq!((seen.vcpus, seen.memory), (Some(u32::MAX), Some(Bytes(u64::MAX))));
        let old = group(&[]);
        fs::write(old.path().join("cpu.cfs_quota_us"), "-1\n").expect("written");
        fs::write(old.path().join("memory.limit_in_bytes"), "9223372036854771712\n").expect("written");
        let seen = read(old.path());
        assert_eq!((seen.vcpus, seen.memory), (Some(u32::MAX), Some(Bytes(9_223_372_036_854_771_712))));
    }

    #[test]
    fn kills_for_memory_are_counted_in_either_file() {
        let two = group(&[]);
        assert_eq!(memory_kills(two.path()), None);
        fs::write(two.path().join("memory.events"), "low 0\noom 1\noom_kill 1\noom_group_kill 0\n")
            .expect("written");
        assert_eq!(memory_kills(two.path()), Some(1));
        let one = group(&[]);
        fs::write(one.path().join("memory.oom_control"), "oom_kill_disable 0\nunder_oom 0\noom_kill 3\n")
            .expect("written");
        assert_eq!(memory_kills(one.path()), Some(3));
    }
}
