//! The tests of this program on a KVM host, which `tests/kvmbox` emulates.
//!
//! Guarantees: the box ends with its test, and a deadline ends it with the last lines of its console.

use std::env;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};

use stead_schemas::limits::RESYNC_INTERVAL;

use crate::fixtures::kernel_dir;
use crate::harness::{Harness, MOMENT};
use crate::namespace::{in_namespace, inside, slot_lock};

/// Tests that `make test` runs on KVM too, each in a box of its own. Together they should take at most eight minutes.
const FIXED: [&str; 4] = [
    "escapes::a_vmm_reaches_nothing_of_the_host",
    "confinement::a_vmm_is_behind_its_walls_and_cannot_change_what_it_shares",
    "accelerator::a_q35_vm_lives_on_the_hosts_accelerator",
    "accelerator::a_microvm_lives_on_the_hosts_accelerator",
];
/// Time limits of a fixed test in one box after another, in seconds: it has to fail in all of them before it counts as
/// failed. The emulator of the box has faults: in about one of fifty boots the host in the box or a guest in it crashes or
/// stands still (`tests/kvmbox/fetch-qemu`). The limits grow, so that a box that stands still costs little, and a busy
/// machine (two minutes for the longest beside a load of six) has time in the end. A fault of our own that is as rare is
/// not found by these tests; each failed attempt is printed.
const FIXED_SECONDS: [u32; 3] = [400, 600, 900];
/// Time limit of all tests, in seconds.
const ALL_SECONDS: u32 = 8 * 3600;
/// Time limit of a command that ends at once, on a busy machine.
const BOX_SECONDS: u32 = 300;
/// Factor of the time limits of tests in the box.
const PATIENCE: u32 = 3;
const _: () = assert!(
    MOMENT.as_secs() * (PATIENCE as u64) < RESYNC_INTERVAL.as_secs(),
    "a comparison could undo the damage that an event must undo"
);
/// Memory of the box for few VMs, and for tests that start many, in mebibytes.
const MEBIBYTES: [u32; 2] = [3072, 8192];

/// Returns the directory of the images for a test in the box.
fn images(test: &str) -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).join("kvmbox-images").join(test)
}

/// Returns the start of a command line in the box, which ends after this number of seconds.
fn in_box(seconds: u32, mebibytes: u32) -> Command {
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).parent().expect("cargo's directory");
    let mut command = Command::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/kvmbox/box"));
    command.args(["-s", &seconds.to_string(), "-m", &mebibytes.to_string(), "--"]);
    command.env("CARGO_TARGET_DIR", target).env("STEAD_KERNEL_DIR", kernel_dir()).stdin(Stdio::null());
    command
}

/// Returns how a box ended, with the last lines of its console if it did not end by itself.
fn end_of_box(ended: ExitStatus) -> String {
    const LINES: usize = 40;
    if !matches!(ended.code(), Some(124 | 125)) {
        return ended.to_string();
    }
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).with_file_name("kvmbox").join("console.log");
    let console = std::fs::read(path).unwrap_or_default();
    let console = String::from_utf8_lossy(&console);
    let lines: Vec<&str> = console.lines().collect();
    format!("{ended}; its console ends with:\n{}", lines[lines.len().saturating_sub(LINES)..].join("\n"))
}

/// Runs a command line in a box. Returns how it ended if it did not succeed.
fn ends(mut command: Command) -> Result<(), String> {
    let ended = command.status().expect("the box starts");
    if ended.success() { Ok(()) } else { Err(end_of_box(ended)) }
}

/// Runs a command line in one box after another, with a time limit of its own in each, until it succeeds in one of them.
fn succeeds(what: &str, command: impl Fn(u32) -> Command) {
    let mut failures = Vec::new();
    for seconds in FIXED_SECONDS {
        let Err(why) = ends(command(seconds)) else { return };
        eprintln!("{what}: failed in box {} of {}: {why}", failures.len() + 1, FIXED_SECONDS.len());
        failures.push(why);
    }
    panic!("{what} failed in each box, the output is above: {failures:?}");
}

/// Returns the command line of this program in a box.
fn these(seconds: u32, mebibytes: u32, arguments: &[&str]) -> Command {
    let settings = [
        format!("STEAD_TEST_PATIENCE={PATIENCE}"),
        "STEAD_TEST_ACCELERATOR=kvm".to_owned(),
        format!("STEAD_TEST_IMAGES={}", images("tests").display()),
        format!("STEAD_KERNEL_DIR={}", kernel_dir().display()),
        format!("PATH={}", env::var("PATH").unwrap_or_default()),
    ];
    let mut command = in_box(seconds, mebibytes);
    command.arg("env").args(settings).arg(env::current_exe().expect("this program has a path"));
    // One VM at a time boots in half the time of two, and the daemon limits the time of a boot.
    // A failure is reported as it happens, so that it is known even if the box does not end by itself.
    command.args(["--test-threads=1", "--nocapture"]).args(arguments);
    command
}

/// Runs many tests in one box.
fn run_in_box(arguments: &[&str]) {
    let ended = ends(these(ALL_SECONDS, MEBIBYTES[1], arguments));
    assert!(ended.is_ok(), "the tests on KVM failed, their output is above: {ended:?}");
}

#[test]
fn the_box_has_kvm_returns_exit_codes_and_ends_at_its_deadline() {
    let _slot = slot_lock();
    let run = |seconds: u32, line: &str| {
        let output = in_box(seconds, MEBIBYTES[0]).args(["sh", "-c", line]).output().expect("the box starts");
        let [out, error] = [output.stdout, output.stderr].map(|it| String::from_utf8_lossy(&it).into_owned());
        (output.status.code(), out, error)
    };
    let devices =
        "test -c /dev/kvm && test -c /dev/net/tun && test -e /sys/fs/cgroup/cgroup.procs && echo has it";
    let (code, out, error) = run(BOX_SECONDS, &format!("{devices}; echo and that >/dev/stderr; exit 7"));
    assert_eq!((code, out.as_str()), (Some(7), "has it\nand that\n"), "{error}");
    // It has not come up by then, or else its command has not ended.
    let (code, _, error) = run(2, "sleep 1000");
    assert!(code == Some(124) && error.contains("within 2 s"), "{code:?}: {error}");
}

/// Runs the fixed tests, or those that `STEAD_TEST_KVM` names: parts of names, or `all`.
#[test]
fn these_tests_pass_on_kvm() {
    in_namespace(async || Harness::new().await.prepare_images(&images("tests")));
    if inside().is_some() {
        return;
    }
    let _slot = slot_lock();
    match env::var("STEAD_TEST_KVM") {
        Err(_) => {
            for test in FIXED {
                succeeds(test, |seconds| these(seconds, MEBIBYTES[0], &["--exact", test]));
            }
        }
        Ok(names) if names == "all" => {
            crate::debian::layout();
            crate::python::python();
            // The demo makes its image by itself, with programs that are slow in the box.
            run_in_box(&["--skip", "kvmbox::", "--skip", "demo::"]);
        }
        Ok(names) => {
            let names = names.split_whitespace().chain(["--skip", "kvmbox::"]);
            run_in_box(&names.collect::<Vec<_>>());
        }
    }
}

/// Installs the daemon in a box with systemd, as `deploy/README.md` says.
#[test]
fn a_vm_lives_under_the_unit_in_systemd() {
    in_namespace(async || Harness::new().await.prepare_images(&images("unit")));
    if inside().is_some() {
        return;
    }
    let _slot = slot_lock();
    succeeds("the unit", |seconds| {
        let mut command = in_box(seconds, MEBIBYTES[0]);
        command.arg(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/kvmbox/unit"));
        command.arg(env!("CARGO_BIN_EXE_stead")).arg(images("unit").join("layout")).arg(kernel_dir());
        command
    });
}
