//! The walls around a process, as the kernel reports them, whatever was requested at its start.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

use landlock::{ABI, Access, AccessFs, Ruleset, RulesetAttr};
use stead_schemas::confinement::Wall;

use crate::host::process::of_process;

/// The namespaces, by their names below `/proc/PID/ns`.
const NAMESPACES: [(&str, Wall); 6] = [
    ("mnt", Wall::Files),
    ("pid", Wall::Processes),
    ("net", Wall::Network),
    ("ipc", Wall::Ipc),
    ("uts", Wall::HostName),
    ("cgroup", Wall::ControlGroups),
];
/// Capability sets in `/proc/PID/status`.
const CAPABILITIES: [&str; 5] = ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"];

/// Returns the walls that a process is not behind. Returns `None` when there is no such process.
///
/// # Errors
/// Returns an error when the process cannot be inspected.
pub fn missing_walls(pid: u32) -> io::Result<Option<BTreeSet<Wall>>> {
    let process = Path::new("/proc").join(pid.to_string());
    let Some(status) = of_process(fs::read_to_string(process.join("status")))? else { return Ok(None) };
    let mut missing = missing_in(&status);
    for (name, wall) in NAMESPACES {
        let ours = fs::read_link(Path::new("/proc/self/ns").join(name));
        let theirs = of_process(fs::read_link(process.join("ns").join(name)))?;
        // A kernel without this namespace has no such link.
        if ours.ok().is_none_or(|ours| Some(ours) == theirs) {
            missing.insert(wall);
        }
    }
    Ok(Some(missing))
}

/// Returns the walls that the kernel of this host lacks.
#[must_use]
pub fn host_walls() -> BTreeSet<Wall> {
    let lacks = |name: &str| !Path::new("/proc/self/ns").join(name).exists();
    let mut missing: BTreeSet<Wall> =
        NAMESPACES.iter().filter(|(name, _)| lacks(name)).map(|(_, wall)| *wall).collect();
    let has_landlock = Ruleset::default()
        .handle_access(AccessFs::from_all(ABI::V1))
        .and_then(Ruleset::create)
        .is_ok_and(|rules| Option::<OwnedFd>::from(rules).is_some());
    if !has_landlock {
        missing.insert(Wall::Landlock);
    }
    missing
}

/// Returns the walls that a status, as in proc(5), does not show.
fn missing_in(status: &str) -> BTreeSet<Wall> {
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        line.unwrap_or_default().split_whitespace().collect::<Vec<_>>()
    };
    let is_own = |name: &str| field(name).len() == 4 && field(name).iter().all(|id| *id != "0");
    let is_user = is_own("Uid") && is_own("Gid") && field("Groups").is_empty();
    let is_none = |name: &&str| field(name).first().is_some_and(|set| set.bytes().all(|digit| digit == b'0'));
    let walls = [
        (Wall::User, is_user),
        (Wall::Capabilities, CAPABILITIES.iter().all(is_none)),
        (Wall::NoNewPrivileges, field("NoNewPrivs") == ["1"]),
        (Wall::SystemCalls, field("Seccomp") == ["2"]),
    ];
    walls.into_iter().filter(|(_, is_there)| !is_there).map(|(wall, _)| wall).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_without_walls_lacks_all_and_one_that_is_gone_has_none() {
        let missing = missing_walls(std::process::id()).expect("read").expect("this process lives");
        for wall in [Wall::User, Wall::Capabilities, Wall::Files, Wall::Network, Wall::Processes] {
            assert!(missing.contains(&wall), "{wall:?}");
        }
        assert_eq!(missing_walls(u32::MAX).expect("read"), None);
    }

    #[test]
    fn each_line_of_a_status_counts() {
        let complete = "Uid:\t7\t7\t7\t7\nGid:\t7\t7\t7\t7\nGroups:\t \nCapInh:\t0000000000000000\nCapPrm:\t0000000000000000\n\
            CapEff:\t0000000000000000\nCapBnd:\t0000000000000000\nCapAmb:\t0000000000000000\nNoNewPrivs:\t1\nSeccomp:\t2\n";
        assert_eq!(missing_in(complete), BTreeSet::new());
        for (from, to, wall) in [
            ("Uid:\t7\t7", "Uid:\t7\t0", Wall::User),
            ("Groups:\t ", "Groups:\t0", Wall::User),
            ("CapBnd:\t0", "CapBnd:\t1", Wall::Capabilities),
            ("NoNewPrivs:\t1", "NoNewPrivs:\t0", Wall::NoNewPrivileges),
            ("Seccomp:\t2", "Seccomp:\t0", Wall::SystemCalls),
        ] {
            assert_eq!(missing_in(&complete.replace(from, to)), BTreeSet::from([wall]), "{to}");
        }
    }
}
