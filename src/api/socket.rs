//! WebSockets to an instance's agent: the checks before the upgrade, the first frame, and the end.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::extract::Path;
use axum::extract::rejection::PathRejection;
use axum::extract::ws::rejection::WebSocketUpgradeRejection;
use axum::extract::ws::{Message, WebSocket, WebSocketUpgrade};
use axum::response::Response;
use futures::stream::{SplitSink, SplitStream};
use futures::{SinkExt, StreamExt};
use serde::de::DeserializeOwned;
use stead_controllers::store::Store;
use stead_schemas::guest::Request;
use stead_schemas::instance::{Instance, State as Is};
use stead_schemas::meta::Object;
use stead_schemas::names::Uid;
use tokio::time::{Instant, Interval, MissedTickBehavior};

use super::auth::Bearer;
use super::{ApiError, ApiState, Backend, ServerLimits, lookup};
use crate::guest_channel::{AgentError, AgentStream};

/// Largest message in both directions, in bytes, as on the wire.
const MESSAGE_BYTES_MAX: usize = 1 << 20;
/// Time for the first frame after the upgrade: the client has it at hand.
const FIRST_FRAME_WAIT: Duration = Duration::from_secs(10);
/// Time to wait for an agent: a daemon that was just started is not attached to every guest yet.
const ATTACH_WAIT: Duration = Duration::from_secs(5);
const ATTACH_POLL: Duration = Duration::from_millis(20);

/// Time for which a client may still send after it was notified that the request failed.
const LINGER_MAX: Duration = Duration::from_secs(30);

/// The time at which the other end was last notified of; `None` while nothing is read from it, because its
/// silence means nothing then.
#[derive(Debug)]
pub(super) struct Activity(Mutex<Option<Instant>>);

impl Activity {
    pub(super) fn now() -> Self {
        Self(Mutex::new(Some(Instant::now())))
    }

    fn set(&self, at: Option<Instant>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = at;
    }

    pub(super) fn note(&self) {
        self.set(Some(Instant::now()));
    }

    /// Marks that nothing is read until the next note.
    pub(super) fn pause(&self) {
        self.set(None);
    }

    pub(super) fn is_silent_for(&self, most: Duration) -> bool {
        let activity = *self.0.lock().unwrap_or_else(PoisonError::into_inner);
        activity.is_some_and(|activity| activity.elapsed() > most)
    }
}

/// Makes a timer for pings, which starts with a pause.
pub(super) fn pings(limits: ServerLimits) -> Interval {
    let mut pings = tokio::time::interval(limits.ping_interval);
    pings.set_missed_tick_behavior(MissedTickBehavior::Delay);
    pings.reset();
    pings
}

pub(super) type Sink = SplitSink<WebSocket, Message>;
pub(super) type Stream = SplitStream<WebSocket>;

/// Returns the instance, if its program runs and its agent is not skipped.
pub(super) fn running(store: &Store, word: &str) -> Result<Arc<Object<Instance>>, ApiError> {
    ready(lookup::instance(store, word)?)
}

fn ready(object: Arc<Object<Instance>>) -> Result<Arc<Object<Instance>>, ApiError> {
    let state = object.status.state;
    if state != Is::Running {
        let message = format!("the instance is {state:?}; this needs Running");
        return Err(ApiError::conflict("invalid_state", message));
    }
    if object.spec.skip_guest_agent {
        let message = "the instance was created with skip_guest_agent; there is no agent to do this";
        return Err(ApiError::conflict("invalid_state", message));
    }
    Ok(object)
}

/// Checks the request, and upgrades to a session that holds a session permit as long as it lives: an
/// upgraded connection is no longer counted among the listener's.
pub(super) fn upgrade<Session>(
    (state, limits): (ApiState, ServerLimits),
    bearer: Bearer,
    id: Result<Path<String>, PathRejection>,
    upgrade: Result<WebSocketUpgrade, WebSocketUpgradeRejection>,
    session: impl FnOnce((ApiState, ServerLimits), Uid, WebSocket) -> Session + Send + 'static,
) -> Result<Response, ApiError>
where
    Session: Future<Output = ()> + Send + 'static,
{
    let object = ready(lookup::instance_to_change(state.store(), &id?.0)?)?;
    let uid = object.meta.uid.clone();
    let upgrade = upgrade?.max_message_size(MESSAGE_BYTES_MAX).max_frame_size(MESSAGE_BYTES_MAX);
    let permit = state.0.pools.session(&uid, &bearer.subject)?;
    Ok(upgrade.on_upgrade(move |socket| async move {
        tokio::select! {
            biased;
            () = session((state, limits), uid, socket) => {}
            // The session's connection ends with it, and so does the work it began.
            () = bearer.ends() => {}
        }
        drop(permit);
    }))
}

/// Reads the first frame; returns a sentence for the client if it is missing or invalid.
pub(super) async fn first<T: DeserializeOwned>(stream: &mut Stream) -> Result<T, String> {
    let first = tokio::time::timeout(FIRST_FRAME_WAIT, async {
        loop {
            match stream.next().await {
                Some(Ok(Message::Ping(_) | Message::Pong(_))) => {}
                other => return other,
            }
        }
    });
    match first.await {
        Ok(Some(Ok(Message::Text(text)))) => {
            read(&text).map_err(|why| format!("the request was not understood: {why}"))
        }
        Ok(_) => Err("the first frame must be the request, as text".to_owned()),
        Err(_) => Err(format!("no request within {} s", FIRST_FRAME_WAIT.as_secs())),
    }
}

fn read<T: DeserializeOwned>(text: &str) -> Result<T, String> {
    // Without this check an array would be accepted for a structure, field by field.
    if !text.trim_start().starts_with('{') {
        return Err("it must be a JSON object".to_owned());
    }
    let mut json = serde_json::Deserializer::from_str(text);
    serde_path_to_error::deserialize(&mut json).map_err(|error| match error.path().to_string() {
        path if path == "." => error.inner().to_string(),
        path => format!("{path}: {}", error.inner()),
    })
}

/// Opens a stream to the agent, waiting briefly for an agent that is about to attach.
pub(super) async fn open(
    state: &ApiState,
    instance: &Uid,
    request: Request,
    wait: Option<Duration>,
) -> Result<AgentStream, AgentError> {
    let backend: &dyn Backend = state.0.backend.as_ref();
    let deadline = Instant::now() + wait.unwrap_or(ATTACH_WAIT);
    loop {
        match backend.open_stream(instance, request.clone()).await {
            Err(AgentError::NotReady) if Instant::now() < deadline => {
                let is_running = |object: Arc<Object<Instance>>| object.status.state == Is::Running;
                // An instance that is not running any more is not waited for.
                if wait.is_none() && !state.store().get::<Instance>(instance).is_some_and(is_running) {
                    return Err(AgentError::NotReady);
                }
                tokio::time::sleep(ATTACH_POLL).await;
            }
            other => return other,
        }
    }
}

/// Sends a frame; returns `None` when the client is gone, or has taken nothing for so long that it counts as
/// gone.
pub(super) async fn send(sink: &mut Sink, frame: Message, limits: ServerLimits) -> Option<()> {
    tokio::time::timeout(limits.silence_max, sink.send(frame)).await.ok()?.ok()
}

/// Reads what a client still sends. The client may read only when it has sent everything; without this it
/// would see a broken connection instead of the last frame.
pub(super) async fn linger(stream: &mut Stream, mut is_last: impl FnMut(&Message) -> bool) {
    let taken = async {
        while let Some(Ok(message)) = stream.next().await {
            if is_last(&message) {
                return;
            }
        }
    };
    // A client that keeps sending is cut off.
    let _ = tokio::time::timeout(LINGER_MAX, taken).await;
}

/// Sends the last text frame, if there is one, and then the close; a client that is gone gets neither.
pub(super) async fn finish(sink: &mut Sink, text: Option<String>) {
    if let Some(text) = text {
        let _ = sink.send(Message::Text(text.into())).await;
    }
    let _ = sink.send(Message::Close(None)).await;
}
