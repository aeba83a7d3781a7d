//! The place of the official Python SDK, for the suites that run it.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

const SDK: &str = "hypeman==0.28.0";

pub(crate) fn run(command: &mut Command) -> Output {
    command.output().unwrap_or_else(|error| panic!("{command:?}: {error}; run deploy/setup first"))
}

/// A virtual environment with the SDK, made once for this target directory.
pub(crate) fn python() -> PathBuf {
    let directory = Path::new(env!("CARGO_TARGET_TMPDIR")).join("sdk-0.28.0");
    let python = directory.join("bin/python");
    let has_sdk = || run(Command::new(&python).args(["-c", "import hypeman"])).status.success();
    if !python.exists() || !has_sdk() {
        let made = run(Command::new("python3").args(["-m", "venv"]).arg(&directory));
        assert!(made.status.success(), "no virtual environment: {}", String::from_utf8_lossy(&made.stderr));
        let installed = run(Command::new(&python).args(["-m", "pip", "install", "--quiet", SDK]));
        assert!(installed.status.success(), "no SDK: {}", String::from_utf8_lossy(&installed.stderr));
    }
    python
}
