//! Removal of secrets from responses to readers that may not see them.

use stead_schemas::api::{Ingress, Instance, MASK};
use stead_schemas::instance::Secret;

use super::auth::{Bearer, Scope};

/// Returns an instance without the secrets that its reader may not see; the names of variables are visible
/// to all.
pub(super) fn instance(bearer: &Bearer, mut view: Instance) -> Instance {
    if !bearer.sees(Scope::InstanceSecrets) {
        view.env.values_mut().for_each(|value| MASK.clone_into(value));
    }
    view
}

/// Returns an ingress without the secrets that its reader may not see; the existence of a header check is
/// visible to all.
pub(super) fn ingress(bearer: &Bearer, mut view: Ingress) -> Ingress {
    if !bearer.sees(Scope::IngressSecrets) {
        let auths = view.rules.iter_mut().filter_map(|rule| rule.request_header_auth.as_mut());
        auths.for_each(|auth| auth.value = Secret(MASK.to_owned()));
    }
    view
}
