//! The simulated process that carries mediated egress. It outlives the daemon, and its policies end with it.

use std::collections::{BTreeMap, BTreeSet};

use stead_schemas::egress::{MediatorSettings, Policy};
use stead_schemas::names::Uid;

use super::{State, World};
use crate::host::{HostError, HostErrorKind, MediatorSeen, Mediators, Policies, PolicySeen};

/// The process of one mediator.
#[derive(Debug, Clone)]
pub(super) struct Process {
    pid: u32,
    is_current: bool,
    is_silent: bool,
    settings: MediatorSettings,
    pub(super) policies: BTreeMap<Uid, Policy>,
}

impl Process {
    pub(super) fn seen(&self) -> MediatorSeen {
        let settings = (!self.is_silent).then(|| self.settings.clone());
        MediatorSeen { pid: self.pid, is_current: self.is_current, settings }
    }
}

impl State {
    /// Ends the process, as the kernel or an operator would.
    pub(super) fn kill_mediator(&mut self) {
        self.mediators.clear();
    }

    /// Stops the process, which does not answer any more.
    pub(super) fn stop_mediator(&mut self) {
        self.mediators.values_mut().for_each(|process| process.is_silent = true);
    }

    /// Replaces the program of the daemon: the process runs an earlier version.
    pub(super) fn outdate_mediator(&mut self) {
        self.mediators.values_mut().for_each(|process| process.is_current = false);
    }

    /// Returns the process that answers, if there is one.
    fn mediator(&mut self, operation: &'static str) -> Result<Option<&mut Process>, HostError> {
        let process = self.mediators.values_mut().next();
        match process {
            Some(process) if process.is_silent => {
                Err(HostError::new(HostErrorKind::Transient, operation, "the process"))
            }
            process => Ok(process),
        }
    }
}

impl Mediators for World {
    async fn list(&self) -> Result<Vec<Uid>, HostError> {
        self.verb("list", "mediators", |state| Ok(state.mediators.keys().cloned().collect())).await
    }

    async fn inspect(&self, owner: &Uid) -> Result<Option<MediatorSeen>, HostError> {
        self.verb("inspect mediator", owner.as_str(), |state| {
            Ok(state.mediators.get(owner).map(Process::seen))
        })
        .await
    }

    async fn launch(&self, owner: &Uid, settings: &MediatorSettings) -> Result<(), HostError> {
        self.verb("launch mediator", owner.as_str(), |state| {
            if state.mediators.keys().any(|other| other != owner) {
                return Err(HostError::new(HostErrorKind::Conflict, "launch mediator", owner.as_str()));
            }
            state.next_pid += 1;
            let process = Process {
                pid: state.next_pid,
                is_current: true,
                is_silent: false,
                settings: settings.clone(),
                policies: BTreeMap::new(),
            };
            state.mediators.entry(owner.clone()).or_insert(process);
            Ok(())
        })
        .await?;
        self.announce(owner);
        Ok(())
    }

    async fn retire(&self, owner: &Uid) -> Result<(), HostError> {
        self.verb("retire mediator", owner.as_str(), |state| {
            state.mediators.remove(owner);
            Ok(())
        })
        .await
    }
}

impl Policies for World {
    async fn list(&self) -> Result<Vec<Uid>, HostError> {
        self.verb("list", "policies", |state| {
            let held = state.mediators.values().flat_map(|process| process.policies.keys());
            let owners: BTreeSet<Uid> = held.chain(&state.policy_logs).cloned().collect();
            Ok(owners.into_iter().collect())
        })
        .await
    }

    async fn inspect(&self, owner: &Uid) -> Result<PolicySeen, HostError> {
        self.verb("inspect policy", owner.as_str(), |state| {
            let has_log = state.policy_logs.contains(owner);
            let process = state.mediator("inspect policy")?;
            let policy = process.and_then(|process| process.policies.get(owner));
            Ok(PolicySeen { fingerprint: policy.map(|policy| policy.fingerprint.clone()), has_log })
        })
        .await
    }

    async fn put(&self, policy: &Policy) -> Result<(), HostError> {
        self.verb("put policy", policy.owner.as_str(), |state| {
            let missing = || HostError::new(HostErrorKind::Missing, "put policy", policy.owner.as_str());
            let process = state.mediator("put policy")?.ok_or_else(missing)?;
            process.policies.insert(policy.owner.clone(), policy.clone());
            state.policy_logs.insert(policy.owner.clone());
            Ok(())
        })
        .await
    }

    async fn remove(&self, owner: &Uid) -> Result<(), HostError> {
        self.verb("remove policy", owner.as_str(), |state| {
            if let Some(process) = state.mediator("remove policy")? {
                process.policies.remove(owner);
            }
            Ok(())
        })
        .await
    }

    async fn discard_log(&self, owner: &Uid) -> Result<(), HostError> {
        self.verb("discard log of policy", owner.as_str(), |state| {
            state.policy_logs.remove(owner);
            Ok(())
        })
        .await
    }
}
