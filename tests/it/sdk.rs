//! The official SDKs, unchanged, against this server.

use std::path::Path;
use std::process::Command;

use crate::node::{Node, node};
use crate::python::{python, run};
use crate::server::{IMAGE, Server};

/// Runs a script of `tests/sdk` with the program that `command` names.
async fn works(script: &str, command: impl FnOnce() -> Command + Send + 'static) {
    let server = Server::start().await;
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/sdk").join(script);
    let (base, token) = (server.base.clone(), server.token.clone());
    let output = tokio::task::spawn_blocking(move || {
        let mut command = command();
        command
            .arg(script)
            .env("STEAD_BASE_URL", base)
            .env("STEAD_API_KEY", token)
            .env("STEAD_TEST_IMAGE", IMAGE);
        run(&mut command)
    });
    let output = output.await.expect("it ran");
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{out}\n{err}");
    assert!(out.contains("sdk: everything passed"), "{out}");
}

/// Makes the command of a Node that finds the TypeScript SDK.
pub(crate) fn node_command() -> Command {
    let Node { directory, node } = node();
    let mut command = Command::new(node);
    command.current_dir(directory);
    command
}

#[tokio::test(flavor = "multi_thread")]
async fn the_official_python_sdk_works_unchanged() {
    works("test_sdk.py", || Command::new(python())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_official_typescript_sdk_works_unchanged() {
    works("test_sdk.mjs", node_command).await;
}
