//! Admission of requests on an ingress.

use std::collections::BTreeSet;
use std::sync::Arc;

use stead_schemas::api::IngressRequest;
use stead_schemas::ingress::{Ingress, IngressRule, IngressSpec, TargetName};
use stead_schemas::instance::Instance;
use stead_schemas::limits::INGRESS_PORTS_MAX;
use stead_schemas::meta::{Kind, Object};
use stead_schemas::names::Uid;
use stead_schemas::references::{Role, Target};
use stead_schemas::validate::FieldErrors;

use crate::refused::{Refused, RefusedKind};
use crate::store::{New, Tx, TxError};

/// Claim table of host names. Each value is the shape of the host name, prefixed with the port.
const HOSTNAMES: &str = "ingress_hostname";

/// Stores an ingress. It holds its host names at their ports until it is gone.
///
/// # Errors
/// Returns `InstanceNotFound`, `AlreadyExists`, `HostnameInUse` or `Quota`.
pub fn create(tx: &mut Tx<'_>, request: IngressRequest) -> Result<Arc<Object<Ingress>>, Refused> {
    let IngressRequest { name, rules, tags } = request;
    check_instances(tx, &rules)?;
    check_ports(tx, &rules)?;
    if let Some(other) = tx.find::<Ingress>(&name) {
        let by = other.meta.uid.clone();
        return Err(TxError::NameTaken { kind: Ingress::NAME, name, by }.into());
    }
    let uid = tx.next_uid();
    claim_hostnames(tx, &rules, &uid)?;
    let spec = IngressSpec { rules };
    Ok(tx.create::<Ingress>(New { uid: Some(uid), name, tags, owner: None, spec })?)
}

/// Requests the deletion of an ingress.
///
/// # Errors
/// Returns `NotFound`.
pub fn delete(tx: &mut Tx<'_>, uid: &Uid) -> Result<(), Refused> {
    tx.request_deletion::<Ingress>(uid)?;
    Ok(())
}

/// Checks that the instances that rules name exist now; they may be deleted later.
fn check_instances(tx: &Tx<'_>, rules: &[IngressRule]) -> Result<(), Refused> {
    let mut errors = FieldErrors::default();
    for (index, rule) in rules.iter().enumerate() {
        let TargetName::Instance(name) = &rule.target.instance else { continue };
        let by_id = name.as_str().parse::<Uid>().ok().and_then(|uid| tx.get::<Instance>(&uid));
        let found = by_id.or_else(|| tx.find::<Instance>(name));
        if !found.is_some_and(|one| !one.meta.is_deleting() && !one.is_pooled()) {
            let path = format!("rules[{index}].target.instance");
            errors.push(path, "instance_not_found", format!("names no instance: {name}"));
        }
    }
    errors.into_result().map_err(|fields| Refused::fields(RefusedKind::InstanceNotFound, fields))
}

fn check_ports(tx: &Tx<'_>, rules: &[IngressRule]) -> Result<(), Refused> {
    let mut ports = tx.targets::<Ingress>(Role::Serves);
    ports.extend(rules.iter().map(|rule| Target::HostPort(rule.port)));
    if ports.len() > INGRESS_PORTS_MAX {
        let message = format!("ingresses would have {} ports; {INGRESS_PORTS_MAX} are allowed", ports.len());
        return Err(Refused::quota(message));
    }
    Ok(())
}

fn claim_hostnames(tx: &mut Tx<'_>, rules: &[IngressRule], uid: &Uid) -> Result<(), Refused> {
    let mut errors = FieldErrors::default();
    let mut own = BTreeSet::new();
    for (index, rule) in rules.iter().enumerate() {
        let IngressRule { hostname, port, .. } = rule;
        let value = format!("{port}/{}", hostname.shape());
        let by = match tx.claim(HOSTNAMES, &value, uid) {
            Ok(()) if own.insert(value) => continue,
            Ok(()) => "another rule of this ingress".to_owned(),
            Err(claimed) => match tx.get::<Ingress>(&claimed.by) {
                Some(other) => format!("the ingress {}", other.meta.name),
                None => format!("the ingress {}", claimed.by),
            },
        };
        let path = format!("rules[{index}].match.hostname");
        errors.push(path, "hostname_in_use", format!("is {hostname}, which {by} has at port {port}"));
    }
    errors.into_result().map_err(|fields| Refused::fields(RefusedKind::HostnameInUse, fields))
}
