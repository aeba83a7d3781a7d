//! Tests of messages: what each kind of message is answered with, and that no bytes make the parser panic.

use hickory_proto::rr::RData;
use hickory_proto::rr::rdata::TXT;
use proptest::prelude::*;

use super::*;

fn name(text: &str) -> Name {
    Name::from_ascii(text).expect("a name")
}

/// A question as a client writes it, changed by `change`.
fn written(change: impl FnOnce(&mut Message)) -> Vec<u8> {
    let mut message = Message::new(7, MessageType::Query, OpCode::Query);
    message.metadata.recursion_desired = true;
    message.add_query(Query::query(name("Api.Example.com."), RecordType::A));
    change(&mut message);
    message.to_vec().expect("it can be written")
}

fn asked(bytes: &[u8]) -> Question {
    match read(bytes, Transport::Udp) {
        Received::Question(question) => question,
        other => panic!("{other:?}"),
    }
}

fn refused(bytes: &[u8]) -> Message {
    match read(bytes, Transport::Udp) {
        Received::Refused(_, bytes) => Message::from_vec(&bytes).expect("our own answer"),
        other => panic!("{other:?}"),
    }
}

fn with_type(record_type: RecordType) -> Vec<u8> {
    written(|message| {
        message.queries[0].set_query_type(record_type);
    })
}

fn text_record(length: usize) -> Record {
    let text = TXT::new(vec!["x".repeat(200); length / 200]);
    Record::from_rdata(name("api.example.com."), 5, RData::TXT(text))
}

#[test]
fn a_question_is_answered_with_its_own_id_name_and_flags() {
    let question = asked(&written(|message| message.metadata.checking_disabled = true));
    let bytes = question.reply(ResponseCode::NoError, Vec::new()).expect("written");
    let answer = Message::from_vec(&bytes).expect("our own answer");
    assert_eq!(answer.metadata.id, 7);
    assert_eq!(answer.metadata.message_type, MessageType::Response);
    assert!(answer.queries[0].name().eq_case(&name("Api.Example.com.")));
    assert!(answer.metadata.recursion_desired && answer.metadata.recursion_available);
    assert!(answer.metadata.checking_disabled && !answer.metadata.authentic_data);
    assert!(answer.edns.is_none(), "a sender without EDNS gets none");
}

#[test]
fn other_classes_transfers_and_meta_types_are_refused_with_their_question() {
    let chaos = written(|message| {
        message.queries[0].set_query_class(DNSClass::CH).set_query_type(RecordType::TXT);
    });
    let types =
        [RecordType::AXFR, RecordType::IXFR, RecordType::TSIG, RecordType::OPT, RecordType::Unknown(249)];
    for bytes in [chaos].into_iter().chain(types.map(with_type)) {
        let answer = refused(&bytes);
        assert_eq!(answer.metadata.response_code, ResponseCode::Refused);
        assert_eq!(answer.queries, Message::from_vec(&bytes).expect("ours").queries);
    }
}

#[test]
fn an_incremental_transfer_with_its_record_is_refused() {
    let bytes = written(|message| {
        message.queries[0].set_query_type(RecordType::IXFR);
        message.add_authority(text_record(200));
    });
    assert_eq!(refused(&bytes).metadata.response_code, ResponseCode::Refused);
}

#[test]
fn other_operations_are_not_implemented() {
    for op_code in [OpCode::Status, OpCode::Notify, OpCode::Unknown(1), OpCode::Unknown(15)] {
        let answer = refused(&written(|message| message.metadata.op_code = op_code));
        assert_eq!((answer.metadata.response_code, answer.metadata.op_code), (ResponseCode::NotImp, op_code));
        assert_eq!(answer.metadata.id, 7);
    }
}

#[test]
fn a_message_with_other_than_one_question_or_with_answers_is_malformed() {
    let none = written(|message| message.queries.clear());
    let two = written(|message| {
        message.add_query(Query::query(name("b.example."), RecordType::A));
    });
    let answered = written(|message| {
        message.add_answer(text_record(200));
    });
    let with_authority = written(|message| {
        message.add_authority(text_record(200));
    });
    for bytes in [none, two, answered, with_authority] {
        assert_eq!(refused(&bytes).metadata.response_code, ResponseCode::FormErr);
    }
}

#[test]
fn counts_that_the_bytes_do_not_hold_are_malformed() {
    for at in [5, 7, 9, 11] {
        for count in [2, 255] {
            let mut bytes = written(|_| {});
            (bytes[at - 1], bytes[at]) = (count, count);
            assert_eq!(refused(&bytes).metadata.response_code, ResponseCode::FormErr, "count at {at}");
        }
    }
}

#[test]
fn a_name_that_points_at_itself_is_malformed() {
    let mut bytes = vec![0, 7, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    bytes.extend([0xc0, 12, 0, 1, 0, 1]);
    assert_eq!(refused(&bytes).metadata.response_code, ResponseCode::FormErr);
}

#[test]
fn a_label_of_64_bytes_or_a_name_of_256_is_malformed() {
    let with_labels = |labels: &[usize]| {
        let mut bytes = vec![0, 7, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
        for length in labels {
            bytes.push(u8::try_from(*length).expect("a byte"));
            bytes.extend(std::iter::repeat_n(b'a', *length));
        }
        bytes.extend([0, 0, 1, 0, 1]);
        bytes
    };
    assert_eq!(asked(&with_labels(&[63, 63, 63, 61])).name.num_labels(), 4);
    for labels in [&[64][..], &[63, 63, 63, 62], &[63; 5]] {
        assert_eq!(refused(&with_labels(labels)).metadata.response_code, ResponseCode::FormErr);
    }
}

#[test]
fn a_response_or_a_cut_header_is_not_answered() {
    let response = written(|message| message.metadata.message_type = MessageType::Response);
    for bytes in [&response[..], &response[..11], &[], &[0; 11]] {
        assert!(matches!(read(bytes, Transport::Udp), Received::Silence));
    }
}

#[test]
fn questions_of_512_bytes_by_udp_and_4096_by_tcp_are_the_longest() {
    // EDNS option 12 is padding: four bytes of head, and the length that is needed.
    let padded = |length: usize| {
        let mut bytes = written(|message| {
            message.set_edns(Edns::new());
        });
        let padding = length - bytes.len();
        let head = u16::try_from(padding).expect("short").to_be_bytes();
        let content = u16::try_from(padding - 4).expect("short").to_be_bytes();
        let at = bytes.len() - 2;
        bytes[at..].copy_from_slice(&head);
        bytes.extend([0, 12]);
        bytes.extend(content);
        bytes.resize(length, 0);
        bytes
    };
    let is_taken = |length, transport| matches!(read(&padded(length), transport), Received::Question(_));
    assert!(is_taken(512, Transport::Udp) && !is_taken(513, Transport::Udp));
    assert!(is_taken(4096, Transport::Tcp) && !is_taken(4097, Transport::Tcp));
}

#[test]
fn a_newer_version_of_edns_is_answered_with_our_version() {
    let mut edns = Edns::new();
    edns.set_version(1);
    let answer = refused(&written(|message| {
        message.set_edns(edns);
    }));
    // The library reads number 16, which two codes have, as the other one.
    assert_eq!(u16::from(answer.metadata.response_code), u16::from(ResponseCode::BADVERS));
    assert_eq!(answer.edns.map(|edns| edns.version()), Some(0));
}

#[test]
fn an_answer_that_is_too_long_is_empty_and_marked() {
    let with_size = |size: Option<u16>| {
        asked(&written(|message| {
            if let Some(size) = size {
                let mut edns = Edns::new();
                edns.set_max_payload(size);
                message.set_edns(edns);
            }
        }))
    };
    let lengths = [(None, 400, 600), (Some(100), 400, 600), (Some(800), 600, 1000), (Some(9000), 1000, 1400)];
    for (size, fits, is_too_long) in lengths {
        let question = with_size(size);
        let answer = |length| {
            let bytes = question.reply(ResponseCode::NoError, vec![text_record(length)]).expect("written");
            Message::from_vec(&bytes).expect("our own answer")
        };
        let short = answer(fits);
        assert!(!short.metadata.truncation && short.answers.len() == 1, "{size:?}");
        let long = answer(is_too_long);
        assert!(long.metadata.truncation && long.answers.is_empty(), "{size:?}");
        assert_eq!(long.queries.len(), 1);
    }
}

#[test]
fn an_answer_by_tcp_is_never_marked() {
    let Received::Question(question) = read(&written(|_| {}), Transport::Tcp) else { panic!("a question") };
    let answer = |records| {
        let bytes = question.reply(ResponseCode::NoError, records).expect("written");
        Message::from_vec(&bytes).expect("our own answer")
    };
    let long = answer(vec![text_record(60_000)]);
    assert!(!long.metadata.truncation && long.answers.len() == 1);
    let impossible = answer(vec![text_record(40_000), text_record(40_000)]);
    assert_eq!(impossible.metadata.response_code, ResponseCode::ServFail);
    assert!(!impossible.metadata.truncation && impossible.answers.is_empty());
}

/// Reads bytes by both ways, and answers what can be answered.
fn read_and_answer(bytes: &[u8]) -> Result<(), TestCaseError> {
    for transport in [Transport::Udp, Transport::Tcp] {
        let answer = match read(bytes, transport) {
            Received::Silence => continue,
            Received::Refused(_, answer) => answer,
            Received::Question(question) => {
                prop_assert!(bytes.len() <= TCP_QUESTION_BYTES_MAX);
                question.reply(ResponseCode::NXDomain, Vec::new()).expect("it can be written")
            }
        };
        prop_assert_eq!(&answer[..2], &bytes[..2], "the id is the sender's");
        prop_assert!(answer[2] & 0x80 != 0 && bytes[2] & 0x80 == 0, "a response to what is none");
        // An answer is not longer than its question by more than EDNS and what compression of the name had saved.
        prop_assert!(answer.len() <= bytes.len() + 300);
    }
    Ok(())
}

proptest! {
    #[test]
    fn arbitrary_bytes_are_read_without_panic(bytes in prop::collection::vec(any::<u8>(), 0..700)) {
        read_and_answer(&bytes)?;
    }

    #[test]
    fn mutated_questions_are_read_without_panic(
        record_type: u16,
        has_edns: bool,
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6),
        length in any::<prop::sample::Index>(),
        is_cut: bool,
    ) {
        let mut bytes = written(|message| {
            message.queries[0].set_query_type(RecordType::from(record_type));
            if has_edns {
                message.set_edns(Edns::new());
            }
        });
        for (at, value) in changes {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        if is_cut {
            bytes.truncate(length.index(bytes.len()));
        }
        read_and_answer(&bytes)?;
    }
}
