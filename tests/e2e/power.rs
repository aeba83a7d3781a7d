//! Power loss under a whole daemon, in a storm of requests and in its starts: acknowledged changes are there, and the
//! daemon starts.
//!
//! `STEAD_TEST_ROUNDS` sets the number of losses of each kind; `make test` runs few.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use futures::future::join_all;
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};

use crate::fixtures::{rounds, run, until};
use crate::harness::{Harness, MOMENT, image};
use crate::loop_disk::LoopDisk;
use crate::namespace::in_namespace;

const ROUNDS: u64 = 4;
const DISK_MEBIBYTES: u64 = 512;
/// Number of simultaneous clients.
const CLIENTS: u64 = 3;

/// Returns numbers that differ from round to round and are the same in every run.
fn scatter(round: u64) -> u64 {
    round.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 32
}

/// The acknowledged state of one client's objects: by path, `true` if the object exists. A change that was requested
/// without an answer is `None`.
#[derive(Debug, Default)]
struct Answered(BTreeMap<String, Option<bool>>);

impl Answered {
    /// Requests a change. Returns `true` if the answer was the expected one. Other answers do not count: without its
    /// disk the daemon may refuse everything, but not acknowledge.
    async fn ask(&mut self, site: &Harness, method: Method, path: &str, of: &str, body: Value) -> bool {
        let is_deletion = method == Method::DELETE;
        self.0.insert(of.to_owned(), None);
        let answer = site.attempt(method, path, Some(body).filter(|body| !body.is_null())).await;
        let good = if is_deletion { StatusCode::NO_CONTENT } else { StatusCode::CREATED };
        let is_acknowledged = answer.is_some_and(|answer| answer.status == good);
        if is_acknowledged {
            self.0.insert(of.to_owned(), Some(!is_deletion));
        }
        is_acknowledged
    }
}

/// Creates and deletes objects until the power is gone.
async fn client(site: &Harness, name: &str, count: u64) -> Answered {
    let mut answered = Answered::default();
    for n in 0..count {
        let name = format!("{name}-{n}");
        let (kind, body) = match n % 3 {
            0 => ("volumes", json!({ "name": name, "size_gb": 1 })),
            1 => ("instances", crate::faults::instance(&name)),
            _ => {
                let rule = json!({ "match": { "hostname": format!("{name}.test"), "port": 8082 },
                    "target": { "instance": "kept", "port": 80 } });
                ("ingresses", json!({ "name": name, "rules": [rule] }))
            }
        };
        let path = format!("/{kind}/{name}");
        let is_made = answered.ask(site, Method::POST, &format!("/{kind}"), &path, body).await;
        if is_made && n % 2 == 0 {
            answered.ask(site, Method::DELETE, &path, &path, Value::Null).await;
        }
    }
    answered
}

/// Ends the daemon whose power is gone, and gives the disk its power again.
async fn power_returns(site: &mut Harness, disk: &LoopDisk) {
    site.kill().await;
    disk.unmount();
    disk.mount();
}

/// Checks that all acknowledged changes are there.
async fn nothing_is_lost(site: &Harness, answered: &BTreeMap<String, Option<bool>>, round: u64) {
    for (path, state) in answered.iter().filter_map(|(path, state)| Some((path, (*state)?))) {
        // Deleted objects may still be on their way out.
        until("an answer", MOMENT, async || {
            let status = site.request(Method::GET, path, None).await.status;
            assert!(!state || status == StatusCode::OK, "round {round}: {path} was acknowledged: {status}");
            (state || status == StatusCode::NOT_FOUND).then_some(())
        })
        .await;
    }
    let log = fs::read_to_string(site.log_file()).expect("a log");
    // A thread of sled that closes a database on a failed disk may panic, which does no harm.
    let is_bad = |line: &&str| {
        ["unreadable", "panicked at src", "panicked at controllers"].iter().any(|word| line.contains(word))
    };
    let bad: Vec<&str> = log.lines().filter(is_bad).collect();
    assert!(bad.is_empty(), "round {round}: {bad:#?}");
}

/// Creates a site whose data directory is on its own disk, with one image and one instance that waits for a guest
/// kernel.
async fn scene() -> (Harness, LoopDisk) {
    let mut site = Harness::new().await;
    site.kernel_dir = site.scratch("no-kernel");
    let disk = LoopDisk::new(DISK_MEBIBYTES);
    fs::create_dir(disk.path().join("data")).expect("made");
    run("sync", &["--file-system", &disk.path().display().to_string()]);
    std::os::unix::fs::symlink(disk.path().join("data"), site.data()).expect("linked");
    site.start().await;
    let made = site.request(Method::POST, "/images", Some(json!({ "name": image("busybox") }))).await;
    assert_eq!(made.status, StatusCode::ACCEPTED, "{made:?}");
    site.until_image(&image("busybox")).await;
    let made = site.request(Method::POST, "/instances", Some(crate::faults::instance("kept"))).await;
    assert_eq!(made.status, StatusCode::CREATED, "{made:?}");
    (site, disk)
}

/// Removes the objects of a round, so that hundreds of rounds have room.
async fn clear(site: &Harness, answered: &BTreeMap<String, Option<bool>>) {
    for path in answered.keys() {
        until("a deletion", MOMENT, async || {
            let status = site.request(Method::DELETE, path, None).await.status;
            [StatusCode::NO_CONTENT, StatusCode::NOT_FOUND].contains(&status).then_some(())
        })
        .await;
    }
}

#[test]
fn a_loss_of_power_in_a_storm_of_requests_loses_nothing_that_was_acknowledged() {
    in_namespace(async || {
        let (mut site, disk) = scene().await;
        let mut acknowledged = 0;
        for round in 1..=rounds(ROUNDS) {
            let clients = (0..CLIENTS).map(|n| {
                let (site, name) = (&site, format!("r{round}-{n}"));
                async move { client(site, &name, 12).await }
            });
            let cut = async {
                // The moment of the loss differs from round to round, and nothing is waited for.
                tokio::time::sleep(Duration::from_millis(scatter(round) % 600)).await;
                disk.cut_power();
                // Answers after the loss count as well; then the daemon no longer answers.
                tokio::time::sleep(Duration::from_millis(scatter(round) % 50)).await;
                site.shell(&format!("kill -9 {}", site.daemon_pid()));
            };
            let (answered, ()) = tokio::join!(join_all(clients), cut);
            power_returns(&mut site, &disk).await;
            site.start().await;
            let answered: BTreeMap<_, _> = answered.into_iter().flat_map(|answered| answered.0).collect();
            acknowledged += answered.values().flatten().count();
            nothing_is_lost(&site, &answered, round).await;
            let kept = site.request(Method::GET, "/instances/kept", None).await;
            assert_eq!(kept.status, StatusCode::OK, "round {round}: {kept:?}");
            clear(&site, &answered).await;
        }
        assert!(acknowledged > 0, "nothing was acknowledged in any round");
        site.kill().await;
    });
}

#[test]
fn a_loss_of_power_in_a_start_leaves_a_daemon_that_starts() {
    in_namespace(async || {
        let (mut site, disk) = scene().await;
        let mut answered = client(&site, "kept", 9).await.0;
        for round in 1..=rounds(ROUNDS) {
            site.kill().await;
            // Another program syncs on the same file system, as guests do: that makes names durable before content.
            let is_over = AtomicBool::new(false);
            site.spawn(None);
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    let mut file = fs::File::create(disk.path().join("other")).expect("made");
                    while !is_over.load(Ordering::Relaxed) {
                        if file.write_all(b"x").and_then(|()| file.sync_all()).is_err() {
                            break; // The power is gone.
                        }
                    }
                });
                std::thread::sleep(Duration::from_millis(scatter(round) % 400));
                disk.cut_power();
                is_over.store(true, Ordering::Relaxed);
            });
            power_returns(&mut site, &disk).await;
            site.start().await;
            nothing_is_lost(&site, &answered, round).await;
            // Changes that this daemon acknowledges are there after the next loss.
            clear(&site, &answered.split_off(&format!("/volumes/s{}", round.saturating_sub(3)))).await;
            answered.extend(client(&site, &format!("s{round}"), 3).await.0);
        }
        site.kill().await;
    });
}
