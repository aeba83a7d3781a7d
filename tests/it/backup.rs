//! Backups: made during writes, sealed, refused when damaged, and restored into an empty directory.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use stead::store::backup::{self, BackupError};
use stead::store::{identity, token_key};
use stead_schemas::disk::Disk;
use stead_schemas::names::Uid;

use crate::store::{Open, create, start, uids};

/// Makes a data directory as a daemon does, with some objects.
async fn daemon(data: &Path, run: &Path) -> (Open, BTreeSet<Uid>) {
    let open = start(data).expect("opens");
    identity::record(data, run).expect("recorded");
    token_key(data).expect("made");
    for n in 0..300 {
        create(&open.store, &format!("n-{n}")).await.expect("stored");
    }
    let all = uids(&open.store);
    (open, all)
}

#[tokio::test]
async fn a_backup_made_beside_writes_restores_one_durable_state() {
    let scratch = tempfile::tempdir().expect("a scratch directory");
    let at = |name: &str| scratch.path().join(name);
    let (open, before) = daemon(&at("data"), &at("run")).await;
    let file = at("backup");
    // Other tasks create and delete meanwhile.
    let (store, gone) = (open.store.clone(), before.iter().take(50).cloned().collect::<Vec<Uid>>());
    let writing = tokio::spawn(async move {
        for (n, uid) in gone.into_iter().enumerate() {
            create(&store, &format!("late-{n}")).await.expect("stored");
            store.transact(move |tx| tx.request_deletion::<Disk>(&uid).map(drop)).await.expect("stored");
        }
    });
    let export = open.store.export().await.expect("taken");
    let summary = backup::write_to_file(&export, &at("data"), &file).expect("written");
    writing.await.expect("written");
    assert_eq!((summary.records, summary.unreadable), (export.len(), 0));

    let mode = fs::metadata(&file).expect("there").permissions().mode() & 0o777;
    assert_eq!(mode, 0o600);
    let bytes = fs::read(&file).expect("readable");
    let holds = |text: &str| bytes.windows(text.len()).any(|window| window == text.as_bytes());
    assert!(!holds("n/disk/") && !holds("n-17"), "names are sealed too");

    let key = at("data/keys/seal.key");
    let restored = backup::restore(&file, &at("new"), &key).await.expect("restored");
    assert_eq!(restored, summary);
    let again = start(&at("new")).expect("opens");
    let found = uids(&again.store);
    assert!(before.is_subset(&found), "all that was acknowledged before the backup");
    assert!(again.store.unreadable().is_empty());
    for object in again.store.list::<Disk>() {
        let is_named = again.store.find::<Disk>(&object.meta.name).is_some();
        assert!(is_named || object.meta.is_deleting(), "names came along");
    }
    assert_eq!(
        token_key(&at("new")).expect("read"),
        token_key(&at("data")).expect("read"),
        "tokens stay valid"
    );
    let id = |data: &str| fs::read_to_string(at(data).join("store-id")).expect("there");
    assert_eq!(id("new"), id("data"));
    create(&again.store, "after").await.expect("the restored store takes writes");
    again.close().await;
    open.close().await;
}

#[tokio::test]
async fn what_is_no_whole_backup_is_refused_and_leaves_nothing() {
    let scratch = tempfile::tempdir().expect("a scratch directory");
    let at = |name: &str| scratch.path().join(name);
    let (open, _) = daemon(&at("data"), &at("run")).await;
    let (file, key) = (at("backup"), at("data/keys/seal.key"));
    let export = open.store.export().await.expect("taken");
    backup::write_to_file(&export, &at("data"), &file).expect("written");
    let bytes = fs::read(&file).expect("readable");
    let first_frame = bytes.iter().position(|&byte| byte == b'\n').expect("a first line") + 1;
    let flipped = |at: usize| {
        let mut changed = bytes.clone();
        changed[at] ^= 1;
        changed
    };
    let wrong: [(&str, Vec<u8>); 7] = [
        ("empty", Vec::new()),
        ("another file", b"#!/bin/sh\n".to_vec()),
        ("cut in a frame", bytes[..bytes.len() - 1].to_vec()),
        ("cut after the first line", bytes[..first_frame].to_vec()),
        ("a changed id", flipped(20)),
        ("a changed frame", flipped(bytes.len() / 2)),
        ("more at its end", [bytes.as_slice(), b"more"].concat()),
    ];
    for (what, content) in wrong {
        fs::write(at("wrong"), content).expect("written");
        let refused = backup::restore(&at("wrong"), &at("new"), &key).await.expect_err(what);
        assert!(matches!(refused, BackupError::Format | BackupError::Damaged { .. }), "{what}: {refused:?}");
        assert!(!at("new").exists(), "{what}");
    }
    fs::write(at("other.key"), [9; 32]).expect("written");
    fs::set_permissions(at("other.key"), fs::Permissions::from_mode(0o600)).expect("set");
    let refused = backup::restore(&file, &at("new"), &at("other.key")).await.expect_err("another key");
    assert!(matches!(refused, BackupError::Damaged { frame: 0 }), "{refused:?}");
    let refused = backup::restore(&file, &at("data"), &key).await.expect_err("a data directory in use");
    assert!(matches!(refused, BackupError::NotEmpty { .. }), "{refused:?}");
    assert_eq!(backup::verify(&file, &key).expect("whole").records, export.len());
    open.close().await;
}
