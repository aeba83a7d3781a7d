//! Tests of clients that send too slowly, and of clients that want more than their share of connections.

use stead_controllers::host::Listeners;
use tokio::sync::Notify;
use tokio::time::sleep;

use super::{
    Arc, AsyncReadExt, AsyncWriteExt, Duration, Ipv4Addr, MOMENT, Permits, Proxy, Semaphore, Served, Shares,
    TcpListener, TcpStream, error, free_port, head, instance, listeners, reach, rule, server, status,
    timeout, uid,
};

/// Pause between two bytes of a body, much longer than the rate of a body allows.
const PAUSE: Duration = Duration::from_secs(20);

#[tokio::test]
async fn a_body_that_comes_too_slowly_is_refused_and_its_permit_comes_back() {
    let (listeners, _) = listeners();
    let reached = Arc::new(Notify::new());
    let for_instance = reached.clone();
    // The instance reads what comes, and never answers.
    let target = instance(move |mut stream: TcpStream| {
        let reached = for_instance.clone();
        async move {
            head(&mut stream).await;
            reached.notify_one();
            let _ = tokio::io::copy(&mut stream, &mut tokio::io::sink()).await;
        }
    });
    let (port, target) = (free_port(), target.await);
    listeners.open(&uid('a'), port, &[rule("a.test", port, target, false)]).await.expect("open");
    let permits = &listeners.0.permits;
    let mut client = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await.expect("open");
    let request = b"POST / HTTP/1.1\r\nHost: a.test\r\nContent-Length: 1000\r\nConnection: close\r\n\r\n";
    client.write_all(request).await.expect("sent");
    timeout(MOMENT, reached.notified()).await.expect("it is passed on");
    assert!(permits.is_taken(&uid('w')));
    // From here on only the time between two bytes passes, and takes none of the machine's.
    tokio::time::pause();
    let (mut reader, mut writer) = client.split();
    let trickle = async {
        while writer.write_all(b"x").await.is_ok() {
            sleep(PAUSE).await;
        }
        std::future::pending::<()>().await;
    };
    let mut answer = Vec::new();
    tokio::select! {
        _ = reader.read_to_end(&mut answer) => {}
        () = trickle => unreachable!("it goes on"),
    }
    let answer = String::from_utf8(answer).expect("text");
    assert_eq!(error(&answer), (408, "request_timeout".to_owned()), "{answer}");
    let back = async {
        while permits.is_taken(&uid('w')) {
            sleep(Duration::from_secs(1)).await;
        }
    };
    timeout(MOMENT, back).await.expect("the permit is back");
}

/// Asks for a host that no ingress is for, over a connection of its own. Returns nothing if the connection is closed
/// without a response.
async fn answer_of_a_new_connection(port: u16) -> String {
    let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await.expect("taken by the kernel");
    let mut answer = Vec::new();
    // A connection that is closed at once may refuse the request already.
    let _ = stream.write_all(b"GET / HTTP/1.1\r\nHost: b.example\r\nConnection: close\r\n\r\n").await;
    let _ = timeout(MOMENT, stream.read_to_end(&mut answer)).await.expect("it ends");
    String::from_utf8(answer).expect("text")
}

#[tokio::test]
async fn a_connection_beyond_the_share_of_its_address_is_closed_until_another_one_ends() {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("bound");
    let port = listener.local_addr().expect("bound").port();
    let silent = instance(|mut stream: TcpStream| async move {
        head(&mut stream).await;
        let _ = stream.read_u8().await;
    })
    .await;
    let (served, permits) = (Arc::<Served>::default(), Arc::<Permits>::default());
    served.set(&uid('a'), &[rule("silent.test", port, silent, false)]);
    let proxy = Proxy {
        served,
        reach: Arc::new(reach),
        permits: permits.clone(),
        clients: Arc::new(Semaphore::new(8)),
        shares: Shares::new(1),
    };
    let serving = tokio::spawn(server::serve(listener, Arc::new(proxy)));
    // A request that waits for its response keeps the first connection open.
    let mut first = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await.expect("open");
    first.write_all(b"GET / HTTP/1.1\r\nHost: silent.test\r\n\r\n").await.expect("sent");
    timeout(MOMENT, async {
        while !permits.is_taken(&uid('w')) {
            tokio::task::yield_now().await;
        }
    })
    .await
    .expect("it is passed on");
    assert_eq!(answer_of_a_new_connection(port).await, "");
    drop(first);
    let served_again = async {
        loop {
            let answer = answer_of_a_new_connection(port).await;
            if !answer.is_empty() {
                return answer;
            }
            tokio::task::yield_now().await;
        }
    };
    let answer = timeout(MOMENT, served_again).await.expect("the share comes back");
    assert_eq!(status(&answer), 404, "{answer}");
    serving.abort();
}
