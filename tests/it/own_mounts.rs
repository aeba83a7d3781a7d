//! Tests that run again in their own mount namespace.

use std::process::Command;

/// Environment variable that is set for the copy of this program that runs a test in its own mounts.
const INSIDE: &str = "STEAD_TEST_OWN_MOUNTS";

/// Runs the test again in its own mount namespace and returns `true`. Returns `false` inside of it. Otherwise
/// namespaces that other programs create meanwhile would copy the mounts, and hold file systems that lost their
/// power.
pub(crate) fn ran_in_own_mounts(test: &str) -> bool {
    if std::env::var_os(INSIDE).is_some() {
        return false;
    }
    let mut command = Command::new("unshare");
    command.args(["--mount", "--"]).arg(std::env::current_exe().expect("this program has a path"));
    command.args(["--exact", test, "--nocapture", "--test-threads=1"]).env(INSIDE, "1");
    let output = command.output().expect("unshare (package util-linux) runs");
    let reported =
        [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).concat();
    assert!(
        output.status.success() && reported.contains("1 passed"),
        "{test} failed in mounts of its own:\n{reported}"
    );
    true
}
