//! Tests of rows 22 and 25: tunnels and malformed questions. Nobody outside is asked anything.

use hickory_proto::op::{Message, OpCode, ResponseCode};
use hickory_proto::rr::{DNSClass, RecordType};
use stead_egress::names::Reason;
use tokio::io::AsyncWriteExt;

use super::fixtures::{DIRECT, Fixture, LISTED, MEDIATED, question, receive_tcp, send_tcp, written};

const HOST: &str = "api.example.com.";

#[tokio::test]
async fn row_22_types_of_tunnels_are_refused() {
    let fixture = Fixture::with_hosts().await;
    let types = [
        RecordType::TXT,
        RecordType::NULL,
        RecordType::ANY,
        RecordType::MX,
        RecordType::SRV,
        RecordType::NAPTR,
        RecordType::CNAME,
        RecordType::Unknown(65_399),
    ];
    for guest in [LISTED, MEDIATED] {
        for record_type in types {
            let answer = fixture.ask(guest, HOST, record_type).await;
            assert_eq!(answer.metadata.response_code, ResponseCode::Refused, "{record_type}");
            assert_eq!(answer.queries, question(1, HOST, record_type).queries);
        }
    }
    assert_eq!(fixture.take_reasons(), [Reason::TypeNotAllowed; 16]);
    assert!(fixture.authority.seen().is_empty());
    assert_eq!(fixture.resolver.counts().refused, 16);
}

#[tokio::test]
async fn row_22_with_a_list_names_of_a_tunnel_reach_nobody() {
    let fixture = Fixture::with_hosts().await;
    let data = "a".repeat(63);
    let names = [
        format!("{data}.t.evil.org."),
        format!("{data}.{data}.{data}.example.com."),
        "t.evil.org.".to_owned(),
        "evilexample.com.".to_owned(),
        "example.com.evil.org.".to_owned(),
        "a?b.t.example.com.".to_owned(),
        "tunnel.".to_owned(),
    ];
    for name in &names {
        for record_type in [RecordType::A, RecordType::AAAA, RecordType::HTTPS] {
            let answer = fixture.ask(LISTED, name, record_type).await;
            assert_eq!(answer.metadata.response_code, ResponseCode::NXDomain, "{name} {record_type}");
        }
    }
    assert!(fixture.authority.seen().is_empty());
    let reasons = fixture.take_reasons();
    assert_eq!(reasons.len(), 21);
    for reason in [Reason::HostNotAllowed, Reason::NameTooLong, Reason::NotAHost, Reason::SingleLabel] {
        assert!(reasons.contains(&reason), "{reason:?}");
    }
}

#[tokio::test]
async fn row_22_a_thousand_questions_at_once_are_answered_two_hundred_times() {
    let fixture = Fixture::with_hosts().await;
    let client = fixture.client(LISTED).await;
    let mut codes = Vec::new();
    for number in 0..1000 {
        client.send(&written(number, &format!("d{number}.t.evil.org."), RecordType::A)).await;
        codes.push(client.receive().await.metadata.response_code);
    }
    let refused = codes.iter().position(|code| *code == ResponseCode::Refused);
    assert_eq!(refused, Some(200));
    assert!(codes[..200].iter().all(|code| *code == ResponseCode::NXDomain));
    assert!(codes[200..].iter().all(|code| *code == ResponseCode::Refused));
    assert_eq!(fixture.resolver.counts().too_many_questions, 800);
    assert!(fixture.authority.seen().is_empty());
    assert_eq!(fixture.addresses(MEDIATED, HOST).await.0, ResponseCode::NoError, "others are answered");
    fixture.advance(std::time::Duration::from_secs(1));
    let mut allowed = 0;
    while fixture.ask(LISTED, "t.evil.org.", RecordType::A).await.metadata.response_code
        != ResponseCode::Refused
    {
        allowed += 1;
    }
    assert_eq!(allowed, 50);
}

#[tokio::test]
async fn row_22_a_connection_that_asks_too_often_is_closed() {
    let fixture = Fixture::with_hosts().await;
    let mut stream = fixture.connect(LISTED).await;
    let mut answered = 0;
    loop {
        send_tcp(&mut stream, &written(answered, "t.evil.org.", RecordType::A)).await;
        if receive_tcp(&mut stream).await.is_none() {
            break;
        }
        answered += 1;
    }
    assert_eq!(answered, 200);
}

#[tokio::test]
async fn row_25_names_of_the_own_subnet_stay_here() {
    let fixture = Fixture::with_hosts().await;
    for guest in [LISTED, DIRECT] {
        let answer = fixture.ask(guest, "9.0.100.10.in-addr.arpa.", RecordType::PTR).await;
        assert_eq!(answer.metadata.response_code, ResponseCode::NXDomain);
    }
    let answer = fixture.ask(MEDIATED, "1.0.168.192.in-addr.arpa.", RecordType::PTR).await;
    assert_eq!(answer.metadata.response_code, ResponseCode::Refused);
    assert!(fixture.authority.seen().is_empty());
}

/// A header with these flags and counts, and the bytes that follow it.
fn raw(flags: [u8; 2], counts: [u8; 4], rest: &[u8]) -> Vec<u8> {
    let [questions, answers, authorities, additionals] = counts;
    let mut bytes = vec![0, 9, flags[0], flags[1], 0, questions, 0, answers, 0, authorities, 0, additionals];
    bytes.extend(rest);
    bytes
}

/// `version.bind`, TXT, CHAOS.
const VERSION: &[u8] = b"\x07version\x04bind\x00\x00\x10\x00\x03";
/// `example.com`, AXFR, IN.
const TRANSFER: &[u8] = b"\x07example\x03com\x00\x00\xfc\x00\x01";
/// `api.example.com`, A, IN.
const PLAIN: &[u8] = b"\x03api\x07example\x03com\x00\x00\x01\x00\x01";

/// Questions in bytes as no client writes them, each with the code that it is answered with.
fn abuses() -> Vec<(&'static str, Vec<u8>, ResponseCode)> {
    let mut bomb = vec![63; 64];
    bomb.extend([0xc0, 12].repeat(100));
    let transfer = raw([1, 0], [1, 0, 0, 0], TRANSFER);
    vec![
        ("chaos", raw([1, 0], [1, 0, 0, 0], VERSION), ResponseCode::Refused),
        ("transfer", transfer.clone(), ResponseCode::Refused),
        ("notify", raw([0x20, 0], [1, 0, 0, 0], PLAIN), ResponseCode::NotImp),
        ("update", raw([0x28, 0], [1, 0, 0, 0], PLAIN), ResponseCode::NotImp),
        ("status", raw([0x10, 0], [1, 0, 0, 0], PLAIN), ResponseCode::NotImp),
        ("no question", raw([1, 0], [0, 0, 0, 0], &[]), ResponseCode::FormErr),
        ("two questions", raw([1, 0], [2, 0, 0, 0], &[PLAIN, PLAIN].concat()), ResponseCode::FormErr),
        (
            "65,535 questions",
            [&[0, 9, 1, 0, 255, 255, 0, 0, 0, 0, 0, 0][..], PLAIN].concat(),
            ResponseCode::FormErr,
        ),
        ("an answer", raw([1, 0], [1, 1, 0, 0], PLAIN), ResponseCode::FormErr),
        ("a pointer to itself", raw([1, 0], [1, 0, 0, 0], &[0xc0, 12, 0, 1, 0, 1]), ResponseCode::FormErr),
        ("a bomb of pointers", raw([1, 0], [1, 0, 0, 2], &bomb), ResponseCode::FormErr),
        ("a cut question", raw([1, 0], [1, 0, 0, 0], &PLAIN[..9]), ResponseCode::FormErr),
        ("a header alone", raw([1, 0], [1, 0, 0, 0], &[]), ResponseCode::FormErr),
    ]
}

#[tokio::test]
async fn row_25_abuses_are_answered_with_their_code_and_reach_nobody() {
    let fixture = Fixture::with_hosts().await;
    for (what, bytes, code) in abuses() {
        for guest in [LISTED, DIRECT] {
            let client = fixture.client(guest).await;
            client.send(&bytes).await;
            let answer = client.receive().await;
            assert_eq!((answer.metadata.id, answer.metadata.response_code), (9, code), "{what} by UDP");
            let mut stream = fixture.connect(guest).await;
            send_tcp(&mut stream, &bytes).await;
            let answer = receive_tcp(&mut stream).await.expect("an answer");
            assert_eq!((answer.metadata.id, answer.metadata.response_code), (9, code), "{what} by TCP");
        }
    }
    let is_malformed = |code: &ResponseCode| *code == ResponseCode::FormErr;
    let malformed = abuses().iter().filter(|(_, _, code)| is_malformed(code)).count();
    let reasons = fixture.take_reasons();
    assert_eq!(reasons.iter().filter(|reason| **reason == Reason::Malformed).count(), 4 * malformed);
    let unsupported = reasons.iter().filter(|reason| **reason == Reason::Unsupported).count();
    assert_eq!(unsupported, 4 * (abuses().len() - malformed));
    assert!(fixture.authority.seen().is_empty());
}

#[tokio::test]
async fn row_25_what_is_no_question_is_not_answered() {
    let fixture = Fixture::with_hosts().await;
    let client = fixture.client(LISTED).await;
    let response = raw([0x81, 0x80], [1, 0, 0, 0], PLAIN);
    for bytes in [&b""[..], b"x", &response[..11], &response[..]] {
        client.send(bytes).await;
    }
    client.send(&written(77, "t.evil.org.", RecordType::A)).await;
    assert_eq!(client.receive().await.metadata.id, 77, "the first answer is for the first question");
    assert_eq!(fixture.resolver.counts().malformed, 4);
    let too_long = [&raw([1, 0], [1, 0, 0, 0], PLAIN)[..], &[0; 500]].concat();
    client.send(&too_long).await;
    assert_eq!(client.receive().await.metadata.response_code, ResponseCode::FormErr);
    assert!(fixture.authority.seen().is_empty());
}

#[tokio::test]
async fn row_25_a_connection_with_a_response_an_empty_or_a_long_message_is_closed() {
    let fixture = Fixture::with_hosts().await;
    let response = raw([0x81, 0x80], [1, 0, 0, 0], PLAIN);
    let length = u16::try_from(response.len()).expect("short").to_be_bytes();
    let openings = [vec![0, 0], vec![0x10, 0x01], vec![0xff, 0xff], [&length[..], &response].concat()];
    for bytes in openings {
        let mut stream = fixture.connect(LISTED).await;
        stream.write_all(&bytes).await.expect("it is sent");
        assert!(receive_tcp(&mut stream).await.is_none(), "{bytes:?}");
    }
    assert_eq!(fixture.addresses(LISTED, HOST).await.0, ResponseCode::NoError, "others are served");
}

#[tokio::test]
async fn row_25_every_class_but_the_internet_is_refused() {
    let fixture = Fixture::with_hosts().await;
    for class in [DNSClass::CH, DNSClass::HS, DNSClass::NONE, DNSClass::ANY, DNSClass::Unknown(9)] {
        let mut asked = question(3, HOST, RecordType::A);
        asked.queries[0].set_query_class(class);
        let client = fixture.client(DIRECT).await;
        client.send(&asked.to_vec().expect("written")).await;
        let answer: Message = client.receive().await;
        assert_eq!(answer.metadata.response_code, ResponseCode::Refused, "{class}");
        assert_eq!((answer.metadata.op_code, &answer.queries), (OpCode::Query, &asked.queries));
    }
    assert!(fixture.authority.seen().is_empty());
}
