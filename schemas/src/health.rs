//! Health of a program: the probes from outside, their results, and the verdict.
//!
//! Health is separate from the state: a program may run and be unhealthy. Counts belong to one launch and
//! one version of the check; they start anew with another launch or version.

use std::time::Duration;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::limits::HEALTH_ERROR_CHARS_MAX;
use crate::numbers::LaunchId;
use crate::quantity::GoDuration;
use crate::validate::printable;

/// A health check: the probe, its schedule, and the thresholds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HealthCheck {
    pub probe: Probe,
    /// Time from the start of a probe to the start of the next; two probes are never under way at once.
    pub interval: GoDuration,
    /// Time limit of a probe; a probe that has not passed by then has failed.
    pub timeout: GoDuration,
    /// Time after the program's start in which failures do not count, until the first success.
    pub start_period: GoDuration,
    /// Number of failures in a row that mean unhealthy.
    pub failure_threshold: u32,
    /// Number of successes in a row that mean healthy.
    pub success_threshold: u32,
}

impl HealthCheck {
    /// Makes a check with the wire's defaults for the fields that a request does not set.
    #[must_use]
    pub fn of(probe: Probe) -> Self {
        Self {
            probe,
            interval: GoDuration(Duration::from_secs(10)),
            timeout: GoDuration(Duration::from_secs(2)),
            start_period: GoDuration(Duration::from_secs(30)),
            failure_threshold: 3,
            success_threshold: 1,
        }
    }
}

/// A single question to a guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Probe {
    /// A GET request that must be answered with this status; redirects count as answers, and bodies are not
    /// read.
    Http { scheme: Scheme, port: u16, path: String, expected_status: u16 },
    /// A connection that must be accepted.
    Tcp { port: u16 },
    /// A program beside the instance's own that must end with 0.
    Exec { command: Vec<String>, working_dir: Option<String> },
}

impl Probe {
    /// True if the probe goes over the instance's network.
    #[must_use]
    pub fn needs_network(&self) -> bool {
        matches!(self, Self::Http { .. } | Self::Tcp { .. })
    }

    /// True if the probe goes through the agent in the guest.
    #[must_use]
    pub fn needs_agent(&self) -> bool {
        matches!(self, Self::Exec { .. })
    }
}

/// The scheme of a health check's request.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "wire", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
#[cfg_attr(feature = "wire", schemars(rename = "HealthCheckScheme"))]
pub enum Scheme {
    #[default]
    Http,
    /// HTTPS. The server certificate is not verified: the address belongs to the instance.
    Https,
}

impl Scheme {
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Http => "http",
            Self::Https => "https",
        }
    }
}

/// Results so far of the probes of one launch by one version of the check.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tally {
    /// Number of failures in a row, up to now; failures within the start period are not counted.
    pub failures: u32,
    pub successes: u32,
    pub last_checked_at: Option<Timestamp>,
    pub last_success_at: Option<Timestamp>,
    pub last_failure_at: Option<Timestamp>,
    /// The text of the last failure; bounded, without control characters.
    pub last_error: Option<String>,
}

impl Tally {
    /// Counts a probe that ended at `now`. In the start period a failure is noted but not counted, unless a
    /// success came before it.
    pub fn count(&mut self, found: Result<(), String>, now: Timestamp, is_start_period: bool) {
        self.last_checked_at = Some(now);
        match found {
            Ok(()) => {
                (self.successes, self.failures) = (self.successes.saturating_add(1), 0);
                self.last_success_at = Some(now);
            }
            Err(error) => {
                let is_lenient = is_start_period && self.last_success_at.is_none();
                self.failures = self.failures.saturating_add(u32::from(!is_lenient));
                self.successes = 0;
                self.last_failure_at = Some(now);
                self.last_error = Some(printable(&error, HEALTH_ERROR_CHARS_MAX));
            }
        }
    }

    /// True if the last probe may change the verdict. Further probes with the same result do not, so that
    /// neither a healthy nor a failing program costs a write at every interval.
    #[must_use]
    pub fn is_news(&self, check: &HealthCheck) -> bool {
        (1..=check.success_threshold).contains(&self.successes)
            || (1..=check.failure_threshold).contains(&self.failures)
    }
}

/// The verdict on a program.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// The probes have not found enough yet.
    #[default]
    Starting,
    Healthy,
    Unhealthy,
}

/// The launch and the version of the check that counts belong to; counts of another launch or version do not
/// apply.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct HealthOf {
    #[serde(alias = "launched_at")]
    pub launch: LaunchId,
    /// The version of the check: `InstanceSpec::health_version`.
    pub version: u64,
}

/// The health in the instance's status. It is written when something new was found, and whenever the status
/// is written anyway, but not at every success of a healthy program.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HealthStatus {
    pub of: Option<HealthOf>,
    pub verdict: Verdict,
    /// Time since which the verdict has been this one.
    pub since: Option<Timestamp>,
    pub tally: Tally,
}

impl HealthStatus {
    /// Returns this status, updated with the results of the probes so far.
    #[must_use]
    pub fn judged(&self, of: HealthOf, check: &HealthCheck, tally: Option<&Tally>, now: Timestamp) -> Self {
        let mut next = if self.of == Some(of) {
            self.clone()
        } else {
            Self { of: Some(of), since: Some(now), ..Self::default() }
        };
        if let Some(tally) = tally {
            next.tally.clone_from(tally);
        }
        let verdict = if next.tally.failures >= check.failure_threshold {
            Verdict::Unhealthy
        } else if next.tally.successes >= check.success_threshold {
            Verdict::Healthy
        } else {
            next.verdict
        };
        if verdict != next.verdict {
            (next.verdict, next.since) = (verdict, Some(now));
        }
        next
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn at(seconds: i64) -> Timestamp {
        Timestamp::from_second(1_700_000_000 + seconds).expect("valid")
    }

    fn check() -> HealthCheck {
        HealthCheck { success_threshold: 2, ..HealthCheck::of(Probe::Tcp { port: 80 }) }
    }

    /// Returns the verdicts after each of these probes, which come once a second; the first 3 s are lenient.
    fn verdicts(probes: &str) -> String {
        let (check, of) = (check(), HealthOf { launch: LaunchId(1), version: 1 });
        let mut health = HealthStatus::default();
        let letters = probes.bytes().zip(0..).map(|(probe, second)| {
            let found = if probe == b'+' { Ok(()) } else { Err("no".to_owned()) };
            let mut tally = health.tally.clone();
            tally.count(found, at(second), second < 3);
            health = health.judged(of, &check, Some(&tally), at(second));
            match health.verdict {
                Verdict::Starting => 's',
                Verdict::Healthy => 'h',
                Verdict::Unhealthy => 'u',
            }
        });
        letters.collect()
    }

    #[test]
    fn verdicts_follow_the_thresholds_and_the_start_period() {
        for (probes, expected) in [
            // The first three failures do not count.
            ("------", "sssssu"),
            ("--++", "sssh"),
            // The start period is over after a success.
            ("+---", "sssu"),
            ("++--+--", "shhhhhh"),
            ("++---+++", "shhhuuhh"),
            ("+-+-+-", "ssssss"),
        ] {
            assert_eq!(verdicts(probes), expected, "{probes}");
        }
    }

    #[test]
    fn another_launch_or_another_check_begins_anew() {
        let (check, of) = (check(), HealthOf { launch: LaunchId(1), version: 1 });
        let mut tally = Tally::default();
        (0..3).for_each(|second| tally.count(Err("no".to_owned()), at(second), false));
        let unhealthy = HealthStatus::default().judged(of, &check, Some(&tally), at(3));
        assert_eq!((unhealthy.verdict, unhealthy.since), (Verdict::Unhealthy, Some(at(3))));
        // Nothing new was found, so the verdict and its time stay the same.
        assert_eq!(unhealthy.judged(of, &check, None, at(9)), unhealthy);
        for other in [HealthOf { version: 2, ..of }, HealthOf { launch: LaunchId(2), ..of }] {
            let fresh = unhealthy.judged(other, &check, None, at(9));
            assert_eq!((fresh.verdict, fresh.tally), (Verdict::Starting, Tally::default()));
        }
    }

    #[test]
    fn only_what_may_change_the_verdict_is_news() {
        let check = check();
        let mut tally = Tally::default();
        let mut news = |probes: &str| -> String {
            let reported = probes.bytes().map(|probe| {
                let found = if probe == b'+' { Ok(()) } else { Err(String::new()) };
                // Failures do not count before the tenth second.
                tally.count(found, at(9), true);
                if tally.is_news(&check) { '!' } else { '.' }
            });
            reported.collect()
        };
        assert_eq!(news("---+++-----++"), "...!!.!!!..!!");
    }

    proptest! {
        #[test]
        fn errors_are_bounded_and_clean(error in ".*") {
            let mut tally = Tally::default();
            tally.count(Err(error.repeat(20)), at(0), false);
            let kept = tally.last_error.expect("kept");
            prop_assert!(kept.chars().count() <= HEALTH_ERROR_CHARS_MAX + 1);
            prop_assert!(!kept.chars().any(char::is_control));
        }
    }
}
