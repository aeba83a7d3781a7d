//! The streams on one connection: their table, and the two halves that a consumer holds.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use stead_schemas::guest::{
    DATA_BYTES_MAX, FIRST_WINDOW_BYTES, Frame, FrameKind, Open, RENEWAL_BYTES, Request, ToStream, Token,
    UNTOLD_WINDOW_BYTES, WINDOW_BYTES,
};
use tokio::sync::{Semaphore, mpsc};

use super::inbox::{Inbox, Taken};
use super::{AgentError, Event};

/// Limit on the open streams to one guest. The guest has the same limit.
const STREAMS_MAX: usize = 256;
/// Limit on the frames that wait for the connection. Each stream waits here, so none can fill the memory.
const OUTGOING_MAX: usize = 16;

/// The streams of one guest. Clones share them.
#[derive(Debug, Clone)]
pub(crate) struct Mux(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    table: Mutex<Table>,
    outgoing: mpsc::Sender<Frame<Bytes>>,
    /// Queue of unsent closes. There is one for each stream at most, so the table bounds them.
    closing: mpsc::UnboundedSender<u32>,
}

#[derive(Debug)]
struct Table {
    streams: BTreeMap<u32, Entry>,
    /// The number of the next stream. It starts anywhere, so that a late frame for an earlier connection
    /// matches no stream of this one.
    next_id: u32,
    /// The window of the guest, for streams that are opened from here on.
    window: usize,
}

#[derive(Debug, Clone)]
struct Entry {
    inbox: Arc<Inbox>,
    credit: Arc<Semaphore>,
    window: usize,
}

/// The frames that the connection's task has to send.
#[derive(Debug)]
pub(crate) struct Outgoing {
    frames: mpsc::Receiver<Frame<Bytes>>,
    closing: mpsc::UnboundedReceiver<u32>,
}

impl Outgoing {
    /// Returns the next frame of a stream; cancel safe. Waits for ever when there will be none.
    pub(crate) async fn next(&mut self) -> Frame<Bytes> {
        tokio::select! {
            biased;
            Some(id) = self.closing.recv() => shared(Frame::bare(FrameKind::Close, id)),
            Some(frame) = self.frames.recv() => frame,
            else => std::future::pending().await,
        }
    }
}

impl Mux {
    pub(crate) fn new(first_id: u32) -> (Self, Outgoing) {
        let (outgoing, frames) = mpsc::channel(OUTGOING_MAX);
        let (closer, closing) = mpsc::unbounded_channel();
        let (streams, next_id) = (BTreeMap::new(), first_id.max(1));
        let table = Mutex::new(Table { streams, next_id, window: size(UNTOLD_WINDOW_BYTES) });
        let shared = Shared { table, outgoing, closing: closer };
        (Self(Arc::new(shared)), Outgoing { frames, closing })
    }

    /// Stores the window that the guest reported. A value that is too small or too large is not accepted.
    pub(crate) fn set_window(&self, bytes: u32) {
        self.lock().window = size(bytes.clamp(UNTOLD_WINDOW_BYTES, WINDOW_BYTES));
    }

    /// Opens a stream; the answer arrives on it.
    pub(crate) async fn open(&self, token: &Token, request: Request) -> Result<AgentStream, AgentError> {
        let window = self.lock().window;
        // An agent of an earlier release may ignore the window.
        let is_reported = window > size(UNTOLD_WINDOW_BYTES);
        let first = if is_reported { FIRST_WINDOW_BYTES } else { WINDOW_BYTES };
        let credit = Arc::new(Semaphore::new(window));
        let entry = Entry { inbox: Arc::new(Inbox::new(first)), credit, window };
        let id = self.enter(entry.clone())?;
        let sender = StreamSender { id, mux: self.clone(), credit: entry.credit };
        let receiver =
            StreamReceiver { id, mux: self.clone(), inbox: entry.inbox, window: first, consumed: 0 };
        // From here on a drop closes the stream.
        let stream = AgentStream { sender, receiver };
        let open = Open { token: token.clone(), request, window: first };
        let frame = Frame::json(FrameKind::Open, id, &open).map_err(|_| AgentError::Lost)?;
        self.0.outgoing.send(shared(frame)).await.map_err(|_| AgentError::Lost)?;
        Ok(stream)
    }

    fn enter(&self, entry: Entry) -> Result<u32, AgentError> {
        let mut table = self.lock();
        if table.streams.len() >= STREAMS_MAX {
            return Err(AgentError::TooMany);
        }
        loop {
            let id = table.next_id;
            table.next_id = id.checked_add(1).unwrap_or(1);
            if let std::collections::btree_map::Entry::Vacant(vacant) = table.streams.entry(id) {
                vacant.insert(entry);
                return Ok(id);
            }
        }
    }

    /// Handles a frame from the guest. Returns false when it is useless: it belongs to no stream, or has no
    /// content.
    pub(crate) fn take(&self, frame: Frame) -> bool {
        let id = frame.stream;
        let entry = self.lock().streams.get(&id).cloned();
        let Some(entry) = entry else { return false };
        if frame.kind == FrameKind::Window {
            let granted = usize::try_from(frame.granted()).unwrap_or(0);
            // Never more than the window: a guest that lies gets no more memory of the host.
            let room = entry.window.saturating_sub(entry.credit.available_permits());
            entry.credit.add_permits(granted.min(room));
            return granted.min(room) > 0;
        }
        let taken = entry.inbox.take(frame);
        if taken == Taken::Over {
            self.leave(id);
        }
        taken != Taken::Useless
    }

    /// Returns whether a frame for the guest still has its stream; a close is always sent.
    pub(crate) fn is_wanted(&self, frame: &Frame<Bytes>) -> bool {
        frame.kind == FrameKind::Close || self.lock().streams.contains_key(&frame.stream)
    }

    /// Ends every stream, because the connection is gone.
    pub(crate) fn end_all(&self) {
        let streams = std::mem::take(&mut self.lock().streams);
        for entry in streams.into_values() {
            entry.inbox.end();
            entry.credit.close();
        }
    }

    fn leave(&self, id: u32) {
        let entry = self.lock().streams.remove(&id);
        if let Some(entry) = entry {
            entry.inbox.end();
            entry.credit.close();
        }
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.0.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The bytes of a frame: data is not copied on its way to the connection.
fn shared(frame: Frame) -> Frame<Bytes> {
    Frame { kind: frame.kind, stream: frame.stream, payload: frame.payload.into() }
}

fn size(bytes: u32) -> usize {
    usize::try_from(bytes).unwrap_or(usize::MAX)
}

/// The two halves of one stream.
#[derive(Debug)]
pub struct AgentStream {
    pub sender: StreamSender,
    pub receiver: StreamReceiver,
}

/// The half of a stream that sends.
#[derive(Debug)]
pub struct StreamSender {
    id: u32,
    mux: Mux,
    credit: Arc<Semaphore>,
}

impl StreamSender {
    /// Sends data; waits while the guest does not consume. When it is cancelled, a part may have been sent.
    ///
    /// # Errors
    /// When the stream is over.
    pub async fn data(&mut self, mut bytes: Bytes) -> Result<(), AgentError> {
        while !bytes.is_empty() {
            let part = bytes.split_to(bytes.len().min(DATA_BYTES_MAX));
            let count = u32::try_from(part.len()).unwrap_or(u32::MAX);
            let spent = self.credit.acquire_many(count).await.map_err(|_| AgentError::Lost)?;
            spent.forget();
            self.send(Frame { kind: FrameKind::Data, stream: self.id, payload: part }).await?;
        }
        Ok(())
    }

    /// Sends the end of the data to the guest.
    ///
    /// # Errors
    /// When the stream is over.
    pub async fn eof(&mut self) -> Result<(), AgentError> {
        self.send(shared(Frame::bare(FrameKind::Eof, self.id))).await
    }

    /// Sends a message.
    ///
    /// # Errors
    /// When the stream is over.
    pub async fn message(&mut self, message: &ToStream) -> Result<(), AgentError> {
        let frame = Frame::json(FrameKind::Message, self.id, message).map_err(|_| AgentError::Lost)?;
        self.send(shared(frame)).await
    }

    async fn send(&self, frame: Frame<Bytes>) -> Result<(), AgentError> {
        self.mux.0.outgoing.send(frame).await.map_err(|_| AgentError::Lost)
    }
}

/// The half of a stream that receives; dropping it closes the stream.
#[derive(Debug)]
pub struct StreamReceiver {
    id: u32,
    mux: Mux,
    inbox: Arc<Inbox>,
    /// Bytes that the guest may send before it has to wait.
    window: u32,
    /// Bytes that were taken since the window was last renewed.
    consumed: u32,
}

impl StreamReceiver {
    /// Returns the next event; `None` when the stream is over. Cancel safe.
    pub async fn next(&mut self) -> Option<Event> {
        // Before the wait: nothing is lost when it is cancelled there.
        if self.consumed >= RENEWAL_BYTES.min(self.window / 2) {
            // A consumer that takes events lets the guest send more at once.
            let window = self.window.saturating_mul(2).min(WINDOW_BYTES);
            let granted = self.consumed + (window - self.window);
            let frame = shared(Frame::window(self.id, granted));
            if let Ok(permit) = self.mux.0.outgoing.reserve().await {
                self.inbox.renew(granted);
                permit.send(frame);
                (self.window, self.consumed) = (window, 0);
            }
        }
        let (event, length) = self.inbox.next().await?;
        self.consumed = self.consumed.saturating_add(u32::try_from(length).unwrap_or(u32::MAX));
        Some(event)
    }
}

impl Drop for StreamReceiver {
    fn drop(&mut self) {
        let was_open = self.mux.lock().streams.contains_key(&self.id);
        self.mux.leave(self.id);
        if was_open {
            // The connection's task may be gone, and the guest's stream with it.
            let _ = self.mux.0.closing.send(self.id);
        }
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;
    use stead_schemas::guest::{FromStream, Stat};

    use super::*;

    fn request() -> Request {
        Request::Stat(Stat { path: "/".into(), follows_links: false })
    }

    async fn opened() -> (Mux, Outgoing, AgentStream, u32) {
        let (mux, mut outgoing) = Mux::new(7);
        let stream = mux.open(&Token("t".to_owned()), request()).await.expect("opened");
        let frame = outgoing.next().await;
        assert_eq!((frame.kind, frame.stream), (FrameKind::Open, 7));
        (mux, outgoing, stream, 7)
    }

    fn data(stream: u32, length: usize) -> Frame {
        Frame { kind: FrameKind::Data, stream, payload: vec![1; length] }
    }

    #[tokio::test]
    async fn a_guest_that_sends_more_than_its_window_loses_the_stream() {
        let (mux, _outgoing, mut stream, id) = opened().await;
        let mut sent = 0;
        while mux.take(data(id, DATA_BYTES_MAX)) {
            sent += DATA_BYTES_MAX;
            assert!(sent <= size(WINDOW_BYTES) + 3 * DATA_BYTES_MAX, "nothing stops it");
        }
        let mut received = 0;
        while let Some(Event::Data(bytes)) = stream.receiver.next().await {
            received += bytes.len();
        }
        assert!(received >= size(WINDOW_BYTES));
    }

    /// Sends frames as a guest does, no more than its credit allows.
    fn send_all(mux: &Mux, credit: &mut u32) {
        while size(*credit) >= DATA_BYTES_MAX {
            assert!(mux.take(data(7, DATA_BYTES_MAX)));
            *credit -= u32::try_from(DATA_BYTES_MAX).expect("small");
        }
    }

    #[tokio::test]
    async fn a_stream_that_nobody_reads_binds_little_and_one_that_is_read_gets_the_whole_window() {
        let (mux, mut outgoing) = Mux::new(7);
        mux.set_window(WINDOW_BYTES);
        let mut stream = mux.open(&Token("t".to_owned()), request()).await.expect("opened");
        let opened: Open = serde_json::from_slice(&outgoing.next().await.payload).expect("an opening");
        assert_eq!(opened.window, FIRST_WINDOW_BYTES);
        let (mut credit, mut sent_unread) = (opened.window, 0);
        send_all(&mux, &mut credit);
        while let Some(Some(Event::Data(bytes))) = stream.receiver.next().now_or_never() {
            sent_unread += bytes.len();
            if sent_unread == size(FIRST_WINDOW_BYTES) {
                break;
            }
        }
        assert_eq!(sent_unread, size(FIRST_WINDOW_BYTES), "nothing beyond it is sent before it is read");
        // The stream is read from here on.
        while stream.receiver.window < WINDOW_BYTES {
            let next = stream.receiver.next().now_or_never().flatten();
            while let Some(renewed) = outgoing.next().now_or_never() {
                credit += renewed.granted();
            }
            assert!(next.is_some() || credit > 0, "{}: it stands still", stream.receiver.window);
            send_all(&mux, &mut credit);
        }
    }

    #[tokio::test]
    async fn a_reader_renews_the_window_and_a_sender_waits_for_it() {
        let (mux, mut outgoing, mut stream, id) = opened().await;
        for _ in 0..4 {
            assert!(mux.take(data(id, DATA_BYTES_MAX)));
        }
        for _ in 0..4 {
            assert!(matches!(stream.receiver.next().await, Some(Event::Data(_))));
        }
        let close =
            mux.take(Frame::json(FrameKind::Message, id, &FromStream::Copied { bytes: 1 }).expect("small"));
        assert!(close);
        assert!(matches!(stream.receiver.next().await, Some(Event::Message(_))));
        let renewed = outgoing.next().await;
        assert!(renewed.granted() >= RENEWAL_BYTES, "{renewed:?}");
    }

    #[tokio::test]
    async fn a_sender_waits_for_the_window_that_the_guest_reported_or_an_earlier_release_has() {
        for (reported, window) in [
            (None, UNTOLD_WINDOW_BYTES),
            (Some(0), UNTOLD_WINDOW_BYTES),
            (Some(WINDOW_BYTES), WINDOW_BYTES),
            (Some(u32::MAX), WINDOW_BYTES),
        ] {
            let (mux, mut outgoing) = Mux::new(7);
            if let Some(reported) = reported {
                mux.set_window(reported);
            }
            let mut stream = mux.open(&Token("t".to_owned()), request()).await.expect("opened");
            assert_eq!(outgoing.next().await.kind, FrameKind::Open);
            // Frames are sent whole: as many as fit into the window.
            let whole = size(window) / DATA_BYTES_MAX * DATA_BYTES_MAX;
            let pump = tokio::spawn(async move { stream.sender.data(vec![0; 2 * whole].into()).await });
            let mut received = 0;
            while received < whole {
                received += outgoing.next().await.payload.len();
            }
            assert_eq!(received, whole, "{reported:?}");
            // The task runs on the one thread of this test, so it has run by now.
            tokio::task::yield_now().await;
            assert!(outgoing.next().now_or_never().is_none(), "{reported:?}: nothing was granted yet");
            assert!(mux.take(Frame::window(7, u32::MAX)));
            while received < 2 * whole {
                received += outgoing.next().await.payload.len();
            }
            assert_eq!(pump.await.expect("no panic"), Ok(()));
        }
    }

    #[tokio::test]
    async fn a_dropped_stream_is_closed_in_the_guest_and_a_lost_connection_ends_all() {
        let (mux, mut outgoing, stream, id) = opened().await;
        drop(stream);
        let frame = outgoing.next().await;
        assert_eq!((frame.kind, frame.stream), (FrameKind::Close, id));
        assert!(!mux.take(data(id, 1)), "the stream is still known");
        let mut stream = mux.open(&Token(String::new()), request()).await.expect("opened");
        mux.end_all();
        assert_eq!(stream.receiver.next().await, None);
        assert_eq!(stream.sender.data(Bytes::from_static(b"x")).await, Err(AgentError::Lost));
    }
}
