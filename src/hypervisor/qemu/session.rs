//! A connection to one QEMU process, behind the driver boundary.

use std::path::{Path, PathBuf};

use stead_schemas::names::LinkName;
use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;

use super::command;
use super::monitor::{Monitor, STATE_DEADLINE};
use crate::hypervisor::driver::{Answer, Notify, RunState, SaveFiles, Saved, Session};
use crate::hypervisor::record::VmPaths;

/// The monitor of one process, and the socket through which a device state is loaded.
struct QemuSession {
    monitor: Monitor,
    migration: PathBuf,
}

pub(super) async fn connect(paths: &VmPaths, notify: &Notify) -> Result<Box<dyn Session>, String> {
    let monitor = Monitor::connect(&command::monitor(paths), notify).await?;
    Ok(Box::new(QemuSession { monitor, migration: paths.socket("state.sock") }))
}

impl QemuSession {
    /// Sends a device state to a process that waits for one.
    async fn load_state(&self, state: &[u8]) -> Result<(), String> {
        self.monitor.begin_load(&self.migration).await?;
        let mut stream = UnixStream::connect(&self.migration).await.map_err(|error| error.to_string())?;
        stream.write_all(state).await.map_err(|error| error.to_string())?;
        stream.shutdown().await.map_err(|error| error.to_string())?;
        self.monitor.migrated().await
    }
}

impl Session for QemuSession {
    fn is_spent(&self) -> bool {
        self.monitor.is_spent()
    }

    fn version(&self) -> Answer<'_, String> {
        Box::pin(self.monitor.version())
    }

    fn state(&self) -> Answer<'_, RunState> {
        Box::pin(self.monitor.state())
    }

    fn pause(&self) -> Answer<'_, ()> {
        Box::pin(self.monitor.pause())
    }

    fn resume(&self) -> Answer<'_, ()> {
        Box::pin(self.monitor.resume())
    }

    fn save<'a>(&'a self, to: &'a SaveFiles) -> Answer<'a, ()> {
        Box::pin(self.monitor.save_state(&to.state))
    }

    fn load<'a>(&'a self, from: &'a Saved<'a>) -> Answer<'a, ()> {
        let late = |_| Err(format!("not done within {} s", STATE_DEADLINE.as_secs()));
        Box::pin(async move {
            let loaded = tokio::time::timeout(STATE_DEADLINE, self.load_state(from.state)).await;
            loaded.unwrap_or_else(late)
        })
    }

    fn replace_tap<'a>(&'a self, tap: &'a LinkName) -> Answer<'a, ()> {
        Box::pin(self.monitor.plug(tap))
    }

    fn reopen_console<'a>(&'a self, log: &'a Path) -> Answer<'a, ()> {
        Box::pin(self.monitor.reopen_console(log))
    }
}
