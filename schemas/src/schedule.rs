//! Snapshot schedule: periodic snapshots of an instance, and which of them are kept.
//!
//! The times of its runs are computed from stored values. No timer is stored, so the times stay the same
//! after restarts of the daemon, downtime and steps of the clock.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::condition::Condition;
use crate::meta::{Kind, Tags};
use crate::names::Uid;
use crate::numbers::Generation;
use crate::quantity::GoDuration;
use crate::references::{Role, WokenBy};

/// The kind of snapshot schedules; an instance owns at most one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SnapshotSchedule {}

impl Kind for SnapshotSchedule {
    const NAME: &'static str = "snapshot_schedule";
    const FINALIZER: &'static str = "schedule";
    type Spec = SnapshotScheduleSpec;
    type Status = SnapshotScheduleStatus;
    const WOKEN_BY: &'static [WokenBy] = &[WokenBy::Owner, WokenBy::Referrer(Role::Schedule)];

    fn observed_generation(status: &Self::Status) -> Option<Generation> {
        Some(status.observed_generation)
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotScheduleSpec {
    pub instance: Uid,
    pub interval: GoDuration,
    /// Time at which this interval was requested: the runs are counted from here.
    pub since: Timestamp,
    pub retention: Retention,
    /// Prefix of the snapshots' names.
    pub name_prefix: Option<String>,
    /// Tags of the snapshots.
    pub metadata: Tags,
    pub updated_at: Timestamp,
}

/// The snapshots of this schedule that are kept; other snapshots are not affected.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Retention {
    /// Number of newest snapshots that are kept.
    pub max_count: Option<u32>,
    /// Age up to which snapshots are kept.
    pub max_age: Option<GoDuration>,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct SnapshotScheduleStatus {
    /// The run that was carried out last, identified by the time at which it was due.
    pub last_due: Option<Timestamp>,
    /// Time at which it was carried out.
    pub last_run_at: Option<Timestamp>,
    /// The last snapshot that was taken completely.
    pub last_snapshot: Option<Uid>,
    /// The reason why the last run failed; `None` when it did not fail.
    pub last_error: Option<String>,
    /// The last snapshot that failed: its error is recorded, so the snapshot may be removed.
    pub last_failed: Option<Uid>,
    /// Time at which the next run is due, or the next snapshot becomes too old.
    #[serde(rename = "next_look")]
    pub next_poll: Option<Timestamp>,
    pub conditions: Vec<Condition>,
    pub observed_generation: Generation,
}

/// The result of asking a schedule what is due.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Run {
    /// The run of this time is due. It may be long past; when several runs were missed, it is the last of
    /// them.
    Due(Timestamp),
    /// The next run is due at this time, and none before it.
    Next(Timestamp),
}

impl Run {
    #[must_use]
    pub fn at(self) -> Timestamp {
        match self {
            Self::Due(at) | Self::Next(at) => at,
        }
    }
}

/// Largest share of the interval, as a divisor, by which a schedule is shifted off the even times, at most
/// by `OFFSET_NANOS_MAX`; so schedules that were made together do not all run together.
const OFFSET_SHARE: i128 = 10;
const OFFSET_NANOS_MAX: i128 = 300_000_000_000;

impl SnapshotScheduleSpec {
    /// Returns what is due when the run of `last` was carried out last. A `last` that lies more than one
    /// interval ahead was recorded before the clock was set back: the runs then continue from now.
    #[must_use]
    pub fn run(&self, last: Option<Timestamp>, now: Timestamp) -> Run {
        let current = self.at_or_before(now);
        let done = last.filter(|&last| self.is_of_this_clock(last, now)).or(last.and(current));
        match current {
            Some(current) if done.is_none_or(|done| done < current) => Run::Due(current),
            _ => Run::Next(self.after(done.map_or(now, |done| done.max(now)))),
        }
    }

    /// True if a run of that time can have been carried out by now.
    #[must_use]
    pub fn is_of_this_clock(&self, due: Timestamp, now: Timestamp) -> bool {
        due.as_nanosecond() <= now.as_nanosecond() + self.interval_nanos()
    }

    /// Returns the last run whose time is not after `at`; `None` before the first.
    #[must_use]
    pub fn at_or_before(&self, at: Timestamp) -> Option<Timestamp> {
        let count = (at.as_nanosecond() - self.begin()).div_euclid(self.interval_nanos());
        (count >= 1).then(|| self.number(count))
    }

    /// Returns the first run whose time is after `at`.
    #[must_use]
    pub fn after(&self, at: Timestamp) -> Timestamp {
        let count = (at.as_nanosecond() - self.begin()).div_euclid(self.interval_nanos()) + 1;
        self.number(count.max(1))
    }

    fn number(&self, count: i128) -> Timestamp {
        let nanos = self.begin().saturating_add(count.saturating_mul(self.interval_nanos()));
        Timestamp::from_nanosecond(nanos).unwrap_or(Timestamp::MAX)
    }

    /// Returns the time one interval before the first run, in nanoseconds since 1970.
    fn begin(&self) -> i128 {
        let most = (self.interval_nanos() / OFFSET_SHARE).clamp(1, OFFSET_NANOS_MAX);
        let hash = self.instance.as_str().bytes().fold(0u64, |hash, byte| {
            // FNV-1a gives the same value on every host and in every version.
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        });
        self.since.as_nanosecond() + i128::from(hash) % most
    }

    fn interval_nanos(&self) -> i128 {
        i128::try_from(self.interval.0.as_nanos()).unwrap_or(i128::MAX).max(1)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use jiff::SignedDuration;
    use proptest::prelude::*;

    use super::*;

    const HOUR: i64 = 3600;

    fn at(seconds: i64) -> Timestamp {
        Timestamp::from_second(1_700_000_000 + seconds).expect("valid")
    }

    fn hourly() -> SnapshotScheduleSpec {
        SnapshotScheduleSpec {
            instance: "tz4a98xxat96iws9zmbrgj3a".parse().expect("valid"),
            interval: GoDuration(Duration::from_secs(3600)),
            since: at(0),
            retention: Retention::default(),
            name_prefix: None,
            metadata: Tags::new(),
            updated_at: at(0),
        }
    }

    /// Returns the time of a run in whole hours, and the rest.
    fn hours(time: Timestamp) -> (i64, SignedDuration) {
        let since = time.duration_since(at(0));
        (since.as_secs() / HOUR, since - SignedDuration::from_hours(since.as_secs() / HOUR))
    }

    #[test]
    fn runs_are_an_interval_apart_and_missed_runs_are_joined() {
        let schedule = hourly();
        let first = schedule.after(at(0));
        let (hour, offset) = hours(first);
        assert_eq!(hour, 1);
        assert!(offset < SignedDuration::from_mins(5), "{offset:?}");
        let run = |last: Option<i64>, now: i64| {
            let last = last.map(|hour| first + SignedDuration::from_hours(hour - 1));
            // The clock shows half an hour past the run.
            let now = first + SignedDuration::from_mins(60 * (now - 1) + 30);
            match schedule.run(last, now) {
                Run::Due(at) => ("due", hours(at).0),
                Run::Next(at) => ("next", hours(at).0),
            }
        };
        assert_eq!(run(None, 0), ("next", 1));
        assert_eq!(run(None, 1), ("due", 1));
        assert_eq!(run(Some(1), 1), ("next", 2));
        assert_eq!(run(Some(1), 2), ("due", 2));
        // The daemon was down for nine runs: only the last is caught up with.
        assert_eq!(run(Some(1), 10), ("due", 10));
        assert_eq!(run(Some(10), 10), ("next", 11));
        // The clock was set back: by less than an interval, and by a day.
        assert_eq!(run(Some(11), 10), ("next", 12));
        assert_eq!(run(Some(34), 10), ("next", 11));
        assert_eq!(run(Some(34), 0), ("next", 1));
    }

    #[test]
    fn the_offset_is_the_same_every_time_and_not_for_everyone() {
        let mut other = hourly();
        other.instance = "az4a98xxat96iws9zmbrgj3b".parse().expect("valid");
        assert_eq!(hourly().after(at(0)), hourly().after(at(0)));
        assert_ne!(hourly().after(at(0)), other.after(at(0)));
    }

    proptest! {
        #[test]
        fn at_any_clock_each_run_is_carried_out_once(
            interval in 60i64..100_000,
            clock in proptest::collection::vec(-200_000i64..1_000_000, 1..40),
        ) {
            let interval = GoDuration(Duration::from_secs(u64::try_from(interval).expect("positive")));
            let schedule = SnapshotScheduleSpec { interval, ..hourly() };
            let mut last = None;
            for now in clock {
                let now = at(now);
                if let Run::Due(due) = schedule.run(last, now) {
                    prop_assert!(due <= now && Some(due) != last);
                    last = Some(due);
                }
                // The run is done: nothing more is due now, and the next run comes within two intervals.
                let Run::Next(next) = schedule.run(last, now) else { panic!("due twice") };
                prop_assert!(next > now);
                let twice = SignedDuration::try_from(interval.0 * 2).expect("short");
                prop_assert!(next.duration_since(now.max(at(0))) <= twice + SignedDuration::from_mins(5));
            }
        }
    }
}
