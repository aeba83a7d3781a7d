//! A child process that ends with its value.

use std::process::{Child, ExitStatus};

use rustix::process::{Pid, Signal, kill_process};

use super::MOMENT;
use crate::fixtures::until;

/// A child process that does not outlive the value.
pub(crate) struct Program(pub(crate) Child);

impl Program {
    pub(super) fn signal(&self, signal: Signal) {
        let pid = i32::try_from(self.0.id()).ok().and_then(Pid::from_raw).expect("a pid");
        kill_process(pid, signal).expect("a child that was not waited for can be signalled");
    }

    pub(super) async fn end(&mut self) -> ExitStatus {
        until("the end of a process", MOMENT, async || self.0.try_wait().expect("waited")).await
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // A process that has already ended cannot be killed, so the error is ignored.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
