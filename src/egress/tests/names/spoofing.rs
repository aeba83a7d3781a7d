//! Tests of row 26: answers by others than the upstream server, and answers about other names.

use std::net::IpAddr;

use hickory_proto::op::{Message, Query, ResponseCode};
use hickory_proto::rr::RecordType;

use super::authority::{Act, Asked, alias, host, name};
use super::fixtures::{DIRECT, Fixture, LISTED, MEDIATED};

const HOST: &str = "api.example.com.";
const BANK: &str = "bank.example.com.";

fn address(last: u8) -> IpAddr {
    IpAddr::from([203, 0, 113, last])
}

/// Returns the answer of a forger, with the address that nobody may get.
fn forged(asked: &Asked) -> Message {
    asked.answer(vec![host(&asked.name, "203.0.113.66", 300)])
}

fn true_answer(asked: &Asked) -> Message {
    asked.answer(vec![host(&asked.name, "203.0.113.1", 60)])
}

#[tokio::test]
async fn row_26_an_answer_with_another_id_port_or_question_is_ignored() {
    let fixture = Fixture::start(|asked| {
        let mut other_id = forged(asked);
        other_id.metadata.id ^= 1;
        let mut other_question = forged(asked);
        other_question.queries = vec![Query::query(name("evil.example.com."), asked.record_type)];
        let mut other_type = forged(asked);
        other_type.queries[0].set_query_type(RecordType::TXT);
        let elsewhere = Act::SendFromElsewhere(forged(asked));
        let others = [other_id, other_question, other_type].map(Act::Send);
        [elsewhere].into_iter().chain(others).chain([Act::Send(true_answer(asked))]).collect()
    })
    .await;
    for guest in [LISTED, DIRECT] {
        assert_eq!(fixture.addresses(guest, HOST).await, (ResponseCode::NoError, vec![address(1)]));
    }
}

#[tokio::test]
async fn row_26_an_answer_in_other_letters_is_not_believed() {
    let fixture = Fixture::start(|asked| {
        if asked.is_tcp {
            return vec![Act::Send(true_answer(asked))];
        }
        // A forger who guessed port and id does not know which letters are large.
        let mut lower = forged(asked);
        lower.queries = vec![Query::query(name(&asked.name), asked.record_type)];
        vec![Act::Send(lower)]
    })
    .await;
    for number in 0..8 {
        let host = format!("long-name-with-many-letters-{number}.example.com.");
        assert_eq!(fixture.addresses(LISTED, &host).await.1, [address(1)], "it was asked for by TCP");
    }
}

#[tokio::test]
async fn row_26_a_second_answer_changes_nothing() {
    let fixture = Fixture::start(|asked| vec![Act::Send(true_answer(asked)), Act::Send(forged(asked))]).await;
    for guest in [LISTED, MEDIATED] {
        assert_eq!(fixture.addresses(guest, HOST).await.1, [address(1)]);
    }
}

#[tokio::test]
async fn row_26_what_an_answer_has_about_other_names_is_ignored() {
    let fixture = Fixture::start(|asked| {
        let mut answer = true_answer(asked);
        if asked.name == HOST {
            let poison = [host(BANK, "203.0.113.66", 86_400), alias(BANK, "evil.org.")];
            answer.add_answers(poison.clone());
            answer.add_authorities(poison.clone());
            answer.add_additionals(poison);
        }
        vec![Act::Send(answer)]
    })
    .await;
    let answer = fixture.ask(DIRECT, HOST, RecordType::A).await;
    assert_eq!(answer.answers, [host(HOST, "203.0.113.1", 60)]);
    assert!(answer.authorities.is_empty() && answer.additionals.is_empty());
    assert_eq!(fixture.addresses(LISTED, BANK).await.1, [address(1)]);
    assert_eq!(fixture.authority.count(BANK), 1, "its own server was asked");
}

#[tokio::test]
async fn row_26_an_address_only_beside_the_answer_is_no_answer() {
    let fixture = Fixture::start(|asked| {
        let mut answer = asked.answer(Vec::new());
        answer.add_additionals([host(&asked.name, "203.0.113.66", 300)]);
        vec![Act::Send(answer)]
    })
    .await;
    assert_eq!(fixture.addresses(LISTED, HOST).await.1, Vec::<IpAddr>::new());
}

#[tokio::test]
async fn row_26_questions_have_ports_and_ids_that_do_not_follow_each_other() {
    let fixture = Fixture::start(|asked| vec![Act::Send(true_answer(asked))]).await;
    for number in 0..16 {
        fixture.addresses(LISTED, &format!("h{number}.example.com.")).await;
    }
    let seen = fixture.authority.seen();
    let distances = |values: Vec<u16>| {
        values.windows(2).map(|pair| pair[0].abs_diff(pair[1])).filter(|distance| *distance > 16).count()
    };
    let ports = distances(seen.iter().map(|asked| asked.source.port()).collect());
    let ids = distances(seen.iter().map(|asked| asked.message.metadata.id).collect());
    assert!(ports > 10 && ids > 10, "{ports} {ids}");
}
