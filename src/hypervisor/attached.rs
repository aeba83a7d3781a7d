//! The connections to one VM whose process lives.

use std::ops::Deref;
use std::sync::OnceLock;

use jiff::Timestamp;
use tokio::task::JoinHandle;

use super::dispatch::Choice;
use super::driver::Session;
use crate::guest_channel::GuestChannel;
use crate::host::process::Identity;
use crate::memory::HeldRam;

/// The connections to one live VM.
pub(crate) struct Attached {
    pub(crate) identity: Identity,
    pub(crate) choice: Choice,
    pub(crate) channel: GuestChannel,
    pub(super) since: Timestamp,
    pub(super) session: tokio::sync::Mutex<Option<Connection>>,
    pub(super) held_ram: HeldRam,
    pub(super) exit_watch: JoinHandle<()>,
    /// Keeps the logs bounded; set right after this value is shared.
    pub(super) console_watch: OnceLock<JoinHandle<()>>,
}

/// The session of one VM. A type of its own, because a closure over a trait object is not general enough
/// for the ports.
pub(crate) struct Connection(pub(super) Box<dyn Session>);

impl Deref for Connection {
    type Target = dyn Session;

    fn deref(&self) -> &Self::Target {
        self.0.as_ref()
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        self.exit_watch.abort();
        if let Some(watch) = self.console_watch.get() {
            watch.abort();
        }
    }
}
