//! Changes of settings of an instance. A running program is not disturbed.

use std::sync::Arc;

use jiff::Timestamp;
use stead_schemas::api::{BandwidthAsked, InstancePatch, check_fits};
use stead_schemas::instance::{Instance, Rates};
use stead_schemas::meta::Object;
use stead_schemas::names::Uid;
use stead_schemas::policy::Expiry;

use super::{declared, live};
use crate::nic::admission as nics;
use crate::refused::{Refused, RefusedKind};
use crate::store::Tx;

/// Changes the fields that the request names. A running program is not disturbed.
///
/// # Errors
/// Returns `NotFound`, `InvalidExpiry`, `InvalidHealthCheck`, `InvalidDownload` or `InvalidUpload`, `UnsupportedField` for
/// what the hypervisor cannot carry out, and `Expired` if the instance's time is over already.
pub fn update(tx: &mut Tx<'_>, uid: &Uid, patch: InstancePatch) -> Result<Arc<Object<Instance>>, Refused> {
    let (object, now) = (live(tx, uid)?, tx.now());
    if object.spec.expires_at.is_some_and(|at| at <= now) {
        return Err(Refused::new(RefusedKind::Expired, "the instance has expired and is being deleted"));
    }
    if let Some(policy) = patch.auto_standby.as_ref().filter(|policy| policy.timeout().is_some()) {
        declared(tx, object.spec.hypervisor)?.check_auto_standby(Some(policy), "auto_standby")?;
    }
    if patch.disk_rate.is_some() {
        declared(tx, object.spec.hypervisor)?.check_disk_rate(patch.disk_rate)?;
    }
    let expiry = patch.expiry.map(|expiry| expires_at(expiry, now)).transpose()?;
    if let Some(Some(check)) = &patch.health {
        let (has_network, has_agent) = (object.spec.has_network, !object.spec.skip_guest_agent);
        check_fits(check, has_network, has_agent).map_err(|why| {
            Refused::at(RefusedKind::InvalidHealthCheck, "health_check", format!("health_check {why}"))
        })?;
    }
    let rates = change_limits(tx, &object, patch.bandwidth)?;
    Ok(tx.update_spec::<Instance>(uid, None, |spec| {
        spec.rates = rates;
        if let Some(restart) = patch.restart {
            spec.restart = restart;
        }
        if let Some(at) = expiry {
            spec.expires_at = at;
        }
        if let Some(health) = patch.health.filter(|health| *health != spec.health) {
            spec.health = health;
            spec.health_version += 1;
        }
        if let Some(auto_standby) = patch.auto_standby {
            spec.auto_standby = Some(auto_standby);
        }
        if let Some(rate) = patch.disk_rate {
            spec.rates.disk = Some(rate);
        }
    })?)
}

/// Changes the limits of the instance's card. Returns the rates that the instance has then.
fn change_limits(
    tx: &mut Tx<'_>,
    object: &Object<Instance>,
    asked: BandwidthAsked,
) -> Result<Rates, Refused> {
    let Some(nic) = &object.spec.allocated.nic else {
        let problems = asked.without_network();
        let kind = match problems.iter().next() {
            None => return Ok(object.spec.rates),
            Some(_) if asked.download.is_some_and(|rate| rate.0 > 0) => RefusedKind::InvalidDownload,
            Some(_) => RefusedKind::InvalidUpload,
        };
        return Err(Refused::fields(kind, problems));
    };
    let rates = asked.changed(object.spec.rates);
    if rates != object.spec.rates {
        nics::limit(tx, nic, &rates, object.spec.vcpus)?;
    }
    Ok(rates)
}

/// Returns the expiry that a request asks for, as a time.
pub(super) fn expires_at(expiry: Expiry, now: Timestamp) -> Result<Option<Timestamp>, Refused> {
    match expiry {
        Expiry::Never => Ok(None),
        // A time beyond the last representable time means that the instance never expires.
        Expiry::After(life) => Ok(now.checked_add(life).ok()),
        Expiry::At(at) if at > now => Ok(Some(at)),
        Expiry::At(_) => {
            let message = "expires_at must be in the future";
            Err(Refused::at(RefusedKind::InvalidExpiry, "expires_at", message))
        }
    }
}
