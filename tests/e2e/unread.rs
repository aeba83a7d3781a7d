//! A daemon whose log nobody reads, and one whose tokens are taken back; no VM is needed for either.

use reqwest::Method;

use crate::namespace::in_namespace;
use crate::site::{MOMENT, Site};
use crate::stage::until;

/// Requests whose lines fill a pipe (64 KiB) several times over.
const REQUESTS: usize = 3000;

#[test]
fn a_log_that_nobody_reads_stops_neither_the_answers_nor_the_end() {
    in_namespace(async || {
        let mut site = Site::running().await;
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
        // The daemon hears of a token that was taken back without a restart.
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
