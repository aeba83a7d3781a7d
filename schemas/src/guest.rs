//! Host to guest: what travels on the control channel of a VM.
//!
//! A byte stream each way, cut into frames: magic, payload length, kind, stream id, payload. Stream 0
//! carries control messages as JSON; other streams are for what an agent multiplexes later.
//! State is told whole and again on every `Attach`, so a host that comes back has missed nothing.
//!
//! Guarantees: decoding never panics, never holds more than one frame of the largest size, and
//! finds the next frame after garbage.
//! The guest is not trusted: after [`ToGuest::Configure`] its frames carry the token of this boot,
//! and the host drops the others.

use std::collections::BTreeMap;
use std::fmt;
use std::net::Ipv4Addr;

use serde::{Deserialize, Serialize};

use crate::instance::{Exit, Secret};

/// The version of this protocol; a guest of another one is refused with both numbers named.
pub const PROTOCOL: u32 = 1;
/// Name of the control port inside the guest (`/sys/class/virtio-ports/*/name`).
pub const CONTROL_PORT: &str = "stead.control";
/// Starts every frame; a byte no UTF-8 text holds comes first, so that JSON never contains it.
pub const MAGIC: [u8; 4] = [0xf7, b's', b't', b'd'];
/// Magic, length, kind, stream.
pub const HEADER_BYTES: usize = 13;
/// The largest payload: a configuration with the largest environment and argument list, escaped.
pub const PAYLOAD_BYTES_MAX: usize = 1 << 20;
/// The kind of control frames.
pub const KIND_CONTROL: u8 = 0;

/// What the guest's PID 1 has to do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Config {
    pub hostname: String,
    /// Program and arguments; executed directly, no shell.
    pub argv: Vec<String>,
    pub env: BTreeMap<String, Secret>,
    /// Empty means `/`.
    pub working_dir: String,
    /// As the image says: `user`, `uid`, `user:group`; looked up in the image's own files.
    pub user: String,
    pub stop_signal: Option<String>,
    /// How long the program has between the stop signal and the kill.
    pub shutdown_grace_millis: u64,
    pub network: Option<NetworkConfig>,
    pub has_agent: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkConfig {
    pub address: Ipv4Addr,
    pub prefix: u8,
    pub gateway: Ipv4Addr,
    pub dns: Vec<Ipv4Addr>,
}

/// Per-boot secret: what carries it was said after this boot was configured, by this boot.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Token(pub String);

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

/// Host to guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum ToGuest {
    /// The host is (again) listening: tell the state. The nonce comes back with it.
    Attach { nonce: u64 },
    /// Taken once; repeated ones are ignored.
    Configure { token: Token, config: Box<Config> },
    /// End the program: stop signal, grace, kill.
    Shutdown { token: Token },
    /// The exit record is stored: power off.
    AcknowledgeExit { token: Token },
}

/// Guest to host: always the whole state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FromGuest {
    pub protocol: u32,
    /// Of the last `Attach` that was seen; 0 before any.
    pub nonce: u64,
    /// None until configured.
    pub token: Option<Token>,
    pub phase: Phase,
    pub exit: Option<Exit>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    AwaitingConfig,
    Configured,
    Ready,
    Exited,
}

/// One frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    pub kind: u8,
    pub stream: u32,
    pub payload: Vec<u8>,
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
        Ok(Self { kind: KIND_CONTROL, stream: 0, payload })
    }

    /// The message of a control frame; `None` for other frames and for what does not parse.
    #[must_use]
    pub fn message<T: for<'de> Deserialize<'de>>(&self) -> Option<T> {
        let is_control = self.kind == KIND_CONTROL && self.stream == 0;
        is_control.then(|| serde_json::from_slice(&self.payload).ok()).flatten()
    }

    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let length = u32::try_from(self.payload.len()).unwrap_or(u32::MAX);
        let mut bytes = Vec::with_capacity(HEADER_BYTES + self.payload.len());
        bytes.extend_from_slice(&MAGIC);
        bytes.extend_from_slice(&length.to_le_bytes());
        bytes.push(self.kind);
        bytes.extend_from_slice(&self.stream.to_le_bytes());
        bytes.extend_from_slice(&self.payload);
        bytes
    }
}

/// Cuts a stream into frames; bytes between frames are skipped.
#[derive(Debug, Default)]
pub struct Decoder {
    buffer: Vec<u8>,
}

impl Decoder {
    /// Takes what arrived. The caller drains [`Decoder::next`] before the next call, so that the
    /// buffer holds less than a frame and one read.
    pub fn push(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    /// The next whole frame.
    #[expect(clippy::should_implement_trait, reason = "None means: not yet, not: over")]
    pub fn next(&mut self) -> Option<Frame> {
        loop {
            self.skip_to_magic();
            let header: &[u8; HEADER_BYTES] = self.buffer.first_chunk()?;
            let word =
                |at: usize| u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
            let length = usize::try_from(word(4)).unwrap_or(usize::MAX);
            if length > PAYLOAD_BYTES_MAX {
                // A lie or a chance magic: this one is not a frame.
                self.buffer.drain(..1);
                continue;
            }
            let (kind, stream) = (header[8], word(9));
            let end = HEADER_BYTES + length;
            let payload = self.buffer.get(HEADER_BYTES..end)?.to_vec();
            self.buffer.drain(..end);
            return Some(Frame { kind, stream, payload });
        }
    }

    /// Drops what is not the start of a frame, keeping a partial magic at the end.
    fn skip_to_magic(&mut self) {
        let is_start = |at: usize| {
            let rest = &self.buffer[at..];
            let known = rest.len().min(MAGIC.len());
            rest[..known] == MAGIC[..known]
        };
        let start = (0..self.buffer.len()).find(|&at| is_start(at)).unwrap_or(self.buffer.len());
        self.buffer.drain(..start);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

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
                payloads.into_iter().map(|payload| Frame { kind: 3, stream: 9, payload }).collect();
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
        fn garbage_neither_panics_nor_hides_the_frame_behind_it(
            garbage in proptest::collection::vec(any::<u8>().prop_filter("no magic", |&b| b != MAGIC[0]), 0..4096),
        ) {
            let mut decoder = Decoder::default();
            decoder.push(&garbage);
            prop_assert!(frames(&mut decoder).is_empty());
            let frame = Frame { kind: 0, stream: 0, payload: b"{}".to_vec() };
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
                prop_assert!(decoder.buffer.len() <= HEADER_BYTES + PAYLOAD_BYTES_MAX);
            }
        }
    }

    #[test]
    fn a_length_over_the_limit_is_no_frame_and_the_limit_is() {
        let header = |length: u32| [&MAGIC[..], &length.to_le_bytes(), &[0, 0, 0, 0, 0]].concat();
        let mut decoder = Decoder::default();
        decoder.push(&header(1 + u32::try_from(PAYLOAD_BYTES_MAX).expect("fits")));
        decoder.push(&Frame { kind: 1, stream: 2, payload: vec![7] }.encode());
        assert_eq!(frames(&mut decoder).len(), 1);
        let largest = Frame { kind: 0, stream: 0, payload: vec![1; PAYLOAD_BYTES_MAX] };
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
    }
}
