//! Observations of an ingress.

use std::collections::{BTreeMap, BTreeSet};

use stead_schemas::ingress::{Ingress, IngressRule};
use stead_schemas::meta::Object;
use stead_schemas::names::Uid;

use super::{IngressReconciler, by_port};
use crate::host::{Host, HostError, Listeners};

/// An observation of an ingress.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Observed {
    pub owner: Uid,
    pub served: BTreeMap<u16, Vec<IngressRule>>,
    /// Ports of the spec at which none of its rules are served, because another program has them.
    pub taken: BTreeSet<u16>,
}

pub(super) async fn observe<H: Host>(
    reconciler: &IngressReconciler<H>,
    uid: &Uid,
    object: Option<&Object<Ingress>>,
) -> Result<Observed, HostError> {
    let listeners = reconciler.host.listeners();
    let served = listeners.inspect(uid).await?;
    let wanted = object.filter(|object| !object.meta.is_deleting());
    let wanted = wanted.map(|object| by_port(&object.spec.rules)).unwrap_or_default();
    let mut taken = BTreeSet::new();
    for &port in wanted.keys().filter(|port| !served.contains_key(port)) {
        if !listeners.is_free(port).await? {
            taken.insert(port);
        }
    }
    Ok(Observed { owner: uid.clone(), served, taken })
}
