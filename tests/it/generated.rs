//! Requests generated from the official SDK's own types, and from the server's own OpenAPI document: none may be
//! answered by a server error, or by anything that those types or that document do not have.
//!
//! `tests/sdk/document.py` makes the document of the SDK's resources, and schemathesis generates the requests.

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::json;

use crate::python::{done, once, run, virtual_environment};
use crate::server::{IMAGE, Server};

/// Number of generated requests for each operation, beside those that cover its schema.
const EXAMPLES: &str = "8";
const SEED: &str = "20261126";

/// Environment variables with the number of examples and the seed of a longer manual run.
const BY_HAND: [&str; 2] = ["STEAD_TEST_EXAMPLES", "STEAD_TEST_SEED"];

/// Returns the interpreter of an environment with the packages and hashes of a list.
pub(crate) fn interpreter() -> PathBuf {
    let list = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/sdk/generated.txt");
    let made_of = std::fs::read_to_string(&list).expect("the list of packages");
    let list = list.to_str().expect("a path of UTF-8");
    let install = |root: &Path| virtual_environment(root, &["--require-hashes", "-r", list]);
    once("generated", &made_of, install).join("bin/python")
}

/// Creates the objects that the document names. Returns the id of a snapshot.
async fn furnish(server: &Server) -> String {
    for name in ["web", "off", "spare"] {
        server.create(json!({"name": name, "image": IMAGE, "size": "256MB"})).await;
        let path = format!("/instances/{name}/wait?state=Running&timeout=60s");
        assert_eq!(server.send("GET", &path, None).await.body["state"], "Running");
    }
    assert_eq!(server.send("POST", "/instances/off/stop", None).await.status, 200);
    for (number, (name, ingress)) in [("data", "front"), ("spare", "spare")].into_iter().enumerate() {
        let volume = json!({"name": name, "size_gb": 1});
        assert_eq!(server.send("POST", "/volumes", Some(volume)).await.status, 201);
        let host = json!({"hostname": "a.test", "port": 8081 + number});
        let rule = json!({"match": host, "target": {"instance": "web", "port": 80}});
        let ingress = json!({"name": ingress, "rules": [rule]});
        assert_eq!(server.send("POST", "/ingresses", Some(ingress)).await.status, 201);
    }
    let snapshot = json!({"name": "first", "kind": "Stopped"});
    let snapshot = server.send("POST", "/instances/off/snapshots", Some(snapshot)).await;
    assert_eq!(snapshot.status, 201, "{}", snapshot.body);
    snapshot.body["id"].as_str().expect("an id").to_owned()
}

/// Makes a document with a script of `tests/sdk`, which reads the served document.
fn document(python: &Path, script: &Path, directory: &Path, served: &str, snapshot: &str) -> PathBuf {
    let (served_at, document) = (directory.join("spec.json"), directory.join("document.json"));
    std::fs::write(&served_at, served).expect("written");
    let mut command = Command::new(python);
    command.arg(script).arg(served_at);
    command.env("STEAD_TEST_IMAGE", IMAGE).env("STEAD_TEST_SNAPSHOT", snapshot);
    std::fs::write(&document, done(&mut command)).expect("written");
    document
}

/// Sends requests that schemathesis generates from the document that `script` makes, by the rules of
/// `config`. Responses must be within the document.
async fn responses_are_within(script: &'static str, config: &'static str, more: &'static [&'static str]) {
    let server = Server::start().await;
    *server.host.log.lock().expect("not poisoned") = vec!["a line".to_owned(), "another".to_owned()];
    let snapshot = furnish(&server).await;
    let served = server.send_as("GET", "/spec.json", None, "").await.body.to_string();
    let (base, token) = (server.base.clone(), server.token.clone());
    let directory = tempfile::tempdir().expect("scratch");
    let root = directory.path().to_owned();
    let output = tokio::task::spawn_blocking(move || {
        let python = interpreter();
        let sdk = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/sdk");
        let document = document(&python, &sdk.join(script), &root, &served, &snapshot);
        let [by_hand, seed] = BY_HAND.map(|name| std::env::var(name).ok());
        let mut command = Command::new(python.with_file_name("schemathesis"));
        command.args(["--config-file"]).arg(sdk.join(config)).arg("run").arg(document);
        command.args(["--url", &base, "--header", &format!("Authorization: Bearer {token}")]);
        // A busy machine generates requests slowly.
        command.args(["--workers", "1", "--no-color", "--suppress-health-check", "all"]);
        command.args(more);
        command.args(by_hand.iter().flat_map(|examples| ["--max-examples", examples]));
        command.args(["--seed", seed.as_deref().unwrap_or(SEED), "--generation-database", "none"]);
        run(command.current_dir(&root).env("SCHEMATHESIS_HOOKS", "hooks").env("PYTHONPATH", sdk))
    });
    let output = output.await.expect("it ran");
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    if std::env::var_os(BY_HAND[0]).is_some() {
        eprintln!("{out}");
    }
    assert!(output.status.success(), "{out}\n{err}");
    assert!(out.contains(" generated,"), "it made no requests: {out}");
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_made_of_the_sdks_types_are_answered_within_them() {
    responses_are_within("document.py", "schemathesis.toml", &["--max-examples", EXAMPLES]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_made_of_the_servers_own_document_are_answered_within_it() {
    // Requests that cover each rule of each schema; requests at random, and sequences of them, are made of the
    // SDK's types.
    responses_are_within("own_document.py", "own.toml", &["--phases", "coverage"]).await;
}
