//! Tests of the frames.

use std::collections::BTreeMap;
use std::os::fd::AsFd;

use proptest::prelude::*;
use stead_schemas::egress::{
    CertificateAuthority, ControlReply, ControlRequest, EgressMode, Injection, Policy, PolicyCredential,
    Target,
};
use stead_schemas::instance::Secret;

use super::*;

fn uid() -> stead_schemas::names::Uid {
    format!("a{:023}", 0).parse().expect("a uid")
}

/// Returns the policy that needs the most bytes.
fn largest() -> Policy {
    let label = |number: usize| format!("{number:0>63}");
    let host = |number: usize| {
        let host = format!("*.{}.{}.{}.{}", label(number), label(0), label(0), "a".repeat(57));
        host.parse().expect("a pattern")
    };
    let hosts: Vec<stead_schemas::egress::HostPattern> = (0..EGRESS_HOSTS_MAX).map(host).collect();
    let format = format!("{}${{value}}", "\\".repeat(EGRESS_FORMAT_BYTES_MAX - "${value}".len()));
    let injection = Injection {
        hosts: Some(hosts.clone()),
        target: Target {
            header: "h".repeat(HEADER_NAME_BYTES_MAX).parse().expect("a header"),
            format: format.parse().expect("a format"),
        },
    };
    let credential = PolicyCredential {
        value: Secret("\"".repeat(EGRESS_VALUE_BYTES_MAX)),
        inject: vec![injection; EGRESS_INJECTIONS_MAX],
    };
    let name = |number: usize| format!("{number:0>width$}", width = EGRESS_CREDENTIAL_NAME_BYTES_MAX);
    let credentials: BTreeMap<String, PolicyCredential> =
        (0..EGRESS_CREDENTIALS_MAX).map(|number| (name(number), credential.clone())).collect();
    Policy {
        owner: uid(),
        address: "10.0.0.2".parse().expect("an address"),
        mode: EgressMode::HttpHttpsOnly,
        is_observing: false,
        allow_hosts: Some(hosts),
        credentials,
        authority: CertificateAuthority { certificate: "c".repeat(2048), key: Secret("k".repeat(2048)) },
        fingerprint: "f".repeat(64),
    }
}

#[tokio::test]
async fn the_largest_policy_fits_with_two_files() {
    let (mut here, mut there) = UnixStream::pair().expect("made");
    let request = ControlRequest::Put(Box::new(largest()));
    let files = [tempfile::tempfile().expect("a file"), tempfile::tempfile().expect("a file")];
    let borrowed = [files[0].as_fd(), files[1].as_fd()];
    let (sent, received) =
        tokio::join!(send(&mut here, &request, &borrowed), receive::<ControlRequest>(&mut there));
    sent.expect("sent");
    let (received, files) = received.expect("received");
    assert!(received == request, "it is the same policy");
    assert_eq!(files.len(), 2);
    let is_closed_on_exec =
        |file: &OwnedFd| rustix::io::fcntl_getfd(file).expect("open").contains(rustix::io::FdFlags::CLOEXEC);
    assert!(files.iter().all(is_closed_on_exec));
}

/// Returns the result of receiving these bytes.
async fn received(
    bytes: &[u8],
    files: &[BorrowedFd<'_>],
) -> Result<(ControlRequest, Vec<OwnedFd>), WireError> {
    let (here, mut there) = UnixStream::pair().expect("made");
    if !bytes.is_empty() {
        // More files than a frame may have.
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        assert!(files.is_empty() || control.push(SendAncillaryMessage::ScmRights(files)));
        sendmsg(&here, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL).expect("sent");
    }
    drop(here);
    receive(&mut there).await
}

fn framed(text: &str) -> Vec<u8> {
    let length = u32::try_from(text.len()).expect("short");
    [&length.to_be_bytes()[..], text.as_bytes()].concat()
}

#[tokio::test]
async fn malformed_frames_are_refused_without_their_content() {
    let secret = r#"{"put":{"owner":"s3cret-value"}}"#;
    for text in ["", "{", "null", r#"{"remove":1}"#, secret, r#""state" "state""#, "s3cret-value"] {
        let error = received(&framed(text), &[]).await.expect_err(text);
        assert!(matches!(error, WireError::Malformed(_)), "{text}: {error:?}");
        assert!(!format!("{error} {error:?}").contains("s3cret"), "{error:?}");
    }
    let too_large = u32::try_from(FRAME_BYTES_MAX + 1).expect("fits");
    assert!(matches!(received(&too_large.to_be_bytes(), &[]).await, Err(WireError::TooLarge(_))));
    for cut in [&[][..], &[0], &[0, 0, 0, 7], &framed(r#""state""#)[..6]] {
        assert!(matches!(received(cut, &[]).await, Err(WireError::Io(_))), "{cut:?}");
    }
    assert_eq!(received(&framed(r#""state""#), &[]).await.expect("received").0, ControlRequest::State);
}

#[tokio::test]
async fn more_files_than_two_are_refused() {
    let file = tempfile::tempfile().expect("a file");
    let files = [file.as_fd(); 8];
    for count in 0..=2 {
        let (_, received) = received(&framed(r#""state""#), &files[..count]).await.expect("received");
        assert_eq!(received.len(), count);
    }
    for count in 3..=8 {
        let error = received(&framed(r#""state""#), &files[..count]).await.expect_err("too many");
        assert!(matches!(error, WireError::UnexpectedFiles), "{count}: {error:?}");
    }
}

#[tokio::test]
async fn a_message_that_is_too_large_is_not_sent() {
    let (mut here, _there) = UnixStream::pair().expect("made");
    let reply = ControlReply::Refused("a".repeat(FRAME_BYTES_MAX));
    assert!(matches!(send(&mut here, &reply, &[]).await, Err(WireError::TooLarge(_))));
}

proptest! {
    #[test]
    fn no_bytes_make_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..64), is_framed: bool) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("built");
        let bytes = if is_framed {
            [&u32::try_from(bytes.len()).expect("short").to_be_bytes()[..], &bytes].concat()
        } else {
            bytes
        };
        prop_assert!(runtime.block_on(received(&bytes, &[])).is_err());
    }

    #[test]
    fn a_message_is_read_back_as_it_was_sent(text in ".*") {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("built");
        runtime.block_on(async {
            let (mut here, mut there) = UnixStream::pair().expect("made");
            let reply = ControlReply::Refused(text);
            send(&mut here, &reply, &[]).await.expect("sent");
            assert_eq!(receive::<ControlReply>(&mut there).await.expect("received").0, reply);
        });
    }
}
