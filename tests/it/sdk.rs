//! The official Python SDK, unchanged, against this server.

use std::path::Path;
use std::process::Command;

use crate::python::{python, run};
use crate::server::{IMAGE, Server};

#[tokio::test(flavor = "multi_thread")]
async fn the_official_python_sdk_works_unchanged() {
    let server = Server::start().await;
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/sdk/test_sdk.py");
    let (base, token) = (server.base.clone(), server.token.clone());
    let output = tokio::task::spawn_blocking(move || {
        let mut command = Command::new(python());
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
