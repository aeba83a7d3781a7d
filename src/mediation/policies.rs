//! The port of policies: what the daemon asks of the process by its control socket.

use std::collections::BTreeSet;

use stead_controllers::host::{HostError, HostErrorKind, Policies, PolicySeen};
use stead_egress::{ControlError, ask};
use stead_schemas::egress::{ControlReply, ControlRequest, MediatorState, Policy};
use stead_schemas::names::Uid;

use super::Carriers;

const SUBJECT: &str = "the process that carries egress";

impl Carriers {
    /// Asks the process. Returns `None` when there is none.
    async fn asked(
        &self,
        operation: &'static str,
        request: &ControlRequest,
        files: Option<[std::fs::File; 2]>,
    ) -> Result<Option<ControlReply>, HostError> {
        match ask(&self.socket(), request, files.map(|files| files.map(Into::into))).await {
            Ok(ControlReply::Refused(why)) => {
                Err(HostError::new(HostErrorKind::Permanent, operation, SUBJECT).because(why))
            }
            Ok(reply) => Ok(Some(reply)),
            Err(ControlError::Absent | ControlError::NotListening) => Ok(None),
            Err(ControlError::Io(error)) => Err(HostError::io(operation, SUBJECT, error)),
            Err(error) => Err(HostError::new(HostErrorKind::Transient, operation, SUBJECT).because(error)),
        }
    }

    /// Returns the state of the process, or `None` when there is none.
    pub(super) async fn state(&self) -> Result<Option<MediatorState>, HostError> {
        const OPERATION: &str = "inspect";
        match self.asked(OPERATION, &ControlRequest::State, None).await? {
            None => Ok(None),
            Some(ControlReply::State(state)) => Ok(Some(state)),
            Some(_) => Err(strange(OPERATION)),
        }
    }

    async fn done(&self, operation: &'static str, request: ControlRequest) -> Result<(), HostError> {
        match self.asked(operation, &request, None).await? {
            None | Some(ControlReply::Done) => Ok(()),
            Some(_) => Err(strange(operation)),
        }
    }

    fn log_error(operation: &'static str, owner: &Uid) -> impl FnOnce(std::io::Error) -> HostError {
        let subject = format!("the audit log of {owner}");
        move |error| HostError::io(operation, subject, error)
    }
}

fn strange(operation: &'static str) -> HostError {
    HostError::new(HostErrorKind::Transient, operation, SUBJECT).because("its reply is of another kind")
}

impl Policies for Carriers {
    async fn list(&self) -> Result<Vec<Uid>, HostError> {
        let failed = |error| HostError::io("list", "audit logs".to_owned(), error);
        let mut owners: BTreeSet<Uid> = self.logs().owners().map_err(failed)?;
        owners.extend(self.state().await?.into_iter().flat_map(|state| state.policies.into_keys()));
        Ok(owners.into_iter().collect())
    }

    async fn inspect(&self, owner: &Uid) -> Result<PolicySeen, HostError> {
        const OPERATION: &str = "inspect a policy of";
        let has_log = self.logs().exists(owner).map_err(Self::log_error("find", owner))?;
        let request = ControlRequest::Inspect(owner.clone());
        let fingerprint = match self.asked(OPERATION, &request, None).await? {
            None => None,
            Some(ControlReply::Policy(fingerprint)) => fingerprint,
            Some(_) => return Err(strange(OPERATION)),
        };
        Ok(PolicySeen { fingerprint, has_log })
    }

    async fn put(&self, policy: &Policy) -> Result<(), HostError> {
        const OPERATION: &str = "put a policy into";
        let files = self.logs().open(&policy.owner).map_err(Self::log_error("open", &policy.owner))?;
        let request = ControlRequest::Put(Box::new(policy.clone()));
        match self.asked(OPERATION, &request, Some(files)).await? {
            Some(ControlReply::Done) => Ok(()),
            Some(_) => Err(strange(OPERATION)),
            None => Err(HostError::new(HostErrorKind::Missing, OPERATION, SUBJECT)),
        }
    }

    async fn remove(&self, owner: &Uid) -> Result<(), HostError> {
        self.done("remove a policy from", ControlRequest::Remove(owner.clone())).await
    }

    async fn discard_log(&self, owner: &Uid) -> Result<(), HostError> {
        self.logs().remove(owner).map_err(Self::log_error("remove", owner))
    }
}
