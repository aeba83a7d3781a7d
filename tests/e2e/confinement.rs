//! The walls around the VMM of a real VM, from its start through standby, as the kernel and the API report them.

use std::collections::BTreeMap;
use std::fs;

use reqwest::Method;
use serde_json::{Value, json};
use stead::hypervisor::missing_walls;

use crate::agent::waiting;
use crate::harness::Harness;
use crate::invariants::settles;
use crate::namespace::in_namespace;

fn condition(seen: &Value) -> Option<&Value> {
    let conditions = seen["conditions"].as_array().expect("conditions");
    conditions.iter().find(|condition| condition["type"] == "Confined")
}

/// Returns the files that a process has open, each with whether it can write to it.
fn open_files(pid: u64) -> BTreeMap<String, bool> {
    let descriptors = fs::read_dir(format!("/proc/{pid}/fd")).expect("it lives").flatten();
    let file = |entry: fs::DirEntry| {
        let target = fs::read_link(entry.path()).ok()?.display().to_string();
        let info = format!("/proc/{pid}/fdinfo/{}", entry.file_name().display());
        let info = fs::read_to_string(info).ok()?;
        let flags = info.lines().find_map(|line| line.strip_prefix("flags:"))?.trim().to_owned();
        Some((target, !flags.ends_with('0')))
    };
    descriptors.filter_map(file).filter(|(target, _)| target.starts_with('/')).collect()
}

/// Checks the walls of the VM, and returns its pid.
async fn check(site: &Harness) -> u64 {
    let seen = site.get("box").await;
    let pid = seen["vmm_pid"].as_u64().expect("it runs");
    let process = u32::try_from(pid).expect("a pid");
    let missing = missing_walls(process).expect("inspected").expect("it lives");
    assert!(missing.is_empty(), "{missing:?}");
    let confined = condition(&seen).expect("reported");
    assert_eq!(confined["status"], "True", "{confined}");
    let score = fs::read_to_string(format!("/proc/{pid}/oom_score_adj")).expect("it lives");
    assert_eq!(score.trim(), "500");
    assert_eq!(fs::read(format!("/proc/{pid}/environ")).expect("it lives"), b"");
    // The root of the process is its view: of the host's directories there are those of its program and files alone.
    let root = fs::read_dir(format!("/proc/{pid}/root")).expect("it lives").flatten();
    let names: Vec<String> = root.map(|entry| entry.file_name().display().to_string()).collect();
    assert!(
        !names.iter().any(|name| ["proc", "sys", "dev", "run", "root"].contains(&name.as_str())),
        "{names:?}"
    );
    pid
}

#[test]
fn a_vmm_is_behind_its_walls_and_cannot_change_what_it_shares() {
    in_namespace(async || {
        let mut site = Harness::running().await;
        waiting(&site, "box", json!({})).await;
        let pid = check(&site).await;
        let files = open_files(pid);
        let shared: Vec<_> =
            files.iter().filter(|(path, can_write)| path.ends_with(".squashfs") && **can_write).collect();
        assert!(shared.is_empty(), "{shared:?}");
        assert!(files.keys().any(|path| path.ends_with(".squashfs")), "{files:?}");
        for verb in ["standby", "restore"] {
            let answer = site.request(Method::POST, &format!("/instances/box/{verb}"), None).await;
            assert!(answer.status.is_success(), "{verb}: {answer:?}");
            if verb == "standby" {
                assert_eq!(condition(&site.get("box").await), None, "there is no VMM");
            }
        }
        let restored = check(&site).await;
        let memory = site.data().join("memory").display().to_string();
        let ram: Vec<_> =
            open_files(restored).into_iter().filter(|(path, _)| path.starts_with(&memory)).collect();
        assert!(!ram.is_empty() && ram.iter().all(|(_, can_write)| !can_write), "forks share it: {ram:?}");
        // The next daemon finds the same process.
        site.kill().await;
        site.start().await;
        site.until_state("box", "Running").await;
        assert_eq!(check(&site).await, restored);
        site.delete("box").await;
        settles(&mut site, "confinement").await;
    });
}
