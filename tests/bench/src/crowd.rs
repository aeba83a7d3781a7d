//! Hostile clients of a daemon's API, all at once, with and without a token; and a hostile registry.
//!
//! A test and a bench run them beside an honest client. This module judges nothing.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

/// Number of addresses of the crowd, 127.0.0.2 and following. The honest client has another.
const ADDRESSES: usize = 8;
/// Number of connections over which nothing is sent.
const IDLE: usize = 2500;
/// Number of connections over which a head, a body or an archive comes one byte at a time.
const SLOW: usize = 400;
/// Number of requests that wait, follow, watch, or open a session, and read nothing.
const UNREAD: usize = 600;
/// Number of clients that repeat their request as soon as they get an answer.
const FLOODS: usize = 4;
/// Number of clients that send endless heads and bodies, and decompression bombs.
const LARGE: usize = 4;
/// Number of images that are requested from the hostile registry.
const PULLS: usize = 48;

/// Time between two bytes of slow data.
const DRIP: Duration = Duration::from_millis(500);
/// Time before a disconnected client connects again. If far more connections came per second than a daemon can
/// accept, they would fill the kernel's queue, which is for the host's firewall to divide.
const AGAIN: Duration = Duration::from_secs(5);
const BLOCK: usize = 64 << 10;

/// The target of the crowd.
#[derive(Clone)]
pub(crate) struct Target {
    pub(crate) address: SocketAddr,
    /// Valid token, of another subject than the honest client's.
    pub(crate) token: String,
    /// Name of a running instance.
    pub(crate) instance: String,
    /// A gzip archive that is small and unpacks to a large size.
    pub(crate) bomb: Arc<Vec<u8>>,
}

/// The attacks that run until the value is dropped.
pub(crate) struct Crowd {
    _tasks: JoinSet<()>,
    connections: Arc<AtomicU64>,
    answers: Arc<AtomicU64>,
}

impl Crowd {
    pub(crate) async fn start(target: &Target) -> Self {
        let mut tasks = JoinSet::new();
        let registry = Registry::start(&mut tasks).await;
        let (connections, answers) = (Arc::<AtomicU64>::default(), Arc::<AtomicU64>::default());
        let mut number = 0;
        let mut join = |count: usize, attack: Attack| {
            for _ in 0..count {
                number += 1;
                let one = Attacker {
                    target: target.clone(),
                    number,
                    registry,
                    connections: connections.clone(),
                    answers: answers.clone(),
                };
                tasks.spawn(async move { one.attack(attack).await });
            }
        };
        join(IDLE, Attack::Idle);
        join(SLOW, Attack::SlowHead);
        join(SLOW, Attack::SlowBody);
        join(SLOW / 10, Attack::SlowUpload);
        join(UNREAD, Attack::Wait);
        join(UNREAD, Attack::Watch);
        join(UNREAD, Attack::Follow);
        join(UNREAD, Attack::Session);
        join(FLOODS, Attack::Flood);
        join(LARGE, Attack::LargeHead);
        join(LARGE, Attack::LargeBody);
        join(LARGE, Attack::Bomb);
        join(PULLS, Attack::Pull);
        Self { _tasks: tasks, connections, answers }
    }

    /// Returns the number of connections and of answers until now.
    pub(crate) fn counts(&self) -> (u64, u64) {
        (self.connections.load(Ordering::Relaxed), self.answers.load(Ordering::Relaxed))
    }
}

#[derive(Debug, Clone, Copy)]
enum Attack {
    Idle,
    SlowHead,
    SlowBody,
    SlowUpload,
    Wait,
    Watch,
    Follow,
    Session,
    Flood,
    LargeHead,
    LargeBody,
    Bomb,
    Pull,
}

struct Attacker {
    target: Target,
    number: usize,
    registry: SocketAddr,
    connections: Arc<AtomicU64>,
    answers: Arc<AtomicU64>,
}

impl Attacker {
    async fn attack(&self, attack: Attack) {
        loop {
            // However the attack ended, it is repeated.
            let _ = self.once(attack).await;
            sleep(AGAIN).await;
        }
    }

    async fn connect(&self) -> io::Result<TcpStream> {
        let socket = TcpSocket::new_v4()?;
        // The client buffers little of the data that it does not read.
        socket.set_recv_buffer_size(4096)?;
        let last = u8::try_from(2 + self.number % ADDRESSES).unwrap_or(2);
        socket.bind((Ipv4Addr::new(127, 0, 0, last), 0).into())?;
        let stream = socket.connect(self.target.address).await?;
        self.connections.fetch_add(1, Ordering::Relaxed);
        Ok(stream)
    }

    fn head(&self, line: &str, more: &str) -> String {
        format!("{line} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {}\r\n{more}\r\n", self.target.token)
    }

    async fn once(&self, attack: Attack) -> io::Result<()> {
        let mut stream = self.connect().await?;
        let of = &self.target.instance;
        match attack {
            Attack::Idle => held(&mut stream).await,
            Attack::SlowHead => drip(&mut stream, "GET / HTTP/1.1\r\nHost: x\r\nX-Long: ".to_owned()).await,
            Attack::SlowBody => {
                drip(&mut stream, self.head("POST /volumes", "Content-Length: 1000000\r\n")).await
            }
            Attack::SlowUpload => {
                let name = format!("POST /images/import?name=localhost/slow:{}", self.number);
                drip(&mut stream, self.head(&name, "Content-Length: 1000000000\r\n")).await
            }
            Attack::Wait => {
                let line = format!("GET /instances/{of}/wait?state=Paused&timeout=5m");
                unread(&mut stream, self.head(&line, "")).await
            }
            Attack::Watch => unread(&mut stream, self.head("GET /instances?watch=true", "")).await,
            Attack::Follow => {
                let line = format!("GET /instances/{of}/logs?follow=true&source=stead&tail=100000");
                unread(&mut stream, self.head(&line, "")).await
            }
            Attack::Session => self.session(&mut stream).await,
            Attack::Flood => self.flood(&mut stream).await,
            Attack::LargeHead => endless(&mut stream, "GET / HTTP/1.1\r\nX-Long: ".to_owned()).await,
            Attack::LargeBody => {
                endless(&mut stream, self.head("POST /instances", "Content-Length: 9000000000\r\n")).await
            }
            Attack::Bomb => {
                let bomb = &self.target.bomb;
                let line = format!("POST /images/import?name=localhost/bomb:{}", self.number);
                let head = self.head(&line, &format!("Content-Length: {}\r\n", bomb.len()));
                stream.write_all(head.as_bytes()).await?;
                stream.write_all(bomb).await?;
                self.answer(&mut stream).await.map(drop)
            }
            Attack::Pull => {
                let kind = ["endless", "slow", "large", "lying"][self.number % 4];
                let body = format!("{{\"name\":\"{}/{kind}/{}:v1\"}}", self.registry, self.number);
                let head = self.head("POST /images", &format!("Content-Length: {}\r\n", body.len()));
                stream.write_all(format!("{head}{body}").as_bytes()).await?;
                self.answer(&mut stream).await?;
                sleep(Duration::from_secs(1)).await;
                Ok(())
            }
        }
    }

    /// Reads an answer, or a part of it.
    async fn answer(&self, stream: &mut TcpStream) -> io::Result<usize> {
        let mut bytes = [0; BLOCK];
        let read = stream.read(&mut bytes).await?;
        self.answers.fetch_add(1, Ordering::Relaxed);
        Ok(read)
    }

    /// Opens a session whose program prints a lot, and reads nothing.
    async fn session(&self, stream: &mut TcpStream) -> io::Result<()> {
        let line = format!("GET /instances/{}/exec", self.target.instance);
        let more = "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n\
                    Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n";
        stream.write_all(self.head(&line, more).as_bytes()).await?;
        let mut status = [0; 12];
        stream.read_exact(&mut status).await?;
        let request = br#"{"command":["yes"]}"#;
        // This is a text frame whose mask leaves the text unchanged.
        let length = u8::try_from(request.len()).unwrap_or(0);
        stream.write_all(&[&[0x81, 0x80 | length, 0, 0, 0, 0], &request[..]].concat()).await?;
        held_unread().await;
        Ok(())
    }

    /// Sends requests of many kinds, valid and invalid, one after another.
    async fn flood(&self, stream: &mut TcpStream) -> io::Result<()> {
        for round in 0usize.. {
            let (line, body) = [
                ("GET /instances", ""),
                ("POST /instances", "{\"name\":\"x\",\"image\":\"UPPER\"}"),
                ("POST /instances", "[[[[[[[[[["),
                ("POST /volumes", "{\"name\":\"V\",\"size_gb\":-1}"),
                ("GET /images/nothing-here", ""),
                ("DELETE /instances/nothing-here", ""),
            ][round % 6];
            let head = self.head(line, &format!("Content-Length: {}\r\n", body.len()));
            stream.write_all(format!("{head}{body}").as_bytes()).await?;
            if self.answer(stream).await? == 0 {
                break;
            }
        }
        Ok(())
    }
}

/// Sends nothing until the connection is closed.
async fn held(stream: &mut TcpStream) -> io::Result<()> {
    stream.read(&mut [0; 64]).await.map(drop)
}

/// Reads nothing.
async fn held_unread() {
    sleep(Duration::from_secs(3600)).await;
}

async fn unread(stream: &mut TcpStream, head: String) -> io::Result<()> {
    stream.write_all(head.as_bytes()).await?;
    let mut status = [0; 12];
    stream.read_exact(&mut status).await?;
    if status.ends_with(b"200") {
        held_unread().await;
    }
    Ok(())
}

async fn drip(stream: &mut TcpStream, head: String) -> io::Result<()> {
    stream.write_all(head.as_bytes()).await?;
    let mut answer = [0; 64];
    loop {
        // An answer ends the request.
        match timeout(DRIP, stream.read(&mut answer)).await {
            Ok(read) => return read.map(drop),
            Err(_) => stream.write_all(b"x").await?,
        }
    }
}

async fn endless(stream: &mut TcpStream, head: String) -> io::Result<()> {
    stream.write_all(head.as_bytes()).await?;
    let block = vec![b'x'; BLOCK];
    loop {
        stream.write_all(&block).await?;
    }
}

/// A registry whose answers are slow, endless, large or false.
struct Registry;

/// A configuration that a manifest of the registry can name. The contents of its layer do not match it.
const CONFIG: &str = concat!(
    r#"{"architecture":"amd64","os":"linux","config":{"Cmd":["true"]},"rootfs":{"type":"layers","diff_ids":["#,
    r#""sha256:0000000000000000000000000000000000000000000000000000000000000000"]}}"#
);
const CONFIG_DIGEST: &str = "0948a7e8dc0246a26e7940c231c36162cab921fe77d77bfbd935c4d1f9218ff2";
/// Size of the layer that the registry offers, in bytes. Its content comes at some 2 MiB per second.
const LAYER_BYTES: u64 = 1 << 30;

impl Registry {
    async fn start(tasks: &mut JoinSet<()>) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("bound");
        tasks.spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                while connections.try_join_next().is_some() {}
                connections.spawn(async move {
                    // The client may close the connection at any time.
                    let _ = serve(stream).await;
                });
            }
        });
        address
    }
}

async fn serve(mut stream: TcpStream) -> io::Result<()> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await?);
    }
    let head = String::from_utf8_lossy(&head);
    let path = head.split(' ').nth(1).unwrap_or_default();
    let kind = path.split('/').nth(2).unwrap_or_default();
    if !path.contains("/manifests/") {
        return blob(&mut stream, path, kind).await;
    }
    let manifest_head = "HTTP/1.1 200 OK\r\nContent-Type: application/vnd.oci.image.manifest.v1+json\r\n";
    match kind {
        "slow" => drip(&mut stream, format!("{manifest_head}Content-Length: 1000\r\n\r\n{{")).await,
        "endless" => endless(&mut stream, format!("{manifest_head}\r\n")).await,
        _ => {
            let layer = kind.bytes().map(|byte| format!("{byte:02x}")).collect::<String>();
            // Each image has its own layer.
            let name = path.bytes().fold(0u64, |sum, byte| sum.wrapping_mul(31).wrapping_add(byte.into()));
            let layer = format!("{layer:0<48}{name:016x}");
            let text = format!(
                r#"{{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json",
                "config":{{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"sha256:{CONFIG_DIGEST}",
                "size":{}}},"layers":[{{"mediaType":"application/vnd.oci.image.layer.v1.tar+gzip",
                "digest":"sha256:{layer}","size":{LAYER_BYTES}}}]}}"#,
                CONFIG.len()
            );
            let answer =
                format!("{manifest_head}Connection: close\r\nContent-Length: {}\r\n\r\n{text}", text.len());
            stream.write_all(answer.as_bytes()).await
        }
    }
}

/// Sends the configuration, or junk for a layer, at a tolerable pace or as fast as it is read.
async fn blob(stream: &mut TcpStream, path: &str, kind: &str) -> io::Result<()> {
    let head = "HTTP/1.1 200 OK\r\nConnection: close\r\n";
    if path.ends_with("/v2/") {
        return stream.write_all(format!("{head}Content-Length: 0\r\n\r\n").as_bytes()).await;
    }
    if path.ends_with(CONFIG_DIGEST) {
        let text = if kind == "lying" { "x".repeat(CONFIG.len()) } else { CONFIG.to_owned() };
        return stream
            .write_all(format!("{head}Content-Length: {}\r\n\r\n{text}", text.len()).as_bytes())
            .await;
    }
    stream.write_all(format!("{head}Content-Length: {LAYER_BYTES}\r\n\r\n").as_bytes()).await?;
    let block = vec![0x1f; BLOCK];
    loop {
        stream.write_all(&block).await?;
        sleep(Duration::from_millis(30)).await;
    }
}
