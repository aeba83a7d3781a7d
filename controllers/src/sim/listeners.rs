//! Simulated listeners; they end with the daemon that has them, and other programs have ports too.

use std::collections::BTreeMap;

use stead_schemas::ingress::IngressRule;
use stead_schemas::names::Uid;

use super::{State, World};
use crate::host::{HostError, HostErrorKind, Listeners};

/// Ports that other programs take and leave.
const CONTESTED: [u16; 3] = [80, 81, 443];

impl State {
    /// Makes another program listen at a port that we do not have.
    pub(super) fn take_port(&mut self, pick: usize) {
        let port = CONTESTED[pick % CONTESTED.len()];
        if !self.listeners.contains_key(&port) {
            self.taken_ports.insert(port);
        }
    }

    /// Closes a socket of ours, as another program would.
    pub(super) fn lose_listener(&mut self, pick: usize) {
        let ports: Vec<u16> = self.listeners.keys().copied().collect();
        if let Some(port) = ports.get(pick % ports.len().max(1)) {
            self.listeners.remove(port);
        }
    }
}

impl Listeners for World {
    async fn list(&self) -> Result<Vec<Uid>, HostError> {
        self.verb("list", "listeners", |state| {
            let owners = state.listeners.values().flat_map(|owners| owners.keys());
            let owners: std::collections::BTreeSet<Uid> = owners.cloned().collect();
            Ok(owners.into_iter().collect())
        })
        .await
    }

    async fn inspect(&self, owner: &Uid) -> Result<BTreeMap<u16, Vec<IngressRule>>, HostError> {
        self.verb("inspect listeners of", owner.as_str(), |state| {
            let served = state.listeners.iter().filter_map(|(port, owners)| {
                let rules = owners.get(owner)?;
                Some((*port, rules.clone()))
            });
            Ok(served.collect())
        })
        .await
    }

    async fn is_free(&self, port: u16) -> Result<bool, HostError> {
        self.verb("look at port", &port.to_string(), |state| Ok(!state.taken_ports.contains(&port))).await
    }

    async fn open(&self, owner: &Uid, port: u16, rules: &[IngressRule]) -> Result<(), HostError> {
        self.verb("listen at port", &port.to_string(), |state| {
            if state.taken_ports.contains(&port) {
                return Err(HostError::new(HostErrorKind::Conflict, "listen at port", port.to_string()));
            }
            state.listeners.entry(port).or_default().insert(owner.clone(), rules.to_vec());
            Ok(())
        })
        .await
    }

    async fn close(&self, owner: &Uid, port: u16) -> Result<(), HostError> {
        self.verb("close port", &port.to_string(), |state| {
            if let Some(owners) = state.listeners.get_mut(&port) {
                owners.remove(owner);
                if owners.is_empty() {
                    state.listeners.remove(&port);
                }
            }
            Ok(())
        })
        .await
    }
}
