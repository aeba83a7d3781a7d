//! Changes of an instance: at once where a running program can take them over, otherwise from its next start on.

use std::collections::BTreeMap;
use std::sync::Arc;

use jiff::Timestamp;
use stead_schemas::api::{Applies, HOTPLUGGED, InstancePatch, check_env, check_fits, check_part};
use stead_schemas::disk::{Disk, DiskPurpose, DiskSpec};
use stead_schemas::goal::Goal;
use stead_schemas::instance::{
    CardChange, Instance, InstanceSpec, Pending, Power, PowerCause, Secret, State,
};
use stead_schemas::meta::Object;
use stead_schemas::names::Uid;
use stead_schemas::network::Nic;
use stead_schemas::numbers::Generation;
use stead_schemas::policy::Expiry;
use stead_schemas::quantity::Bytes;

use super::live_volumes::{self, forget_leaving};
use super::power::set_power;
use super::{declared, egress, image, live, network, owner};
use crate::disk::admission::new_disk;
use crate::nic::admission as nics;
use crate::node::admission::within_room;
use crate::refused::{Refused, RefusedKind};
use crate::snapshot::admission as snapshots;
use crate::store::Tx;

/// An instance after a change, and when the change of each field applies.
#[derive(Debug)]
pub struct Updated {
    pub object: Arc<Object<Instance>>,
    pub changes: BTreeMap<String, Applies>,
    /// The image object that the request asks for, if it asks for any.
    pub image: Option<Uid>,
}

/// Changes the fields that the request names.
///
/// # Errors
/// Returns `NotFound`, `Expired` if the instance's time is over already, `InvalidState` if a program in standby should
/// be started again, `NameTaken`, `ImageNotReady`, `InvalidExpiry`, `InvalidHealthCheck`, `InvalidDownload` or
/// `InvalidUpload`, `Invalid`, `UnsupportedField` for what the hypervisor cannot carry out, and `NoRoom`.
pub fn update(
    tx: &mut Tx<'_>,
    uid: &Uid,
    mut patch: InstancePatch,
    tap_prefix: &str,
) -> Result<Updated, Refused> {
    let object = live(tx, uid)?;
    if object.spec.expires_at.is_some_and(|at| at <= tx.now()) {
        return Err(Refused::new(RefusedKind::Expired, "the instance has expired and is being deleted"));
    }
    let applies = deferred_apply(&object, patch.restarts)?;
    let values = egress::take_sources(&object.spec, &mut patch.deferred.env)?;
    let rotated = (!values.is_empty()).then(|| ("env".to_owned(), Applies::Now));
    let at_once = patch.live.iter().map(|name| ((*name).to_owned(), Applies::Now)).chain(rotated);
    let deferred = patch.deferred.fields().into_iter().chain(patch.others.iter().copied());
    let deferred = deferred.map(|name| (name.to_owned(), applies));
    let changes = at_once.chain(deferred).collect();
    let names_image = patch.image.is_some();
    let object = within_room(tx, |tx| stage(tx, &object, patch, values, applies, tap_prefix))?;
    let spec = &object.spec;
    let image = spec.pending.image.as_ref().map_or(&spec.allocated.image, |next| &next.image);
    let image = names_image.then(|| image.clone());
    Ok(Updated { object, changes, image })
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
    values: BTreeMap<String, Secret>,
    applies: Applies,
    tap_prefix: &str,
) -> Result<Arc<Object<Instance>>, Refused> {
    let (uid, now) = (&object.meta.uid, tx.now());
    let expiry = patch.expiry.map(|expiry| expires_at(expiry, now)).transpose()?;
    let mut next = object.spec.clone();
    next.defer(patch.deferred);
    let image = image::change(tx, &next, patch.image)?;
    let (rates, card) = network::change(tx, object, &next.after_start(), patch.network, tap_prefix)?;
    let pending = Pending { image, card, ..next.pending };
    if let Some(name) = patch.name {
        snapshots::rename_source(tx, uid, &name)?;
        tx.rename::<Instance>(uid, name)?;
    }
    if let Some(volumes) = patch.volumes {
        live_volumes::replace(tx, uid, volumes)?;
    }
    if let Some(tags) = patch.tags {
        tx.update_tags::<Instance>(uid, None, tags)?;
    }
    let changed = tx.update_spec::<Instance>(uid, None, |spec| {
        spec.rates = rates;
        spec.env.extend(values);
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
        spec.pending = pending;
        if applies == Applies::WithRestart {
            set_power(spec, Power::Running, PowerCause::Client, now);
            // A program is not ended for an image that may be long in coming.
            spec.pending.restarts = spec.pending.image.is_some();
            if !spec.pending.restarts {
                spec.run = spec.run.next();
            }
        }
        if spec.pending.fields().is_empty() {
            spec.pending = Pending::default();
        }
    })?;
    check(tx, &object.spec, &changed.spec.after_start())?;
    if applies == Applies::Now { applied(tx, &changed) } else { Ok(changed) }
}

/// Checks what was changed of a spec.
fn check(tx: &Tx<'_>, before: &InstanceSpec, spec: &InstanceSpec) -> Result<(), Refused> {
    let has_agent = !spec.skip_guest_agent;
    if let Some(check) =
        spec.health.as_ref().filter(|_| spec.health != before.health || has_other_reach(before, spec))
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

/// True if health checks reach the program in another way.
fn has_other_reach(before: &InstanceSpec, spec: &InstanceSpec) -> bool {
    (spec.has_network, spec.skip_guest_agent) != (before.has_network, before.skip_guest_agent)
}

/// Carries out the changes that wait for a start, or begins that start for a program that runs and waited for its new
/// image, if the spec is still of this generation.
///
/// # Errors
/// Returns a refusal by the store's rules. What has changed meanwhile is left as it is.
pub fn apply_changes(tx: &mut Tx<'_>, uid: &Uid, generation: Generation) -> Result<(), Refused> {
    let object = live(tx, uid).ok().filter(|object| object.meta.generation == generation);
    let Some(object) = object else { return Ok(()) };
    if object.spec.pending.restarts && matches!(object.goal(), Goal::Running(_)) {
        tx.update_spec::<Instance>(uid, None, |spec| {
            (spec.run, spec.pending.restarts) = (spec.run.next(), false);
        })?;
        return Ok(());
    }
    applied(tx, &object).map(drop)
}

fn applied(tx: &mut Tx<'_>, object: &Object<Instance>) -> Result<Arc<Object<Instance>>, Refused> {
    forget_leaving(tx, object)?;
    let (uid, before) = (&object.meta.uid, &object.spec);
    let next = before.after_start();
    let disk = match &before.pending.image {
        Some(_) => Some(replace_disk(tx, object, next.overlay)?),
        None => None,
    };
    let changed = tx.update_spec::<Instance>(uid, None, |spec| {
        spec.apply_pending();
        spec.allocated.disk = disk.unwrap_or_else(|| spec.allocated.disk.clone());
    })?;
    let spec = &changed.spec;
    if spec.overlay > before.overlay {
        tx.update_spec::<Disk>(&spec.allocated.disk, None, |disk| disk.size = spec.overlay)?;
    }
    if let Some(nic) =
        before.allocated.nic.as_ref().filter(|_| before.pending.card == Some(CardChange::Remove))
    {
        tx.request_deletion::<Nic>(nic)?;
    }
    // The default limits of traffic depend on the number of processors.
    let has_other_limits = spec.vcpus != before.vcpus || spec.allocated.nic != before.allocated.nic;
    if let Some(nic) = spec.allocated.nic.as_ref().filter(|_| has_other_limits) {
        nics::limit(tx, nic, &spec.rates, spec.vcpus)?;
    }
    Ok(changed)
}

/// Replaces the root disk of an instance by an empty one, which never had another image below it.
fn replace_disk(tx: &mut Tx<'_>, object: &Object<Instance>, size: Bytes) -> Result<Uid, Refused> {
    let disk = new_disk(tx, owner(&object.meta.uid), DiskSpec::empty(size, DiskPurpose::RootOverlay))?;
    tx.request_deletion::<Disk>(&object.spec.allocated.disk)?;
    Ok(disk)
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
