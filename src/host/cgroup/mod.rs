//! Control groups: each VMM has its own, where the host allows it.
//!
//! Version 2 is preferred, then the mounted hierarchies of version 1. The group is a mark, serves accounting, and limits
//! what the VMM takes of the host. A host without writable groups runs VMs all the same, and reports that in
//! `GET /capabilities` by [`Cgroups::is_enforced`]. A host without one of the controllers runs them without its limit.
//!
//! A VMM is in its group from its first instruction. With version 2 it is made there. With version 1 it enters before its
//! program runs, as a process of one thread that moves itself: the kernel then takes no lock on all processes, for which
//! it waits 10 ms otherwise (0.06 ms were measured on Linux 6.18; versions before 6.2 take the lock all the same).

mod limits;

use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use stead_controllers::host::{HostError, Limits, LimitsSeen, VmmLimits};
use stead_schemas::names::Uid;

/// Time in which a process that has ended leaves its group: it has to be scheduled once more. Time between two attempts.
const LEAVING: Duration = Duration::from_secs(2);
const LEAVING_POLL: Duration = Duration::from_millis(1);

/// The hierarchies in which we create groups.
#[derive(Debug, Clone)]
pub struct Cgroups {
    hierarchies: Vec<Hierarchy>,
}

/// A hierarchy, and the directory of our groups in it.
#[derive(Debug, Clone)]
struct Hierarchy {
    /// Name of its controller in version 1; `None` for version 2, which has all of them.
    controller: Option<&'static str>,
    parent: PathBuf,
}

/// The limits that a VMM is spawned with.
#[derive(Debug, Clone, Copy)]
pub struct SpawnLimits {
    pub vmm: VmmLimits,
    /// Largest number of its threads.
    pub tasks: u64,
}

/// A group for a process that does not exist yet.
#[derive(Debug, Default)]
pub(crate) struct Group {
    /// The directory of version 2, in which the process is made.
    pub(crate) directory: Option<OwnedFd>,
    /// The files of version 1 by which the process enters.
    pub(crate) entries: Vec<File>,
}

const VERSION_1: [&str; 4] = ["memory", "cpu", "pids", "blkio"];
/// Controllers that are asked for in version 2.
const VERSION_2: [&str; 4] = ["memory", "cpu", "pids", "io"];
/// Directory at which hierarchies are mounted.
const ROOT: &str = "/sys/fs/cgroup";

impl Cgroups {
    /// Finds the writable hierarchies of this host. Groups of this scope are below `stead-SCOPE`.
    #[must_use]
    pub fn probe(scope: &str) -> Self {
        let root = Path::new(ROOT);
        let name = format!("stead-{scope}");
        let hierarchies: Vec<Hierarchy> = if root.join("cgroup.controllers").exists() {
            vec![Hierarchy { controller: None, parent: root.join(name) }]
        } else {
            let mounted = VERSION_1.iter().filter(|name| root.join(name).join("cgroup.procs").exists());
            let hierarchy = |controller: &&'static str| Hierarchy {
                controller: Some(*controller),
                parent: root.join(controller).join(&name),
            };
            mounted.map(hierarchy).collect()
        };
        // The directory is created only as a check for write permission. It is created again with the first group.
        let is_ours = |hierarchy: &Hierarchy| {
            let is_made = hierarchy.make_parent().is_ok();
            remove_empty_below(&hierarchy.parent);
            let _ = fs::remove_dir(&hierarchy.parent);
            is_made
        };
        Self { hierarchies: hierarchies.into_iter().filter(is_ours).collect() }
    }

    /// True if at least one hierarchy accepts our groups.
    #[must_use]
    pub fn is_enforced(&self) -> bool {
        !self.hierarchies.is_empty()
    }

    /// Makes the group of this name, with its limits, for a process that is about to be made.
    pub(crate) fn prepare(&self, name: &str, limits: Option<SpawnLimits>) -> io::Result<Group> {
        let mut group = Group::default();
        for hierarchy in &self.hierarchies {
            let directory = hierarchy.parent.join(name);
            // An empty group that an earlier VMM left has counted that one's end.
            let _ = fs::remove_dir(&directory);
            hierarchy.make(&directory)?;
            if let Some(SpawnLimits { vmm, tasks }) = limits {
                let set = limits::set(&directory, hierarchy.controller, vmm);
                // The VMM is still in its group then, and the limits are set again while it runs.
                if let Err(error) = set.and(limits::set_tasks(&directory, tasks)) {
                    tracing::warn!(owner = name, %error, "the VMM begins without one of its limits");
                }
            }
            match hierarchy.controller {
                None => group.directory = Some(File::open(&directory)?.into()),
                Some(_) => group.entries.push(File::options().write(true).open(directory.join("tasks"))?),
            }
        }
        Ok(group)
    }

    /// Returns `true` if the kernel ended a process of this group because memory was short.
    #[must_use]
    pub fn was_out_of_memory(&self, name: &str) -> bool {
        let groups = self.hierarchies.iter().map(|hierarchy| hierarchy.parent.join(name));
        groups.filter_map(|group| limits::memory_kills(&group)).any(|kills| kills > 0)
    }

    /// Puts a process into the group of this name, in every hierarchy, unless it is there already. Waits for a grace
    /// period of the kernel, which was measured as 8 ms.
    pub(crate) fn enter(&self, name: &str, pid: u32) -> io::Result<()> {
        let pid = pid.to_string();
        for hierarchy in &self.hierarchies {
            let group = hierarchy.parent.join(name);
            let processes = group.join("cgroup.procs");
            if fs::read_to_string(&processes).is_ok_and(|pids| pids.lines().any(|line| line == pid)) {
                continue;
            }
            hierarchy.make(&group)?;
            if let Err(error) = fs::write(processes, &pid) {
                // The process's group may have been removed before the group was created.
                let _ = fs::remove_dir(&group);
                return Err(error);
            }
        }
        Ok(())
    }

    /// Removes the group of this name. A group that still has processes stays, which is an error. Waits for a process
    /// that has ended to leave its group.
    pub(crate) fn remove(&self, name: &str) -> io::Result<()> {
        for Hierarchy { parent, .. } in &self.hierarchies {
            remove_left(&parent.join(name))?;
            // The scope's own directory is removed with the last VM. Directories in use cannot be removed.
            let _ = fs::remove_dir(parent);
        }
        Ok(())
    }
}

impl Hierarchy {
    fn make_parent(&self) -> io::Result<()> {
        fs::create_dir_all(&self.parent)?;
        if self.controller.is_none() {
            // Controllers reach a group only through those above. What the kernel lacks, or keeps back, is left out.
            for directory in [Path::new(ROOT), &self.parent] {
                let controllers = VERSION_2.iter().map(|name| format!("+{name}"));
                controllers.for_each(|one| drop(fs::write(directory.join("cgroup.subtree_control"), one)));
            }
        }
        Ok(())
    }

    fn make(&self, group: &Path) -> io::Result<()> {
        let make = || self.make_parent().and_then(|()| fs::create_dir_all(group));
        // The parent is created again if the end of the last VM removed it in between.
        make().or_else(|_| make())
    }
}

impl Limits for Cgroups {
    async fn inspect(&self, owner: &Uid) -> Result<Option<LimitsSeen>, HostError> {
        let groups = self.hierarchies.iter().map(|hierarchy| hierarchy.parent.join(owner.as_str()));
        let seen = groups.filter(|group| group.exists()).map(|group| limits::read(&group));
        let both = |one: LimitsSeen, other: LimitsSeen| LimitsSeen {
            vcpus: one.vcpus.or(other.vcpus),
            memory: one.memory.or(other.memory),
        };
        Ok(seen.reduce(both))
    }

    async fn set(&self, owner: &Uid, limits: VmmLimits) -> Result<(), HostError> {
        for Hierarchy { controller, parent } in &self.hierarchies {
            let group = parent.join(owner.as_str());
            // A VMM of an earlier version is in no group of this hierarchy.
            if !group.exists() {
                continue;
            }
            let set = limits::set(&group, *controller, limits);
            set.map_err(|error| HostError::io("limit the VMM of", owner.as_str(), error))?;
        }
        Ok(())
    }
}

/// Removes a group, also one whose last process was reported as ended just now: the kernel takes it out of its group a
/// moment after the report.
fn remove_left(group: &Path) -> io::Result<()> {
    let deadline = Instant::now() + LEAVING;
    loop {
        match fs::remove_dir(group) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy && Instant::now() < deadline => {
                std::thread::sleep(LEAVING_POLL);
            }
            removed => return removed,
        }
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
        let groups = |name: &str| {
            cgroups.hierarchies.iter().map(|hierarchy| hierarchy.parent.join(name)).collect::<Vec<_>>()
        };
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
        assert!(cgroups.hierarchies.is_empty() || cgroups.enter("late", sleeper.id()).is_err());
        assert!(groups("late").iter().all(|group| !group.exists()), "made for one that had ended");
        let _ = Cgroups::probe(&scope);
        assert!(groups("").iter().all(|parent| !parent.exists()), "left over");
    }
}
