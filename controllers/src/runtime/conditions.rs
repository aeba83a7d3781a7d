//! The three standard conditions, derived from the end of a pass; kinds adjust them afterwards.
//!
//! Guarantees: the function is total. The transition time of a condition changes only with its status. Two
//! passes that end alike give equal conditions (no attempt counts and no times in messages), so that a
//! failing object is not written again at every retry.

use jiff::Timestamp;
use stead_schemas::condition::{self, Condition, ConditionStatus, ConditionType, Reason};
use stead_schemas::limits::MESSAGE_CHARS_MAX;
use stead_schemas::numbers::Generation;
use stead_schemas::validate::printable;

use super::reconciler::{Outcome, PassEnd};
use crate::host::HostErrorKind;

/// Status and reason of a condition.
type Answer = (ConditionStatus, Reason);

/// Returns `Ready`, `Progressing` and `Degraded` after a pass over the object's `generation`.
#[must_use]
pub fn standard(previous: &[Condition], generation: Generation, end: &PassEnd) -> Vec<Condition> {
    use ConditionStatus::{False, True};
    let well = Reason::Converged;
    let (ready, progressing, degraded, message): (Answer, Answer, Answer, &str) = match &end.outcome {
        Outcome::Converged => ((True, well), (False, well), (False, well), ""),
        Outcome::Acting => {
            let going = Reason::Converging;
            ((False, going), (True, going), (False, going), "")
        }
        Outcome::Recording(record) => {
            ((False, record.reason), (True, record.reason), (False, record.reason), record.what)
        }
        Outcome::Waiting(wait) => {
            ((False, wait.reason), (True, wait.reason), (False, wait.reason), wait.message.as_str())
        }
        Outcome::Refused(refusal) => {
            let reason = refusal.reason;
            ((False, reason), (False, reason), (True, reason), refusal.message.as_str())
        }
        Outcome::Failed { kind, message, attempt: _ } => {
            let reason = reason_of(*kind);
            let progressing = if is_hopeful(*kind) { True } else { False };
            ((False, reason), (progressing, reason), (True, reason), message.as_str())
        }
    };
    let mut conditions = previous.to_vec();
    for (kind, (status, reason)) in [
        (ConditionType::Ready, ready),
        (ConditionType::Progressing, progressing),
        (ConditionType::Degraded, degraded),
    ] {
        let new = Condition {
            kind,
            status,
            reason,
            message: printable(message, MESSAGE_CHARS_MAX),
            observed_generation: generation,
            last_transition_time: end.now.at(),
        };
        condition::set(&mut conditions, new);
    }
    conditions
}

/// Sets `Degraded` in addition to the result of the pass, because an operator has to act. The transition time
/// is kept from the conditions before.
pub fn degrade(
    conditions: &mut Vec<Condition>,
    previous: &[Condition],
    (reason, message): (Reason, &str),
    generation: Generation,
    now: Timestamp,
) {
    let kind = ConditionType::Degraded;
    let was = condition::find(previous, kind).filter(|was| was.status == ConditionStatus::True);
    let since = was.map_or(now, |was| was.last_transition_time);
    conditions.retain(|condition| condition.kind != kind);
    let new = Condition {
        kind,
        status: ConditionStatus::True,
        reason,
        message: printable(message, MESSAGE_CHARS_MAX),
        observed_generation: generation,
        last_transition_time: since,
    };
    condition::set(conditions, new);
}

/// True if a retry may help without any intervention.
fn is_hopeful(kind: HostErrorKind) -> bool {
    !matches!(kind, HostErrorKind::Unsupported | HostErrorKind::Permanent)
}

fn reason_of(kind: HostErrorKind) -> Reason {
    match kind {
        HostErrorKind::Transient | HostErrorKind::Conflict | HostErrorKind::Missing => Reason::Retrying,
        HostErrorKind::Denied => Reason::PermissionDenied,
        HostErrorKind::Exhausted => Reason::CapacityExhausted,
        HostErrorKind::Unsupported => Reason::Unsupported,
        HostErrorKind::Permanent => Reason::HostFault,
    }
}

#[cfg(test)]
mod tests {
    use jiff::Timestamp;

    use super::*;

    fn end(second: i64, outcome: Outcome) -> PassEnd {
        PassEnd { now: Timestamp::from_second(second).expect("in range").into(), outcome }
    }

    fn failed(attempt: u32, message: &str) -> Outcome {
        Outcome::Failed { kind: HostErrorKind::Transient, message: message.to_owned(), attempt }
    }

    #[test]
    fn transition_times_move_only_with_the_status() {
        let first = standard(&[], Generation(1), &end(10, failed(1, "x")));
        let second = standard(&first, Generation(1), &end(20, failed(2, "x")));
        assert_eq!(first, second, "a retry that ends alike changes nothing");
        let third = standard(&second, Generation(2), &end(30, Outcome::Converged));
        let ready = condition::find(&third, ConditionType::Ready).expect("set");
        assert_eq!((ready.status, ready.observed_generation), (ConditionStatus::True, Generation(2)));
        assert_eq!(ready.last_transition_time, end(30, Outcome::Converged).now.at());
        assert!(condition::is_ready(&third));
    }

    #[test]
    fn host_errors_reach_the_message_cleaned_and_cut() {
        let long = format!("a\u{1b}[31m{}", "x".repeat(5000));
        let conditions = standard(&[], Generation(1), &end(1, failed(1, &long)));
        let degraded = condition::find(&conditions, ConditionType::Degraded).expect("set");
        assert_eq!((degraded.status, degraded.reason), (ConditionStatus::True, Reason::Retrying));
        assert!(degraded.message.chars().count() <= MESSAGE_CHARS_MAX + 1);
        assert!(!degraded.message.contains('\u{1b}'));
    }

    #[test]
    fn a_permanent_failure_is_not_called_progress() {
        let outcome = Outcome::Failed { kind: HostErrorKind::Permanent, message: String::new(), attempt: 1 };
        let conditions = standard(&[], Generation(1), &end(1, outcome));
        let progressing = condition::find(&conditions, ConditionType::Progressing).expect("set");
        assert_eq!((progressing.status, progressing.reason), (ConditionStatus::False, Reason::HostFault));
    }
}
