//! An honest client beside a crowd of hostile clients, and a daemon that pulls from a hostile registry.

use std::sync::Arc;
use std::time::{Duration, Instant};

use reqwest::{Method, StatusCode};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use serde_json::json;

use crate::fixtures::until;
use crate::harness::{Harness, LISTEN, image};
use crate::hostile_crowd::{Crowd, Target};
use crate::namespace::in_namespace_alone;
use crate::socket::run;

/// Numbers of connections and answers from which the crowd is at work.
const AT_WORK: (u64, u64) = (3_000, 100);
/// Number of volumes that the honest client creates while the crowd is at work.
const VOLUMES: usize = 30;
/// Time limit for the crowd to start on a busy machine.
const ARRIVAL: Duration = Duration::from_secs(300);

/// The most memory that the daemon may take whatever its clients do, in KiB. Debug builds take more than releases.
const MEMORY_MAX_KIB: u64 = 256 << 10;

/// Returns the peak memory of the daemon, in KiB.
fn peak(site: &Harness) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", site.daemon_pid())).expect("it lives");
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("reported");
    line.split_whitespace().next().and_then(|word| word.parse().ok()).expect("a number")
}

/// Returns an archive of a file with 512 MiB of zeros.
fn bomb(site: &Harness) -> Vec<u8> {
    let line = "cd $DATA && truncate -s 512M zeros && tar -cf - zeros | gzip -1 > bomb; rm zeros";
    site.shell(line);
    let path = site.data().join("bomb");
    let bytes = std::fs::read(&path).expect("made");
    std::fs::remove_file(path).expect("removed");
    bytes
}

/// Runs the work of an honest client, all of which must succeed: its own volumes and queries. It has its own thread,
/// so that the crowd does not take its time. Returns the times within which 99 of 100 writes and reads were answered.
async fn works(site: &Harness, prefix: &'static str) -> [Duration; 2] {
    let token = site.token().to_owned();
    let work = async move {
        let http = reqwest::Client::new();
        let (mut writes, mut reads) = (Vec::new(), Vec::new());
        for number in 0..VOLUMES {
            let start = Instant::now();
            let body = json!({ "name": format!("{prefix}{number}"), "size_gb": 1 });
            let made = http.post(format!("http://{LISTEN}/volumes")).bearer_auth(&token).json(&body).send();
            let made = made.await.expect("an answer");
            assert_eq!(made.status(), StatusCode::CREATED, "{:?}", made.text().await);
            writes.push(start.elapsed());
            for path in ["/health", "/instances/own", "/volumes", "/instances/own/wait?state=Running"] {
                let start = Instant::now();
                let answer = http.get(format!("http://{LISTEN}{path}")).bearer_auth(&token).send();
                let answer = answer.await.expect("an answer");
                assert_eq!(answer.status(), StatusCode::OK, "{path}: {:?}", answer.text().await);
                reads.push(start.elapsed());
            }
        }
        [writes, reads].map(|mut times| {
            times.sort();
            times[times.len() * 99 / 100]
        })
    };
    let own = || tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    tokio::task::spawn_blocking(move || own().block_on(work)).await.expect("it is served")
}

/// Raises the limit on descriptors to the number of the crowd's connections.
fn raise_descriptors() {
    let limit = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit }).expect("raised");
}

#[test]
fn many_hostile_clients_and_a_hostile_registry_cost_an_honest_client_nothing() {
    in_namespace_alone(async || {
        raise_descriptors();
        let mut site = Harness::running().await;
        // The crowd has its own VM, because the daemon does not divide the processor of a guest.
        for name in ["web", "own"] {
            site.create(name, &image("busybox"), json!({ "cmd": ["sleep", "100000"] })).await;
            site.until_state(name, "Running").await;
        }
        let data = site.data().display().to_string();
        let token = site.cli(&format!("token create --data-dir {data} --subject hostile --scopes '*'"));
        let target = Target {
            address: LISTEN.parse().expect("an address"),
            token: token.trim().to_owned(),
            instance: "web".to_owned(),
            bomb: Arc::new(bomb(&site)),
        };
        let before = peak(&site);
        let quiet = works(&site, "q").await;
        let crowd = Crowd::start(&target).await;
        until("the crowd at work", ARRIVAL, async || {
            let (connections, answers) = crowd.counts();
            (connections > AT_WORK.0 && answers > AT_WORK.1).then_some(())
        })
        .await;
        let crowded = works(&site, "v").await;
        // Programs have the usual low soft limit on descriptors, however many the agent needs for all sessions.
        let asks = json!({ "command": ["sh", "-c", "ulimit -Sn"] });
        let (reported, end) = run(&site, "own", asks, b"").await;
        assert_eq!((String::from_utf8_lossy(&reported).as_ref(), end), ("1024\n", json!({ "exitCode": 0 })));
        let (peak, counts) = (peak(&site), crowd.counts());
        eprintln!("crowd: {counts:?} connections and answers; {before} KiB before, {peak} KiB at most");
        eprintln!("slowest write and read, 99 of 100: {quiet:?} before, {crowded:?} beside the crowd");
        assert!(peak < MEMORY_MAX_KIB, "the daemon took {peak} KiB");
        // A power cut interrupts the work, and a start follows.
        site.kill().await;
        site.start().await;
        let kept = site.request(Method::GET, "/volumes", None).await;
        for number in 0..VOLUMES {
            let name = json!(format!("v{number}"));
            let is_kept = kept.body.as_array().is_some_and(|all| all.iter().any(|one| one["name"] == name));
            assert!(is_kept, "{name} is lost: {kept:?}");
        }
        drop(crowd);
        for name in ["web", "own"] {
            site.until_state(name, "Running").await;
        }
    });
}
