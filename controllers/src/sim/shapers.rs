//! Simulated rules for the traffic of links.

use stead_schemas::names::LinkName;
use stead_schemas::quantity::Rate;

use super::{State, World};
use crate::host::{Detour, HostError, HostErrorKind, Limit, LinkKind, Shapers, Shaping};

impl Shapers for World {
    async fn inspect(&self, link: &LinkName) -> Result<Shaping, HostError> {
        self.verb("inspect the shaping of", link.as_str(), |state| {
            Ok(state.shaping.get(link).cloned().unwrap_or_default())
        })
        .await
    }

    async fn limit(&self, link: &LinkName, rate: Rate) -> Result<(), HostError> {
        self.verb("limit", link.as_str(), |state| {
            state.shape("limit", link)?.limit = Limit::At(rate);
            Ok(())
        })
        .await
    }

    async fn unlimit(&self, link: &LinkName) -> Result<(), HostError> {
        self.verb("unlimit", link.as_str(), |state| {
            state.change_shaping(link, |shaping| shaping.limit = Limit::None);
            Ok(())
        })
        .await
    }

    async fn divert(&self, link: &LinkName, through: &LinkName) -> Result<(), HostError> {
        self.verb("divert", link.as_str(), |state| {
            // The kernel drops what is led through a link that is down.
            let is_way = state.links.get(through).is_some_and(|way| way.kind == LinkKind::Ifb && way.is_up);
            if !is_way {
                return Err(missing("divert through", through));
            }
            state.shape("divert", link)?.detour = Detour::Through(through.clone());
            Ok(())
        })
        .await
    }

    async fn undivert(&self, link: &LinkName) -> Result<(), HostError> {
        self.verb("undivert", link.as_str(), |state| {
            state.change_shaping(link, |shaping| shaping.detour = Detour::None);
            Ok(())
        })
        .await
    }
}

fn missing(operation: &'static str, link: &LinkName) -> HostError {
    HostError::new(HostErrorKind::Missing, operation, link.as_str())
}

impl State {
    /// Returns the rules for a link of ours, to change them.
    fn shape(&mut self, operation: &'static str, link: &LinkName) -> Result<&mut Shaping, HostError> {
        if !self.links.contains_key(link) {
            return Err(missing(operation, link));
        }
        Ok(self.shaping.entry(link.clone()).or_default())
    }

    /// Changes the rules for a link that has any.
    fn change_shaping(&mut self, link: &LinkName, change: impl FnOnce(&mut Shaping)) {
        if let Some(shaping) = self.shaping.get_mut(link) {
            change(shaping);
            if *shaping == Shaping::default() {
                self.shaping.remove(link);
            }
        }
    }

    /// Removes a limit or what belongs to it, as another program may.
    pub(super) fn lose_limit(&mut self, pick: usize) {
        let shaped: Vec<LinkName> = self.shaping.keys().cloned().collect();
        let Some(link) = shaped.get(pick % shaped.len().max(1)) else { return };
        let is_ifb = self.links.get(link).is_some_and(|link| link.kind == LinkKind::Ifb);
        match pick / shaped.len() % 4 {
            0 if is_ifb => self.remove_link(link),
            1 => self.change_shaping(link, |shaping| shaping.limit = Limit::Altered),
            2 => self.change_shaping(link, |shaping| shaping.detour = Detour::None),
            _ => self.change_shaping(link, |shaping| shaping.limit = Limit::None),
        }
    }

    /// Removes the rules for a link that is removed. What was led through it leads nowhere.
    pub(super) fn lose_shaping(&mut self, link: &LinkName) {
        self.shaping.remove(link);
        for shaping in self.shaping.values_mut() {
            if shaping.detour == Detour::Through(link.clone()) {
                shaping.detour = Detour::Broken;
            }
        }
    }
}
