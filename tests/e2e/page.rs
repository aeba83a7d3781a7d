//! The example of the page that the project implements, on a real VM: every value of the request is in force.

use reqwest::Method;
use serde_json::{Value, json};

use crate::harness::{Harness, image};
use crate::invariants::settles;
use crate::namespace::in_namespace;
use crate::socket::shell;

const GB: u64 = 1 << 30;

/// Returns the request of the page. Other than there are the image's registry, the hypervisor, which this host lacks, and
/// what is not supported yet: credentials and devices.
fn example() -> Value {
    json!({
        "image": image("busybox"),
        "name": "my-workload-1",
        "cmd": ["echo", "hello"],
        "disk_io_bps": "100MB/s",
        "entrypoint": ["/bin/sh", "-c"],
        "env": { "PORT": "3000", "NODE_ENV": "production" },
        "hotplug_size": "2GB",
        "hypervisor": "qemu",
        "overlay_size": "20GB",
        "size": "2GB",
        "skip_kernel_headers": true,
        "tags": { "team": "backend", "env": "staging" },
        "vcpus": 2,
    })
}

async fn number(site: &Harness, line: &str) -> u64 {
    let text = shell(site, "my-workload-1", line).await;
    text.trim().parse().unwrap_or_else(|_| panic!("{line}: {text}"))
}

#[test]
fn the_example_of_the_page_is_accepted_and_every_value_of_it_is_in_force() {
    in_namespace(async || {
        let mut site = Harness::running().await;
        let created = site.request(Method::POST, "/instances", Some(example())).await;
        assert_eq!(created.status.as_u16(), 201, "{created:?}");
        let id = created.body["id"].as_str().expect("an id").to_owned();
        // A shell that is given one word as its command prints an empty line.
        let seen = site.until("my-workload-1", "ended", |seen| seen["exit_code"] == 0).await;
        assert_eq!(site.console(&id).trim_end_matches('\r'), "\n", "{seen:#}");
        for (field, expected) in [
            ("disk_io_bps", json!("100.0 MB/s")),
            ("hotplug_size", json!("2.0 GB")),
            ("overlay_size", json!("20.0 GB")),
            ("size", json!("2.0 GB")),
            ("vcpus", json!(2)),
            ("tags", json!({ "team": "backend", "env": "staging" })),
            ("hypervisor", json!("qemu")),
        ] {
            assert_eq!(seen[field], expected, "{field}: {seen:#}");
        }
        // The same with a program that stays.
        let body = json!({ "cmd": ["echo $PORT $NODE_ENV; while true; do sleep 1; done"] });
        let started = site.request(Method::POST, "/instances/my-workload-1/start", Some(body)).await;
        assert!(started.status.is_success(), "{started:?}");
        site.until_state("my-workload-1", "Running").await;
        site.until_console(&id, "3000 production").await;
        assert_eq!(number(&site, "nproc").await, 2);
        let total = number(&site, "awk '/MemTotal/ { print $2 * 1024 }' /proc/meminfo").await;
        // The kernel keeps some of it for itself.
        assert!((GB * 37 / 10..=GB * 4).contains(&total), "{total} bytes of memory");
        let disk = number(&site, "df -k / | awk 'NR == 2 { print $2 * 1024 }'").await;
        // The file system needs some of it.
        assert!((GB * 18..=GB * 20).contains(&disk), "{disk} bytes of disk");
        assert_eq!(shell(&site, "my-workload-1", "ls /lib/modules/*/build 2>/dev/null | wc -l").await, "0");
        let resources = site.request(Method::GET, "/resources", None).await.body;
        assert_eq!(resources["disk_io"]["allocated"], json!(100 << 20), "{resources:#}");
        site.delete("my-workload-1").await;
        settles(&mut site, "the page's example").await;
    });
}
