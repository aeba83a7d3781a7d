//! The guest's wall clock. It stands still while the VM is paused and is stepped afterwards.

use std::time::Duration;

use rustix::time::{ClockId, Timespec, clock_gettime, clock_settime};
use stead_schemas::guest::CLOCK_OFF_MAX;

const NANOS: i64 = 1_000_000_000;

/// Sets the clock to the host's time if it differs by more than jitter.
pub(crate) fn step(unix_nanos: i64) {
    let now = clock_gettime(ClockId::Realtime);
    let off = i128::from(now.tv_sec) * i128::from(NANOS) + i128::from(now.tv_nsec) - i128::from(unix_nanos);
    let off = Duration::from_nanos(u64::try_from(off.unsigned_abs()).unwrap_or(u64::MAX));
    if off <= CLOCK_OFF_MAX {
        return;
    }
    let time = Timespec { tv_sec: unix_nanos.div_euclid(NANOS), tv_nsec: unix_nanos.rem_euclid(NANOS) };
    // PID 1 may set the clock. If the kernel refuses, the guest keeps its clock.
    if clock_settime(ClockId::Realtime, time).is_ok() {
        crate::log_line(&format!("the clock was off by {} ms and was stepped", off.as_millis()));
    }
}
