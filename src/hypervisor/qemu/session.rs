//! A connection to one QEMU process, behind the driver boundary.

use std::fs::File;
use std::io;
use std::path::Path;

use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;

use super::command;
use super::monitor::{Monitor, STATE_DEADLINE};
use stead_schemas::quantity::{Bytes, Rate};

use crate::host::tap::Frames;
use crate::hypervisor::driver::{Answer, Notify, RunState, SaveFiles, Saved, Session, VolumeFile};
use crate::hypervisor::record::VmPaths;

/// The monitor of one process. QEMU opens no file itself: it gets descriptors on the monitor's connection.
struct QemuSession {
    monitor: Monitor,
}

pub(super) async fn connect(paths: &VmPaths, notify: &Notify) -> Result<Box<dyn Session>, String> {
    let monitor = Monitor::connect(&command::monitor(paths), notify).await?;
    Ok(Box::new(QemuSession { monitor }))
}

impl QemuSession {
    /// Sends a device state to a process that waits for one.
    async fn load_state(&self, state: &[u8]) -> Result<(), String> {
        let text = |error: io::Error| error.to_string();
        let (mut ours, theirs) = UnixStream::pair().map_err(text)?;
        // The end of the VMM blocks, as it expects; QEMU makes it non-blocking where it wants that.
        let theirs = theirs.into_std().map_err(text)?;
        theirs.set_nonblocking(false).map_err(text)?;
        self.monitor.begin_load(&theirs).await?;
        drop(theirs);
        ours.write_all(state).await.map_err(text)?;
        ours.shutdown().await.map_err(text)?;
        self.monitor.migrated().await
    }

    async fn save_state(&self, path: &Path) -> Result<(), String> {
        let file = opened(path, |path| File::create(path)).await?;
        self.monitor.save_state(&file).await
    }

    async fn open_and_add(&self, volume: &VolumeFile) -> Result<(), String> {
        let file = match volume.is_read_only {
            true => opened(&volume.path, |path| File::open(path)).await?,
            false => opened(&volume.path, |path| File::options().read(true).write(true).open(path)).await?,
        };
        self.monitor.add_volume(volume, &file).await
    }

    async fn continue_console(&self, path: &Path) -> Result<(), String> {
        let file = opened(path, |path| File::options().append(true).create(true).open(path)).await?;
        self.monitor.reopen_console(&file).await
    }
}

/// Opens a file on a thread, because that may wait for the disk.
async fn opened(path: &Path, open: fn(&Path) -> io::Result<File>) -> Result<File, String> {
    let path = path.to_owned();
    let opened = tokio::task::spawn_blocking(move || open(&path)).await;
    opened.map_err(|error| error.to_string())?.map_err(|error| error.to_string())
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
        Box::pin(self.save_state(&to.state))
    }

    fn load<'a>(&'a self, from: &'a Saved<'a>) -> Answer<'a, ()> {
        let late = |_| Err(format!("not done within {} s", STATE_DEADLINE.as_secs()));
        Box::pin(async move {
            let loaded = tokio::time::timeout(STATE_DEADLINE, self.load_state(from.state)).await;
            loaded.unwrap_or_else(late)
        })
    }

    fn frames(&self) -> Answer<'_, Frames> {
        Box::pin(self.monitor.frames())
    }

    fn resume_card(&self) -> Answer<'_, ()> {
        Box::pin(self.monitor.resume_card())
    }

    fn disk_rate(&self) -> Answer<'_, Option<Rate>> {
        Box::pin(self.monitor.disk_rate())
    }

    fn limit_disks(&self, rate: Option<Rate>) -> Answer<'_, ()> {
        Box::pin(self.monitor.limit_disks(rate))
    }

    fn add_volume<'a>(&'a self, volume: &'a VolumeFile) -> Answer<'a, ()> {
        Box::pin(self.open_and_add(volume))
    }

    fn remove_volume(&self, number: u32) -> Answer<'_, ()> {
        Box::pin(self.monitor.remove_volume(number))
    }

    fn grow_volume(&self, number: u32, size: Bytes) -> Answer<'_, ()> {
        Box::pin(self.monitor.grow_volume(number, size))
    }

    fn reopen_console<'a>(&'a self, log: &'a Path) -> Answer<'a, ()> {
        Box::pin(self.continue_console(log))
    }
}
