//! The answers to the daemon's requests.
//!
//! Guarantees: a refused request changes nothing; a policy that is put again changes nothing; requests are carried out one
//! after another; the text of a refusal contains no part of a policy.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};

use stead_schemas::egress::{ControlReply, ControlRequest, MediatorSettings, MediatorState, Policy};

use super::wire::FILES;
use crate::audit::{AuditLog, LogFiles};
use crate::policies::Policies;

/// The parts of the process that the daemon controls.
#[derive(Debug)]
pub(crate) struct Control {
    policies: Arc<Policies>,
    settings: MediatorSettings,
    /// Held while a request is carried out, so that its checks still hold when it changes something.
    order: Mutex<()>,
}

impl Control {
    pub(crate) fn new(policies: Arc<Policies>, settings: MediatorSettings) -> Self {
        Self { policies, settings, order: Mutex::new(()) }
    }

    /// Carries out a request, which came with these files.
    pub(super) fn answer(&self, request: ControlRequest, files: Vec<OwnedFd>) -> ControlReply {
        let _order = self.order.lock().unwrap_or_else(PoisonError::into_inner);
        match request {
            ControlRequest::State => ControlReply::State(self.state()),
            ControlRequest::Inspect(owner) => ControlReply::Policy(self.policies.fingerprint(&owner)),
            ControlRequest::Put(policy) => match self.put(*policy, files) {
                Ok(()) => ControlReply::Done,
                Err(text) => ControlReply::Refused(text),
            },
            ControlRequest::Remove(owner) => {
                self.policies.remove(&owner);
                ControlReply::Done
            }
        }
    }

    fn state(&self) -> MediatorState {
        MediatorState {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            settings: self.settings.clone(),
            policies: self.policies.list().into_iter().collect(),
        }
    }

    fn put(&self, policy: Policy, files: Vec<OwnedFd>) -> Result<(), String> {
        let held = self.policies.active(policy.address);
        let is_same = |held: &Policy| held.owner == policy.owner && held.fingerprint == policy.fingerprint;
        if held.is_some_and(|held| is_same(&held.policy)) {
            return Ok(());
        }
        let owner = policy.owner.clone();
        let set = if self.policies.contains(&owner) {
            // The log is open, and the files that came are closed.
            drop(files);
            self.policies.put(policy, || AuditLog::new().0)
        } else {
            let log = open(files)?;
            self.policies.put(policy, || log)
        };
        // The error describes the authority in constant words.
        set.map_err(|error| error.to_string())?;
        tracing::info!(%owner, "a policy was set");
        Ok(())
    }
}

/// Opens an audit log on the files that came with a policy.
fn open(files: Vec<OwnedFd>) -> Result<AuditLog, String> {
    let count = files.len();
    let files: [OwnedFd; FILES] = files.try_into().map_err(|_| {
        format!("the first policy of an instance needs the {FILES} files of its audit log, and {count} came")
    })?;
    let [one, other] = files.map(File::from);
    for file in [&one, &other] {
        let is_file = file.metadata().is_ok_and(|metadata| metadata.is_file());
        if !is_file {
            return Err("an audit log is written to regular files only".to_owned());
        }
    }
    let files = LogFiles::new(one, other);
    let files = files.map_err(|error| format!("the files of the audit log cannot be used: {error}"))?;
    Ok(AuditLog::to_files(files))
}
