//! The agent as a unit of a systemd: `stead-agent.service`.
//!
//! The agent is started before the init, so that it serves the host from the first moment. The unit takes it as its
//! main process (systemd.service(5), `PIDFile=`) and starts another when it ends. The host configures the new one
//! like a guest that boots: nothing that is known of the host is ever in a file.
//! Guarantees: nothing is written into the image's directories, `/run` is memory. A system that rejects the unit is
//! served all the same.

use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt, symlink};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use super::{AGAIN, AGENT};

/// Path of a copy of the agent's program. The original disappeared with the initial root.
const PROGRAM: &str = "/run/stead/stead-agent";
const PID: &str = "/run/stead/stead-agent.pid";
/// Directory of the unit: its priority is below the administrator's units and above those of the image's packages.
const UNITS: &str = "/run/systemd/system";
const UNIT: &str = "stead-agent.service";
/// Target that is among the first ones started.
const WANTED_BY: &str = "sysinit.target.wants";

/// Argument with which the unit calls the agent.
pub(super) const ADOPT: &str = "adopt";

/// Text of the unit. Administrators see it and do not stop it by mistake. It runs until all processes are ended,
/// because the agent reports to the host how the system went down.
const TEXT: &str = "[Unit]
Description=Stead guest agent
DefaultDependencies=no
IgnoreOnIsolate=yes
RefuseManualStop=yes
StartLimitIntervalSec=0

[Service]
Type=forking
PIDFile=/run/stead/stead-agent.pid
ExecStart=/run/stead/stead-agent adopt
Restart=always
RestartSec=100ms
StandardError=journal+console
";

/// Installs the unit before the system starts. Returns the path of the agent's program from now on.
pub(super) fn inject() -> io::Result<&'static str> {
    inject_below(Path::new("/"))?;
    Ok(PROGRAM)
}

fn inject_below(root: &Path) -> io::Result<()> {
    let below = |path: &str| root.join(path.trim_start_matches('/'));
    let program = below(PROGRAM);
    if let Some(parent) = program.parent() {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(parent)?;
    }
    fs::copy("/proc/self/exe", &program)?;
    fs::set_permissions(&program, Permissions::from_mode(0o700))?;
    let units = below(UNITS);
    fs::create_dir_all(units.join(WANTED_BY))?;
    fs::write(units.join(UNIT), TEXT)?;
    symlink(Path::new("..").join(UNIT), units.join(WANTED_BY).join(UNIT))
}

/// Records the unit's main process.
pub(super) fn record(pid: u32) -> io::Result<()> {
    fs::write(PID, format!("{pid}\n"))
}

/// Runs as the unit's start command: finds the agent, or starts another.
pub(super) fn adopt() -> io::Result<()> {
    if fs::read_to_string(PID).is_ok_and(|pid| is_agent(pid.trim())) {
        return Ok(());
    }
    let mut command = Command::new(PROGRAM);
    command.arg0(AGENT).arg(AGAIN).env_clear().stdin(Stdio::null()).stdout(Stdio::null());
    record(command.spawn()?.id())
}

/// Returns `true` if the process runs this very program. A pid may have been reused.
fn is_agent(pid: &str) -> bool {
    let program = |pid: &str| fs::metadata(format!("/proc/{pid}/exe")).map(|of| (of.dev(), of.ino()));
    matches!((program(pid), program("self")), (Ok(its), Ok(ours)) if its == ours)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_unit_is_found_by_a_systemd_and_starts_the_program_that_lies_there() {
        let root = std::env::temp_dir().join(format!("stead-unit-{}", std::process::id()));
        let _ = fs::remove_dir_all(&root);
        inject_below(&root).expect("injected");
        let below = |path: &str| root.join(path.trim_start_matches('/'));
        let wanted = below(UNITS).join(WANTED_BY).join(UNIT);
        assert_eq!(fs::read_to_string(wanted).expect("the link leads to it"), TEXT);
        for named in [PROGRAM, PID] {
            assert!(TEXT.contains(&format!("={named}")), "{named}");
        }
        let mode = |path: &str| fs::metadata(below(path)).expect("there").mode() & 0o777;
        assert_eq!((mode(PROGRAM), mode("/run/stead")), (0o700, 0o700));
        let itself = fs::read("/proc/self/exe").expect("read");
        assert!(fs::read(below(PROGRAM)).expect("read") == itself, "another program lies there");
        fs::remove_dir_all(&root).expect("removed");
    }

    #[test]
    fn only_a_process_of_this_program_is_the_agent() {
        assert!(is_agent(&std::process::id().to_string()));
        for other in ["1", "0", "", "../self/", "4194999"] {
            assert!(!is_agent(other), "{other}");
        }
    }
}
