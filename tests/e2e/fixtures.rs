//! The common basis of tests with a real VM: a kernel, an initrd, scratch directories, a small image.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::LazyLock;
use std::time::{Duration, Instant};

use stead::hypervisor::Accelerator;
use stead_schemas::names::Uid;
use tokio::time::error::Elapsed;

/// Scratch directories that are removed with the value, and the permit among all tests with real VMs.
pub(crate) struct Fixtures {
    pub(crate) dir: tempfile::TempDir,
    slot_lock: crate::namespace::SlotLock,
}

impl Fixtures {
    pub(crate) fn new() -> Self {
        let slot_lock = crate::namespace::slot_lock();
        Self { dir: tempfile::tempdir().expect("a scratch directory"), slot_lock }
    }

    /// Returns the name of the control groups of this test, which no other test uses at the same time.
    pub(crate) fn bridge(&self) -> String {
        self.slot_lock.bridge()
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        let path = self.dir.path().join(name);
        std::fs::create_dir_all(&path).expect("made");
        path
    }
}

/// Returns the unpacked kernel package that `deploy/setup` fetched.
pub(crate) fn kernel_dir() -> PathBuf {
    let fallback = || Path::new(env!("CARGO_MANIFEST_DIR")).join("target/stead-kernel");
    std::env::var_os("STEAD_KERNEL_DIR").map_or_else(fallback, PathBuf::from)
}

/// Returns the number of rounds of a thorough test: that of `STEAD_TEST_ROUNDS`, or else this one.
pub(crate) fn rounds(otherwise: u64) -> u64 {
    std::env::var("STEAD_TEST_ROUNDS").ok().and_then(|text| text.parse().ok()).unwrap_or(otherwise)
}

/// Returns the accelerator that the host must have, where the caller knows it, or else the one that it has.
pub(crate) fn accelerator() -> String {
    std::env::var("STEAD_TEST_ACCELERATOR").unwrap_or_else(|_| Accelerator::probe().as_str().to_owned())
}

/// Makes a squashfs of Debian's static busybox with its applets.
pub(crate) fn busybox_root(fixtures: &Fixtures) -> PathBuf {
    let root = fixtures.path("busybox");
    let bin = root.join("bin");
    std::fs::create_dir_all(&bin).expect("made");
    std::fs::copy("/bin/busybox", bin.join("busybox")).expect("install the package busybox-static");
    let applets = Command::new("/bin/busybox").arg("--list").output().expect("busybox runs");
    for applet in String::from_utf8_lossy(&applets.stdout).lines().filter(|name| *name != "busybox") {
        std::os::unix::fs::symlink("busybox", bin.join(applet)).expect("linked");
    }
    let image = fixtures.dir.path().join("busybox.squashfs");
    run(
        "mksquashfs",
        &[&root.display().to_string(), &image.display().to_string(), "-quiet", "-no-progress", "-all-root"],
    );
    image
}

/// Makes a sparse ext4 file.
pub(crate) fn overlay(path: &Path) {
    let file = std::fs::File::create(path).expect("made");
    file.set_len(64 << 20).expect("sized");
    run("mkfs.ext4", &["-q", "-F", &path.display().to_string()]);
}

pub(crate) fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output();
    let output = output.unwrap_or_else(|error| panic!("{program}: {error}; run deploy/setup first"));
    assert!(output.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Returns a uid that no other test has.
pub(crate) fn uid(number: u64) -> Uid {
    format!("t{number:04}{:019}", std::process::id()).parse().expect("24 characters")
}

/// Factor of all time limits of these tests. Their limits end tests that hang and are no requirements, so a machine
/// whose every step is slow sets `STEAD_TEST_PATIENCE`, as the KVM host of `tests/kvmbox` does.
static PATIENCE: LazyLock<u32> = LazyLock::new(|| {
    let text = std::env::var("STEAD_TEST_PATIENCE").unwrap_or_else(|_| "1".to_owned());
    text.parse().expect("STEAD_TEST_PATIENCE is a number")
});

/// Returns a time limit for this machine.
pub(crate) fn patience(at_most: Duration) -> Duration {
    at_most * *PATIENCE
}

/// Returns the end of a time limit that begins now.
pub(crate) fn deadline(at_most: Duration) -> Instant {
    Instant::now() + patience(at_most)
}

/// Limits the time of a future.
pub(crate) async fn timeout<Work: Future>(at_most: Duration, work: Work) -> Result<Work::Output, Elapsed> {
    tokio::time::timeout(patience(at_most), work).await
}

/// Waits for a condition, with a time limit.
pub(crate) async fn until<T>(
    what: &str,
    at_most: Duration,
    mut observe: impl AsyncFnMut() -> Option<T>,
) -> T {
    let deadline = deadline(at_most);
    loop {
        if let Some(found) = observe().await {
            return found;
        }
        assert!(Instant::now() < deadline, "{what}: not within {:?}", patience(at_most));
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}
