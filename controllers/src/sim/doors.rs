//! Simulated wake listeners; they end with the daemon that watches them.

use std::net::Ipv4Addr;

use stead_schemas::limits::KNOCKS_MAX;
use stead_schemas::names::{LinkName, Uid};

use super::{State, World};
use crate::host::{Door, Doors, HostError, HostErrorKind, Knock, NetworkCard};

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
    knocks: Vec<Knock>,
}

impl State {
    /// Keeps a connection attempt to the watched card with this address; returns the owner.
    pub(super) fn knock_at_door(&mut self, address: Ipv4Addr, knock: &Knock) -> Option<Uid> {
        let is_there = |kept: &Kept| kept.watched.as_ref().is_some_and(|watched| watched.address == address);
        let (owner, kept) = self.doors.iter_mut().find(|(_, kept)| is_there(kept))?;
        if !kept.knocks.contains(knock) {
            if kept.knocks.len() == KNOCKS_MAX {
                kept.knocks.remove(0);
            }
            kept.knocks.push(knock.clone());
        }
        Some(owner.clone())
    }

    /// True if the card is watched, so that a VMM would find it in use.
    pub(super) fn is_watched(&self, tap: &LinkName) -> bool {
        self.doors.values().any(|kept| kept.watched.as_ref().is_some_and(|watched| watched.tap == *tap))
    }

    pub(super) fn lose_card(&mut self, tap: &LinkName) {
        for kept in self.doors.values_mut() {
            if kept.watched.as_ref().is_some_and(|watched| watched.tap == *tap) {
                kept.watched = None;
            }
        }
    }
}

impl Doors for World {
    async fn inspect(&self, owner: &Uid) -> Result<Option<Door>, HostError> {
        self.verb("inspect door of", owner.as_str(), |state| {
            let door = |kept: &Kept| Door { is_watched: kept.watched.is_some(), knocks: kept.knocks.clone() };
            let is_any = |door: &Door| door.is_watched || !door.knocks.is_empty();
            Ok(state.doors.get(owner).map(door).filter(is_any))
        })
        .await
    }

    async fn watch(&self, owner: &Uid, card: &NetworkCard) -> Result<(), HostError> {
        self.verb("watch door of", owner.as_str(), |state| {
            let refuse = |kind| HostError::new(kind, "watch door of", owner.as_str());
            if !state.links.contains_key(&card.tap) {
                return Err(refuse(HostErrorKind::Missing));
            }
            let is_in_use = |vmm: &super::vmms::Vmm| vmm.is_alive() && vmm.tap.as_ref() == Some(&card.tap);
            if state.machines.values().any(is_in_use) {
                return Err(refuse(HostErrorKind::Conflict));
            }
            let kept = state.doors.entry(owner.clone()).or_default();
            kept.watched = Some(Watched { tap: card.tap.clone(), address: card.address });
            Ok(())
        })
        .await
    }

    async fn unwatch(&self, owner: &Uid) -> Result<(), HostError> {
        self.verb("leave door of", owner.as_str(), |state| {
            if let Some(kept) = state.doors.get_mut(owner) {
                kept.watched = None;
            }
            Ok(())
        })
        .await
    }

    async fn hand_over(&self, owner: &Uid) -> Result<(), HostError> {
        let now = self.time();
        self.verb("hand over to", owner.as_str(), |state| {
            if let Some(kept) = state.doors.remove(owner) {
                state.let_in(owner, &kept.knocks, now);
            }
            Ok(())
        })
        .await
    }
}
