//! Deletions of instances: on request, and of those whose time is over.

use stead_schemas::instance::Instance;
use stead_schemas::names::Uid;

use super::{live, no_instance};
use crate::refused::Refused;
use crate::store::Tx;
use crate::vm::failed_forks;

/// Requests the deletion of the instance, without a grace period if `is_forced`.
///
/// # Errors
/// Returns `NotFound`.
pub fn delete(tx: &mut Tx<'_>, uid: &Uid, is_forced: bool) -> Result<(), Refused> {
    live(tx, uid)?;
    if is_forced {
        tx.update_spec::<Instance>(uid, None, |spec| spec.is_forced = true)?;
    }
    tx.request_deletion::<Instance>(uid)?;
    Ok(())
}

/// Requests the deletion of the instance if its time is over, if it is a pooled instance (its VM has ended
/// then), or if it is a fork that can never begin. A pooled instance that a fork took meanwhile is kept.
///
/// # Errors
/// Returns `NotFound`.
pub fn expire(tx: &mut Tx<'_>, uid: &Uid) -> Result<(), Refused> {
    let object = tx.get::<Instance>(uid).ok_or_else(|| no_instance(uid))?;
    // A patch may have changed the expiry in between.
    let is_over = object.spec.expires_at.is_some_and(|at| at <= tx.now());
    if object.is_pooled() || is_over || failed_forks::has_failed_in(tx, &object) {
        tx.request_deletion::<Instance>(uid)?;
    }
    Ok(())
}
