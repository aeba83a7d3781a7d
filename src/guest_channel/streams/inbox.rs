//! Events that a guest sent on one stream and that were not taken yet.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};

use bytes::BytesMut;
use stead_schemas::guest::{DATA_BYTES_MAX, Frame, FrameKind, FromStream};
use tokio::sync::Notify;

use super::Event;

/// Bytes by which a message may exceed the window: none is longer than this.
const OVERDRAFT_BYTES: i64 = 64 << 10;
/// Number of waiting events from which on a piece of one output is joined to the last piece of that output,
/// even behind a piece of the other. Otherwise two outputs that alternate by single bytes would make as
/// many events as the window has bytes. The order within each output stays.
const EVENTS_APART_MAX: usize = 1024;

/// The outcome of a received frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Taken {
    Kept,
    /// The frame has no content; an honest guest sends none.
    Useless,
    /// The guest broke the protocol, or the stream is over: it receives nothing more.
    Over,
}

#[derive(Debug)]
pub(super) struct Inbox {
    state: Mutex<State>,
    arrived: Notify,
}

#[derive(Debug)]
struct State {
    events: VecDeque<Pending>,
    /// Bytes that the guest may still send. Below zero it has sent more than it was granted.
    allowance: i64,
    /// True when nothing more will come.
    is_over: bool,
}

#[derive(Debug)]
enum Pending {
    /// Joins adjacent pieces, so that many small pieces use no more memory than they contain.
    Bytes(FrameKind, BytesMut),
    Message(FromStream, usize),
}

impl Inbox {
    /// Makes an inbox for a stream that begins with this window, in bytes.
    pub(super) fn new(window: u32) -> Self {
        let state = State { events: VecDeque::new(), allowance: i64::from(window), is_over: false };
        Self { state: Mutex::new(state), arrived: Notify::new() }
    }

    pub(super) fn take(&self, frame: Frame) -> Taken {
        let mut state = self.lock();
        state.allowance -= i64::try_from(frame.payload.len()).unwrap_or(i64::MAX);
        if state.allowance < -OVERDRAFT_BYTES {
            state.is_over = true;
        }
        let mut is_useless = false;
        match frame.kind {
            FrameKind::Data | FrameKind::ErrorData if frame.payload.is_empty() => is_useless = true,
            FrameKind::Data | FrameKind::ErrorData => push(&mut state.events, frame),
            FrameKind::Message => match frame.parse() {
                Some(message) => state.events.push_back(Pending::Message(message, frame.payload.len())),
                None => state.is_over = true,
            },
            FrameKind::Close => state.is_over = true,
            FrameKind::Control | FrameKind::Open | FrameKind::Eof | FrameKind::Window => is_useless = true,
        }
        let taken = match state.is_over {
            true => Taken::Over,
            false if is_useless => Taken::Useless,
            false => Taken::Kept,
        };
        drop(state);
        if taken != Taken::Useless {
            self.arrived.notify_one();
        }
        taken
    }

    pub(super) fn end(&self) {
        self.lock().is_over = true;
        self.arrived.notify_one();
    }

    /// Returns the next event and the bytes that it used of the window; `None` when the stream is over.
    pub(super) async fn next(&self) -> Option<(Event, usize)> {
        loop {
            // A permit of `notify_one` is kept: an event between the check and the wait is not missed.
            let arrived = self.arrived.notified();
            {
                let mut state = self.lock();
                if let Some(pending) = state.events.pop_front() {
                    return Some(pending.taken());
                }
                if state.is_over {
                    return None;
                }
            }
            arrived.await;
        }
    }

    pub(super) fn renew(&self, bytes: u32) {
        self.lock().allowance += i64::from(bytes);
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn push(events: &mut VecDeque<Pending>, frame: Frame) {
    let count = if events.len() < EVENTS_APART_MAX { 1 } else { 2 };
    let last = events.iter_mut().rev().take(count);
    // Events after a message stay after it.
    let pieces = last.map_while(|pending| match pending {
        Pending::Bytes(kind, bytes) => Some((*kind, bytes)),
        Pending::Message(..) => None,
    });
    let same = pieces.into_iter().find(|(kind, _)| *kind == frame.kind);
    if let Some((_, bytes)) = same.filter(|(_, bytes)| bytes.len() + frame.payload.len() <= DATA_BYTES_MAX) {
        bytes.extend_from_slice(&frame.payload);
        return;
    }
    let bytes = BytesMut::from(bytes::Bytes::from(frame.payload));
    events.push_back(Pending::Bytes(frame.kind, bytes));
}

impl Pending {
    fn taken(self) -> (Event, usize) {
        match self {
            Self::Bytes(kind, bytes) => {
                let bytes = bytes.freeze();
                let length = bytes.len();
                let event =
                    if kind == FrameKind::Data { Event::Data(bytes) } else { Event::ErrorData(bytes) };
                (event, length)
            }
            Self::Message(message, length) => (Event::Message(message), length),
        }
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;
    use proptest::prelude::*;

    use stead_schemas::guest::WINDOW_BYTES;

    use super::*;

    fn piece(is_error: bool, payload: Vec<u8>) -> Frame {
        let kind = if is_error { FrameKind::ErrorData } else { FrameKind::Data };
        Frame { kind, stream: 1, payload }
    }

    #[test]
    fn alternating_outputs_and_empty_frames_take_no_more_than_the_window() {
        let inbox = Inbox::new(WINDOW_BYTES);
        for at in 0..WINDOW_BYTES {
            assert_eq!(inbox.take(piece(at % 2 == 0, vec![7])), Taken::Kept);
            assert_eq!(inbox.take(piece(at % 2 == 1, vec![])), Taken::Useless);
        }
        let most = EVENTS_APART_MAX + 2 * (WINDOW_BYTES as usize).div_ceil(DATA_BYTES_MAX);
        assert!(inbox.lock().events.len() <= most, "{} events", inbox.lock().events.len());
        let mut received = 0;
        while let Some(Some((_, length))) = inbox.next().now_or_never() {
            received += length;
        }
        assert_eq!(received, WINDOW_BYTES as usize);
    }

    proptest! {
        #[test]
        fn each_output_keeps_its_order_however_they_alternate(
            frames in proptest::collection::vec((any::<bool>(), 0usize..3), 0..4000),
        ) {
            let inbox = Inbox::new(WINDOW_BYTES);
            let (mut sent, mut received): ([Vec<u8>; 2], [Vec<u8>; 2]) = Default::default();
            for (at, (is_error, length)) in frames.into_iter().enumerate() {
                let payload = vec![at.to_le_bytes()[0]; length];
                sent[usize::from(is_error)].extend(&payload);
                let expected = if length == 0 { Taken::Useless } else { Taken::Kept };
                prop_assert_eq!(inbox.take(piece(is_error, payload)), expected);
            }
            prop_assert!(inbox.lock().events.len() <= EVENTS_APART_MAX + 2);
            while let Some(Some((event, _))) = inbox.next().now_or_never() {
                match event {
                    Event::Data(bytes) => received[0].extend(bytes),
                    Event::ErrorData(bytes) => received[1].extend(bytes),
                    Event::Message(_) => {}
                }
            }
            prop_assert_eq!(received, sent);
        }
    }
}
