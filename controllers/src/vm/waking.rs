//! Changes of the wish that come by themselves: to standby when nobody is connected, and back when
//! somebody is; and the hold that a client asks for.

use std::sync::Arc;

use jiff::Timestamp;
use stead_schemas::api::{CompressionAsked, StandbyRequest};
use stead_schemas::instance::{Instance, Power, PowerCause, State};
use stead_schemas::meta::Object;
use stead_schemas::names::Uid;
use stead_schemas::numbers::{Generation, StandbyNo};
use stead_schemas::policy::AutoStandbyPolicy;

use super::admission::{Refused, compression_wish, live, set_power};
use crate::store::Tx;

/// Has an instance that nobody is connected to be in standby, if the wish is still of this
/// generation.
///
/// # Errors
/// None today: what has changed meanwhile is left as it is.
pub fn stand_by(tx: &mut Tx<'_>, uid: &Uid, generation: Generation) -> Result<(), Refused> {
    let Ok(object) = live(tx, uid) else { return Ok(()) };
    if object.meta.generation == generation && object.spec.power == Power::Running {
        let now = tx.now();
        tx.update_spec::<Instance>(uid, None, |spec| {
            set_power(spec, Power::Standby, PowerCause::Idle, now);
            spec.standby = spec.standby.next();
            // By the instance's own policy: nobody is here to say another.
            spec.compression = compression_wish(
                spec,
                StandbyRequest { compression: CompressionAsked::Unsaid, delay: None },
                now,
            );
        })?;
    }
    Ok(())
}

/// Has an instance run again whose standby, of this number, is over or comes to nothing.
///
/// # Errors
/// None today: what has changed meanwhile is left as it is.
pub fn wake(tx: &mut Tx<'_>, uid: &Uid, standby: StandbyNo, by: PowerCause) -> Result<(), Refused> {
    let Ok(object) = live(tx, uid) else { return Ok(()) };
    if object.spec.standby == standby && object.spec.power == Power::Standby {
        let now = tx.now();
        tx.update_spec::<Instance>(uid, None, |spec| set_power(spec, Power::Running, by, now))?;
    }
    Ok(())
}

/// Has an instance not go to standby by itself for another idle timeout; without a policy that is
/// nothing.
///
/// # Errors
/// `InStandby` when it is there or on its way.
pub fn hold(tx: &mut Tx<'_>, uid: &Uid) -> Result<Arc<Object<Instance>>, Refused> {
    let object = live(tx, uid)?;
    if object.spec.power == Power::Standby || object.status.state == State::Standby {
        return Err(Refused::InStandby);
    }
    let Some(timeout) = object.spec.auto_standby.as_ref().and_then(AutoStandbyPolicy::timeout) else {
        return Ok(object);
    };
    // Beyond the last time there is: never.
    let until = tx.now().checked_add(timeout).unwrap_or(Timestamp::MAX);
    Ok(tx.update_spec::<Instance>(uid, None, |spec| spec.hold_until = Some(until))?)
}
