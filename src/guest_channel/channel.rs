//! The host's end of a VM's control channel.
//!
//! A task for each VM connects, asks for the guest's state, stores the last state, sends requests to the
//! guest, and carries the streams to its agent. The guest is not trusted: frames are bounded, texts are
//! cleaned, messages without the token of this boot are dropped, and a guest that sends what was not
//! requested is read only at a low rate.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Buf;
use jiff::Timestamp;
use stead_controllers::host::{GuestPhase, GuestView};
use stead_schemas::guest::{
    Decoder, Frame, FrameKind, FromGuest, HEADER_BYTES, Note, PROTOCOL, Phase, Request, ToGuest, Token,
};
use stead_schemas::limits::MESSAGE_CHARS_MAX;
use stead_schemas::names::Uid;
use stead_schemas::validate::printable;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tracing::{debug, warn};

use super::heartbeat::{self, Heartbeat};
use super::log_lines::LogLines;
use super::reported::{cleaned, memory_of, phase_of, volumes_of};
use super::streams::{AgentError, AgentStream, Mux, Outgoing};
use super::tokens::{Tokens, random};
use super::transport::Transport;
use super::{Changed, Noted};

/// Delay between two attempts to connect: the socket appears as soon as the VMM runs.
const RECONNECT_FIRST: Duration = Duration::from_millis(20);
const RECONNECT_MAX: Duration = Duration::from_secs(5);
/// Delay between two `Attach` frames until one is answered: a booting guest answers the first that it
/// reads.
const ATTACH_AGAIN: Duration = Duration::from_secs(5);
/// Time after which a guest that does not take a frame is disconnected. The next connection tries again.
const WRITE_DEADLINE: Duration = Duration::from_secs(10);
/// Size of one read in bytes. The rest of a payload is read into its own buffer instead.
const READ_BYTES: usize = 16 << 10;
/// Limit on unrequested bytes that are read in a period: a thousand times what an honest guest sends.
const USELESS_BYTES_MAX: usize = 1 << 20;
const USELESS_PERIOD: Duration = Duration::from_secs(1);
/// Number of these bytes that another state counts for, because the VM is observed anew for it. An honest guest has a
/// few in its life.
const NEWS_BYTES: usize = USELESS_BYTES_MAX / 64;
/// Limit on the length of an incarnation, which is an id and a number. A longer text is not from this host.
const INCARNATION_CHARS_MAX: usize = 64;
/// The nonce in a state of a guest process that has read no `Attach` yet.
const UNATTACHED: u64 = 0;
/// Limit on requests that wait for the channel. There is never more than one of each kind.
const REQUESTS_MAX: usize = 8;

/// A handle on the task of one VM; dropping it ends the task.
#[derive(Debug)]
pub(crate) struct GuestChannel {
    view: Arc<Mutex<GuestView>>,
    tokens: Arc<Tokens>,
    requests: mpsc::Sender<ToGuest>,
    heartbeat: Arc<Heartbeat>,
    mux: Mux,
    has_spoken: watch::Receiver<bool>,
    task: JoinHandle<()>,
}

impl Drop for GuestChannel {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl GuestChannel {
    pub(crate) fn start(
        transport: Transport,
        owner: Uid,
        tokens: Tokens,
        changed: Changed,
        noted: Noted,
    ) -> Self {
        let view = Arc::new(Mutex::new(silent()));
        let (requests, receiver) = mpsc::channel(REQUESTS_MAX);
        // Two successive daemons must use different numbers, because a guest distinguishes the daemons by them. The
        // clock is used when the kernel gives no random number.
        let clock_micros = || u64::try_from(Timestamp::now().as_microsecond()).unwrap_or(1);
        let start = random().map_or_else(|_| clock_micros(), u64::from_le_bytes);
        let (spoke, has_spoken) = watch::channel(false);
        let tokens = Arc::new(tokens);
        let heartbeat = Arc::<Heartbeat>::default();
        let (mux, outgoing) = Mux::new(u32::try_from(start >> 32).unwrap_or(1));
        let channel = Channel {
            transport,
            owner,
            tokens: tokens.clone(),
            view: view.clone(),
            heartbeat: heartbeat.clone(),
            changed,
            log_lines: Mutex::new(LogLines::new(noted)),
            nonce: start,
            mux: mux.clone(),
            outgoing,
            spoke,
        };
        let task = tokio::spawn(channel.run(receiver));
        Self { view, tokens, requests, heartbeat, mux, has_spoken, task }
    }

    pub(crate) fn view(&self) -> GuestView {
        let view = self.view.lock().unwrap_or_else(PoisonError::into_inner).clone();
        GuestView { is_unresponsive: self.heartbeat.is_unresponsive(), ..view }
    }

    /// Returns the view of a guest, given whether its VM runs now. The streams to a guest that does not
    /// answer although its VM runs are ended, so nothing waits for it without end.
    pub(crate) fn judged(&self, is_running: bool) -> GuestView {
        if !is_running {
            self.heartbeat.forgive();
        }
        let view = self.view();
        if view.is_unresponsive {
            self.mux.end_all();
        }
        view
    }

    /// Forgives unanswered polls: the VM was paused, and runs on from now.
    pub(crate) fn forgive(&self) {
        self.heartbeat.forgive();
    }

    pub(crate) fn token(&self) -> Token {
        self.tokens.current()
    }

    pub(crate) fn tokens(&self) -> &Tokens {
        &self.tokens
    }

    /// Waits until the guest has answered once, but at most for this time.
    pub(crate) async fn first_answer(&self, at_most: Duration) {
        let mut has_spoken = self.has_spoken.clone();
        let answered = async {
            // A task that ends drops the sender, which is no answer.
            drop(has_spoken.wait_for(|&has_spoken| has_spoken).await);
        };
        let _ = tokio::time::timeout(at_most, answered).await;
    }

    /// Opens a stream to the agent of a running program.
    pub(crate) async fn open(&self, request: Request) -> Result<AgentStream, AgentError> {
        let view = self.view();
        if view.phase != GuestPhase::Ready {
            return Err(AgentError::NotReady);
        }
        if view.is_unresponsive {
            return Err(AgentError::Unresponsive);
        }
        self.mux.open(&self.token(), request).await
    }

    /// Queues a request for the guest, and applies `note` to the view at once.
    pub(crate) fn ask(&self, request: ToGuest, note: impl FnOnce(&mut GuestView)) -> Result<(), String> {
        self.requests.try_send(request).map_err(|_| "the guest takes no requests".to_owned())?;
        note(&mut self.view.lock().unwrap_or_else(PoisonError::into_inner));
        Ok(())
    }
}

/// Returns the view of a guest that has sent nothing yet.
pub(crate) fn silent() -> GuestView {
    GuestView {
        phase: GuestPhase::Silent,
        exit: None,
        is_shutdown_requested: false,
        is_exit_acknowledged: false,
        incarnation: None,
        identity_error: None,
        identity_sent: None,
        memory: None,
        memory_asked: None,
        volumes: None,
        volumes_asked: None,
        is_unresponsive: false,
    }
}

struct Channel {
    transport: Transport,
    owner: Uid,
    tokens: Arc<Tokens>,
    view: Arc<Mutex<GuestView>>,
    heartbeat: Arc<Heartbeat>,
    changed: Changed,
    log_lines: Mutex<LogLines>,
    nonce: u64,
    mux: Mux,
    outgoing: Outgoing,
    spoke: watch::Sender<bool>,
}

impl Channel {
    async fn run(mut self, mut requests: mpsc::Receiver<ToGuest>) {
        let mut delay = RECONNECT_FIRST;
        loop {
            if let Ok(stream) = self.transport.connect().await {
                delay = RECONNECT_FIRST;
                let ended = self.serve(stream, &mut requests).await;
                debug!(owner = %self.owner, reason = ended, "the control channel was cut");
            }
            self.mux.end_all();
            let _ = tokio::time::timeout(delay, discard(&mut self.outgoing)).await;
            delay = (delay * 2).min(RECONNECT_MAX);
        }
    }

    /// Serves one connection until it fails. Returns why it ended.
    async fn serve(&mut self, stream: UnixStream, requests: &mut mpsc::Receiver<ToGuest>) -> &'static str {
        let (mut reader, mut writer) = stream.into_split();
        let mut decoder = Decoder::default();
        let mut buffer = vec![0u8; READ_BYTES];
        let mut useless = Useless::default();
        self.nonce = self.nonce.wrapping_add(1);
        // What was sent through an earlier connection may be lost.
        {
            let mut view = self.view.lock().unwrap_or_else(PoisonError::into_inner);
            (view.identity_sent, view.memory_asked, view.volumes_asked) = (None, None, None);
        }
        let nonce = self.nonce;
        if !self.ask(&mut writer).await {
            return "the first frame was not taken";
        }
        let mut is_answered = false;
        let mut asks_at = Instant::now() + ATTACH_AGAIN;
        loop {
            tokio::select! {
                biased;
                // The arms only wait: what they received is handled before the next round.
                request = requests.recv() => {
                    let Some(request) = request else { return "the handle was dropped" };
                    if !send(&mut writer, &request).await {
                        return "a request was not taken";
                    }
                }
                frame = self.outgoing.next() => {
                    if self.mux.is_wanted(&frame) && !write(&mut writer, &frame).await {
                        return "a frame of a stream was not taken";
                    }
                }
                count = read(&mut reader, decoder.targets(&mut buffer)) => {
                    let Some(count) = count else { return "end of stream" };
                    decoder.arrived(&buffer, count);
                    let was_answered = is_answered;
                    match self.take_all(&mut decoder, &mut useless) {
                        Some(UNATTACHED) if was_answered => {
                            // Another process has the guest's end. It knows no stream and no request of
                            // this daemon.
                            self.mux.end_all();
                            if !self.ask(&mut writer).await {
                                return "a frame was not taken";
                            }
                        }
                        answered => is_answered |= answered == Some(nonce),
                    }
                    if is_answered && !was_answered {
                        self.spoke.send_replace(true);
                        debug!(owner = %self.owner, "the guest answered");
                        // Not earlier: a time that waits for a guest that boots or is paused would arrive
                        // late.
                        if !send(&mut writer, &clock()).await {
                            return "the time was not taken";
                        }
                    }
                    useless.pause_if_due().await;
                }
                () = tokio::time::sleep_until(asks_at) => {
                    if !self.ask(&mut writer).await {
                        return "a frame was not taken";
                    }
                    asks_at = Instant::now() + if is_answered { heartbeat::INTERVAL } else { ATTACH_AGAIN };
                }
            }
        }
    }

    /// Asks for the state, which any living guest answers. Returns whether the frame was taken.
    async fn ask(&self, writer: &mut OwnedWriteHalf) -> bool {
        if self.heartbeat.asked(Instant::now()) {
            debug!(owner = %self.owner, "the guest does not answer");
            (self.changed)(&self.owner);
        }
        send(writer, &ToGuest::Attach { nonce: self.nonce }).await
    }

    /// Handles every whole frame. Returns the nonce that the last state answers.
    fn take_all(&self, decoder: &mut Decoder, useless: &mut Useless) -> Option<u64> {
        let mut answered = None;
        let skipped_before = decoder.skipped();
        while let Some(frame) = decoder.next() {
            let length = frame.payload.len() + HEADER_BYTES;
            if frame.kind == FrameKind::Control {
                let (nonce, is_new) = self.take(&frame);
                answered = nonce.or(answered);
                useless.count(if is_new { NEWS_BYTES } else { length });
            } else if !self.mux.take(frame) {
                useless.count(length);
            }
        }
        useless.count(usize::try_from(decoder.skipped() - skipped_before).unwrap_or(usize::MAX));
        answered
    }

    /// Handles a state of this boot. Returns the nonce that it answers, and whether it is another state than before.
    fn take(&self, frame: &Frame) -> (Option<u64>, bool) {
        let Some(state) = frame.message::<FromGuest>() else {
            let note = frame.message::<Note>().filter(|note| note.token == self.tokens.current());
            if let Some(note) = note {
                self.log_lines.lock().unwrap_or_else(PoisonError::into_inner).take(&self.owner, &note.note);
            }
            return (None, false);
        };
        if state.protocol != PROTOCOL {
            warn!(owner = %self.owner, guest = state.protocol, host = PROTOCOL, "the guest speaks another protocol");
            return (None, false);
        }
        let is_accepted = match (&state.token, state.phase) {
            (None, Phase::AwaitingConfig) => true,
            (Some(token), _) => self.tokens.accept(token, state.incarnation.as_deref()),
            (None, _) => is_early_failure(&state),
        };
        if !is_accepted {
            return (None, false);
        }
        let was_unresponsive = self.heartbeat.answered(Instant::now());
        self.mux.set_window(state.window);
        let (is_new, is_another) = {
            let mut view = self.view.lock().unwrap_or_else(PoisonError::into_inner);
            let is_another = is_another_process(view.phase, &state);
            let incarnation = state.incarnation.map(|word| printable(&word, INCARNATION_CHARS_MAX));
            let (phase, exit) = (phase_of(state.phase), state.exit.map(cleaned));
            let identity_error = state.identity_error.map(|why| printable(&why, MESSAGE_CHARS_MAX));
            let asked = if is_another { silent() } else { view.clone() };
            let (memory, volumes) = (state.memory.map(memory_of), state.volumes.map(volumes_of));
            let next = GuestView { phase, exit, incarnation, identity_error, memory, volumes, ..asked };
            let is_new = *view != next;
            *view = next;
            (is_new, is_another)
        };
        if is_new || was_unresponsive {
            (self.changed)(&self.owner);
        }
        (Some(if is_another { UNATTACHED } else { state.nonce }), is_new)
    }
}

/// Makes the message with the current time.
pub(crate) fn clock() -> ToGuest {
    // The number fits until the year 2262.
    ToGuest::Clock { unix_nanos: i64::try_from(Timestamp::now().as_nanosecond()).unwrap_or(i64::MAX) }
}

/// Returns `true` if a guest process sent this state that knows no stream and no request of this daemon. It says so
/// itself, unless an `Attach` that the process before it left in the port was answered first. Then only the missing
/// configuration shows it.
fn is_another_process(before: GuestPhase, state: &FromGuest) -> bool {
    let was_configured = matches!(before, GuestPhase::Configured | GuestPhase::Ready | GuestPhase::Exited);
    state.nonce == UNATTACHED || (was_configured && state.phase == Phase::AwaitingConfig)
}

/// A guest that fails before its configuration has no token yet. Only such a failure is accepted without
/// one: all it can do is end its own boot.
fn is_early_failure(state: &FromGuest) -> bool {
    state.phase == Phase::Exited && state.exit.as_ref().is_some_and(|exit| exit.is_boot_failure)
}

async fn read(reader: &mut OwnedReadHalf, [buffer, _]: [&mut [u8]; 2]) -> Option<usize> {
    reader.read(buffer).await.ok().filter(|&count| count > 0)
}

async fn send(writer: &mut OwnedWriteHalf, message: &ToGuest) -> bool {
    match Frame::control(message) {
        Ok(frame) => write(writer, &frame).await,
        Err(_) => false,
    }
}

async fn write(writer: &mut OwnedWriteHalf, frame: &Frame<impl AsRef<[u8]>>) -> bool {
    let header = frame.header();
    let mut bytes = Buf::chain(&header[..], frame.payload.as_ref());
    let sent = tokio::time::timeout(WRITE_DEADLINE, writer.write_all_buf(&mut bytes)).await;
    matches!(sent, Ok(Ok(())))
}

/// Drops outgoing frames: without a connection there are no streams.
async fn discard(outgoing: &mut Outgoing) {
    loop {
        drop(outgoing.next().await);
    }
}

/// Counts bytes from the guest that no request needs: garbage, repeated states, frames of closed streams.
struct Useless {
    bytes: usize,
    since: Instant,
}

impl Default for Useless {
    fn default() -> Self {
        Self { bytes: 0, since: Instant::now() }
    }
}

impl Useless {
    fn count(&mut self, bytes: usize) {
        self.bytes = self.bytes.saturating_add(bytes);
    }

    /// Reads nothing for the rest of the second after a flood; the guest's own writes wait meanwhile.
    async fn pause_if_due(&mut self) {
        if self.bytes < USELESS_BYTES_MAX {
            return;
        }
        let until = self.since + USELESS_PERIOD;
        tokio::time::sleep_until(until).await;
        *self = Self::default();
    }
}

#[cfg(feature = "fuzzing")]
pub(super) mod fuzzing {
    use super::super::tokens::Known;
    use super::*;

    /// Size of the pieces in which the bytes arrive.
    const PIECE_BYTES: usize = 64;

    /// Takes bytes of a guest as an attached channel does. The resulting view has no control characters.
    pub fn control(data: &[u8]) {
        let known = Known { token: Token("of this boot".to_owned()), new: None };
        let tokens = Arc::new(Tokens::new("fuzzed".to_owned(), known, Box::new(|_| Ok(()))));
        let (mux, outgoing) = Mux::new(1);
        let Ok(owner) = format!("t{:023}", 0).parse() else { return };
        let channel = Channel {
            transport: Transport::VirtioSerial { socket: "/nowhere".into() },
            owner,
            tokens,
            view: Arc::new(Mutex::new(silent())),
            heartbeat: Arc::default(),
            changed: Arc::new(|_| ()),
            log_lines: Mutex::new(LogLines::new(Arc::new(|_, _| ()))),
            nonce: 7,
            mux,
            outgoing,
            spoke: watch::Sender::new(false),
        };
        let (mut decoder, mut useless) = (Decoder::default(), Useless::default());
        for piece in data.chunks(PIECE_BYTES) {
            decoder.push(piece);
            channel.take_all(&mut decoder, &mut useless);
        }
        let view = channel.view.lock().unwrap_or_else(PoisonError::into_inner);
        let texts = [
            view.exit.as_ref().map(|exit| &exit.message),
            view.incarnation.as_ref(),
            view.identity_error.as_ref(),
            view.memory.as_ref().and_then(|memory| memory.error.as_ref()),
        ];
        let problems = view.volumes.iter().flat_map(|volumes| volumes.problems.values());
        for text in texts.into_iter().flatten().chain(problems) {
            assert!(!text.contains(char::is_control), "{text:?}");
        }
    }
}
