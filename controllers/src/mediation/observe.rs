//! Observations of a policy.

use std::hash::{DefaultHasher, Hash, Hasher};

use stead_schemas::condition::{self, ConditionStatus, ConditionType};
use stead_schemas::egress::Policy;
use stead_schemas::instance::Instance;
use stead_schemas::mediation::{Mediation, Mediator};
use stead_schemas::meta::Object;
use stead_schemas::names::Uid;

use super::MediationReconciler;
use crate::host::{Host, HostError, Policies, PolicySeen};

/// The policy in the process, the one that the spec of the instance asks for, and the state of the process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Observed {
    pub owner: Uid,
    pub policy: PolicySeen,
    /// The desired policy, or `None` if the instance is gone or reaches the outside by itself.
    pub wanted: Option<Box<Policy>>,
    /// True while a VM is behind the card of the policy, or should be.
    pub is_needed: bool,
    pub is_mediator_ready: bool,
    /// The reason that the mediator gives for not being ready.
    pub mediator_trouble: Option<String>,
}

pub(super) async fn observe<H: Host>(
    reconciler: &MediationReconciler<H>,
    uid: &Uid,
    object: Option<&Object<Mediation>>,
) -> Result<Observed, HostError> {
    let policy = reconciler.host.policies().inspect(uid).await?;
    let mut seen = Observed {
        owner: uid.clone(),
        policy,
        wanted: None,
        is_needed: false,
        is_mediator_ready: false,
        mediator_trouble: None,
    };
    let Some(object) = object else { return Ok(seen) };
    let store = &reconciler.store;
    let instance = store.get::<Instance>(&object.spec.instance);
    seen.wanted = instance.and_then(|instance| wanted(object, &instance)).map(Box::new);
    seen.is_needed = store.is_referred_to(&object.card_in_use());
    if let Some(mediator) = store.get::<Mediator>(&object.spec.mediator) {
        let ready = condition::find(&mediator.status.conditions, ConditionType::Ready);
        seen.is_mediator_ready = ready.is_some_and(|ready| ready.status == ConditionStatus::True);
        let trouble = ready.map(|ready| ready.message.clone()).filter(|message| !message.is_empty());
        seen.mediator_trouble = trouble.filter(|_| !seen.is_mediator_ready);
    }
    Ok(seen)
}

fn wanted(object: &Object<Mediation>, instance: &Object<Instance>) -> Option<Policy> {
    let egress = instance.spec.egress.as_ref()?;
    let generation = instance.meta.generation;
    let digest = |text: &str| {
        let mut hasher = DefaultHasher::new();
        text.hash(&mut hasher);
        format!("{}-{:016x}", generation.0, hasher.finish())
    };
    Some(egress.policy(&object.meta.uid, object.spec.address.into(), &instance.spec.env, digest))
}
