//! The verbs on the power state: start, stop, standby and restore.

use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use stead_schemas::api::{InstanceStart, StandbyRequest};
use stead_schemas::compression::DesiredCompression;
use stead_schemas::instance::{Instance, InstanceSpec, Power, PowerCause, State};
use stead_schemas::meta::Object;
use stead_schemas::names::Uid;
use stead_schemas::numbers::GrantNo;

use super::capabilities::Declared;
use super::{declared, live};
use crate::node::admission::{check_verb, within_room};
use crate::refused::Refused;
use crate::store::Tx;

/// Requests the next run. While the requested run has not started yet, another call is the same request.
///
/// # Errors
/// Returns `InvalidState` while the instance runs, and `NoRoom`.
pub fn start(tx: &mut Tx<'_>, uid: &Uid, start: InstanceStart) -> Result<Arc<Object<Instance>>, Refused> {
    let object = live(tx, uid)?;
    // An instance that waits for its restart is started now.
    let is_waiting = object.status.restart.next_attempt_at.is_some();
    let is_up = object.spec.power == Power::Running && object.goal().run().is_some() && !is_waiting;
    match (is_up, object.status.state) {
        // A start must not throw away the memory that the instance would be restored from.
        (_, state) if object.spec.power == Power::Standby && state != State::Stopped => {
            Err(Refused::state("start", state, "Stopped"))
        }
        (true, state @ State::Running) => Err(Refused::state("start", state, "Stopped")),
        (true, _) => Ok(object),
        (false, _) => {
            let now = tx.now();
            let start = |spec: &mut InstanceSpec| {
                set_power(spec, Power::Running, PowerCause::Client, now);
                spec.run = spec.run.next();
                if let Some(entrypoint) = start.entrypoint {
                    spec.entrypoint = Some(entrypoint);
                }
                if let Some(cmd) = start.cmd {
                    spec.cmd = Some(cmd);
                }
            };
            grant(tx, uid, start)
        }
    }
}

/// Requests that the VM be down.
///
/// # Errors
/// Returns `InvalidState` if the VM is down already.
pub fn stop(tx: &mut Tx<'_>, uid: &Uid) -> Result<Arc<Object<Instance>>, Refused> {
    let object = live(tx, uid)?;
    // Between an end and its restart the VM is down although the spec asks for it: a stop ends that. A stop
    // after a requested restore ends a standby that does not come back.
    let is_kept = object.status.state == State::Standby && object.spec.power == Power::Standby;
    let is_down = is_kept || object.status.state == State::Stopped && object.goal().run().is_none();
    match (object.spec.power, is_down) {
        (_, true) => {
            let state = object.status.state;
            Err(Refused::state("stop", state, "Created, Initializing, Running, Paused, Shutdown or Unknown"))
        }
        (Power::Stopped, false) => Ok(object),
        (Power::Running | Power::Standby | Power::Warm, false) => {
            let now = tx.now();
            Ok(tx.update_spec::<Instance>(uid, None, |spec| {
                set_power(spec, Power::Stopped, PowerCause::Client, now);
            })?)
        }
    }
}

/// Requests a standby: the VM's memory is kept and its process ends. While the standby is in progress,
/// another call is the same request.
///
/// # Errors
/// Returns `InvalidState` unless the instance runs.
pub fn standby(
    tx: &mut Tx<'_>,
    uid: &Uid,
    request: StandbyRequest,
) -> Result<Arc<Object<Instance>>, Refused> {
    let object = live(tx, uid)?;
    let state = object.status.state;
    match (object.spec.power, state) {
        // The request takes over an automatic standby that is in progress, so that a connection no longer
        // undoes it.
        (Power::Standby, State::Running | State::Paused | State::Created | State::Initializing) => {
            Ok(tx.update_spec::<Instance>(uid, None, |spec| spec.power_by = PowerCause::Client)?)
        }
        (Power::Running, State::Running) => {
            let Declared { hypervisor, has } = declared(tx, object.spec.hypervisor)?;
            check_verb(hypervisor, has.standby, "a standby")?;
            let now = tx.now();
            Ok(tx.update_spec::<Instance>(uid, None, |spec| {
                set_power(spec, Power::Standby, PowerCause::Client, now);
                spec.standby = spec.standby.next();
                spec.compression = desired_compression(spec, request, now);
            })?)
        }
        _ => Err(Refused::state("standby", state, "Running")),
    }
}

/// Returns the compression to apply. The request overrides the instance's policy.
pub(super) fn desired_compression(
    spec: &InstanceSpec,
    request: StandbyRequest,
    now: Timestamp,
) -> Option<DesiredCompression> {
    let policy = spec.snapshot_policy.unwrap_or_default();
    let how = request.compression.or(policy.compression)?;
    let delay = request.delay.or(policy.delay).map_or(Duration::ZERO, |delay| delay.0);
    // A time beyond the last representable time means that the memory is never compressed.
    Some(DesiredCompression { how, not_before: now.checked_add(delay).unwrap_or(Timestamp::MAX) })
}

/// Requests that the VM continue from its kept memory. Before the memory is kept, it cancels the standby.
///
/// # Errors
/// Returns `InvalidState` unless the instance is in standby, or on its way there or back, and `NoRoom`.
pub fn restore(tx: &mut Tx<'_>, uid: &Uid) -> Result<Arc<Object<Instance>>, Refused> {
    let object = live(tx, uid)?;
    let state = object.status.state;
    match (object.spec.power, state) {
        (Power::Standby, State::Stopped) => {}
        (Power::Standby, _) => {
            let now = tx.now();
            return grant(tx, uid, |spec| set_power(spec, Power::Running, PowerCause::Client, now));
        }
        (Power::Running, State::Standby) => return Ok(object),
        _ => {}
    }
    Err(Refused::state("restore", state, "Standby"))
}

/// Changes a spec so that the instance may have a VM, and grants it the room for that. An instance that has not given
/// the grant before back asks for nothing more.
///
/// # Errors
/// Returns `NoRoom`.
pub(super) fn grant(
    tx: &mut Tx<'_>,
    uid: &Uid,
    change: impl FnOnce(&mut InstanceSpec),
) -> Result<Arc<Object<Instance>>, Refused> {
    within_room(tx, |tx| {
        Ok(tx.update_spec::<Instance>(uid, None, |spec| {
            change(spec);
            spec.grant = spec.grant.next();
        })?)
    })
}

/// Changes the desired power state.
pub(super) fn set_power(spec: &mut InstanceSpec, power: Power, by: PowerCause, now: Timestamp) {
    if matches!(spec.power, Power::Running | Power::Warm) {
        // An instance of an earlier version holds what it has until its VM is gone, too.
        spec.grant = spec.grant.max(GrantNo(1));
    }
    spec.power = power;
    spec.power_by = by;
    spec.power_since = now;
}
