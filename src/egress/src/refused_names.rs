//! Audit lines of questions for names that were refused, and of answers from which addresses were removed.
//!
//! Guarantees: a line goes to the log of the guest that asked, and to no other; nothing waits for the log, whose queue
//! is bounded.

use std::sync::Arc;

use stead_schemas::egress::{Host, Reason};

use crate::audit::Record;
use crate::names::{Event, OnEvent, Reason as NamesReason};
use crate::policies::Policies;

/// Number of the connection and port of a question: it has neither.
const NONE: (u64, u16) = (0, 0);

/// Returns the receiver of the resolver's events that adds them to the audit logs.
pub(crate) fn to_logs(policies: Arc<Policies>) -> OnEvent {
    Arc::new(move |event| {
        if let Some(log) = policies.log(event.guest) {
            complete(&mut Record::new(log, NONE.0, NONE.1), &event);
        }
    })
}

/// Completes the record of an event. A name that is no host's is left out: its bytes are whatever the guest likes.
fn complete(record: &mut Record, event: &Event) {
    let name = event.name.strip_suffix('.').unwrap_or(&event.name);
    record.line().host = name.parse().ok().map(Host::Name);
    record.line().address = event.address;
    record.refuse(reason(event.reason));
}

/// Returns the reason of the audit log.
fn reason(reason: NamesReason) -> Reason {
    match reason {
        NamesReason::Malformed | NamesReason::Unsupported => Reason::BadQuestion,
        NamesReason::TypeNotAllowed => Reason::RecordTypeNotAllowed,
        NamesReason::HostNotAllowed => Reason::HostNotAllowed,
        NamesReason::NameTooLong => Reason::NameTooLong,
        NamesReason::NotAHost => Reason::BadHost,
        NamesReason::SingleLabel | NamesReason::UnknownInstance => Reason::UnknownInstance,
        NamesReason::Rebinding => Reason::AddressDenied,
        NamesReason::RebindingInPart => Reason::AddressesRemoved,
        NamesReason::TooManyQuestions | NamesReason::TooManyWaiting => Reason::TooManyQuestions,
    }
}

#[cfg(test)]
mod tests {
    use stead_schemas::egress::Decision;

    use super::*;
    use crate::audit::AuditLog;

    async fn line(name: &str, reason: NamesReason) -> stead_schemas::egress::AuditLine {
        let (log, mut lines) = AuditLog::new();
        let guest = "10.100.0.7".parse().expect("an address");
        let address = "10.0.0.1".parse().ok();
        let event = Event { guest, name: name.to_owned(), record_type: "A".to_owned(), reason, address };
        complete(&mut Record::new(log, 0, 0), &event);
        lines.next().await.expect("a line")
    }

    #[tokio::test]
    async fn row_20_an_answer_without_another_address_is_a_refusal_with_the_address() {
        let line = line("Rebind.Example.", NamesReason::Rebinding).await;
        assert_eq!((line.decision, line.reason), (Decision::Refused, Some(Reason::AddressDenied)));
        assert_eq!(line.host, Some("rebind.example".parse().expect("a host")));
        assert_eq!(line.address, "10.0.0.1".parse().ok());
        assert_eq!((line.conn, line.client_port, line.method), (0, 0, None));
    }

    #[tokio::test]
    async fn an_answer_of_which_a_part_was_removed_is_no_refusal() {
        let line = line("mixed.example.", NamesReason::RebindingInPart).await;
        assert_eq!((line.decision, line.reason), (Decision::Allowed, Some(Reason::AddressesRemoved)));
    }

    #[tokio::test]
    async fn a_name_that_is_no_host_is_left_out() {
        for name in ["", "a b.example.", "\\000.example.", "1.2.3.4."] {
            let line = line(name, NamesReason::NotAHost).await;
            assert_eq!((line.decision, line.reason), (Decision::Refused, Some(Reason::BadHost)));
            assert_eq!(line.host, None, "{name:?}");
        }
    }
}
