//! Power loss in a storm of writes and in starts: acknowledged writes are there, and the store opens.
//!
//! `STEAD_TEST_ROUNDS` sets the number of losses; `make test` runs few, a release runs hundreds.

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use stead_schemas::disk::Disk;
use stead_schemas::names::Uid;

use crate::loop_disk::LoopDisk;
use crate::own_mounts::ran_in_own_mounts;
use crate::store::{Open, acknowledge, acknowledged_uid, child, child_directory, create, start, uids};

const ROUNDS: u64 = 6;
const DISK_MEBIBYTES: u64 = 512;

fn rounds() -> u64 {
    std::env::var("STEAD_TEST_ROUNDS").ok().and_then(|text| text.parse().ok()).unwrap_or(ROUNDS)
}

/// Returns numbers that differ from round to round and are the same in every run.
fn scatter(round: u64) -> u64 {
    round.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 32
}

/// Creates and deletes until the process ends. Every output line is an acknowledgement.
async fn storm(open: &Open, name: &str) {
    let mut older = None;
    for n in 0.. {
        let Ok(uid) = create(&open.store, &format!("{name}-{n}")).await else { return };
        acknowledge(&format!("ACK {uid}"));
        let Some(uid) = older.replace(uid).filter(|_| n % 3 == 0) else { continue };
        let moved = uid.clone();
        let gone = open.store.transact(move |tx| tx.request_deletion::<Disk>(&moved).map(drop)).await;
        if gone.is_err() {
            return;
        }
        acknowledge(&format!("GONE {uid}"));
    }
}

/// Returns the objects whose deletion was not requested.
fn live(open: &Open) -> BTreeSet<Uid> {
    let all = open.store.list::<Disk>();
    all.iter().filter(|disk| !disk.meta.is_deleting()).map(|disk| disk.meta.uid.clone()).collect()
}

/// The writes that a child has acknowledged.
#[derive(Default)]
struct Acknowledged {
    made: BTreeSet<Uid>,
    gone: BTreeSet<Uid>,
}

impl Acknowledged {
    fn read(&mut self, line: &str) {
        self.made.extend(acknowledged_uid(line));
        self.gone.extend(line.split("GONE ").nth(1).and_then(|uid| uid.parse::<Uid>().ok()));
    }
}

fn end(child: &mut Child) {
    child.kill().expect("SIGKILL");
    child.wait().expect("reaped");
}

#[tokio::test]
async fn a_loss_of_power_in_a_storm_of_writes_loses_nothing_that_was_acknowledged() {
    if let Some(directory) = child_directory() {
        let open = start(&directory).expect("opens");
        let name = format!("p{}", std::process::id());
        return storm(&open, &name).await;
    }
    let test = "power_loss::a_loss_of_power_in_a_storm_of_writes_loses_nothing_that_was_acknowledged";
    if ran_in_own_mounts(test) {
        return;
    }
    let disk = LoopDisk::new(DISK_MEBIBYTES);
    let directory = disk.path().join("data");
    let mut all = Acknowledged::default();
    for round in 1..=rounds() {
        let mut child = child(&[], test, &directory).stdout(Stdio::piped()).spawn().expect("starts");
        let mut lines = BufReader::new(child.stdout.take().expect("piped")).lines().map_while(Result::ok);
        let mut left = 5 + scatter(round) % 60;
        while left > 0 {
            let line = lines.next().expect("the child goes on until it is killed");
            left -= u64::from(line.contains("ACK "));
            all.read(&line);
        }
        disk.cut_power();
        end(&mut child);
        lines.for_each(|line| all.read(&line));
        disk.unmount();
        disk.mount();
        let open = start(&directory).unwrap_or_else(|error| panic!("round {round}: {error:?}"));
        let (there, live) = (uids(&open.store), live(&open));
        let lost: Vec<_> = all.made.difference(&there).collect();
        assert!(lost.is_empty(), "round {round}: lost {lost:?}");
        let back: Vec<_> = all.gone.intersection(&live).collect();
        assert!(back.is_empty(), "round {round}: back again {back:?}");
        assert!(open.store.unreadable().is_empty(), "round {round}");
        // Without a reconciler no object is ever removed, and after some hundred rounds the store would be full.
        for uid in there {
            let moved = uid.clone();
            let asked = open.store.transact(move |tx| tx.request_deletion::<Disk>(&moved).map(drop)).await;
            asked.expect("stored");
            open.store.remove_finalizer::<Disk>(&uid).await.expect("stored");
        }
        all = Acknowledged::default();
        open.close().await;
    }
}

#[tokio::test]
async fn a_loss_of_power_in_a_start_leaves_a_store_that_opens() {
    if let Some(directory) = child_directory() {
        acknowledge("STARTING");
        let open = start(&directory).expect("opens");
        acknowledge("STARTED");
        return storm(&open, &format!("p{}", std::process::id())).await;
    }
    let test = "power_loss::a_loss_of_power_in_a_start_leaves_a_store_that_opens";
    if ran_in_own_mounts(test) {
        return;
    }
    let disk = LoopDisk::new(DISK_MEBIBYTES);
    let directory = disk.path().join("data");
    let open = start(&directory).expect("opens");
    let mut all = Acknowledged::default();
    for n in 0..30 {
        all.made.insert(create(&open.store, &format!("n-{n}")).await.expect("stored"));
    }
    open.close().await;
    for round in 1..=rounds() {
        let mut child = child(&[], test, &directory).stdout(Stdio::piped()).spawn().expect("starts");
        let mut lines = BufReader::new(child.stdout.take().expect("piped")).lines().map_while(Result::ok);
        let begun = lines.find(|line| line.contains("STARTING"));
        begun.expect("the child begins");
        // Another program syncs on the same file system, as guests do: that makes names durable before content.
        let is_over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut file = fs::File::create(disk.path().join("other")).expect("made");
                while !is_over.load(Ordering::Relaxed) {
                    if file.write_all(b"x").and_then(|()| file.sync_all()).is_err() {
                        break; // The power is gone.
                    }
                }
            });
            // The moment of the loss differs from round to round, and nothing is waited for.
            std::thread::sleep(Duration::from_micros(scatter(round) % 40_000));
            disk.cut_power();
            is_over.store(true, Ordering::Relaxed);
        });
        end(&mut child);
        lines.for_each(|line| all.read(&line));
        disk.unmount();
        disk.mount();
        let open = start(&directory).unwrap_or_else(|error| panic!("round {round}: {error:?}"));
        let lost: Vec<_> = all.made.difference(&uids(&open.store)).cloned().collect();
        assert!(lost.is_empty(), "round {round}: lost {lost:?}");
        open.close().await;
    }
}
