//! Tests with a disk that stalls: writes fail with a reason meanwhile, and work again afterwards.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use stead_controllers::store::{Batch, Kv, KvError};

use super::sled::SledKv;

fn run(program: &str, arguments: &[&str]) {
    let output = Command::new(program).args(arguments).output().expect("the program is installed");
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments:?}: {text}");
}

/// An ext4 file system on a loop device; unmounted when the value is dropped.
struct LoopDisk {
    scratch: tempfile::TempDir,
}

impl LoopDisk {
    fn mount() -> Self {
        let scratch = tempfile::tempdir().expect("a scratch directory");
        let disk = Self { scratch };
        let image = disk.scratch.path().join("image");
        let file = std::fs::File::create(&image).expect("made");
        file.set_len(128 << 20).expect("sized");
        std::fs::create_dir(disk.path()).expect("made");
        run("mkfs.ext4", &["-q", "-F", &image.to_string_lossy()]);
        run("mount", &["-o", "loop", &image.to_string_lossy(), &disk.path().to_string_lossy()]);
        disk
    }

    fn path(&self) -> PathBuf {
        self.scratch.path().join("mounted")
    }

    fn freeze(&self, verb: &str) {
        run("fsfreeze", &[verb, &self.path().to_string_lossy()]);
    }
}

impl Drop for LoopDisk {
    fn drop(&mut self) {
        for (program, verb) in [("fsfreeze", "--unfreeze"), ("umount", "--lazy")] {
            // Thawing a file system that is not frozen fails, as it should.
            drop(Command::new(program).args([Path::new(verb), &self.path()]).output());
        }
    }
}

fn batch(key: &str) -> Batch {
    Batch { writes: vec![(key.to_owned(), Some(vec![7; 100]))] }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_stalled_disk_fails_writes_and_is_survived() {
    let disk = LoopDisk::mount();
    let directory = disk.path().join("db");
    let kv = SledKv::open_with_deadline(&directory, Duration::from_millis(300)).expect("opens");
    kv.commit(batch("before")).await.expect("stored");
    disk.freeze("--freeze");
    let given_up = kv.commit(batch("stalled")).await;
    assert!(matches!(given_up, Err(KvError::Io(_))), "{given_up:?}");
    assert!(kv.health().is_err(), "a lost store is reported");
    let refused = kv.commit(batch("meanwhile")).await;
    assert!(refused.is_err_and(|error| error.to_string().contains("has not answered")));
    disk.freeze("--unfreeze");
    while kv.health().is_err() {
        tokio::task::yield_now().await;
    }
    kv.commit(batch("after")).await.expect("stored again without a restart");
    drop(kv);
    let kv = SledKv::open(&directory).expect("opens");
    let mut keys = Vec::new();
    kv.load(&mut |key, _| keys.push(String::from_utf8_lossy(key).into_owned())).expect("reads");
    keys.sort();
    assert_eq!(keys, ["after", "before", "stalled"], "the commit that was given up was still carried out");
}
