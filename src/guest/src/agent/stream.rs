//! The state of one stream: its received input and its credit to send.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use stead_schemas::guest::{
    DATA_BYTES_MAX, Frame, FrameKind, FromStream, HEADER_BYTES, RENEWAL_BYTES, ToStream, WINDOW_BYTES,
};

use crate::outbox::{Outbox, Wake};

/// Limit on waiting messages and empty frames. A well-behaved host sends only a few.
const INPUTS_MAX: usize = 1024;
/// Limit on the data in one frame to the host, in bytes. With its header the frame fills four of the 32 KiB units
/// that a port takes at a time.
pub(super) const SENT_BYTES_MAX: usize = DATA_BYTES_MAX - HEADER_BYTES;

/// Input that the host sent.
#[derive(Debug)]
pub(super) enum Input {
    Data(Vec<u8>),
    Eof,
    Message(ToStream),
}

#[derive(Debug)]
pub(super) struct Stream {
    id: u32,
    state: Mutex<State>,
    wake: Wake,
    outbox: Arc<Outbox>,
}

#[derive(Debug)]
struct State {
    inputs: VecDeque<Input>,
    input_bytes: usize,
    /// Number of bytes that were consumed and not yet credited to the host.
    consumed: u32,
    /// Number of bytes that the host still accepts. A message may overdraw it once.
    credit: i64,
    is_closed: bool,
}

impl Stream {
    /// Creates a stream to a host whose receive window has `window` bytes.
    pub(super) fn new(id: u32, window: u32, outbox: Arc<Outbox>) -> rustix::io::Result<Self> {
        let state = State {
            inputs: VecDeque::new(),
            input_bytes: 0,
            consumed: 0,
            credit: i64::from(window),
            is_closed: false,
        };
        Ok(Self { id, state: Mutex::new(state), wake: Wake::new()?, outbox })
    }

    /// Takes a frame. A host that sends more than it is allowed to loses the stream.
    pub(super) fn take(&self, frame: Frame) {
        let mut state = self.lock();
        let is_data_behind_others = frame.kind == FrameKind::Data && !state.inputs.is_empty();
        match frame.kind {
            FrameKind::Data => {
                state.input_bytes += frame.payload.len();
                state.inputs.push_back(Input::Data(frame.payload));
            }
            FrameKind::Eof => state.inputs.push_back(Input::Eof),
            FrameKind::Message => state.inputs.extend(frame.parse().map(Input::Message)),
            FrameKind::Window => state.credit = state.credit.saturating_add(i64::from(frame.granted())),
            FrameKind::Close => state.is_closed = true,
            FrameKind::Control | FrameKind::Open | FrameKind::ErrorData => {}
        }
        let window = usize::try_from(WINDOW_BYTES).unwrap_or(usize::MAX);
        if state.input_bytes > window || state.inputs.len() > INPUTS_MAX {
            state.is_closed = true;
        }
        let is_closed = state.is_closed;
        drop(state);
        // Data behind other input needs no wake-up: the reader does not wait before it has taken the last input.
        if is_closed || !is_data_behind_others {
            self.wake.wake();
        }
        if is_closed {
            self.outbox.recheck();
        }
    }

    pub(super) fn close(&self) {
        self.lock().is_closed = true;
        self.wake.wake();
        self.outbox.recheck();
    }

    pub(super) fn is_closed(&self) -> bool {
        self.lock().is_closed
    }

    /// Returns the descriptor that frames and [`Stream::poke`] wake.
    pub(super) fn wake_fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }

    pub(super) fn poke(&self) {
        self.wake.wake();
    }

    /// Returns the next input, if any is there.
    pub(super) fn next(&self) -> Option<Input> {
        self.pop().or_else(|| {
            // The wake-up is reset first, so that input arriving from here on wakes again.
            self.wake.take();
            self.pop()
        })
    }

    fn pop(&self) -> Option<Input> {
        let mut state = self.lock();
        let input = state.inputs.pop_front()?;
        if let Input::Data(bytes) = &input {
            state.input_bytes -= bytes.len();
        }
        Some(input)
    }

    /// Waits for the next input. Returns `None` when the stream is closed.
    pub(super) fn wait_next(&self) -> Option<Input> {
        loop {
            if self.is_closed() {
                return None;
            }
            if let Some(input) = self.next() {
                return Some(input);
            }
            self.wait(None);
        }
    }

    fn wait(&self, timeout: Option<&Timespec>) {
        let _ = poll(&mut [PollFd::new(&self.wake, PollFlags::IN)], timeout);
    }

    /// Credits a whole input that was consumed.
    pub(super) fn done_with(&self, input: Vec<u8>) {
        self.consumed(input.len());
        self.outbox.spares.put(input);
    }

    /// Credits consumed bytes: the host may send as many more.
    pub(super) fn consumed(&self, bytes: usize) {
        let mut state = self.lock();
        state.consumed = state.consumed.saturating_add(u32::try_from(bytes).unwrap_or(u32::MAX));
        if state.consumed < RENEWAL_BYTES {
            return;
        }
        let renewed = std::mem::take(&mut state.consumed);
        drop(state);
        self.put(&Frame::window(self.id, renewed));
    }

    /// Returns the number of data bytes that may be sent now, at most those of one frame.
    pub(super) fn credit(&self) -> usize {
        let credit = self.lock().credit.clamp(0, i64::from(WINDOW_BYTES));
        usize::try_from(credit).unwrap_or(0).min(SENT_BYTES_MAX)
    }

    /// Waits for a credit of `bytes`, at most the size of a frame. Returns `false` when the stream is closed. The
    /// host always grants that much to a waiting stream: it keeps back less than half of its window.
    pub(super) fn wait_credit(&self, bytes: usize) -> bool {
        let has_enough = || self.credit() >= bytes.min(SENT_BYTES_MAX);
        while !self.is_closed() {
            if has_enough() {
                return true;
            }
            // The wake-up is reset first, so that changes from here on wake again.
            self.wake.take();
            if !has_enough() && !self.is_closed() {
                self.wait(None);
            }
        }
        false
    }

    /// Sends a data frame begun with [`Stream::data_begun`], within the credit. Returns `false` when the stream is
    /// closed.
    pub(super) fn data_read(&self, mut frame: Vec<u8>) -> bool {
        let length = Frame::finish(&mut frame);
        self.spend(length, frame)
    }

    /// Returns a frame with the header of a data frame and room for its payload, which is read into it without a
    /// copy.
    pub(super) fn data_begun(&self, kind: FrameKind, room: usize) -> Vec<u8> {
        // A spare buffer has exactly the capacity of a full frame, so only a full frame may use it.
        let spare = if room == SENT_BYTES_MAX { self.outbox.spares.take() } else { None };
        let mut frame = spare.unwrap_or_else(|| Vec::with_capacity(HEADER_BYTES + room));
        Frame::begin(kind, self.id, &mut frame);
        frame
    }

    /// Gives back a begun frame that is not sent.
    pub(super) fn data_dropped(&self, frame: Vec<u8>) {
        self.outbox.spares.put(frame);
    }

    /// Sends a message when there is credit. A host that does not read stops messages as well as data.
    pub(super) fn message(&self, message: &FromStream) -> bool {
        let Ok(frame) = Frame::json(FrameKind::Message, self.id, message) else { return false };
        self.wait_credit(1) && self.spend(frame.payload.len(), frame.encode())
    }

    fn spend(&self, length: usize, encoded: Vec<u8>) -> bool {
        self.lock().credit -= i64::try_from(length).unwrap_or(i64::MAX);
        self.outbox.put(encoded, || self.is_closed())
    }

    pub(super) fn failed(&self, message: impl Into<String>, code: Option<i32>, path: Option<&str>) {
        let path = path.map(ToOwned::to_owned);
        self.message(&FromStream::Failed { message: message.into(), code, path });
    }

    /// Sends the end of the stream. No frame follows it.
    pub(super) fn end(&self) {
        self.put(&Frame::bare(FrameKind::Close, self.id));
        self.lock().is_closed = true;
    }

    fn put(&self, frame: &Frame) -> bool {
        self.outbox.put(frame.encode(), || self.is_closed())
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::thread;

    use super::*;

    /// Size of a small input, in bytes. However many wait, they stay far below a window.
    const BYTES: usize = 100;
    const INPUTS: usize = 20_000;

    fn stream() -> Arc<Stream> {
        let outbox = Arc::new(Outbox::new().expect("an outbox"));
        Arc::new(Stream::new(7, WINDOW_BYTES, outbox).expect("a stream"))
    }

    fn frame(kind: FrameKind, payload: Vec<u8>) -> Frame {
        Frame { kind, stream: 7, payload }
    }

    #[test]
    fn who_waits_for_inputs_misses_none_though_not_each_wakes() {
        let (stream, under_way) = (stream(), Arc::new(AtomicUsize::new(0)));
        let (sent, counted) = (stream.clone(), under_way.clone());
        let host = thread::spawn(move || {
            for round in 0..INPUTS {
                // Sometimes a single input waits, sometimes many.
                while counted.load(Ordering::Acquire) > round % 50 {
                    thread::yield_now();
                }
                counted.fetch_add(1, Ordering::AcqRel);
                sent.take(frame(FrameKind::Data, vec![1; BYTES]));
            }
            sent.take(frame(FrameKind::Eof, Vec::new()));
        });
        let mut received = 0;
        while let Some(Input::Data(bytes)) = stream.wait_next() {
            received += bytes.len();
            stream.done_with(bytes);
            under_way.fetch_sub(1, Ordering::AcqRel);
        }
        host.join().expect("no panic");
        assert_eq!(received, INPUTS * BYTES);
    }

    #[test]
    fn a_full_frame_waits_for_its_credit_and_a_close_ends_the_wait() {
        let stream = stream();
        while stream.credit() > 0 {
            let mut begun = stream.data_begun(FrameKind::Data, stream.credit());
            begun.resize(HEADER_BYTES + stream.credit(), 1);
            assert!(stream.data_read(begun));
            while let Some(written) = stream.outbox.pop() {
                stream.outbox.spares.put(written);
            }
        }
        let wait = |stream: &Arc<Stream>| {
            let waiting = stream.clone();
            thread::spawn(move || waiting.wait_credit(SENT_BYTES_MAX).then(|| waiting.credit()))
        };
        let waiter = wait(&stream);
        for part in [SENT_BYTES_MAX / 2, SENT_BYTES_MAX - SENT_BYTES_MAX / 2] {
            stream.take(Frame::window(7, u32::try_from(part).expect("small")));
        }
        assert_eq!(waiter.join().expect("no panic"), Some(SENT_BYTES_MAX));
        stream.lock().credit = 0;
        let waiter = wait(&stream);
        stream.take(frame(FrameKind::Close, Vec::new()));
        assert_eq!(waiter.join().expect("no panic"), None);
    }
}
