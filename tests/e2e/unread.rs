//! A daemon whose log is not read, and a daemon whose tokens are revoked. Neither needs a VM.

use reqwest::Method;

use crate::fixtures::until;
use crate::harness::{Harness, MOMENT};
use crate::namespace::in_namespace;

/// Number of requests whose log lines fill a pipe (64 KiB) several times over.
const REQUESTS: usize = 3000;

#[test]
fn a_log_that_nobody_reads_stops_neither_the_answers_nor_the_end() {
    in_namespace(async || {
        let mut site = Harness::running().await;
        site.stop().await;
        let unread = site.spawn_piped();
        site.answers().await;
        for _ in 0..REQUESTS {
            let answer = site.request(Method::GET, "/instances", None).await;
            assert_eq!(answer.status, 200);
        }
        site.stop().await;
        drop(unread);
        site.start().await;
        // The daemon notices a revoked token without a restart.
        let data = site.data().display().to_string();
        let tokens = site.cli(&format!("token list --data-dir {data} -o json"));
        let tokens: serde_json::Value = serde_json::from_str(&tokens).expect("JSON");
        let ids: Vec<&str> =
            tokens.as_array().expect("a list").iter().filter_map(|token| token["id"].as_str()).collect();
        site.cli(&format!("token revoke --data-dir {data} {}", ids.join(" ")));
        until("the token to be no good", MOMENT, async || {
            (site.request(Method::GET, "/instances", None).await.status == 401).then_some(())
        })
        .await;
    });
}
