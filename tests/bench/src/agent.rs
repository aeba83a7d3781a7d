//! The agent: the round trip of a program, against the same channel with less work.

use std::time::Instant;

use futures::{SinkExt, StreamExt};
use serde_json::{Value, json};
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::{MaybeTlsStream, WebSocketStream, connect_async};

use crate::daemon::Daemon;
use crate::{Figure, copies, logs, median};

const ROUNDS: usize = 100;

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

async fn times<F: Future<Output = ()>>(step: impl Fn() -> F) -> f64 {
    let mut seconds = Vec::new();
    for _ in 0..ROUNDS {
        let start = Instant::now();
        step().await;
        seconds.push(start.elapsed().as_secs_f64() * 1000.0);
    }
    median(seconds)
}

pub(crate) async fn agent() -> Vec<Figure> {
    let daemon = Daemon::start("stbench2", "10.239.252.1/24").await;
    daemon.import().await;
    daemon.post_with_disk("box", "1GB", "500MB").await;
    let busybox = "/bin/busybox";
    let round_trip = times(async || drop(exec(&daemon, &[busybox, "true"]).await)).await;
    let bare = times(async || drop(daemon.get("/instances/box/stat?path=/bin").await)).await;
    // This measures the cost of a start in the guest itself: its shell starts the same program a hundred times.
    let line = "i=0; while [ $i -lt 100 ]; do /bin/busybox true; i=$((i+1)); done";
    let start = Instant::now();
    exec(&daemon, &[busybox, "sh", "-c", line]).await;
    let process = (start.elapsed().as_secs_f64() * 1000.0 - round_trip) / 100.0;
    // This runs before the copies, which keep the host's disk busy for a while after they are done.
    let lines = logs::lines(&daemon, open(&daemon, "exec", logs::request()).await).await;
    let copies = copies::copies(&daemon).await;
    daemon.delete("box").await;
    let figure = |what: &str, ours, peer, unit, goal| Figure {
        what: what.to_owned(),
        ours,
        peer: Some(peer),
        unit,
        goal,
    };
    let exec = figure(
        "exec of `true`, median (peer: a stat's round trip and a process start in the guest)",
        round_trip,
        bare + process,
        "ms",
        "<= 3",
    );
    let line = "a key sent to a line of the console's log, followed (peer: its echo by exec)";
    let line = figure(line, lines.logged, lines.echoed, "ms", "");
    [vec![exec], copies, vec![line]].concat()
}
