//! Messages of DNS as guests send them and as they are answered.
//!
//! Guarantees: whatever the bytes, [`read`] returns and never panics; the header's counts are checked before anything
//! is read that depends on them; a message that is itself a response is never answered, so that two servers cannot
//! answer each other for ever.

use hickory_proto::op::{Edns, Header, Message, MessageType, OpCode, Query, ResponseCode};
use hickory_proto::rr::{DNSClass, Name, Record, RecordType};
use hickory_proto::serialize::binary::{BinDecodable, BinDecoder};

use super::limits::{
    ADDITIONALS_MAX, TCP_QUESTION_BYTES_MAX, UDP_ANSWER_BYTES_MAX, UDP_ANSWER_BYTES_MIN,
    UDP_QUESTION_BYTES_MAX,
};
use super::report::Reason;

/// The way by which a question came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Transport {
    Udp,
    Tcp,
}

/// A well-formed question.
#[derive(Debug, Clone)]
pub(crate) struct Question {
    id: u16,
    /// The name as the sender spelled it; it expects the same spelling in the answer.
    pub(crate) name: Name,
    pub(crate) record_type: RecordType,
    class: DNSClass,
    is_recursion_desired: bool,
    is_checking_disabled: bool,
    has_edns: bool,
    /// The largest answer, in bytes.
    answer_bytes_max: u16,
}

/// The result of reading a message.
#[derive(Debug)]
pub(crate) enum Received {
    Question(Question),
    /// Bytes that are no question: nothing is answered.
    Silence,
    /// A message that is answered with an error in every case: the reason and the bytes of the answer.
    Refused(Reason, Vec<u8>),
}

/// Reads a message from a guest.
pub(crate) fn read(bytes: &[u8], transport: Transport) -> Received {
    let Ok(header) = Header::read(&mut BinDecoder::new(bytes)) else { return Received::Silence };
    if header.metadata.message_type == MessageType::Response {
        return Received::Silence;
    }
    let (code, answer) = match question(bytes, &header, transport) {
        Ok((question, None)) => return Received::Question(question),
        // A sender recognises the answer by its question.
        Ok((question, Some(code))) => (code, question.reply(code, Vec::new())),
        Err(code) => (code, error(&header, code)),
    };
    let reason = if code == ResponseCode::FormErr { Reason::Malformed } else { Reason::Unsupported };
    answer.map_or(Received::Silence, |bytes| Received::Refused(reason, bytes))
}

/// Reads a question, with the code by which it is refused, if it is one that nobody here answers.
fn question(
    bytes: &[u8],
    header: &Header,
    transport: Transport,
) -> Result<(Question, Option<ResponseCode>), ResponseCode> {
    let longest = match transport {
        Transport::Udp => UDP_QUESTION_BYTES_MAX,
        Transport::Tcp => TCP_QUESTION_BYTES_MAX,
    };
    if header.metadata.op_code != OpCode::Query {
        return Err(ResponseCode::NotImp);
    }
    // The authority section of IXFR has one record; nothing else has any.
    let counts = &header.counts;
    let is_plain = counts.queries == 1 && counts.answers == 0 && counts.authorities <= 1;
    if bytes.len() > longest || !is_plain || counts.additionals > ADDITIONALS_MAX {
        return Err(ResponseCode::FormErr);
    }
    let message = Message::from_vec(bytes).map_err(|_| ResponseCode::FormErr)?;
    let query = message.queries.first().ok_or(ResponseCode::FormErr)?.clone();
    let question = Question {
        id: header.metadata.id,
        name: query.name().clone(),
        record_type: query.query_type(),
        class: query.query_class(),
        is_recursion_desired: header.metadata.recursion_desired,
        is_checking_disabled: header.metadata.checking_disabled,
        has_edns: message.edns.is_some(),
        answer_bytes_max: answer_bytes_max(message.edns.as_ref(), transport),
    };
    let refusal = if message.edns.as_ref().is_some_and(|edns| edns.version() > 0) {
        Some(ResponseCode::BADVERS)
    } else if question.class != DNSClass::IN || is_transfer_or_meta(question.record_type) {
        Some(ResponseCode::Refused)
    } else {
        (counts.authorities > 0).then_some(ResponseCode::FormErr)
    };
    Ok((question, refusal))
}

/// Returns the largest answer that the sender takes, in bytes.
fn answer_bytes_max(edns: Option<&Edns>, transport: Transport) -> u16 {
    match transport {
        Transport::Tcp => u16::MAX,
        Transport::Udp => edns
            .map_or(UDP_ANSWER_BYTES_MIN, Edns::max_payload)
            .clamp(UDP_ANSWER_BYTES_MIN, UDP_ANSWER_BYTES_MAX),
    }
}

/// First and last number of the types that are for questions and for transactions only: TKEY and TSIG, the transfers
/// and the obsolete mail types. ANY, 255, is left out: those who may ask for all types may ask for it.
const META_TYPES: std::ops::RangeInclusive<u16> = 249..=254;

/// Position of the first byte of flags in a message.
const FLAGS_AT: usize = 2;
/// The flag in it that marks an answer from which records are missing.
const TRUNCATED: u8 = 0b10;

/// Returns whether a type asks for a transfer of a zone, or is no type of records.
fn is_transfer_or_meta(record_type: RecordType) -> bool {
    let number = u16::from(record_type);
    number == 0 || record_type == RecordType::OPT || META_TYPES.contains(&number)
}

/// Returns an answer that has only a header, or `None` if it cannot be written.
fn error(header: &Header, code: ResponseCode) -> Option<Vec<u8>> {
    let mut message = Message::error_msg(header.metadata.id, header.metadata.op_code, code);
    message.metadata.recursion_desired = header.metadata.recursion_desired;
    message.metadata.recursion_available = true;
    message.to_vec().ok()
}

fn our_edns() -> Edns {
    let mut edns = Edns::new();
    edns.set_max_payload(UDP_ANSWER_BYTES_MAX);
    edns
}

impl Question {
    /// Returns the answer with these records; one that is larger than the sender takes has none, and the mark that asks
    /// the sender to come by TCP. Returns `None` if no answer can be written.
    pub(crate) fn reply(&self, code: ResponseCode, answers: Vec<Record>) -> Option<Vec<u8>> {
        let bytes = self.message(code, answers).to_vec().ok();
        if let Some(bytes) = bytes.filter(|bytes| self.takes(bytes)) {
            return Some(bytes);
        }
        let (code, is_truncated) =
            if self.answer_bytes_max == u16::MAX { (ResponseCode::ServFail, false) } else { (code, true) };
        let mut message = self.message(code, Vec::new());
        message.metadata.truncation = is_truncated;
        message.to_vec().ok()
    }

    /// Returns whether an answer is whole and not larger than the sender takes. The library itself cuts an answer that
    /// is larger than a message can be.
    fn takes(&self, bytes: &[u8]) -> bool {
        let is_cut = bytes.get(FLAGS_AT).is_none_or(|flags| flags & TRUNCATED != 0);
        !is_cut && bytes.len() <= usize::from(self.answer_bytes_max)
    }

    fn message(&self, code: ResponseCode, answers: Vec<Record>) -> Message {
        let mut message = Message::response(self.id, OpCode::Query);
        message.metadata.response_code = code;
        message.metadata.recursion_desired = self.is_recursion_desired;
        message.metadata.recursion_available = true;
        message.metadata.checking_disabled = self.is_checking_disabled;
        let mut query = Query::query(self.name.clone(), self.record_type);
        query.set_query_class(self.class);
        message.add_query(query);
        message.add_answers(answers);
        if self.has_edns {
            message.set_edns(our_edns());
        }
        message
    }
}

#[cfg(test)]
#[path = "message_tests.rs"]
mod tests;
