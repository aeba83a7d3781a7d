//! Child processes: started and reaped in one place, so that no exit is lost and no signal reaches a reused pid.
//!
//! PID 1 inherits every orphan and reaps it. The reaper never runs while a program is being
//! started: `Command` waits for a child of its own when the execution fails.

use std::collections::BTreeMap;
use std::io;
use std::process::Command;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use rustix::io::Errno;
use rustix::process::{
    Pid, Signal, WaitId, WaitIdOptions, WaitOptions, WaitStatus, kill_process, kill_process_group, wait,
    waitid,
};

/// Callback that gets the status of the ended child.
type Ended = Box<dyn FnOnce(WaitStatus) + Send>;

/// The child processes of this process. All code that starts programs shares this value.
#[derive(Clone, Default)]
pub(crate) struct Children(Arc<Shared>);

#[derive(Default)]
struct Shared {
    known: Mutex<Known>,
    started: Condvar,
}

#[derive(Default)]
struct Known {
    waiting: BTreeMap<i32, Ended>,
    /// Number of children ever started. A change means that the reaper has a child to wait for again.
    starts: u64,
}

impl Children {
    /// Starts the reaper thread.
    pub(crate) fn start() -> io::Result<Self> {
        let children = Self::default();
        let for_thread = children.clone();
        std::thread::Builder::new().name("reaper".to_owned()).spawn(move || for_thread.reap())?;
        Ok(children)
    }

    /// Starts a program. `ended` is called once, by the reaper, when the program has ended.
    pub(crate) fn spawn(
        &self,
        command: &mut Command,
        ended: impl FnOnce(WaitStatus) + Send + 'static,
    ) -> io::Result<Pid> {
        let mut known = self.lock();
        // The handle is not waited for, because the reaper waits for the child.
        let pid = Pid::from_child(&command.spawn()?);
        known.waiting.insert(pid.as_raw_nonzero().get(), Box::new(ended));
        known.starts += 1;
        self.0.started.notify_all();
        Ok(pid)
    }

    /// Sends a signal to a child that was not reaped yet. Does nothing otherwise, because the pid may have been
    /// reused.
    pub(crate) fn signal(&self, pid: Pid, signal: Signal) {
        let known = self.lock();
        if known.waiting.contains_key(&pid.as_raw_nonzero().get()) {
            let _ = kill_process(pid, signal);
        }
    }

    /// Sends a signal to the process group that the child leads. Does nothing if the child was reaped.
    pub(crate) fn signal_group(&self, leader: Pid, signal: Signal) {
        let known = self.lock();
        if known.waiting.contains_key(&leader.as_raw_nonzero().get()) {
            let _ = kill_process_group(leader, signal);
        }
    }

    fn reap(&self) {
        loop {
            let starts = self.lock().starts;
            // `NOWAIT`: the pid stays in use until the child is reaped under the lock.
            match waitid(WaitId::All, WaitIdOptions::EXITED | WaitIdOptions::NOWAIT) {
                Err(Errno::CHILD) => self.wait_for_start(starts),
                Ok(_) | Err(_) => self.reap_one(),
            }
        }
    }

    fn wait_for_start(&self, starts: u64) {
        let mut known = self.lock();
        while known.starts == starts {
            known = self.0.started.wait(known).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn reap_one(&self) {
        let mut known = self.lock();
        let Ok(Some((pid, status))) = wait(WaitOptions::NOHANG) else { return };
        let ended = known.waiting.remove(&pid.as_raw_nonzero().get());
        drop(known);
        if let Some(ended) = ended {
            ended(status);
        }
    }

    /// Returns the single reaper of a test process. A second reaper would take the children of the first.
    #[cfg(test)]
    pub(crate) fn of_tests() -> Self {
        static ONE: std::sync::OnceLock<Children> = std::sync::OnceLock::new();
        ONE.get_or_init(|| Self::start().expect("started")).clone()
    }

    fn lock(&self) -> MutexGuard<'_, Known> {
        self.0.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::time::Duration;

    use super::*;

    #[test]
    fn every_end_is_reported_and_a_failed_start_is_an_error() {
        let children = Children::of_tests();
        let (sender, ends) = mpsc::channel();
        for code in [0, 3, 126] {
            let sender = sender.clone();
            let mut command = Command::new("/bin/sh");
            command.args(["-c", &format!("exit {code}")]);
            let ended = move |status| {
                let _ = sender.send((code, status));
            };
            children.spawn(&mut command, ended).expect("started");
            let failed =
                children.spawn(&mut Command::new("/no/such/program"), |_| ()).expect_err("is not there");
            assert_eq!(failed.kind(), io::ErrorKind::NotFound);
        }
        for _ in 0..3 {
            let (code, status) = ends.recv_timeout(Duration::from_secs(30)).expect("reported");
            assert_eq!(status.exit_status(), Some(code));
        }
    }
}
