//! `GET /instances/{id}/exec`: a program beside the instance's own, over a WebSocket.
//!
//! Guarantees: never more than a window of output is held; output is complete and in order before the exit
//! code; a client that vanishes, with or without closing the connection, takes its program with it, and so
//! does a client that stops taking output (the listener ends its connection).

use std::time::Duration;

use axum::extract::rejection::PathRejection;
use axum::extract::ws::{Message, WebSocket, WebSocketUpgrade, rejection::WebSocketUpgradeRejection};
use axum::extract::{Path, State};
use axum::response::Response;
use bytes::{BufMut, Bytes, BytesMut};
use futures::StreamExt;
use serde_json::json;
use stead_schemas::api::{ExecControl, ExecRequest};
use stead_schemas::guest::{FromStream, Request};
use stead_schemas::names::Uid;
use stead_schemas::validate::printable;

use super::auth::Bearer;
use super::socket::{self, Activity, Sink, Stream};
use super::{ApiError, ApiState, ServerLimits};
use crate::guest_channel::{AgentStream, Event, StreamReceiver, StreamSender};

/// Exit code of a shell for a program that could not be started for an unknown reason.
const NOT_STARTED: i32 = 127;
/// Time that a guest has beyond a program's limit: to ask the program to end, to kill it, and to report.
const OVERDUE_GRACE: Duration = Duration::from_secs(15);
/// Number of characters of an unknown signal's name that are repeated.
const SIGNAL_CHARS_MAX: usize = 32;
/// First bytes of frames when the two outputs are separate.
const STANDARD_OUTPUT: u8 = 1;
const STANDARD_ERROR: u8 = 2;

pub(super) async fn exec(
    State(state): State<ApiState>,
    limits: ServerLimits,
    bearer: Bearer,
    id: Result<Path<String>, PathRejection>,
    upgrade: Result<WebSocketUpgrade, WebSocketUpgradeRejection>,
) -> Result<Response, ApiError> {
    socket::upgrade((state, limits), bearer, id, upgrade, session)
}

async fn session((state, limits): (ApiState, ServerLimits), instance: Uid, socket: WebSocket) {
    let (mut sink, mut stream) = socket.split();
    let opened = async {
        let request: ExecRequest = socket::first(&mut stream).await?;
        let wait = request.wait_for_agent.map(Duration::from_secs);
        let request = request.into_request()?;
        let is_split = request.is_split;
        let limit = request.timeout_millis.map(|millis| Duration::from_millis(millis) + OVERDUE_GRACE);
        let agent = socket::open(&state, &instance, Request::Exec(request), wait).await;
        agent.map(|agent| (agent, is_split, limit)).map_err(|error| error.to_string())
    };
    match opened.await {
        Ok((agent, is_split, limit)) => pump(agent, (is_split, limit), limits, sink, stream).await,
        Err(message) => socket::finish(&mut sink, Some(json!({ "error": message }).to_string())).await,
    }
}

/// Runs both directions concurrently, so that neither waits for the other, until one is over.
pub(super) async fn pump(
    agent: AgentStream,
    (is_split, limit): (bool, Option<Duration>),
    limits: ServerLimits,
    mut sink: Sink,
    stream: Stream,
) {
    let AgentStream { sender, receiver } = agent;
    let activity = Activity::now();
    let end = tokio::select! {
        biased;
        end = outputs(receiver, is_split, limits, &mut sink, &activity) => end,
        end = inputs(sender, stream, &activity) => end,
        end = overdue(limit) => Some(end),
    };
    if end.is_some() {
        socket::finish(&mut sink, end).await;
    }
}

/// Returns the last frame for a guest that should have ended a late program and did not even do that.
async fn overdue(limit: Option<Duration>) -> String {
    match limit {
        Some(limit) => tokio::time::sleep(limit).await,
        None => std::future::pending().await,
    }
    json!({ "error": "the guest did not end the program in its time" }).to_string()
}

/// Forwards input from the client until the client is gone, or names a signal that does not exist; returns
/// the last frame then.
async fn inputs(mut sender: StreamSender, mut stream: Stream, activity: &Activity) -> Option<String> {
    while let Some(Ok(message)) = stream.next().await {
        // A program that does not read keeps this loop from reading the socket; the client does not count as
        // silent then.
        activity.pause();
        let sent = match message {
            Message::Binary(bytes) => sender.data(bytes).await,
            Message::Text(text) => match ExecControl::read(&text) {
                Some(ExecControl::Message(message)) => sender.message(&message).await,
                Some(ExecControl::Eof) => sender.eof().await,
                Some(ExecControl::Unknown(name)) => {
                    let name = printable(&name, SIGNAL_CHARS_MAX);
                    return Some(json!({ "error": format!("there is no signal {name}") }).to_string());
                }
                None => sender.data(Bytes::copy_from_slice(text.as_bytes())).await,
            },
            Message::Ping(_) | Message::Pong(_) => Ok(()),
            Message::Close(_) => return None,
        };
        if sent.is_err() {
            // The program is over or its guest lost: the other direction reports it.
            return std::future::pending().await;
        }
        activity.note();
    }
    None
}

/// Forwards output to the client until the program has ended; returns the last frame then, or `None` when
/// the client is gone.
async fn outputs(
    mut receiver: StreamReceiver,
    is_split: bool,
    limits: ServerLimits,
    sink: &mut Sink,
    activity: &Activity,
) -> Option<String> {
    let mut pings = socket::pings(limits);
    loop {
        let event = tokio::select! {
            biased;
            event = receiver.next() => event,
            _ = pings.tick() => {
                if activity.is_silent_for(limits.silence_max) {
                    return None;
                }
                socket::send(sink, Message::Ping(Bytes::new()), limits).await?;
                continue;
            }
        };
        let (marker, bytes) = match event {
            Some(Event::Data(bytes)) => (STANDARD_OUTPUT, bytes),
            Some(Event::ErrorData(bytes)) => (STANDARD_ERROR, bytes),
            Some(Event::Message(FromStream::Exited { code })) => return Some(exit(code)),
            Some(Event::Message(FromStream::Failed { message, code, .. })) => {
                let text = Bytes::from(format!("Error: {message}\r\n"));
                socket::send(sink, Message::Binary(framed(is_split, STANDARD_ERROR, text)), limits).await?;
                return Some(exit(code.unwrap_or(NOT_STARTED)));
            }
            Some(Event::Message(_)) => continue,
            None => return Some(json!({ "error": "the connection to the guest was lost" }).to_string()),
        };
        socket::send(sink, Message::Binary(framed(is_split, marker, bytes)), limits).await?;
    }
}

fn exit(code: i32) -> String {
    json!({ "exitCode": code }).to_string()
}

fn framed(is_split: bool, marker: u8, bytes: Bytes) -> Bytes {
    if !is_split {
        return bytes;
    }
    let mut framed = BytesMut::with_capacity(bytes.len() + 1);
    framed.put_u8(marker);
    framed.put(bytes);
    framed.freeze()
}
