//! What a guest sent on one stream and nobody took yet.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};

use bytes::BytesMut;
use stead_schemas::guest::{DATA_BYTES_MAX, Frame, FrameKind, FromStream, WINDOW_BYTES};
use tokio::sync::Notify;

use super::Event;

/// A message may overdraw the window by its own length; none is longer than this.
const OVERDRAFT_BYTES: i64 = 64 << 10;

#[derive(Debug)]
pub(super) struct Inbox {
    state: Mutex<State>,
    arrived: Notify,
}

#[derive(Debug)]
struct State {
    events: VecDeque<Pending>,
    /// What the guest may still send; below zero it has taken more than it was given.
    allowance: i64,
    /// Nothing more comes.
    is_over: bool,
}

#[derive(Debug)]
enum Pending {
    /// Adjacent pieces are joined, so that many small ones cost what they hold.
    Bytes(FrameKind, BytesMut),
    Message(FromStream, usize),
}

impl Inbox {
    pub(super) fn new() -> Self {
        let state = State { events: VecDeque::new(), allowance: i64::from(WINDOW_BYTES), is_over: false };
        Self { state: Mutex::new(state), arrived: Notify::new() }
    }

    /// `false` when the guest broke the rules or the stream is over: it gets nothing more.
    pub(super) fn take(&self, frame: Frame) -> bool {
        let mut state = self.lock();
        state.allowance -= i64::try_from(frame.payload.len()).unwrap_or(i64::MAX);
        if state.allowance < -OVERDRAFT_BYTES {
            state.is_over = true;
        }
        match frame.kind {
            FrameKind::Data | FrameKind::ErrorData => push(&mut state.events, frame),
            FrameKind::Message => match frame.parse() {
                Some(message) => state.events.push_back(Pending::Message(message, frame.payload.len())),
                None => state.is_over = true,
            },
            FrameKind::Close => state.is_over = true,
            FrameKind::Control | FrameKind::Open | FrameKind::Eof | FrameKind::Window => {}
        }
        let goes_on = !state.is_over;
        drop(state);
        self.arrived.notify_one();
        goes_on
    }

    pub(super) fn end(&self) {
        self.lock().is_over = true;
        self.arrived.notify_one();
    }

    /// The next event and the bytes that it took of the window; `None` when the stream is over.
    pub(super) async fn next(&self) -> Option<(Event, usize)> {
        loop {
            // A permit of `notify_one` is kept: what arrives between look and wait is not missed.
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
    if let Some(Pending::Bytes(kind, bytes)) = events.back_mut()
        && *kind == frame.kind
        && bytes.len() + frame.payload.len() <= DATA_BYTES_MAX
    {
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
