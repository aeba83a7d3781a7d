//! Admission of requests on an instance: checks, references and allocations, all within the commit that
//! stores the spec. There is a file for each subject.
//!
//! Guarantees: a refused request stages nothing.

mod auto_standby;
mod capabilities;
mod create;
mod delete;
mod egress;
mod fork;
mod from_snapshot;
mod image;
mod live_volumes;
mod network;
mod pool;
mod power;
mod reclaim;
mod restore;
#[cfg(test)]
mod tests;
mod update;
#[cfg(test)]
mod update_tests;
mod volumes;

use std::sync::Arc;

use stead_schemas::instance::{Hypervisor, Instance};
use stead_schemas::meta::{Kind, Object, OwnerRef};
use stead_schemas::names::Uid;

pub use auto_standby::{hold, regrant, stand_by, wake};
pub use create::create;
pub use delete::{delete, expire};
pub use fork::{ForkRequest, Forked, fork, fork_snapshot};
pub use from_snapshot::Target;
pub use live_volumes::{attach, detach, forget_volumes, keep_volume};
pub use pool::scale;
pub use power::{restore, standby, start, stop};
pub use reclaim::{Share, plan_reclaim, reclaim};
pub use restore::restore_snapshot;
pub use update::{Updated, apply_changes, update};

use capabilities::Declared;

use crate::node::admission as nodes;
pub use crate::refused::Refused;
use crate::store::Tx;

pub(super) fn live(tx: &Tx<'_>, uid: &Uid) -> Result<Arc<Object<Instance>>, Refused> {
    let object = tx.get::<Instance>(uid);
    object.filter(|object| !object.meta.is_deleting() && !object.is_pooled()).ok_or_else(|| no_instance(uid))
}

fn no_instance(uid: &Uid) -> Refused {
    Refused::absent::<Instance>(uid)
}

/// Returns the reference of an object to the instance that owns it.
fn owner(uid: &Uid) -> OwnerRef {
    OwnerRef { kind: Instance::NAME.to_owned(), uid: uid.clone() }
}

/// Returns what the hypervisor of an instance declares.
///
/// # Errors
/// Returns `UnsupportedVerb` if this host has no driver for it, and `NotObserved` before the first observation
/// of the host.
fn declared(tx: &Tx<'_>, hypervisor: Hypervisor) -> Result<Declared, Refused> {
    Ok(Declared { hypervisor, has: nodes::capabilities(tx, hypervisor)? })
}
