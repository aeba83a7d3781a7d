//! `stead exec` at a real terminal, the far end of a pseudo terminal, with the instance simulated by the test.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::process::Stdio;
use std::time::Duration;

use futures::{SinkExt, StreamExt};
use rustix::fs::{Mode, OFlags, open};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{InputModes, LocalModes, OutputModes, Termios, Winsize, tcgetattr, tcsetwinsize};
use serde_json::{Value, json};
use tokio::io::AsyncWriteExt;
use tokio::net::{TcpListener, TcpStream};
use tokio::process::{Child, Command};
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::{WebSocketStream, accept_async};

/// Time limit for changes that are immediate on an idle machine.
const MOMENT: Duration = Duration::from_secs(60);
const SIZE: Winsize = Winsize { ws_row: 40, ws_col: 100, ws_xpixel: 0, ws_ypixel: 0 };

/// A session of `stead exec` at its own terminal.
struct Session {
    client: Child,
    /// The keyboard and the screen.
    near: OwnedFd,
    /// The terminal as programs use it.
    far: OwnedFd,
    /// The terminal's modes before the client started.
    before: Termios,
    socket: WebSocketStream<TcpStream>,
    request: Value,
}

impl Session {
    async fn begin(options: &[&str]) -> Self {
        let near = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).expect("a pseudo terminal");
        grantpt(&near).expect("granted");
        unlockpt(&near).expect("unlocked");
        let name = ptsname(&near, Vec::new()).expect("it has a name");
        let far = open(name.as_c_str(), OFlags::RDWR | OFlags::NOCTTY, Mode::empty()).expect("opened");
        tcsetwinsize(&near, SIZE).expect("sized");
        let before = tcgetattr(&far).expect("a terminal");
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("bound");
        let base = format!("http://{}", listener.local_addr().expect("bound"));
        let end = || Stdio::from(far.try_clone().expect("cloned"));
        // This terminal is its controlling terminal, so that it is notified of a new size.
        let mut command = Command::new("setsid");
        command.args(["--ctty", env!("CARGO_BIN_EXE_stead"), "exec"]).args(options).args(["web", "sh"]);
        command.env("STEAD_BASE_URL", base).env("STEAD_API_KEY", "token").kill_on_drop(true);
        let client = command.stdin(end()).stdout(end()).stderr(end()).spawn().expect("setsid runs");
        let (stream, _) = soon(listener.accept()).await.expect("it connects");
        let mut socket = accept_async(stream).await.expect("upgraded");
        let request = match soon(socket.next()).await {
            Some(Ok(Message::Text(text))) => serde_json::from_str(&text).expect("JSON"),
            other => panic!("no request, but {other:?}"),
        };
        Self { client, near, far, before, socket, request }
    }

    fn modes(&self) -> Termios {
        tcgetattr(&self.far).expect("a terminal")
    }

    fn is_raw(&self) -> bool {
        let modes = self.modes();
        let cooked = LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG;
        !modes.local_modes.intersects(cooked)
            && !modes.input_modes.contains(InputModes::ICRNL)
            && !modes.output_modes.contains(OutputModes::OPOST)
    }

    fn is_as_before(&self) -> bool {
        let (now, before) = (self.modes(), &self.before);
        now.local_modes == before.local_modes
            && now.input_modes == before.input_modes
            && now.output_modes == before.output_modes
            && now.control_modes == before.control_modes
    }

    async fn types(&self, keys: &[u8]) {
        let mut near = tokio::fs::File::from_std(File::from(self.near.try_clone().expect("cloned")));
        near.write_all(keys).await.expect("typed");
        near.flush().await.expect("typed");
    }

    async fn receives(&mut self) -> Message {
        soon(self.socket.next()).await.expect("it goes on").expect("a message")
    }

    async fn receives_json(&mut self) -> Value {
        let message = self.receives().await;
        serde_json::from_str(message.to_text().expect("text")).expect("JSON")
    }

    async fn until_raw(&self) {
        let raw = async {
            while !self.is_raw() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        soon(raw).await;
    }

    /// Returns the client's exit code, and checks that the terminal is restored.
    async fn ends(&mut self) -> Option<i32> {
        let status = soon(self.client.wait()).await.expect("it ends");
        assert!(self.is_as_before(), "the terminal is left in another mode: {:?}", self.modes());
        status.code()
    }
}

async fn soon<T>(what: impl Future<Output = T>) -> T {
    tokio::time::timeout(MOMENT, what).await.expect("not for ever")
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_and_sizes_go_to_the_program_and_the_terminal_is_given_back() {
    let mut session = Session::begin(&["-it"]).await;
    let asked = ["tty", "rows", "cols", "command"].map(|key| session.request[key].clone());
    assert_eq!(asked, [json!(true), json!(40), json!(100), json!(["sh"])]);
    session.until_raw().await;
    // Keys that end or stop a program go to the program in the guest.
    session.types(b"\x03\x04\x1a\r").await;
    let mut typed = Vec::new();
    while typed.len() < 4 {
        typed.extend(session.receives().await.into_data());
    }
    assert_eq!(typed, b"\x03\x04\x1a\r");
    tcsetwinsize(&session.near, Winsize { ws_row: 50, ws_col: 120, ..SIZE }).expect("sized");
    assert_eq!(session.receives_json().await, json!({ "resize": { "rows": 50, "cols": 120 } }));
    session.socket.send(Message::text(json!({ "exitCode": 7 }).to_string())).await.expect("sent");
    assert_eq!(session.ends().await, Some(7));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_terminal_is_given_back_when_the_server_goes_away() {
    let mut session = Session::begin(&["-it"]).await;
    session.until_raw().await;
    // The server behaves as if killed: its connection is reset without a message.
    let lost = session.socket.get_ref();
    rustix::net::sockopt::set_socket_linger(lost.as_fd(), Some(Duration::ZERO)).expect("set");
    let other = Session::begin(&["-it"]).await;
    drop(std::mem::replace(&mut session.socket, other.socket));
    assert_eq!(session.ends().await, Some(1));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_terminal_is_given_back_when_the_client_is_ended() {
    for (signal, code) in [("TERM", 143), ("HUP", 129)] {
        let mut session = Session::begin(&["-it"]).await;
        session.until_raw().await;
        let pid = session.client.id().expect("it runs").to_string();
        let sent = Command::new("kill").args(["-s", signal, &pid]).status().await.expect("kill runs");
        assert!(sent.success());
        assert_eq!(session.ends().await, Some(code), "{signal}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn without_the_input_the_terminal_stays_and_ctrl_c_is_a_signal() {
    let mut session = Session::begin(&["-t"]).await;
    assert_eq!(session.request["tty"], true);
    assert_eq!(session.receives_json().await, json!({ "stdin_eof": true }));
    assert!(session.is_as_before());
    session.types(b"\x03").await;
    assert_eq!(session.receives_json().await, json!({ "signal": "SIGINT" }));
    session.types(b"\x03").await;
    assert_eq!(session.ends().await, Some(130), "twice is an end of the client");
}
