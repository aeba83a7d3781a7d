//! Tests of ordinary questions: what guests and the proxy get, and what the upstream server is asked for it.

use std::net::IpAddr;
use std::time::Duration;

use hickory_proto::op::{Message, ResponseCode};
use hickory_proto::rr::rdata::TXT;
use hickory_proto::rr::{RData, Record, RecordType};
use stead_egress::names::{Reason, ResolveError};
use stead_schemas::egress::HostName;
use tokio::io::AsyncWriteExt;
use tokio::sync::watch;

use super::authority::{Act, alias, host, name};
use super::fixtures::{
    DIRECT, Fixture, LISTED, MEDIATED, NOBODY, addresses, patiently, question, receive_tcp, send_tcp, written,
};

const HOST: &str = "api.example.com.";

fn public(last: u8) -> IpAddr {
    IpAddr::from([203, 0, 113, last])
}

fn parsed(host: &str) -> HostName {
    host.parse().expect("a host")
}

#[tokio::test]
async fn a_host_is_resolved_once_for_all_guests_and_the_proxy() {
    let fixture = Fixture::with_hosts().await;
    for guest in [LISTED, MEDIATED, DIRECT] {
        assert_eq!(
            fixture.addresses(guest, "API.example.com.").await,
            (ResponseCode::NoError, vec![public(1)])
        );
    }
    let resolved =
        fixture.resolver.resolve(LISTED.into(), &parsed("api.example.com")).await.expect("resolved");
    assert_eq!((resolved.addresses, resolved.ttl), (vec![public(1)], Duration::from_secs(60)));
    assert_eq!(fixture.authority.count(HOST), 1);
    assert_eq!(fixture.resolver.counts().answered_from_cache, 2);
    assert!(fixture.events().is_empty());
}

#[tokio::test]
async fn an_answer_has_the_spelling_of_its_question_and_the_time_that_is_left() {
    let fixture = Fixture::with_hosts().await;
    for (spelling, seconds, ttl) in [("API.example.com.", 0, 60), ("api.EXAMPLE.com.", 25, 35)] {
        fixture.advance(Duration::from_secs(seconds));
        let answer = fixture.ask(LISTED, spelling, RecordType::A).await;
        assert!(answer.queries[0].name().eq_case(&name(spelling)));
        assert!(answer.answers[0].name.eq_case(&name(spelling)));
        assert_eq!(answer.answers[0].ttl, ttl);
    }
    fixture.advance(Duration::from_secs(35));
    fixture.addresses(LISTED, HOST).await;
    assert_eq!(fixture.authority.count(HOST), 2, "the answer has expired");
}

#[tokio::test]
async fn row_23_the_same_answer_comes_by_udp_and_by_tcp() {
    let fixture = Fixture::with_hosts().await;
    let by_udp = fixture.ask(LISTED, HOST, RecordType::A).await;
    let mut stream = fixture.connect(LISTED).await;
    for id in [1, 2] {
        send_tcp(&mut stream, &written(id, HOST, RecordType::A)).await;
        let by_tcp = receive_tcp(&mut stream).await.expect("an answer");
        assert_eq!((by_tcp.metadata.id, &by_tcp.answers), (id, &by_udp.answers));
    }
    // Two questions in one write, and one byte after the other.
    let mut bytes = Vec::new();
    for id in [3, 4] {
        let question = written(id, HOST, RecordType::A);
        bytes.extend(u16::try_from(question.len()).expect("short").to_be_bytes());
        bytes.extend(question);
    }
    for byte in bytes {
        stream.write_all(&[byte]).await.expect("it is sent");
    }
    for id in [3, 4] {
        assert_eq!(receive_tcp(&mut stream).await.expect("an answer").metadata.id, id);
    }
}

#[tokio::test]
async fn aliases_are_followed_and_only_direct_guests_see_them() {
    let fixture = Fixture::start(|asked| {
        let record = match asked.name.as_str() {
            HOST => alias(HOST, "a.cdn.net."),
            "a.cdn.net." => alias("a.cdn.net.", "b.cdn.net."),
            owner => host(owner, "203.0.113.9", 60),
        };
        vec![Act::Send(asked.answer(vec![record]))]
    })
    .await;
    let answer = fixture.ask(LISTED, HOST, RecordType::A).await;
    assert_eq!(answer.answers, [host(HOST, "203.0.113.9", 60)]);
    let answer = fixture.ask(DIRECT, HOST, RecordType::A).await;
    let targets =
        [alias(HOST, "a.cdn.net."), alias("a.cdn.net.", "b.cdn.net."), host("b.cdn.net.", "203.0.113.9", 60)];
    assert_eq!(answer.answers, targets);
}

#[tokio::test]
async fn a_circle_of_aliases_ends() {
    let fixture = Fixture::start(|asked| {
        let target = if asked.name == HOST { "b.example.com." } else { HOST };
        vec![Act::Send(asked.answer(vec![alias(&asked.name, target)]))]
    })
    .await;
    for guest in [LISTED, DIRECT] {
        let (_, addresses) = fixture.addresses(guest, HOST).await;
        assert_eq!(addresses, Vec::<IpAddr>::new());
    }
    let asked = fixture.authority.count(HOST) + fixture.authority.count("b.example.com.");
    assert!((2..=10).contains(&asked), "{asked} questions");
}

#[tokio::test]
async fn a_name_that_does_not_exist_is_remembered() {
    let fixture = Fixture::start(|asked| {
        let code = if asked.name == HOST { ResponseCode::NXDomain } else { ResponseCode::NoError };
        vec![Act::Send(asked.refusal(code))]
    })
    .await;
    for _ in 0..2 {
        assert_eq!(fixture.addresses(LISTED, HOST).await, (ResponseCode::NXDomain, vec![]));
        assert_eq!(fixture.addresses(LISTED, "b.example.com.").await, (ResponseCode::NoError, vec![]));
    }
    assert_eq!((fixture.authority.count(HOST), fixture.authority.count("b.example.com.")), (1, 1));
    let resolve = async |host| fixture.resolver.resolve(LISTED.into(), &parsed(host)).await;
    assert_eq!(resolve("api.example.com").await, Err(ResolveError::NoSuchHost));
    assert_eq!(resolve("b.example.com").await, Err(ResolveError::NoAddress));
    assert_eq!(resolve("evil.org").await, Err(ResolveError::NotAllowed(Reason::HostNotAllowed)));
    assert!(fixture.events().is_empty(), "what does not exist is not refused");
    fixture.advance(Duration::from_secs(30));
    fixture.addresses(LISTED, HOST).await;
    assert_eq!(fixture.authority.count(HOST), 2);
}

#[tokio::test]
async fn a_failure_of_the_upstream_server_is_an_answer_and_is_remembered_for_a_second() {
    let fixture = Fixture::start(|asked| match asked.name.as_str() {
        HOST => vec![Act::Send(asked.refusal(ResponseCode::ServFail))],
        _ => vec![Act::Send(asked.answer(vec![host(&asked.name, "203.0.113.1", 60)]))],
    })
    .await;
    assert_eq!(fixture.addresses(LISTED, HOST).await.0, ResponseCode::ServFail);
    let asked = fixture.authority.seen().len();
    assert_eq!(fixture.addresses(LISTED, HOST).await.0, ResponseCode::ServFail);
    assert_eq!(fixture.authority.seen().len(), asked);
    fixture.advance(Duration::from_secs(1));
    assert_eq!(fixture.addresses(LISTED, HOST).await.0, ResponseCode::ServFail);
    assert!(fixture.authority.seen().len() > asked);
    let failed = fixture.resolver.resolve(LISTED.into(), &parsed("api.example.com")).await;
    assert_eq!(failed, Err(ResolveError::Unanswered));
    assert_eq!(fixture.addresses(LISTED, "b.example.com.").await.1, [public(1)]);
}

#[tokio::test]
async fn equal_questions_are_asked_once() {
    let (open, gate) = watch::channel(false);
    let fixture = Fixture::start(move |asked| {
        let answer = asked.answer(vec![host(&asked.name, "203.0.113.1", 60)]);
        vec![Act::WaitFor(gate.clone()), Act::Send(answer)]
    })
    .await;
    let mut clients = Vec::new();
    for (guest, spelling) in [(LISTED, HOST), (LISTED, "API.example.com."), (MEDIATED, HOST), (DIRECT, HOST)]
    {
        let client = fixture.client(guest).await;
        client.send(&written(1, spelling, RecordType::A)).await;
        clients.push(client);
    }
    fixture.until(|fixture| fixture.resolver.counts().shared == 3).await;
    open.send(true).expect("the server waits");
    for client in clients {
        assert_eq!(addresses(&client.receive().await), [public(1)]);
    }
    assert_eq!(fixture.authority.count(HOST), 1);
    assert_eq!(fixture.resolver.counts().forwarded, 1);
}

#[tokio::test]
async fn an_answer_that_the_upstream_server_cut_is_asked_for_by_tcp() {
    let fixture = Fixture::start(|asked| {
        let mut answer = asked.answer(vec![host(&asked.name, "203.0.113.1", 60)]);
        if !asked.is_tcp {
            answer = answer.truncate();
        }
        vec![Act::Send(answer)]
    })
    .await;
    assert_eq!(fixture.addresses(LISTED, HOST).await.1, [public(1)]);
    let ways: Vec<bool> = fixture.authority.seen().iter().map(|asked| asked.is_tcp).collect();
    assert!(ways.contains(&false) && ways.contains(&true), "{ways:?}");
}

/// A text record of 200 bytes.
fn text(owner: &str) -> Record {
    Record::from_rdata(name(owner), 60, RData::TXT(TXT::new(vec!["x".repeat(200)])))
}

#[tokio::test]
async fn an_answer_that_is_too_long_for_udp_comes_by_tcp() {
    let fixture = Fixture::start(|asked| {
        let records: Vec<Record> =
            (1..=40).map(|last| host(&asked.name, &format!("203.0.113.{last}"), 60)).collect();
        vec![Act::Send(asked.answer(records))]
    })
    .await;
    let client = fixture.client(LISTED).await;
    client.send(&question(1, HOST, RecordType::A).to_vec().expect("written")).await;
    let bytes = client.receive_bytes().await;
    let cut = Message::from_vec(&bytes).expect("well-formed");
    assert!(bytes.len() <= 512 && cut.metadata.truncation && cut.answers.is_empty());
    let with_edns = fixture.ask(LISTED, HOST, RecordType::A).await;
    assert!(!with_edns.metadata.truncation && with_edns.answers.len() == 40);
    let mut stream = fixture.connect(LISTED).await;
    send_tcp(&mut stream, &question(2, HOST, RecordType::A).to_vec().expect("written")).await;
    let whole = receive_tcp(&mut stream).await.expect("an answer");
    assert!(!whole.metadata.truncation && whole.answers.len() == 40);
}

#[tokio::test]
async fn a_direct_guest_may_ask_for_every_type() {
    let fixture = Fixture::start(|asked| vec![Act::Send(asked.answer(vec![text(&asked.name)]))]).await;
    let answer = fixture.ask(DIRECT, "evil.org.", RecordType::TXT).await;
    assert_eq!(answer.answers, [text("evil.org.")]);
    assert!(fixture.events().is_empty());
}

#[tokio::test]
async fn instances_and_localhost_are_answered_here() {
    let fixture = Fixture::with_hosts().await;
    for guest in [LISTED, DIRECT] {
        assert_eq!(fixture.addresses(guest, "web.stead.internal.").await.1, [IpAddr::V4(MEDIATED)]);
        assert_eq!(fixture.addresses(guest, "localhost.").await.1, [IpAddr::from([127, 0, 0, 1])]);
        assert_eq!(fixture.addresses(guest, "x.stead.internal.").await.0, ResponseCode::NXDomain);
    }
    assert_eq!(fixture.take_reasons(), [Reason::UnknownInstance; 2]);
    let dialled = fixture.resolver.resolve(LISTED.into(), &parsed("web.stead.internal")).await;
    assert_eq!(dialled, Err(ResolveError::Denied(MEDIATED.into())), "a name gives no right to dial");
    assert!(fixture.authority.seen().is_empty());
}

#[tokio::test]
async fn nobody_but_guests_is_answered() {
    let fixture = Fixture::with_hosts().await;
    let client = fixture.client(NOBODY).await;
    client.send(&written(1, HOST, RecordType::A)).await;
    fixture.until(|fixture| fixture.resolver.counts().from_nobody == 1).await;
    let mut stream = fixture.connect(NOBODY).await;
    assert!(receive_tcp(&mut stream).await.is_none(), "the connection is closed");
    let resolved = patiently(fixture.resolver.resolve(NOBODY.into(), &parsed("api.example.com"))).await;
    assert_eq!(resolved, Err(ResolveError::NotAGuest));
    assert!(fixture.authority.seen().is_empty());
    assert_eq!(fixture.resolver.counts().questions, 0);
}
