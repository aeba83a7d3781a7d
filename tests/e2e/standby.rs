//! Standby and restore on real VMs: the memory continues, the disk stays intact, nothing is left over.

use std::path::PathBuf;

use jiff::{SignedDuration, Timestamp};
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};

use crate::crash::{EDGES, OF_LOSS, OF_RESTORE, OF_STANDBY, clock_is_right, crash_at_request, crash_at_verb};
use crate::deaths::all_vmms_die;
use crate::fixtures::until;
use crate::harness::{BOOT, Harness, MOMENT, image};
use crate::invariants::settles;
use crate::namespace::in_namespace;
use crate::socket::{Received, Socket, run};

/// Program that counts in memory, prints each count on the console and writes it to the disk.
const COUNTER: &str =
    "i=0; while true; do i=$((i+1)); echo count $i.; echo $i >>/counts; sleep 0.05 || sleep 1; done";

const ROUNDS: usize = 100;
/// Time that passes on the host while the guest is in standby.
const SLEEP: SignedDuration = SignedDuration::from_secs(3);

/// Returns the numbers that the console shows, in order.
pub(crate) fn counted(console: &str) -> Vec<u64> {
    let numbers = console.split("count ").skip(1);
    numbers.filter_map(|rest| rest.split_once('.')?.0.parse().ok()).collect()
}

/// Creates a site whose only instance counts.
async fn counting() -> (Harness, String) {
    let site = Harness::running().await;
    let id = site.create("box", &image("busybox"), json!({ "cmd": ["sh", "-c", COUNTER] })).await;
    site.until_state("box", "Running").await;
    (site, id)
}

async fn verb(site: &Harness, verb: &str) -> Value {
    let answer = site.request(Method::POST, &format!("/instances/box/{verb}"), None).await;
    assert_eq!(answer.status, StatusCode::OK, "{verb}: {answer:?}");
    answer.body
}

async fn counts_on(site: &Harness, id: &str, beyond: usize) {
    until("the counter goes on", BOOT, async || (counted(&site.console(id)).len() > beyond).then_some(()))
        .await;
}

/// Returns the checksum of the tables that the firmware left for the guest's kernel.
async fn tables_of_firmware(site: &Harness) -> String {
    let line = "cd /sys/firmware/acpi/tables; cat FACP APIC DSDT | wc -c; cat FACP APIC DSDT | md5sum";
    let (output, end) = run(site, "box", json!({ "command": ["sh", "-c", line] }), b"").await;
    let output = String::from_utf8_lossy(&output).into_owned();
    let bytes = output.lines().next().and_then(|line| line.trim().parse::<u32>().ok());
    assert!(end == json!({ "exitCode": 0 }) && bytes.is_some_and(|bytes| bytes > 1000), "{output}");
    output
}

#[test]
fn a_vm_goes_to_standby_and_back_with_its_memory_and_without_a_process_meanwhile() {
    in_namespace(async || {
        let (mut site, id) = counting().await;
        let firmware = tables_of_firmware(&site).await;
        for round in 0..ROUNDS {
            let before = counted(&site.console(&id)).len();
            counts_on(&site, &id, before).await;
            let mut held = match round {
                0 => Some(Socket::exec(&site, "box", &json!({ "command": ["sleep", "7777"] })).await),
                _ => None,
            };
            let seen = verb(&site, "standby").await;
            if let Some(held) = &mut held {
                // The client is notified of the stream's end, and nothing of it is left in the guest.
                while !matches!(held.next().await, Received::End) {}
            }
            assert_eq!(
                (&seen["state"], &seen["has_snapshot"]),
                (&json!("Standby"), &json!(true)),
                "{seen:#}"
            );
            assert_eq!(site.vmms(), [0; 0], "round {round}");
            if round == 0 {
                for illegal in ["standby", "start", "stop"] {
                    let path = format!("/instances/box/{illegal}");
                    let refused = site.request(Method::POST, &path, None).await;
                    let code = (refused.status, &refused.body["code"]);
                    assert_eq!(code, (StatusCode::CONFLICT, &json!("invalid_state")), "{illegal}");
                }
                // The TAP is given back, but not the address.
                until("no TAP", MOMENT, async || (site.taps() == 0).then_some(())).await;
                // A later daemon finds the standby as it is. The guest is not aware of the time that passes.
                let end = Timestamp::now() + SLEEP;
                site.kill().await;
                until("the sleep", MOMENT, async || (Timestamp::now() >= end).then_some(())).await;
                site.start().await;
            }
            let address = seen["network"]["ip"].clone();
            let seen = verb(&site, "restore").await;
            assert_eq!(
                (&seen["state"], &seen["has_snapshot"], &seen["network"]["ip"]),
                (&json!("Running"), &json!(false), &address),
                "{seen:#}"
            );
            assert!(address.is_string() && site.taps() == 1, "{seen:#}");
            if round == 0 {
                clock_is_right(&site).await;
            }
        }
        until("the end of what was held open", BOOT, async || {
            let request = json!({ "command": ["sh", "-c", "ps | grep -c '[s]leep 7777' || true"] });
            let (output, _) = run(&site, "box", request, b"").await;
            (output == b"0\n").then_some(())
        })
        .await;
        assert_eq!(tables_of_firmware(&site).await, firmware, "it is in no file but the RAM's");
        // The agent accepts new streams, and the program continues.
        let (output, end) = run(&site, "box", json!({ "command": ["cat", "/counts"] }), b"").await;
        assert_eq!(end, json!({ "exitCode": 0 }));
        assert!(String::from_utf8_lossy(&output).lines().count() > ROUNDS, "one step a round at least");
        let kept = counted(&site.console(&id)).len();
        counts_on(&site, &id, kept).await;
        never_went_back(&site, &id);
        is_whole_after_stop(&mut site).await;
    });
}

#[test]
fn a_crash_at_any_step_to_standby_and_back_keeps_the_memory_and_the_disk() {
    in_namespace(async || {
        let (mut site, id) = counting().await;
        let path = |verb: &str| format!("/instances/{id}/{verb}");
        let steps = |table: &[(&str, &str)]| -> Vec<String> {
            let edges = table.iter().flat_map(|step| EDGES.map(|edge| (*step, edge)));
            edges.map(|((kind, action), edge)| format!("{kind}/{action}/{edge}")).collect()
        };
        let (to, back) = (steps(&OF_STANDBY), steps(&OF_RESTORE));
        for round in 0..to.len().max(back.len()) {
            let failpoint = &to[round % to.len()];
            crash_at_verb(&mut site, failpoint, &path("standby")).await;
            site.until_state("box", "Standby").await;
            settles(&mut site, failpoint).await;
            assert_eq!(site.vmms(), [0; 0], "{failpoint}");
            site.start().await;
            let kept = counted(&site.console(&id)).len();
            let failpoint = &back[round % back.len()];
            crash_at_verb(&mut site, failpoint, &path("restore")).await;
            site.until_state("box", "Running").await;
            counts_on(&site, &id, kept).await;
            settles(&mut site, failpoint).await;
            site.start().await;
        }
        never_went_back(&site, &id);
        is_whole_after_stop(&mut site).await;
    });
}

#[test]
fn a_standby_whose_memory_was_lost_is_booted_and_kept_again_whatever_crashes() {
    in_namespace(async || {
        let (mut site, id) = counting().await;
        for edge in EDGES {
            verb(&site, "standby").await;
            site.stop().await;
            site.shell(&format!("rm -r {}/memory/{id}", site.data().display()));
            let failpoint = format!("{}/{}/{edge}", OF_LOSS.0, OF_LOSS.1);
            site.spawn(Some(&failpoint));
            site.crashed(&failpoint).await;
            site.start().await;
            settles(&mut site, &failpoint).await;
            site.start().await;
            site.until_state("box", "Standby").await;
            verb(&site, "restore").await;
        }
    });
}

#[test]
fn a_memory_that_is_older_than_its_disk_or_damaged_is_not_restored_and_the_reason_is_reported() {
    in_namespace(async || {
        let (mut site, id) = counting().await;
        let saved = format!("{}/memory/{id}/saved", site.data().display());
        let harms = [
            (format!("printf x >>{saved}/state"), "not what was saved"),
            (format!("sed -i 's/\"version\": \"/&9./' {saved}/manifest.json"), "saved by QEMU 9."),
            (format!("touch {}/disks/*.ext4", site.data().display()), "written to after"),
        ];
        for (harm, reason) in harms {
            verb(&site, "standby").await;
            site.shell(&harm);
            let path = format!("/instances/{id}/restore");
            // The answer comes when the restore is done or abandoned, so it is not waited for.
            let asked = site.attempt(Method::POST, &path, None);
            let explained = site.until("box", reason, |seen| {
                seen["state"] == "Standby" && seen["conditions"].to_string().contains(reason)
            });
            tokio::select! {
                _ = asked => panic!("{harm}: the restore is over"),
                _ = explained => {}
            }
            // A VMM that was started only for its version is gone again.
            until("no VMM", MOMENT, async || site.vmms().is_empty().then_some(())).await;
            // The state can be left: a stop discards the memory, and a start begins anew.
            verb(&site, "stop").await;
            let seen = verb(&site, "start").await;
            assert_eq!(
                (&seen["state"], &seen["has_snapshot"]),
                (&json!("Running"), &json!(false)),
                "{seen:#}"
            );
        }
        is_whole_after_stop(&mut site).await;
        // Deleting an instance in standby removes its memory.
        site.start().await;
        verb(&site, "start").await;
        verb(&site, "standby").await;
        site.delete("box").await;
        settles(&mut site, "deleted in standby").await;
        assert_eq!(site.instance_files(), Vec::<PathBuf>::new());
    });
}

/// Times from the request of a verb to the daemon's kill, in milliseconds: from before the first step to after the
/// last.
const MOMENTS: [u64; 8] = [5, 20, 40, 70, 110, 160, 230, 320];

#[test]
fn daemon_and_vmm_killed_together_at_any_moment_leave_the_old_memory_or_the_new_or_a_fresh_boot() {
    in_namespace(async || {
        let (mut site, id) = counting().await;
        let steps = OF_STANDBY.iter().take(2).map(|step| (*step, "standby"));
        let steps: Vec<_> = steps.chain(OF_RESTORE.iter().map(|step| (*step, "restore"))).collect();
        for ((kind, action), asked) in steps {
            let failpoint = format!("{kind}/{action}/before");
            if asked == "restore" {
                verb(&site, "standby").await;
            }
            site.stop().await;
            site.spawn(Some(&failpoint));
            site.answers().await;
            site.attempt(Method::POST, &format!("/instances/{id}/{asked}"), None).await;
            site.crashed(&failpoint).await;
            all_vmms_die(&site);
            site.start().await;
            settled_as(&site, if asked == "standby" { "Standby" } else { "Running" }).await;
            settles(&mut site, &failpoint).await;
            site.start().await;
            if asked == "standby" {
                verb(&site, "restore").await;
            }
        }
        for (round, moment) in MOMENTS.into_iter().enumerate() {
            let (asked, ends) = if round % 2 == 0 { ("standby", "Standby") } else { ("restore", "Running") };
            {
                let path = format!("/instances/{id}/{asked}");
                let answer = site.attempt(Method::POST, &path, None);
                let over = tokio::time::sleep(std::time::Duration::from_millis(moment));
                tokio::select! { _ = answer => {}, () = over => {} }
            }
            site.kill().await;
            if round >= MOMENTS.len() / 2 {
                all_vmms_die(&site);
            }
            site.start().await;
            // If the daemon was killed before the spec was stored, the verb is requested again.
            let is_stored = site.get("box").await["generation"].as_u64();
            assert!(is_stored.is_some());
            let _ = site.attempt(Method::POST, &format!("/instances/{id}/{asked}"), None).await;
            settled_as(&site, ends).await;
        }
        verb(&site, "stop").await;
        is_whole_after(&mut site).await;
    });
}

async fn settled_as(site: &Harness, state: &str) {
    site.until("box", state, |seen| seen["state"] == state && seen["has_snapshot"] == (state == "Standby"))
        .await;
}

/// Checks that a memory has exactly these files.
async fn holds(site: &Harness, directory: &str, files: &str) {
    let list = format!("cd $DATA/{directory}/saved 2>/dev/null && ls ram* | tr '\\n' ' ' || true");
    until(&format!("{directory} to hold {files}"), BOOT, async || {
        (site.shell(&list).trim() == files).then_some(())
    })
    .await;
}

async fn wrong_compressions_are_refused(site: &Harness) {
    for (wrong, code) in [
        (json!({ "compression": {} }), "invalid_snapshot_compression"),
        (json!({ "compression": { "enabled": true, "level": 20 } }), "invalid_snapshot_compression"),
        (json!({ "compression": { "enabled": true, "algorithm": "gzip" } }), "invalid_snapshot_compression"),
        (json!({ "compression_delay": "soon" }), "invalid_compression_delay"),
        (json!({ "compress": true }), "invalid_request"),
    ] {
        let answer = site.request(Method::POST, "/instances/box/standby", Some(wrong)).await;
        assert_eq!((answer.status, &answer.body["code"]), (StatusCode::BAD_REQUEST, &json!(code)));
    }
}

#[test]
fn a_kept_memory_is_compressed_when_due_and_goes_on_whatever_came_first() {
    in_namespace(async || {
        let (mut site, id) = counting().await;
        let memory = format!("memory/{id}");
        let standby = |compression: Value| {
            let site = &site;
            async move {
                let answer = site.request(Method::POST, "/instances/box/standby", Some(compression)).await;
                assert_eq!(
                    (answer.status, &answer.body["state"]),
                    (StatusCode::OK, &json!("Standby")),
                    "{answer:?}"
                );
            }
        };
        wrong_compressions_are_refused(&site).await;
        let zstd = json!({ "enabled": true, "algorithm": "zstd", "level": 3 });
        let lz4 = json!({ "enabled": true, "algorithm": "lz4" });
        for (compression, delay, files) in [
            (&zstd, "0s", "ram.packed"),
            (&lz4, "0s", "ram.packed"),
            (&zstd, "1h", "ram"),
            (&zstd, "1s", "ram.packed"),
        ] {
            standby(json!({ "compression": compression, "compression_delay": delay })).await;
            holds(&site, &memory, files).await;
            let kept = counted(&site.console(&id)).len();
            verb(&site, "restore").await;
            counts_on(&site, &id, kept).await;
        }
        // An immediate restore ends the compression and undoes it.
        for _ in 0..5 {
            standby(json!({ "compression": { "enabled": true, "level": 19 } })).await;
            let kept = counted(&site.console(&id)).len();
            verb(&site, "restore").await;
            counts_on(&site, &id, kept).await;
        }
        for edge in EDGES {
            let failpoint = format!("instance/Compress/{edge}");
            let body = json!({ "compression": zstd });
            crash_at_request(&mut site, &failpoint, "/instances/box/standby", body).await;
            holds(&site, &memory, "ram.packed").await;
            verb(&site, "restore").await;
            let failpoint = format!("snapshot/Compress/{edge}");
            let body = json!({ "kind": "Standby", "compression": lz4 });
            crash_at_request(&mut site, &failpoint, "/instances/box/snapshots", body).await;
            let snapshot = compressed(&site).await;
            let uid = snapshot["id"].as_str().expect("an id");
            holds(&site, &format!("snapshots/{uid}"), "ram.packed").await;
            let fork = site
                .request(Method::POST, &format!("/snapshots/{uid}/fork"), Some(json!({ "name": "fork" })))
                .await;
            assert_eq!(
                (fork.status, &fork.body["state"]),
                (StatusCode::CREATED, &json!("Running")),
                "{fork:?}"
            );
            let (name, _) = run(&site, "fork", json!({ "command": ["hostname"] }), b"").await;
            assert_eq!(name, b"fork\n");
            site.delete("fork").await;
            let path = format!("/snapshots/{uid}");
            assert_eq!(site.request(Method::DELETE, &path, None).await.status, StatusCode::NO_CONTENT);
        }
        never_went_back(&site, &id);
        is_whole_after_stop(&mut site).await;
    });
}

/// Returns the only snapshot when it is compressed.
async fn compressed(site: &Harness) -> Value {
    until("a compressed snapshot", BOOT, async || {
        let all = site.request(Method::GET, "/snapshots", None).await.body;
        let one = all.get(0)?.clone();
        let (compressed_size, plain) =
            (one["compressed_size_bytes"].as_u64()?, one["uncompressed_size_bytes"].as_u64()?);
        (one["compression_state"] == "compressed" && compressed_size < plain / 2).then_some(one)
    })
    .await
}

fn never_went_back(site: &Harness, id: &str) {
    let numbers = counted(&site.console(id));
    let expected: Vec<u64> = (1..=numbers.len() as u64).collect();
    assert_eq!(numbers, expected, "no number is lost, said twice or begun again");
}

/// Checks that nothing of the VM is left, and that its file system has no error.
async fn is_whole_after_stop(site: &mut Harness) {
    verb(site, "stop").await;
    is_whole_after(site).await;
}

async fn is_whole_after(site: &mut Harness) {
    settles(site, "stopped").await;
    let disks = format!("{}/disks", site.data().display());
    let checked = site.shell(&format!("for disk in {disks}/*.ext4; do e2fsck -y -E journal_only $disk || true; e2fsck -fn $disk 2>&1 && echo whole || echo code $?; done"));
    assert!(checked.contains("whole"), "{checked}");
}
