//! A system with the image's own init: the init is PID 1, and our agent keeps running beside it.
//!
//! ```text
//! PID 1 (ours): ... network -> names -> spawns the agent -> executes the image's init
//! agent:        takes the port over -> waits until the system is up -> Ready -> ... -> exit record
//! a systemd:    takes the agent for a unit's main process -> starts another when it ends
//! ```
//! Guarantees: the channel always has a reader while the system starts. The port and the state known of the host pass
//! to the agent by descriptors before the init begins, and no part of it is ever in a file. Nothing is written into
//! the image's directories.
//! The agent reports the end of the system when PID 1 ends all processes. A kernel that panics with its init reports
//! nothing, and the host then reports that.

mod agent;
mod defaults;
mod ending;
mod rule;
mod unit;
mod up;

use std::fs::File;
use std::io::{PipeWriter, Write};
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};

use serde::{Deserialize, Serialize};
use stead_schemas::guest::Config;

pub(crate) use self::agent::main as agent_main;
use self::rule::{Init, Kind};
use crate::control::Control;
use crate::handover::Handover;
use crate::{program, user};

/// Name of the agent's process. A process recognizes by it that it is the agent.
const AGENT: &str = "stead-agent";
/// Argument that tells the agent that it replaces one that ended.
const AGAIN: &str = "again";

const ITSELF: &str = "/proc/self/exe";

/// The first line that the agent reads.
#[derive(Debug, Serialize, Deserialize)]
struct Begin {
    handed: Handover,
    kind: Kind,
}

/// Finds the init that the instance's program is, if it is one.
pub(crate) fn find(config: &Config) -> Option<Init> {
    rule::find(config)
}

/// Starts the agent and executes the init. Continues only if that fails, and then only to power off.
pub(crate) fn give_way(control: &Control, config: &Config, init: &Init) -> ! {
    match start_agent(control, init) {
        Ok((mut agent, mut to_agent)) => {
            if init.kind == Kind::Systemd
                && let Err(error) = defaults::write(&program::egress_variables(config))
            {
                crate::log_line(&format!("units do not get the variables of egress: {error}"));
            }
            crate::log_line("the image's init begins");
            let (code, message) = execute(config, init);
            let exit = program::not_started(Some(code), &message);
            // The agent reports the exit to the host, and ends when the host has answered.
            if write_line(&mut to_agent, &exit).is_ok() {
                let _ = agent.wait();
            }
            crate::log_line(&message);
        }
        Err(error) => crate::log_line(&format!("the agent cannot be started: {error}")),
    }
    crate::power_off()
}

/// Starts the agent. It has the port as its standard output and reads everything else from its standard input, which
/// ends when the init was executed.
fn start_agent(control: &Control, init: &Init) -> std::io::Result<(Child, PipeWriter)> {
    let (from_us, mut to_agent) = std::io::pipe()?;
    let left = control.leave().ok_or_else(|| std::io::Error::other("the control port is not served"))?;
    let (port, handed): (File, Handover) = left;
    let program = match init.kind {
        Kind::Systemd => unit::inject().unwrap_or_else(|error| {
            crate::log_line(&format!("the agent is no unit of the system: {error}"));
            ITSELF
        }),
        Kind::Other => ITSELF,
    };
    let mut command = Command::new(program);
    command.arg0(AGENT).env_clear().stdin(Stdio::from(from_us)).stdout(Stdio::from(OwnedFd::from(port)));
    let agent = command.spawn()?;
    // The command holds a copy of the agent's pipe end until here.
    drop(command);
    if program != ITSELF {
        unit::record(agent.id())?;
    }
    write_line(&mut to_agent, &Begin { handed, kind: init.kind })?;
    Ok((agent, to_agent))
}

fn write_line<T: Serialize>(to: &mut impl Write, message: &T) -> std::io::Result<()> {
    let mut line = serde_json::to_vec(message)?;
    line.push(b'\n');
    to.write_all(&line)
}

/// Executes the init. Returns the shell's exit code and message if that failed.
fn execute(config: &Config, init: &Init) -> (i32, String) {
    let environment = match user::look_up("") {
        Ok(root) => program::environment(config, &root),
        Err(_) => Vec::new(),
    };
    let mut command = Command::new(&init.path);
    command.args(config.argv.iter().skip(1)).env_clear().envs(environment).current_dir("/");
    // The command gets the given name as its first argument: an init in a multi-call binary selects its function by
    // it.
    command.arg0(config.argv.first().map_or("/sbin/init", String::as_str));
    let error = command.exec();
    program::start_error(&init.path.display().to_string(), &error)
}
