//! SIGKILL of the daemon in a storm of creates, deletes, standbys, restores and forks on real VMs: no acknowledged
//! change is lost, and nothing is left over.
//!
//! `STEAD_TEST_ROUNDS` sets the number of kills; `make test` runs few.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};

use futures::future::join_all;
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};

use crate::fixtures::{rounds, until};
use crate::harness::{BOOT, Harness, image};
use crate::invariants::settles;
use crate::namespace::in_namespace;

const ROUNDS: u64 = 6;
/// Limit on simultaneous instances. Each boots or runs under emulation.
const INSTANCES_MAX: usize = 4;

/// A generator of numbers that differ from call to call and are the same in every run.
struct Scatter(Cell<u64>);

impl Scatter {
    fn below(&self, bound: usize) -> usize {
        self.0.set(
            self.0.get().wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407),
        );
        usize::try_from(self.0.get() >> 33).expect("31 bits") % bound.max(1)
    }
}

/// The knowledge of the clients of a storm.
#[derive(Default)]
struct Known {
    /// Acknowledged instances whose deletion was not requested: name to id.
    there: BTreeMap<String, String>,
    /// Instances that were acknowledged as deleted.
    gone: BTreeSet<String>,
    /// Instances with a request without an answer: either outcome is valid.
    unsure: BTreeSet<String>,
}

struct Storm<'s> {
    site: &'s Harness,
    known: &'s RefCell<Known>,
    answers: Cell<usize>,
}

impl Storm<'_> {
    fn answered(&self) {
        self.answers.set(self.answers.get() + 1);
    }

    async fn create(&self, name: &str, path: &str, body: Value) {
        self.known.borrow_mut().unsure.insert(name.to_owned());
        let Some(answer) = self.site.attempt(Method::POST, path, Some(body)).await else { return };
        self.answered();
        let mut known = self.known.borrow_mut();
        known.unsure.remove(name);
        if answer.status == StatusCode::CREATED {
            let id = answer.body["id"].as_str().expect("an id").to_owned();
            known.there.insert(name.to_owned(), id);
        } else {
            // A fork of an instance that is changing its state is refused as a whole.
            assert_eq!(answer.status, StatusCode::CONFLICT, "{name}: {answer:?}");
        }
    }

    async fn delete(&self, name: &str) {
        let id = self.known.borrow_mut().there.remove(name).expect("it is there");
        self.known.borrow_mut().unsure.insert(id.clone());
        let answer = self.site.attempt(Method::DELETE, &format!("/instances/{id}"), None).await;
        let Some(answer) = answer.filter(|answer| answer.status == StatusCode::NO_CONTENT) else { return };
        self.answered();
        drop(answer);
        let mut known = self.known.borrow_mut();
        known.unsure.remove(&id);
        known.gone.insert(id);
    }

    /// Requests a verb that may be refused because of the instance's state.
    async fn verb(&self, name: &str, verb: &str) {
        let Some(answer) = self.site.attempt(Method::POST, &format!("/instances/{name}/{verb}"), None).await
        else {
            return;
        };
        self.answered();
        let is_expected = answer.status == StatusCode::OK || answer.status == StatusCode::CONFLICT;
        assert!(is_expected, "{verb} {name}: {answer:?}");
    }

    /// Runs one action of one client.
    async fn act(&self, round: u64, client: usize, choice: usize, target: Option<String>) {
        let name = format!("s{round}-{client}");
        let body = json!({ "name": name, "image": image("busybox"), "size": "128MB", "vcpus": 1,
            "overlay_size": "64MB", "cmd": ["sh", "-c", "while true; do sleep 1; done"] });
        match (choice, target) {
            (0, Some(target)) => self.delete(&target).await,
            (1, Some(target)) => self.verb(&target, "standby").await,
            (2, Some(target)) => self.verb(&target, "restore").await,
            (3, Some(target)) => {
                let path = format!("/instances/{target}/fork");
                self.create(&name, &path, json!({ "name": name, "from_running": true })).await;
            }
            _ => self.create(&name, "/instances", body).await,
        }
    }
}

/// Runs one storm, which ends with the daemon's death.
async fn storm(site: &mut Harness, known: &RefCell<Known>, round: u64, scatter: &Scatter) {
    let pid = site.daemon_pid();
    let storm = Storm { site, known, answers: Cell::new(0) };
    let mut targets: Vec<String> = known.borrow().there.keys().cloned().collect();
    let is_full = targets.len() >= INSTANCES_MAX;
    let mut clients = Vec::new();
    for client in 0..3 {
        let target = (!targets.is_empty()).then(|| targets.remove(scatter.below(targets.len())));
        let choice = if is_full { scatter.below(3) } else { scatter.below(5) };
        clients.push(storm.act(round, client, choice, target));
    }
    let until_answers = 1 + scatter.below(3);
    let kill = async {
        let all = join_all(clients);
        let enough = async {
            while storm.answers.get() < until_answers {
                tokio::time::sleep(std::time::Duration::from_millis(1)).await;
            }
        };
        tokio::pin!(all, enough);
        // The clients continue until they have their answers or the daemon is dead.
        tokio::select! {
            biased;
            () = &mut enough => {
                site.shell(&format!("kill -9 {pid}"));
                all.await;
            }
            _ = &mut all => drop(site.shell(&format!("kill -9 {pid}"))),
        }
    };
    kill.await;
    site.kill().await;
    site.start().await;
}

/// Checks that every acknowledged write is there.
async fn nothing_is_lost(site: &Harness, known: &RefCell<Known>, round: u64) {
    let listed = site.request(Method::GET, "/instances", None).await;
    let listed: BTreeMap<String, String> = listed
        .body
        .as_array()
        .expect("a list")
        .iter()
        .map(|instance| {
            let text = |field: &str| instance[field].as_str().expect("text").to_owned();
            (text("name"), text("id"))
        })
        .collect();
    let mut known = known.borrow_mut();
    for (name, id) in &known.there {
        assert_eq!(listed.get(name), Some(id), "round {round}: {name} was acknowledged");
    }
    for id in &known.gone {
        assert!(!listed.values().any(|there| there == id), "round {round}: {id} was deleted");
    }
    // The outcome of the unanswered requests is known now.
    let unsure = std::mem::take(&mut known.unsure);
    for (name, id) in listed {
        if unsure.contains(&name) {
            known.there.insert(name, id);
        }
    }
}

#[test]
fn a_daemon_that_is_killed_again_and_again_in_a_storm_loses_nothing_and_leaves_nothing() {
    in_namespace(async || {
        let mut site = Harness::running().await;
        let (known, scatter) = (RefCell::new(Known::default()), Scatter(Cell::new(7)));
        for round in 0..rounds(ROUNDS) {
            storm(&mut site, &known, round, &scatter).await;
            nothing_is_lost(&site, &known, round).await;
        }
        // All remaining instances can be deleted, and then nothing is left.
        let left = site.request(Method::GET, "/instances", None).await;
        for instance in left.body.as_array().expect("a list") {
            let path = format!("/instances/{}", instance["id"].as_str().expect("an id"));
            until("the deletion", BOOT, async || {
                let answer = site.request(Method::DELETE, &path, None).await;
                [StatusCode::NO_CONTENT, StatusCode::NOT_FOUND].contains(&answer.status).then_some(())
            })
            .await;
        }
        until("no VMM", BOOT, async || site.vmms().is_empty().then_some(())).await;
        settles(&mut site, "a storm").await;
        assert_eq!(site.taps(), 0);
    });
}
