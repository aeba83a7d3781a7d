//! Changes of an instance: at once where a running program can take them over, otherwise from its next start on.

use std::collections::BTreeMap;
use std::sync::Arc;

use jiff::Timestamp;
use stead_schemas::api::{
    Applies, BandwidthAsked, HOTPLUGGED, InstancePatch, check_env, check_fits, check_part,
};
use stead_schemas::disk::Disk;
use stead_schemas::goal::Goal;
use stead_schemas::instance::{Instance, InstanceSpec, Power, PowerCause, Rates, State};
use stead_schemas::meta::Object;
use stead_schemas::names::Uid;
use stead_schemas::numbers::Generation;
use stead_schemas::policy::Expiry;

use super::live_volumes::forget_leaving;
use super::power::set_power;
use super::{declared, live};
use crate::nic::admission as nics;
use crate::node::admission::within_room;
use crate::refused::{Refused, RefusedKind};
use crate::store::Tx;

/// An instance after a change, and when the change of each field applies.
#[derive(Debug)]
pub struct Updated {
    pub object: Arc<Object<Instance>>,
    pub changes: BTreeMap<String, Applies>,
}

/// Changes the fields that the request names.
///
/// # Errors
/// Returns `NotFound`, `Expired` if the instance's time is over already, `InvalidState` if a program in standby should
/// be started again, `InvalidExpiry`, `InvalidHealthCheck`, `InvalidDownload` or `InvalidUpload`, `Invalid`,
/// `UnsupportedField` for what the hypervisor cannot carry out, and `NoRoom`.
pub fn update(tx: &mut Tx<'_>, uid: &Uid, patch: InstancePatch) -> Result<Updated, Refused> {
    let object = live(tx, uid)?;
    if object.spec.expires_at.is_some_and(|at| at <= tx.now()) {
        return Err(Refused::new(RefusedKind::Expired, "the instance has expired and is being deleted"));
    }
    let applies = deferred_apply(&object, patch.restarts)?;
    let at_once = patch.live.iter().map(|name| ((*name).to_owned(), Applies::Now));
    let deferred = patch.deferred.fields().into_iter().map(|name| (name.to_owned(), applies));
    let changes = at_once.chain(deferred).collect();
    let object = within_room(tx, |tx| stage(tx, &object, patch, applies))?;
    Ok(Updated { object, changes })
}

/// Returns when changes apply that a running program cannot see.
fn deferred_apply(object: &Object<Instance>, restarts: bool) -> Result<Applies, Refused> {
    match (object.goal(), object.status.state) {
        (Goal::Stopped | Goal::Absent, State::Stopped) => Ok(Applies::Now),
        (Goal::Running(_), _) if restarts => Ok(Applies::WithRestart),
        (Goal::Standby(_), state) if restarts => Err(Refused::state("restart", state, "Running")),
        _ => Ok(Applies::AtNextStart),
    }
}

fn stage(
    tx: &mut Tx<'_>,
    object: &Object<Instance>,
    patch: InstancePatch,
    applies: Applies,
) -> Result<Arc<Object<Instance>>, Refused> {
    let (uid, now) = (&object.meta.uid, tx.now());
    let expiry = patch.expiry.map(|expiry| expires_at(expiry, now)).transpose()?;
    let rates = change_limits(tx, object, patch.bandwidth)?;
    if let Some(tags) = patch.tags {
        tx.update_tags::<Instance>(uid, None, tags)?;
    }
    let changed = tx.update_spec::<Instance>(uid, None, |spec| {
        spec.rates = rates;
        spec.restart = patch.restart_policy.unwrap_or_else(|| spec.restart.clone());
        spec.expires_at = expiry.unwrap_or(spec.expires_at);
        if let Some(health) = patch.health.filter(|health| *health != spec.health) {
            spec.health = health;
            spec.health_version += 1;
        }
        spec.auto_standby = patch.auto_standby.or_else(|| spec.auto_standby.take());
        spec.snapshot_policy = patch.snapshot_policy.or(spec.snapshot_policy);
        spec.rates.disk = patch.disk_rate.or(spec.rates.disk);
        spec.hotplugged = patch.hotplugged.or(spec.hotplugged);
        spec.defer(patch.deferred);
        if applies == Applies::WithRestart {
            set_power(spec, Power::Running, PowerCause::Client, now);
            spec.run = spec.run.next();
        }
    })?;
    check(tx, &object.spec, &changed.spec.after_start())?;
    if applies == Applies::Now { applied(tx, &changed) } else { Ok(changed) }
}

/// Checks what was changed of a spec.
fn check(tx: &Tx<'_>, before: &InstanceSpec, spec: &InstanceSpec) -> Result<(), Refused> {
    let has_agent = !spec.skip_guest_agent;
    if let Some(check) = spec
        .health
        .as_ref()
        .filter(|_| spec.health != before.health || spec.skip_guest_agent != before.skip_guest_agent)
    {
        check_fits(check, spec.has_network, has_agent).map_err(|why| {
            Refused::at(RefusedKind::InvalidHealthCheck, "health_check", format!("health_check {why}"))
        })?;
    }
    if spec.overlay < before.overlay {
        let message = format!(
            "overlay_size must be at least the present size of {}: disks do not shrink",
            before.overlay
        );
        return Err(Refused::at(RefusedKind::Invalid, "overlay_size", message));
    }
    if spec.hotplugged != before.hotplugged {
        check_part(spec.hotplugged, spec.hotplug)
            .map_err(|why| Refused::at(RefusedKind::Invalid, HOTPLUGGED, format!("{HOTPLUGGED} {why}")))?;
    }
    check_env(&spec.env).map_err(|why| Refused::at(RefusedKind::Invalid, "env", format!("env {why}")))?;
    // The host may have lost its hypervisor since; that does not stand in the way of other changes.
    let is_other =
        spec.hypervisor != before.hypervisor || spec.vcpus != before.vcpus || spec.hotplug != before.hotplug;
    let is_limited = spec.rates.disk != before.rates.disk;
    let is_policy =
        spec.auto_standby != before.auto_standby || spec.snapshot_policy != before.snapshot_policy;
    if is_other || is_limited || is_policy {
        let declared = declared(tx, spec.hypervisor)?;
        declared.check(spec)?;
        declared.check_volumes(&spec.volumes)?;
    }
    Ok(())
}

/// Carries out the changes that wait for a start, if the spec is still of this generation.
///
/// # Errors
/// Returns a refusal by the store's rules. What has changed meanwhile is left as it is.
pub fn apply_changes(tx: &mut Tx<'_>, uid: &Uid, generation: Generation) -> Result<(), Refused> {
    let object = live(tx, uid).ok().filter(|object| object.meta.generation == generation);
    object.map_or(Ok(()), |object| applied(tx, &object).map(drop))
}

fn applied(tx: &mut Tx<'_>, object: &Object<Instance>) -> Result<Arc<Object<Instance>>, Refused> {
    forget_leaving(tx, object)?;
    let changed = tx.update_spec::<Instance>(&object.meta.uid, None, InstanceSpec::apply_pending)?;
    if changed.spec.overlay > object.spec.overlay {
        tx.update_spec::<Disk>(&changed.spec.allocated.disk, None, |disk| disk.size = changed.spec.overlay)?;
    }
    // The default limits of traffic depend on the number of processors.
    if let Some(nic) = changed.spec.allocated.nic.as_ref().filter(|_| changed.spec.vcpus != object.spec.vcpus)
    {
        nics::limit(tx, nic, &changed.spec.rates, changed.spec.vcpus)?;
    }
    Ok(changed)
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
