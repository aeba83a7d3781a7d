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

/// Returns the lines of a section of the unit.
fn section(name: &str) -> Vec<&'static str> {
    let header = format!("[{name}]");
    let after = UNIT.lines().skip_while(|line| *line != header).skip(1);
    after.take_while(|line| !line.starts_with('[')).collect()
}

#[test]
fn the_unit_is_started_again_whatever_ends_it_except_for_wrong_usage() {
    for (name, lines) in [
        // Without this systemd gives up after five failed starts.
        ("Unit", &["StartLimitIntervalSec=0", "RequiresMountsFor=/var/lib/stead"][..]),
        ("Service", &["Restart=always", "RestartPreventExitStatus=2", "RestartMaxDelaySec=60"]),
    ] {
        let there = section(name);
        assert!(lines.iter().all(|line| there.contains(line)), "[{name}] has {there:#?}");
    }
}

/// Returns the start of a command line that runs a program with the rights of the unit.
pub(crate) fn command(program: &str) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--no-new-privs", "--bounding-set", &capabilities(), "--"]).arg(program);
    command
}
