//! Simulated wake listeners; they end with the daemon that watches them.

use std::net::Ipv4Addr;

use stead_schemas::limits::PENDING_CONNECTIONS_MAX;
use stead_schemas::names::{LinkName, Uid};

use super::{State, World};
use crate::host::{HostError, HostErrorKind, NetworkCard, PendingConnection, WakeListener, WakeListeners};

/// A watched card.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Watched {
    pub(super) tap: LinkName,
    address: Ipv4Addr,
}

/// The card, while it is watched, and the pending connections that are kept.
#[derive(Debug, Clone, Default)]
pub(super) struct Kept {
    pub(super) watched: Option<Watched>,
    all_pending: Vec<PendingConnection>,
}

impl State {
    /// Keeps a connection attempt to the watched card with this address; returns the owner.
    pub(super) fn keep_pending(&mut self, address: Ipv4Addr, pending: &PendingConnection) -> Option<Uid> {
        let is_there = |kept: &Kept| kept.watched.as_ref().is_some_and(|watched| watched.address == address);
        let (owner, kept) = self.wake_listeners.iter_mut().find(|(_, kept)| is_there(kept))?;
        if !kept.all_pending.contains(pending) {
            if kept.all_pending.len() == PENDING_CONNECTIONS_MAX {
                kept.all_pending.remove(0);
            }
            kept.all_pending.push(pending.clone());
        }
        Some(owner.clone())
    }

    /// True if the card is watched, so that a VMM would find it in use.
    pub(super) fn is_watched(&self, tap: &LinkName) -> bool {
        self.wake_listeners
            .values()
            .any(|kept| kept.watched.as_ref().is_some_and(|watched| watched.tap == *tap))
    }

    pub(super) fn lose_card(&mut self, tap: &LinkName) {
        for kept in self.wake_listeners.values_mut() {
            if kept.watched.as_ref().is_some_and(|watched| watched.tap == *tap) {
                kept.watched = None;
            }
        }
    }
}

impl WakeListeners for World {
    async fn inspect(&self, owner: &Uid) -> Result<Option<WakeListener>, HostError> {
        self.verb("inspect wake listener of", owner.as_str(), |state| {
            let listener = |kept: &Kept| WakeListener {
                is_watched: kept.watched.is_some(),
                all_pending: kept.all_pending.clone(),
            };
            let is_any = |listener: &WakeListener| listener.is_watched || !listener.all_pending.is_empty();
            Ok(state.wake_listeners.get(owner).map(listener).filter(is_any))
        })
        .await
    }

    async fn watch(&self, owner: &Uid, card: &NetworkCard) -> Result<(), HostError> {
        self.verb("watch wake listener of", owner.as_str(), |state| {
            let refuse = |kind| HostError::new(kind, "watch wake listener of", owner.as_str());
            if !state.links.contains_key(&card.tap) {
                return Err(refuse(HostErrorKind::Missing));
            }
            let is_in_use = |vmm: &super::vmms::Vmm| vmm.is_alive() && vmm.tap.as_ref() == Some(&card.tap);
            if state.machines.values().any(is_in_use) {
                return Err(refuse(HostErrorKind::Conflict));
            }
            let kept = state.wake_listeners.entry(owner.clone()).or_default();
            kept.watched = Some(Watched { tap: card.tap.clone(), address: card.address });
            Ok(())
        })
        .await
    }

    async fn unwatch(&self, owner: &Uid) -> Result<(), HostError> {
        self.verb("leave wake listener of", owner.as_str(), |state| {
            if let Some(kept) = state.wake_listeners.get_mut(owner) {
                kept.watched = None;
            }
            Ok(())
        })
        .await
    }

    async fn hand_over(&self, owner: &Uid) -> Result<(), HostError> {
        let now = self.time();
        self.verb("hand over to", owner.as_str(), |state| {
            if let Some(kept) = state.wake_listeners.remove(owner) {
                state.let_in(owner, &kept.all_pending, now);
            }
            Ok(())
        })
        .await
    }
}
