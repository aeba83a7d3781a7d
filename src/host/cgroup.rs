//! Control groups: each VMM has its own, where the host allows it.
//!
//! Version 2 is preferred, then the mounted hierarchies of version 1. The group is a mark and serves accounting. A
//! host without writable groups runs VMs all the same, and reports that in `GET /capabilities` by
//! [`Cgroups::is_enforced`].
//! A VMM is in its group from its first instruction. With version 2 it is made there. With version 1 it enters before its
//! program runs, as a process of one thread that moves itself: the kernel then takes no lock on all processes, for which
//! it waits 10 ms otherwise (0.06 ms were measured on Linux 6.18; versions before 6.2 take the lock all the same).

use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

/// The hierarchies in which we create groups.
#[derive(Debug, Clone)]
pub struct Cgroups {
    parents: Vec<PathBuf>,
    is_version_2: bool,
}

/// A group for a process that does not exist yet.
#[derive(Debug, Default)]
pub(crate) struct Group {
    /// The directory of version 2, in which the process is made.
    pub(crate) directory: Option<OwnedFd>,
    /// The files of version 1 by which the process enters.
    pub(crate) entries: Vec<File>,
}

const VERSION_1: [&str; 3] = ["memory", "cpu", "pids"];

impl Cgroups {
    /// Finds the writable hierarchies of this host. Groups of this scope are below `stead-SCOPE`.
    #[must_use]
    pub fn probe(scope: &str) -> Self {
        let root = Path::new("/sys/fs/cgroup");
        let is_version_2 = root.join("cgroup.controllers").exists();
        let mounts = if is_version_2 {
            vec![root.to_owned()]
        } else {
            VERSION_1
                .iter()
                .map(|controller| root.join(controller))
                .filter(|dir| dir.join("cgroup.procs").exists())
                .collect()
        };
        let parents = mounts.into_iter().map(|mount| mount.join(format!("stead-{scope}")));
        // The directory is created only as a check for write permission. It is created again with the first group.
        let is_ours = |parent: &PathBuf| {
            let is_made = fs::create_dir_all(parent).is_ok();
            remove_empty_below(parent);
            let _ = fs::remove_dir(parent);
            is_made
        };
        Self { parents: parents.filter(is_ours).collect(), is_version_2 }
    }

    /// True if at least one hierarchy accepts our groups.
    #[must_use]
    pub fn is_enforced(&self) -> bool {
        !self.parents.is_empty()
    }

    /// Makes the group of this name for a process that is about to be made.
    pub(crate) fn prepare(&self, name: &str) -> io::Result<Group> {
        let mut group = Group::default();
        for parent in &self.parents {
            let directory = parent.join(name);
            // The parent is created again if the end of the last VM removed it in between.
            fs::create_dir_all(&directory).or_else(|_| fs::create_dir_all(&directory))?;
            if self.is_version_2 {
                group.directory = Some(File::open(&directory)?.into());
            } else {
                group.entries.push(File::options().write(true).open(directory.join("tasks"))?);
            }
        }
        Ok(group)
    }

    /// Puts a process into the group of this name, in every hierarchy, unless it is there already. Waits for a grace
    /// period of the kernel, which was measured as 8 ms.
    pub(crate) fn enter(&self, name: &str, pid: u32) -> io::Result<()> {
        let pid = pid.to_string();
        for parent in &self.parents {
            let group = parent.join(name);
            let processes = group.join("cgroup.procs");
            if fs::read_to_string(&processes).is_ok_and(|pids| pids.lines().any(|line| line == pid)) {
                continue;
            }
            // The parent is created again if the end of the last VM removed it in between.
            fs::create_dir_all(&group).or_else(|_| fs::create_dir_all(&group))?;
            if let Err(error) = fs::write(processes, &pid) {
                // The process's group may have been removed before the group was created.
                let _ = fs::remove_dir(&group);
                return Err(error);
            }
        }
        Ok(())
    }

    /// Removes the group of this name. A group that still has processes stays, which is an error.
    pub(crate) fn remove(&self, name: &str) -> io::Result<()> {
        for parent in &self.parents {
            match fs::remove_dir(parent.join(name)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
            // The scope's own directory is removed with the last VM. Directories in use cannot be removed.
            let _ = fs::remove_dir(parent);
        }
        Ok(())
    }
}

/// Removes empty groups left by a daemon that ended between the end of a VM and the removal of its group. Groups of
/// running VMs are not empty.
fn remove_empty_below(parent: &Path) {
    let groups = fs::read_dir(parent).into_iter().flatten().flatten().map(|entry| entry.path());
    for group in groups.filter(|path| path.is_dir()) {
        let _ = fs::remove_dir(group);
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn a_group_holds_its_process_and_an_empty_one_goes_with_the_next_daemon() {
        let scope = format!("test-{}", std::process::id());
        let cgroups = Cgroups::probe(&scope);
        let mut sleeper = Command::new("/bin/sleep").arg("1000").spawn().expect("started");
        let groups = |name: &str| cgroups.parents.iter().map(|parent| parent.join(name)).collect::<Vec<_>>();
        for _ in 0..2 {
            cgroups.enter("vm", sleeper.id()).expect("entered");
        }
        let pid = format!("{}\n", sleeper.id());
        for group in groups("vm") {
            assert_eq!(fs::read_to_string(group.join("cgroup.procs")).expect("there"), pid);
        }
        let _ = Cgroups::probe(&scope);
        assert!(groups("vm").iter().all(|group| group.exists()), "one that runs was touched");
        sleeper.kill().and_then(|()| sleeper.wait()).expect("ended");
        assert!(cgroups.parents.is_empty() || cgroups.enter("late", sleeper.id()).is_err());
        assert!(groups("late").iter().all(|group| !group.exists()), "made for one that had ended");
        let _ = Cgroups::probe(&scope);
        assert!(groups("").iter().all(|parent| !parent.exists()), "left over");
    }
}
