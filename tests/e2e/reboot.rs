//! A reboot of the host: everything that was not on a disk is gone, and the desired state is restored. For a schedule
//! it is a time without a daemon: `schedules.rs`.

use reqwest::{Method, StatusCode};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::fixtures::{timeout, until};
use crate::forks::pool;
use crate::harness::{BOOT, Harness, MOMENT, image};
use crate::invariants::settles;
use crate::namespace::in_namespace;
use crate::socket::shell;
use crate::standby::counted;

/// Server with a page, and a number that is only in memory.
const SERVER: &str = "mkdir -p /www; echo here >/www/index.html; httpd -p 80 -h /www; echo serving; \
                      i=0; while true; do i=$((i+1)); echo count $i.; sleep 0.2 || sleep 1; done";
const POOL: u32 = 2;

async fn page(ip: &str) -> Option<String> {
    let mut stream = timeout(MOMENT, TcpStream::connect((ip, 80))).await.ok()?.ok()?;
    stream.write_all(b"GET / HTTP/1.0\r\n\r\n").await.ok()?;
    let mut page = String::new();
    timeout(MOMENT, stream.read_to_string(&mut page)).await.ok()?.ok()?;
    Some(page)
}

#[test]
fn after_a_reboot_a_standby_wakes_with_its_memory_and_a_pool_is_filled_again() {
    in_namespace(async || {
        let mut site = Harness::running().await;
        let policy = json!({ "enabled": true, "idle_timeout": "10m", "wake_on_traffic": true });
        let body = json!({ "size": "128MB", "cmd": ["sh", "-c", SERVER], "auto_standby": policy });
        let id = site.create("box", &image("busybox"), body).await;
        site.until_console(&id, "serving").await;
        // The line may appear before the daemon is notified that the program runs.
        site.until_state("box", "Running").await;
        let kept = json!({ "kind": "Standby", "name": "before", "pool_size": POOL });
        let kept = site.request(Method::POST, "/instances/box/snapshots", Some(kept)).await;
        assert_eq!(kept.status, StatusCode::CREATED, "{kept:?}");
        let snapshot = kept.body["id"].as_str().expect("an id").to_owned();
        pool(&site, &snapshot, POOL).await;
        let asleep = site.request(Method::POST, "/instances/box/standby", None).await;
        assert_eq!((asleep.status, &asleep.body["state"]), (StatusCode::OK, &json!("Standby")), "{asleep:?}");
        let ip = asleep.body["network"]["ip"].as_str().expect("an address").to_owned();
        let numbers = counted(&site.console(&id)).len();
        let before = site.vmms();
        site.reboot().await;
        site.start().await;

        // The instance is as before, and nothing ran for it meanwhile.
        let seen = site.until_state("box", "Standby").await;
        assert_eq!(
            (&seen["has_snapshot"], &seen["started_at"], &seen["network"]),
            (&json!(true), &asleep.body["started_at"], &asleep.body["network"]),
            "{seen:#}"
        );
        // The reported state of the pool is the old one, until its pooled instances have been observed.
        until("the pool's VMMs", BOOT, async || (site.vmms().len() == before.len()).then_some(())).await;
        pool(&site, &snapshot, POOL).await;
        assert_eq!(site.vmms().len(), before.len(), "the pool's and no others");

        // The first connection wakes it, and it continues where it was.
        until("the page", BOOT, async || page(&ip).await.filter(|page| page.contains("here"))).await;
        let awake = site.until_state("box", "Running").await;
        assert_eq!((&awake["power_by"], &awake["has_snapshot"]), (&json!("traffic"), &json!(false)));
        until("the counter to go on", BOOT, async || {
            (counted(&site.console(&id)).len() > numbers).then_some(())
        })
        .await;
        let all = counted(&site.console(&id));
        assert_eq!(all, (1..=all.len() as u64).collect::<Vec<_>>(), "no number is lost or said twice");

        // The pooled instances are as usable as before.
        let held = site.vmms();
        let path = format!("/snapshots/{snapshot}/fork");
        let fork = site.request(Method::POST, &path, Some(json!({ "name": "fork" }))).await;
        assert_eq!((fork.status, &fork.body["state"]), (StatusCode::CREATED, &json!("Running")), "{fork:?}");
        let pid = u32::try_from(fork.body["vmm_pid"].as_u64().expect("a pid")).expect("a pid");
        assert!(held.contains(&pid), "it was held ready");
        assert_eq!(shell(&site, "fork", "hostname").await, "fork");
        settles(&mut site, "a reboot").await;
    });
}
