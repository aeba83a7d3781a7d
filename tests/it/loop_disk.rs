//! An ext4 file system in a file, whose power can be cut, and that can be made to answer no more.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// Program that calls `EXT4_IOC_SHUTDOWN` with `EXT4_GOING_FLAGS_NOLOGFLUSH`: from then on every write fails, and
/// unsynced data is lost at the next mount. Debian has no small program for it, and the tests need Python anyway.
const CUT: &str = "import fcntl, os, struct, sys
fcntl.ioctl(os.open(sys.argv[1], os.O_RDONLY), 0x8004587D, struct.pack('I', 2))";

/// Limit on mount attempts until the kernel has released a file system that lost its power.
const MOUNTS_MAX: usize = 1000;

/// Limit on unmount attempts, 10 ms apart.
const UNMOUNTS_MAX: usize = 500;

/// A mounted file system. It is unmounted when the value is dropped.
pub(crate) struct LoopDisk {
    scratch: tempfile::TempDir,
}

fn run(program: &str, arguments: &[&str]) {
    let output = Command::new(program).args(arguments).output().expect("the program is installed");
    let reported = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments:?}: {reported}");
}

impl LoopDisk {
    pub(crate) fn new(mebibytes: u64) -> Self {
        let disk = Self { scratch: tempfile::tempdir().expect("a scratch directory") };
        let file = std::fs::File::create(disk.image()).expect("made");
        file.set_len(mebibytes << 20).expect("sized");
        std::fs::create_dir(disk.path()).expect("made");
        run("mkfs.ext4", &["-q", "-F", &disk.image().to_string_lossy()]);
        disk.mount();
        disk
    }

    fn image(&self) -> PathBuf {
        self.scratch.path().join("image")
    }

    /// Returns the root of the file system.
    pub(crate) fn path(&self) -> PathBuf {
        self.scratch.path().join("mounted")
    }

    /// Mounts it again. While the kernel still holds the file system that lost its power, a mount finds that one.
    pub(crate) fn mount(&self) {
        for _ in 0..MOUNTS_MAX {
            run("mount", &["-o", "loop", &self.image().to_string_lossy(), &self.path().to_string_lossy()]);
            if std::fs::write(self.path().join("probe"), "").is_ok() {
                return;
            }
            self.unmount();
        }
        panic!("the file system cannot be mounted anew");
    }

    /// Unmounts it as soon as no file of it is open: the programs of a killed daemon end a moment later.
    pub(crate) fn unmount(&self) {
        let is_over =
            || Command::new("umount").arg(self.path()).output().is_ok_and(|output| output.status.success());
        for _ in 0..UNMOUNTS_MAX {
            if is_over() {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        run("umount", &[&self.path().to_string_lossy()]);
    }

    /// Makes every write wait until the disk is thawed.
    pub(crate) fn freeze(&self) {
        run("fsfreeze", &["--freeze", &self.path().to_string_lossy()]);
    }

    pub(crate) fn thaw(&self) {
        run("fsfreeze", &["--unfreeze", &self.path().to_string_lossy()]);
    }

    /// Cuts the power: data that is written from now on, or was not synced before, is lost.
    pub(crate) fn cut_power(&self) {
        run("python3", &["-c", CUT, &self.path().to_string_lossy()]);
    }
}

impl Drop for LoopDisk {
    fn drop(&mut self) {
        // A failed test may have left it frozen or unmounted. To thaw what is not frozen fails, as it should.
        for (program, verb) in [("fsfreeze", "--unfreeze"), ("umount", "--lazy")] {
            drop(Command::new(program).args([Path::new(verb), &self.path()]).output());
        }
    }
}
