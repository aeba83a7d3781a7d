//! The daemon's end of the process.

use std::fs::{Permissions, set_permissions};
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;

use rustix::process::Uid;
use stead_egress::ProcessError;
use stead_schemas::egress::{ControlReply, ControlRequest};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::world::{GUEST, OTHER_GUEST, World, patiently, uid};

/// The user of programs that own nothing.
const NOBODY: u32 = 65_534;

#[tokio::test]
async fn the_state_lists_settings_and_fingerprints() {
    let world = World::new(&[]).await;
    world.put(world.policy('a', GUEST)).await;
    let mut other = world.policy('b', OTHER_GUEST);
    other.fingerprint = "2".to_owned();
    world.put(other).await;
    let state = world.state().await;
    assert_eq!(state.settings.ports.explicit, world.explicit.port());
    let listed: Vec<_> = state.policies.into_iter().collect();
    assert_eq!(listed, [(uid('a'), "1".to_owned()), (uid('b'), "2".to_owned())]);
}

/// Sends a request as a user, and returns the bytes of the reply. Only the calling thread changes its user.
fn ask_as(user: u32, socket: &std::path::Path) -> Vec<u8> {
    let user = Uid::from_raw(user);
    rustix::thread::set_thread_res_uid(user, user, user).expect("the test runs as root");
    let mut stream = UnixStream::connect(socket).expect("connected");
    // The process closes the connection unread.
    let _ = stream.write_all(b"\0\0\0\x07\"state\"");
    let mut reply = Vec::new();
    let _ = stream.read_to_end(&mut reply);
    reply
}

#[tokio::test]
async fn a_client_of_another_user_is_closed_unread() {
    let world = World::new(&[]).await;
    set_permissions(world.dir.path(), Permissions::from_mode(0o755)).expect("set");
    set_permissions(world.socket(), Permissions::from_mode(0o666)).expect("set");
    let ask = |user| {
        let socket = world.socket();
        std::thread::spawn(move || ask_as(user, &socket)).join().expect("it does not panic")
    };
    assert!(ask(NOBODY).is_empty());
    assert!(!ask(0).is_empty(), "root is answered");
}

#[tokio::test]
async fn malformed_requests_and_silent_connections_leave_the_process_as_it_is() {
    let world = World::new(&[]).await;
    world.put(world.policy('a', GUEST)).await;
    let connect = || tokio::net::UnixStream::connect(world.socket());
    let mut silent = Vec::new();
    for _ in 0..10 {
        silent.push(connect().await.expect("connected"));
    }
    for bytes in [&b"\xff\xff\xff\xff"[..], b"\0\0\0\x09{\"put\":1}", b"\0\0\0\x01\xff"] {
        let mut stream = connect().await.expect("connected");
        stream.write_all(bytes).await.expect("sent");
        let mut reply = Vec::new();
        patiently(stream.read_to_end(&mut reply)).await.expect("closed");
        let reply: ControlReply = serde_json::from_slice(&reply[4..]).expect("a reply");
        assert!(matches!(reply, ControlReply::Refused(_)), "{reply:?}");
    }
    assert!(
        matches!(world.ask(ControlRequest::State).await, ControlReply::State(state) if state.policies.len() == 1)
    );
}

#[tokio::test]
async fn the_process_ends_when_a_socket_is_lost() {
    let world = World::new(&[]).await;
    world.state().await;
    assert!(matches!(world.end(), Err(ProcessError::Lost("captured connections"))));
}
