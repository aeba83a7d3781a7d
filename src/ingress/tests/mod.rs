//! Tests of the proxy between real sockets of the loopback: clients, and an instance that is played by the
//! test.

mod clients;

use std::net::{Ipv4Addr, SocketAddr, TcpListener as StdListener};
use std::sync::atomic::{AtomicU16, AtomicUsize};
use std::time::Duration;

use proptest::prelude::*;
use serde_json::json;
use stead_schemas::api::ErrorBody;
use stead_schemas::instance::State;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;

use super::*;

/// Time limit for what should happen at once.
const MOMENT: Duration = Duration::from_secs(20);
const SECRET: &str = "0123456789abcdef0123456789abcdef";

fn uid(first: char) -> Uid {
    format!("{first}{:023}", 0).parse().expect("valid")
}

fn rule(hostname: &str, port: u16, target: u16, auth: bool) -> IngressRule {
    let auth = auth.then(|| json!({ "header": "X-Key", "value": SECRET }));
    let instance = if hostname.contains("{i}") { "{i}" } else { "web" };
    let body = json!({ "hostname": hostname, "port": port, "target": { "instance": instance, "port": target }, "auth": auth });
    serde_json::from_value(body).expect("valid")
}

/// Resolves names: only `web` is an instance that runs; everything is at the loopback.
fn reach(word: &str, _: u16) -> Reach {
    match word {
        "web" => Reach::At { instance: uid('w'), address: Ipv4Addr::LOCALHOST, state: State::Running },
        "booting" => {
            Reach::At { instance: uid('x'), address: Ipv4Addr::LOCALHOST, state: State::Initializing }
        }
        "asleep" => Reach::Down(State::Standby),
        "cut" => Reach::Nowhere,
        _ => Reach::Unknown,
    }
}

fn listeners() -> (HttpListeners, Arc<AtomicUsize>) {
    let lost = Arc::new(AtomicUsize::new(0));
    let for_changed = lost.clone();
    let listeners = HttpListeners::new(IngressConfig {
        address: Ipv4Addr::LOCALHOST.into(),
        api_port: 1,
        reach: Arc::new(reach),
        changed: Arc::new(move |_| {
            for_changed.fetch_add(1, Ordering::SeqCst);
        }),
    });
    (listeners, lost)
}

/// Returns a free port below those that the kernel assigns to connections; each port is used by one test
/// only.
fn free_port() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(20_000);
    loop {
        let port = NEXT.fetch_add(1, Ordering::SeqCst);
        assert!(port < 32_000, "no port is free");
        if StdListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok() {
            return port;
        }
    }
}

/// Starts an instance that handles each connection with `play`; returns its port.
async fn instance<Play>(play: impl Fn(TcpStream) -> Play + Send + 'static) -> u16
where
    Play: Future<Output = ()> + Send + 'static,
{
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("bound");
    let port = listener.local_addr().expect("bound").port();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(play(stream));
        }
    });
    port
}

/// Reads up to the end of a head.
async fn head(stream: &mut TcpStream) -> String {
    let mut bytes = Vec::new();
    while !bytes.ends_with(b"\r\n\r\n") {
        match stream.read_u8().await {
            Ok(byte) => bytes.push(byte),
            Err(_) => break,
        }
    }
    String::from_utf8(bytes).expect("text")
}

/// Sends bytes and reads until the connection is closed.
async fn response_to(port: u16, request: &str) -> String {
    let mut stream = TcpStream::connect(SocketAddr::from((Ipv4Addr::LOCALHOST, port))).await.expect("open");
    stream.write_all(request.as_bytes()).await.expect("sent");
    let mut answer = String::new();
    timeout(MOMENT, stream.read_to_string(&mut answer)).await.expect("in time").expect("read");
    answer
}

async fn get(port: u16, host: &str, more: &str) -> String {
    response_to(port, &format!("GET /a?b HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n{more}\r\n")).await
}

fn status(answer: &str) -> u16 {
    answer.split(' ').nth(1).and_then(|word| word.parse().ok()).unwrap_or_else(|| panic!("{answer:?}"))
}

fn error(answer: &str) -> (u16, String) {
    let body = answer.split_once("\r\n\r\n").expect("a body").1;
    let body: ErrorBody = serde_json::from_str(body).unwrap_or_else(|error| panic!("{error}: {answer}"));
    assert!(!body.message.is_empty());
    (status(answer), body.code)
}

/// Responds with the head of the request.
async fn echo(mut stream: TcpStream) {
    let asked = head(&mut stream).await;
    let answer = format!(
        "HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: X-Hop\r\nX-Hop: 1\r\nX-Stay: 1\r\n\r\n{asked}",
        asked.len()
    );
    // It does not matter to the instance if the client is gone.
    let _ = stream.write_all(answer.as_bytes()).await;
}

#[tokio::test]
async fn a_request_reaches_the_instance_and_every_error_has_the_shape_of_the_api() {
    let (listeners, _) = listeners();
    let (port, target) = (free_port(), instance(echo).await);
    let rules = [
        rule("a.test", port, target, false),
        rule("{i}.test", port, target, false),
        rule("locked.test", port, target, true),
        rule("closed.test", port, free_port(), false),
        rule("{i}.closed", port, free_port(), false),
    ];
    listeners.open(&uid('a'), port, &rules).await.expect("open");
    for host in ["a.test", "A.TEST:80", "a.test.", "web.test"] {
        let answer = get(port, host, "X-Forwarded-For: 6.6.6.6\r\nX-Other: 2\r\n").await;
        assert_eq!(status(&answer), 200, "{host}: {answer}");
        let (head, asked) = answer.split_once("\r\n\r\n").expect("a body");
        assert!(head.contains("x-stay") && !head.contains("x-hop"), "{head}");
        assert!(asked.starts_with("GET /a?b HTTP/1.1\r\n"), "{asked}");
        for line in
            ["x-forwarded-for: 127.0.0.1", "x-forwarded-proto: http", "x-other: 2", "connection: close"]
        {
            assert!(asked.contains(line), "{line} is not in {asked}");
        }
        assert!(
            asked.contains(&format!("x-forwarded-host: {host}")) && !asked.contains("6.6.6.6"),
            "{asked}"
        );
    }
    let secret = format!("x-key: {SECRET}\r\n");
    let let_in = get(port, "locked.test", &secret).await;
    assert!(status(&let_in) == 200 && !let_in.contains(SECRET), "{let_in}");
    for wrong in [String::new(), "x-key: 1\r\n".to_owned(), format!("{secret}{secret}")] {
        assert_eq!(error(&get(port, "locked.test", &wrong).await), (403, "forbidden".to_owned()));
    }
    for (host, expected) in [
        ("b.example", (404, "not_found")),
        ("[::1]:80", (404, "not_found")),
        ("unknown.test", (404, "instance_not_found")),
        ("cut.test", (502, "bad_gateway")),
        ("closed.test", (502, "bad_gateway")),
        ("asleep.test", (503, "instance_unavailable")),
        ("booting.closed", (503, "instance_unavailable")),
        ("web.closed", (502, "bad_gateway")),
    ] {
        let answer = get(port, host, "").await;
        assert_eq!(error(&answer), (expected.0, expected.1.to_owned()), "{host}");
        assert_eq!(answer.contains("retry-after"), expected.0 == 503, "{answer}");
    }
    for request in [
        "CONNECT a.test:80 HTTP/1.1\r\nHost: a.test\r\nConnection: close\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: a.test\r\nHost: a.test\r\nConnection: close\r\n\r\n",
        "GET / HTTP/1.1\r\nConnection: close\r\n\r\n",
    ] {
        assert_eq!(error(&response_to(port, request).await), (400, "bad_request".to_owned()), "{request}");
    }
}

#[tokio::test]
async fn an_instance_that_talks_nonsense_or_hangs_up_is_a_bad_gateway() {
    let (listeners, _) = listeners();
    let port = free_port();
    for (index, answer) in
        ["", "SSH-2.0-x\r\n", "HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n"]
            .iter()
            .enumerate()
    {
        let target = instance(move |mut stream: TcpStream| async move {
            head(&mut stream).await;
            let _ = stream.write_all(answer.as_bytes()).await;
        })
        .await;
        let host = format!("h{index}.test");
        let owner = uid(['a', 'b', 'c'][index]);
        listeners.open(&owner, port, &[rule(&host, port, target, false)]).await.expect("open");
        assert_eq!(error(&get(port, &host, "").await), (502, "bad_gateway".to_owned()), "{answer}");
    }
    // The reader checks its limit between two reads, so some more than the limit may pass.
    let long = "x".repeat(stead_schemas::limits::INGRESS_HEAD_BYTES_MAX * 2);
    let answer = get(port, "h0.test", &format!("x-long: {long}\r\n")).await;
    assert_eq!(status(&answer), 431, "{answer}");
    let many = "x: 1\r\n".repeat(stead_schemas::limits::INGRESS_HEADERS_MAX + 1);
    assert_eq!(status(&get(port, "h0.test", &many).await), 431);
}

/// Starts an instance that answers each byte of the body as it comes, before the next one is sent.
async fn streaming_instance() -> u16 {
    instance(|mut stream: TcpStream| async move {
        head(&mut stream).await;
        let _ = stream.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await;
        let mut bytes = [0; 256];
        while let Ok(count @ 1..) = stream.read(&mut bytes).await {
            let _ = stream.write_all(&bytes[..count]).await;
        }
    })
    .await
}

/// Starts an instance that upgrades a connection and then echoes.
async fn upgrading_instance() -> u16 {
    instance(|mut stream: TcpStream| async move {
        let asked = head(&mut stream).await;
        assert!(asked.contains("connection: upgrade") && asked.contains("upgrade: echo"), "{asked}");
        let answer = "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\nhello";
        let _ = stream.write_all(answer.as_bytes()).await;
        let mut bytes = [0; 256];
        while let Ok(count @ 1..) = stream.read(&mut bytes).await {
            let _ = stream.write_all(&bytes[..count]).await;
        }
    })
    .await
}

#[tokio::test]
async fn bodies_stream_both_ways_and_a_tunnel_goes_on_until_its_rules_are_gone() {
    let (listeners, _) = listeners();
    let port = free_port();
    let (streaming, upgrading) = (streaming_instance().await, upgrading_instance().await);
    let others = [rule("other.test", port, streaming, false)];
    listeners.open(&uid('b'), port, &others).await.expect("open");
    let rules = [rule("up.test", port, upgrading, false), rule("s.test", port, streaming, false)];
    listeners.open(&uid('a'), port, &rules).await.expect("open");

    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    let mut stream = TcpStream::connect(address).await.expect("open");
    let request =
        "POST / HTTP/1.1\r\nHost: s.test\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n";
    stream.write_all(request.as_bytes()).await.expect("sent");
    assert_eq!(status(&head(&mut stream).await), 200, "the head comes before the body is sent");
    for piece in ["one", "two"] {
        stream.write_all(format!("3\r\n{piece}\r\n").as_bytes()).await.expect("sent");
        let mut seen = String::new();
        while !seen.contains(piece) {
            let byte = timeout(MOMENT, stream.read_u8()).await.expect("in time").expect("more comes");
            seen.push(char::from(byte));
        }
    }

    let mut tunnel = TcpStream::connect(address).await.expect("open");
    let request = "GET / HTTP/1.1\r\nHost: up.test\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n";
    tunnel.write_all(request.as_bytes()).await.expect("sent");
    let answer = head(&mut tunnel).await;
    assert!(status(&answer) == 101 && answer.contains("upgrade: echo"), "{answer}");
    let mut bytes = [0; 5];
    tunnel.read_exact(&mut bytes).await.expect("said at once");
    assert_eq!(&bytes, b"hello");
    tunnel.write_all(b"there").await.expect("sent");
    tunnel.read_exact(&mut bytes).await.expect("echoed");
    assert_eq!(&bytes, b"there");

    // The owner's rules are removed: connections by them are cut, and the port stays open for the other
    // owner.
    listeners.close(&uid('a'), port).await.expect("closed");
    let end = timeout(MOMENT, tunnel.read(&mut bytes)).await.expect("cut");
    assert!(matches!(end, Ok(0) | Err(_)), "{end:?}");
    // A response that is cut does not look complete.
    let mut rest = Vec::new();
    let _ = timeout(MOMENT, stream.read_to_end(&mut rest)).await.expect("cut");
    assert!(!rest.ends_with(b"0\r\n\r\n"), "{}", String::from_utf8_lossy(&rest));
    assert_eq!(status(&get(port, "up.test", "").await), 404);
    assert_eq!(listeners.list().await.expect("listed"), [uid('b')]);
    listeners.close(&uid('b'), port).await.expect("closed");
    assert!(TcpStream::connect(address).await.is_err(), "nobody wants the port");
    assert_eq!(listeners.list().await.expect("listed"), []);
    // Closing again succeeds too.
    listeners.close(&uid('b'), port).await.expect("closed");
}

#[tokio::test]
async fn too_many_requests_to_one_instance_are_asked_to_retry() {
    let (listeners, _) = listeners();
    let (port, target) = (free_port(), instance(echo).await);
    listeners.open(&uid('a'), port, &[rule("a.test", port, target, false)]).await.expect("open");
    let permits = &listeners.0.permits;
    // Each permit is taken by another client and another ingress.
    let take = |number: usize| {
        let client = Ipv4Addr::from(u32::try_from(number).expect("small"));
        permits.take(&uid('w'), &format!("o{number:023}").parse().expect("valid"), client.into())
    };
    let mut held: Vec<_> = (0..usize::MAX).map_while(take).collect();
    let answer = get(port, "a.test", "").await;
    assert_eq!(error(&answer), (503, "overloaded".to_owned()));
    assert!(answer.contains("retry-after"), "{answer}");
    held.pop();
    assert_eq!(status(&get(port, "a.test", "").await), 200);
    held.clear();
    // This client leaves before there is a response: the instance never sends one.
    let silent = instance(|mut stream: TcpStream| async move {
        head(&mut stream).await;
        let _ = stream.read_u8().await;
    })
    .await;
    listeners.open(&uid('b'), port, &[rule("silent.test", port, silent, false)]).await.expect("open");
    let mut client = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await.expect("open");
    client.write_all(b"GET / HTTP/1.1\r\nHost: silent.test\r\n\r\n").await.expect("sent");
    timeout(MOMENT, async {
        while !permits.is_taken(&uid('w')) {
            tokio::task::yield_now().await;
        }
    })
    .await
    .expect("it is passed on");
    drop(client);
    // A request that is over returns its permit, whether its client waited for the end or not.
    let all_back = async {
        loop {
            let taken: Vec<_> = (0..usize::MAX).map_while(take).collect();
            if taken.len() == stead_schemas::limits::INGRESS_EXCHANGES_PER_TARGET_MAX {
                return;
            }
            drop(taken);
            tokio::task::yield_now().await;
        }
    };
    timeout(MOMENT, all_back).await.expect("all places are back");
}

#[tokio::test]
async fn one_client_cannot_keep_an_instance_from_the_others() {
    let (listeners, _) = listeners();
    let (port, target) = (free_port(), instance(echo).await);
    listeners.open(&uid('a'), port, &[rule("a.test", port, target, false)]).await.expect("open");
    let permits = &listeners.0.permits;
    let (here, elsewhere) = (Ipv4Addr::LOCALHOST.into(), Ipv4Addr::new(192, 0, 2, 1).into());
    let held: Vec<_> = std::iter::from_fn(|| permits.take(&uid('w'), &uid('a'), here)).collect();
    assert_eq!(held.len(), stead_schemas::limits::INGRESS_EXCHANGES_PER_CLIENT_MAX);
    assert_eq!(error(&get(port, "a.test", "").await), (503, "overloaded".to_owned()));
    assert!(permits.take(&uid('w'), &uid('a'), elsewhere).is_some());
    drop(held);
    assert_eq!(status(&get(port, "a.test", "").await), 200);
}

#[tokio::test]
async fn a_port_is_shared_by_owners_and_refused_when_another_program_has_it() {
    let (listeners, lost) = listeners();
    let foreign = StdListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("bound");
    let port = foreign.local_addr().expect("bound").port();
    let rules = [rule("a.test", port, 9, false)];
    assert!(!listeners.is_free(port).await.expect("looked at"));
    assert!(!listeners.is_free(1).await.expect("looked at"), "our API is there");
    let refused = listeners.open(&uid('a'), port, &rules).await.expect_err("it is taken");
    assert_eq!(refused.kind, stead_controllers::host::HostErrorKind::Conflict, "{}", refused.chain());
    assert!(listeners.open(&uid('a'), 1, &rules).await.is_err());
    assert_eq!(listeners.inspect(&uid('a')).await.expect("looked at"), BTreeMap::new());
    drop(foreign);
    assert!(listeners.is_free(port).await.expect("looked at"));
    listeners.open(&uid('a'), port, &rules).await.expect("open");
    listeners.open(&uid('a'), port, &rules).await.expect("again is as good");
    assert!(listeners.is_free(port).await.expect("looked at"), "it is ours");
    let other_rules = [rule("b.test", port, 9, false)];
    listeners.open(&uid('b'), port, &other_rules).await.expect("shared");
    let seen = listeners.inspect(&uid('b')).await.expect("looked at");
    assert_eq!(seen, BTreeMap::from([(port, other_rules.to_vec())]));
    assert_eq!(lost.load(Ordering::SeqCst), 0);
}

#[tokio::test]
async fn a_connection_too_many_waits_until_another_one_ends() {
    let (listeners, _) = listeners();
    let (port, target) = (free_port(), instance(echo).await);
    let clients = &listeners.0.clients;
    let others = u32::try_from(INGRESS_CONNECTIONS_MAX - 1).expect("small");
    let _others = clients.clone().acquire_many_owned(others).await.expect("free");
    listeners.open(&uid('a'), port, &[rule("a.test", port, target, false)]).await.expect("open");
    // The last permit goes to the first client, which sends nothing.
    let first = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await.expect("open");
    timeout(MOMENT, async {
        while clients.available_permits() > 0 {
            tokio::task::yield_now().await;
        }
    })
    .await
    .expect("it has the place");
    let second = tokio::spawn(async move { get(port, "a.test", "").await });
    drop(first);
    let answer = timeout(MOMENT, second).await.expect("let in").expect("answered");
    assert_eq!(status(&answer), 200);
}

#[tokio::test]
async fn a_socket_that_somebody_shuts_is_noticed() {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("bound");
    let same = std::os::fd::AsFd::as_fd(&listener).try_clone_to_owned().expect("cloned");
    let proxy = Proxy {
        served: Arc::default(),
        reach: Arc::new(reach),
        permits: Arc::default(),
        clients: Arc::new(Semaphore::new(1)),
        shares: Shares::new(usize::MAX),
    };
    let served = tokio::spawn(server::serve(listener, Arc::new(proxy)));
    rustix::net::shutdown(&same, rustix::net::Shutdown::Both).expect("shut");
    timeout(MOMENT, served).await.expect("noticed").expect("no panic");
}

/// Plays bytes of a client, and of an instance that responds with others.
async fn play(asked: Vec<u8>, answered: Vec<u8>) {
    let (listeners, _) = listeners();
    let port = free_port();
    let hostile = instance(move |mut stream: TcpStream| {
        let answered = answered.clone();
        async move {
            head(&mut stream).await;
            let _ = stream.write_all(&answered).await;
        }
    })
    .await;
    let good = instance(echo).await;
    let rules = [rule("bad.test", port, hostile, false), rule("good.test", port, good, false)];
    listeners.open(&uid('a'), port, &rules).await.expect("open");
    let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await.expect("open");
    let _ = stream.write_all(&asked).await;
    let _ = stream.shutdown().await;
    let mut answer = Vec::new();
    let _ = timeout(MOMENT, stream.read_to_end(&mut answer)).await.expect("it ends");
    assert!(answer.is_empty() || answer.starts_with(b"HTTP/1."), "{}", String::from_utf8_lossy(&answer));
    timeout(MOMENT, async {
        let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await.expect("open");
        let request = b"GET / HTTP/1.1\r\nHost: bad.test\r\nConnection: close\r\n\r\n";
        stream.write_all(request).await.expect("sent");
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer).await;
        assert!(answer.starts_with(b"HTTP/1."), "{}", String::from_utf8_lossy(&answer));
    })
    .await
    .expect("it ends");
    assert_eq!(status(&get(port, "good.test", "").await), 200, "the port goes on");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn no_message_of_a_client_or_an_instance_ends_a_port(
        head in prop_oneof![Just("GET / HTTP/1.1\r\nHost: bad.test\r\n"), Just("POST /x HTTP/1."), Just("")],
        asked in proptest::collection::vec(any::<u8>(), 0..200),
        first in prop_oneof![Just("HTTP/1.1 200 OK\r\n"), Just("HTTP/1.1 101 X\r\nUpgrade: "), Just("")],
        answered in proptest::collection::vec(any::<u8>(), 0..200),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        runtime.block_on(play([head.as_bytes(), &asked].concat(), [first.as_bytes(), &answered].concat()));
    }
}
