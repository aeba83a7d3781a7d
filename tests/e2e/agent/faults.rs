//! Clients that vanish, daemons that are killed, streams by the thousand.

use futures::StreamExt;
use serde_json::json;

use super::waiting;
use crate::judge::settles;
use crate::namespace::in_namespace;
use crate::site::{MOMENT, Site};
use crate::socket::{Said, Socket, run, shell};
use crate::stage::until;

/// Counts processes of a name in the guest; the asking shell has another.
async fn running(site: &Site, name: &str) -> String {
    shell(site, "box", &format!("ps -o args | grep -c '^{name}$' || true")).await
}

#[test]
fn whoever_goes_away_takes_his_program_along_and_nothing_else() {
    in_namespace(async || {
        let mut site = Site::running().await;
        let id = waiting(&site, "box", json!({})).await;
        // A client that vanishes; its program does not listen to requests to end.
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
        // A copy that is cut leaves no part of a file.
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
        // The daemon is killed with an exec under way: the workload is not touched, the exec ends.
        let mut socket =
            Socket::exec(&site, "box", &json!({ "command": ["sh", "-c", "echo up; sleep 2222"] })).await;
        socket.until("up").await;
        let pid = site.get("box").await["vmm_pid"].clone();
        site.kill().await;
        assert_eq!(socket.next().await, Said::End);
        site.start().await;
        site.until_state("box", "Running").await;
        until("the end of the lost exec", MOMENT, async || {
            (running(&site, "sleep 2222").await == "0").then_some(())
        })
        .await;
        let seen = site.get("box").await;
        assert_eq!((&seen["vmm_pid"], seen["id"].as_str()), (&pid, Some(id.as_str())));
        // The VM ends under an exec: the client is told.
        let mut socket =
            Socket::exec(&site, "box", &json!({ "command": ["sh", "-c", "echo up; sleep 3333"] })).await;
        socket.until("up").await;
        site.delete("box").await;
        let (_, last) = socket.finish().await;
        assert!(last["exitCode"] == 137 || last["error"].is_string(), "{last}");
        settles(&mut site, "lost clients").await;
    });
}

/// Files and threads of PID 1, and processes.
async fn of_guest(site: &Site) -> Vec<u32> {
    let look = "ls /proc/1/fd | wc -l; ls /proc/1/task | wc -l; ls -d /proc/[0-9]* | wc -l";
    shell(site, "box", look).await.lines().map(|line| line.trim().parse().expect("a number")).collect()
}

#[test]
fn a_thousand_short_execs_leave_nothing() {
    in_namespace(async || {
        let mut site = Site::running().await;
        waiting(&site, "box", json!({})).await;
        let open = |pid: u32| std::fs::read_dir(format!("/proc/{pid}/fd")).expect("it lives").count();
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
        // One leak in fifty would show; what is left of the look before this one does not.
        let after = of_guest(&site).await;
        let is_as_before = after.iter().zip(&before).all(|(after, before)| *after < before + 20);
        assert!(is_as_before, "files, threads, processes: {before:?} before, {after:?} after");
        until("the daemon as it was", MOMENT, async || (open(site.daemon_pid()) <= files + 2).then_some(()))
            .await;
        site.delete("box").await;
        settles(&mut site, "execs").await;
    });
}
