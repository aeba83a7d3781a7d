//! Admission of the node of this host, and of requests by the capabilities that its hypervisors declare.

use std::sync::Arc;

use stead_schemas::capabilities::VmmCapabilities;
use stead_schemas::instance::Hypervisor;
use stead_schemas::meta::{Object, Tags};
use stead_schemas::names::Name;
use stead_schemas::node::{LOCAL, Node, NodeSpec};
use stead_schemas::validate::FieldErrors;

use crate::refused::{Refused, RefusedKind};
use crate::store::{New, Tx, TxError};

/// Sets the node of this host to the configuration. A record that cannot be read is replaced: its spec comes
/// from the configuration, and its status is observed again.
///
/// # Errors
/// Returns a refusal by the store's rules.
pub fn declare(tx: &mut Tx<'_>, spec: NodeSpec) -> Result<(), Refused> {
    let name = name()?;
    if let Some(node) = tx.find::<Node>(&name) {
        tx.update_spec::<Node>(&node.meta.uid, None, |old| *old = spec)?;
        return Ok(());
    }
    let new = |spec| New { uid: None, name: name.clone(), tags: Tags::new(), owner: None, spec };
    match tx.create::<Node>(new(spec.clone())) {
        Err(TxError::NameTaken { kind, by, .. }) if tx.remove_unreadable(kind, &by) => {
            tx.create::<Node>(new(spec))?;
        }
        created => drop(created?),
    }
    Ok(())
}

fn name() -> Result<Name, Refused> {
    Name::resource(LOCAL).map_err(|error| Refused::conflict(error.to_string()))
}

/// Returns the node of this host.
///
/// # Errors
/// Returns `NotObserved` before the first observation of the host.
pub fn local(tx: &Tx<'_>) -> Result<Arc<Object<Node>>, Refused> {
    let node = tx.find::<Node>(&name()?).filter(|node| node.is_observed());
    node.ok_or_else(not_observed)
}

/// Makes the refusal of a request that came before the first observation of the host.
#[must_use]
pub fn not_observed() -> Refused {
    Refused::new(RefusedKind::NotObserved, "the host was not observed yet")
}

/// Returns what VMs on a hypervisor can do.
///
/// # Errors
/// Returns `UnsupportedVerb` if this host has no driver for it, and the error of [`local`].
pub(crate) fn capabilities(tx: &Tx<'_>, hypervisor: Hypervisor) -> Result<VmmCapabilities, Refused> {
    let node = local(tx)?;
    declared(&node, hypervisor)
}

/// Returns what VMs on a hypervisor of a node can do.
///
/// # Errors
/// Returns `UnsupportedVerb` if the node has no driver for it.
pub(crate) fn declared(node: &Object<Node>, hypervisor: Hypervisor) -> Result<VmmCapabilities, Refused> {
    node.capabilities(hypervisor).ok_or_else(|| {
        let message = format!("this host has no driver for {}", hypervisor.as_str());
        Refused::new(RefusedKind::UnsupportedVerb, message)
    })
}

/// Runs the steps of a request, and refuses it if they take more of this host than is left. What the request does not
/// need more of is not checked, so that a host with too little can always be relieved. Before the first observation of
/// the host nothing is known to be short.
///
/// # Errors
/// Returns `NoRoom` with what was asked and what is left of each resource that is short, and the errors of the steps.
pub(crate) fn within_room<T>(
    tx: &mut Tx<'_>,
    steps: impl FnOnce(&mut Tx<'_>) -> Result<T, Refused>,
) -> Result<T, Refused> {
    let before = tx.usage();
    let done = steps(tx)?;
    let after = tx.usage();
    let lacks = tx.find::<Node>(&name()?).map_or_else(Vec::new, |node| node.lacks(&before, &after));
    if lacks.is_empty() {
        return Ok(done);
    }
    let mut fields = FieldErrors::default();
    for lack in lacks {
        fields.push(lack.resource.as_str(), "insufficient_resources", lack);
    }
    Err(Refused::fields(RefusedKind::NoRoom, fields))
}

/// Checks a capability that a verb needs.
///
/// # Errors
/// Returns `UnsupportedVerb`.
pub(crate) fn check_verb(hypervisor: Hypervisor, has: bool, verb: &str) -> Result<(), Refused> {
    if has {
        return Ok(());
    }
    let message = format!("{verb} is not supported by {}", hypervisor.as_str());
    Err(Refused::new(RefusedKind::UnsupportedVerb, message))
}

/// Checks a capability that the value of a field needs.
///
/// # Errors
/// Returns `UnsupportedField` with the path of the field.
pub(crate) fn check_field(hypervisor: Hypervisor, has: bool, path: &str) -> Result<(), Refused> {
    if has {
        return Ok(());
    }
    Err(Refused::unsupported(path, format!("is not supported by {}", hypervisor.as_str())))
}
