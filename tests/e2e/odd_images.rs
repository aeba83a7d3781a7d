//! Requirements of public images that ours lack: a program with its own user that opens its outputs by name, paths
//! that are links, a relative working directory, a stop signal of systemd; and a guest that was halted from inside.

use std::fs;
use std::os::unix::fs::symlink;

use reqwest::{Method, StatusCode};
use serde_json::json;

use crate::fixtures;
use crate::harness::{Harness, image};
use crate::namespace::in_namespace;
use crate::socket::{Received, Socket, run, shell};

const PROGRAM: &str = "echo by name >/dev/stdout && echo and that >/dev/stderr; echo in $(pwd) as $(id -u); \
                       echo may open $(ulimit -Hn); trap 'echo caught; printf cut; exit 9' 37; \
                       nc -l -p 80 -e true & sleep 1; kill -0 $! && echo at a low port; \
                       echo ready; while true; do sleep 0.2; done";

/// Copies one file out of the guest.
async fn copied(site: &Harness, path: &str) -> Vec<u8> {
    let mut socket = Socket::cp(site, "odd", &json!({ "direction": "from", "guest_path": path })).await;
    let mut bytes = Vec::new();
    loop {
        match socket.next().await {
            Received::Bytes(more) => bytes.extend(more),
            Received::Json(end) if end["type"] == "end" => return bytes,
            Received::Json(header) => assert_eq!(header["type"], "header", "{header}"),
            Received::End => panic!("{path}: no end"),
        }
    }
}

fn odd_image(site: &Harness) {
    let root = site.scratch("odd-root");
    fs::create_dir_all(root.join("srv/real")).expect("made");
    symlink("/var/nowhere/tmp", root.join("tmp")).expect("made");
    symlink("/srv/real", root.join("data")).expect("made");
    let layout = site.layout();
    let (from, to) = (format!("{layout}:busybox"), format!("{layout}:odd"));
    fixtures::run("umoci", &["tag", "--image", &from, "odd"]);
    for name in ["tmp", "data", "srv"] {
        let source = root.join(name).display().to_string();
        fixtures::run("umoci", &["insert", "--image", &to, &source, &format!("/{name}")]);
    }
    let options = ["--config.user=1234", "--config.workingdir=app", "--config.stopsignal=SIGRTMIN+3"];
    fixtures::run("umoci", &[&["config", "--image", &to][..], &options[..]].concat());
    site.push(&layout, "odd");
}

#[test]
fn demands_of_published_images_are_met_and_a_halted_guest_is_reported() {
    in_namespace(async || {
        let site = Harness::running().await;
        odd_image(&site);
        let volume = site.request(Method::POST, "/volumes", Some(json!({ "name": "v", "size_gb": 1 }))).await;
        assert_eq!(volume.status, StatusCode::CREATED, "{volume:?}");
        let mounts = json!([{ "volume_id": volume.body["id"], "mount_path": "/data" }]);
        let body = json!({ "cmd": ["sh", "-c", PROGRAM], "volumes": mounts });
        let id = site.create("odd", &image("odd"), body).await;
        let console = site.until_console(&id, "ready").await;
        for text in ["by name", "and that", "in /app as 1234", "may open 1048576", "at a low port"] {
            assert!(console.contains(text), "{text}: {console}");
        }
        assert!(!console.contains("[stead]"), "{console}");
        // The VMM has no environment, and leaves no dump: a limit of one byte also holds where a program gets dumps.
        let pid = site.get("odd").await["vmm_pid"].to_string();
        assert_eq!(fs::read_to_string(format!("/proc/{pid}/environ")).expect("it lives"), "");
        let limits = fs::read_to_string(format!("/proc/{pid}/limits")).expect("it lives");
        let core = limits.lines().find(|line| line.starts_with("Max core file size")).unwrap_or_default();
        assert_eq!(core.split_whitespace().nth(4), Some("1"), "{limits}");
        // Links lead to the paths that the image means.
        let seen = "grep -c ' /srv/real ext4 ' /proc/mounts; cd /tmp && pwd -P";
        let (text, _) = run(&site, "odd", json!({ "command": ["sh", "-c", seen], "user": "0" }), b"").await;
        assert_eq!(String::from_utf8_lossy(&text), "1\n/var/nowhere/tmp\n");
        // Another user can open the output of a program that runs as this user.
        assert_eq!(shell(&site, "odd", "echo mine >/dev/stdout").await, "mine");
        // These are devices of programs that create their own interfaces and file systems.
        assert_eq!(shell(&site, "odd", ": <>/dev/net/tun && : <>/dev/fuse && echo open").await, "open");
        // A file that the kernel generates has contents, although its length is reported as zero.
        let processors = String::from_utf8(copied(&site, "/proc/cpuinfo").await).expect("text");
        assert!(processors.contains("processor"), "{processors}");
        // A client that sends everything before it reads still gets the message of a refusal.
        let relative = json!({ "direction": "to", "guest_path": "no/slash" });
        let mut socket = Socket::cp(&site, "odd", &relative).await;
        for _ in 0..256 {
            socket.bytes(&[7; 32 << 10]).await;
        }
        socket.json(&json!({ "type": "end" })).await;
        match socket.next().await {
            Received::Json(error) => assert!(error.to_string().contains("absolute"), "{error}"),
            other => panic!("{other:?}"),
        }
        // The stop signal is the image's own, and the last line of the output is complete.
        let stopped = site.request(Method::POST, "/instances/odd/stop", None).await;
        assert_eq!(stopped.body["exit_code"], 9, "{stopped:?}\n{}", site.console(&id));
        assert!(site.console(&id).ends_with("caught\ncut"), "{}", site.console(&id));
        let start = json!({ "cmd": ["sh", "-c", "echo next; while true; do sleep 0.2; done"] });
        site.request(Method::POST, "/instances/odd/start", Some(start)).await;
        site.until_console(&id, "cut\nnext").await;
        site.until_state("odd", "Running").await;
        // The guest is halted from inside, which only its silence shows.
        let request = json!({ "command": ["/bin/busybox", "halt", "-f"], "user": "0", "timeout": 1 });
        let mut halt = Socket::exec(&site, "odd", &request).await;
        let is_reported = |seen: &serde_json::Value| {
            let conditions = seen["conditions"].as_array().into_iter().flatten();
            let mut ready = conditions.filter(|one| one["type"] == "Ready" && one["status"] == "False");
            ready.any(|one| one["reason"] == "AgentUnreachable")
        };
        // Waiting requests end, and new requests are refused at once.
        let (_, end) = halt.finish().await;
        assert_eq!(end["error"], "the guest did not end the program in its time");
        site.until("odd", "unreachable", is_reported).await;
        let stat = site.request(Method::GET, "/instances/odd/stat?path=/", None).await;
        assert_eq!(
            (stat.status, &stat.body["code"]),
            (StatusCode::GATEWAY_TIMEOUT, &json!("agent_unreachable"))
        );
        site.delete("odd").await;
    });
}
