//! The clients that first asked for an image: the work on the image counts as this client's.
//!
//! The table is kept in memory only: after a restart of the daemon, unfinished work counts as that of one client
//! without a name.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use stead_schemas::names::Uid;

/// Clients by the images that they asked for. Clones share the table.
#[derive(Debug, Clone, Default)]
pub(super) struct Clients(Arc<Mutex<BTreeMap<Uid, Arc<str>>>>);

impl Clients {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<Uid, Arc<str>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn asked_by(&self, owner: &Uid, client: &Arc<str>) {
        self.lock().entry(owner.clone()).or_insert_with(|| client.clone());
    }

    pub(super) fn of(&self, owner: &Uid) -> Arc<str> {
        self.lock().get(owner).cloned().unwrap_or_default()
    }

    pub(super) fn forget(&self, owner: &Uid) {
        self.lock().remove(owner);
    }
}
