//! Mediated egress of real guests: what leaves, with which credentials, and what becomes of it when programs end.

mod crashes;
mod modes;
mod outside;
mod rounds;

use std::fs;

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};

use self::outside::Outside;
use crate::fixtures::{run, until};
use crate::harness::{BOOT, Harness, MOMENT, image};
use crate::invariants::settles;
use crate::namespace::in_namespace;
use crate::socket::{run as exec, shell, tried};

/// The credential's values, one after the other. They are in no other text.
const VALUES: [&str; 2] = ["v4lue-number-one", "v4lue-number-two"];

/// Returns the configuration of a daemon whose mediated guests reach the outside.
fn variables(outside: &Outside) -> [(&'static str, String); 2] {
    let roots = format!("{{roots={:?}}}", outside.authority());
    [("STEAD_DNS", r#"["203.0.113.53"]"#.to_owned()), ("STEAD_EGRESS", roots)]
}

async fn start(site: &mut Harness, outside: &Outside) {
    let variables = variables(outside);
    site.spawn_with(&variables.each_ref().map(|(key, value)| (*key, &**value)));
    site.answers().await;
}

/// Waits until a request of the guest has its answer. The guest may be about to end, because the daemon has not yet
/// noticed the end of its VMM or of its TAP.
async fn works(site: &Harness) {
    let line = format!("{ASK} https://api.example.com/");
    until("a request", BOOT, async || tried(site, "box", &line).await).await;
}

fn mediated(more: &Value) -> Value {
    let mut body = json!({
        "env": { "REAL": VALUES[0] },
        "cmd": ["sh", "-c", "while true; do sleep 1; done"],
        "network": { "egress": { "enabled": true } },
        "credentials": { "KEY": {
            "source": { "env": "REAL" },
            "inject": [{
                "hosts": ["api.example.com"],
                "as": { "header": "Authorization", "format": "Bearer ${value}" },
            }],
        } },
    });
    let fields = body.as_object_mut().expect("an object");
    fields.extend(more.as_object().expect("an object").clone());
    body
}

/// Runs a line in the guest; returns its exit code and its output.
async fn attempt(site: &Harness, line: &str) -> (Value, String) {
    let (output, end) = exec(site, "box", json!({ "command": ["sh", "-c", line] }), b"").await;
    (end["exitCode"].clone(), String::from_utf8_lossy(&output).into_owned())
}

/// Asks a host with its placeholder, as a program does that knows nothing of the proxy.
const ASK: &str = "curl -sSf --max-time 30 --noproxy '*' -H \"Authorization: Bearer $KEY\"";

async fn asks(site: &Harness, url: &str) -> (Value, String) {
    attempt(site, &format!("{ASK} {url} 2>&1")).await
}

/// Starts a guest with the image of clients.
async fn box_with(site: &Harness, more: &Value) -> Value {
    run(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/e2e/egress/make-clients"), &[&site.layout()]);
    site.push(&site.layout(), "clients");
    site.create("box", &image("clients"), mediated(more)).await;
    site.until_state("box", "Running").await
}

/// Returns the pids of processes that carry egress.
fn carriers() -> Vec<u32> {
    let entries = fs::read_dir("/proc").expect("mounted").flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    pids.filter(|pid| {
        let line = fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        line.contains("\0egress\0serve\0")
    })
    .collect()
}

/// Tries what is not carried: other ports, protocols and addresses, and the host itself.
async fn nothing_else_leaves(site: &Harness, outside: &Outside) {
    for line in [
        "nc -w 5 203.0.113.10 22 </dev/null",
        "nc -w 5 203.0.113.10 8443 </dev/null",
        "ping -c 1 -W 2 203.0.113.10",
        "nc -w 5 10.185.0.1 8080 </dev/null",
        "nc -w 5 203.0.113.1 8080 </dev/null",
        "curl -sSf http://inward.example.com/",
        "curl -sSf http://169.254.169.254/",
        "curl -sSf --noproxy '*' http://10.185.0.1:18443/",
    ] {
        let answer = attempt(site, line).await;
        assert_ne!(answer.0, 0, "{line}: {answer:?}");
    }
    for port in [443, 9999] {
        shell(site, "box", &modes::send(port)).await;
    }
    assert!(!outside.seen().contains("stray"), "{}", outside.seen());
}

/// Searches all files of a directory for a text.
fn find(directory: &std::path::Path, text: &str) -> String {
    let line = format!("grep -raFl {text} {} || true", directory.display());
    run("sh", &["-c", &line])
}

#[test]
fn a_guest_has_a_placeholder_and_its_requests_have_the_value_towards_one_host_only() {
    in_namespace(async || {
        let mut site = Harness::new().await;
        let outside = Outside::new(&site).await;
        start(&mut site, &outside).await;
        let seen = box_with(&site, &json!({})).await;
        assert_eq!(seen["env"]["REAL"], "mock-KEY", "{seen:#}");
        assert_eq!(seen["network"]["egress"]["enforcement"]["mode"], "all", "{seen:#}");

        let env = shell(&site, "box", "env").await;
        assert!(env.contains("KEY=mock-KEY") && !env.contains("REAL="), "{env}");
        assert!(env.contains("HTTPS_PROXY=http://10.185.0.1:18080"), "{env}");

        // The value towards its host, by a captured connection.
        let answer = asks(&site, "https://api.example.com/a").await;
        assert_eq!(answer.0, 0, "{answer:?}\n{}\n{}", outside.seen(), carrier_log(&site));
        assert!(
            outside.seen().contains(&format!("api.example.com Bearer {}", VALUES[0])),
            "{}",
            outside.seen()
        );
        // A placeholder is not forwarded to another host, and a plain request to it is.
        let answer = asks(&site, "http://other.example.com/b").await;
        assert_ne!(answer.0, 0, "{answer:?}");
        let answer = attempt(&site, "curl -sSf http://other.example.com/c 2>&1").await;
        assert_eq!(answer.0, 0, "{answer:?}\n{}", carrier_log(&site));
        assert!(!outside.seen().contains("other.example.com Bearer"), "{}", outside.seen());

        nothing_else_leaves(&site, &outside).await;

        // Another value is in force without a restart.
        let patch = json!({ "env": { "REAL": VALUES[1] } });
        let answer = site.request(Method::PATCH, "/instances/box", Some(patch)).await;
        assert_eq!(answer.status, StatusCode::OK, "{answer:?}");
        until("the other value", MOMENT, async || {
            asks(&site, "https://api.example.com/d").await;
            outside.seen().contains(VALUES[1]).then_some(())
        })
        .await;
        let log = fs::read_to_string(site.log_file()).expect("there");
        for value in VALUES {
            assert!(!log.contains(value), "{value} is in the daemon's log");
            assert_eq!(find(&site.data(), value), "");
            assert_eq!(find(&site.run_dir(), value), "");
        }
        let log = fs::read_dir(site.data().join("egress")).expect("there").count();
        assert_eq!(log, 2);

        site.delete("box").await;
        until("the process to end", MOMENT, async || carriers().is_empty().then_some(())).await;
        assert_eq!(fs::read_dir(site.data().join("egress")).expect("there").count(), 0);
        settles(&mut site, "mediated egress").await;
    });
}

fn carrier_log(site: &Harness) -> String {
    fs::read_to_string(site.data().join("egress.log")).unwrap_or_default()
}

#[test]
fn a_hostile_guest_reaches_nothing_but_what_is_carried() {
    in_namespace(async || {
        let mut site = Harness::new().await;
        let outside = Outside::new(&site).await;
        start(&mut site, &outside).await;
        let seen = box_with(&site, &json!({})).await;
        let address = seen["network"]["ip"].as_str().expect("an address");
        let put = format!("cat >/attack.py <<'END'\n{}\nEND", include_str!("attack.py"));
        shell(&site, "box", &put).await;
        let line = format!("python3 /attack.py {address} 10.185.0.1 203.0.113.10 2>&1");
        let (code, output) = attempt(&site, &line).await;
        assert_eq!((code, output.as_str()), (json!(0), "done\n"), "{}", carrier_log(&site));
        // The guest is as well as before, and so is the host.
        works(&site).await;
        assert!(!outside.seen().contains("stray"), "{}", outside.seen());
        let report = site.cli("egress report box -o json");
        let report: Value = serde_json::from_str(&report).expect("JSON");
        assert_eq!(report["hosts"]["api.example.com:443"]["protocols"], json!(["https"]), "{report:#}");
        let log = site.cli("egress log box --tail 100000");
        assert!(log.contains("allowed api.example.com:443 GET / 200 with KEY"), "{log}");
        assert!(log.contains("refused 169.254.169.254:80"), "{log}");
        // A guest that is not mediated is seen outside, so the others would be too.
        let body = json!({ "cmd": ["ping", "-c", "3", "203.0.113.10"] });
        site.create("free", &image("clients"), body).await;
        until("a packet outside", BOOT, async || outside.seen().contains("stray").then_some(())).await;
        site.delete("free").await;
        site.delete("box").await;
        settles(&mut site, "attacks").await;
    });
}

#[test]
fn the_process_and_the_daemon_end_and_nothing_opens_and_everything_comes_back() {
    in_namespace(async || {
        let mut site = Harness::new().await;
        let outside = Outside::new(&site).await;
        start(&mut site, &outside).await;
        box_with(&site, &json!({})).await;
        works(&site).await;
        let [first] = carriers()[..] else { panic!("one process: {:?}", carriers()) };
        run("kill", &["-9", &first.to_string()]);
        works(&site).await;
        let [second] = carriers()[..] else { panic!("one process: {:?}", carriers()) };
        assert_ne!(first, second);

        // The process outlives the daemon, which finds it again.
        site.kill().await;
        start(&mut site, &outside).await;
        works(&site).await;
        assert_eq!(carriers(), [second]);

        // One that hangs is replaced.
        run("kill", &["-STOP", &second.to_string()]);
        until("another process", BOOT, async || {
            (!carriers().is_empty() && !carriers().contains(&second)).then_some(())
        })
        .await;
        works(&site).await;

        // A table that is flushed closes, and comes back.
        site.shell("nft flush ruleset");
        works(&site).await;
        // So does a bridge.
        site.shell("ip link del $BRIDGE");
        works(&site).await;
        // Standby removes the policy, and a restore puts it in force before the guest runs.
        let answer = site.request(Method::POST, "/instances/box/standby", None).await;
        assert_eq!(answer.status, StatusCode::OK, "{answer:?}");
        site.until_state("box", "Standby").await;
        let answer = site.request(Method::POST, "/instances/box/restore", None).await;
        assert_eq!(answer.status, StatusCode::OK, "{answer:?}");
        site.until_state("box", "Running").await;
        works(&site).await;
        assert!(!outside.seen().contains("stray"), "{}", outside.seen());
        site.delete("box").await;
        until("the process to end", MOMENT, async || carriers().is_empty().then_some(())).await;
        settles(&mut site, "deaths of the process").await;
    });
}
