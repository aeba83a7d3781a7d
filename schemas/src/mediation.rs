//! Mediator: the process that carries the connections of guests whose egress is mediated. Mediation: the policy of one
//! instance in that process.

use std::net::Ipv4Addr;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::condition::Condition;
use crate::egress::MediatorSettings;
use crate::instance::Instance;
use crate::meta::{Kind, Object};
use crate::names::Uid;
use crate::network::Nic;
use crate::numbers::Generation;
use crate::references::{Ref, Role, WokenBy};

/// The kind of mediators. A host has one, made from its configuration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mediator {}

impl Kind for Mediator {
    const NAME: &'static str = "mediator";
    const FINALIZER: &'static str = "mediator";
    type Spec = MediatorSpec;
    type Status = MediatorStatus;
    /// The process runs while there is a policy for it.
    const WOKEN_BY: &'static [WokenBy] =
        &[WokenBy::Gain(Role::MediatedBy), WokenBy::Release(Role::MediatedBy)];

    fn observed_generation(status: &Self::Status) -> Option<Generation> {
        Some(status.observed_generation)
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MediatorSpec {
    pub settings: MediatorSettings,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct MediatorStatus {
    pub conditions: Vec<Condition>,
    pub observed_generation: Generation,
    /// Process id, while the process runs.
    #[serde(default)]
    pub pid: Option<u32>,
    /// Number of processes that were started so far.
    #[serde(default)]
    pub launches: u64,
    /// Time of the last start.
    #[serde(default)]
    pub launched_at: Option<Timestamp>,
    /// Number of processes in a row that ended soon after their start, before the present one.
    #[serde(default)]
    pub short_lives: u32,
}

/// The kind of policies of instances, each owned by the network card whose traffic it governs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mediation {}

impl Kind for Mediation {
    const NAME: &'static str = "mediation";
    const FINALIZER: &'static str = "mediation";
    type Spec = MediationSpec;
    type Status = MediationStatus;
    const WOKEN_BY: &'static [WokenBy] =
        &[WokenBy::Owner, WokenBy::Target(Role::Mediates), WokenBy::Target(Role::MediatedBy)];

    fn observed_generation(status: &Self::Status) -> Option<Generation> {
        Some(status.observed_generation)
    }

    fn references(object: &Object<Self>) -> Vec<Ref> {
        let MediationSpec { instance, mediator, .. } = &object.spec;
        vec![Ref::to::<Instance>(Role::Mediates, instance), Ref::to::<Mediator>(Role::MediatedBy, mediator)]
    }
}

/// The desired state of a policy in the process. Its content is in the spec of the instance.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MediationSpec {
    pub instance: Uid,
    pub nic: Uid,
    pub mediator: Uid,
    /// Address of the guest.
    pub address: Ipv4Addr,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct MediationStatus {
    pub conditions: Vec<Condition>,
    pub observed_generation: Generation,
}

impl Object<Mediation> {
    /// Returns the reference from an instance's card, while a VM is behind the card or should be.
    #[must_use]
    pub fn card_in_use(&self) -> Ref {
        Ref::to::<Nic>(Role::Attaches, &self.spec.nic)
    }
}
