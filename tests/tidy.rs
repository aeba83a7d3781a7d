//! The rules that a compiler does not know: layering, sizes, names, and documents.

#[path = "tidy/documents.rs"]
mod documents;
#[path = "tidy/imports.rs"]
mod imports;
#[path = "tidy/language.rs"]
mod language;
#[path = "tidy/ports.rs"]
mod ports;
#[path = "tidy/routes.rs"]
mod routes;
#[path = "tidy/sizes.rs"]
mod sizes;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// A source file of ours.
struct Source {
    path: String,
    text: String,
}

const LINES_MAX: usize = 500;

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn files_below(dir: &Path, ending: &str, out: &mut Vec<Source>) {
    let Ok(entries) = fs::read_dir(dir) else { return };
    let mut paths: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    paths.sort();
    for path in paths {
        if path.is_dir() {
            files_below(&path, ending, out);
        } else if path.to_string_lossy().ends_with(ending) {
            let text = fs::read_to_string(&path).expect("sources are UTF-8");
            let path = path.strip_prefix(root()).expect("below the root").to_string_lossy().into_owned();
            out.push(Source { path, text });
        }
    }
}

fn sources() -> Vec<Source> {
    let mut out = Vec::new();
    for dir in ["schemas", "controllers", "src", "tests"] {
        files_below(&root().join(dir), ".rs", &mut out);
    }
    assert!(out.len() > 50, "the tree was not found");
    out
}

/// Fails with one line for each finding.
fn none(findings: Vec<String>) {
    assert!(findings.is_empty(), "\n{}", findings.join("\n"));
}

/// Returns the lines of code without comments, with their numbers.
fn code(text: &str) -> impl Iterator<Item = (usize, &str)> {
    text.lines()
        .enumerate()
        .map(|(at, line)| (at + 1, line))
        .filter(|(_, line)| !line.trim_start().starts_with("//"))
}

/// Returns `true` if a line has a `use` path or a qualified name of this crate's module.
fn mentions(line: &str, module: &str) -> bool {
    line.contains(&format!("crate::{module}::"))
        || line.contains(&format!("crate::{module}}}"))
        || line.contains(&format!("use crate::{module};"))
}

#[test]
fn every_file_opens_with_its_job() {
    none(
        sources().iter().filter(|file| !file.text.starts_with("//!")).map(|file| file.path.clone()).collect(),
    );
}

#[test]
fn files_hold_one_idea_in_few_lines() {
    let findings = sources().into_iter().filter_map(|file| {
        let lines = file.text.lines().count();
        (lines > LINES_MAX).then(|| format!("{} has {lines} lines; {LINES_MAX} are allowed", file.path))
    });
    none(findings.collect());
}

#[test]
fn words_that_mean_unfinished_work_do_not_occur() {
    let banned = [
        concat!("FIX", "ME"),
        concat!("TO", "DO"),
        concat!("XX", "X"),
        concat!("dbg", "!("),
        concat!("todo", "!("),
        concat!("unimplemented", "!("),
        concat!("#[ign", "ore"),
    ];
    let mut findings = Vec::new();
    for file in sources() {
        for (number, line) in file.text.lines().enumerate() {
            findings.extend(
                banned
                    .iter()
                    .filter(|word| line.contains(**word))
                    .map(|word| format!("{}:{} {word}", file.path, number + 1)),
            );
        }
    }
    none(findings);
}

#[test]
fn modules_are_named_by_what_they_are() {
    let banned = ["util", "utils", "common", "helper", "helpers", "misc", "manager", "handler", "types"];
    let stem =
        |file: &Source| Path::new(&file.path).file_stem().map(|stem| stem.to_string_lossy().into_owned());
    none(
        sources()
            .iter()
            .filter(|file| stem(file).is_some_and(|stem| banned.contains(&stem.as_str())))
            .map(|file| file.path.clone())
            .collect(),
    );
}

/// Rule 4: in controllers, `runtime` and `store` know no kind, and no kind imports another.
#[test]
fn kinds_do_not_know_each_other() {
    let kinds =
        ["image", "disk", "network", "port", "vm", "volume", "snapshot", "schedule", "ingress", "node"];
    let mut findings = Vec::new();
    for file in sources() {
        let Some(rest) = file.path.strip_prefix("controllers/src/") else { continue };
        let module = rest.split('/').next().unwrap_or("");
        let is_kind = kinds.contains(&module);
        let is_machinery = matches!(module, "runtime" | "store" | "host");
        // Admission is the edge of a request: that of an instance declares its image, takes volumes and makes its
        // port, and that of a fork asks for a snapshot.
        let is_edge = rest.contains("/admission") || rest.ends_with("/tests.rs");
        if !(is_kind || is_machinery) || is_edge {
            continue;
        }
        for (number, line) in code(&file.text) {
            for kind in kinds.iter().filter(|kind| **kind != module && mentions(line, kind)) {
                findings.push(format!("{}:{number} knows {kind}", file.path));
            }
        }
    }
    none(findings);
}

/// Rule 5: `api` and `host`, `hypervisor` never meet; `cli` knows the wire only.
#[test]
fn effects_meet_only_in_assemble() {
    let rules: [(&str, &[&str]); 10] = [
        ("src/api/", &["host", "hypervisor", "ingress", "assemble", "cli"]),
        ("src/host/", &["api", "store", "assemble", "cli", "hypervisor", "memory", "snapshots"]),
        ("src/ingress/", &["api", "store", "assemble", "cli", "host", "hypervisor"]),
        ("src/hypervisor/", &["api", "store", "assemble", "cli"]),
        // A driver knows the boundary; saved memories and locks are shared by all drivers.
        ("src/hypervisor/qemu/", &["memory", "snapshots", "locks"]),
        (
            "src/guest_channel/",
            &["api", "store", "assemble", "cli", "host", "hypervisor", "memory", "snapshots"],
        ),
        ("src/memory/", &["api", "store", "assemble", "cli", "hypervisor", "snapshots"]),
        ("src/snapshots/", &["api", "store", "assemble", "cli"]),
        ("src/store/", &["api", "host", "hypervisor", "assemble", "cli"]),
        ("src/cli/", &["host", "hypervisor", "ingress"]),
    ];
    let mut findings = Vec::new();
    for file in sources() {
        for (dir, banned) in rules.iter().filter(|(dir, _)| file.path.starts_with(dir)) {
            for (number, line) in code(&file.text) {
                findings.extend(
                    banned
                        .iter()
                        .filter(|module| mentions(line, module))
                        .map(|module| format!("{}:{number} {dir} uses {module}", file.path)),
                );
            }
        }
    }
    none(findings);
}

/// Files with verbs on the daemon of this host and its files.
const OWN_VERBS: [&str; 2] = ["src/cli/daemon.rs", "src/cli/tokens.rs"];

/// Client verbs know the wire; only the daemon's own verbs reach further.
#[test]
fn client_verbs_know_only_the_wire() {
    let mut findings = Vec::new();
    for file in
        sources().iter().filter(|file| file.path.starts_with("src/cli/") && !OWN_VERBS.contains(&&*file.path))
    {
        for (number, line) in code(&file.text) {
            let is_foreign = line.contains("stead_controllers")
                || ["api", "store", "config", "assemble"].iter().any(|module| mentions(line, module));
            if is_foreign {
                findings.push(format!("{}:{number}", file.path));
            }
        }
    }
    none(findings);
}

/// Rule 6: decisions do not depend on products.
#[test]
fn controllers_name_no_product() {
    let banned = ["sled", "netlink", "nftables", "qemu", "squashfs", "axum"];
    let mut findings = Vec::new();
    for file in sources().iter().filter(|file| file.path.starts_with("controllers/")) {
        for (number, line) in file.text.lines().enumerate() {
            let line = line.to_ascii_lowercase();
            let words: BTreeSet<&str> = line.split(|c: char| !c.is_ascii_alphanumeric()).collect();
            findings.extend(
                banned
                    .iter()
                    .filter(|word| words.contains(**word))
                    .map(|word| format!("{}:{} {word}", file.path, number + 1)),
            );
        }
    }
    // The wire's own word for the hypervisor is a value, not a dependency; `Disks` says ext4 in its promise.
    findings.retain(|finding| {
        !finding.contains("Hypervisor") && !finding.starts_with("controllers/src/host/disks.rs")
    });
    findings
        .retain(|finding| !(finding.starts_with("controllers/src/vm/tests/") || finding.contains("/sim/")));
    none(findings);
}

/// Files that all VMMs share. No VMM may be named in them, not even in comments.
const SHARED_BY_VMMS: [&str; 5] =
    ["src/hypervisor/", "src/guest_channel/", "src/memory/", "src/snapshots/", "src/locks.rs"];

/// Words of a driver other than its name.
const WORDS_OF_DRIVERS: [(&str, &str); 1] = [("qemu", "qmp")];

/// Files outside of the drivers' folders that may name them, each with its reason.
const MAY_NAME_DRIVERS: [(&str, &str); 5] = [
    ("src/config.rs", "the key for the path of the program"),
    ("src/doctor/", "advice on which package to install"),
    ("src/cli/", "values of the wire in help texts"),
    ("src/assemble/mod.rs", "the hypervisor of instances that name none"),
    ("src/fuzzing.rs", "the entry point of a fuzzer"),
];

/// Folders below `src/hypervisor` that all drivers share.
const NO_DRIVERS: [&str; 1] = ["jail"];

/// Lists the drivers' folders below `src/hypervisor`.
fn drivers() -> Vec<String> {
    let entries = fs::read_dir(root().join("src/hypervisor")).expect("the folder is there").flatten();
    let folders = entries.filter(|entry| entry.path().is_dir());
    let mut names: Vec<String> =
        folders.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.retain(|name| !NO_DRIVERS.contains(&name.as_str()));
    assert!(!names.is_empty(), "no driver was found");
    names
}

/// Returns whether a line is the registration of a driver: the one line that a new driver adds to
/// `dispatch.rs`, or the declaration of its module.
fn is_registration(path: &str, line: &str, driver: &str) -> bool {
    let line = line.trim_start();
    match path {
        "src/hypervisor/dispatch.rs" => line.starts_with(&format!("Arc::new(super::{driver}::")),
        "src/hypervisor/mod.rs" => line == format!("pub mod {driver};"),
        _ => false,
    }
}

/// A product is named in its driver's folder, and shared parts know none.
#[test]
fn only_a_driver_names_its_vmm() {
    let mut findings = Vec::new();
    for driver in drivers() {
        let folder = format!("src/hypervisor/{driver}/");
        let extra = WORDS_OF_DRIVERS.iter().filter(|(name, _)| *name == driver).map(|(_, word)| *word);
        let spelled = driver.replace('_', "-");
        let words: Vec<&str> = [driver.as_str(), spelled.as_str()].into_iter().chain(extra).collect();
        for file in sources().iter().filter(|file| file.path.starts_with("src/")) {
            let is_shared = SHARED_BY_VMMS.iter().any(|shared| file.path.starts_with(shared));
            let is_excepted = MAY_NAME_DRIVERS.iter().any(|(path, _)| file.path.starts_with(path));
            if file.path.starts_with(&folder) || (is_excepted && !is_shared) {
                continue;
            }
            for (number, line) in file.text.lines().enumerate() {
                let lower = line.to_ascii_lowercase();
                let is_named = words.iter().any(|word| lower.contains(word));
                if is_named && !is_registration(&file.path, line, &driver) {
                    findings.push(format!("{}:{} names {driver}", file.path, number + 1));
                }
            }
        }
    }
    none(findings);
}

/// Files that may name a particular hypervisor, apart from tests.
const MAY_NAME_HYPERVISORS: [&str; 5] = [
    "schemas/",
    "src/hypervisor/",
    // The hypervisor of instances that name none.
    "src/assemble/",
    // The simulated host is a driver too.
    "controllers/src/sim/",
    "tests/",
];

/// Decisions depend on the declared capabilities of a hypervisor and not on which hypervisor it is.
#[test]
fn only_drivers_know_particular_hypervisors() {
    let known = ["Qemu", "QemuMicrovm", "CloudHypervisor", "Firecracker", "Vz"];
    let known = known.map(|name| format!("Hypervisor::{name}"));
    let mut findings = Vec::new();
    for file in sources() {
        let is_excepted = MAY_NAME_HYPERVISORS.iter().any(|path| file.path.starts_with(path));
        if is_excepted || file.path.ends_with("tests.rs") || file.path.contains("/tests/") {
            continue;
        }
        let shipped = file.text.split("#[cfg(test)]\nmod tests {").next().unwrap_or_default();
        for (number, line) in code(shipped) {
            let names = known.iter().filter(|name| line.contains(name.as_str()));
            findings.extend(names.map(|name| format!("{}:{number} names {name}", file.path)));
        }
    }
    none(findings);
}

/// A driver is registered by one line.
#[test]
fn each_driver_has_one_line_of_dispatch() {
    let all = sources();
    let dispatch = all.iter().find(|file| file.path == "src/hypervisor/dispatch.rs").expect("it is there");
    for driver in drivers() {
        let is_its = |line: &&str| is_registration(&dispatch.path, line, &driver);
        assert_eq!(dispatch.text.lines().filter(is_its).count(), 1, "{driver}");
    }
}

/// Rule 7: the simulated machine never reaches a user.
#[test]
fn the_simulation_is_a_development_dependency_only() {
    let manifest = fs::read_to_string(root().join("Cargo.toml")).expect("read");
    let (normal, development) = manifest.split_once("[dev-dependencies]").expect("both tables are there");
    let normal = normal.rsplit_once("[dependencies]").expect("the table is there").1;
    assert!(!normal.contains("\"sim\""), "a normal dependency turns the feature sim on");
    assert!(development.contains("\"sim\""));
}

#[test]
fn schemas_do_no_work_of_their_own() {
    let banned = ["tokio", "std::fs", "std::net::Tcp", "std::process", "Timestamp::now", "SystemTime"];
    let mut findings = Vec::new();
    for file in sources()
        .iter()
        .filter(|file| file.path.starts_with("schemas/") || file.path.starts_with("controllers/src/"))
    {
        let is_schema = file.path.starts_with("schemas/");
        if file.path.ends_with("tests.rs") || file.path.contains("/tests/") {
            continue;
        }
        for (number, line) in code(&file.text) {
            let bans = banned.iter().filter(|ban| is_schema || **ban != "tokio");
            findings.extend(
                bans.filter(|ban| line.contains(**ban)).map(|ban| format!("{}:{number} {ban}", file.path)),
            );
        }
    }
    none(findings);
}

#[test]
fn every_limit_is_used() {
    let all = sources();
    let is_limits = |file: &Source| file.path.starts_with("schemas/src/limits/");
    let lines = all.iter().filter(|file| is_limits(file)).flat_map(|file| file.text.lines());
    let names: Vec<&str> =
        lines.filter_map(|line| line.strip_prefix("pub const ")?.split(':').next()).collect();
    assert!(names.len() > 50, "the limits were not found");
    let is_used = |name: &str| all.iter().any(|file| !is_limits(file) && file.text.contains(name));
    none(names.into_iter().filter(|name| !is_used(name)).map(ToOwned::to_owned).collect());
}
