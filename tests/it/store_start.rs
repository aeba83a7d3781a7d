//! The start of the store: on a full disk, after a crash in the middle of a start, on damaged files.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use stead_controllers::store::TransactError;
use stead_schemas::disk::Disk;
use stead_schemas::names::Uid;
use stead_schemas::quantity::Bytes;

use crate::store::{SmallDisk, create, start, uids};

/// Changes the spec of an existing object; on a full disk the reserve provides the space.
async fn update(open: &crate::store::Open, uid: &Uid, bytes: u64) {
    let uid = uid.clone();
    let change = move |spec: &mut stead_schemas::disk::DiskSpec| spec.size = Bytes(bytes);
    let updated = open.store.transact(move |tx| tx.update_spec::<Disk>(&uid, None, change).map(drop)).await;
    assert!(!matches!(updated, Err(TransactError::Refused(_))), "{updated:?}");
    updated.expect("the reserve holds for updates");
}

/// Writes a file of the database as a crash in the middle of a start leaves it.
fn leave(directory: &Path, name: &str, content: &[u8]) -> PathBuf {
    let path = directory.join("db").join(name);
    fs::write(&path, content).expect("written");
    path
}

#[tokio::test]
async fn a_snapshot_file_that_was_never_finished_does_not_close_the_store() {
    let scratch = tempfile::tempdir().expect("a scratch directory");
    let open = start(scratch.path()).expect("opens");
    let uid = create(&open.store, "one").await.expect("stored");
    open.close().await;
    // The name sorts behind every finished snapshot, so that sled would read this one.
    let contents: [&[u8]; 4] = [b"", b"short", &[0; 644], &[0xA5; 1479]];
    for content in contents {
        let left = [
            leave(scratch.path(), "snap.FFFFFFFFFFFFFFFF.generating", content),
            leave(scratch.path(), "snap.0000000000000001.generating", content),
        ];
        let open = start(scratch.path()).unwrap_or_else(|error| panic!("{} bytes: {error:?}", content.len()));
        assert_eq!(uids(&open.store), BTreeSet::from([uid.clone()]));
        open.close().await;
        assert!(left.iter().all(|path| !path.exists()), "unfinished files are removed");
    }
}

/// Starts on a file system without a free block: another file took all free blocks, and takes those that become free.
#[tokio::test]
async fn starts_on_a_full_disk_lose_nothing() {
    let small = SmallDisk::mount(64);
    let directory = small.path().join("data");
    let open = start(&directory).expect("opens");
    let mut created = Vec::new();
    for n in 0..30 {
        created.push(create(&open.store, &format!("n-{n}")).await.expect("room"));
    }
    open.close().await;
    for round in 1..=12 {
        small.fill();
        let open = start(&directory).unwrap_or_else(|error| panic!("start {round}: {error:?}"));
        assert_eq!(uids(&open.store), created.iter().cloned().collect(), "start {round}");
        for uid in created.iter().take(20) {
            update(&open, uid, (2 << 20) + round).await;
        }
        open.close().await;
    }
}

#[tokio::test]
async fn a_database_that_has_lost_what_it_held_is_refused_and_nothing_is_made() {
    let scratch = tempfile::tempdir().expect("a scratch directory");
    let open = start(scratch.path()).expect("opens");
    create(&open.store, "one").await.expect("stored");
    let old = scratch.path().join("old");
    open.close().await;
    copy(&scratch.path().join("db"), &old);
    let open = start(scratch.path()).expect("opens");
    create(&open.store, "two").await.expect("stored");
    stead::store::mark::note(scratch.path(), open.store.revision()).expect("noted");
    open.close().await;
    let whole = start(scratch.path()).expect("as it was left");
    assert_eq!(uids(&whole.store).len(), 2);
    whole.close().await;
    let database = scratch.path().join("db");
    let kept = scratch.path().join("kept");
    fs::rename(&database, &kept).expect("moved");
    let refused = format!("{:?}", start(scratch.path()).err().expect("it is gone"));
    assert!(refused.contains("Lost") && !database.join("db").exists(), "{refused}");
    copy(&old, &database);
    let refused = format!("{:?}", start(scratch.path()).err().expect("it is an old copy"));
    assert!(refused.contains("Lost"), "{refused}");
    fs::remove_dir_all(&database).expect("removed");
    fs::rename(&kept, &database).expect("moved");
    start(scratch.path()).expect("it is back").close().await;
}

/// Copies the files of a database.
fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).expect("made");
    for entry in fs::read_dir(from).expect("read") {
        let entry = entry.expect("read");
        if entry.file_type().expect("known").is_file() {
            fs::copy(entry.path(), to.join(entry.file_name())).expect("copied");
        }
    }
}
