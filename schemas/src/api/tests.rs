//! Requests of the contract, valid and invalid.

use serde_json::{Value, json};

use super::*;
use crate::instance::Hypervisor;
use crate::names::Platform;
use crate::node::NodeOffer;
use crate::quantity::Bytes;

fn node() -> NodeOffer {
    NodeOffer {
        platform: Platform::LinuxAmd64,
        default_hypervisor: Hypervisor::Qemu,
        hypervisors: [Hypervisor::Qemu, Hypervisor::QemuMicrovm].into(),
    }
}

fn problems(body: Value) -> Vec<(String, &'static str)> {
    let read = InstanceRequest::read(body, &node());
    let errors = read.err().unwrap_or_default();
    errors.iter().map(|error| (error.path.clone(), error.code)).collect()
}

#[test]
fn the_smallest_request_gets_the_contracts_defaults() {
    let request = InstanceRequest::read(json!({"name": "web", "image": "alpine"}), &node()).expect("valid");
    assert_eq!(request.image.to_string(), "docker.io/library/alpine:latest");
    assert_eq!((request.vcpus, request.memory, request.overlay), (2, Bytes(1 << 30), Bytes(10 << 30)));
    assert!(request.has_network && !request.skip_guest_agent);
}

#[test]
fn what_asks_for_nothing_is_accepted() {
    let body = json!({
        "name": "web", "image": "alpine", "env": null, "volumes": [], "devices": [], "credentials": {},
        "ttl": "0s", "hotplug_size": "0", "restart_policy": {"policy": "never"},
        "health_check": {"type": "none"}, "auto_standby": {"enabled": false}, "snapshot_policy": {},
        "network": {"enabled": true, "egress": {"enabled": false}}, "gpu": {}, "vcpus": 2.0,
    });
    assert_eq!(problems(body), []);
}

#[test]
fn all_problems_are_reported_at_once_with_their_paths() {
    let body = json!({
        "name": "-bad", "vcpus": 0, "size": "huge", "env": {"A": 1}, "cmd": ["a", 2],
        "network": {"egress": {"enforcement": {"mode": "some"}}}, "surprise": true,
    });
    let paths: Vec<String> = problems(body).into_iter().map(|(path, _)| path).collect();
    assert_eq!(
        paths,
        ["name", "image", "vcpus", "size", "env[A]", "cmd[1]", "network.egress.enforcement.mode", "surprise"]
    );
}

#[test]
fn the_page_s_own_example_names_every_field_this_server_cannot_honour_yet() {
    let body = json!({
        "image": "docker.io/library/alpine:latest", "name": "my-workload-1", "cmd": ["echo", "hello"],
        "credentials": {"OUTBOUND_OPENAI_KEY": {
            "inject": [{"as": {"format": "Bearer ${value}", "header": "Authorization"}, "hosts": ["api.openai.com"]}],
            "source": {"env": "OUTBOUND_OPENAI_KEY"},
        }},
        "env": {"OUTBOUND_OPENAI_KEY": "s3cret"}, "network": {"egress": {"enabled": true}},
        "devices": ["l4-gpu"], "disk_io_bps": "100MB/s", "hotplug_size": "2GB",
        "hypervisor": "cloud-hypervisor", "overlay_size": "20GB", "size": "2GB",
    });
    let refused = problems(body);
    assert!(refused.iter().all(|(_, code)| *code == "not_supported"), "{refused:?}");
    let paths: Vec<&str> = refused.iter().map(|(path, _)| path.as_str()).collect();
    assert_eq!(paths, ["hypervisor", "devices"]);
}

#[test]
fn values_of_secrets_are_not_repeated_in_messages() {
    let errors =
        InstanceRequest::read(json!({"name": "a", "image": "b", "env": {"K": "hunter2\u{0}"}}), &node())
            .expect_err("a NUL");
    assert!(!errors.to_string().contains("hunter2"));
}

#[test]
fn an_image_request_is_read_with_its_credentials_and_they_are_not_shown() {
    let body = json!({"name": "localhost:5000/app", "credentials": {"username": "u", "password": "p"}});
    let create = ImageCreate::read(body, Platform::LinuxAmd64).expect("valid");
    assert!(!format!("{create:?}").contains("\"p\""));
    let half = json!({"name": "app", "credentials": {"username": "u"}});
    let errors = ImageCreate::read(half, Platform::LinuxAmd64).expect_err("half");
    assert_eq!(errors.iter().next().map(|error| error.path.as_str()), Some("credentials.password"));
}

#[test]
fn error_bodies_carry_one_detail_for_each_problem() {
    let errors = InstanceRequest::read(json!({"name": "A", "vcpus": 99}), &node()).expect_err("wrong");
    let body = ErrorBody::from(&errors);
    assert_eq!(body.details.len(), 3);
    assert!(body.details.iter().any(|detail| detail.message.starts_with("vcpus ")));
}

#[test]
fn a_hypervisor_is_one_that_this_host_has() {
    let create = |word: &str| {
        let read = InstanceRequest::read(json!({"name": "a", "image": "b", "hypervisor": word}), &node());
        read.map(|request| Some(request.hypervisor))
    };
    let target = |word: &str| {
        let restore = SnapshotRestore::read(json!({"target_hypervisor": word}), &node());
        let fork = SnapshotFork::read(json!({"name": "a", "target_hypervisor": word}), &node());
        assert_eq!(restore.clone().err(), fork.clone().err());
        restore.map(|request| request.hypervisor)
    };
    for (word, expected) in [
        ("qemu", Ok(Hypervisor::Qemu)),
        ("qemu-microvm", Ok(Hypervisor::QemuMicrovm)),
        ("firecracker", Err("not_supported")),
        ("vz", Err("not_supported")),
        ("xen", Err("invalid_request")),
    ] {
        for (key, read) in [("hypervisor", create(word)), ("target_hypervisor", target(word))] {
            let reported = read.as_ref().map_err(|errors| {
                let all: Vec<_> = errors.iter().map(|error| (error.path.as_str(), error.code)).collect();
                all
            });
            assert_eq!(reported, expected.map(Some).as_ref().map_err(|code| vec![(key, *code)]), "{word}");
        }
    }
    assert_eq!(
        SnapshotRestore::read(Value::Null, &node()),
        Ok(SnapshotRestore { target: None, hypervisor: None })
    );
    let q35_only = NodeOffer { hypervisors: [Hypervisor::Qemu].into(), ..node() };
    let refused = SnapshotRestore::read(json!({"target_hypervisor": "qemu-microvm"}), &q35_only);
    assert!(refused.is_err_and(|errors| errors.to_string().contains("qemu-microvm is not supported")));
}

#[test]
fn a_variable_that_no_program_can_be_given_is_refused_by_its_name() {
    let body = |length: usize| json!({"name": "a", "image": "b", "env": {"LONG": "x".repeat(length)}});
    // Together with `LONG=` and the final zero byte, the string has the longest length that the kernel
    // allows.
    let most = crate::limits::ENV_VAR_BYTES_MAX - 6;
    assert_eq!(problems(body(most)), []);
    assert_eq!(problems(body(most + 1)), [("env[LONG]".to_owned(), "invalid_request")]);
}
