//! `GET /instances/{id}/cp`: files into and out of a guest, over a WebSocket.
//!
//! Guarantees: memory use is bounded by a window, whatever the size of the files; a file is in place whole
//! or not at all; data from a guest is checked (names, sizes) before a client sees it.

use axum::extract::rejection::PathRejection;
use axum::extract::ws::{Message, WebSocket, WebSocketUpgrade, rejection::WebSocketUpgradeRejection};
use axum::extract::{Path, State};
use axum::response::Response;
use bytes::Bytes;
use futures::{SinkExt, StreamExt};
use stead_schemas::api::{CopyFrame, CopyHeader, CopyRequest, Direction};
use stead_schemas::guest::FromStream;
use stead_schemas::names::Uid;

use super::auth::Bearer;
use super::socket::{self, Activity, Sink, Stream};
use super::{ApiError, ApiState, ServerLimits};
use crate::guest_channel::{AgentStream, Event, StreamReceiver};

pub(super) async fn cp(
    State(state): State<ApiState>,
    limits: ServerLimits,
    bearer: Bearer,
    id: Result<Path<String>, PathRejection>,
    upgrade: Result<WebSocketUpgrade, WebSocketUpgradeRejection>,
) -> Result<Response, ApiError> {
    socket::upgrade((state, limits), bearer, id, upgrade, session)
}

/// The reason why a copy ends early.
#[derive(Debug)]
pub(super) enum Stop {
    ClientGone,
    Failed { message: String, path: Option<String> },
}

impl From<axum::Error> for Stop {
    fn from(_: axum::Error) -> Self {
        Self::ClientGone
    }
}

async fn session((state, limits): (ApiState, ServerLimits), instance: Uid, socket: WebSocket) {
    let (mut sink, mut stream) = socket.split();
    // A client may be sending until its first frame says otherwise.
    let mut is_sending = true;
    let opened = async {
        let request: CopyRequest = socket::first(&mut stream).await?;
        let direction = request.direction;
        is_sending = matches!(direction, Direction::To);
        let agent = socket::open(&state, &instance, request.into_request()?, None).await;
        agent.map(|agent| (agent, direction)).map_err(|error| error.to_string())
    };
    let copied = match opened.await {
        Ok((agent, Direction::To)) => to(agent, limits, &mut sink, &mut stream).await,
        Ok((agent, Direction::From)) => from(agent, limits, &mut sink, &mut stream).await,
        Err(message) => Err(Stop::Failed { message, path: None }),
    };
    let last = match copied {
        Ok(last) => last,
        Err(Stop::Failed { message, path }) => {
            let error = Message::Text(text(&CopyFrame::Error { message, path }).into());
            if socket::send(&mut sink, error, limits).await.is_none() {
                return;
            }
            if is_sending {
                socket::linger(&mut stream, is_end_frame).await;
            }
            None
        }
        Err(Stop::ClientGone) => return,
    };
    socket::finish(&mut sink, last.as_ref().map(text)).await;
}

fn text(frame: &CopyFrame) -> String {
    serde_json::to_string(frame).unwrap_or_default()
}

fn lost() -> Stop {
    Stop::Failed { message: "the connection to the guest was lost".to_owned(), path: None }
}

/// Waits for the guest's result of a copy.
async fn copied(receiver: &mut StreamReceiver) -> Result<CopyFrame, Stop> {
    loop {
        match receiver.next().await {
            Some(Event::Message(FromStream::Copied { bytes })) => {
                let bytes_written = (bytes > 0).then_some(bytes);
                return Ok(CopyFrame::Result { success: true, error: None, bytes_written });
            }
            Some(Event::Message(FromStream::Failed { message, path, .. })) => {
                let error = path.map_or(message.clone(), |path| format!("{path}: {message}"));
                return Ok(CopyFrame::Result { success: false, error: Some(error), bytes_written: None });
            }
            Some(_) => {}
            None => return Err(lost()),
        }
    }
}

/// Copies into the guest: data and end come from the client, and a single result from the guest.
pub(super) async fn to(
    agent: AgentStream,
    limits: ServerLimits,
    sink: &mut Sink,
    stream: &mut Stream,
) -> Result<Option<CopyFrame>, Stop> {
    let AgentStream { mut sender, mut receiver } = agent;
    let mut has_ended = false;
    let activity = Activity::now();
    let send = async {
        loop {
            activity.note();
            let message = stream.next().await;
            // A guest that is slow to take the data keeps this loop from reading the socket.
            activity.pause();
            match message {
                Some(Ok(Message::Binary(bytes))) => {
                    if sender.data(bytes).await.is_err() {
                        // The guest gave up; its own message gives the reason.
                        return std::future::pending().await;
                    }
                }
                Some(Ok(Message::Text(word))) if is_end(&word) => {
                    has_ended = true;
                    let _ = sender.eof().await;
                    return std::future::pending().await;
                }
                Some(Ok(Message::Ping(_) | Message::Pong(_))) => {}
                Some(Ok(Message::Text(_))) => {
                    let message = "unexpected text: data is binary, and the end is {\"type\":\"end\"}";
                    return Stop::Failed { message: message.to_owned(), path: None };
                }
                Some(Ok(Message::Close(_)) | Err(_)) | None => return Stop::ClientGone,
            }
        }
    };
    let asking = async {
        let mut pings = socket::pings(limits);
        loop {
            pings.tick().await;
            if activity.is_silent_for(limits.sender_silence_max)
                || sink.send(Message::Ping(Bytes::new())).await.is_err()
            {
                return Stop::ClientGone;
            }
        }
    };
    let result = tokio::select! {
        biased;
        result = copied(&mut receiver) => result?,
        stopped = send => return Err(stopped),
        stopped = asking => return Err(stopped),
    };
    if has_ended {
        return Ok(Some(result));
    }
    // The result is sent at once. Data that is still on its way is read, or the client, which reads only
    // when it has sent everything, would see a broken connection instead.
    sink.send(Message::Text(text(&result).into())).await?;
    socket::linger(stream, is_end_frame).await;
    Ok(None)
}

fn is_end_frame(message: &Message) -> bool {
    matches!(message, Message::Text(word) if is_end(word))
}

fn is_end(word: &str) -> bool {
    matches!(serde_json::from_str(word), Ok(CopyFrame::End { .. }))
}

/// Copies out of the guest: entries with exactly the data that their headers announce.
pub(super) async fn from(
    mut agent: AgentStream,
    limits: ServerLimits,
    sink: &mut Sink,
    stream: &mut Stream,
) -> Result<Option<CopyFrame>, Stop> {
    let mut left = 0;
    let (activity, mut pings) = (Activity::now(), socket::pings(limits));
    loop {
        let event = tokio::select! {
            biased;
            event = agent.receiver.next() => event,
            _ = pings.tick() => {
                if activity.is_silent_for(limits.silence_max) {
                    return Err(Stop::ClientGone);
                }
                sink.send(Message::Ping(Bytes::new())).await?;
                continue;
            }
            // Nothing is expected from the client except its end.
            message = stream.next() => match message {
                Some(Ok(Message::Close(_)) | Err(_)) | None => return Err(Stop::ClientGone),
                Some(Ok(_)) => {
                    activity.note();
                    continue;
                }
            },
        };
        // The client takes the data that is sent below, or the connection ends.
        activity.note();
        match event {
            Some(Event::Data(bytes)) => {
                let length = u64::try_from(bytes.len()).unwrap_or(u64::MAX);
                left = u64::checked_sub(left, length).ok_or_else(lied)?;
                sink.send(Message::Binary(bytes)).await?;
            }
            Some(Event::Message(FromStream::Entry(entry))) if left == 0 => {
                let header = CopyHeader::of(entry).map_err(|message| Stop::Failed { message, path: None })?;
                left = header.size;
                sink.send(Message::Text(text(&CopyFrame::Header(header)).into())).await?;
            }
            Some(Event::Message(FromStream::EntryEnd { is_last })) if left == 0 => {
                let end = CopyFrame::End { is_final: Some(is_last) };
                if is_last {
                    return Ok(Some(end));
                }
                sink.send(Message::Text(text(&end).into())).await?;
            }
            Some(Event::Message(FromStream::Failed { message, path, .. })) => {
                return Err(Stop::Failed { message, path });
            }
            Some(Event::Message(_) | Event::ErrorData(_)) => return Err(lied()),
            None => return Err(lost()),
        }
    }
}

fn lied() -> Stop {
    Stop::Failed { message: "the guest sent something else than it announced".to_owned(), path: None }
}
