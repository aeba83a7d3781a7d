//! Tests with guests that lie, flood and fall silent, at the far end of a control channel.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use stead_controllers::host::GuestPhase;
use stead_schemas::guest::{
    Decoder, Frame, FrameKind, FromGuest, FromStream, HotplugMemory, MAGIC, Open, PROTOCOL, Phase, Request,
    Stat, ToGuest, Token, WINDOW_BYTES,
};
use stead_schemas::names::Uid;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};

use super::channel::GuestChannel;
use super::streams::{AgentError, Event};
use super::tokens::tests::Recorded;
use super::transport::Transport;

const PATIENCE: Duration = Duration::from_secs(20);

/// The guest's end of the channel, controlled by the test.
struct Guest {
    stream: UnixStream,
    decoder: Decoder,
}

struct Harness {
    listener: UnixListener,
    channel: GuestChannel,
    /// Number of notifications from the channel.
    news: Arc<AtomicUsize>,
    record: Recorded,
    dir: tempfile::TempDir,
}

fn token() -> Token {
    Token("of this boot".to_owned())
}

fn owner() -> Uid {
    format!("t{:023}", 0).parse().expect("valid")
}

fn site() -> Harness {
    let dir = tempfile::tempdir().expect("scratch");
    let record = Recorded::new(token());
    let listener = UnixListener::bind(socket(&dir)).expect("bound");
    let news = Arc::default();
    let channel = attach(&dir, &record, &news);
    Harness { listener, channel, news, record, dir }
}

fn socket(dir: &tempfile::TempDir) -> PathBuf {
    dir.path().join("control.sock")
}

/// Attaches as a daemon does that starts now.
fn attach(dir: &tempfile::TempDir, record: &Recorded, news: &Arc<AtomicUsize>) -> GuestChannel {
    let news = news.clone();
    let changed = move |_: &Uid| _ = news.fetch_add(1, Ordering::SeqCst);
    let transport = Transport::VirtioSerial { socket: socket(dir) };
    GuestChannel::start(transport, owner(), record.tokens(), Arc::new(changed), Arc::new(|_, _| ()))
}

impl Harness {
    /// Starts another daemon instead of the one before.
    async fn restarted(&mut self) -> (Guest, u64) {
        self.channel = attach(&self.dir, &self.record, &self.news);
        let mut guest = self.guest().await;
        let nonce = guest.attached().await;
        (guest, nonce)
    }

    async fn guest(&self) -> Guest {
        let (stream, _) = self.listener.accept().await.expect("the host comes");
        Guest { stream, decoder: Decoder::default() }
    }

    async fn until(&self, phase: GuestPhase) {
        until(&format!("{phase:?}"), || self.channel.view().phase == phase).await;
    }
}

async fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !is_so() {
        assert!(Instant::now() < deadline, "{what}: not in time");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

impl Guest {
    async fn bytes(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).await.expect("taken");
    }

    async fn frame(&mut self, frame: &Frame) {
        self.bytes(&frame.encode()).await;
    }

    /// Returns the next frame of a stream; the time may arrive at any moment.
    async fn stream_frame(&mut self) -> Frame {
        loop {
            let frame = self.next().await;
            if frame.kind != FrameKind::Control {
                return frame;
            }
        }
    }

    async fn next(&mut self) -> Frame {
        let mut buffer = vec![0u8; 64 << 10];
        let next = async {
            loop {
                if let Some(frame) = self.decoder.next() {
                    return frame;
                }
                let count = self.stream.read(&mut buffer).await.expect("read");
                assert!(count > 0, "the host hung up");
                self.decoder.push(&buffer[..count]);
            }
        };
        tokio::time::timeout(PATIENCE, next).await.expect("in time")
    }

    async fn attached(&mut self) -> u64 {
        match self.next().await.message() {
            Some(ToGuest::Attach { nonce }) => nonce,
            other => panic!("{other:?}"),
        }
    }

    async fn report(&mut self, nonce: u64, token: Option<Token>, phase: Phase) {
        self.report_as(nonce, token, phase, None).await;
    }

    async fn report_as(&mut self, nonce: u64, token: Option<Token>, phase: Phase, incarnation: Option<&str>) {
        let state = FromGuest {
            protocol: PROTOCOL,
            nonce,
            token,
            phase,
            exit: None,
            incarnation: incarnation.map(ToOwned::to_owned),
            identity_error: None,
            window: WINDOW_BYTES,
            memory: None,
            volumes: None,
        };
        self.frame(&Frame::control(&state).expect("small")).await;
    }
}

async fn ready() -> (Harness, Guest) {
    let site = site();
    let mut guest = site.guest().await;
    let nonce = guest.attached().await;
    guest.report(nonce, Some(token()), Phase::Ready).await;
    site.until(GuestPhase::Ready).await;
    (site, guest)
}

fn stat() -> Request {
    Request::Stat(Stat { path: "/".into(), follows_links: false })
}

#[tokio::test(flavor = "multi_thread")]
async fn garbage_and_messages_of_another_boot_change_nothing() {
    let site = site();
    let mut guest = site.guest().await;
    let nonce = guest.attached().await;
    guest.bytes(&vec![0xf7; 100_000]).await;
    guest.bytes(&[&MAGIC[..], &[0xff; 64]].concat()).await;
    guest.frame(&Frame { kind: FrameKind::Control, stream: 0, payload: vec![b'['; 100_000] }).await;
    guest.report(nonce, None, Phase::Ready).await;
    guest.report(nonce, Some(Token("of an earlier boot".to_owned())), Phase::Exited).await;
    guest.report(nonce, None, Phase::AwaitingConfig).await;
    site.until(GuestPhase::AwaitingConfig).await;
    assert_eq!(site.channel.view().exit, None);
    assert_eq!(site.channel.open(stat()).await.err(), Some(AgentError::NotReady));
    guest.report(nonce, Some(token()), Phase::Ready).await;
    site.until(GuestPhase::Ready).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn only_the_new_token_of_a_guest_with_a_new_identity_is_accepted_by_this_and_later_daemons() {
    const LIFE: &str = "a fork";
    let (mut site, mut guest) = ready().await;
    let new = site.channel.tokens().begin(LIFE).expect("recorded");
    // The guest has not taken it yet: its messages are accepted with the old one, and it is asked with the
    // old one.
    guest.report(1, Some(token()), Phase::Configured).await;
    site.until(GuestPhase::Configured).await;
    assert_eq!(site.channel.token(), token());
    // Another daemon starts in between, and sends the same token.
    let (mut guest, mut nonce) = site.restarted().await;
    guest.report(nonce, Some(token()), Phase::Ready).await;
    site.until(GuestPhase::Ready).await;
    assert_eq!(site.channel.tokens().begin(LIFE).expect("recorded"), new);
    guest.report_as(nonce, Some(new.clone()), Phase::Ready, Some(LIFE)).await;
    until("the new token", || site.channel.token() == new).await;
    let _stream = site.channel.open(stat()).await.expect("opened");
    let opened = guest.stream_frame().await;
    assert!(opened.parse::<Open>().is_some_and(|open| open.token == new), "{opened:?}");
    // From now on the old token is refused, by this daemon and by the next.
    for _ in 0..2 {
        let before = site.news.load(Ordering::SeqCst);
        guest.report_as(nonce, Some(token()), Phase::Exited, Some(LIFE)).await;
        guest.report_as(nonce, Some(new.clone()), Phase::Configured, Some(LIFE)).await;
        site.until(GuestPhase::Configured).await;
        until("its news", || site.news.load(Ordering::SeqCst) > before).await;
        assert_eq!(site.news.load(Ordering::SeqCst), before + 1, "the old token was believed");
        (guest, nonce) = site.restarted().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn lies_on_a_stream_end_that_stream_and_no_other() {
    let (site, mut guest) = ready().await;
    let mut lied_to = site.channel.open(stat()).await.expect("opened");
    let first = guest.stream_frame().await;
    assert!(first.parse::<Open>().is_some_and(|open| open.token == token()), "{first:?}");
    let mut other = site.channel.open(stat()).await.expect("opened");
    let second = guest.stream_frame().await;
    // Windows without end, frames of streams that were never opened, more data than was requested.
    for _ in 0..1000 {
        guest.frame(&Frame::window(first.stream, u32::MAX)).await;
    }
    guest.frame(&Frame { kind: FrameKind::Data, stream: 4_000_000_000, payload: vec![1; 1000] }).await;
    for _ in 0..2 * WINDOW_BYTES / (64 << 10) {
        guest.frame(&Frame { kind: FrameKind::Data, stream: first.stream, payload: vec![1; 64 << 10] }).await;
    }
    let mut received = 0;
    while let Some(event) = lied_to.receiver.next().await {
        let Event::Data(bytes) = event else { panic!("{event:?}") };
        received += bytes.len();
    }
    let window = usize::try_from(WINDOW_BYTES).expect("fits");
    assert!(received <= window + (128 << 10), "{received} bytes were held for it");
    let answer = FromStream::Copied { bytes: 7 };
    guest.frame(&Frame::json(FrameKind::Message, second.stream, &answer).expect("small")).await;
    assert_eq!(other.receiver.next().await, Some(Event::Message(answer)));
    // A message that cannot be parsed.
    guest.frame(&Frame { kind: FrameKind::Message, stream: second.stream, payload: b"{}".to_vec() }).await;
    assert_eq!(other.receiver.next().await, None);
}

/// Sends the first state of a new agent, and checks that the host ends what the earlier agent knew and asks again.
async fn an_agent_is_started_again(answers_attach: bool) {
    let site = site();
    let mut guest = site.guest().await;
    let attached = guest.attached().await;
    guest.report(attached, Some(token()), Phase::Ready).await;
    site.until(GuestPhase::Ready).await;
    let mut lost = site.channel.open(stat()).await.expect("opened");
    guest.stream_frame().await;
    site.channel
        .ask(ToGuest::Shutdown { token: token() }, |view| view.is_shutdown_requested = true)
        .expect("sent");
    // Earlier requests went to the process that is gone.
    guest.report(if answers_attach { attached } else { 0 }, None, Phase::AwaitingConfig).await;
    site.until(GuestPhase::AwaitingConfig).await;
    assert!(!site.channel.view().is_shutdown_requested, "the new process knows nothing of it");
    let end = tokio::time::timeout(PATIENCE, lost.receiver.next()).await;
    assert_eq!(end.expect("the stream ends"), None, "nobody answers it any more");
    let nonce = loop {
        if let Some(ToGuest::Attach { nonce }) = guest.next().await.message() {
            break nonce;
        }
    };
    guest.report(nonce, Some(token()), Phase::Ready).await;
    site.until(GuestPhase::Ready).await;
    let _stream = site.channel.open(stat()).await.expect("opened");
    let opened = guest.stream_frame().await;
    assert!(opened.parse::<Open>().is_some_and(|open| open.token == token()), "{opened:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restarted_agent_is_asked_again_and_earlier_requests_are_forgotten() {
    an_agent_is_started_again(false).await;
}

/// The host asks every ten seconds, also while no agent runs. The next agent may find that question first.
#[tokio::test(flavor = "multi_thread")]
async fn a_restarted_agent_that_answers_a_question_to_the_one_before_is_recognized() {
    an_agent_is_started_again(true).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flood_is_read_slowly_and_its_neighbour_is_served_meanwhile() {
    let (_site, flooder) = ready().await;
    let (quiet, mut neighbour) = ready().await;
    let taken = Arc::new(AtomicU64::new(0));
    let counter = taken.clone();
    let flood = tokio::spawn(async move {
        let mut flooder = flooder;
        let state = FromGuest {
            protocol: PROTOCOL,
            nonce: 1,
            token: None,
            phase: Phase::Ready,
            exit: None,
            incarnation: None,
            identity_error: None,
            window: WINDOW_BYTES,
            memory: None,
            volumes: None,
        };
        let frames = Frame::control(&state).expect("small").encode().repeat(500);
        while flooder.stream.write_all(&frames).await.is_ok() {
            counter.fetch_add(frames.len() as u64, Ordering::Relaxed);
        }
    });
    let start = Instant::now();
    let mut served = 0u32;
    while start.elapsed() < Duration::from_secs(3) {
        let mut stream = quiet.channel.open(stat()).await.expect("opened");
        // Frames that close the streams of earlier rounds come in between.
        let opened = loop {
            let frame = neighbour.stream_frame().await;
            if frame.kind == FrameKind::Open {
                break frame;
            }
        };
        let answer = FromStream::Copied { bytes: 1 };
        neighbour.frame(&Frame::json(FrameKind::Message, opened.stream, &answer).expect("small")).await;
        assert_eq!(stream.receiver.next().await, Some(Event::Message(answer)));
        served += 1;
    }
    flood.abort();
    let (megabytes, seconds) = (taken.load(Ordering::Relaxed) >> 20, start.elapsed().as_secs());
    assert!(megabytes <= 4 * (seconds + 1), "{megabytes} MiB of the flood were taken in {seconds} s");
    assert!(served > 10, "the neighbour was served {served} times");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_with_another_state_each_time_is_observed_a_few_times_in_a_second() {
    let (site, mut guest) = ready().await;
    let (before, start) = (site.news.load(Ordering::SeqCst), Instant::now());
    let flood = tokio::spawn(async move {
        for change in 0.. {
            let memory = Some(HotplugMemory { change, ..HotplugMemory::default() });
            let state = FromGuest {
                protocol: PROTOCOL,
                nonce: 7,
                token: Some(token()),
                phase: Phase::Ready,
                exit: None,
                incarnation: None,
                identity_error: None,
                window: WINDOW_BYTES,
                memory,
                volumes: None,
            };
            guest.frame(&Frame::control(&state).expect("small")).await;
        }
    });
    // More than are read at once.
    until("many states", || site.news.load(Ordering::SeqCst) - before > 300).await;
    assert!(start.elapsed() > Duration::from_secs(1), "they were taken in {:?}", start.elapsed());
    flood.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_takes_nothing_fills_no_queue() {
    let (site, _guest) = ready().await;
    let large = "x".repeat(200_000);
    let mut refused = 0;
    for _ in 0..1000 {
        let request = ToGuest::Shutdown { token: Token(large.clone()) };
        refused += u32::from(site.channel.ask(request, |_| ()).is_err());
    }
    assert!(refused > 900, "{refused} of 1000 requests were refused");
    let mut streams = Vec::new();
    let opened = tokio::time::timeout(Duration::from_millis(500), async {
        while let Ok(stream) = site.channel.open(stat()).await {
            streams.push(stream);
        }
    });
    // It waits at the bound of the queue, or reaches the bound of streams.
    let _ = opened.await;
    assert!(streams.len() <= 256, "{} streams", streams.len());
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_stops_answering_loses_its_streams_until_it_answers_again() {
    let (site, mut guest) = ready().await;
    let mut stream = site.channel.open(stat()).await.expect("opened");
    // Nothing is expected from a VM that does not run, however long that takes.
    for _ in 0..100 {
        tokio::time::sleep(Duration::from_secs(5)).await;
        assert!(!site.channel.judged(false).is_unresponsive);
    }
    until("unresponsive", || site.channel.judged(true).is_unresponsive).await;
    assert_eq!(stream.receiver.next().await, None);
    assert_eq!(site.channel.open(stat()).await.err(), Some(AgentError::Unresponsive));
    let news = site.news.load(Ordering::SeqCst);
    guest.report(7, Some(token()), Phase::Ready).await;
    until("it answers", || !site.channel.judged(true).is_unresponsive).await;
    assert!(site.news.load(Ordering::SeqCst) > news, "the VM is observed again");
    assert!(site.channel.open(stat()).await.is_ok());
}
