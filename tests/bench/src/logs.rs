//! The path of a line from a guest's console to a client that follows its log.

use std::time::Instant;

use futures::{SinkExt, StreamExt};
use serde_json::{Value, json};
use tokio_tungstenite::tungstenite::Message;

use crate::daemon::Daemon;
use crate::median;
use crate::stream::Socket;

const ROUNDS: usize = 50;

/// The times from a key that the client sends to a program, in milliseconds.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Lines {
    /// Time to the event with the line that the program first writes to the console.
    pub(crate) logged: f64,
    /// Time to the answer that the program then gives.
    pub(crate) echoed: f64,
}

/// Returns the request for the program, which writes its input to the console, then back.
pub(crate) fn request() -> Value {
    let script = "while read line; do echo mark-$line. >/dev/console; echo $line; done";
    json!({ "command": ["/bin/busybox", "sh", "-c", script] })
}

pub(crate) async fn lines(daemon: &Daemon, mut socket: Socket) -> Lines {
    let mut events = daemon.follow("/instances/box/logs?follow=true&tail=1").await;
    let (mut logged, mut echoed) = (Vec::new(), Vec::new());
    for round in 0..ROUNDS {
        let start = Instant::now();
        socket.send(Message::binary(format!("{round}\n").into_bytes())).await.expect("sent");
        let (mut has_log, mut has_echo) = (false, false);
        while !(has_log && has_echo) {
            tokio::select! {
                biased;
                event = events.next(), if !has_log => {
                    let text = event.expect("followed").expect("received");
                    has_log = String::from_utf8_lossy(&text).contains(&format!("mark-{round}."));
                    if has_log {
                        logged.push(start.elapsed().as_secs_f64() * 1000.0);
                    }
                }
                message = socket.next(), if !has_echo => {
                    has_echo = matches!(message, Some(Ok(Message::Binary(_))));
                    assert!(has_echo, "the program goes on");
                    echoed.push(start.elapsed().as_secs_f64() * 1000.0);
                }
            }
        }
    }
    Lines { logged: median(logged), echoed: median(echoed) }
}
