//! A separate host for each test with a daemon: the test binary runs itself again in new network, mount and process
//! namespaces.
//!
//! Guarantees: at most four such tests run at a time on this machine, or one that must be alone. Everything that a
//! test leaves, processes and links alike, ends with its namespaces, also when it fails.

use std::env;
use std::fs::{self, File};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::fs::{FlockOperation, flock};

const INSIDE: &str = "STEAD_E2E_INSIDE";

/// Script of the first process in the namespace. It mounts the view of devices that belongs to this network, with the
/// control groups in their place, and reaps orphans, which a test would not do.
const FIRST: &str = "set -e; ip link set lo up; echo 0 > /proc/sys/net/ipv4/ip_forward; kept=$(mktemp -d)
    mount --rbind /sys/fs/cgroup $kept; mount -t sysfs sysfs /sys; mount --move $kept /sys/fs/cgroup
    rmdir $kept; set +e; \"$0\" \"$@\"; exit $?";

/// Number of permits for tests with real VMs, which all test runs on this machine share. No machine that runs these tests
/// has fewer than two processors, and a test waits about half of its time.
const SLOTS: usize = 4;
/// Time between two polls for a free permit. A test takes seconds.
const POLL_INTERVAL: Duration = Duration::from_millis(50);

/// The permits that a test holds, and the index of the first one.
#[derive(Debug)]
pub(crate) struct SlotLock {
    slot: usize,
    _locks: Vec<File>,
}

impl SlotLock {
    /// Returns the name of the objects outside of namespaces that belong to the test with this permit.
    pub(crate) fn bridge(&self) -> String {
        bridge_of(self.slot)
    }
}

fn lock_file(slot: usize) -> File {
    let path = env::temp_dir().join(format!("stead-e2e-{slot}.lock"));
    File::options().create(true).append(true).open(path).expect("the lock file opens")
}

/// Waits for a permit among all tests with real VMs.
pub(crate) fn slot_lock() -> SlotLock {
    // A test inside its namespaces has the permit of its outer process.
    if let Some(slot) = inside() {
        return SlotLock { slot, _locks: Vec::new() };
    }
    let files: Vec<File> = (0..SLOTS).map(lock_file).collect();
    loop {
        for (slot, file) in files.iter().enumerate() {
            if flock(file, FlockOperation::NonBlockingLockExclusive).is_ok() {
                let lock = file.try_clone().expect("cloned");
                return SlotLock { slot, _locks: vec![lock] };
            }
        }
        std::thread::sleep(POLL_INTERVAL);
    }
}

/// Waits for all permits.
pub(crate) fn all_slots_lock() -> SlotLock {
    let files: Vec<File> = (0..SLOTS).map(lock_file).collect();
    for file in &files {
        flock(file, FlockOperation::LockExclusive).expect("locked");
    }
    SlotLock { slot: 0, _locks: files }
}

/// Returns the permit of a test that runs in its namespaces.
pub(crate) fn inside() -> Option<usize> {
    env::var(INSIDE).ok().map(|slot| slot.parse().expect("a number"))
}

/// Returns the bridge of a test's daemon. Objects that a daemon creates outside of namespaces are named after it too.
pub(crate) fn bridge() -> String {
    bridge_of(inside().expect("a test with a daemon is in its namespaces"))
}

fn bridge_of(slot: usize) -> String {
    format!("ste2e{slot}")
}

/// Runs the calling test's body inside namespaces. The test is found by the name of its closure.
pub(crate) fn in_namespace<Body: AsyncFnOnce()>(body: Body) {
    run(body, slot_lock);
}

/// Runs the body inside namespaces, with no other test beside it: for tests that measure times or costs.
pub(crate) fn in_namespace_alone<Body: AsyncFnOnce()>(body: Body) {
    run(body, all_slots_lock);
}

fn run<Body: AsyncFnOnce()>(body: Body, slot_lock: fn() -> SlotLock) {
    if inside().is_some() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        return runtime.expect("a runtime starts").block_on(body());
    }
    let slot_lock = slot_lock();
    let path = std::any::type_name::<Body>();
    let name = path.strip_prefix("e2e::").and_then(|path| path.strip_suffix("::{{closure}}"));
    let name = name.expect("the body is a closure of the test itself");
    let output = Command::new("unshare")
        .args([
            "--net",
            "--mount",
            "--pid",
            "--fork",
            "--kill-child",
            "--mount-proc",
            "--",
            "sh",
            "-c",
            FIRST,
        ])
        .arg(env::current_exe().expect("this program has a path"))
        .args(["--exact", name, "--nocapture", "--test-threads=1"])
        .env(INSIDE, slot_lock.slot.to_string())
        .stdin(Stdio::null())
        .output()
        .expect("unshare (package util-linux) runs");
    remove_groups(&bridge_of(slot_lock.slot));
    let reported =
        [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).concat();
    assert!(output.status.success(), "{name} failed inside its namespace:\n{reported}");
    assert!(reported.contains("1 passed"), "{name} did not run inside its namespace:\n{reported}");
    // The output is printed, so that the test runner can show it on request.
    std::io::Write::write_all(&mut std::io::stdout(), reported.as_bytes()).expect("it is read");
}

/// Removes control groups, which are outside of namespaces. Those of a test are empty once its processes ended.
fn remove_groups(bridge: &str) {
    for root in ["", "memory", "cpu", "pids", "blkio"] {
        let parent = Path::new("/sys/fs/cgroup").join(root).join(format!("stead-{bridge}"));
        let groups = fs::read_dir(&parent).into_iter().flatten().flatten().map(|entry| entry.path());
        for group in groups.filter(|path| path.is_dir()).chain([parent.clone()]) {
            // A group that is absent, or not empty yet, is not worth a failure.
            let _ = fs::remove_dir(group);
        }
    }
}
