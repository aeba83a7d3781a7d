//! `stead exec`: a program in a guest, connected to this terminal when there is one.

use std::io::{IsTerminal, Write};
use std::os::fd::AsFd;

use clap::Args;
use futures::stream::{SplitSink, SplitStream};
use futures::{SinkExt, StreamExt};
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};
use serde_json::{Value, json};
use tokio::io::AsyncReadExt;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_tungstenite::tungstenite::Message;

use super::Failure;
use super::arguments::pair;
use super::client::{Client, Socket};

#[derive(Debug, Args)]
pub(crate) struct Exec {
    name: String,
    /// Pass on the standard input.
    #[arg(short, long)]
    interactive: bool,
    /// Give the program a terminal; the default with -i when both ends of this one are terminals.
    #[arg(short, long)]
    tty: bool,
    /// Give the program no terminal.
    #[arg(short = 'T', long, conflicts_with = "tty")]
    no_tty: bool,
    /// An environment variable, as KEY=VALUE.
    #[arg(short, long = "env", value_parser = pair)]
    env: Vec<(String, String)>,
    #[arg(short = 'w', long)]
    cwd: Option<String>,
    /// The user: user, uid, or user:group.
    #[arg(short, long)]
    user: Option<String>,
    /// Seconds until the program is ended.
    #[arg(long)]
    timeout: Option<u64>,
    /// Seconds to wait for the agent of an instance that is starting.
    #[arg(long)]
    wait_for_agent: Option<u64>,
    /// The program and its arguments; a shell by default.
    #[arg(trailing_var_arg = true)]
    cmd: Vec<String>,
}

/// Exit code, as in a shell, of a program that Ctrl-C ended (128 + SIGINT).
const INTERRUPTED: u8 = 130;
/// Exit codes of a program that was terminated, or whose terminal is gone (128 + SIGTERM, 128 + SIGHUP).
const TERMINATED: u8 = 143;
const HUNG_UP: u8 = 129;

/// This terminal in raw mode; the previous mode returns when the value is dropped.
struct Raw(Termios);

impl Raw {
    fn enter() -> Option<Self> {
        let stdin = std::io::stdin();
        let before = tcgetattr(stdin.as_fd()).ok()?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(stdin.as_fd(), OptionalActions::Now, &raw).ok()?;
        Some(Self(before))
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        let _ = tcsetattr(std::io::stdin().as_fd(), OptionalActions::Now, &self.0);
    }
}

fn size() -> Option<(u16, u16)> {
    let size = tcgetwinsize(std::io::stdout().as_fd()).ok()?;
    Some((size.ws_row, size.ws_col)).filter(|&(rows, columns)| rows > 0 && columns > 0)
}

pub(super) async fn exec(client: &Client, exec: Exec) -> Result<(), Failure> {
    let is_at_terminal = std::io::stdin().is_terminal() && std::io::stdout().is_terminal();
    // People expect this of a bare `exec NAME` at a prompt.
    let interactive = exec.interactive || (is_at_terminal && exec.cmd.is_empty());
    let tty = exec.tty || (interactive && is_at_terminal && !exec.no_tty);
    let env: serde_json::Map<String, Value> =
        exec.env.into_iter().map(|(key, value)| (key, Value::String(value))).collect();
    let mut request = json!({ "command": exec.cmd, "tty": tty, "env": env, "split_output": !tty });
    let optional = [
        ("cwd", exec.cwd.map(Value::from)),
        ("user", exec.user.map(Value::from)),
        ("timeout", exec.timeout.map(Value::from)),
        ("wait_for_agent", exec.wait_for_agent.map(Value::from)),
        ("rows", size().filter(|_| tty).map(|(rows, _)| rows.into())),
        ("cols", size().filter(|_| tty).map(|(_, columns)| columns.into())),
    ];
    for (key, value) in optional {
        if let Some(value) = value {
            request[key] = value;
        }
    }
    let socket = client.socket(&["instances", &exec.name, "exec"], &request).await?;
    // Before the mode changes: a signal that nobody waits for would end this client and leave the mode.
    let end = EndSignals::listen();
    // Without input to the program, the keys that end it would do nothing: the terminal keeps its mode, and
    // Ctrl-C is sent as a signal.
    let _raw = if tty && interactive { Raw::enter() } else { None };
    let (sink, stream) = socket.split();
    tokio::select! {
        biased;
        ended = outputs(stream, !tty) => ended,
        failed = inputs(sink, interactive, tty) => Err(failed),
        ended = asked_to_end(end) => Err(ended),
    }
}

/// The signals that end this client. From `listen` on they no longer end it by themselves.
struct EndSignals {
    terminated: Signal,
    hung_up: Signal,
}

impl EndSignals {
    fn listen() -> Option<Self> {
        let terminated = signal(SignalKind::terminate()).ok()?;
        Some(Self { terminated, hung_up: signal(SignalKind::hangup()).ok()? })
    }
}

/// Waits for a signal that ends this client, so that the terminal's mode can be restored first.
async fn asked_to_end(signals: Option<EndSignals>) -> Failure {
    let Some(EndSignals { mut terminated, mut hung_up }) = signals else {
        return std::future::pending().await;
    };
    tokio::select! {
        biased;
        _ = terminated.recv() => Failure::Program(TERMINATED),
        _ = hung_up.recv() => Failure::Program(HUNG_UP),
    }
}

/// Forwards input, sizes and interruptions; returns only when the session is over for the user.
async fn inputs(mut sink: SplitSink<Socket, Message>, interactive: bool, tty: bool) -> Failure {
    let other = |error: std::io::Error| Failure::Other(error.to_string());
    let (mut resized, mut interrupted) =
        match (signal(SignalKind::window_change()), signal(SignalKind::interrupt())) {
            (Ok(resized), Ok(interrupted)) => (resized, interrupted),
            (Err(error), _) | (_, Err(error)) => return other(error),
        };
    let (mut stdin, mut buffer) = (tokio::io::stdin(), vec![0u8; 32 << 10]);
    let mut is_open = interactive;
    let mut interruptions = 0;
    if !interactive {
        let _ = sink.send(Message::text(json!({ "stdin_eof": true }).to_string())).await;
    }
    loop {
        let message = tokio::select! {
            biased;
            _ = interrupted.recv() => {
                interruptions += 1;
                if interruptions > 1 {
                    return Failure::Program(INTERRUPTED);
                }
                Message::text(json!({ "signal": "SIGINT" }).to_string())
            }
            _ = resized.recv(), if tty => {
                let Some((rows, cols)) = size() else { continue };
                Message::text(json!({ "resize": { "rows": rows, "cols": cols } }).to_string())
            }
            read = stdin.read(&mut buffer), if is_open => match read {
                Ok(0) | Err(_) => {
                    is_open = false;
                    Message::text(json!({ "stdin_eof": true }).to_string())
                }
                Ok(count) => Message::binary(buffer[..count].to_vec()),
            },
        };
        if sink.send(message).await.is_err() {
            // The other direction reports how the program ended.
            return std::future::pending().await;
        }
    }
}

/// Prints the output until the program has ended; returns its exit code as a failure unless it is 0.
async fn outputs(mut stream: SplitStream<Socket>, is_split: bool) -> Result<(), Failure> {
    let lost = || Failure::Other("the connection was lost before the program ended".to_owned());
    while let Some(message) = stream.next().await {
        match message.map_err(|_| lost())? {
            Message::Binary(bytes) => {
                if let Err(error) = write(&bytes, is_split)
                    && error.kind() == std::io::ErrorKind::BrokenPipe
                {
                    // The reader of our output is gone; the program ends with its client.
                    return Err(Failure::Program(super::pipe::CODE));
                }
            }
            Message::Text(text) => {
                let end: Value = serde_json::from_str(&text).map_err(|_| lost())?;
                return match (end["exitCode"].as_i64(), end["error"].as_str()) {
                    (Some(0), _) => Ok(()),
                    (Some(code), _) => Err(Failure::Program(u8::try_from(code).unwrap_or(1))),
                    (None, Some(error)) => Err(Failure::Other(error.to_owned())),
                    (None, None) => Err(lost()),
                };
            }
            _ => {}
        }
    }
    Err(lost())
}

/// Writes a frame; the first byte of a split frame names its output.
fn write(bytes: &[u8], is_split: bool) -> std::io::Result<()> {
    match bytes.split_first() {
        Some((2, rest)) if is_split => put(std::io::stderr(), rest),
        Some((_, rest)) if is_split => put(std::io::stdout(), rest),
        _ => put(std::io::stdout(), bytes),
    }
}

fn put(mut to: impl Write, bytes: &[u8]) -> std::io::Result<()> {
    to.write_all(bytes)?;
    to.flush()
}
