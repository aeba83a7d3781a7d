//! The limit of the disks of a VM: a throttle group of QEMU, which the root overlay and all volumes share.
//!
//! A disk that was idle may have a multiple of the rate for a few seconds.

use serde::{Deserialize, Serialize};
use serde_json::json;
use stead_schemas::limits::{DISK_BURST, DISK_BURST_TIME};
use stead_schemas::quantity::Rate;

/// Name of the group.
pub(super) const THROTTLE: &str = "io";
/// The group among QEMU's objects, and its property.
pub(super) const THROTTLE_PATH: &str = "/objects/io";
pub(super) const LIMITS: &str = "limits";

/// The part of QEMU's `ThrottleLimits` that is used. QEMU keeps what is not set, so all of it is set each time: a burst
/// without a rate would be refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct Limits {
    /// Bytes per second, or 0 without a limit.
    bps_total: u64,
    /// Bytes per second of a burst, or 0 without one.
    bps_total_max: u64,
    /// Longest time of a burst, in seconds.
    bps_total_max_length: u64,
}

impl Limits {
    pub(super) fn of(rate: Option<Rate>) -> Self {
        match rate {
            Some(Rate(rate)) => Self {
                bps_total: rate,
                bps_total_max: rate.saturating_mul(DISK_BURST),
                bps_total_max_length: DISK_BURST_TIME.as_secs(),
            },
            None => Self { bps_total: 0, bps_total_max: 0, bps_total_max_length: 1 },
        }
    }

    /// Returns the rate, or `None` without a limit.
    pub(super) fn rate(self) -> Option<Rate> {
        Some(Rate(self.bps_total)).filter(|rate| rate.0 > 0)
    }
}

/// Returns the group as a value of QEMU's `-object`.
pub(super) fn group(rate: Option<Rate>) -> String {
    json!({ "qom-type": "throttle-group", "id": THROTTLE, "limits": Limits::of(rate) }).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_is_read_as_it_was_set_and_has_a_burst_only_with_a_rate() {
        for rate in [None, Some(Rate(20 << 20)), Some(Rate(u64::MAX / 2))] {
            let set = serde_json::to_value(Limits::of(rate)).expect("JSON");
            let read: Limits = serde_json::from_value(set.clone()).expect("the same form");
            assert_eq!(read.rate(), rate);
            assert_eq!(set["bps-total-max"] == 0, rate.is_none(), "{set}");
        }
        // As QEMU 7.2 answers: with what is not used.
        let answer = json!({
            "bps-total": 0, "bps-total-max": 0, "bps-total-max-length": 1, "iops-total": 0, "bps-read": 0,
        });
        let read: Limits = serde_json::from_value(answer).expect("the same form");
        assert_eq!(read.rate(), None);
    }

    #[test]
    fn a_group_is_an_object_of_qemu() {
        let group = group(Some(Rate(20 << 20)));
        assert!(
            group.contains(r#""qom-type":"throttle-group""#) && group.contains(r#""bps-total":20971520"#),
            "{group}"
        );
    }
}
