//! Probes of servers on loopback that answer correctly, wrongly, slowly, without end, or not at all.

use std::net::Ipv4Addr;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use futures::future::{BoxFuture, FutureExt};
use stead::guest_channel::AgentError;
use stead::host::probe::{ProbeConfig, Prober};
use stead_controllers::host::{HostErrorKind, ProbePlan, Probes};
use stead_schemas::health::{HealthCheck, HealthOf, Probe, Scheme, Tally};
use stead_schemas::limits::PROBE_PORTS;
use stead_schemas::numbers::LaunchId;
use stead_schemas::quantity::GoDuration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;

use crate::namespace::{PATIENCE, in_namespace, link_name, shell, uid};

/// Time limit that is long enough for a busy host and short enough for a test.
const TIMEOUT: Duration = Duration::from_millis(500);

fn prober(agent: AgentError) -> (Prober, mpsc::UnboundedReceiver<()>) {
    let (news, notified) = mpsc::unbounded_channel();
    let config = ProbeConfig {
        open_stream: Box::new(move |_, _| futures::future::ready(Err(agent.clone())).boxed()),
        changed: Arc::new(move |_| {
            let _ = news.send(());
        }),
    };
    (Prober::new(config).expect("a client"), notified)
}

fn plan(probe: Probe) -> ProbePlan {
    let check =
        HealthCheck { interval: GoDuration(TIMEOUT), timeout: GoDuration(TIMEOUT), ..HealthCheck::of(probe) };
    ProbePlan {
        owner: uid('a'),
        of: HealthOf { launch: LaunchId(1), version: 1 },
        check,
        address: Some(Ipv4Addr::LOCALHOST),
        bridge: Some(link_name("lo")),
        lenient_for: Duration::ZERO,
        tally: Tally::default(),
    }
}

/// Returns the result of the first probe: success, or the error.
async fn first(probe: Probe) -> Result<(), String> {
    let (prober, mut notified) = prober(AgentError::NotReady);
    let plan = plan(probe);
    prober.begin(&plan).await.expect("begun");
    tokio::time::timeout(PATIENCE, notified.recv()).await.expect("in time").expect("reported");
    let tally = prober.seen(&plan.owner).expect("under way").tally;
    assert_eq!(tally.failures + tally.successes, 1, "{tally:?}");
    tally.last_error.map_or(Ok(()), Err)
}

fn http(port: u16, path: &str) -> Probe {
    Probe::Http { scheme: Scheme::Http, port, path: path.to_owned(), expected_status: 200 }
}

/// Starts a server that runs `answer` on every connection.
async fn serve(answer: fn(TcpStream) -> BoxFuture<'static, std::io::Result<()>>) -> u16 {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("bound");
    let port = listener.local_addr().expect("bound").port();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(answer(stream));
        }
    });
    port
}

async fn head(stream: &mut TcpStream) -> std::io::Result<String> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await?);
    }
    Ok(String::from_utf8_lossy(&head).into_owned())
}

/// Writes the same bytes repeatedly until the other end closes the connection.
async fn endless(stream: &mut TcpStream, bytes: &[u8]) -> std::io::Result<()> {
    loop {
        stream.write_all(bytes).await?;
    }
}

#[test]
fn an_http_probe_takes_only_the_status_it_expects_and_nothing_that_never_ends() {
    in_namespace(async || {
        shell("ip link set lo up");
        let by_path = serve(|mut stream| {
            Box::pin(async move {
                let head = head(&mut stream).await?;
                let answer = match head.split(' ').nth(1) {
                    Some("/well?a=b") => "HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n",
                    Some("/moved") => {
                        "HTTP/1.1 302 Found\r\nLocation: /well?a=b\r\nContent-Length: 0\r\n\r\n"
                    }
                    _ => "HTTP/1.1 500 No\r\nContent-Length: 0\r\n\r\n",
                };
                stream.write_all(answer.as_bytes()).await?;
                endless(&mut stream, &[b'x'; 65536]).await
            })
        });
        let port = by_path.await;
        assert_eq!(first(http(port, "/well?a=b")).await, Ok(()), "an endless body is not read");
        assert_eq!(first(http(port, "/moved")).await, Err("answered 302, not 200".to_owned()));
        assert_eq!(first(http(port, "/")).await, Err("answered 500, not 200".to_owned()));

        let slow = serve(|stream| {
            Box::pin(async move {
                let _kept = stream;
                std::future::pending().await
            })
        });
        assert_eq!(first(http(slow.await, "/")).await, Err("no answer within 500ms".to_owned()));
        let garbage = serve(|mut stream| Box::pin(async move { endless(&mut stream, &[0xff; 4096]).await }));
        assert!(first(http(garbage.await, "/")).await.is_err());
        let heads = serve(|mut stream| {
            Box::pin(async move {
                stream.write_all(b"HTTP/1.1 200 OK\r\n").await?;
                endless(&mut stream, format!("X: {}\r\n", "y".repeat(9000)).as_bytes()).await
            })
        });
        assert!(first(http(heads.await, "/")).await.is_err());
        let waits = serve(|mut stream| {
            Box::pin(async move { endless(&mut stream, b"HTTP/1.1 100 Continue\r\n\r\n").await })
        });
        assert!(first(http(waits.await, "/")).await.is_err());
        // No process listens on the port.
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("bound");
        let port = listener.local_addr().expect("bound").port();
        drop(listener);
        let refused = first(http(port, "/")).await.expect_err("refused");
        assert!(refused.contains("refused"), "{refused}");
    });
}

/// An HTTPS server with a self-signed certificate.
struct OpenSsl(Child);

impl Drop for OpenSsl {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn an_https_probe_does_not_ask_whose_certificate_it_is() {
    in_namespace(async || {
        shell("ip link set lo up");
        let free = tempfile::tempdir().expect("scratch");
        let at = free.path().display();
        shell(&format!(
            "cd {at}; openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=x -keyout key -out cert 2>&1"
        ));
        let mut command = Command::new("openssl");
        command.args(["s_server", "-accept", "127.0.0.1:8443", "-www", "-key", "key", "-cert", "cert"]);
        command.current_dir(free.path()).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let _server = OpenSsl(command.spawn().expect("openssl runs"));
        let deadline = std::time::Instant::now() + PATIENCE;
        while TcpStream::connect((Ipv4Addr::LOCALHOST, 8443)).await.is_err() {
            assert!(std::time::Instant::now() < deadline, "openssl does not listen");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        let of = |scheme| Probe::Http { scheme, port: 8443, path: "/".to_owned(), expected_status: 200 };
        assert_eq!(first(of(Scheme::Https)).await, Ok(()));
        assert!(first(of(Scheme::Http)).await.is_err());
    });
}

#[test]
fn probes_count_on_and_what_this_host_cannot_ask_counts_neither_way() {
    in_namespace(async || {
        shell("ip link set lo up");
        let port = serve(|stream| {
            Box::pin(async move {
                drop(stream);
                Ok(())
            })
        })
        .await;
        assert_eq!(first(Probe::Tcp { port }).await, Ok(()));
        assert!(first(Probe::Tcp { port: 1 }).await.expect_err("refused").contains("refused"));

        // The port of the connection shows that it is a probe's.
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("bound");
        let free = listener.local_addr().expect("bound").port();
        let (asks, _notified) = prober(AgentError::NotReady);
        asks.begin(&plan(Probe::Tcp { port: free })).await.expect("begun");
        let (_, from) =
            tokio::time::timeout(PATIENCE, listener.accept()).await.expect("in time").expect("taken");
        assert!(PROBE_PORTS.contains(&from.port()), "{from}");

        // The probe continues with an earlier daemon's counts, another owner's probe is separate, and an ended probe
        // stays ended.
        let (probes, mut notified) = prober(AgentError::NotReady);
        let exec = || Probe::Exec { command: vec!["true".to_owned()], working_dir: None };
        let mut plan = plan(exec());
        plan.tally.failures = 2;
        probes.begin(&plan).await.expect("begun");
        let again = probes.begin(&plan).await.expect_err("one an owner");
        assert_eq!(again.kind, HostErrorKind::Conflict);
        tokio::time::timeout(PATIENCE, notified.recv()).await.expect("in time").expect("reported");
        let tally = probes.seen(&plan.owner).expect("under way").tally;
        assert_eq!(
            (tally.failures, tally.last_error.as_deref()),
            (3, Some("the guest's agent is not there"))
        );
        assert_eq!(probes.list().await.expect("listed"), [plan.owner.clone()]);
        probes.end(&plan.owner).await.expect("ended");
        assert_eq!((probes.seen(&plan.owner), probes.list().await.expect("listed")), (None, Vec::new()));

        // If clients use all streams, or the bridge is gone, the probe says nothing about the guest.
        for (bridge, agent, probe) in [
            ("lo", AgentError::TooMany, exec()),
            ("gone0", AgentError::NotReady, Probe::Tcp { port }),
            ("gone0", AgentError::NotReady, http(port, "/")),
        ] {
            let (probes, mut notified) = prober(agent);
            let check = HealthCheck { probe, ..plan.check.clone() };
            let plan = ProbePlan { check, bridge: Some(link_name(bridge)), ..plan.clone() };
            probes.begin(&plan).await.expect("begun");
            let silence = tokio::time::timeout(TIMEOUT * 3, notified.recv()).await;
            assert!(silence.is_err(), "{bridge}: {:?}", probes.seen(&plan.owner));
            assert_eq!(probes.seen(&plan.owner).expect("under way").tally.failures, 2);
        }
    });
}
