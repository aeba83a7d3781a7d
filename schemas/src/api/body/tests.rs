//! Tests that the described bodies have the fields that the readers read, and no others.

use std::cell::RefCell;
use std::collections::BTreeSet;

use schemars::{JsonSchema, SchemaGenerator};
use serde_json::{Value, json};

use super::*;
use crate::api;
use crate::instance::Hypervisor;
use crate::names::Platform;
use crate::node::NodeOffer;
use crate::validate::FieldErrors;

thread_local! {
    /// Paths of the fields that readers of this thread asked for.
    static ASKED: RefCell<BTreeSet<String>> = const { RefCell::new(BTreeSet::new()) };
}

/// Notes the path of a field that a reader asks for.
pub(in crate::api) fn note(path: String) {
    ASKED.with_borrow_mut(|asked| asked.insert(path));
}

fn offer() -> NodeOffer {
    NodeOffer {
        platform: Platform::LinuxAmd64,
        default_hypervisor: Hypervisor::Qemu,
        hypervisors: [Hypervisor::Qemu].into(),
    }
}

/// Replaces indices and keys of maps, which are all described at once.
fn general(path: &str) -> String {
    let mut general = String::new();
    let mut is_key = false;
    for letter in path.chars() {
        is_key = (is_key || letter == '[') && letter != ']';
        if !is_key || letter == '[' {
            general.push(letter);
        }
    }
    general
}

/// Returns the paths of the fields that a reader asks for in these bodies.
pub(in crate::api) fn read<T>(
    bodies: Vec<Value>,
    reader: impl Fn(Value) -> Result<T, FieldErrors>,
) -> BTreeSet<String> {
    ASKED.take();
    for body in bodies {
        drop(reader(body));
    }
    ASKED.take().iter().map(|path| general(path)).collect()
}

/// Adds the paths of the fields that a schema has below `path`.
fn collect(schema: &Value, definitions: &Value, path: &str, paths: &mut BTreeSet<String>) {
    if let Some(name) = schema["$ref"].as_str().and_then(|reference| reference.rsplit('/').next()) {
        return collect(&definitions[name], definitions, path, paths);
    }
    for part in schema["anyOf"].as_array().into_iter().flatten() {
        collect(part, definitions, path, paths);
    }
    for (name, property) in schema["properties"].as_object().into_iter().flatten() {
        let path = if path.is_empty() { name.clone() } else { format!("{path}.{name}") };
        collect(property, definitions, &path, paths);
        paths.insert(path);
    }
    let inner = [&schema["items"], &schema["additionalProperties"]];
    for inner in inner.into_iter().filter(|inner| inner.is_object()) {
        collect(inner, definitions, &format!("{path}[]"), paths);
    }
}

pub(in crate::api) fn described<T: JsonSchema>() -> BTreeSet<String> {
    let schema = SchemaGenerator::default().into_root_schema_for::<T>().to_value();
    let mut paths = BTreeSet::new();
    collect(&schema, &schema["$defs"], "", &mut paths);
    paths
}

/// Bodies of an instance that give each object something to read.
fn instances() -> Vec<Value> {
    let check = |kind: &str| json!({"health_check": {"type": kind, kind: {}}});
    let mut whole = json!({
        "restart_policy": {}, "auto_standby": {}, "snapshot_policy": {"compression": {}},
        "volumes": [{}], "gpu": {},
        "network": {"egress": {"enforcement": {}}},
        "credentials": {"KEY": {"source": {}, "inject": [{"as": {}}]}},
    });
    whole["health_check"] = check("http")["health_check"].clone();
    vec![whole, check("tcp"), check("exec")]
}

#[test]
fn described_bodies_have_the_fields_that_are_read() {
    assert_eq!(described::<InstanceCreate>(), read(instances(), |b| api::InstanceRequest::read(b, &offer())));
    // What is inside of credentials is not read: only the empty object is accepted.
    let updated = described::<InstanceUpdate>().into_iter().filter(|path| !path.starts_with("credentials["));
    assert_eq!(
        updated.collect::<BTreeSet<_>>(),
        read(instances(), |b| api::InstancePatch::read(b, &offer()))
    );
    let nothing = || vec![json!({})];
    assert_eq!(described::<InstanceStart>(), read(nothing(), api::InstanceStart::read));
    let compressed = || vec![json!({"compression": {}})];
    assert_eq!(described::<StandbyRequest>(), read(compressed(), api::StandbyRequest::read));
    assert_eq!(described::<ForkCreate>(), read(nothing(), api::ForkCreate::read));
    assert_eq!(described::<SnapshotCreate>(), read(compressed(), api::SnapshotCreate::read));
    assert_eq!(described::<SnapshotUpdate>(), read(nothing(), api::SnapshotPatch::read));
    let named = || vec![json!({"name": "a"})];
    assert_eq!(described::<SnapshotFork>(), read(named(), |b| api::SnapshotFork::read(b, &offer())));
    assert_eq!(described::<SnapshotRestore>(), read(nothing(), |b| api::SnapshotRestore::read(b, &offer())));
    assert_eq!(
        described::<VolumeCreate>(),
        read(vec![json!({"name": "a", "size_gb": 1})], api::VolumeCreate::read)
    );
    assert_eq!(described::<VolumeUpdate>(), read(nothing(), api::VolumePatch::read));
    assert_eq!(described::<VolumeAttach>(), read(vec![json!({"mount_path": "/a"})], api::VolumeAttach::read));
    let image = vec![json!({"name": "a", "credentials": {}})];
    assert_eq!(described::<ImageCreate>(), read(image, |b| api::ImageCreate::read(b, Platform::LinuxAmd64)));
    assert_eq!(described::<ImageTag>(), read(vec![json!({"target": "a"})], api::ImageTag::read));
    let ports = json!({"match": {"hostname": "a"}, "target": {"instance": "a", "port": 1}});
    let mut rule = ports.clone();
    rule["request_header_auth"] = json!({"header": "x", "value": "y"});
    let ingress = vec![json!({"name": "a", "rules": [rule]})];
    assert_eq!(described::<IngressCreate>(), read(ingress, api::IngressRequest::read));
}
