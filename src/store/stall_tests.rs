//! Tests with a disk that stalls: writes fail with a reason meanwhile, and work again afterwards.

use std::time::Duration;

use stead_controllers::store::{Batch, Kv, KvError};

use super::sled::SledKv;

#[path = "../../tests/it/loop_disk.rs"]
#[expect(dead_code, reason = "other tests need the rest")]
mod loop_disk;

use loop_disk::LoopDisk;

fn batch(key: &str) -> Batch {
    Batch { writes: vec![(key.to_owned(), Some(vec![7; 100]))] }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_stalled_disk_fails_writes_and_is_survived() {
    let disk = LoopDisk::new(128);
    let directory = disk.path().join("db");
    let kv = SledKv::open_with_deadline(&directory, Duration::from_millis(300)).expect("opens");
    kv.commit(batch("before")).await.expect("stored");
    disk.freeze();
    let given_up = kv.commit(batch("stalled")).await;
    assert!(matches!(given_up, Err(KvError::Io(_))), "{given_up:?}");
    assert!(kv.health().is_err(), "a lost store is reported");
    let refused = kv.commit(batch("meanwhile")).await;
    assert!(refused.is_err_and(|error| error.to_string().contains("has not answered")));
    disk.thaw();
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
