//! Health of a program: how it is probed from outside, what the probes found, and what follows of it.
//!
//! Apart from the state: a program may run and be unhealthy. Counts are of one launch and of one
//! version of the check; whatever else begins anew.

use std::time::Duration;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::limits::HEALTH_ERROR_CHARS_MAX;
use crate::numbers::LaunchId;
use crate::quantity::GoDuration;
use crate::validate::printable;

/// How, how often, and what counts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HealthCheck {
    pub probe: Probe,
    /// From the beginning of one probe to that of the next; two are never under way at once.
    pub interval: GoDuration,
    /// Of one probe; one that has not passed by then has failed.
    pub timeout: GoDuration,
    /// After the program's start failures do not count, until the first success.
    pub start_period: GoDuration,
    /// Failures in a row that mean unhealthy.
    pub failure_threshold: u32,
    /// Successes in a row that mean healthy.
    pub success_threshold: u32,
}

impl HealthCheck {
    /// With the wire's own values for what a request does not say.
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

/// One question to a guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Probe {
    /// A GET that is answered with this status; redirects are answers, bodies are not read.
    Http { scheme: Scheme, port: u16, path: String, expected_status: u16 },
    /// A connection that is taken.
    Tcp { port: u16 },
    /// A program beside the instance's own that ends with 0.
    Exec { command: Vec<String>, working_dir: Option<String> },
}

impl Probe {
    /// Asked over the instance's network.
    #[must_use]
    pub fn needs_network(&self) -> bool {
        matches!(self, Self::Http { .. } | Self::Tcp { .. })
    }

    /// Asked through the agent in the guest.
    #[must_use]
    pub fn needs_agent(&self) -> bool {
        matches!(self, Self::Exec { .. })
    }
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Scheme {
    #[default]
    Http,
    /// Whose certificate it is is not asked: the address is the instance's own.
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

/// What the probes of one launch by one version of the check found so far.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tally {
    /// In a row, up to now; failures within the start period are not among them.
    pub failures: u32,
    pub successes: u32,
    pub last_checked_at: Option<Timestamp>,
    pub last_success_at: Option<Timestamp>,
    pub last_failure_at: Option<Timestamp>,
    /// How the last failure was; bounded, without control characters.
    pub last_error: Option<String>,
}

impl Tally {
    /// Counts one probe that ended at `now`. In the start period a failure is noted and not counted, unless
    /// a success was before it.
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

    /// The last probe may change what is thought of the program; further ones that find the same
    /// do not, so that neither a healthy nor a sick program costs a write at every interval.
    #[must_use]
    pub fn is_news(&self, check: &HealthCheck) -> bool {
        (1..=check.success_threshold).contains(&self.successes)
            || (1..=check.failure_threshold).contains(&self.failures)
    }
}

/// What is thought of a program.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// Not enough was found yet.
    #[default]
    Starting,
    Healthy,
    Unhealthy,
}

/// Which program, asked how: counts of another one say nothing of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct HealthOf {
    #[serde(alias = "launched_at")]
    pub launch: LaunchId,
    /// `InstanceSpec::health_version`.
    pub version: u64,
}

/// Kept in the instance's status: written when something new was found, and whenever the status is
/// written anyway, not at every success of a healthy program.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HealthStatus {
    pub of: Option<HealthOf>,
    pub verdict: Verdict,
    /// Since when the verdict is this one.
    pub since: Option<Timestamp>,
    pub tally: Tally,
}

impl HealthStatus {
    /// The same, with what the probes found by now.
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

    /// The verdicts after each of these probes, one a second, the first 3 s lenient.
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
            // After a success the start period is over.
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
        // Nothing new was found: the same, since the same time.
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
            let told = probes.bytes().map(|probe| {
                let found = if probe == b'+' { Ok(()) } else { Err(String::new()) };
                // Before the tenth second failures do not count.
                tally.count(found, at(9), true);
                if tally.is_news(&check) { '!' } else { '.' }
            });
            told.collect()
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
