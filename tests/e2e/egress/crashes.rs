//! Deaths of the daemon at each step of mediated egress.

use std::fs;

use reqwest::Method;
use serde_json::json;

use super::outside::Outside;
use super::{box_with, carriers, start, variables, works};
use crate::crash::{EDGES, OF_EGRESS};
use crate::fixtures::until;
use crate::harness::{BOOT, Harness, MOMENT};
use crate::invariants::settles;
use crate::namespace::in_namespace;

/// Restarts the daemon so that it dies at a step, of its start or of a request, and starts it again.
async fn dies(site: &mut Harness, outside: &Outside, failpoint: &str, request: Option<(Method, &str)>) {
    if site.has_daemon() {
        site.stop().await;
    }
    let variables = variables(outside);
    let mut all: Vec<(&str, &str)> = variables.iter().map(|(key, value)| (*key, &**value)).collect();
    all.push(("STEAD_FAILPOINT", failpoint));
    site.spawn_with(&all);
    if let Some((method, path)) = request {
        site.answers().await;
        site.attempt(method, path, None).await;
    }
    site.crashed(failpoint).await;
    start(site, outside).await;
}

async fn is_gone(site: &Harness) {
    until("the instance to be gone", BOOT, async || {
        (site.get("box").await["code"] == "not_found").then_some(())
    })
    .await;
    until("the process to end", MOMENT, async || carriers().is_empty().then_some(())).await;
    assert_eq!(fs::read_dir(site.data().join("egress")).expect("there").count(), 0);
}

#[test]
fn a_crash_at_any_step_of_mediated_egress_is_healed() {
    in_namespace(async || {
        let mut site = Harness::new().await;
        let outside = Outside::new(&site).await;
        for edge in EDGES {
            let step = |at: usize| {
                let (kind, action) = OF_EGRESS[at];
                format!("{kind}/{action}/{edge}")
            };
            let [launch, retire, put, remove, discard] = [0, 1, 2, 3, 4].map(step);
            for (first, last) in [(launch, retire), (put, discard)] {
                start(&mut site, &outside).await;
                box_with(&site, &json!({})).await;
                works(&site).await;
                // The process ends while no daemon runs, so that the next one has to start it and put the policy.
                site.stop().await;
                carriers().iter().for_each(|pid| drop(site.shell(&format!("kill -9 {pid}"))));
                dies(&mut site, &outside, &first, None).await;
                works(&site).await;
                dies(&mut site, &outside, &remove, Some((Method::POST, "/instances/box/stop"))).await;
                site.until_state("box", "Stopped").await;
                dies(&mut site, &outside, &last, Some((Method::DELETE, "/instances/box"))).await;
                is_gone(&site).await;
                settles(&mut site, &last).await;
            }
        }
        assert!(!outside.seen().contains("stray"), "{}", outside.seen());
    });
}
