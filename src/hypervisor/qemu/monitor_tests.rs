//! Tests with VMMs that write too much or nothing on their monitor.

use std::sync::Arc;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

use super::monitor::{Monitor, chosen_frames};
use crate::host::tap::{Frames, OFFLOAD_CHECKSUM, OFFLOAD_TCP4};

/// The greeting of a VMM whose answers carry no numbers.
const GREETING: &[u8] =
    b"{\"QMP\":{\"version\":{\"qemu\":{\"micro\":0,\"minor\":0,\"major\":9},\"package\":\"\"},\"capabilities\":[]}}\n";

/// A negotiated connection, and its far end.
async fn connected() -> (Monitor, UnixStream) {
    let (ours, mut theirs) = UnixStream::pair().expect("a pair");
    let notify: crate::hypervisor::driver::Notify = Arc::new(|| {});
    let greet = async {
        theirs.write_all(GREETING).await.expect("taken");
        let mut received = [0; 1024];
        assert!(theirs.read(&mut received).await.expect("a command") > 0);
        theirs.write_all(b"{\"return\":{}}\n").await.expect("taken");
    };
    let (monitor, ()) = tokio::join!(Monitor::negotiated(ours, &notify), greet);
    (monitor.expect("negotiated"), theirs)
}

#[tokio::test(start_paused = true)]
async fn a_silent_vmm_is_an_error_at_every_command() {
    let (monitor, _theirs) = connected().await;
    monitor.version().await.expect_err("no answer");
    monitor.version().await.expect_err("no answer to the one before");
    monitor.frames().await.expect_err("no answer to these either");
}

#[tokio::test]
async fn a_line_without_an_end_is_not_collected() {
    const SENT_BYTES: usize = 32 << 20;
    let (monitor, mut theirs) = connected().await;
    let mut written = 0;
    let flood = async {
        let part = vec![b' '; 64 << 10];
        while written < SENT_BYTES {
            written += theirs.write(&part).await.expect("the connection is there");
        }
        std::future::pending::<()>().await;
    };
    tokio::select! {
        biased;
        state = monitor.state() => drop(state.expect_err("no answer")),
        () = flood => {}
    }
    assert!(written < SENT_BYTES, "all of {written} bytes were taken");
}

#[test]
fn a_card_gets_only_the_offloads_that_its_guest_accepted() {
    let modern =
        ["VIRTIO_NET_F_MRG_RXBUF: Driver can merge receive buffers", "VIRTIO_NET_F_STATUS: Configuration"];
    let offloads =
        ["VIRTIO_NET_F_GUEST_CSUM: Driver handling packets", "VIRTIO_NET_F_GUEST_TSO4: Driver can"];
    // The work that the host takes over says nothing about the guest.
    let host_features =
        ["VIRTIO_NET_F_CSUM: Device", "VIRTIO_NET_F_HOST_TSO4: Device", "VIRTIO_NET_F_HOST_TSO6: Device"];
    let long = Frames { header: 12, ..Frames::PLAIN };
    let both = OFFLOAD_CHECKSUM | OFFLOAD_TCP4;
    for (features, frames) in [
        (Vec::new(), Frames::PLAIN),
        (host_features.to_vec(), Frames::PLAIN),
        (modern.to_vec(), long),
        (vec!["VIRTIO_F_VERSION_1: Device compliant for v1 spec (legacy)"], long),
        ([&modern[..], &offloads, &host_features].concat(), Frames { offloads: both, ..long }),
    ] {
        assert_eq!(chosen_frames(features.iter().copied()), frames, "{features:?}");
    }
}
