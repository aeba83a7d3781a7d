//! Answers of upstream resolvers in the form in which they are kept: only what answers the question, for a bounded
//! time.
//!
//! Guarantees: a record is kept only if the question's name leads to it by at most [`ALIASES_MAX`] aliases; a record
//! of any other name, which somebody would like us to believe, is ignored.

use std::time::Duration;

use hickory_proto::rr::{DNSClass, Name, RData, Record, RecordType};

use super::limits::{ALIASES_MAX, FAILURE_TTL, NEGATIVE_TTL_MAX, RECORDS_MAX, TTL_MAX, TTL_MIN};

/// A question by its content: what equal questions have in common. The comparison ignores case.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Key {
    pub(crate) name: Name,
    pub(crate) record_type: RecordType,
}

/// The content of an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Found {
    /// The aliases in their order, then the records of the type.
    Records(Vec<Record>),
    /// The name exists and has no such record.
    Empty,
    NoSuchName,
    /// No upstream resolver gave an answer.
    Failure,
}

/// An answer and the time for which it is kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Answer {
    pub(crate) found: Found,
    pub(crate) ttl: Duration,
}

impl Answer {
    /// Makes the answer of records that an upstream resolver sent.
    pub(crate) fn from_records(key: &Key, sent: &[Record]) -> Self {
        let records = relevant(key, sent);
        let ttl = records.iter().map(|record| record.ttl).min();
        match ttl {
            Some(ttl) if records.iter().any(|record| is_of_type(key, record)) => {
                let ttl = Duration::from_secs(ttl.into()).clamp(TTL_MIN, TTL_MAX);
                Self { found: Found::Records(records), ttl }
            }
            _ => Self::negative(Found::Empty, None),
        }
    }

    /// Makes an answer without records; `ttl_secs` is the time that the zone allows, if it names one.
    pub(crate) fn negative(found: Found, ttl_secs: Option<u32>) -> Self {
        let ttl = Duration::from_secs(ttl_secs.unwrap_or(0).into()).clamp(TTL_MIN, NEGATIVE_TTL_MAX);
        Self { found, ttl }
    }

    /// Makes the answer for a question that could not be answered.
    pub(crate) fn failure() -> Self {
        Self { found: Found::Failure, ttl: FAILURE_TTL }
    }
}

fn is_of_type(key: &Key, record: &Record) -> bool {
    key.record_type == RecordType::ANY || record.record_type() == key.record_type
}

/// Returns the aliases and records to which the name leads, in their order.
fn relevant(key: &Key, sent: &[Record]) -> Vec<Record> {
    let (mut name, mut kept) = (&key.name, Vec::new());
    for _ in 0..=ALIASES_MAX {
        let own = |record: &&Record| record.name == *name && record.dns_class == DNSClass::IN;
        let found = sent.iter().filter(own).filter(|record| is_of_type(key, record));
        let before = kept.len();
        kept.extend(found.take(RECORDS_MAX).cloned());
        if kept.len() > before {
            break;
        }
        let alias = sent.iter().filter(own).find_map(|record| match &record.data {
            RData::CNAME(target) => Some((record, &target.0)),
            _ => None,
        });
        let Some((record, target)) = alias else { break };
        kept.push(record.clone());
        name = target;
    }
    kept
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use hickory_proto::rr::rdata::{A, CNAME};
    use proptest::prelude::*;

    use super::*;

    fn name(text: &str) -> Name {
        Name::from_ascii(text).expect("a name")
    }

    fn key(text: &str) -> Key {
        Key { name: name(text), record_type: RecordType::A }
    }

    fn host(text: &str, last: u8, ttl: u32) -> Record {
        Record::from_rdata(name(text), ttl, RData::A(A(Ipv4Addr::new(203, 0, 113, last))))
    }

    fn alias(text: &str, target: &str, ttl: u32) -> Record {
        Record::from_rdata(name(text), ttl, RData::CNAME(CNAME(name(target))))
    }

    fn kept(sent: &[Record]) -> Vec<Record> {
        match Answer::from_records(&key("a.example."), sent).found {
            Found::Records(records) => records,
            Found::Empty => Vec::new(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn aliases_are_followed_in_whatever_order_they_are_sent() {
        let sent = [
            host("c.example.", 1, 60),
            alias("b.example.", "c.example.", 60),
            alias("A.example.", "b.example.", 60),
        ];
        assert_eq!(kept(&sent), [sent[2].clone(), sent[1].clone(), sent[0].clone()]);
    }

    #[test]
    fn records_of_other_names_are_ignored() {
        let sent =
            [host("a.example.", 1, 60), host("bank.example.", 66, 60), alias("x.example.", "a.example.", 60)];
        assert_eq!(kept(&sent), sent[..1]);
        assert_eq!(kept(&sent[1..]), []);
    }

    #[test]
    fn an_alias_that_leads_nowhere_or_in_a_circle_is_empty() {
        assert_eq!(kept(&[alias("a.example.", "b.example.", 60)]), []);
        assert_eq!(kept(&[alias("a.example.", "b.example.", 60), alias("b.example.", "a.example.", 60)]), []);
        assert_eq!(kept(&[alias("a.example.", "a.example.", 60)]), []);
    }

    #[test]
    fn at_most_eight_aliases_are_followed() {
        let chain = |aliases: usize| {
            let link = |at: usize| if at == 0 { "a.example.".to_owned() } else { format!("a{at}.example.") };
            let mut sent: Vec<Record> = (0..aliases).map(|at| alias(&link(at), &link(at + 1), 60)).collect();
            sent.push(host(&link(aliases), 1, 60));
            kept(&sent).len()
        };
        assert_eq!(chain(ALIASES_MAX), ALIASES_MAX + 1);
        assert_eq!(chain(ALIASES_MAX + 1), 0);
    }

    #[test]
    fn the_shortest_ttl_of_the_chain_counts_within_its_limits() {
        let ttl = |alias_ttl, host_ttl| {
            let sent = [alias("a.example.", "b.example.", alias_ttl), host("b.example.", 1, host_ttl)];
            Answer::from_records(&key("a.example."), &sent).ttl.as_secs()
        };
        assert_eq!((ttl(60, 120), ttl(120, 60)), (60, 60));
        assert_eq!((ttl(0, 600), ttl(86_400, 86_400)), (5, 300));
    }

    #[test]
    fn absence_is_kept_for_thirty_seconds_at_most_and_failure_for_one() {
        let ttl = |secs| Answer::negative(Found::NoSuchName, secs).ttl.as_secs();
        assert_eq!((ttl(None), ttl(Some(0)), ttl(Some(20)), ttl(Some(u32::MAX))), (5, 5, 20, 30));
        assert_eq!(Answer::failure().ttl.as_secs(), 1);
    }

    #[test]
    fn the_number_of_records_is_bounded() {
        let sent: Vec<Record> = (0..=255).map(|last| host("a.example.", last, 60)).collect();
        assert_eq!(kept(&sent).len(), RECORDS_MAX);
    }

    proptest! {
        #[test]
        fn what_is_kept_is_always_a_chain_from_the_name(
            links in prop::collection::vec((0u8..6, prop::option::of(0u8..6)), 0..20),
        ) {
            let label = |number: u8| format!("{}.example.", char::from(b'a' + number));
            let sent: Vec<Record> = links
                .iter()
                .map(|(from, to)| match to {
                    Some(to) => alias(&label(*from), &label(*to), 60),
                    None => host(&label(*from), 1, 60),
                })
                .collect();
            let records = kept(&sent);
            let mut expected = name("a.example.");
            for record in &records {
                prop_assert_eq!(&record.name, &expected);
                if let RData::CNAME(target) = &record.data {
                    expected = target.0.clone();
                }
            }
            let is_host = |record: &Record| matches!(record.data, RData::A(_));
            prop_assert!(records.is_empty() || records.last().is_some_and(is_host));
        }
    }
}
