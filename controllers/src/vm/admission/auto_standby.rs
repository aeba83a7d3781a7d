//! Automatic changes of the spec: to standby when no client is connected, and back when a client connects.
//! Also the hold that a client asks for.

use std::sync::Arc;

use jiff::Timestamp;
use stead_schemas::api::{CompressionAsked, StandbyRequest};
use stead_schemas::instance::{Instance, Power, PowerCause, State};
use stead_schemas::meta::Object;
use stead_schemas::names::Uid;
use stead_schemas::numbers::{Generation, StandbyNo};
use stead_schemas::policy::AutoStandbyPolicy;

use super::live;
use super::power::{desired_compression, grant, set_power};
use crate::refused::{Refused, RefusedKind};
use crate::store::Tx;

/// Requests standby for an instance that no client is connected to, if its spec is still of this generation.
///
/// # Errors
/// Returns no error today: what has changed meanwhile is left as it is.
pub fn stand_by(tx: &mut Tx<'_>, uid: &Uid, generation: Generation) -> Result<(), Refused> {
    let Ok(object) = live(tx, uid) else { return Ok(()) };
    if object.meta.generation == generation && object.spec.power == Power::Running {
        let now = tx.now();
        tx.update_spec::<Instance>(uid, None, |spec| {
            set_power(spec, Power::Standby, PowerCause::Idle, now);
            spec.standby = spec.standby.next();
            // The instance's own policy applies, because no client made a request.
            spec.compression = desired_compression(
                spec,
                StandbyRequest { compression: CompressionAsked::Unsaid, delay: None },
                now,
            );
        })?;
    }
    Ok(())
}

/// Requests that an instance run again, if its standby still has this number. The standby is over or cannot
/// be completed.
///
/// # Errors
/// Returns `NoRoom`. What has changed meanwhile is left as it is.
pub fn wake(tx: &mut Tx<'_>, uid: &Uid, standby: StandbyNo, by: PowerCause) -> Result<(), Refused> {
    let Ok(object) = live(tx, uid) else { return Ok(()) };
    if object.spec.standby == standby && object.spec.power == Power::Standby {
        let now = tx.now();
        grant(tx, uid, |spec| set_power(spec, Power::Running, by, now))?;
    }
    Ok(())
}

/// Grants an instance room for the VM that has to run before its memory can be kept, because the memory that it kept
/// is lost, if its standby still has this number.
///
/// # Errors
/// Returns `NoRoom`. What has changed meanwhile is left as it is.
pub fn regrant(tx: &mut Tx<'_>, uid: &Uid, standby: StandbyNo) -> Result<(), Refused> {
    let Ok(object) = live(tx, uid) else { return Ok(()) };
    let is_standby = object.spec.standby == standby && object.spec.power == Power::Standby;
    if is_standby && !object.holds_resources() {
        grant(tx, uid, |_| {})?;
    }
    Ok(())
}

/// Postpones the automatic standby of an instance by another idle timeout. Does nothing without a policy.
///
/// # Errors
/// Returns `InStandby` if the instance is in standby or on its way there.
pub fn hold(tx: &mut Tx<'_>, uid: &Uid) -> Result<Arc<Object<Instance>>, Refused> {
    let object = live(tx, uid)?;
    if object.spec.power == Power::Standby || object.status.state == State::Standby {
        return Err(Refused::new(RefusedKind::InStandby, "the instance is in standby"));
    }
    let Some(timeout) = object.spec.auto_standby.as_ref().and_then(AutoStandbyPolicy::timeout) else {
        return Ok(object);
    };
    // A time beyond the last representable time means that the instance never goes to standby.
    let until = tx.now().checked_add(timeout).unwrap_or(Timestamp::MAX);
    Ok(tx.update_spec::<Instance>(uid, None, |spec| spec.hold_until = Some(until))?)
}
