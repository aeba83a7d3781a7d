//! Frames: magic, payload length, kind, stream id, payload.
//!
//! Guarantees: decoding never panics, never holds more than one frame of the largest size and one
//! read, and finds the next frame after garbage.

use serde::{Deserialize, Serialize};

/// Starts every frame; a byte no UTF-8 text holds comes first, so that JSON never contains it.
pub const MAGIC: [u8; 4] = [0xf7, b's', b't', b'd'];
/// Magic, length, kind, stream.
pub const HEADER_BYTES: usize = 13;
/// The largest payload: a configuration with the largest environment and argument list, escaped.
pub const PAYLOAD_BYTES_MAX: usize = 1 << 20;
/// What a frame is about. Host and guest send the same kinds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FrameKind {
    /// Stream 0: [`super::ToGuest`], [`super::FromGuest`].
    Control,
    /// Host to guest: begins a stream with a [`super::Open`].
    Open,
    /// Bytes of the stream: standard input and output, contents of files.
    Data,
    /// Bytes of standard error, where they are told apart.
    ErrorData,
    /// No more [`FrameKind::Data`] comes from this side.
    Eof,
    /// A [`super::ToStream`] or [`super::FromStream`].
    Message,
    /// Four bytes, little endian: as many more bytes of data may be sent.
    Window,
    /// The stream is over; what still arrives for it is dropped.
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

/// One frame; its payload lies wherever its sender has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame<P = Vec<u8>> {
    pub kind: FrameKind,
    pub stream: u32,
    pub payload: P,
}

/// A payload larger than [`PAYLOAD_BYTES_MAX`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a frame of {0} bytes is larger than the protocol allows")]
pub struct TooLarge(pub usize);

impl Frame {
    /// A control frame.
    ///
    /// # Errors
    /// When the message is larger than a frame.
    pub fn control<T: Serialize>(message: &T) -> Result<Self, TooLarge> {
        let payload = serde_json::to_vec(message).unwrap_or_default();
        if payload.len() > PAYLOAD_BYTES_MAX {
            return Err(TooLarge(payload.len()));
        }
        Ok(Self { kind: FrameKind::Control, stream: 0, payload })
    }

    /// A frame of a stream with a JSON payload.
    ///
    /// # Errors
    /// When the message is larger than a frame.
    pub fn json<T: Serialize>(kind: FrameKind, stream: u32, message: &T) -> Result<Self, TooLarge> {
        Ok(Self { kind, stream, ..Self::control(message)? })
    }

    /// As many more bytes of data may be sent on this stream.
    #[must_use]
    pub fn window(stream: u32, bytes: u32) -> Self {
        Self { kind: FrameKind::Window, stream, payload: bytes.to_le_bytes().to_vec() }
    }

    /// A frame that says all by its kind.
    #[must_use]
    pub fn bare(kind: FrameKind, stream: u32) -> Self {
        Self { kind, stream, payload: Vec::new() }
    }

    /// The message of a control frame; `None` for other frames and for what does not parse.
    #[must_use]
    pub fn message<T: for<'de> Deserialize<'de>>(&self) -> Option<T> {
        let is_control = self.kind == FrameKind::Control && self.stream == 0;
        is_control.then(|| self.parse()).flatten()
    }

    /// The JSON payload, whatever the kind.
    #[must_use]
    pub fn parse<T: for<'de> Deserialize<'de>>(&self) -> Option<T> {
        serde_json::from_slice(&self.payload).ok()
    }

    /// Makes a buffer a frame's header; a payload is read in behind it.
    pub fn begin(kind: FrameKind, stream: u32, buffer: &mut Vec<u8>) {
        buffer.clear();
        buffer.extend_from_slice(&header(kind, stream, 0));
    }

    /// Says in a begun frame how long its payload became; its length.
    pub fn finish(begun: &mut [u8]) -> usize {
        let length = begun.len().saturating_sub(HEADER_BYTES);
        if let Some(word) = begun.get_mut(MAGIC.len()..MAGIC.len() + 4) {
            word.copy_from_slice(&length_word(length));
        }
        length
    }
}

impl<P: AsRef<[u8]>> Frame<P> {
    /// What goes out before the payload.
    #[must_use]
    pub fn header(&self) -> [u8; HEADER_BYTES] {
        header(self.kind, self.stream, self.payload.as_ref().len())
    }

    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        [&self.header(), self.payload.as_ref()].concat()
    }

    /// The bytes that a window frame grants; 0 for other frames.
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

/// Kind, stream and length of payload; `None` for what begins no frame.
fn read_header(header: &[u8; HEADER_BYTES]) -> Option<(FrameKind, u32, usize)> {
    let word = |at: usize| u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
    let length = usize::try_from(word(MAGIC.len())).unwrap_or(usize::MAX);
    let kind = FrameKind::of(header[8])?;
    (header.starts_with(&MAGIC) && length <= PAYLOAD_BYTES_MAX).then(|| (kind, word(9), length))
}

/// Large buffers are for large payloads.
fn fits(length: usize, capacity: usize) -> bool {
    (length..=length.saturating_mul(2)).contains(&capacity)
}

/// Cuts a stream into frames; bytes between frames are skipped.
#[derive(Debug, Default)]
pub struct Decoder {
    buffer: Vec<u8>,
    /// Where the part not yet taken begins.
    start: usize,
    partial: Option<Partial>,
    /// For the next large payload, instead of memory that is new.
    spare: Vec<u8>,
    /// Where the header of the next frame is read to, before what may be its payload.
    head: [u8; HEADER_BYTES],
    skipped: u64,
}

/// A frame that is not whole: its payload has its length, and is filled from the front.
#[derive(Debug)]
struct Partial {
    frame: Frame,
    filled: usize,
}

impl Decoder {
    /// Takes what arrived. The caller drains [`Decoder::next`] before the next call, so that the
    /// buffer holds less than a frame and one read.
    pub fn push(&mut self, bytes: &[u8]) {
        // What was taken goes when it is the larger part: moving is then paid by what was taken.
        if self.start * 2 >= self.buffer.len() {
            self.buffer.drain(..self.start);
            self.start = 0;
        }
        self.buffer.extend_from_slice(bytes);
    }

    /// Where to read to, first the one and then the other: where it stays, when the rest of a payload
    /// comes next, or a frame whose payload the spare may become; else a buffer of the caller's.
    /// [`Decoder::arrived`] is told of what was read there, before anything else.
    pub fn places<'a>(&'a mut self, buffer: &'a mut [u8]) -> [&'a mut [u8]; 2] {
        let (is_drained, has_spare) = (self.is_drained(), self.has_spare());
        match &mut self.partial {
            Some(Partial { frame, filled }) if is_drained => [&mut frame.payload[*filled..], &mut []],
            None if is_drained && has_spare => [&mut self.head, &mut self.spare],
            _ => [buffer, &mut []],
        }
    }

    /// So many bytes were read to the places, of which the first was this buffer or not.
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

    /// The spare becomes the payload when it fits and has nothing of another frame.
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

    /// Bytes of a payload that are still to come.
    #[must_use]
    pub fn lacks(&self) -> usize {
        self.partial.as_ref().map_or(0, |partial| partial.frame.payload.len() - partial.filled)
    }

    /// Whether there is a buffer for the next large payload.
    #[must_use]
    pub fn has_spare(&self) -> bool {
        self.spare.capacity() > 0
    }

    /// Gives it one that was used before.
    pub fn give(&mut self, mut spare: Vec<u8>) {
        // Most have been as long: nothing is written then.
        spare.resize(spare.capacity(), 0);
        self.spare = spare;
    }

    /// What arrived and is no whole frame yet; a decoder that takes over begins with it.
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

    /// Bytes so far that belonged to no frame: what a peer in its senses sends hardly ever.
    #[must_use]
    pub fn skipped(&self) -> u64 {
        self.skipped
    }

    /// The next whole frame.
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
                // A lie or a chance magic: this one is not a frame.
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

    /// Moves what belongs to the frame under way into it; the frame when it is whole.
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

    /// Drops what is not the start of a frame, keeping a partial magic at the end.
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
        fn frames_read_to_their_place_are_the_same_and_a_decoder_that_takes_over_goes_on(
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
                // With the bytes of an earlier frame in it.
                decoder.give(vec![0xee; spare]);
                let mut count = 0;
                for place in decoder.places(&mut buffer) {
                    let part = place.len().min(cut - count).min(rest.len());
                    place[..part].copy_from_slice(&rest[..part]);
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
    fn messages_round_trip_and_strangers_do_not_parse() {
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
