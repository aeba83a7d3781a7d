//! Guests that lie, flood and fall silent, at the far end of a control channel.

use std::sync::Arc;
use std::time::{Duration, Instant};

use stead_controllers::host::GuestPhase;
use stead_schemas::guest::{
    Decoder, Frame, FrameKind, FromGuest, FromStream, MAGIC, Open, PROTOCOL, Phase, Request, Stat, ToGuest,
    Token, WINDOW_BYTES,
};
use stead_schemas::names::Uid;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};

use super::control::Control;
use crate::agent::{AgentError, Event};

const PATIENCE: Duration = Duration::from_secs(20);

/// The guest's end of the channel, in our hands.
struct Guest {
    stream: UnixStream,
    decoder: Decoder,
}

struct Site {
    listener: UnixListener,
    control: Control,
    _dir: tempfile::TempDir,
}

fn token() -> Token {
    Token("of this boot".to_owned())
}

fn owner() -> Uid {
    format!("t{:023}", 0).parse().expect("valid")
}

fn site() -> Site {
    let dir = tempfile::tempdir().expect("scratch");
    let socket = dir.path().join("control.sock");
    let listener = UnixListener::bind(&socket).expect("bound");
    let control = Control::start(socket, owner(), token(), Arc::new(|_| {}));
    Site { listener, control, _dir: dir }
}

impl Site {
    async fn guest(&self) -> Guest {
        let (stream, _) = self.listener.accept().await.expect("the host comes");
        Guest { stream, decoder: Decoder::default() }
    }

    async fn until(&self, phase: GuestPhase) {
        let deadline = Instant::now() + PATIENCE;
        while self.control.view().phase != phase {
            assert!(Instant::now() < deadline, "{:?} instead of {phase:?}", self.control.view());
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

impl Guest {
    async fn bytes(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).await.expect("taken");
    }

    async fn frame(&mut self, frame: &Frame) {
        self.bytes(&frame.encode()).await;
    }

    /// The next frame of a stream: the time is told at any moment.
    async fn of_stream(&mut self) -> Frame {
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

    async fn tell(&mut self, nonce: u64, token: Option<Token>, phase: Phase) {
        let state = FromGuest {
            protocol: PROTOCOL,
            nonce,
            token,
            phase,
            exit: None,
            incarnation: None,
            assume_error: None,
        };
        self.frame(&Frame::control(&state).expect("small")).await;
    }
}

async fn ready() -> (Site, Guest) {
    let site = site();
    let mut guest = site.guest().await;
    let nonce = guest.attached().await;
    guest.tell(nonce, Some(token()), Phase::Ready).await;
    site.until(GuestPhase::Ready).await;
    (site, guest)
}

fn stat() -> Request {
    Request::Stat(Stat { path: "/".to_owned(), follows_links: false })
}

#[tokio::test(flavor = "multi_thread")]
async fn garbage_and_words_of_another_boot_change_nothing() {
    let site = site();
    let mut guest = site.guest().await;
    let nonce = guest.attached().await;
    guest.bytes(&vec![0xf7; 100_000]).await;
    guest.bytes(&[&MAGIC[..], &[0xff; 64]].concat()).await;
    guest.frame(&Frame { kind: FrameKind::Control, stream: 0, payload: vec![b'['; 100_000] }).await;
    guest.tell(nonce, None, Phase::Ready).await;
    guest.tell(nonce, Some(Token("of an earlier boot".to_owned())), Phase::Exited).await;
    guest.tell(nonce, None, Phase::AwaitingConfig).await;
    site.until(GuestPhase::AwaitingConfig).await;
    assert_eq!(site.control.view().exit, None);
    assert_eq!(site.control.open(stat()).await.err(), Some(AgentError::NotReady));
    guest.tell(nonce, Some(token()), Phase::Ready).await;
    site.until(GuestPhase::Ready).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn lies_on_a_stream_end_that_stream_and_no_other() {
    let (site, mut guest) = ready().await;
    let mut lied_to = site.control.open(stat()).await.expect("opened");
    let first = guest.of_stream().await;
    assert!(first.parse::<Open>().is_some_and(|open| open.token == token()), "{first:?}");
    let mut other = site.control.open(stat()).await.expect("opened");
    let second = guest.of_stream().await;
    // Windows without end, frames of streams that nobody opened, more data than was asked for.
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
    // A message that is none.
    guest.frame(&Frame { kind: FrameKind::Message, stream: second.stream, payload: b"{}".to_vec() }).await;
    assert_eq!(other.receiver.next().await, None);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flood_is_taken_at_a_trickle_and_its_neighbour_is_served_meanwhile() {
    let (_site, flooder) = ready().await;
    let (quiet, mut neighbour) = ready().await;
    let taken = Arc::new(std::sync::atomic::AtomicU64::new(0));
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
            assume_error: None,
        };
        let frames = Frame::control(&state).expect("small").encode().repeat(500);
        while flooder.stream.write_all(&frames).await.is_ok() {
            counter.fetch_add(frames.len() as u64, std::sync::atomic::Ordering::Relaxed);
        }
    });
    let start = Instant::now();
    let mut served = 0u32;
    while start.elapsed() < Duration::from_secs(3) {
        let mut stream = quiet.control.open(stat()).await.expect("opened");
        // Closes of the rounds before come in between.
        let opened = loop {
            let frame = neighbour.of_stream().await;
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
    let (megabytes, seconds) =
        (taken.load(std::sync::atomic::Ordering::Relaxed) >> 20, start.elapsed().as_secs());
    assert!(megabytes <= 4 * (seconds + 1), "{megabytes} MiB of the flood were taken in {seconds} s");
    assert!(served > 10, "the neighbour was served {served} times");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_takes_nothing_fills_no_queue() {
    let (site, _guest) = ready().await;
    let large = "x".repeat(200_000);
    let mut refused = 0;
    for _ in 0..1000 {
        let request = ToGuest::Shutdown { token: Token(large.clone()) };
        refused += u32::from(site.control.ask(request, |_| ()).is_err());
    }
    assert!(refused > 900, "{refused} of 1000 requests were refused");
    let mut streams = Vec::new();
    let opened = tokio::time::timeout(Duration::from_millis(500), async {
        while let Ok(stream) = site.control.open(stat()).await {
            streams.push(stream);
        }
    });
    // It waits at the bound of the queue, or comes to the bound of streams.
    let _ = opened.await;
    assert!(streams.len() <= 256, "{} streams", streams.len());
}
