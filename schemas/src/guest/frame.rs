//! Frames: magic, payload length, kind, stream id, payload.
//!
//! Guarantees: decoding never panics, never holds more than a frame of the largest size plus one read, and
//! finds the next frame after garbage.

use serde::{Deserialize, Serialize};

/// The first bytes of every frame. A byte that no UTF-8 text contains comes first, so that JSON never
/// contains the magic.
pub const MAGIC: [u8; 4] = [0xf7, b's', b't', b'd'];
/// Size of a frame's header, in bytes: magic, length, kind, stream.
pub const HEADER_BYTES: usize = 13;
/// Size of the largest payload, in bytes: a configuration with the largest environment and argument list,
/// escaped.
pub const PAYLOAD_BYTES_MAX: usize = 1 << 20;
/// The kind of a frame. Host and guest send the same kinds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FrameKind {
    /// A control message on stream 0: [`super::ToGuest`] or [`super::FromGuest`].
    Control,
    /// The start of a stream, from host to guest, with a [`super::Open`].
    Open,
    /// Bytes of the stream: standard input and output, contents of files.
    Data,
    /// Bytes of standard error, for streams that separate it from standard output.
    ErrorData,
    /// The end of data: no more [`FrameKind::Data`] comes from this side.
    Eof,
    /// A [`super::ToStream`] or [`super::FromStream`].
    Message,
    /// A grant of window: the payload is four bytes, little endian, with the number of further bytes of data
    /// that may be sent.
    Window,
    /// The end of the stream; data that still arrives for it is dropped.
    Close,
}

impl FrameKind {
    const ALL: [Self; 8] = [
        Self::Control,
        Self::Open,
        Self::Data,
        Self::ErrorData,
        Self::Eof,
        Self::Message,
        Self::Window,
        Self::Close,
    ];

    fn code(self) -> u8 {
        match self {
            Self::Control => 0,
            Self::Open => 1,
            Self::Data => 2,
            Self::ErrorData => 3,
            Self::Eof => 4,
            Self::Message => 5,
            Self::Window => 6,
            Self::Close => 7,
        }
    }

    fn of(code: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.code() == code)
    }
}

/// A frame; its payload lies wherever its sender keeps it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame<Payload = Vec<u8>> {
    pub kind: FrameKind,
    pub stream: u32,
    pub payload: Payload,
}

/// The error for a payload larger than [`PAYLOAD_BYTES_MAX`]; the number is its size in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a frame of {0} bytes is larger than the protocol allows")]
pub struct TooLarge(pub usize);

impl Frame {
    /// Makes a control frame.
    ///
    /// # Errors
    /// Fails when the message is larger than a frame.
    pub fn control<T: Serialize>(message: &T) -> Result<Self, TooLarge> {
        let payload = serde_json::to_vec(message).unwrap_or_default();
        if payload.len() > PAYLOAD_BYTES_MAX {
            return Err(TooLarge(payload.len()));
        }
        Ok(Self { kind: FrameKind::Control, stream: 0, payload })
    }

    /// Makes a frame of a stream with a JSON payload.
    ///
    /// # Errors
    /// Fails when the message is larger than a frame.
    pub fn json<T: Serialize>(kind: FrameKind, stream: u32, message: &T) -> Result<Self, TooLarge> {
        Ok(Self { kind, stream, ..Self::control(message)? })
    }

    /// Makes a frame that grants so many further bytes of data on this stream.
    #[must_use]
    pub fn window(stream: u32, bytes: u32) -> Self {
        Self { kind: FrameKind::Window, stream, payload: bytes.to_le_bytes().to_vec() }
    }

    /// Makes a frame without a payload: its kind says all.
    #[must_use]
    pub fn bare(kind: FrameKind, stream: u32) -> Self {
        Self { kind, stream, payload: Vec::new() }
    }

    /// Returns the message of a control frame; `None` for other frames and for a payload that does not
    /// parse.
    #[must_use]
    pub fn message<T: for<'de> Deserialize<'de>>(&self) -> Option<T> {
        let is_control = self.kind == FrameKind::Control && self.stream == 0;
        is_control.then(|| self.parse()).flatten()
    }

    /// Parses the JSON payload of a frame of any kind.
    #[must_use]
    pub fn parse<T: for<'de> Deserialize<'de>>(&self) -> Option<T> {
        serde_json::from_slice(&self.payload).ok()
    }

    /// Turns a buffer into a frame's header; the payload is then read in behind it.
    pub fn begin(kind: FrameKind, stream: u32, buffer: &mut Vec<u8>) {
        buffer.clear();
        buffer.extend_from_slice(&header(kind, stream, 0));
    }

    /// Writes the length of the payload into a frame that was begun; returns that length in bytes.
    pub fn finish(begun: &mut [u8]) -> usize {
        let length = begun.len().saturating_sub(HEADER_BYTES);
        if let Some(word) = begun.get_mut(MAGIC.len()..MAGIC.len() + 4) {
            word.copy_from_slice(&length_word(length));
        }
        length
    }
}

impl<Payload: AsRef<[u8]>> Frame<Payload> {
    /// Returns the header, which is sent before the payload.
    #[must_use]
    pub fn header(&self) -> [u8; HEADER_BYTES] {
        header(self.kind, self.stream, self.payload.as_ref().len())
    }

    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        [&self.header(), self.payload.as_ref()].concat()
    }

    /// Returns the number of bytes that a window frame grants; 0 for other frames.
    #[must_use]
    pub fn granted(&self) -> u32 {
        let bytes = self.payload.as_ref().first_chunk().filter(|_| self.kind == FrameKind::Window);
        bytes.map_or(0, |bytes| u32::from_le_bytes(*bytes))
    }
}

fn header(kind: FrameKind, stream: u32, length: usize) -> [u8; HEADER_BYTES] {
    let [m0, m1, m2, m3] = MAGIC;
    let [l0, l1, l2, l3] = length_word(length);
    let [s0, s1, s2, s3] = stream.to_le_bytes();
    [m0, m1, m2, m3, l0, l1, l2, l3, kind.code(), s0, s1, s2, s3]
}

fn length_word(length: usize) -> [u8; 4] {
    u32::try_from(length).unwrap_or(u32::MAX).to_le_bytes()
}

/// Returns kind, stream and length of the payload; `None` when the bytes do not begin a frame.
fn read_header(header: &[u8; HEADER_BYTES]) -> Option<(FrameKind, u32, usize)> {
    let word = |at: usize| u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
    let length = usize::try_from(word(MAGIC.len())).unwrap_or(usize::MAX);
    let kind = FrameKind::of(header[8])?;
    (header.starts_with(&MAGIC) && length <= PAYLOAD_BYTES_MAX).then(|| (kind, word(9), length))
}

/// True if a buffer of this capacity suits the payload: large buffers are kept for large payloads.
fn fits(length: usize, capacity: usize) -> bool {
    (length..=length.saturating_mul(2)).contains(&capacity)
}

/// A decoder that cuts a byte stream into frames; bytes between frames are skipped.
#[derive(Debug, Default)]
pub struct Decoder {
    buffer: Vec<u8>,
    /// Index at which the part that was not yet taken begins.
    start: usize,
    partial: Option<Partial>,
    /// A buffer that the next large payload can reuse instead of new memory.
    spare: Vec<u8>,
    /// The header of the next frame, when it is read together with its possible payload.
    head: [u8; HEADER_BYTES],
    skipped: u64,
}

/// An incomplete frame: its payload has its full length and is filled from the front.
#[derive(Debug)]
struct Partial {
    frame: Frame,
    filled: usize,
}

impl Decoder {
    /// Appends bytes that arrived. The caller drains [`Decoder::next`] before the next call, so that the
    /// buffer holds less than a frame and one read.
    pub fn push(&mut self, bytes: &[u8]) {
        // The taken part is removed when it is the larger part: the cost of moving the rest is then bounded
        // by what was taken.
        if self.start * 2 >= self.buffer.len() {
            self.buffer.drain(..self.start);
            self.start = 0;
        }
        self.buffer.extend_from_slice(bytes);
    }

    /// Returns the two buffers to read into, in this order. They are the final destination when the rest of
    /// a payload comes next, or a frame whose payload may use the spare buffer; otherwise the first is the
    /// caller's buffer. The caller must report the read with [`Decoder::arrived`] before anything else.
    pub fn targets<'a>(&'a mut self, buffer: &'a mut [u8]) -> [&'a mut [u8]; 2] {
        let (is_drained, has_spare) = (self.is_drained(), self.has_spare());
        match &mut self.partial {
            Some(Partial { frame, filled }) if is_drained => [&mut frame.payload[*filled..], &mut []],
            None if is_drained && has_spare => [&mut self.head, &mut self.spare],
            _ => [buffer, &mut []],
        }
    }

    /// Records that `count` bytes were read into the buffers of [`Decoder::targets`]; `buffer` is the
    /// caller's buffer, which may or may not have been the first of them.
    pub fn arrived(&mut self, buffer: &[u8], count: usize) {
        let (is_drained, has_spare) = (self.is_drained(), self.has_spare());
        match &mut self.partial {
            Some(Partial { frame, filled }) if is_drained => {
                *filled = filled.saturating_add(count).min(frame.payload.len());
            }
            None if is_drained && has_spare => self.arrived_in_spare(count),
            _ => self.push(&buffer[..count.min(buffer.len())]),
        }
    }

    /// Turns the spare buffer into the payload when it fits and contains nothing of another frame.
    fn arrived_in_spare(&mut self, count: usize) {
        let mut spare = std::mem::take(&mut self.spare);
        let filled = count.saturating_sub(HEADER_BYTES).min(spare.len());
        match read_header(&self.head).filter(|_| count >= HEADER_BYTES) {
            Some((kind, stream, length)) if filled <= length && fits(length, spare.capacity()) => {
                spare.resize(length, 0);
                self.partial = Some(Partial { frame: Frame { kind, stream, payload: spare }, filled });
            }
            _ => {
                let head = self.head;
                self.push(&head[..count.min(HEADER_BYTES)]);
                self.push(&spare[..filled]);
                self.spare = spare;
            }
        }
    }

    fn is_drained(&self) -> bool {
        self.start == self.buffer.len()
    }

    /// Returns the number of bytes of the current payload that have not arrived yet.
    #[must_use]
    pub fn lacks(&self) -> usize {
        self.partial.as_ref().map_or(0, |partial| partial.frame.payload.len() - partial.filled)
    }

    /// True if there is a buffer for the next large payload.
    #[must_use]
    pub fn has_spare(&self) -> bool {
        self.spare.capacity() > 0
    }

    /// Gives the decoder a used buffer to reuse.
    pub fn give(&mut self, mut spare: Vec<u8>) {
        // Most spare buffers have their full length already; nothing is written then.
        spare.resize(spare.capacity(), 0);
        self.spare = spare;
    }

    /// Returns the bytes that arrived and are not a whole frame yet; a decoder that takes over begins with
    /// them.
    #[must_use]
    pub fn rest(&self) -> Vec<u8> {
        let mut rest = Vec::new();
        if let Some(Partial { frame, filled }) = &self.partial {
            rest.extend_from_slice(&frame.header());
            rest.extend_from_slice(&frame.payload[..*filled]);
        }
        rest.extend_from_slice(&self.buffer[self.start..]);
        rest
    }

    /// Returns the number of bytes so far that belonged to no frame. A correct peer sends hardly any.
    #[must_use]
    pub fn skipped(&self) -> u64 {
        self.skipped
    }

    /// Returns the next whole frame; `None` when it has not arrived yet.
    #[expect(clippy::should_implement_trait, reason = "None means: not yet, not: over")]
    pub fn next(&mut self) -> Option<Frame> {
        loop {
            if let Some(frame) = self.fill_partial() {
                return Some(frame);
            }
            if self.partial.is_some() {
                return None;
            }
            self.skip_to_magic();
            let Some((kind, stream, length)) = read_header(self.buffer[self.start..].first_chunk()?) else {
                // The length is invalid or the magic is a coincidence: this position does not begin a frame.
                self.start += 1;
                self.skipped += 1;
                continue;
            };
            let frame = Frame { kind, stream, payload: self.buffer_of(length) };
            self.start += HEADER_BYTES;
            self.partial = Some(Partial { frame, filled: 0 });
        }
    }

    fn buffer_of(&mut self, length: usize) -> Vec<u8> {
        if !fits(length, self.spare.capacity()) {
            return vec![0; length];
        }
        let mut buffer = std::mem::take(&mut self.spare);
        buffer.resize(length, 0);
        buffer
    }

    /// Moves the bytes that belong to the incomplete frame into it; returns the frame when it is whole.
    fn fill_partial(&mut self) -> Option<Frame> {
        let Partial { mut frame, filled } = self.partial.take()?;
        let count = (frame.payload.len() - filled).min(self.buffer.len() - self.start);
        frame.payload[filled..filled + count].copy_from_slice(&self.buffer[self.start..self.start + count]);
        self.start += count;
        if filled + count == frame.payload.len() {
            return Some(frame);
        }
        self.partial = Some(Partial { frame, filled: filled + count });
        None
    }

    /// Drops bytes that do not begin a frame, but keeps a partial magic at the end.
    fn skip_to_magic(&mut self) {
        let rest = &self.buffer[self.start..];
        let is_start = |at: usize| {
            let known = (rest.len() - at).min(MAGIC.len());
            rest[at..at + known] == MAGIC[..known]
        };
        let skipped = (0..rest.len()).find(|&at| is_start(at)).unwrap_or(rest.len());
        self.start += skipped;
        self.skipped += u64::try_from(skipped).unwrap_or(u64::MAX);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::{FromGuest, ToGuest, UNTOLD_WINDOW_BYTES};
    use super::*;

    fn frames(decoder: &mut Decoder) -> Vec<Frame> {
        std::iter::from_fn(|| decoder.next()).collect()
    }

    proptest! {
        #[test]
        fn frames_survive_any_cut_of_the_stream(
            payloads in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..64), 1..8),
            cut in 1usize..40,
        ) {
            let sent: Vec<Frame> =
                payloads.into_iter().map(|payload| Frame { kind: FrameKind::Data, stream: 9, payload }).collect();
            let bytes: Vec<u8> = sent.iter().flat_map(Frame::encode).collect();
            let mut decoder = Decoder::default();
            let mut received = Vec::new();
            for part in bytes.chunks(cut) {
                decoder.push(part);
                received.extend(frames(&mut decoder));
            }
            prop_assert_eq!(received, sent);
        }

        #[test]
        fn frames_read_into_their_buffers_are_the_same_and_a_new_decoder_continues(
            payloads in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..64), 1..8),
            cut in 1usize..40,
            spare in 0usize..100,
        ) {
            let sent: Vec<Frame> =
                payloads.into_iter().map(|payload| Frame { kind: FrameKind::Data, stream: 9, payload }).collect();
            let bytes: Vec<u8> = sent.iter().flat_map(Frame::encode).collect();
            let (mut decoder, mut received, mut rest) = (Decoder::default(), Vec::new(), &bytes[..]);
            let mut buffer = vec![0; cut];
            while !rest.is_empty() {
                // The spare buffer contains the bytes of an earlier frame.
                decoder.give(vec![0xee; spare]);
                let mut count = 0;
                for target in decoder.targets(&mut buffer) {
                    let part = target.len().min(cut - count).min(rest.len());
                    target[..part].copy_from_slice(&rest[..part]);
                    (count, rest) = (count + part, &rest[part..]);
                }
                decoder.arrived(&buffer, count);
                received.extend(frames(&mut decoder));
                let mut heir = Decoder::default();
                heir.push(&decoder.rest());
                prop_assert!(frames(&mut heir).is_empty());
                prop_assert_eq!(heir.rest(), decoder.rest());
                decoder = heir;
            }
            prop_assert_eq!(received, sent);
        }

        #[test]
        fn garbage_neither_panics_nor_hides_the_frame_behind_it(
            garbage in proptest::collection::vec(any::<u8>().prop_filter("no magic", |&b| b != MAGIC[0]), 0..4096),
        ) {
            let mut decoder = Decoder::default();
            decoder.push(&garbage);
            prop_assert!(frames(&mut decoder).is_empty());
            let frame = Frame { kind: FrameKind::Control, stream: 0, payload: b"{}".to_vec() };
            decoder.push(&frame.encode());
            prop_assert_eq!(frames(&mut decoder), vec![frame]);
        }

        #[test]
        fn anything_may_be_pushed_and_little_is_kept(
            parts in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..512), 0..16),
        ) {
            let mut decoder = Decoder::default();
            for part in parts {
                decoder.push(&part);
                let _ = frames(&mut decoder);
                prop_assert!(decoder.rest().len() <= HEADER_BYTES + PAYLOAD_BYTES_MAX);
            }
        }
    }

    #[test]
    fn a_length_over_the_limit_is_no_frame_and_the_limit_is() {
        let header = |length: u32| [&MAGIC[..], &length.to_le_bytes(), &[0, 0, 0, 0, 0]].concat();
        let mut decoder = Decoder::default();
        decoder.push(&header(1 + u32::try_from(PAYLOAD_BYTES_MAX).expect("fits")));
        decoder.push(&Frame { kind: FrameKind::Open, stream: 2, payload: vec![7] }.encode());
        assert_eq!(frames(&mut decoder).len(), 1);
        let largest = Frame { kind: FrameKind::Control, stream: 0, payload: vec![1; PAYLOAD_BYTES_MAX] };
        decoder.push(&largest.encode());
        assert_eq!(frames(&mut decoder), vec![largest]);
        assert_eq!(Frame::control(&"x".repeat(PAYLOAD_BYTES_MAX)), Err(TooLarge(PAYLOAD_BYTES_MAX + 2)));
    }

    #[test]
    fn messages_round_trip_and_foreign_messages_do_not_parse() {
        let attach = ToGuest::Attach { nonce: 7 };
        let frame = Frame::control(&attach).expect("small");
        assert_eq!(frame.message::<ToGuest>(), Some(attach));
        assert_eq!(frame.message::<FromGuest>(), None);
        assert_eq!(Frame { stream: 1, ..frame }.message::<ToGuest>(), None);
        let earlier_release = r#"{"protocol":1,"nonce":0,"token":null,"phase":"ready","exit":null}"#;
        let state: FromGuest = serde_json::from_str(earlier_release).expect("understood");
        assert_eq!(state.window, UNTOLD_WINDOW_BYTES);
    }
}
