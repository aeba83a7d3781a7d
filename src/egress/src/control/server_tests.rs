//! Tests of the server with the client.

use std::path::PathBuf;

use stead_schemas::egress::{
    CertificateAuthority, EgressMode, MediatorPorts, MediatorSettings, MediatorState, Policy,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::*;
use crate::authority::generate;
use crate::control::{ControlError, ask};
use crate::policies::Policies;

struct World {
    dir: tempfile::TempDir,
    policies: Arc<Policies>,
}

fn settings() -> MediatorSettings {
    MediatorSettings {
        address: [10, 100, 0, 1].into(),
        ports: MediatorPorts { captured: 1, explicit: 2, names: 3 },
        subnet: stead_schemas::network::Cidr { address: [10, 100, 0, 1].into(), prefix: 16 },
        dns: Vec::new(),
        open: [].into(),
    }
}

impl World {
    fn new() -> Self {
        let dir = tempfile::tempdir().expect("a folder");
        let policies = Arc::<Policies>::default();
        let listener = UnixListener::bind(dir.path().join("socket")).expect("bound");
        let control = Arc::new(Control::new(policies.clone(), settings()));
        tokio::spawn(serve(listener, control, 1));
        Self { dir, policies }
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("socket")
    }

    async fn ask(&self, request: ControlRequest) -> ControlReply {
        ask(&self.socket(), &request, None).await.expect("a reply")
    }

    async fn put(&self, policy: Policy) -> ControlReply {
        let files = [tempfile::tempfile().expect("a file"), tempfile::tempfile().expect("a file")];
        let request = ControlRequest::Put(Box::new(policy));
        ask(&self.socket(), &request, Some(files.map(Into::into))).await.expect("a reply")
    }

    async fn state(&self) -> MediatorState {
        match self.ask(ControlRequest::State).await {
            ControlReply::State(state) => state,
            other => panic!("{other:?}"),
        }
    }
}

fn policy(fingerprint: &str, authority: CertificateAuthority) -> Policy {
    Policy {
        owner: format!("a{:023}", 0).parse().expect("a uid"),
        address: "10.100.0.7".parse().expect("an address"),
        mode: EgressMode::All,
        is_observing: false,
        allow_hosts: None,
        credentials: [].into(),
        authority,
        fingerprint: fingerprint.to_owned(),
    }
}

#[tokio::test]
async fn policies_are_set_listed_and_removed() {
    let (world, authority) = (World::new(), generate().expect("made"));
    assert_eq!(world.put(policy("1", authority.clone())).await, ControlReply::Done);
    let state = world.state().await;
    assert_eq!(state.settings, settings());
    assert_eq!(state.policies.values().collect::<Vec<_>>(), ["1"]);
    let owner = policy("1", authority.clone()).owner;
    // The instance has its log: another policy needs no files.
    let next = ControlRequest::Put(Box::new(policy("2", authority.clone())));
    assert_eq!(world.ask(next).await, ControlReply::Done);
    assert_eq!(world.state().await.policies.get(&owner).map(String::as_str), Some("2"));
    for _ in 0..2 {
        assert_eq!(world.ask(ControlRequest::Remove(owner.clone())).await, ControlReply::Done);
        assert!(world.state().await.policies.is_empty() && world.policies.list().is_empty());
    }
}

#[tokio::test]
async fn a_policy_that_is_put_again_changes_nothing() {
    let (world, authority) = (World::new(), generate().expect("made"));
    assert_eq!(world.put(policy("1", authority.clone())).await, ControlReply::Done);
    let address = "10.100.0.7".parse().expect("an address");
    let before = world.policies.active(address).expect("a policy");
    assert_eq!(world.put(policy("1", authority)).await, ControlReply::Done);
    assert!(Arc::ptr_eq(&before, &world.policies.active(address).expect("a policy")));
}

#[tokio::test]
async fn the_first_policy_of_an_instance_needs_the_files_of_its_log() {
    let (world, authority) = (World::new(), generate().expect("made"));
    let request = ControlRequest::Put(Box::new(policy("1", authority.clone())));
    assert!(
        matches!(world.ask(request.clone()).await, ControlReply::Refused(text) if text.contains("2 files"))
    );
    // A pipe is no file.
    let (one, other) = io::pipe().expect("made");
    let reply = ask(&world.socket(), &request, Some([one.into(), other.into()])).await.expect("a reply");
    assert!(matches!(reply, ControlReply::Refused(text) if text.contains("regular files")));
    assert!(world.state().await.policies.is_empty());
}

#[tokio::test]
async fn an_authority_that_cannot_be_used_is_refused() {
    let (world, mut authority) = (World::new(), generate().expect("made"));
    authority.key = stead_schemas::instance::Secret("s3cret-key".to_owned());
    let ControlReply::Refused(text) = world.put(policy("1", authority)).await else { panic!("refused") };
    assert!(!text.contains("s3cret"), "{text}");
    assert!(world.state().await.policies.is_empty());
}

#[tokio::test]
async fn a_malformed_request_is_refused() {
    let world = World::new();
    for bytes in [&b"\0\0\0\x02{}"[..], b"\xff\xff\xff\xff", b"\0\0\0\0"] {
        let mut stream = UnixStream::connect(world.socket()).await.expect("connected");
        stream.write_all(bytes).await.expect("sent");
        let mut reply = Vec::new();
        stream.read_to_end(&mut reply).await.expect("closed");
        let reply: ControlReply = serde_json::from_slice(&reply[4..]).expect("a reply");
        assert!(matches!(reply, ControlReply::Refused(_)), "{reply:?}");
    }
    world.state().await;
}

#[tokio::test(start_paused = true)]
async fn silent_connections_end_and_others_are_served_meanwhile() {
    let world = World::new();
    let mut silent = Vec::new();
    for _ in 0..10 {
        silent.push(UnixStream::connect(world.socket()).await.expect("connected"));
    }
    world.state().await;
    // More than are served at once: the rest waits until the first are closed, and is not lost.
    for _ in 0..CONNECTIONS_MAX {
        silent.push(UnixStream::connect(world.socket()).await.expect("connected"));
    }
    for mut stream in silent {
        assert_eq!(stream.read(&mut [0]).await.expect("closed"), 0);
    }
    world.state().await;
}

#[tokio::test(start_paused = true)]
async fn absent_silent_and_closing_sockets_are_different_errors() {
    let dir = tempfile::tempdir().expect("a folder");
    let socket = dir.path().join("socket");
    let state = || ask(&socket, &ControlRequest::State, None);
    assert!(matches!(state().await, Err(ControlError::Absent)));
    let listener = UnixListener::bind(&socket).expect("bound");
    assert!(matches!(state().await, Err(ControlError::Silent)));
    let closing = async {
        // The first connection is the one that was given up.
        for _ in 0..2 {
            drop(listener.accept().await.expect("accepted"));
        }
    };
    assert!(matches!(tokio::join!(state(), closing).0, Err(ControlError::Closed)));
    let talking = async {
        let (mut stream, _) = listener.accept().await.expect("accepted");
        stream.write_all(b"\0\0\0\x01x").await.expect("sent");
        stream
    };
    assert!(matches!(tokio::join!(state(), talking).0, Err(ControlError::Malformed)));
    drop(listener);
    assert!(matches!(state().await, Err(ControlError::NotListening)));
}
