//! The demo of the README, as `make demo` runs it.

use std::path::Path;
use std::process::Command;

use crate::fixtures::kernel_dir;
use crate::namespace::in_namespace;

#[test]
fn the_demo_of_the_readme_ends_well_and_leaves_nothing() {
    in_namespace(async || {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy/demo");
        let mut demo = Command::new(script);
        let output = demo.arg(env!("CARGO_BIN_EXE_stead")).arg(kernel_dir()).output().expect("it begins");
        let words = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        assert!(output.status.success(), "{}\n{}", words(&output.stdout), words(&output.stderr));
    });
}
