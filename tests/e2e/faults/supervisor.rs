//! A daemon whose system calls are counted, and fail where the test says so.
//!
//! Guarantees: calls are counted over all threads of the daemon. The fault is one class of calls, with one error. The
//! calls of programs that the daemon runs are separate classes.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::{Child, Command};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread;

use libc::seccomp_notif;
use rustix::io::Errno;

use super::calls::{self, Class, Roots};
use super::filter;

/// The calls that fail.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Fault {
    pub(crate) class: Class,
    pub(crate) error: Errno,
    /// True if the calls fail until the fault is removed, false if only the first call fails.
    pub(crate) lasts: bool,
}

impl std::fmt::Display for Fault {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let error = match self.error {
            Errno::NOSPC => "ENOSPC",
            Errno::MFILE => "EMFILE",
            Errno::NOMEM => "ENOMEM",
            _ => "EIO",
        };
        write!(f, "{error} {} at {}", if self.lasts { "lasting" } else { "once" }, self.class)
    }
}

#[derive(Debug, Default)]
struct State {
    seen: BTreeMap<Class, u64>,
    fault: Option<Fault>,
    hits: u64,
}

/// The state shared with the thread that answers. It outlives daemons.
#[derive(Debug, Clone, Default)]
pub(crate) struct Supervisor(Arc<Mutex<State>>);

impl Supervisor {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().expect("nothing panics while it is held")
    }

    /// Makes calls fail from now on.
    pub(crate) fn begin(&self, fault: &Fault) {
        let mut state = self.state();
        (state.fault, state.hits) = (Some(fault.clone()), 0);
    }

    /// Stops the faults: all calls succeed again. Returns the number of failed calls.
    pub(crate) fn end(&self) -> u64 {
        let mut state = self.state();
        state.fault = None;
        state.hits
    }

    pub(crate) fn hits(&self) -> u64 {
        self.state().hits
    }

    /// Returns the classes that were called since the last request.
    pub(crate) fn take_seen(&self) -> BTreeMap<Class, u64> {
        std::mem::take(&mut self.state().seen)
    }

    /// Starts the daemon with all of its calls supervised.
    pub(crate) fn spawn(&self, command: &mut Command, data: &Path, run: &Path) -> Child {
        let roots = Roots { data: data.display().to_string(), run: run.display().to_string() };
        let program = filter::program(&calls::asked_about());
        let (child, listener) = filter::spawn(command, program).expect("seccomp with notifications");
        let (supervisor, daemon) = (self.clone(), child.id());
        thread::spawn(move || {
            while let Some(asked) = filter::next(&listener) {
                filter::answer(&listener, &asked, supervisor.decide(&asked, daemon, &roots));
            }
        });
        child
    }

    /// Returns the error with which a call fails.
    fn decide(&self, asked: &seccomp_notif, daemon: u32, roots: &Roots) -> Option<Errno> {
        let (call, target) = calls::read(asked, roots)?;
        let is_daemon = Path::new(&format!("/proc/{daemon}/task/{}", asked.pid)).exists();
        let program = if is_daemon { None } else { Some(program_of(asked.pid)?) };
        // Calls of other programs outside of the daemon's directories do not matter.
        if program.is_some() && !target.starts_with("DATA") && !target.starts_with("RUN") {
            return None;
        }
        let class = Class { program, call, target };
        let mut state = self.state();
        *state.seen.entry(class.clone()).or_default() += 1;
        let fault = state.fault.as_ref().filter(|fault| fault.class == class)?;
        let (error, lasts) = (fault.error, fault.lasts);
        if !lasts && state.hits > 0 {
            return None;
        }
        state.hits += 1;
        Some(error)
    }
}

/// Returns the name of the program that a process runs, or `None` for a child of the daemon before its exec.
fn program_of(pid: u32) -> Option<String> {
    let link = fs::read_link(format!("/proc/{pid}/exe")).ok()?;
    let name = link.file_name()?.to_string_lossy().into_owned();
    (name != "stead").then_some(name)
}
