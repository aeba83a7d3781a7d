//! Observations of a mediator.

use stead_schemas::mediation::Mediator;
use stead_schemas::meta::Object;
use stead_schemas::names::Uid;
use stead_schemas::references::{Ref, Role};

use super::MediatorReconciler;
use crate::host::{Host, HostError, MediatorSeen, Mediators};

/// The state of the process, and whether a policy needs it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Observed {
    pub owner: Uid,
    pub process: Option<MediatorSeen>,
    pub is_needed: bool,
}

pub(super) async fn observe<H: Host>(
    reconciler: &MediatorReconciler<H>,
    uid: &Uid,
    object: Option<&Object<Mediator>>,
) -> Result<Observed, HostError> {
    let policies = Ref::to::<Mediator>(Role::MediatedBy, uid);
    Ok(Observed {
        owner: uid.clone(),
        process: reconciler.host.mediators().inspect(uid).await?,
        is_needed: object.is_some() && reconciler.store.is_referred_to(&policies),
    })
}
