//! Changes of the set of ports, many in one transaction.
//!
//! Guarantees: changes that wait while a transaction runs are made together by the next one. A change is answered
//! when it is made. A change that `nft` refuses does not delay the others.
//! Cancel/crash: a caller that goes away leaves its change queued, and another caller carries it out. If the caller
//! that runs a transaction goes away, the callers that wait for it are asked to try again.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, PoisonError};

use nftables::batch::Batch;
use stead_controllers::host::{HostError, HostErrorKind, NicRule};
use tokio::sync::oneshot;

use super::nft_cache::NicChange;
use super::nft_mediation::LANES;
use super::nft_rules;

/// Limit on the changes of one transaction: its text stays below a megabyte, and the first change does not wait for
/// long.
const BATCH_MAX: usize = 1024;

type Reply = oneshot::Sender<Result<(), HostError>>;

/// Waiting changes, by table and in order.
#[derive(Debug, Default)]
pub(super) struct NicQueue(Mutex<BTreeMap<String, Vec<(NicChange, Reply)>>>);

impl NicQueue {
    pub(super) fn push(&self, table: &str, change: NicChange) -> oneshot::Receiver<Result<(), HostError>> {
        let (reply, answer) = oneshot::channel();
        let mut waiting = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        waiting.entry(table.to_owned()).or_default().push((change, reply));
        answer
    }

    /// Takes the next changes of a table.
    pub(super) fn take(&self, table: &str) -> Vec<(NicChange, Reply)> {
        let mut waiting = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(changes) = waiting.get_mut(table) else { return Vec::new() };
        let rest = changes.split_off(changes.len().min(BATCH_MAX));
        let taken = std::mem::replace(changes, rest);
        if waiting.get(table).is_some_and(Vec::is_empty) {
            waiting.remove(table);
        }
        taken
    }
}

/// Returns the transaction for these changes. The last change of a port counts. `strays` are elements of other lanes.
pub(super) fn batch(
    table: &str,
    changes: &[NicChange],
    strays: &[NicRule],
) -> nftables::schema::Nftables<'static> {
    let mut last = BTreeMap::new();
    for change in changes {
        let (NicChange::Add(rule) | NicChange::Remove(rule)) = change;
        last.insert((&rule.tap, rule.mac, rule.address), (rule, matches!(change, NicChange::Add(_))));
    }
    // Deleting an absent element fails the whole transaction, adding an existing one does not.
    let all: Vec<NicRule> = last.values().map(|(rule, _)| (*rule).clone()).collect();
    let gone = last.values().filter(|(_, is_added)| !is_added);
    let removed: Vec<NicRule> = gone.map(|(rule, _)| (*rule).clone()).collect();
    let mut batch = Batch::new();
    nft_rules::elements(table, &all).into_iter().for_each(|elements| batch.add(elements));
    if !removed.is_empty() {
        nft_rules::elements(table, &removed).into_iter().for_each(|elements| batch.delete(elements));
    }
    for stray in strays {
        batch.delete(nft_rules::in_lane(table, stray.lane, stray.address));
    }
    batch.to_nftables()
}

/// Returns the elements of other lanes than the changed ports should have, or had.
pub(super) fn strays(loaded: &BTreeSet<NicRule>, changes: &[NicChange]) -> Vec<NicRule> {
    let others = changes.iter().flat_map(|(NicChange::Add(rule) | NicChange::Remove(rule))| {
        let lanes = LANES.iter().filter(|lane| **lane != rule.lane);
        lanes.map(|&lane| NicRule { lane, ..rule.clone() })
    });
    let found: BTreeSet<NicRule> = others.filter(|other| loaded.contains(other)).collect();
    found.into_iter().collect()
}

/// Returns the outcome of one change. If the table is gone, the removal of a port has succeeded.
pub(super) fn outcome(change: &NicChange, done: Result<(), HostError>) -> Result<(), HostError> {
    match (change, done) {
        (NicChange::Remove(_), Err(error)) if error.kind == HostErrorKind::Missing => Ok(()),
        (_, done) => done,
    }
}

/// Returns the error of a change whose transaction was abandoned.
pub(super) fn abandoned(table: &str) -> HostError {
    HostError::new(HostErrorKind::Transient, "change the ports of table", table)
        .because("the transaction was abandoned")
}
