//! Tests of sessions of exec and cp whose client is silent, or takes nothing, in virtual time: the connection is in
//! memory, and the test is the guest.

use std::time::Duration;

use axum::extract::ws::{WebSocket, WebSocketUpgrade};
use axum::http::Request;
use axum::routing::any;
use futures::StreamExt;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use stead_schemas::guest::{self, Entry, EntryKind, Frame, FrameKind, FromStream, Stat, Token};
use tokio::io::DuplexStream;
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout};
use tokio_tungstenite::{WebSocketStream, client_async};
use tower::ServiceExt;

use super::{ServerLimits, cp, exec};
use crate::guest_channel::{AgentStream, Mux};
use crate::peers::Unstalled;

/// Time that no test needs, and that exceeds the time limit of a test.
const NEVER: Duration = Duration::from_secs(24 * 3600);
/// Time limit for the end of a session.
const IN_TIME: Duration = Duration::from_secs(3600);
const LIMITS: ServerLimits = ServerLimits {
    connections_max: 1,
    connections_per_client_max: 1,
    stall_max: NEVER,
    header_timeout: NEVER,
    grace: NEVER,
    stream_idle_max: NEVER,
    ping_interval: Duration::from_secs(1),
    silence_max: Duration::from_secs(10),
    sender_silence_max: Duration::from_secs(100),
};
/// Number of bytes on their way over a connection, in each direction: room for all pings of a test.
const BUFFER_BYTES: u16 = 1024;
/// Number of bytes that a client that takes nothing does not get.
const OUTPUT_BYTES: u16 = 4 * BUFFER_BYTES;
/// Number of the only stream to the guest.
const STREAM: u32 = 1;

type Client = WebSocketStream<DuplexStream>;

/// Makes the two ends of a WebSocket.
async fn socket(limits: ServerLimits) -> (WebSocket, Client) {
    let (near, far) = tokio::io::duplex(BUFFER_BYTES.into());
    let (sender, mut upgraded) = mpsc::channel(1);
    let upgrade = move |upgrade: WebSocketUpgrade| {
        let sender = sender.clone();
        let pass = async move |socket| sender.send(socket).await.expect("it is waited for");
        async move { upgrade.on_upgrade(pass) }
    };
    let upgrades = any(upgrade).with_state(());
    let service = service_fn(move |request: Request<Incoming>| upgrades.clone().oneshot(request));
    let far = TokioIo::new(Unstalled::new(far, limits.stall_max));
    tokio::spawn(hyper::server::conn::http1::Builder::new().serve_connection(far, service).with_upgrades());
    let (client, _) = client_async("ws://x/", near).await.expect("upgraded");
    (upgraded.recv().await.expect("upgraded"), client)
}

/// Makes a stream to a guest that takes everything, and the table of its streams.
async fn guest() -> (Mux, AgentStream) {
    let (mux, mut outgoing) = Mux::new(STREAM);
    let request = guest::Request::Stat(Stat { path: "/".into(), follows_links: false });
    let agent = mux.open(&Token(String::new()), request).await.expect("opened");
    tokio::spawn(async move {
        loop {
            outgoing.next().await;
        }
    });
    (mux, agent)
}

fn output() -> Frame {
    Frame { kind: FrameKind::Data, stream: STREAM, payload: vec![7; OUTPUT_BYTES.into()] }
}

fn entry() -> Frame {
    let kind = EntryKind::File { size: OUTPUT_BYTES.into() };
    let entry = Entry { path: "file".into(), kind, mode: 0o644, uid: 0, gid: 0, mtime: 0 };
    Frame::json(FrameKind::Message, STREAM, &FromStream::Entry(entry)).expect("small")
}

/// Returns the time after which a session ends, and its outcome; its stream to the guest ends with it.
async fn ended<T>(mux: &Mux, session: impl Future<Output = T>) -> (Duration, T) {
    let began = Instant::now();
    let outcome = timeout(IN_TIME, session).await.expect("it ends");
    assert!(!mux.take(output()), "the stream to the guest is still open");
    (began.elapsed(), outcome)
}

/// Checks that a session ended at the first ping after a time of silence.
fn is_soon_after(silence: Duration, elapsed: Duration) {
    assert!(elapsed > silence && elapsed <= silence + 2 * LIMITS.ping_interval, "after {elapsed:?}");
}

/// Lets a client take everything that it is sent, and answer pings.
fn takes_everything(client: Client) {
    tokio::spawn(client.for_each(async |_| {}));
}

#[tokio::test(start_paused = true)]
async fn an_exec_ends_once_its_client_answers_no_ping() {
    let ((mux, agent), (socket, _silent)) = (guest().await, socket(LIMITS).await);
    let (sink, stream) = socket.split();
    let (elapsed, ()) = ended(&mux, exec::pump(agent, (false, None), LIMITS, sink, stream)).await;
    is_soon_after(LIMITS.silence_max, elapsed);
}

#[tokio::test(start_paused = true)]
async fn an_exec_ends_once_its_client_answers_no_more_pings() {
    let ((mux, agent), (socket, mut client)) = (guest().await, socket(LIMITS).await);
    let (sink, stream) = socket.split();
    tokio::spawn(async move {
        // The answer to a ping is sent while the next one is waited for: the third is not answered.
        for _ in 0..3 {
            client.next().await.expect("it goes on").expect("a ping");
        }
        std::future::pending::<()>().await;
    });
    let (elapsed, ()) = ended(&mux, exec::pump(agent, (false, None), LIMITS, sink, stream)).await;
    is_soon_after(2 * LIMITS.ping_interval + LIMITS.silence_max, elapsed);
}

#[tokio::test(start_paused = true)]
async fn an_exec_ends_once_its_client_takes_no_output() {
    let ((mux, agent), (socket, _stuck)) = (guest().await, socket(LIMITS).await);
    let (sink, stream) = socket.split();
    assert!(mux.take(output()));
    let (elapsed, ()) = ended(&mux, exec::pump(agent, (false, None), LIMITS, sink, stream)).await;
    assert_eq!(elapsed, LIMITS.silence_max);
}

#[tokio::test(start_paused = true)]
async fn an_exec_goes_on_while_its_client_answers_pings() {
    let ((_mux, agent), (socket, client)) = (guest().await, socket(LIMITS).await);
    let (sink, stream) = socket.split();
    takes_everything(client);
    let session = exec::pump(agent, (false, None), LIMITS, sink, stream);
    timeout(IN_TIME, session).await.expect_err("it ended");
}

#[tokio::test(start_paused = true)]
async fn a_copy_into_a_guest_ends_once_its_client_sends_nothing_for_a_longer_time() {
    let ((mux, agent), (socket, _silent)) = (guest().await, socket(LIMITS).await);
    let (mut sink, mut stream) = socket.split();
    let (elapsed, end) = ended(&mux, cp::to(agent, LIMITS, &mut sink, &mut stream)).await;
    assert!(matches!(end, Err(cp::Stop::ClientGone)), "{end:?}");
    is_soon_after(LIMITS.sender_silence_max, elapsed);
}

#[tokio::test(start_paused = true)]
async fn a_copy_out_of_a_guest_ends_once_its_client_answers_no_ping() {
    let ((mux, agent), (socket, _silent)) = (guest().await, socket(LIMITS).await);
    let (mut sink, mut stream) = socket.split();
    let (elapsed, end) = ended(&mux, cp::from(agent, LIMITS, &mut sink, &mut stream)).await;
    assert!(matches!(end, Err(cp::Stop::ClientGone)), "{end:?}");
    is_soon_after(LIMITS.silence_max, elapsed);
}

#[tokio::test(start_paused = true)]
async fn a_copy_out_of_a_guest_ends_once_its_client_takes_no_data() {
    let limits = ServerLimits { stall_max: Duration::from_secs(60), ..LIMITS };
    let ((mux, agent), (socket, _stuck)) = (guest().await, socket(limits).await);
    let (mut sink, mut stream) = socket.split();
    assert!(mux.take(entry()) && mux.take(output()));
    let (elapsed, end) = ended(&mux, cp::from(agent, limits, &mut sink, &mut stream)).await;
    assert!(matches!(end, Err(cp::Stop::ClientGone)), "{end:?}");
    assert_eq!(elapsed, limits.stall_max);
}

#[tokio::test(start_paused = true)]
async fn copies_go_on_while_their_client_answers_pings() {
    let ((_mux, agent), (socket, client)) = (guest().await, socket(LIMITS).await);
    let (mut sink, mut stream) = socket.split();
    takes_everything(client);
    timeout(IN_TIME, cp::to(agent, LIMITS, &mut sink, &mut stream)).await.expect_err("it ended");
    let (_mux, agent) = guest().await;
    timeout(IN_TIME, cp::from(agent, LIMITS, &mut sink, &mut stream)).await.expect_err("it ended");
}
