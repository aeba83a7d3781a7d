//! Simulated firewall tables.

use std::collections::BTreeSet;

use super::World;
use crate::host::{Firewall, FirewallRules, FirewallSeen, HostError, HostErrorKind, NicRule};

/// A table: base rules that may have been damaged, and the ports.
#[derive(Debug, Clone, Default)]
pub(super) struct Table {
    pub(super) is_intact: bool,
    /// The value that the table was loaded with.
    pub(super) is_for_guests_only: bool,
    pub(super) nics: BTreeSet<NicRule>,
}

impl Table {
    pub(super) fn seen(&self, is_for_guests_only: bool) -> FirewallSeen {
        let is_intact = self.is_intact && self.is_for_guests_only == is_for_guests_only;
        FirewallSeen { is_intact, nics: NicRule::set(&self.nics) }
    }
}

impl Firewall for World {
    async fn inspect(&self, rules: &FirewallRules) -> Result<Option<FirewallSeen>, HostError> {
        self.verb("inspect table", &rules.table, |state| {
            Ok(state.tables.get(&rules.table).map(|table| table.seen(rules.is_for_guests_only)))
        })
        .await
    }

    async fn has_nic(&self, table: &str, nic: &NicRule) -> Result<bool, HostError> {
        self.verb("inspect table", table, |state| {
            Ok(state.tables.get(table).is_some_and(|table| table.nics.contains(nic)))
        })
        .await
    }

    async fn replace(&self, rules: &FirewallRules) -> Result<(), HostError> {
        self.verb("replace table", &rules.table, |state| {
            let table = state.tables.entry(rules.table.clone()).or_default();
            (table.is_intact, table.is_for_guests_only) = (true, rules.is_for_guests_only);
            Ok(())
        })
        .await
    }

    async fn add_nic(&self, table: &str, nic: &NicRule) -> Result<(), HostError> {
        self.verb("add port to table", table, |state| {
            let missing = || HostError::new(HostErrorKind::Missing, "add port to table", table);
            let nics = &mut state.tables.get_mut(table).ok_or_else(missing)?.nics;
            // A rule with another lane is replaced.
            nics.retain(|other| (&other.tap, other.mac, other.address) != (&nic.tap, nic.mac, nic.address));
            nics.insert(nic.clone());
            Ok(())
        })
        .await
    }

    async fn remove_nic(&self, table: &str, nic: &NicRule) -> Result<(), HostError> {
        self.verb("remove port from table", table, |state| {
            if let Some(table) = state.tables.get_mut(table) {
                table.nics.retain(|other| {
                    (&other.tap, other.mac, other.address) != (&nic.tap, nic.mac, nic.address)
                });
            }
            Ok(())
        })
        .await
    }

    async fn remove(&self, table: &str) -> Result<(), HostError> {
        self.verb("remove table", table, |state| {
            state.tables.remove(table);
            Ok(())
        })
        .await
    }
}
