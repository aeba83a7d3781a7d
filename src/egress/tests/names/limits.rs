//! Tests of limits: questions that wait, connections, and slow guests.

use std::net::Ipv4Addr;
use std::time::Duration;

use hickory_proto::op::ResponseCode;
use hickory_proto::rr::RecordType;
use stead_egress::names::{Reason, ResolveError, UpstreamTimes};
use tokio::io::AsyncWriteExt;
use tokio::sync::watch;

use super::authority::{Act, Asked, host};
use super::fixtures::{DIRECT, Fixture, LISTED, MEDIATED, addresses, receive_tcp, send_tcp, written};

fn an_answer(asked: &Asked) -> Vec<Act> {
    vec![Act::Send(asked.answer(vec![host(&asked.name, "203.0.113.1", 60)]))]
}

#[tokio::test]
async fn a_guest_whose_questions_nobody_answers_keeps_no_other_guest_waiting() {
    let (open, gate) = watch::channel(false);
    let fixture = Fixture::start(move |asked| {
        let is_late = asked.name.starts_with("late");
        let wait = is_late.then(|| Act::WaitFor(gate.clone()));
        wait.into_iter().chain(an_answer(asked)).collect()
    })
    .await;
    let client = fixture.client(LISTED).await;
    for number in 0..80 {
        client.send(&written(number, &format!("late{number}.example.com."), RecordType::A)).await;
    }
    // Those that have no share are answered at once.
    for number in 64..80 {
        let answer = client.receive().await;
        assert_eq!((answer.metadata.id, answer.metadata.response_code), (number, ResponseCode::ServFail));
    }
    assert_eq!(fixture.take_reasons(), [Reason::TooManyWaiting; 16]);
    let refused = fixture.resolver.resolve(LISTED.into(), &"x.example.com".parse().expect("a host")).await;
    assert_eq!(refused, Err(ResolveError::TooManyWaiting));
    for guest in [MEDIATED, DIRECT] {
        assert_eq!(fixture.addresses(guest, "web.example.com.").await.0, ResponseCode::NoError);
    }
    open.send(true).expect("the server waits");
    let mut ids = Vec::new();
    for _ in 0..64 {
        let answer = client.receive().await;
        assert_eq!(answer.metadata.response_code, ResponseCode::NoError);
        ids.push(answer.metadata.id);
    }
    ids.sort_unstable();
    assert_eq!(ids, (0..64).collect::<Vec<u16>>());
    assert_eq!(
        fixture.addresses(LISTED, "api.example.com.").await.0,
        ResponseCode::NoError,
        "it may ask again"
    );
}

#[tokio::test]
async fn a_question_that_nobody_answers_ends() {
    let times = UpstreamTimes { attempt: Duration::from_millis(500), answer: Duration::from_secs(5) };
    let fixture = Fixture::start_with(times, |_| Vec::new()).await;
    assert_eq!(fixture.addresses(LISTED, "lost.example.com.").await, (ResponseCode::ServFail, vec![]));
    let resolved =
        fixture.resolver.resolve(DIRECT.into(), &"lost.example.com".parse().expect("a host")).await;
    assert_eq!(resolved, Err(ResolveError::Unanswered));
    assert_eq!(fixture.resolver.counts().upstream_failures, 1);
    fixture.until(|fixture| fixture.authority.count("lost.example.com.") > 0).await;
}

#[tokio::test]
async fn the_time_limit_holds_for_all_attempts_together() {
    let times = UpstreamTimes { attempt: Duration::from_secs(60), answer: Duration::from_millis(200) };
    let fixture = Fixture::start_with(times, |_| Vec::new()).await;
    assert_eq!(fixture.addresses(LISTED, "lost.example.com.").await, (ResponseCode::ServFail, vec![]));
}

#[tokio::test]
async fn a_guest_has_32_connections_and_the_others_theirs() {
    let fixture = Fixture::start(an_answer).await;
    let mut streams = Vec::new();
    for _ in 0..32 {
        let mut stream = fixture.connect(LISTED).await;
        send_tcp(&mut stream, &written(1, "api.example.com.", RecordType::A)).await;
        assert!(receive_tcp(&mut stream).await.is_some());
        streams.push(stream);
    }
    let mut one_more = fixture.connect(LISTED).await;
    assert!(receive_tcp(&mut one_more).await.is_none(), "it is closed");
    assert_eq!(fixture.resolver.counts().connections_refused, 1);
    let question = written(1, "api.example.com.", RecordType::A);
    let bytes = [&u16::try_from(question.len()).expect("short").to_be_bytes()[..], &question].concat();
    // A connection that was closed at once cannot be written to.
    let answered = async |guest: Ipv4Addr| {
        let mut stream = fixture.connect(guest).await;
        let is_sent = stream.write_all(&bytes).await.is_ok();
        is_sent && receive_tcp(&mut stream).await.is_some_and(|answer| addresses(&answer).len() == 1)
    };
    assert!(answered(MEDIATED).await);
    drop(streams);
    // The connections end when the resolver notices.
    while !answered(LISTED).await {
        tokio::task::yield_now().await;
    }
}

// Time is not real in these tests: when nothing happens any more, it goes on to the next time limit.

#[tokio::test(start_paused = true)]
async fn a_connection_on_which_nothing_comes_is_closed() {
    let fixture = Fixture::start(an_answer).await;
    let mut stream = fixture.connect(LISTED).await;
    assert!(receive_tcp(&mut stream).await.is_none());
}

#[tokio::test(start_paused = true)]
async fn a_connection_on_which_half_a_question_comes_is_closed() {
    let fixture = Fixture::start(an_answer).await;
    for length in [1, 2, 20] {
        let mut stream = fixture.connect(LISTED).await;
        let question = written(1, "api.example.com.", RecordType::A);
        let bytes = [&u16::try_from(question.len()).expect("short").to_be_bytes()[..], &question].concat();
        stream.write_all(&bytes[..length]).await.expect("it is sent");
        assert!(receive_tcp(&mut stream).await.is_none(), "{length}");
    }
    assert!(fixture.authority.seen().is_empty());
}
