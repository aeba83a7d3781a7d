//! Tests with real mounts of loop devices, in a mount namespace of a thread.
//!
//! They need root. An ordinary user gets no mount namespace, which is all that they show then.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags, mount, mount_bind, unmount};
use rustix::thread::CapabilitySet;
use stead_schemas::guest::{MountedVolumes, VolumeMount, volume_disk};

use super::follow::Follower;
use super::recognise::recognise;
use super::{Registry, scratch};
use crate::devices::DeviceNumber;

const PATIENCE: Duration = Duration::from_secs(20);
const DISK_BYTES: u64 = 16 << 20;

/// A loop device with an empty file system.
struct Loop(PathBuf);

impl Loop {
    fn new(file: &Path) -> Self {
        fs::File::create(file).and_then(|file| file.set_len(DISK_BYTES)).expect("made");
        run(Command::new("mkfs.ext4").args(["-q", "-F"]).arg(file));
        let name = run(Command::new("losetup").args(["--find", "--show"]).arg(file));
        Self(name.trim().into())
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        // A device that is mounted is given back when its namespace ends.
        let _ = Command::new("losetup").arg("--detach").arg(&self.0).status();
    }
}

fn run(command: &mut Command) -> String {
    let output = command.output().expect("util-linux and e2fsprogs are installed");
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// A guest with three disks, whose volumes are in a scratch directory.
struct Guest {
    registry: Registry,
    disks: BTreeMap<String, Loop>,
    root: PathBuf,
}

impl Guest {
    fn new(root: &Path) -> Self {
        let disk = |index: u32| (volume_disk(index), Loop::new(&root.join(format!("disk{index}"))));
        Self { registry: Registry::default(), disks: (0..3).map(disk).collect(), root: root.to_owned() }
    }

    fn attempt(&self, requested: &[VolumeMount]) -> MountedVolumes {
        let find = |serial: &str| self.disks.get(serial).map(|disk| disk.0.clone());
        Follower { registry: &self.registry, find: &find }.attempt(requested, Duration::ZERO)
    }

    /// Attempts until the request is carried out. Other tests start programs, which have our descriptors for a moment.
    fn carry_out(&self, requested: &[VolumeMount]) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let report = self.attempt(requested);
            if report.problems.is_empty() {
                assert_eq!((&*report.requested, &*report.mounted), (requested, requested));
                return;
            }
            assert!(Instant::now() < deadline, "{report:?}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn volume(&self, path: &str, disk: u32) -> VolumeMount {
        let path = self.path(path).to_str().expect("text").to_owned();
        VolumeMount { path, disk: volume_disk(disk), is_read_only: false, upper: None, size: None }
    }

    /// Returns the serial number of the disk with this number.
    fn serial(&self, number: DeviceNumber) -> Option<String> {
        let is_it =
            |disk: &Loop| fs::metadata(&disk.0).is_ok_and(|disk| DeviceNumber::of(disk.rdev()) == number);
        self.disks.iter().find(|(_, disk)| is_it(disk)).map(|(serial, _)| serial.clone())
    }

    fn path(&self, path: &str) -> PathBuf {
        self.root.join(path)
    }

    /// Returns the problem at a path with a request that cannot be carried out.
    fn problem(&self, requested: &[VolumeMount], path: &str) -> String {
        let report = self.attempt(requested);
        let path = self.path(path);
        report.problems.get(path.to_str().expect("text")).unwrap_or_else(|| panic!("{report:?}")).clone()
    }

    /// Attempts until the problem at a path is this one. A search for processes is given up on a busy machine.
    fn until_problem(&self, requested: &[VolumeMount], path: &str, expected: &str) {
        until(expected, || self.problem(requested, path) == expected);
    }
}

/// Lock of the test that runs: a search for processes is not made while another one runs.
static ONE_TEST: Mutex<()> = Mutex::new(());

/// Waits until a condition is true.
fn until(what: &str, is_true: impl Fn() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !is_true() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Unmounts a path as somebody in the guest does. Programs that other tests start may hold it for a moment.
fn take_down(path: &Path) {
    until("it can be unmounted", || unmount(path, UnmountFlags::empty()).is_ok());
}

/// Runs a test in a thread with a mount namespace of its own and a directory in memory.
fn in_namespace(name: &'static str, test: fn(&Guest)) {
    let work = move || {
        let _lock = ONE_TEST.lock().unwrap_or_else(PoisonError::into_inner);
        match scratch::own_namespace() {
            Ok(()) => {}
            Err(error) => {
                assert_eq!(error, Errno::PERM);
                return;
            }
        }
        unmount("/sys", UnmountFlags::DETACH).expect("the scratch directory");
        let root = std::env::temp_dir().join(format!("stead-volumes-{name}-{}", std::process::id()));
        fs::create_dir_all(&root).expect("made");
        mount("test", &root, "tmpfs", MountFlags::empty(), None).expect("mounted");
        let guest = Guest::new(&root);
        test(&guest);
        guest.carry_out(&[]);
        drop(guest);
        let _ = unmount(&root, UnmountFlags::DETACH);
        fs::remove_dir(&root).expect("removed");
    };
    std::thread::spawn(work).join().expect("it succeeds");
}

/// A process of a test, which ends with it.
struct Process(Child);

impl Process {
    fn start(command: &mut Command) -> Self {
        Self(command.spawn().expect("started"))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn volumes_come_and_go_and_keep_their_files() {
    in_namespace("come", |guest| {
        // The new volume takes the mode of the directory that it covers, and a link on its way is followed.
        fs::create_dir(guest.path("real")).expect("made");
        run(Command::new("chmod").arg("0711").arg(guest.path("real")));
        std::os::unix::fs::symlink("real", guest.path("link")).expect("linked");
        let (outer, inner) = (guest.volume("link", 0), guest.volume("link/in/side", 1));
        guest.carry_out(&[outer.clone(), inner.clone()]);
        let mode = |path: &str| run(Command::new("stat").args(["--format", "%a"]).arg(guest.path(path)));
        assert_eq!(mode("real"), "711\n");
        fs::write(guest.path("real/in/side/file"), "kept").expect("written");
        guest.carry_out(std::slice::from_ref(&outer));
        assert_eq!(
            fs::read_dir(guest.path("real/in/side")).expect("a directory of the outer one").count(),
            0
        );
        // An outer volume does not hide an inner one, and an inner one keeps it mounted.
        guest.carry_out(&[outer.clone(), inner.clone()]);
        let reason = guest.problem(std::slice::from_ref(&inner), "link");
        assert!(reason.ends_with("real/in/side is mounted inside it"), "{reason}");
        guest.carry_out(&[]);
        guest.carry_out(std::slice::from_ref(&inner));
        assert_eq!(fs::read_to_string(guest.path("real/in/side/file")).expect("there"), "kept");
        let reason = guest.problem(&[outer.clone(), inner.clone()], "link");
        assert!(reason.ends_with("would be hidden"), "{reason}");
        // The same path can have another volume.
        guest.carry_out(&[guest.volume("link/in/side", 2)]);
        assert!(!guest.path("real/in/side/file").exists());
        guest.carry_out(&[VolumeMount { is_read_only: true, ..inner.clone() }]);
        assert!(fs::write(guest.path("real/in/side/file"), "changed").is_err());
    });
}

#[test]
fn a_disk_that_grows_is_filled_while_it_is_mounted() {
    in_namespace("grown", |guest| {
        let plain = guest.volume("data", 0);
        guest.carry_out(std::slice::from_ref(&plain));
        fs::write(guest.path("data/file"), "kept").expect("written");
        let open = fs::File::open(guest.path("data/file")).expect("opened");
        let file = fs::File::options().write(true).open(guest.path("disk0")).expect("opened");
        file.set_len(4 * DISK_BYTES).expect("grown");
        let grown = VolumeMount { size: Some(4 * DISK_BYTES), ..plain };
        let reason = guest.problem(std::slice::from_ref(&grown), "data");
        assert!(
            reason.ends_with(&format!("its disk has {DISK_BYTES} of {} bytes", 4 * DISK_BYTES)),
            "{reason}"
        );
        run(Command::new("losetup").arg("--set-capacity").arg(&guest.disks[&grown.disk].0));
        // The root of a guest may let a file system grow. That of a host may lack the capability.
        let own = rustix::thread::capabilities(None).expect("read").effective;
        if own.contains(CapabilitySet::SYS_RESOURCE) {
            guest.carry_out(std::slice::from_ref(&grown));
            let seen = rustix::fs::statvfs(guest.path("data")).expect("mounted");
            assert!(seen.f_blocks * seen.f_frsize > 3 * DISK_BYTES, "it has {} blocks", seen.f_blocks);
        } else {
            let reason = guest.problem(std::slice::from_ref(&grown), "data");
            assert!(reason.ends_with("Operation not permitted (os error 1)"), "{reason}");
        }
        assert_eq!(fs::read_to_string(guest.path("data/file")).expect("there"), "kept");
        drop(open);
        // What is mounted over it is left alone.
        mount("over", guest.path("data"), "tmpfs", MountFlags::empty(), None).expect("mounted");
        let reason = guest.problem(std::slice::from_ref(&grown), "data");
        assert!(reason.ends_with("something else is mounted there"), "{reason}");
        take_down(&guest.path("data"));
        guest.carry_out(&[]);
    });
}

#[test]
fn an_overlay_is_mounted_and_its_two_disks_are_free_after_it() {
    in_namespace("overlay", |guest| {
        let plain = guest.volume("data", 0);
        guest.carry_out(std::slice::from_ref(&plain));
        fs::write(guest.path("data/file"), "below").expect("written");
        let overlay = VolumeMount { is_read_only: true, upper: Some(volume_disk(1)), ..plain.clone() };
        guest.carry_out(std::slice::from_ref(&overlay));
        fs::write(guest.path("data/file"), "above").expect("written");
        let mounts = super::mountinfo::own().expect("read");
        let shown = mounts.iter().find(|mount| mount.at == guest.path("data")).expect("mounted");
        assert_eq!((&*shown.kind, &*shown.source), ("overlay", "stead.volume.1"));
        assert!(shown.options.contains("/stead.volume.0,"), "{}", shown.options);
        // An agent that starts later finds both kinds of volumes.
        let other = guest.volume("other", 2);
        guest.carry_out(&[overlay.clone(), other.clone()]);
        let mounts = super::mountinfo::own().expect("read");
        let found = recognise(&mounts, &[], |device| guest.serial(device), |path| Some(path.into()));
        assert_eq!(found, guest.registry.all());
        // A process whose working directory is in the overlay holds it.
        let process = Process::start(Command::new("sleep").arg("60").current_dir(guest.path("data")));
        guest.until_problem(&[], "data", &format!("used by sleep ({})", process.0.id()));
        drop(process);
        guest.carry_out(&[guest.volume("data", 1), guest.volume("other", 0)]);
        assert_eq!(fs::read_to_string(guest.path("other/file")).expect("there"), "below");
        assert_eq!(fs::read_to_string(guest.path("data/upper/file")).expect("there"), "above");
    });
}

#[test]
fn a_volume_in_use_stays_mounted_and_its_user_is_named() {
    in_namespace("used", |guest| {
        let volume = guest.volume("data", 0);
        guest.carry_out(std::slice::from_ref(&volume));
        fs::write(guest.path("data/file"), "").expect("written");
        let mut follow = Command::new("tail");
        follow.arg("-f").arg(guest.path("data/file")).stdout(Stdio::null());
        let process = Process::start(&mut follow);
        let files = || fs::read_dir(format!("/proc/{}/fd", process.0.id())).into_iter().flatten().flatten();
        let is_open =
            || files().any(|file| fs::read_link(file.path()).is_ok_and(|to| to == guest.path("data/file")));
        until("the file is open", is_open);
        guest.until_problem(&[], "data", &format!("used by tail ({})", process.0.id()));
        assert_eq!(guest.attempt(&[]).mounted, std::slice::from_ref(&volume));
        // It is wanted again, and nothing has to be done.
        guest.carry_out(std::slice::from_ref(&volume));
    });
}

#[test]
fn a_disk_that_is_mounted_elsewhere_is_not_free() {
    in_namespace("elsewhere", |guest| {
        let volume = guest.volume("data", 0);
        guest.carry_out(std::slice::from_ref(&volume));
        let own = fs::read_link("/proc/thread-self/ns/mnt").expect("read");
        let process = Process::start(Command::new("unshare").args(["--mount", "sleep", "60"]));
        let name = format!("/proc/{}/comm", process.0.id());
        let theirs = format!("/proc/{}/ns/mnt", process.0.id());
        until("it has another namespace", || {
            fs::read_link(&theirs).is_ok_and(|theirs| theirs != own)
                && fs::read_to_string(&name).is_ok_and(|name| name.trim() == "sleep")
        });
        let path = guest.path("data");
        let path = path.display();
        let expected = format!("it is still mounted at {path} for sleep ({})", process.0.id());
        guest.until_problem(&[], "data", &expected);
        assert_eq!(guest.attempt(&[]).mounted, std::slice::from_ref(&volume));
        drop(process);
        guest.carry_out(&[]);
        // The guest has another mount of it.
        guest.carry_out(std::slice::from_ref(&volume));
        let copy = guest.path("copy");
        fs::create_dir(&copy).expect("made");
        mount_bind(guest.path("data"), &copy).expect("mounted");
        guest.until_problem(&[], "data", &format!("it is still mounted at {}", copy.display()));
        take_down(&copy);
    });
}

#[test]
fn mounts_of_the_guest_over_and_instead_of_a_volume_are_left_alone() {
    in_namespace("own", |guest| {
        let volume = guest.volume("data", 0);
        guest.carry_out(std::slice::from_ref(&volume));
        mount("over", guest.path("data"), "tmpfs", MountFlags::empty(), None).expect("mounted");
        assert_eq!(guest.problem(&[], "data"), "another file system is mounted over it");
        take_down(&guest.path("data"));
        // A volume that was unmounted in the guest is mounted again for a request that has it, and is free otherwise.
        take_down(&guest.path("data"));
        guest.carry_out(std::slice::from_ref(&volume));
        take_down(&guest.path("data"));
        guest.carry_out(&[]);
        // A disk that is not there is waited for as long as the caller says.
        let reason = guest.problem(&[guest.volume("data", 7), guest.volume("data/in", 0)], "data");
        assert_eq!(reason, "a volume's disk did not appear");
        let reason = guest.problem(&[guest.volume("data", 7), guest.volume("data/in", 0)], "data/in");
        assert!(reason.ends_with("data could not be mounted"), "{reason}");
        // A file is in the way.
        fs::write(guest.path("file"), "").expect("written");
        assert!(!guest.problem(&[guest.volume("file", 0)], "file").is_empty());
    });
}
