//! Bodies of requests, each input read as every one of them, and words of paths and queries.
#![no_main]

use serde_json::Value;
use stead_schemas::api::{
    CopyRequest, ExecControl, ExecRequest, ForkCreate, ImageCreate, ImageTag, IngressRequest, InstancePatch,
    InstanceStart, InstanceRequest, ScheduleRequest, SnapshotCreate, SnapshotFork, SnapshotPatch,
    SnapshotRestore, StandbyRequest, VolumeAttach, VolumeCreate, VolumePatch, parse_kind, parse_state,
};
use stead_schemas::instance::{Hypervisor, State};
use stead_schemas::names::{Digest, ImageRef, LinkName, Name, Platform, Uid};
use stead_schemas::network::{Cidr, Mac};
use stead_schemas::node::NodeOffer;
use stead_schemas::quantity::{Bytes, GoDuration, Rate};

fn node() -> NodeOffer {
    NodeOffer {
        platform: Platform::LinuxAmd64,
        default_hypervisor: Hypervisor::Qemu,
        hypervisors: [Hypervisor::Qemu, Hypervisor::QemuMicrovm].into(),
    }
}

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    if let Ok(text) = std::str::from_utf8(data) {
        words(text);
    }
    if let Ok(request) = serde_json::from_slice::<ExecRequest>(data) {
        let _ = request.into_request();
    }
    if let Ok(request) = serde_json::from_slice::<CopyRequest>(data) {
        let _ = request.into_request();
    }
    if let Ok(body) = serde_json::from_slice::<Value>(data) {
        bodies(&body);
    }
});

fn bodies(body: &Value) {
    let body = || body.clone();
    // Problems are reported in words, which are made too.
    macro_rules! read {
        ($($read:expr),* $(,)?) => { $(if let Err(errors) = $read { drop(errors.to_string()); })* };
    }
    read!(
        InstanceRequest::read(body(), &node()),
        SnapshotFork::read(body(), &node()),
        SnapshotRestore::read(body(), &node()),
        ImageCreate::read(body(), Platform::LinuxArm64),
        InstanceStart::read(body()),
        InstancePatch::read(body(), &node()),
        StandbyRequest::read(body()),
        ImageTag::read(body()),
        IngressRequest::read(body()),
        VolumeCreate::read(body()),
        VolumePatch::read(body()),
        VolumeAttach::read(body()),
        SnapshotCreate::read(body()),
        SnapshotPatch::read(body()),
        ForkCreate::read(body()),
        ScheduleRequest::read(body()),
    );
}

fn words(text: &str) {
    let _ = ExecControl::read(text);
    let _ = (parse_kind(text), parse_state(text), text.parse::<State>());
    let _ = (text.parse::<Uid>(), text.parse::<Digest>(), text.parse::<LinkName>(), text.parse::<Platform>());
    let _ = (text.parse::<Bytes>(), text.parse::<Rate>(), text.parse::<GoDuration>());
    let _ = (text.parse::<Mac>(), text.parse::<Name>());
    if let Ok(subnet) = text.parse::<Cidr>() {
        let _ = subnet.hosts().next();
    }
    if let Ok(reference) = text.parse::<ImageRef>() {
        let again: Result<ImageRef, _> = reference.to_string().parse();
        assert_eq!(again.ok(), Some(reference), "a reference's text is the reference");
    }
}
