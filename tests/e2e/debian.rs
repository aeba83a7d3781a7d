//! Images of a real Debian: as a root for programs, and as a system with its own systemd.
//!
//! They are built once per target directory, which takes a minute and a mirror.

use std::fs::{self, File};
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;

use rustix::fs::{FlockOperation, flock};

use crate::fixtures::run;

/// Name of the image with Debian's own packages and without a program to run.
pub(crate) const PLAIN: &str = "debian";
/// Name of the image with systemd as its program, a service that leaves marks, and a machine id.
pub(crate) const SYSTEM: &str = "debian-system";
/// Machine id of the system image. No VM of the image may have it.
pub(crate) const MACHINE_ID: &str = "00000000000000000000000000000bad";

/// Service that marks starts and stops in a file. Its start takes as long as that of a system that is not up at once.
const MARK: &str = "[Unit]\nDescription=Leaves marks\n[Service]\nType=oneshot\nRemainAfterExit=yes\n\
    ExecStart=/bin/sh -c 'sleep 2; echo start >>/var/marks'\n\
    ExecStop=/bin/sh -c 'sleep 1; echo stop >>/var/marks; sync'\n";

/// Returns the OCI layout with both images.
pub(crate) fn layout() -> String {
    let directory = Path::new(env!("CARGO_TARGET_TMPDIR")).join("debian-12-images");
    let lock = File::options().create(true).append(true).open(directory.with_extension("lock"));
    let lock = lock.expect("the lock file opens");
    // Tests that need the images begin at the same time.
    flock(&lock, FlockOperation::LockExclusive).expect("locked");
    if !directory.exists() {
        make(&directory);
    }
    directory.display().to_string()
}

fn make(directory: &Path) {
    // The scratch directory is beside the final path, because of the rename.
    let scratch = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a scratch directory");
    let root = scratch.path().join("root");
    let made = Command::new("debootstrap")
        .args(["--variant=minbase", "--include=systemd-sysv,udev", "bookworm"])
        .arg(&root)
        .output()
        .expect("debootstrap runs: deploy/setup installs it");
    assert!(made.status.success(), "debootstrap: {}", String::from_utf8_lossy(&made.stdout));
    // Devices are not part of an image.
    run("find", &[&root.join("dev").display().to_string(), "-mindepth", "1", "-delete"]);
    let layout = scratch.path().join("images").display().to_string();
    let [plain, system] = [PLAIN, SYSTEM].map(|name| format!("{layout}:{name}"));
    run("umoci", &["init", "--layout", &layout]);
    run("umoci", &["new", "--image", &plain]);
    run("umoci", &["insert", "--image", &plain, &root.display().to_string(), "/"]);
    run("umoci", &["config", "--image", &plain, "--config.cmd=/bin/bash"]);
    let units = scratch.path().join("units");
    let wanted = units.join("multi-user.target.wants");
    fs::create_dir_all(&wanted).expect("made");
    fs::write(units.join("mark.service"), MARK).expect("written");
    symlink("../mark.service", wanted.join("mark.service")).expect("linked");
    let id = scratch.path().join("machine-id");
    fs::write(&id, format!("{MACHINE_ID}\n")).expect("written");
    run("umoci", &["tag", "--image", &plain, SYSTEM]);
    for (from, to) in [(&units, "/etc/systemd/system"), (&id, "/etc/machine-id")] {
        run("umoci", &["insert", "--image", &system, &from.display().to_string(), to]);
    }
    run("umoci", &["config", "--image", &system, "--config.cmd=/sbin/init"]);
    fs::rename(scratch.path().join("images"), directory).expect("renamed");
}
