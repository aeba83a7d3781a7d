//! Builds the guest program, static, so that `stead` can embed it: one file is the installation.
//!
//! A nested cargo with a target directory of its own: it may not wait for the outer one's lock.

use std::env;
use std::path::PathBuf;
use std::process::Command;

fn main() {
    for path in ["src/guest", "schemas/src", "schemas/Cargo.toml", "Cargo.lock", "build.rs"] {
        println!("cargo::rerun-if-changed={path}");
    }
    let root = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets it"));
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets it"));
    let target = env::var("TARGET").expect("cargo sets it");
    let target_dir = out.join("guest");
    let status = Command::new(env::var_os("CARGO").expect("cargo sets it"))
        .current_dir(&root)
        .args(["build", "--quiet", "--locked", "--package", "stead-guest", "--profile", "guest"])
        .args(["--target", &target])
        .arg("--target-dir")
        .arg(&target_dir)
        // The outer build's flags (lints of clippy, coverage) are not the guest's.
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .env_remove("RUSTC_WORKSPACE_WRAPPER")
        .env_remove("RUSTC_WRAPPER")
        .env("RUSTFLAGS", "-C target-feature=+crt-static -C relocation-model=static")
        .status()
        .expect("cargo runs");
    assert!(status.success(), "the guest program does not build; see the messages above");
    let binary = target_dir.join(&target).join("guest/stead-guest");
    println!("cargo::rustc-env=STEAD_GUEST_BINARY={}", binary.display());
}
