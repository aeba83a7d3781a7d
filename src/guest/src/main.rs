//! PID 1 inside a Stead VM: brings up the image's root, runs the program, reports how it ended.
//!
//! ```text
//! modules -> control port -> root (overlay) -> [Configure] -> network -> trust -> program -> Exit -> [Ack] -> off
//! ```
//! An image's own init replaces this process as PID 1: see `system`.
//! Guarantees: every step that fails is reported with its phase and reason as the exit record; the
//! record is repeated until the host has acknowledged it; the program is executed directly, without
//! a shell; orphans are reaped.
//! Never: takes console input as meaningful, or leaves the VM up without a report.

#![cfg(target_os = "linux")]

mod agent;
mod children;
mod clock;
mod control;
mod devices;
mod egress_env;
mod grow;
mod handover;
mod host_keys;
mod identity;
mod inside;
mod kernel_log;
mod memory;
mod modules;
mod network;
mod outbox;
mod pages;
mod program;
#[cfg(test)]
mod renaming;
mod root;
mod spare;
mod system;
mod take_identity;
mod trust;
mod unsent;
mod user;
mod volumes;

use std::fmt::Display;
use std::io;
use std::time::Duration;

use rustix::system::{RebootCommand, reboot};
use stead_schemas::guest::{Config, Phase};
use stead_schemas::instance::Exit;

use crate::children::Children;
pub(crate) use crate::kernel_log::log_line;

/// A boot failure with the phase in which it happened.
#[derive(Debug)]
pub(crate) struct BootError {
    pub(crate) phase: &'static str,
    pub(crate) reason: String,
}

impl BootError {
    pub(crate) fn new(phase: &'static str, reason: impl Display) -> Self {
        Self { phase, reason: reason.to_string() }
    }

    /// Adds the path that the error is about.
    pub(crate) fn at(self, path: &str) -> Self {
        Self { reason: format!("{path}: {}", self.reason), ..self }
    }
}

/// Number of files that a program may have open at once, if it raises its limit.
const OPEN_FILES_MAX: u64 = 1 << 20;
/// Time for which an exit record waits for its acknowledgement when a host listens silently or is gone. A daemon may
/// be down for an upgrade, and the record exists nowhere else.
const ACKNOWLEDGE_WAIT: Duration = Duration::from_secs(600);

fn main() {
    if std::process::id() != 1 {
        return system::agent_main();
    }
    let exit = match boot() {
        Ok((control, config)) => {
            let exit = run(&control, &config);
            finish(&control, exit)
        }
        Err((Some(control), error)) => finish(&control, boot_failure(&error)),
        Err((None, error)) => error,
    };
    // This is reached only without a control channel, so only the console can get the report.
    use std::io::Write;
    let _ = writeln!(io::stderr(), "[stead] boot failed in {}: {}", exit.phase, exit.reason);
    power_off();
}

type Boot = Result<(control::Control, Config), (Option<control::Control>, BootError)>;

/// Runs everything before the program, as far as it succeeds.
fn boot() -> Boot {
    devices::mount_early().map_err(|error| (None, error))?;
    modules::load_for_boot().map_err(|error| (None, error))?;
    raise_limits();
    let port = devices::control_port().map_err(|error| (None, error))?;
    let control = control::Control::start(port).map_err(|error| (None, error))?;
    // The root does not depend on the configuration: it is mounted while the configuration travels.
    let root = root::mount_root();
    let config = control.wait_for_config();
    let prepared = root.and_then(|()| prepare(&config));
    match prepared {
        Ok(()) => Ok((control, config)),
        Err(error) => Err((Some(control), error)),
    }
}

/// Raises the limits that an ordinary host raises and a kernel by itself does not. If a limit cannot be raised, the
/// program that needs it reports the error.
fn raise_limits() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    // A program raises its soft limit when it needs more. The soft limit stays small for programs that close every
    // possible descriptor.
    let own = getrlimit(Resource::Nofile);
    let _ = setrlimit(Resource::Nofile, Rlimit { maximum: Some(OPEN_FILES_MAX), ..own });
    // The VM belongs to one program, so there is no other user from whom low ports have to be kept.
    let _ = std::fs::write("/proc/sys/net/ipv4/ip_unprivileged_port_start", "0");
}

fn prepare(config: &Config) -> Result<(), BootError> {
    let hostname = rustix::system::sethostname(config.hostname.as_bytes());
    hostname.map_err(|error| BootError::new("hostname", error))?;
    network::configure(config.network.as_ref())?;
    root::write_first_names(config)?;
    let volumes = volumes::mount_all(&config.volumes)?;
    root::switch()?;
    modules::name_module_loader();
    volumes::mount_trees(volumes)?;
    identity::begin_boot(&config.machine_id).map_err(|error| BootError::new("machine id", error))?;
    host_keys::settle_at_boot(&config.instance).map_err(|error| BootError::new("ssh host keys", error))?;
    // The volumes are mounted: a bundle on one of them is the one that programs read.
    trust::install(config);
    Ok(())
}

/// Starts the program and waits for its end.
fn run(control: &control::Control, config: &Config) -> Exit {
    if let Some(init) = system::find(config) {
        // The init's system may start another agent, which cannot reach the modules.
        if let Err(error) = modules::load_for_volumes() {
            log_line(&format!("no volume can be attached while the system runs: {}", error.reason));
        }
        system::give_way(control, config, &init);
    }
    kernel_log::forward(control, true);
    let children = match Children::start() {
        Ok(children) => children,
        Err(error) => return boot_failure(&BootError::new("reaper", error)),
    };
    match program::start(config, &children) {
        Ok(program) => {
            control.program_begun(config, &children, program::stop(&program, config, &children));
            control.program_ready(config, &children);
            memory::start(control, &children, config);
            volumes::start(control);
            program::wait(&program)
        }
        Err(exit) => exit,
    }
}

fn finish(control: &control::Control, exit: Exit) -> ! {
    control.set(Phase::Exited, Some(exit));
    program::kill_all();
    control.wait_for_acknowledgement(ACKNOWLEDGE_WAIT);
    power_off()
}

fn boot_failure(error: &BootError) -> Exit {
    let message = format!("{}: {}", error.phase, error.reason);
    Exit { code: None, message, is_boot_failure: true }
}

fn power_off() -> ! {
    kernel_log::silence();
    rustix::fs::sync();
    volumes::settle();
    root::settle();
    let _ = reboot(RebootCommand::PowerOff);
    loop {
        std::thread::park();
    }
}
