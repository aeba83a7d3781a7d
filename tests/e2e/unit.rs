//! The rights that `deploy/stead.service` leaves the daemon: every daemon of these tests runs with them and no others.

use std::process::Command;

const UNIT: &str = include_str!("../../deploy/stead.service");

/// Returns the capabilities of the unit, as setpriv(1) takes them.
fn capabilities() -> String {
    let lines = UNIT.lines().filter_map(|line| line.strip_prefix("CapabilityBoundingSet="));
    let names = lines.flat_map(str::split_whitespace).map(|name| {
        let name = name.strip_prefix("CAP_").expect("the name of a capability");
        format!(",+{}", name.to_lowercase())
    });
    format!("-all{}", names.collect::<String>())
}

/// Returns the start of a command line that runs a program with the rights of the unit.
pub(crate) fn command(program: &str) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--no-new-privs", "--bounding-set", &capabilities(), "--"]).arg(program);
    command
}
