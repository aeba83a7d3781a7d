//! Changes of the values of credentials, which apply at once: the guest has only placeholders.

use std::collections::BTreeMap;

use stead_schemas::egress::EgressSpec;
use stead_schemas::instance::{InstanceSpec, Secret};
use stead_schemas::limits::EGRESS_VALUE_BYTES_MAX;

use crate::refused::{Refused, RefusedKind};

/// Takes the changes of sources of credentials out of the changes that wait for the next start. Returns the new values.
///
/// # Errors
/// Returns `Invalid` for the removal of a source, and for a value that cannot be injected.
pub(super) fn take_sources(
    spec: &InstanceSpec,
    env: &mut BTreeMap<String, Option<Secret>>,
) -> Result<BTreeMap<String, Secret>, Refused> {
    let Some(egress) = &spec.egress else { return Ok(BTreeMap::new()) };
    let names: Vec<String> = env.keys().filter(|name| egress.is_source(name)).cloned().collect();
    let mut values = BTreeMap::new();
    for name in names {
        let value = env.remove(&name).flatten();
        check(egress, &name, value.as_ref()).map_err(|why| {
            let path = format!("env[{name}]");
            Refused::at(RefusedKind::Invalid, path.clone(), format!("{path} {why}"))
        })?;
        values.extend(value.map(|value| (name, value)));
    }
    Ok(values)
}

/// Checks a value of the credentials that have this source.
fn check(egress: &EgressSpec, name: &str, value: Option<&Secret>) -> Result<(), String> {
    let Some(value) = value.filter(|value| !value.0.trim().is_empty()) else {
        return Err("is the source of a credential, and must be present and non-empty".to_owned());
    };
    if value.0.len() > EGRESS_VALUE_BYTES_MAX {
        return Err(format!("has a value of more than {EGRESS_VALUE_BYTES_MAX} bytes"));
    }
    let its = egress.credentials.values().filter(|credential| credential.source.env == name);
    for injection in its.flat_map(|credential| &credential.inject) {
        injection.target.format.apply(value).map(drop).map_err(|error| error.to_string())?;
    }
    Ok(())
}
