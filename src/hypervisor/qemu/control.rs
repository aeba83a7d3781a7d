//! The host's end of a VM's control channel.
//!
//! One task per VM connects, asks for the guest's state, keeps the last one, and sends what is
//! asked of the guest. The guest is not trusted: frames are bounded, texts are cleaned, and what
//! does not carry this boot's token is dropped.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use stead_controllers::host::{GuestPhase, GuestView};
use stead_schemas::guest::{Decoder, Frame, FromGuest, PROTOCOL, Phase, ToGuest, Token};
use stead_schemas::instance::Exit;
use stead_schemas::limits::MESSAGE_CHARS_MAX;
use stead_schemas::names::Uid;
use stead_schemas::validate::printable;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tracing::{debug, warn};

use crate::hypervisor::Changed;

/// Between two tries to connect; the socket is there as soon as QEMU is.
const RECONNECT_FIRST: Duration = Duration::from_millis(20);
const RECONNECT_MAX: Duration = Duration::from_secs(5);
/// Between two `Attach` frames until one is answered; a booting guest answers the first it reads.
const ATTACH_AGAIN: Duration = Duration::from_secs(5);
/// A guest that does not take a frame for this long is left; the next connection tries again.
const WRITE_DEADLINE: Duration = Duration::from_secs(10);
/// Requests waiting for the channel: one of each kind is all there ever is.
const REQUESTS_MAX: usize = 8;

/// A handle on the task; dropping it ends the task.
#[derive(Debug)]
pub(super) struct Control {
    view: Arc<Mutex<GuestView>>,
    token: Token,
    requests: mpsc::Sender<ToGuest>,
    task: JoinHandle<()>,
}

impl Drop for Control {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Control {
    pub(super) fn start(socket: PathBuf, owner: Uid, token: Token, changed: Changed) -> Self {
        let view = Arc::new(Mutex::new(GuestView {
            phase: GuestPhase::Silent,
            exit: None,
            is_shutdown_requested: false,
            is_exit_acknowledged: false,
        }));
        let (requests, receiver) = mpsc::channel(REQUESTS_MAX);
        let channel = Channel { socket, owner, token: token.clone(), view: view.clone(), changed, nonce: 0 };
        let task = tokio::spawn(channel.run(receiver));
        Self { view, token, requests, task }
    }

    pub(super) fn view(&self) -> GuestView {
        self.view.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(super) fn token(&self) -> &Token {
        &self.token
    }

    /// Hands a request to the channel, and shows at once that it was asked for.
    pub(super) fn ask(&self, request: ToGuest, note: impl FnOnce(&mut GuestView)) -> Result<(), String> {
        self.requests.try_send(request).map_err(|_| "the guest takes no requests".to_owned())?;
        note(&mut self.view.lock().unwrap_or_else(PoisonError::into_inner));
        Ok(())
    }
}

struct Channel {
    socket: PathBuf,
    owner: Uid,
    token: Token,
    view: Arc<Mutex<GuestView>>,
    changed: Changed,
    nonce: u64,
}

impl Channel {
    async fn run(mut self, mut requests: mpsc::Receiver<ToGuest>) {
        let mut delay = RECONNECT_FIRST;
        loop {
            if let Ok(stream) = UnixStream::connect(&self.socket).await {
                delay = RECONNECT_FIRST;
                let ended = self.serve(stream, &mut requests).await;
                debug!(owner = %self.owner, reason = ended, "the control channel was cut");
            }
            tokio::time::sleep(delay).await;
            delay = (delay * 2).min(RECONNECT_MAX);
        }
    }

    /// Speaks until the connection fails.
    async fn serve(&mut self, stream: UnixStream, requests: &mut mpsc::Receiver<ToGuest>) -> &'static str {
        let (mut reader, mut writer) = stream.into_split();
        let mut decoder = Decoder::default();
        let mut buffer = vec![0u8; 16 << 10];
        self.nonce += 1;
        let nonce = self.nonce;
        if !send(&mut writer, &ToGuest::Attach { nonce }).await {
            return "the first frame was not taken";
        }
        let mut is_answered = false;
        loop {
            tokio::select! {
                biased;
                // Both arms only wait: what they took is handled before the next round.
                request = requests.recv() => {
                    let Some(request) = request else { return "the handle was dropped" };
                    if !send(&mut writer, &request).await {
                        return "a request was not taken";
                    }
                }
                count = read(&mut reader, &mut buffer) => {
                    let Some(count) = count else { return "end of stream" };
                    decoder.push(&buffer[..count]);
                    while let Some(frame) = decoder.next() {
                        is_answered |= self.take(&frame) == Some(nonce);
                    }
                }
                () = tokio::time::sleep(ATTACH_AGAIN), if !is_answered => {
                    if !send(&mut writer, &ToGuest::Attach { nonce }).await {
                        return "a frame was not taken";
                    }
                }
            }
        }
    }

    /// Takes a state of this boot; the nonce it answers.
    fn take(&self, frame: &Frame) -> Option<u64> {
        let state: FromGuest = frame.message()?;
        if state.protocol != PROTOCOL {
            warn!(owner = %self.owner, guest = state.protocol, host = PROTOCOL, "the guest speaks another protocol");
            return None;
        }
        let is_of_this_boot = match (&state.token, state.phase) {
            (None, Phase::AwaitingConfig) => true,
            (Some(token), _) => *token == self.token,
            (None, _) => is_early_failure(&state),
        };
        if !is_of_this_boot {
            return None;
        }
        let is_new = {
            let mut view = self.view.lock().unwrap_or_else(PoisonError::into_inner);
            let next =
                GuestView { phase: phase_of(state.phase), exit: state.exit.map(cleaned), ..view.clone() };
            let is_new = *view != next;
            *view = next;
            is_new
        };
        if is_new {
            (self.changed)(&self.owner);
        }
        Some(state.nonce)
    }
}

/// A guest that fails before its configuration has no token yet: only such a failure is believed
/// without one, since all it can do is to end its own boot.
fn is_early_failure(state: &FromGuest) -> bool {
    state.phase == Phase::Exited && state.exit.as_ref().is_some_and(|exit| exit.is_boot_failure)
}

fn phase_of(phase: Phase) -> GuestPhase {
    match phase {
        Phase::AwaitingConfig => GuestPhase::AwaitingConfig,
        Phase::Configured => GuestPhase::Configured,
        Phase::Ready => GuestPhase::Ready,
        Phase::Exited => GuestPhase::Exited,
    }
}

fn cleaned(exit: Exit) -> Exit {
    Exit { message: printable(&exit.message, MESSAGE_CHARS_MAX), ..exit }
}

async fn read(reader: &mut OwnedReadHalf, buffer: &mut [u8]) -> Option<usize> {
    reader.read(buffer).await.ok().filter(|&count| count > 0)
}

async fn send(writer: &mut OwnedWriteHalf, message: &ToGuest) -> bool {
    let Ok(frame) = Frame::control(message) else { return false };
    let sent = tokio::time::timeout(WRITE_DEADLINE, writer.write_all(&frame.encode())).await;
    matches!(sent, Ok(Ok(())))
}
