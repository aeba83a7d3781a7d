//! Tests of the token of a guest that takes over another identity: it changes together with the name, or not at all.
//! Requests without it are refused.
//!
//! Changes of the guest's system are left out here: they would change the test's host.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use stead_schemas::guest::{
    Config, Decoder, EgressConfig, Frame, FromGuest, MountedVolumes, NewIdentity, ToGuest, Token, VolumeMount,
};

use crate::BootError;
use crate::control::Control;
use crate::handover::Handover;

const PATIENCE: Duration = Duration::from_secs(20);

/// The host's end of the port of a guest whose program runs.
struct Host {
    port: UnixStream,
    decoder: Decoder,
    control: Control,
    nonce: u64,
}

fn token(word: &str) -> Token {
    Token(word.to_owned())
}

fn identity() -> NewIdentity {
    let word = |word: &str| word.to_owned();
    NewIdentity {
        incarnation: word("a fork"),
        hostname: word("fork"),
        machine_id: word(""),
        instance: word(""),
        network: None,
    }
}

/// The configuration of a guest that was another instance's.
fn config() -> Config {
    let empty = String::new;
    Config {
        hostname: "parent".to_owned(),
        machine_id: empty(),
        instance: empty(),
        argv: Vec::new(),
        env: BTreeMap::new(),
        working_dir: empty(),
        user: empty(),
        stop_signal: None,
        shutdown_grace_millis: 0,
        network: None,
        volumes: Vec::new(),
        egress: None,
        has_agent: false,
        hotplug_bytes: 0,
        incarnation: empty(),
    }
}

impl Host {
    fn new() -> Self {
        Self::with(None)
    }

    /// Starts a guest with this configuration.
    fn with(config: Option<Config>) -> Self {
        let (port, far) = UnixStream::pair().expect("a pair");
        port.set_read_timeout(Some(PATIENCE)).expect("set");
        far.set_nonblocking(true).expect("set");
        let handed = Handover { token: Some(token("old")), config, ..Handover::default() };
        let control = Control::go_on(OwnedFd::from(far).into(), handed).expect("started");
        Self { port, decoder: Decoder::default(), control, nonce: 0 }
    }

    fn send(&mut self, message: &ToGuest) {
        self.port.write_all(&Frame::control(message).expect("small").encode()).expect("taken");
    }

    /// Returns the state that answers a new attachment. Everything sent before it has been taken.
    fn state(&mut self) -> FromGuest {
        self.nonce += 1;
        self.send(&ToGuest::Attach { nonce: self.nonce });
        let mut buffer = [0; 4096];
        loop {
            while let Some(frame) = self.decoder.next() {
                let state: FromGuest = frame.message().expect("a state");
                if state.nonce == self.nonce {
                    return state;
                }
            }
            let count = self.port.read(&mut buffer).expect("the guest answers");
            self.decoder.push(&buffer[..count]);
        }
    }
}

#[test]
fn the_new_token_comes_with_the_new_name_and_the_old_one_is_refused_from_then_on() {
    let mut host = Host::new();
    let before = host.state();
    assert_eq!((before.token, before.incarnation), (Some(token("old")), None));
    host.control.took_identity(token("new"), identity(), Ok(()));
    let after = host.state();
    assert_eq!((after.token, after.incarnation.as_deref()), (Some(token("new")), Some("a fork")));
    for (word, is_taken) in [("old", false), ("another", false), ("new", true)] {
        host.send(&ToGuest::Shutdown { token: token(word) });
        host.state();
        assert_eq!(host.control.is_stopping(), is_taken, "{word}");
    }
}

#[test]
fn a_guest_with_another_identity_keeps_its_egress() {
    let egress =
        EgressConfig { proxy: "http://10.100.0.1:18080".to_owned(), certificate: Some("PEM".to_owned()) };
    let config = Config { egress: Some(egress.clone()), ..config() };
    let host = Host::with(Some(config));
    host.control.took_identity(token("new"), identity(), Ok(()));
    let (_port, handed) = host.control.leave().expect("the port is served");
    let config = handed.config.expect("the configuration");
    assert_eq!((config.hostname.as_str(), config.egress), ("fork", Some(egress)));
}

#[test]
fn a_guest_that_could_not_take_an_identity_keeps_its_token() {
    let mut host = Host::new();
    host.control.took_identity(token("new"), identity(), Err(BootError::new("hostname", "refused")));
    let state = host.state();
    assert_eq!((state.token, state.incarnation), (Some(token("old")), None));
    assert_eq!(state.identity_error.as_deref(), Some("hostname: refused"));
    for (word, is_taken) in [("new", false), ("old", true)] {
        host.send(&ToGuest::Shutdown { token: token(word) });
        host.state();
        assert_eq!(host.control.is_stopping(), is_taken, "{word}");
    }
}

#[test]
fn volumes_are_requested_with_the_token_and_reported_when_they_change() {
    let mut host = Host::new();
    assert_eq!(host.state().volumes, None);
    let volume = |disk: &str| VolumeMount {
        path: "/data".to_owned(),
        disk: disk.to_owned(),
        is_read_only: false,
        upper: None,
        size: None,
    };
    let first = MountedVolumes::default();
    assert!(host.control.wait_for_volumes(0, &first, Some(Duration::ZERO)).is_none());
    assert_eq!(host.state().volumes.as_ref(), Some(&first));
    for (word, disk) in [("another", "x"), ("old", "a"), ("old", "b")] {
        host.send(&ToGuest::Volumes { token: token(word), volumes: vec![volume(disk)] });
    }
    // The request is reported only after it was carried out.
    assert_eq!(host.state().volumes.as_ref(), Some(&first));
    let request = host.control.wait_for_volumes(0, &first, None).expect("a request");
    assert_eq!((request.number, &*request.volumes), (2, &[volume("b")][..]));
    let next = MountedVolumes { requested: request.volumes.clone(), mounted: request.volumes, ..first };
    assert!(host.control.wait_for_volumes(2, &next, Some(Duration::from_millis(1))).is_none());
    assert_eq!(host.state().volumes, Some(next));
}
