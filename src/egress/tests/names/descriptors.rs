//! A test of a process that has no descriptors left. It runs in a process of its own, which has few of them.

use std::fs::File;
use std::process::Command;
use std::time::Duration;

use hickory_proto::op::ResponseCode;
use hickory_proto::rr::RecordType;
use tokio::net::TcpSocket;

use super::fixtures::{Fixture, LISTED, patiently, receive_tcp, send_tcp, written};

const NAME: &str = "descriptors::a_lack_of_descriptors_ends_nothing_and_passes";
/// Set in the process that has few descriptors.
const MARK: &str = "STEAD_TEST_FEW_DESCRIPTORS";

#[test]
fn a_lack_of_descriptors_ends_nothing_and_passes() {
    if std::env::var_os(MARK).is_some() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        runtime.block_on(without_descriptors());
        return;
    }
    let own = std::env::current_exe().expect("this program");
    let mut shell = Command::new("sh");
    shell.args(["-c", "ulimit -n 64 && exec \"$0\" --exact \"$1\""]).arg(own).arg(NAME).env(MARK, "1");
    let output = shell.output().expect("a shell");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    assert!(String::from_utf8_lossy(&output.stdout).contains("1 passed"), "the test was not found");
}

async fn without_descriptors() {
    let fixture = Fixture::with_hosts().await;
    let known = written(1, "api.example.com.", RecordType::A);
    let unknown = |id| written(id, "new.example.com.", RecordType::A);
    let client = fixture.client(LISTED).await;
    client.send(&known).await;
    assert_eq!(client.receive().await.metadata.response_code, ResponseCode::NoError);
    let socket = TcpSocket::new_v4().expect("a socket");
    socket.bind((LISTED, 0).into()).expect("an address of loopback");
    let taken: Vec<File> = std::iter::from_fn(|| File::open("/dev/null").ok()).collect();
    assert!(!taken.is_empty());

    let mut stream = patiently(socket.connect(fixture.tcp)).await.expect("the kernel takes the connection");
    send_tcp(&mut stream, &known).await;
    fixture.until(|fixture| fixture.resolver.counts().socket_errors > 0).await;
    client.send(&known).await;
    let answer = client.receive().await.metadata.response_code;
    assert_eq!(answer, ResponseCode::NoError, "what is known is answered");
    client.send(&unknown(2)).await;
    let answer = client.receive().await.metadata.response_code;
    assert_eq!(answer, ResponseCode::ServFail, "nobody can be asked");

    drop(taken);
    assert!(receive_tcp(&mut stream).await.is_some(), "the connection is accepted in the end");
    fixture.advance(Duration::from_secs(1));
    client.send(&unknown(3)).await;
    assert_eq!(client.receive().await.metadata.response_code, ResponseCode::NoError);
}
