//! Headers of the guest kernel: present for users who build modules, absent for users who do not want them, and not
//! required for a boot.

use std::path::{Path, PathBuf};

use reqwest::Method;
use serde_json::{Value, json};

use crate::agent::waiting;
use crate::fixtures::{kernel_dir, run};
use crate::harness::Harness;
use crate::invariants::settles;
use crate::namespace::in_namespace;
use crate::socket::shell;

/// Returns a kernel directory with headers: the machine's own, or a copy that they are fetched for.
fn with_headers() -> PathBuf {
    let has_headers = |dir: &Path| dir.join("current/modules-headers.squashfs").exists();
    let own = kernel_dir();
    if has_headers(&own) {
        return own;
    }
    let copy = Path::new(env!("CARGO_TARGET_TMPDIR")).join("kernel");
    if !has_headers(&copy) {
        let (from, to) = (own.join(".").display().to_string(), copy.display().to_string());
        run("cp", &["-a", &from, &to]);
        run(concat!(env!("CARGO_MANIFEST_DIR"), "/deploy/fetch-kernel"), &[&to]);
    }
    copy
}

/// Command that loads modules explicitly, and through the kernel's own requests.
const MODULES: &str = "ip link add own0 type dummy && modprobe bridge && ip link add own1 type bridge && \
                       ls /sys/class/net | grep own && test -c /dev/fuse && test -c /dev/net/tun && echo devices";

/// Returns a directory of links to the same kernel without headers.
fn without_headers(site: &Harness) -> PathBuf {
    let bare = site.scratch("bare-kernel");
    for part in ["boot", "lib"] {
        std::os::unix::fs::symlink(kernel_dir().join("current").join(part), bare.join(part)).expect("linked");
    }
    bare
}

fn report(seen: &Value) -> Option<&Value> {
    let conditions = seen["conditions"].as_array().expect("conditions");
    conditions.iter().find(|condition| condition["type"] == "KernelHeaders")
}

const SCRIPT: &str = "cd /lib/modules/$(uname -r)/build && pwd -P && grep -c . Makefile && ls -d ../linux-headers-*-common/include";

#[test]
fn a_guest_has_the_headers_of_its_kernel_unless_skipped_and_runs_without_where_there_are_none() {
    // This runs before the namespace, which has no way out.
    with_headers();
    in_namespace(async || {
        let mut site = Harness::new().await;
        site.kernel_dir = with_headers();
        site.start().await;
        waiting(&site, "box", json!({})).await;
        let version = shell(&site, "box", "uname -r").await;
        let reported = shell(&site, "box", SCRIPT).await;
        assert!(reported.contains(&format!("/usr/src/linux-headers-{version}")), "{reported}");
        assert_eq!(report(&site.get("box").await), None);
        // A memory continues with the disk that its guest has mounted.
        let standby = site.request(Method::POST, "/instances/box/standby", None).await;
        assert_eq!(standby.body["state"], "Standby", "{standby:?}");
        let restored = site.request(Method::POST, "/instances/box/restore", None).await;
        assert_eq!(restored.body["state"], "Running", "{restored:?}");
        assert_eq!(shell(&site, "box", SCRIPT).await, reported);
        assert_eq!(shell(&site, "box", MODULES).await, "own0\nown1\ndevices");
        // Headers that are not requested are absent; modules are there.
        waiting(&site, "bare", json!({ "skip_kernel_headers": true })).await;
        let script = "ls -d /usr/src /lib/modules/*/build /lib/modules 2>/dev/null; true";
        assert_eq!(shell(&site, "bare", script).await, "/lib/modules");
        assert_eq!(shell(&site, "bare", MODULES).await, "own0\nown1\ndevices");
        site.delete("bare").await;
        // A host without headers reports that, and running instances with headers continue.
        site.kernel_dir = without_headers(&site);
        site.kill().await;
        site.start().await;
        site.until_state("box", "Running").await;
        assert_eq!(shell(&site, "box", SCRIPT).await, reported);
        waiting(&site, "poor", json!({})).await;
        let seen = site.get("poor").await;
        let why = report(&seen).map(|condition| [condition["status"].clone(), condition["reason"].clone()]);
        assert_eq!(why, Some([json!("False"), json!("KernelHeadersMissing")]), "{seen:#}");
        assert_eq!(shell(&site, "poor", script).await, "");
        for name in ["box", "poor"] {
            site.delete(name).await;
        }
        settles(&mut site, "headers").await;
    });
}
