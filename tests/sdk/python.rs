//! Directories of packages that the tests run, and the one of the official Python SDK.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

const SDK: &str = "hypeman==0.28.0";

pub(crate) fn run(command: &mut Command) -> Output {
    command.output().unwrap_or_else(|error| panic!("{command:?}: {error}; run deploy/setup first"))
}

/// Runs a command and returns its output.
///
/// # Panics
/// Panics if the command fails.
pub(crate) fn done(command: &mut Command) -> String {
    let output = run(command);
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{command:?}\n{out}\n{err}");
    out.into_owned()
}

/// Makes a directory once for this target directory and for the packages that `made_of` names. Tests that ask for
/// it meanwhile wait, in other processes too. `make` may find what an interrupted one left.
pub(crate) fn once(name: &str, made_of: &str, make: impl FnOnce(&Path)) -> PathBuf {
    let root = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    let lock = File::create(root.with_extension("lock")).expect("a lock file");
    lock.lock().expect("locked until it is closed");
    let marker = root.join("made-of");
    if std::fs::read_to_string(&marker).ok().as_deref() != Some(made_of) {
        make(&root);
        std::fs::write(marker, made_of).expect("written");
    }
    root
}

/// Makes a virtual environment and calls its pip with `arguments`.
pub(crate) fn virtual_environment(root: &Path, arguments: &[&str]) {
    done(Command::new("python3").args(["-m", "venv", "--clear"]).arg(root));
    done(Command::new(root.join("bin/python")).args(["-m", "pip", "install", "--quiet"]).args(arguments));
}

/// Returns the interpreter of a virtual environment with the SDK.
pub(crate) fn python() -> PathBuf {
    once("python-sdk", SDK, |root| virtual_environment(root, &[SDK])).join("bin/python")
}
