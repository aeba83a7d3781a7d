//! Control groups of VMMs on the real kernel, with small programs in the place of VMMs. Each test has a scope of its own.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use stead::host::cgroup::Cgroups;
use stead::hypervisor::driver::{Needs, VmmCommand};
use stead::hypervisor::record::VmPaths;
use stead::hypervisor::{Jails, SpawnPlan, Spawned, USERS, UserRange, spawn};
use stead_controllers::host::{Limits, LimitsSeen, VmmLimits};
use stead_schemas::names::Uid;
use stead_schemas::quantity::Bytes;

use crate::namespace::{PATIENCE, uid};

const LIMITS: VmmLimits = VmmLimits { vcpus: 1, memory: Bytes(64 << 20) };

/// A scope of groups. Its groups are gone when it is dropped.
struct Scope {
    name: String,
    cgroups: Cgroups,
    directory: tempfile::TempDir,
}

impl Scope {
    fn new(name: &str) -> Self {
        let name = format!("{name}-{}", std::process::id());
        let cgroups = Cgroups::probe(&name);
        assert!(cgroups.is_enforced(), "this host has no control groups that can be written to");
        Self { name, cgroups, directory: tempfile::tempdir().expect("scratch") }
    }

    fn paths(&self, owner: &Uid) -> VmPaths {
        VmPaths::new(&self.directory.path().join("run"), &self.directory.path().join("data"), owner)
    }

    /// Spawns a line of the shell as a VMM without walls.
    fn run(&self, owner: &Uid, line: &str, threads_max: u64) -> Spawned {
        let paths = self.paths(owner);
        for directory in [paths.runtime(), paths.logs()] {
            fs::create_dir_all(directory).expect("made");
        }
        let command = VmmCommand {
            program: "/bin/sh".into(),
            arguments: vec!["-c".to_owned(), line.to_owned()],
            has_console_on_stdout: false,
            needs: Some(Needs { threads_max, ..Needs::default() }),
        };
        let plan = SpawnPlan {
            owner: owner.clone(),
            paths,
            file_size_max: 1 << 20,
            ram: None,
            user: None,
            limits: Some(LIMITS),
        };
        let users = UserRange::new(USERS).expect("valid");
        let jails = Jails::new(users, self.directory.path().to_owned()).without_walls();
        spawn(&jails, &self.cgroups, command, plan).expect("the program runs")
    }

    fn log(&self, owner: &Uid) -> String {
        fs::read_to_string(self.paths(owner).vmm_log()).expect("there")
    }

    /// Returns the directories of the groups of an owner, one for each hierarchy.
    fn groups(&self, owner: &Uid) -> Vec<PathBuf> {
        let roots = ["", "memory", "cpu", "pids", "blkio"].into_iter();
        let group = |root| Path::new("/sys/fs/cgroup").join(root).join(format!("stead-{}", self.name));
        roots.map(|root| group(root).join(owner.as_str())).filter(|group| group.exists()).collect()
    }
}

impl Drop for Scope {
    fn drop(&mut self) {
        let is_left = |scope: &Self| {
            let _ = Cgroups::probe(&scope.name);
            ["", "memory", "cpu", "pids", "blkio"].iter().any(|root| {
                Path::new("/sys/fs/cgroup").join(root).join(format!("stead-{}", scope.name)).exists()
            })
        };
        let deadline = std::time::Instant::now() + PATIENCE;
        // What has just ended is in its group for a moment longer.
        while is_left(self) && std::time::Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

async fn ended(spawned: Spawned) -> String {
    tokio::time::timeout(PATIENCE, spawned.ended).await.expect("it ends").expect("its end is reported")
}

#[tokio::test]
async fn a_vmm_is_in_its_groups_from_its_first_instruction() {
    let (scope, owner) = (Scope::new("first"), uid('a'));
    ended(scope.run(&owner, "cat /proc/self/cgroup >&2", 8)).await;
    let (log, groups) = (scope.log(&owner), scope.groups(&owner).len());
    let group = format!("/stead-{}/{owner}", scope.name);
    let inside = log.lines().filter(|line| line.ends_with(&group)).count();
    assert!(groups > 0 && inside == groups, "{inside} of {groups}:\n{log}");
}

#[tokio::test]
async fn a_vmm_that_takes_more_memory_than_its_limit_is_killed_and_others_are_not_blamed() {
    let (scope, greedy, modest) = (Scope::new("memory"), uid('a'), uid('b'));
    // It keeps everything that it has read, for want of a line's end.
    assert_eq!(ended(scope.run(&greedy, "exec tail /dev/zero", 8)).await, "signal: 9");
    assert!(scope.cgroups.was_out_of_memory(greedy.as_str()));
    assert_eq!(ended(scope.run(&modest, "kill -9 $$", 8)).await, "signal: 9");
    assert!(!scope.cgroups.was_out_of_memory(modest.as_str()), "it was killed for another reason");
    // The next VMM of the same owner begins with a clean record.
    assert_eq!(ended(scope.run(&greedy, "exit 3", 8)).await, "exit status: 3");
    assert!(!scope.cgroups.was_out_of_memory(greedy.as_str()));
}

#[tokio::test]
async fn a_vmm_that_makes_processes_without_end_is_refused_more() {
    let (scope, owner) = (Scope::new("tasks"), uid('a'));
    let bomb = "n=0; while [ $n -lt 200 ]; do sleep 1 & n=$((n+1)); done; echo all >&2";
    ended(scope.run(&owner, bomb, 4)).await;
    let log = scope.log(&owner);
    assert!(log.to_lowercase().contains("fork") && !log.contains("all"), "{log}");
}

#[tokio::test]
async fn limits_are_seen_changed_while_the_vmm_runs_and_seen_to_be_others() {
    let (scope, owner) = (Scope::new("change"), uid('a'));
    let sleeper = scope.run(&owner, "exec sleep 1000", 8);
    let seen = async || scope.cgroups.inspect(&owner).await.expect("read").expect("it has limits");
    let whole = |limits: VmmLimits| LimitsSeen { vcpus: Some(limits.vcpus), memory: Some(limits.memory) };
    assert_eq!(seen().await, whole(LIMITS));
    let larger = VmmLimits { vcpus: 3, memory: Bytes(96 << 20) };
    scope.cgroups.set(&owner, larger).await.expect("set");
    assert_eq!(seen().await, whole(larger));
    assert!(seen().await.are(larger) && !seen().await.are(LIMITS));
    // Another program takes the limits away.
    for group in scope.groups(&owner) {
        for (file, unlimited) in
            [("memory.max", "max"), ("memory.limit_in_bytes", "-1"), ("cpu.cfs_quota_us", "-1")]
        {
            if group.join(file).exists() {
                fs::write(group.join(file), unlimited).expect("written");
            }
        }
    }
    assert!(!seen().await.are(larger));
    scope.cgroups.set(&owner, larger).await.expect("set");
    assert_eq!(seen().await, whole(larger));
    let killed = Command::new("kill").args(["-9", &sleeper.pid.to_string()]).status();
    assert!(killed.expect("kill runs").success());
    assert_eq!(ended(sleeper).await, "signal: 9");
    assert_eq!(scope.cgroups.inspect(&uid('b')).await.expect("read"), None, "another VMM has none");
}
