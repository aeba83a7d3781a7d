//! Control groups: each VMM in one of its own, where the host allows it.
//!
//! Version 2 first, else the version 1 hierarchies that are mounted. The group is a mark and a
//! place for accounting; a host without writable groups runs VMs all the same, and says so in
//! `GET /capabilities` by [`Cgroups::is_enforced`].

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// The hierarchies we make groups in.
#[derive(Debug, Clone)]
pub struct Cgroups {
    parents: Vec<PathBuf>,
}

const VERSION_1: [&str; 3] = ["memory", "cpu", "pids"];

impl Cgroups {
    /// Finds what this host offers; groups of this scope go below `stead-SCOPE`.
    #[must_use]
    pub fn probe(scope: &str) -> Self {
        let root = Path::new("/sys/fs/cgroup");
        let mounts = if root.join("cgroup.controllers").exists() {
            vec![root.to_owned()]
        } else {
            VERSION_1
                .iter()
                .map(|controller| root.join(controller))
                .filter(|dir| dir.join("cgroup.procs").exists())
                .collect()
        };
        let parents = mounts.into_iter().map(|mount| mount.join(format!("stead-{scope}")));
        // Made to see whether it may be; it is made again with the first group.
        let is_ours = |parent: &PathBuf| {
            let is_made = fs::create_dir_all(parent).is_ok();
            remove_empty_below(parent);
            let _ = fs::remove_dir(parent);
            is_made
        };
        Self { parents: parents.filter(is_ours).collect() }
    }

    /// At least one hierarchy takes our groups.
    #[must_use]
    pub fn is_enforced(&self) -> bool {
        !self.parents.is_empty()
    }

    /// Puts a process into the group of this name, in every hierarchy, unless it is there. Waits for a
    /// grace period of the kernel: 8 ms were measured.
    pub(crate) fn enter(&self, name: &str, pid: u32) -> io::Result<()> {
        let pid = pid.to_string();
        for parent in &self.parents {
            let group = parent.join(name);
            let members = group.join("cgroup.procs");
            if fs::read_to_string(&members).is_ok_and(|pids| pids.lines().any(|line| line == pid)) {
                continue;
            }
            // Again when the last VM's end took the parent away in between.
            fs::create_dir_all(&group).or_else(|_| fs::create_dir_all(&group))?;
            if let Err(error) = fs::write(members, &pid) {
                // Its group may have been removed before it was made.
                let _ = fs::remove_dir(&group);
                return Err(error);
            }
        }
        Ok(())
    }

    /// Removes the group of this name; one that still has processes stays, and is an error.
    pub(crate) fn remove(&self, name: &str) -> io::Result<()> {
        for parent in &self.parents {
            match fs::remove_dir(parent.join(name)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
            // The scope's own directory goes with the last VM; others stay, being in use.
            let _ = fs::remove_dir(parent);
        }
        Ok(())
    }
}

/// What a daemon left that ended between the end of a VM and that of its group. Groups of VMs that run
/// are not empty.
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
