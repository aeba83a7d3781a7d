//! Clients that vanish, daemons that are killed, thousands of streams.

use std::fs;
use std::path::Path;
use std::process::{Child, Stdio};

use futures::StreamExt;
use serde_json::json;

use super::cli::{command, output_of};
use super::waiting;
use crate::fixtures::until;
use crate::harness::{Harness, MOMENT};
use crate::invariants::settles;
use crate::namespace::in_namespace;
use crate::socket::{Received, Socket, run, shell};

/// Counts processes of a name in the guest. The counting shell has another name.
async fn running(site: &Harness, name: &str) -> String {
    shell(site, "box", &format!("ps -o args | grep -c '^{name}$' || true")).await
}

#[test]
fn whoever_goes_away_takes_his_program_along_and_nothing_else() {
    in_namespace(async || {
        let mut site = Harness::running().await;
        let id = waiting(&site, "box", json!({})).await;
        // The client vanishes, and its program ignores requests to end.
        let stubborn =
            json!({ "command": ["sh", "-c", "trap '' TERM HUP; echo up; sleep 1111; sleep 1112"] });
        let mut socket = Socket::exec(&site, "box", &stubborn).await;
        socket.until("up").await;
        assert_eq!(running(&site, "sleep 1111").await, "1");
        drop(socket);
        until("the end of the program", MOMENT, async || {
            let left = [running(&site, "sleep 1111").await, running(&site, "sleep 1112").await];
            (left == ["0", "0"]).then_some(())
        })
        .await;
        // An interrupted copy leaves no part of a file.
        let mut socket =
            Socket::cp(&site, "box", &json!({ "direction": "to", "guest_path": "/tmp/half" })).await;
        socket.bytes(&[1; 1000]).await;
        until("the copy's begin", MOMENT, async || {
            let names = shell(&site, "box", "ls -A /tmp").await;
            names.contains("stead-cp").then_some(())
        })
        .await;
        drop(socket);
        until("the copy's end", MOMENT, async || {
            let names = shell(&site, "box", "ls -A /tmp").await;
            names.is_empty().then_some(())
        })
        .await;
        // The daemon is killed during an exec: the workload is not affected, and the exec ends.
        let mut socket =
            Socket::exec(&site, "box", &json!({ "command": ["sh", "-c", "echo up; sleep 2222"] })).await;
        socket.until("up").await;
        let pid = site.get("box").await["vmm_pid"].clone();
        site.kill().await;
        assert_eq!(socket.next().await, Received::End);
        site.start().await;
        site.until_state("box", "Running").await;
        until("the end of the lost exec", MOMENT, async || {
            (running(&site, "sleep 2222").await == "0").then_some(())
        })
        .await;
        let seen = site.get("box").await;
        assert_eq!((&seen["vmm_pid"], seen["id"].as_str()), (&pid, Some(id.as_str())));
        // The VM ends during an exec, and the client gets an error.
        let mut socket =
            Socket::exec(&site, "box", &json!({ "command": ["sh", "-c", "echo up; sleep 3333"] })).await;
        socket.until("up").await;
        site.delete("box").await;
        let (_, last) = socket.finish().await;
        assert!(last["exitCode"] == 137 || last["error"].is_string(), "{last}");
        settles(&mut site, "lost clients").await;
    });
}

/// Returns the numbers of files and threads of PID 1, and of processes. Names are counted and not inspected, because
/// their objects may disappear meanwhile.
async fn of_guest(site: &Harness) -> Vec<u32> {
    let script = "for of in '1/fd/*' '1/task/*' '[0-9]*'; do set -- /proc/$of; echo $#; done";
    shell(site, "box", script).await.lines().map(|line| line.trim().parse().expect("a number")).collect()
}

#[test]
fn a_thousand_short_execs_leave_nothing() {
    in_namespace(async || {
        let mut site = Harness::running().await;
        waiting(&site, "box", json!({})).await;
        let open = |pid: u32| fs::read_dir(format!("/proc/{pid}/fd")).expect("it lives").count();
        let before = of_guest(&site).await;
        let files = open(site.daemon_pid());
        let execs = futures::stream::iter(0..1000).map(|number| {
            let site = &site;
            async move {
                let code = number % 100;
                let (_, end) =
                    run(site, "box", json!({ "command": ["sh", "-c", format!("exit {code}")] }), b"").await;
                assert_eq!(end, json!({ "exitCode": code }));
            }
        });
        execs.buffer_unordered(8).collect::<Vec<()>>().await;
        // A leak in one of fifty rounds would show. Leftovers of the previous count do not.
        let after = of_guest(&site).await;
        let is_as_before = after.iter().zip(&before).all(|(after, before)| *after < before + 20);
        assert!(is_as_before, "files, threads, processes: {before:?} before, {after:?} after");
        until("the daemon as it was", MOMENT, async || (open(site.daemon_pid()) <= files + 2).then_some(()))
            .await;
        site.delete("box").await;
        settles(&mut site, "execs").await;
    });
}

const COPY_BYTES: usize = 64 << 20;
/// Number of bytes that have arrived when the daemon is killed.
const ARRIVED: u64 = 4 << 20;

/// Starts a copy by the command line.
fn copying(site: &Harness, from: &str, to: &str) -> Child {
    let mut command = command(site, &["cp", from, to]);
    command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("it runs")
}

/// Checks that an interrupted copy reports an error to the client.
fn is_reported(child: Child) {
    let (code, _, error) = output_of(&child.wait_with_output().expect("ended"));
    assert!(code > 0 && !error.is_empty(), "{code}: {error}");
}

fn files(dir: &Path) -> Vec<(String, u64)> {
    let entries = fs::read_dir(dir).expect("there").flatten();
    let observed = entries.map(|entry| {
        (entry.file_name().to_string_lossy().into_owned(), entry.metadata().map_or(0, |meta| meta.len()))
    });
    observed.collect()
}

#[test]
fn a_daemon_killed_during_a_copy_leaves_nothing_that_could_be_taken_for_whole() {
    in_namespace(async || {
        let mut site = Harness::running().await;
        let count = "i=0; while true; do i=$((i+1)); echo $i >/count; sleep 1; done";
        let more = json!({ "cmd": ["sh", "-c", count], "size": "256MB", "overlay_size": "256MB" });
        waiting(&site, "box", more).await;
        let pid = site.get("box").await["vmm_pid"].clone();
        let contents: Vec<u8> = (0..COPY_BYTES / 8).flat_map(|at| (at ^ 0x5eed).to_le_bytes()).collect();
        let scratch = site.scratch("copies");
        let large = scratch.join("large").display().to_string();
        fs::write(&large, &contents).expect("written");
        shell(&site, "box", "mkdir /data; echo old >/data/file").await;
        // The copy goes into the guest.
        let copy = copying(&site, &large, "box:/data/file");
        until("the copy under way", MOMENT, async || {
            let size = shell(&site, "box", "stat -c %s /data/.stead-cp-* 2>/dev/null || echo 0").await;
            (size.parse::<u64>().expect("a number") > ARRIVED).then_some(())
        })
        .await;
        site.kill().await;
        is_reported(copy);
        site.start().await;
        site.until_state("box", "Running").await;
        until("the half copy's end", MOMENT, async || {
            (shell(&site, "box", "ls -A /data; cat /data/file").await == "file\nold").then_some(())
        })
        .await;
        // The same copy is repeated and completes.
        is_whole(copying(&site, &large, "box:/data/file"));
        // The copy goes out of the guest.
        let back = site.scratch("back");
        let to = back.join("file").display().to_string();
        let before: u64 = shell(&site, "box", "cat /count").await.parse().expect("a number");
        let copy = copying(&site, "box:/data/file", &to);
        until("the copy under way", MOMENT, async || {
            files(&back).iter().any(|(_, size)| *size > ARRIVED).then_some(())
        })
        .await;
        site.kill().await;
        is_reported(copy);
        assert_eq!(files(&back), [], "half a file is left");
        site.start().await;
        site.until_state("box", "Running").await;
        is_whole(copying(&site, "box:/data/file", &to));
        assert!(fs::read(&to).expect("copied") == contents, "what came back is another file");
        // The workload was not affected.
        assert_eq!(site.get("box").await["vmm_pid"], pid);
        until("the program's going on", MOMENT, async || {
            let now: u64 = shell(&site, "box", "cat /count").await.parse().ok()?;
            (now > before).then_some(())
        })
        .await;
        site.delete("box").await;
        settles(&mut site, "cut copies").await;
    });
}

fn is_whole(copy: Child) {
    let done = output_of(&copy.wait_with_output().expect("ended"));
    assert_eq!(done, (0, String::new(), String::new()));
}
