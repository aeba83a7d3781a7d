//! What of an answer only some may see.

use stead_schemas::api::{Ingress, Instance};
use stead_schemas::instance::Secret;

use super::auth::{Bearer, Scope};

/// Stands for a value that is not told.
const MASK: &str = "***";

/// An instance as its reader may see it: which variables there are is told to all.
pub(super) fn instance(bearer: &Bearer, mut view: Instance) -> Instance {
    if !bearer.sees(Scope::InstanceSecrets) {
        view.env.values_mut().for_each(|value| MASK.clone_into(value));
    }
    view
}

/// Likewise an ingress: that a header lets in is told to all.
pub(super) fn ingress(bearer: &Bearer, mut view: Ingress) -> Ingress {
    if !bearer.sees(Scope::IngressSecrets) {
        let auths = view.rules.iter_mut().filter_map(|rule| rule.request_header_auth.as_mut());
        auths.for_each(|auth| auth.value = Secret(MASK.to_owned()));
    }
    view
}
