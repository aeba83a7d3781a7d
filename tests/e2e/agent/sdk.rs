//! The official Python SDK's own `exec` and `cp` helpers on a real VM.

use std::path::Path;
use std::process::Command;

use serde_json::json;

use super::waiting;
use crate::harness::{Harness, LISTEN, image};
use crate::invariants::settles;
use crate::namespace::in_namespace;
use crate::python;

fn run_script(site: &Harness, name: &str) -> String {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/sdk").join(name);
    let mut command = Command::new(python::python());
    command.arg(script).arg(site.scratch("sdk")).env("STEAD_BASE_URL", format!("http://{LISTEN}"));
    command.env("STEAD_API_KEY", site.token()).env("STEAD_TEST_IMAGE", image("busybox"));
    let output = python::run(&mut command);
    let printed =
        [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).concat();
    assert!(output.status.success(), "{name}: {printed}\n{}", site.daemon_log());
    printed
}

#[test]
fn the_official_python_sdk_runs_programs_and_copies_files() {
    // The SDK is installed outside the namespace, where the package index is reachable; inside it exists already.
    python::python();
    in_namespace(async || {
        let mut site = Harness::running().await;
        waiting(&site, "box", json!({})).await;
        assert!(run_script(&site, "test_agent.py").contains("agent: everything passed"));
        site.delete("box").await;
        settles(&mut site, "the SDK").await;
    });
}

#[test]
fn the_official_python_sdk_drives_real_machines() {
    python::python();
    in_namespace(async || {
        let mut site = Harness::running().await;
        assert!(run_script(&site, "test_sdk.py").contains("sdk: everything passed"));
        settles(&mut site, "the SDK").await;
    });
}
