//! A new namespace for each test: the test binary runs itself again under `unshare` for that test.
//!
//! Guarantees: the test's changes of network and mounts end with it.

use std::env;
use std::process::{Command, Stdio};
use std::time::Duration;

use stead::host::Scope;
use stead::host::netlink::Netlink;
use stead_schemas::names::{LinkName, Uid};

const INSIDE: &str = "STEAD_TEST_IN_NAMESPACE";

/// Time limit for changes that are immediate on an idle machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// Runs the calling test's body inside. The test is found by the name of its closure.
pub(crate) fn in_namespace<Body: AsyncFnOnce()>(body: Body) {
    if env::var_os(INSIDE).is_some() {
        // A new namespace begins with the host's setting.
        shell("echo 0 > /proc/sys/net/ipv4/ip_forward");
        // It shows the devices of the namespace in which it was mounted.
        shell("mount -t sysfs sysfs /sys");
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        return runtime.expect("a runtime starts").block_on(body());
    }
    let path = std::any::type_name::<Body>();
    let name = path.strip_prefix("host::").and_then(|path| path.strip_suffix("::{{closure}}"));
    let name = name.expect("the body is a closure of the test itself");
    let output = Command::new("unshare")
        .args(["--net", "--mount", "--"])
        .arg(env::current_exe().expect("this program has a path"))
        .args(["--exact", name, "--nocapture", "--test-threads=1"])
        .env(INSIDE, "1")
        .stdin(Stdio::null())
        .output()
        .expect("unshare (package util-linux) runs");
    let reported =
        [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).concat();
    assert!(output.status.success(), "{name} failed inside its namespace:\n{reported}");
    assert!(reported.contains("1 passed"), "{name} did not run inside its namespace:\n{reported}");
}

/// Runs a shell line and returns its output.
pub(crate) fn shell(line: &str) -> String {
    let output = Command::new("sh").args(["-ec", line]).output().expect("sh runs");
    let reported = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{line}: {reported}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

pub(crate) fn netlink(scope: &str) -> Netlink {
    Netlink::new(Scope::new(scope).expect("a valid scope")).expect("netlink sockets open")
}

pub(crate) fn link_name(text: &str) -> LinkName {
    text.parse().expect("a valid name")
}

/// Returns a uid that begins with this letter.
pub(crate) fn uid(first: char) -> Uid {
    format!("{first}{:023}", 0).parse().expect("a letter and digits")
}
