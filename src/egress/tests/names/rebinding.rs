//! Tests of rows 20 and 21: names that stand for addresses which guests must not reach by them.

use std::net::IpAddr;
use std::time::Duration;

use hickory_proto::op::ResponseCode;
use hickory_proto::rr::rdata::AAAA;
use hickory_proto::rr::{RData, Record, RecordType};
use stead_egress::names::{Reason, ResolveError};
use stead_schemas::egress::HostName;

use super::authority::{Act, alias, host, name};
use super::fixtures::{DIRECT, Fixture, LISTED, MEDIATED};

const PRIVATE: &str = "private.example.com.";

fn address(text: &str) -> IpAddr {
    text.parse().expect("an address")
}

/// Looks a host up as the proxy does.
async fn dialled(fixture: &Fixture, host: &str) -> Result<Vec<IpAddr>, ResolveError> {
    let host: HostName = host.parse().expect("a host");
    fixture.resolver.resolve(LISTED.into(), &host).await.map(|resolved| resolved.addresses)
}

#[tokio::test]
async fn row_20_a_name_of_private_addresses_does_not_exist() {
    let refused = ["10.0.0.1", "127.0.0.1", "169.254.169.254", "0.0.0.0", "100.100.100.200", "192.168.1.1"];
    let fixture = Fixture::start(move |asked| {
        let number: usize = asked.name[1..2].parse().expect("a digit");
        vec![Act::Send(asked.answer(vec![host(&asked.name, refused[number], 60)]))]
    })
    .await;
    for (number, text) in refused.into_iter().enumerate() {
        let host = format!("h{number}.example.com.");
        for guest in [LISTED, MEDIATED, DIRECT] {
            assert_eq!(fixture.addresses(guest, &host).await, (ResponseCode::NXDomain, vec![]), "{text}");
        }
        assert_eq!(dialled(&fixture, &host).await, Err(ResolveError::Denied(address(text))));
        let events = fixture.events();
        assert_eq!(events[0].name, host);
        assert_eq!(events[0].address, Some(address(text)));
        assert_eq!(fixture.take_reasons(), [Reason::Rebinding; 4]);
    }
    assert_eq!(fixture.resolver.counts().rebinding, 24);
}

#[tokio::test]
async fn row_20_of_a_mixed_answer_the_public_addresses_are_left() {
    let fixture = Fixture::start(|asked| {
        let addresses = ["10.0.0.1", "203.0.113.1", "127.0.0.1", "203.0.113.2"];
        let records = addresses.map(|address| host(&asked.name, address, 60)).to_vec();
        vec![Act::Send(asked.answer(records))]
    })
    .await;
    let left = vec![address("203.0.113.1"), address("203.0.113.2")];
    assert_eq!(fixture.addresses(LISTED, PRIVATE).await, (ResponseCode::NoError, left.clone()));
    assert_eq!(dialled(&fixture, PRIVATE).await, Ok(left));
    assert_eq!(fixture.take_reasons(), [Reason::RebindingInPart; 2]);
}

#[tokio::test]
async fn row_20_an_alias_to_a_private_address_does_not_exist() {
    let fixture = Fixture::start(|asked| {
        let record = if asked.name == PRIVATE {
            alias(PRIVATE, "metadata.evil.org.")
        } else {
            host(&asked.name, "169.254.169.254", 60)
        };
        vec![Act::Send(asked.answer(vec![record]))]
    })
    .await;
    assert_eq!(fixture.addresses(LISTED, PRIVATE).await, (ResponseCode::NXDomain, vec![]));
    assert_eq!(dialled(&fixture, PRIVATE).await, Err(ResolveError::Denied(address("169.254.169.254"))));
}

#[tokio::test]
async fn row_20_translated_addresses_reach_nobody() {
    let fixture = Fixture::start(|asked| {
        let translated = ["64:ff9b::7f00:1", "2002:7f00:1::", "::ffff:127.0.0.1"];
        let record = |text: &str| {
            let address = AAAA(text.parse().expect("an address"));
            Record::from_rdata(name(&asked.name), 60, RData::AAAA(address))
        };
        vec![Act::Send(asked.answer(translated.map(record).to_vec()))]
    })
    .await;
    let answer = fixture.ask(LISTED, PRIVATE, RecordType::AAAA).await;
    assert_eq!((answer.metadata.response_code, answer.answers.len()), (ResponseCode::NoError, 0));
    assert!(fixture.authority.seen().is_empty(), "a mediated guest has no use for the answer");
    let answer = fixture.ask(DIRECT, PRIVATE, RecordType::AAAA).await;
    assert_eq!((answer.metadata.response_code, answer.answers.len()), (ResponseCode::NXDomain, 0));
    assert_eq!(fixture.take_reasons(), [Reason::Rebinding]);
}

#[tokio::test]
async fn row_21_an_address_that_alternates_is_dialled_only_while_it_is_public() {
    let fixture = Fixture::start(|asked| {
        let address = if asked.earlier.is_multiple_of(2) { "203.0.113.1" } else { "127.0.0.1" };
        vec![Act::Send(asked.answer(vec![host(&asked.name, address, 0)]))]
    })
    .await;
    for round in 0..20 {
        // The first answer is kept for 5 s although its TTL is 0: the guest's question and the proxy's have the same.
        let (code, asked) = fixture.addresses(LISTED, PRIVATE).await;
        let dialled = dialled(&fixture, PRIVATE).await;
        if round % 2 == 0 {
            assert_eq!((code, asked), (ResponseCode::NoError, vec![address("203.0.113.1")]), "{round}");
            assert_eq!(dialled, Ok(vec![address("203.0.113.1")]), "{round}");
        } else {
            assert_eq!((code, asked), (ResponseCode::NXDomain, vec![]), "{round}");
            assert_eq!(dialled, Err(ResolveError::Denied(address("127.0.0.1"))), "{round}");
        }
        assert_eq!(fixture.authority.count(PRIVATE), round + 1);
        fixture.advance(Duration::from_secs(5));
    }
}
