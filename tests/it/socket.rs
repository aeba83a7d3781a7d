//! The Unix socket of the API: who needs no token, what the audit log records, and the command line over it.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Stdio;

use futures::{SinkExt, StreamExt};
use serde_json::{Value, json};
use stead::api::{Account, LocalUsers};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::process::Command;
use tokio_tungstenite::accept_hdr_async;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::handshake::server::{Request, Response};

use crate::cli::{MOMENT, ended, stead};
use crate::server::{CONNECTIONS_PER_CLIENT_MAX, IMAGE, Server, token};

/// Number of a user without any rights, who exists on every host.
const NOBODY: u32 = 65_534;
/// Number of a group that the users of a test are given.
const GROUP: u32 = 54_321;

fn base(server: &Server) -> String {
    format!("unix://{}", server.socket.display())
}

/// Makes a client without a token.
fn client(server: &Server, words: &[&str]) -> Command {
    let mut command = stead(&base(server), "", words);
    command.env_remove("STEAD_API_KEY").env_remove("HYPEMAN_API_KEY");
    command
}

/// Runs a client without a token, which must succeed. Returns its output.
async fn done(server: &Server, words: &[&str]) -> String {
    let (code, out, err) = ended(client(server, words).spawn().expect("started")).await;
    assert_eq!(code, 0, "{words:?}: {out}{err}");
    out
}

#[tokio::test(flavor = "multi_thread")]
async fn root_needs_no_token_for_any_verb_over_the_socket() {
    let server = Server::start().await;
    let run = done(&server, &["run", IMAGE, "--name", "web", "-m", "256MB", "--no-network"]).await;
    assert!(run.contains("Running"), "{run}");
    assert!(done(&server, &["ps"]).await.contains("web"));
    assert_eq!(done(&server, &["wait", "web", "--for", "Running"]).await.trim(), "Running");
    *server.host.log.lock().expect("not poisoned") = vec!["ready".to_owned()];
    let mut logs = client(&server, &["logs", "-f", "web"]).spawn().expect("started");
    let mut lines = BufReader::new(logs.stdout.take().expect("piped")).lines();
    let line = tokio::time::timeout(MOMENT, lines.next_line()).await.expect("in time").expect("read");
    assert_eq!(line.as_deref(), Some("ready"));
    logs.kill().await.expect("ended");
    // The agent of a simulated guest refuses; its refusal arrives over a WebSocket.
    let (code, _, err) = ended(client(&server, &["exec", "web", "true"]).spawn().expect("started")).await;
    assert!(code != 0 && !err.contains("cannot reach"), "{err}");
    assert_eq!(done(&server, &["rm", "-f", "web"]).await, "web\n");
    let audit = server.directory.path().join("audit/audit.log");
    let recorded = async {
        loop {
            let text = fs::read_to_string(&audit).expect("there");
            let lines: Vec<Value> = text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
            if let Some(line) = lines.into_iter().find(|line| line["verb"] == "DELETE") {
                return line;
            }
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    };
    let line = tokio::time::timeout(MOMENT, recorded).await.expect("recorded");
    assert_eq!((&line["subject"], &line["uid"], &line["client"]), (&json!("uid:0"), &json!(0), &Value::Null));
    assert!(line["pid"].as_i64().is_some_and(|pid| pid > 0), "{line}");
    assert!(line.get("token").is_none(), "{line}");
}

/// Sends a request as user nobody with a supplementary group. Returns status and body.
async fn as_nobody(server: &Server, method: &str, path: &str, bearer: &str) -> (String, String) {
    let mut command = Command::new("setpriv");
    let user = format!("--reuid={NOBODY}");
    let groups = format!("--groups={GROUP}");
    command.args([&user, &format!("--regid={NOBODY}"), &groups, "--", "curl", "-s", "-X", method]);
    command.args(["-w", "\n%{http_code}", "--unix-socket"]).arg(&server.socket);
    if !bearer.is_empty() {
        command.args(["-H", &format!("Authorization: Bearer {bearer}")]);
    }
    if method == "POST" {
        command.args(["-H", "Content-Type: application/json", "-d", r#"{"name":"data","size_gb":1}"#]);
    }
    command.arg(format!("http://localhost{path}"));
    let output = command.stdin(Stdio::null()).output().await.expect("setpriv (util-linux) runs curl");
    let text = String::from_utf8(output.stdout).expect("text");
    let (body, status) = text.rsplit_once('\n').expect("a status");
    (status.to_owned(), body.to_owned())
}

/// Lets every user reach the server's socket.
fn open(server: &Server) {
    let set =
        |path: &Path, mode: u32| fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("set");
    set(server.directory.path(), 0o755);
    set(&server.socket, 0o666);
}

#[tokio::test(flavor = "multi_thread")]
async fn other_users_need_a_token_or_the_scopes_of_their_group() {
    let server = Server::start().await;
    open(&server);
    let (status, body) = as_nobody(&server, "GET", "/instances", "").await;
    assert_eq!(status, "401", "{body}");
    assert!(body.contains("user 65534 needs a token"), "{body}");
    assert_eq!(as_nobody(&server, "GET", "/health", "").await.0, "200");
    assert_eq!(as_nobody(&server, "GET", "/instances", &server.token).await.0, "200");
    assert_eq!(as_nobody(&server, "GET", "/instances", "wrong").await.0, "401");

    let users = LocalUsers(vec![(Account::Group(GROUP), vec!["instance:read".to_owned()])]);
    let server = Server::start_at(None, users, |_, _| {}).await;
    open(&server);
    assert_eq!(as_nobody(&server, "GET", "/instances", "").await.0, "200");
    assert_eq!(as_nobody(&server, "POST", "/volumes", "").await.0, "403");
    // A token replaces the rights of the user, whether it gives more or less.
    let narrow = token(&server.keys, &["image:read"], 600);
    assert_eq!(as_nobody(&server, "GET", "/instances", &narrow).await.0, "403");
    assert_eq!(as_nobody(&server, "POST", "/volumes", &server.token).await.0, "201");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_token_of_root_is_refused() {
    let server = Server::start().await;
    let (code, _, err) = ended(stead(&base(&server), "wrong", &["ps"]).spawn().expect("started")).await;
    assert!(code == 1 && err.contains("Unauthorized"), "{err}");
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_of_one_user_leave_tcp_to_others() {
    let server = Server::start().await;
    let mut held = Vec::new();
    for _ in 0..CONNECTIONS_PER_CLIENT_MAX {
        let mut stream = UnixStream::connect(&server.socket).await.expect("connected");
        stream.write_all(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n").await.expect("sent");
        let mut head = [0; 12];
        stream.read_exact(&mut head).await.expect("an answer");
        assert_eq!(&head, b"HTTP/1.1 200");
        held.push(stream);
    }
    let mut refused = UnixStream::connect(&server.socket).await.expect("taken by the kernel");
    let mut answer = String::new();
    refused.read_to_string(&mut answer).await.expect("an answer");
    assert!(answer.starts_with("HTTP/1.1 503") && answer.contains("\"overloaded\""), "{answer}");
    assert_eq!(server.send("GET", "/health", None).await.status, 200);
}

/// Answers a request for the state of a path, which is not there.
async fn answer_stat(stream: &mut UnixStream) {
    let body = json!({"exists": false, "is_dir": false, "is_file": false, "is_symlink": false, "mode": 0, "size": 0});
    let body = body.to_string();
    let head = format!("HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: {}\r\n\r\n", body.len());
    let _ = stream.read(&mut [0; 4096]).await.expect("a request");
    stream.write_all(format!("{head}{body}").as_bytes()).await.expect("sent");
}

/// Serves one WebSocket on a socket of the test's own, after so many requests for states of paths. Returns the path
/// that is asked for, whether there was a token, and the first frame.
async fn session(
    path: &Path,
    stats: usize,
    answer: impl AsyncFnOnce(&mut tokio_tungstenite::WebSocketStream<UnixStream>),
) -> (String, bool, Value) {
    let listener = UnixListener::bind(path).expect("bound");
    let accept = async || {
        let accepted = tokio::time::timeout(MOMENT, listener.accept()).await;
        accepted.expect("in time").expect("accepted").0
    };
    for _ in 0..stats {
        answer_stat(&mut accept().await).await;
    }
    let stream = accept().await;
    let mut asked = (String::new(), false);
    #[expect(clippy::result_large_err, reason = "the library's own type")]
    let read = |request: &Request, response: Response| {
        asked = (request.uri().path().to_owned(), request.headers().contains_key("authorization"));
        Ok(response)
    };
    let mut socket = accept_hdr_async(stream, read).await.expect("upgraded");
    let first = match socket.next().await {
        Some(Ok(Message::Text(text))) => serde_json::from_str(&text).expect("JSON"),
        other => panic!("no request, but {other:?}"),
    };
    answer(&mut socket).await;
    (asked.0, asked.1, first)
}

#[tokio::test(flavor = "multi_thread")]
async fn exec_and_cp_run_over_the_socket() {
    let scratch = tempfile::tempdir().expect("scratch");
    let path = scratch.path().join("s");
    let base = format!("unix://{}", path.display());
    let serves = session(&path, 0, async |socket| {
        socket.send(Message::binary(b"\x01hello".to_vec())).await.expect("sent");
        socket.send(Message::text(json!({"exitCode": 7}).to_string())).await.expect("sent");
    });
    let runs = async {
        let mut command = stead(&base, "", &["exec", "web", "--", "echo", "hello"]);
        command.env_remove("STEAD_API_KEY");
        until_there(&path).await;
        ended(command.spawn().expect("started")).await
    };
    let ((asked, has_token, first), (code, out, err)) = tokio::join!(serves, runs);
    assert_eq!((code, out.as_str()), (7, "hello"), "{err}");
    assert_eq!((asked.as_str(), has_token), ("/instances/web/exec", false));
    assert_eq!(first["command"], json!(["echo", "hello"]));

    fs::remove_file(&path).expect("removed");
    let file = scratch.path().join("file");
    fs::write(&file, "content").expect("written");
    let serves = session(&path, 1, async |socket| {
        assert_eq!(socket.next().await.expect("it goes on").expect("a frame").into_data(), "content");
        let result = json!({"type": "result", "success": true, "bytes_written": 7});
        socket.send(Message::text(result.to_string())).await.expect("sent");
    });
    let runs = async {
        until_there(&path).await;
        let words = ["cp", file.to_str().expect("text"), "web:/x"];
        ended(stead(&base, "secret", &words).spawn().expect("started")).await
    };
    let ((asked, has_token, first), (code, _, err)) = tokio::join!(serves, runs);
    assert_eq!(code, 0, "{err}");
    assert_eq!((asked.as_str(), has_token), ("/instances/web/cp", true));
    assert_eq!(first["guest_path"], "/x");
}

async fn until_there(path: &Path) {
    while !path.exists() {
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
}

/// Runs a shell command in namespaces with their own loopback and /run. Returns its output and errors.
async fn apart(script: &str, server: &Server) -> String {
    let script = format!("ip link set lo up && mount -t tmpfs none /run && mkdir /run/stead && {script}");
    let mut command = Command::new("unshare");
    command.args(["--net", "--mount", "--", "sh", "-c", &script]);
    command.env("STEAD", env!("CARGO_BIN_EXE_stead")).env("SOCKET", &server.socket);
    command.env_remove("STEAD_BASE_URL").env_remove("HYPEMAN_BASE_URL").env("STEAD_API_KEY", &server.token);
    let output = command.stdin(Stdio::null()).output().await.expect("unshare (util-linux) runs");
    [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).concat()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_default_is_the_socket_and_never_tcp_once_there_is_one() {
    let server = Server::start().await;
    server.create(json!({"name": "web", "image": IMAGE, "size": "256MB"})).await;
    let found = apart("ln -s $SOCKET /run/stead/stead.sock && $STEAD ps", &server).await;
    assert!(found.contains("web"), "{found}");
    // Nobody listens on it any more: a program that took the TCP port would get the token.
    let dead = r#"python3 -c 'import socket; socket.socket(socket.AF_UNIX).bind("/run/stead/stead.sock")'"#;
    let found = apart(&format!("{dead} && $STEAD ps"), &server).await;
    assert!(found.contains("cannot reach unix:///run/stead/stead.sock: Connection refused"), "{found}");
    assert!(!found.contains("8080"), "{found}");
    let found = apart("$STEAD ps", &server).await;
    assert!(found.contains("cannot reach http://127.0.0.1:8080/: Connection refused"), "{found}");
    let found = apart("unset STEAD_API_KEY; $STEAD ps", &server).await;
    assert!(found.contains("no token"), "{found}");
}
