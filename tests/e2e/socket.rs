//! A WebSocket client like that of the SDKs: exec and cp of a running site.

use std::time::Duration;

use futures::{SinkExt, StreamExt};
use serde_json::{Value, json};
use tokio::net::TcpStream;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::tungstenite::{Error, Message};
use tokio_tungstenite::{MaybeTlsStream, WebSocketStream, connect_async};

use crate::fixtures::timeout;
use crate::harness::{Harness, LISTEN};

/// Time limit for an answer that a busy machine may delay.
const ANSWER: Duration = Duration::from_secs(300);

pub(crate) struct Socket(WebSocketStream<MaybeTlsStream<TcpStream>>);

/// A frame that matters to a test.
#[derive(Debug, PartialEq)]
pub(crate) enum Received {
    Bytes(Vec<u8>),
    Json(Value),
    End,
}

impl Socket {
    /// Opens a connection.
    ///
    /// # Errors
    /// The status and body of an answer that is no upgrade.
    pub(crate) async fn open(site: &Harness, path: &str) -> Result<Self, (u16, Value)> {
        let mut request = format!("ws://{LISTEN}{path}").into_client_request().expect("a request");
        let token = format!("Bearer {}", site.token()).parse().expect("a header");
        request.headers_mut().insert("authorization", token);
        match connect_async(request).await {
            Ok((socket, _)) => Ok(Self(socket)),
            Err(Error::Http(response)) => {
                let body = response.body().as_deref().unwrap_or_default();
                Err((response.status().as_u16(), serde_json::from_slice(body).unwrap_or(Value::Null)))
            }
            Err(error) => panic!("{path}: {error}\n{}", site.daemon_log()),
        }
    }

    pub(crate) async fn exec(site: &Harness, instance: &str, request: &Value) -> Self {
        let opened = Self::open(site, &format!("/instances/{instance}/exec")).await;
        let mut socket = opened.unwrap_or_else(|refused| panic!("exec: {refused:?}"));
        socket.json(request).await;
        socket
    }

    pub(crate) async fn cp(site: &Harness, instance: &str, request: &Value) -> Self {
        let opened = Self::open(site, &format!("/instances/{instance}/cp")).await;
        let mut socket = opened.unwrap_or_else(|refused| panic!("cp: {refused:?}"));
        socket.json(request).await;
        socket
    }

    pub(crate) async fn json(&mut self, value: &Value) {
        self.text(&value.to_string()).await;
    }

    pub(crate) async fn text(&mut self, text: &str) {
        self.0.send(Message::text(text)).await.expect("sent");
    }

    pub(crate) async fn bytes(&mut self, bytes: &[u8]) {
        self.0.send(Message::binary(bytes.to_vec())).await.expect("sent");
    }

    pub(crate) async fn next(&mut self) -> Received {
        let next = async {
            loop {
                match self.0.next().await {
                    Some(Ok(Message::Binary(bytes))) => return Received::Bytes(bytes.to_vec()),
                    Some(Ok(Message::Text(text))) => {
                        return Received::Json(serde_json::from_str(&text).expect("text frames are JSON"));
                    }
                    Some(Ok(Message::Close(_)) | Err(_)) | None => return Received::End,
                    Some(Ok(_)) => {}
                }
            }
        };
        timeout(ANSWER, next).await.unwrap_or_else(|_| panic!("no answer in time"))
    }

    /// Returns all output, and the last text frame.
    pub(crate) async fn finish(&mut self) -> (Vec<u8>, Value) {
        let mut output = Vec::new();
        loop {
            match self.next().await {
                Received::Bytes(bytes) => output.extend(bytes),
                Received::Json(last) => return (output, last),
                Received::End => {
                    panic!("the end came without a word; output {:?}", String::from_utf8_lossy(&output))
                }
            }
        }
    }

    /// Reads until the output contains a text.
    pub(crate) async fn until(&mut self, text: &str) -> String {
        let mut output = Vec::new();
        while !String::from_utf8_lossy(&output).contains(text) {
            match self.next().await {
                Received::Bytes(bytes) => output.extend(bytes),
                other => {
                    panic!("{text:?} did not come but {other:?} after {:?}", String::from_utf8_lossy(&output))
                }
            }
        }
        String::from_utf8_lossy(&output).into_owned()
    }
}

/// Runs a command to its end with a finite input. Returns output and exit code.
pub(crate) async fn run(site: &Harness, instance: &str, request: Value, input: &[u8]) -> (Vec<u8>, Value) {
    let mut socket = Socket::exec(site, instance, &request).await;
    for part in input.chunks(32 << 10) {
        socket.bytes(part).await;
    }
    socket.json(&json!({ "stdin_eof": true })).await;
    socket.finish().await
}

/// Returns the output of a shell line if it succeeds. The guest or its agent may be about to end, or not exist yet.
pub(crate) async fn tried(site: &Harness, instance: &str, line: &str) -> Option<String> {
    let mut socket = Socket::open(site, &format!("/instances/{instance}/exec")).await.ok()?;
    socket.0.send(Message::text(json!({ "command": ["sh", "-c", line] }).to_string())).await.ok()?;
    let mut output = Vec::new();
    loop {
        match socket.next().await {
            Received::Bytes(bytes) => output.extend(bytes),
            Received::Json(end) if end == json!({ "exitCode": 0 }) => return String::from_utf8(output).ok(),
            Received::Json(_) | Received::End => return None,
        }
    }
}

/// Returns the output of a shell line, which must succeed, without the last line end.
pub(crate) async fn shell(site: &Harness, instance: &str, line: &str) -> String {
    let (output, end) = run(site, instance, json!({ "command": ["sh", "-c", line] }), b"").await;
    let output = String::from_utf8_lossy(&output).into_owned();
    assert_eq!(end, json!({ "exitCode": 0 }), "{line}: {output}");
    output.trim_end_matches('\n').to_owned()
}
