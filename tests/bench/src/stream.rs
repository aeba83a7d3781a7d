//! The client's end of the agent's streams, and the speed of a stream.

use std::time::Instant;

use futures::{SinkExt, StreamExt};
use serde_json::{Value, json};
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::{MaybeTlsStream, WebSocketStream, connect_async};

use crate::daemon::Daemon;

pub(crate) type Socket = WebSocketStream<MaybeTlsStream<tokio::net::TcpStream>>;

pub(crate) async fn open(daemon: &Daemon, verb: &str, request: Value) -> Socket {
    let url = format!("{}/instances/box/{verb}", daemon.base.replacen("http", "ws", 1));
    let mut upgrade = url.into_client_request().expect("a request");
    let token = format!("Bearer {}", daemon.token).parse().expect("a header");
    upgrade.headers_mut().insert("authorization", token);
    let (mut socket, _) = connect_async(upgrade).await.expect("upgraded");
    socket.send(Message::text(request.to_string())).await.expect("sent");
    socket
}

/// Reads everything until the end. Returns the number of bytes received, and the last text.
pub(crate) async fn drain(socket: &mut Socket) -> (usize, String, String) {
    let (mut bytes, mut last, mut output) = (0, String::new(), Vec::new());
    while let Some(Ok(message)) = socket.next().await {
        match message {
            Message::Binary(data) => {
                bytes += data.len();
                if output.len() < 4096 {
                    output.extend_from_slice(&data);
                }
            }
            Message::Text(text) => last = text.to_string(),
            Message::Close(_) => break,
            _ => {}
        }
    }
    (bytes, last, String::from_utf8_lossy(&output).into_owned())
}

pub(crate) async fn exec(daemon: &Daemon, command: &[&str]) -> String {
    let mut socket = open(daemon, "exec", json!({ "command": command })).await;
    let (_, last, output) = drain(&mut socket).await;
    assert_eq!(last, r#"{"exitCode":0}"#, "{command:?}: {output}");
    output
}

#[expect(clippy::cast_precision_loss, reason = "a figure for people")]
pub(crate) fn megabytes(bytes: usize, start: Instant) -> f64 {
    bytes as f64 / 1e6 / start.elapsed().as_secs_f64()
}
