//! The official Python SDK, unchanged, against this server.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use crate::server::{IMAGE, Server};

const SDK: &str = "hypeman==0.28.0";

fn run(command: &mut Command) -> Output {
    command.output().unwrap_or_else(|error| panic!("{command:?}: {error}; run deploy/setup first"))
}

/// A virtual environment with the SDK, made once for this target directory.
fn python() -> PathBuf {
    let place = Path::new(env!("CARGO_TARGET_TMPDIR")).join("sdk-0.28.0");
    let python = place.join("bin/python");
    let has_sdk = || run(Command::new(&python).args(["-c", "import hypeman"])).status.success();
    if !python.exists() || !has_sdk() {
        let made = run(Command::new("python3").args(["-m", "venv"]).arg(&place));
        assert!(made.status.success(), "no virtual environment: {}", String::from_utf8_lossy(&made.stderr));
        let installed = run(Command::new(&python).args(["-m", "pip", "install", "--quiet", SDK]));
        assert!(installed.status.success(), "no SDK: {}", String::from_utf8_lossy(&installed.stderr));
    }
    python
}

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
