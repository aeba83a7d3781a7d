//! The command line against a server: its exit codes, its messages, and its reaction when the server goes away.

use std::process::Stdio;
use std::time::Duration;

use serde_json::json;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader, copy_bidirectional};
use tokio::net::{TcpListener, TcpStream};
use tokio::process::{Child, Command};
use tokio::sync::mpsc;

use crate::server::{IMAGE, Server};

/// Time limit for changes that take seconds on a busy machine.
pub(crate) const MOMENT: Duration = Duration::from_secs(60);

pub(crate) fn stead(base: &str, token: &str, words: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_stead"));
    command.args(words).env("STEAD_BASE_URL", base).env("STEAD_API_KEY", token).stdin(Stdio::null());
    command.stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    command
}

/// Runs the client. Returns exit code, output and errors.
async fn runs(server: &Server, words: &[&str]) -> (i32, String, String) {
    ended(stead(&server.base, &server.token, words).spawn().expect("started")).await
}

pub(crate) async fn ended(child: Child) -> (i32, String, String) {
    let output =
        tokio::time::timeout(MOMENT, child.wait_with_output()).await.expect("it ends").expect("ended");
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("text");
    (output.status.code().unwrap_or(-1), text(output.stdout), text(output.stderr))
}

/// Starts a proxy in front of the server whose connections can be cut one by one.
async fn between(server: &Server) -> (String, mpsc::UnboundedSender<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("bound");
    let base = format!("http://{}", listener.local_addr().expect("bound"));
    let (cut, mut cuts) = mpsc::unbounded_channel();
    let address = server.address;
    tokio::spawn(async move {
        while let Ok((mut near, _)) = listener.accept().await {
            let mut far = TcpStream::connect(address).await.expect("connected");
            tokio::select! {
                _ = copy_bidirectional(&mut near, &mut far) => {}
                _ = cuts.recv() => {}
            }
        }
    });
    (base, cut)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_program_that_did_not_run_or_failed_is_no_success() {
    let server = Server::start().await;
    let run = ["run", IMAGE, "-m", "256MB", "--no-network", "--name"];
    let (code, out, err) = runs(&server, &[&run[..], &["bad", "--", "exit", "3", "0"]].concat()).await;
    assert_eq!(code, 3, "{out}{err}");
    assert!(
        out.contains("Stopped") && err.contains("bad ended") && err.contains("stead rm bad"),
        "{out}{err}"
    );
    let (code, ..) = runs(&server, &["start", "bad"]).await;
    assert_eq!(code, 3);
    let (code, out, err) = runs(&server, &[&run[..], &["good", "--", "exit", "0", "0"]].concat()).await;
    assert_eq!((code, err.as_str()), (0, ""), "{out}");
    let (code, out, err) = runs(&server, &[&run[..], &["lasts"]].concat()).await;
    assert_eq!((code, err.as_str()), (0, ""), "{out}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_proxy_of_the_environment_gets_no_token() {
    let server = Server::start().await;
    let proxy = TcpListener::bind("127.0.0.1:0").await.expect("bound");
    let address = format!("http://{}", proxy.local_addr().expect("bound"));
    let mut command = stead(&server.base, &server.token, &["ps"]);
    for name in ["http_proxy", "HTTP_PROXY", "ALL_PROXY"] {
        command.env(name, &address);
    }
    let (code, out, err) = ended(command.env_remove("NO_PROXY").spawn().expect("started")).await;
    assert_eq!(code, 0, "{out}{err}");
    let connected = tokio::time::timeout(Duration::ZERO, proxy.accept()).await;
    connected.expect_err("nothing was sent to the proxy");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_there_is_named_and_the_others_are_done() {
    let server = Server::start().await;
    for name in ["one", "two"] {
        server.create(json!({"name": name, "image": IMAGE, "size": "256MB"})).await;
    }
    let (code, out, err) = runs(&server, &["rm", "-f", "gone", "one", "x", "two"]).await;
    assert_eq!((code, out.as_str()), (3, "one\ntwo\n"), "{err}");
    for name in ["gone", "x"] {
        assert!(err.contains(&format!("there is no instance \"{name}\"")), "{err}");
    }
    let (code, ..) = runs(&server, &["image", "rm"]).await;
    assert_eq!(code, 2);
    let (code, _, err) = runs(&server, &["snapshot", "ls", "--instance", "gone"]).await;
    assert_eq!(code, 3, "{err}");
}

#[tokio::test(flavor = "multi_thread")]
async fn few_letters_of_an_id_stand_for_nothing_that_is_changed() {
    let server = Server::start().await;
    let created = server.create(json!({"name": "web", "image": IMAGE, "size": "256MB"})).await;
    let id = created["id"].as_str().expect("an id");
    let status = async |method: &str, word: &str| {
        server.send(method, &format!("/instances/{word}"), None).await.status
    };
    assert_eq!(status("GET", &id[..3]).await, 404);
    assert_eq!(status("GET", &id[..4]).await, 200);
    for count in [1, 4, 7] {
        assert_eq!(status("DELETE", &id[..count]).await, 404, "{count}");
        assert_eq!(server.send("POST", &format!("/instances/{}/stop", &id[..count]), None).await.status, 404);
    }
    assert_eq!(status("DELETE", &id[..8]).await, 204);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pipe_that_nobody_reads_ends_the_client() {
    let server = Server::start().await;
    server.create(json!({"name": "web", "image": IMAGE, "size": "256MB"})).await;
    *server.host.log.lock().expect("not poisoned") = vec!["ready".to_owned()];
    let mut child = stead(&server.base, &server.token, &["logs", "-f", "web"]).spawn().expect("started");
    let mut lines = BufReader::new(child.stdout.take().expect("piped")).lines();
    let line = tokio::time::timeout(MOMENT, lines.next_line()).await.expect("in time").expect("read");
    assert_eq!(line.as_deref(), Some("ready"));
    // The reader closes, as `grep -m1` does; nothing more is ever written.
    drop(lines);
    let (code, _, err) = ended(child).await;
    assert_eq!((code, err.as_str()), (141, ""));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_goes_on_after_its_connection_was_lost_with_every_line_once() {
    let server = Server::start().await;
    server.create(json!({"name": "web", "image": IMAGE, "size": "256MB"})).await;
    let lines = |range: std::ops::RangeInclusive<u32>| range.map(|number| format!("line {number}")).collect();
    *server.host.log.lock().expect("not poisoned") = lines(1..=20);
    let (base, cut) = between(&server).await;
    let mut child =
        stead(&base, &server.token, &["logs", "-f", "--tail", "3", "web"]).spawn().expect("started");
    let mut printed = BufReader::new(child.stdout.take().expect("piped")).lines();
    for number in 18..=25 {
        if number == 21 {
            *server.host.log.lock().expect("not poisoned") = lines(1..=23);
            cut.send(()).expect("there");
        }
        if number == 24 {
            *server.host.log.lock().expect("not poisoned") = lines(1..=25);
            cut.send(()).expect("there");
        }
        let line = tokio::time::timeout(MOMENT, printed.next_line()).await.expect("in time").expect("read");
        assert_eq!(line, Some(format!("line {number}")));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wait_outlives_a_server_that_is_restarted() {
    let server = Server::start().await;
    server.create(json!({"name": "web", "image": IMAGE, "size": "256MB"})).await;
    let (base, cut) = between(&server).await;
    let words = ["wait", "web", "--for", "Paused", "--timeout", "1s"];
    // The first connection is cut as soon as it exists, the second is not.
    cut.send(()).expect("there");
    let (code, out, err) = ended(stead(&base, &server.token, &words).spawn().expect("started")).await;
    assert_eq!(code, 4, "{out}{err}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_error_of_the_client_is_reported_with_its_cause() {
    let server = Server::start().await;
    let fails = async |base: &str, token: &str| {
        let (code, _, err) = ended(stead(base, token, &["ps"]).spawn().expect("started")).await;
        assert_ne!(code, 0, "{err}");
        err
    };
    // The port was free a moment ago, and the kernel assigns it to connections last of all.
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("bound");
    let closed = format!("http://{}", listener.local_addr().expect("bound"));
    drop(listener);
    assert!(fails(&closed, "a").await.contains("Connection refused"));
    assert!(fails("localhost:8080", "a").await.contains("http://"));
    assert!(fails(&server.base, "a\nb").await.contains("token"));
    let mut create = stead("", "", &["token", "create", "--data-dir", "/nonexistent/typo"]);
    let (code, out, err) = ended(create.spawn().expect("started")).await;
    assert_eq!((code, out.as_str()), (2, ""));
    assert!(err.contains("no stead data directory at /nonexistent/typo"), "{err}");
    assert!(!std::path::Path::new("/nonexistent").exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_are_listed_revoked_and_their_keys_rotated() {
    let scratch = tempfile::tempdir().expect("scratch");
    let path = scratch.path().to_str().expect("text").to_owned();
    let tokens = async |words: &[&str]| {
        let words = [&["token"], words, &["--data-dir", &path]].concat();
        let mut child = stead("", "", &words).spawn().expect("started");
        let mut out = String::new();
        child.stdout.take().expect("piped").read_to_string(&mut out).await.expect("text");
        (ended(child).await.0, out)
    };
    assert_eq!(tokens(&["create", "--subject", "ci", "--scopes", "image:read"]).await.0, 0);
    let (code, list) = tokens(&["list", "-o", "json"]).await;
    let list: serde_json::Value = serde_json::from_str(&list).expect("JSON");
    assert_eq!((code, &list[0]["subject"], &list[0]["scopes"]), (0, &json!("ci"), &json!(["image:read"])));
    let id = list[0]["id"].as_str().expect("an id").to_owned();
    assert_eq!(tokens(&["revoke", "nobody"]).await.0, 3);
    assert_eq!(tokens(&["revoke", &id]).await.0, 0);
    assert!(tokens(&["list"]).await.1.contains("revoked"));
    let keys = scratch.path().join("keys");
    let before = std::fs::read(keys.join("jwt.key")).expect("a key");
    assert_eq!(tokens(&["rotate-key"]).await.0, 0);
    assert_ne!(std::fs::read(keys.join("jwt.key")).expect("a key"), before);
    assert_eq!(std::fs::read(keys.join("jwt.old.key")).expect("the one before"), before);
    assert_eq!(tokens(&["remove-old-key"]).await.0, 0);
    assert!(!keys.join("jwt.old.key").exists());
}

/// Starts a server that answers every request with these bytes and then, if `goes_on` is set, with endless data.
async fn answers(head: &'static str, goes_on: bool) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("bound");
    let base = format!("http://{}", listener.local_addr().expect("bound"));
    tokio::spawn(async move {
        while let Ok((mut client, _)) = listener.accept().await {
            tokio::spawn(async move {
                let _ = client.read(&mut [0; 4096]).await;
                let _ = client.write_all(head.as_bytes()).await;
                while goes_on && client.write_all(&[b'a'; 65536]).await.is_ok() {}
            });
        }
    });
    base
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_without_end_and_a_redirect_are_refused() {
    let failure = "HTTP/1.1 400 Bad Request\r\n\r\n{\"message\":\"";
    let base = answers(failure, true).await;
    let (code, _, err) = ended(stead(&base, "token", &["images"]).spawn().expect("started")).await;
    assert_eq!((code, err.trim()), (1, "stead: 400 Bad Request"));
    let base = answers("HTTP/1.1 200 OK\r\n\r\n[\"", true).await;
    let (code, _, err) = ended(stead(&base, "token", &["images"]).spawn().expect("started")).await;
    assert!(code == 1 && err.contains("more than 512 MiB"), "{err}");
    let elsewhere = answers("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]", false).await;
    let head = format!("HTTP/1.1 307 X\r\nLocation: {elsewhere}/\r\nContent-Length: 0\r\n\r\n");
    let base = answers(head.leak(), false).await;
    let (code, _, err) = ended(stead(&base, "token", &["images"]).spawn().expect("started")).await;
    assert_eq!((code, err.trim()), (1, "stead: 307 Temporary Redirect"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_has_a_row_for_each_line_and_no_replaced_characters() {
    let server = Server::start().await;
    server.create(json!({"name": "web", "image": IMAGE, "size": "256MB"})).await;
    let rules = ["--rule", "a.test=web:80", "--rule", "b.test=web:81"];
    let (code, out, err) = runs(&server, &[&["ingress", "create", "two"][..], &rules].concat()).await;
    assert_eq!(code, 0, "{err}");
    let lines: Vec<&str> = out.lines().map(str::trim).collect();
    assert_eq!((lines.len(), lines[2]), (3, "b.test:80 -> web:81"), "{out}");
    assert!(lines[1].contains("two") && lines[1].contains("a.test:80 -> web:80"), "{out}");
}
