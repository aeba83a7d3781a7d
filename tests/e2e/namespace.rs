//! A host of its own for each test with a daemon: the test binary runs itself again in fresh
//! network, mount and process namespaces.
//!
//! Guarantees: one such test at a time on this machine, and one beside it that mostly waits; whatever a
//! test leaves, processes and links alike, ends with its namespaces, also when it fails.

use std::env;
use std::fs::{self, File};
use std::path::Path;
use std::process::{Command, Stdio};

use rustix::fs::{FlockOperation, flock};

use crate::site::BRIDGE;

const INSIDE: &str = "STEAD_E2E_INSIDE";

/// The first process of the namespace. It mounts the view of devices that belongs to this network,
/// with the control groups in their place, and collects orphans, which a test would not.
const FIRST: &str = "set -e; ip link set lo up; kept=$(mktemp -d)
    mount --rbind /sys/fs/cgroup $kept; mount -t sysfs sysfs /sys; mount --move $kept /sys/fs/cgroup
    rmdir $kept; set +e; \"$0\" \"$@\"; exit $?";

/// Waits for its turn among all tests with real VMs, of other runs of the tests too.
pub(crate) fn turn() -> File {
    turn_of("stead-e2e.lock")
}

fn turn_of(name: &str) -> File {
    let path = env::temp_dir().join(name);
    let file = File::options().create(true).append(true).open(path).expect("the lock file opens");
    if env::var_os(INSIDE).is_none() {
        flock(&file, FlockOperation::LockExclusive).expect("locked");
    }
    file
}

/// Runs the calling test's body inside; the test is found by the name of its closure.
pub(crate) fn in_namespace<F: AsyncFnOnce()>(body: F) {
    run(body, "stead-e2e.lock");
}

/// Likewise, beside another: for a test that spends its time waiting for time to pass.
pub(crate) fn in_namespace_waiting<F: AsyncFnOnce()>(body: F) {
    run(body, "stead-e2e-waiting.lock");
}

fn run<F: AsyncFnOnce()>(body: F, lock: &str) {
    if env::var_os(INSIDE).is_some() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        return runtime.expect("a runtime starts").block_on(body());
    }
    let _turn = turn_of(lock);
    let path = std::any::type_name::<F>();
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
        .env(INSIDE, "1")
        .stdin(Stdio::null())
        .output()
        .expect("unshare (package util-linux) runs");
    remove_groups();
    let said =
        [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).concat();
    assert!(output.status.success(), "{name} failed inside its namespace:\n{said}");
    assert!(said.contains("1 passed"), "{name} did not run inside its namespace:\n{said}");
}

/// Control groups are outside of namespaces; those of a test are empty once its processes ended.
fn remove_groups() {
    for root in ["", "memory", "cpu", "pids"] {
        let parent = Path::new("/sys/fs/cgroup").join(root).join(format!("stead-{BRIDGE}"));
        let groups = fs::read_dir(&parent).into_iter().flatten().flatten().map(|entry| entry.path());
        for group in groups.filter(|path| path.is_dir()).chain([parent.clone()]) {
            // One that is not there, or not empty yet, is not worth a failure.
            let _ = fs::remove_dir(group);
        }
    }
}
