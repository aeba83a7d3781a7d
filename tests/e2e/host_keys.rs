//! ssh host keys of forks: made anew by the image's own ssh-keygen, each pair whole, nobody's twice.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};

use crate::judge::settles;
use crate::namespace::in_namespace;
use crate::site::{Site, image};
use crate::socket::shell;
use crate::stage::run;

const NAME: &str = "keys";
const KEYGEN: &str = "/usr/bin/ssh-keygen";
/// Of each private key: its name, mode and owner, and the public key that belongs to it, without its
/// comment; then of each public key its name and mode, and what is in it.
const LOOK: &str = "cd /etc/ssh; for key in ssh_host_*_key; do \
    echo $(stat -c '%n %a %u:%g' $key) $(ssh-keygen -y -f $key | cut -d ' ' -f 1,2); \
    echo $(stat -c '%n %a %u:%g' $key.pub) $(cut -d ' ' -f 1,2 $key.pub); done";
const KINDS: [&str; 3] = ["ssh_host_ecdsa_key", "ssh_host_ed25519_key", "ssh_host_rsa_key"];

/// An image with host keys and with what makes them: Debian's own, and the libraries it wants.
fn push(site: &Site) {
    let root = site.scratch("keys-root");
    for directory in ["etc/ssh", "run"] {
        fs::create_dir_all(root.join(directory)).expect("made");
    }
    run(KEYGEN, &["-q", "-A", "-f", &root.display().to_string()]);
    let wanted = run("ldd", &[KEYGEN]);
    let libraries = wanted.split_whitespace().filter(|word| word.starts_with('/'));
    for file in libraries.chain([KEYGEN]) {
        copy(Path::new(file), &root);
    }
    let tagged = format!("{}:{NAME}", site.layout());
    run("umoci", &["tag", "--image", &format!("{}:busybox", site.layout()), NAME]);
    for directory in fs::read_dir(&root).expect("read").flatten() {
        let to = format!("/{}", directory.file_name().to_string_lossy());
        run("umoci", &["insert", "--image", &tagged, &directory.path().display().to_string(), &to]);
    }
    site.push(&site.layout(), NAME);
}

fn copy(file: &Path, root: &Path) {
    let to: PathBuf = root.join(file.strip_prefix("/").expect("absolute"));
    fs::create_dir_all(to.parent().expect("a directory")).expect("made");
    fs::copy(file, to).expect("copied");
}

/// The public keys of a guest, by the names of their files.
async fn keys(site: &Site, instance: &str) -> BTreeMap<String, String> {
    let told = shell(site, instance, LOOK).await;
    let mut keys = BTreeMap::new();
    for line in told.lines() {
        let mut words = line.splitn(4, ' ');
        let mut word = || words.next().unwrap_or_default().to_owned();
        let (file, mode, owner, key) = (word(), word(), word(), word());
        let is_public = file.ends_with(".pub");
        assert_eq!((mode.as_str(), owner.as_str()), (if is_public { "644" } else { "600" }, "0:0"), "{told}");
        let pair = file.trim_end_matches(".pub").to_owned();
        let other = keys.insert(pair, key.clone());
        assert!(other.is_none_or(|other| other == key), "{file} belongs to another key: {told}");
        assert!(key.contains(" AAAA"), "{told}");
    }
    assert_eq!(keys.keys().collect::<Vec<_>>(), KINDS, "{told}");
    keys
}

async fn made(site: &Site, path: &str, body: Value) -> Value {
    let answer = site.request(Method::POST, path, Some(body)).await;
    assert_eq!(answer.status, StatusCode::CREATED, "{path}: {answer:?}\n{}", site.daemon_log());
    answer.body
}

/// One that never had its source's memory finds that the disk was another's.
async fn boots_with_its_own(site: &Site, seen: &[BTreeMap<String, String>]) {
    let cold = made(site, "/instances/box/fork", json!({ "name": "cold" })).await;
    assert_eq!(cold["state"], "Stopped", "{cold:#}");
    let mut cold_keys = BTreeMap::new();
    for round in 0..2 {
        let started = site.request(Method::POST, "/instances/cold/start", None).await;
        assert_eq!(started.status, StatusCode::OK, "{started:?}");
        site.until_state("cold", "Running").await;
        let keys = keys(site, "cold").await;
        for (kind, key) in &keys {
            assert!(
                seen.iter().all(|other| other[kind] != *key),
                "{kind} of a fork that booted is another's"
            );
        }
        // And has them from then on.
        assert!(round == 0 || keys == cold_keys);
        cold_keys = keys;
        let stopped = site.request(Method::POST, "/instances/cold/stop", None).await;
        assert_eq!(stopped.status, StatusCode::OK, "{stopped:?}");
    }
}

#[test]
fn every_fork_has_host_keys_of_its_own_and_whoever_stays_himself_keeps_his() {
    in_namespace(async || {
        let mut site = Site::running().await;
        push(&site);
        let body = json!({ "size": "128MB", "cmd": ["sleep", "100000"] });
        site.create("box", &image(NAME), body).await;
        site.until_state("box", "Running").await;
        let source_keys = keys(&site, "box").await;
        let snapshot = made(&site, "/instances/box/snapshots", json!({ "kind": "Standby" })).await;
        made(&site, "/instances/box/fork", json!({ "name": "one", "from_running": true })).await;
        made(&site, "/instances/one/fork", json!({ "name": "two", "from_running": true })).await;
        let mut seen = vec![source_keys.clone()];
        for fork in ["one", "two"] {
            site.until_state(fork, "Running").await;
            let keys = keys(&site, fork).await;
            for (kind, key) in &keys {
                assert!(seen.iter().all(|other| other[kind] != *key), "{fork}: {kind} is another's");
            }
            seen.push(keys);
        }
        assert_eq!(keys(&site, "box").await, source_keys, "the source's are its own");
        // Back in an earlier moment of its own, it is still whom its clients know.
        let stopped = site.request(Method::POST, "/instances/box/stop", None).await;
        assert_eq!(stopped.status, StatusCode::OK, "{stopped:?}");
        boots_with_its_own(&site, &seen).await;
        let path = format!("/instances/box/snapshots/{}/restore", snapshot["id"].as_str().expect("an id"));
        let restored = site.request(Method::POST, &path, None).await;
        assert_eq!((restored.status, &restored.body["state"]), (StatusCode::OK, &json!("Running")));
        assert_eq!(keys(&site, "box").await, source_keys, "an instance that goes back keeps its keys");
        settles(&mut site, "host keys").await;
    });
}
