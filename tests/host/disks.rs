//! Disks: the promises of the port, on real files.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use stead::host::disks::Ext4Files;
use stead_controllers::host::{DiskFile, Disks, HostErrorKind};
use stead_schemas::quantity::Bytes;

use crate::namespace::{in_namespace, shell, uid};

const RESERVE: Bytes = Bytes(1 << 20);

/// Opens the disks of a data directory.
fn disks(data_dir: &Path) -> Ext4Files {
    Ext4Files::new(data_dir, RESERVE).expect("the directory is made")
}

#[tokio::test]
async fn a_disk_is_a_sound_sparse_file_system_of_the_desired_size() {
    let scratch = tempfile::tempdir().expect("a scratch directory");
    let disks = disks(scratch.path());
    for (first, size) in [('a', 16 << 20), ('b', 600 << 20), ('c', 100 << 30)] {
        let (owner, size) = (uid(first), Bytes(size));
        assert_eq!(disks.inspect(&owner).await.expect("read"), None);
        disks.create(&owner, size).await.unwrap_or_else(|error| panic!("{}", error.chain()));
        let made = DiskFile { owner: owner.clone(), size };
        assert_eq!(disks.inspect(&owner).await.expect("read"), Some(made));
        let path = Ext4Files::path(&scratch.path().join("disks"), &owner);
        let on_disk = fs::metadata(&path).expect("there").blocks() * 512;
        assert!(on_disk < 4 << 20, "{on_disk} bytes are taken by an empty disk of {size}");
        shell(&format!("e2fsck -fn {}", path.display()));
        let header = shell(&format!("dumpe2fs -h {} 2>/dev/null", path.display()));
        assert!(header.contains("has_journal"), "{header}");

        fs::write(scratch.path().join("disks/.marker"), "").expect("written");
        let before = fs::metadata(&path).expect("there").ino();
        disks.create(&owner, size).await.expect("making it again is nothing");
        assert_eq!(fs::metadata(&path).expect("there").ino(), before);
    }
    fs::write(scratch.path().join("disks/readme.ext4"), "not ours").expect("written");
    let owners: Vec<_> = disks.list().await.expect("listed").into_iter().map(|file| file.owner).collect();
    assert_eq!(owners, [uid('a'), uid('b'), uid('c')]);
    for owner in owners {
        disks.remove(&owner).await.expect("removed");
        disks.remove(&owner).await.expect("removing it again is nothing");
    }
    assert_eq!(disks.list().await.expect("listed"), []);
    let left = entries(&scratch.path().join("disks"));
    assert_eq!(left, 2, "what is not a disk of ours stays, and nothing temporary is left");
}

fn entries(directory: &Path) -> usize {
    fs::read_dir(directory).expect("there").count()
}

#[tokio::test]
async fn a_create_that_is_dropped_leaves_no_file() {
    let scratch = tempfile::tempdir().expect("a scratch directory");
    let disks = disks(scratch.path());
    {
        let owner = uid('a');
        let create = disks.create(&owner, Bytes(1 << 30));
        let mut create = std::pin::pin!(create);
        // A single poll starts the creation of the file system and waits for it.
        assert!(futures::poll!(create.as_mut()).is_pending());
    }
    assert_eq!(entries(&scratch.path().join("disks")), 0);
    disks.create(&uid('a'), Bytes(1 << 30)).await.expect("the next try makes it");
}

#[test]
fn a_full_file_system_is_reported_by_kind_and_left_as_it_was() {
    in_namespace(async || {
        let scratch = tempfile::tempdir().expect("a scratch directory");
        shell(&format!("mount -t tmpfs -o size=64k none {}", scratch.path().display()));
        let disks = disks(scratch.path());
        let space = disks.space().await.expect("read");
        assert_eq!((space.total, space.reserve), (Bytes(64 << 10), RESERVE));
        let error = disks.create(&uid('a'), Bytes(1 << 30)).await.expect_err("there is no room");
        assert_eq!(error.kind, HostErrorKind::Exhausted, "{}", error.chain());
        assert_eq!(disks.list().await.expect("listed"), []);
        assert_eq!(disks.space().await.expect("read").available, space.available);
        shell(&format!("mount -o remount,size=64m {}", scratch.path().display()));
        disks.create(&uid('a'), Bytes(1 << 30)).await.expect("there is room now");
    });
}
