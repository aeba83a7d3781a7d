//! Volumes on the wire, and their mounts in instances.

use jiff::Timestamp;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::fields::Fields;
use super::schema::{TagMap, Time};
use crate::condition::Condition;
use crate::limits;
use crate::meta::{Object, Tags};
use crate::names::{Name, Uid};
use crate::quantity::Bytes;
use crate::validate::{FieldErrors, tags as check_tags};
use crate::volume::{Access, Volume as Kind, VolumeMount};

const INVALID: &str = "invalid_request";
/// Directories that hold the image's own files or the kernel's (contract.md 2.1).
const RESERVED: [&str; 14] = [
    "/bin", "/boot", "/dev", "/etc", "/lib", "/lib64", "/proc", "/root", "/run", "/sbin", "/sys", "/tmp",
    "/usr", "/var",
];

/// The body of `POST /volumes`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VolumeCreate {
    pub id: Option<Uid>,
    pub name: Name,
    pub size: Bytes,
    pub tags: Tags,
}

impl VolumeCreate {
    /// Reads the body.
    ///
    /// # Errors
    /// Returns every problem of the body.
    pub fn read(body: Value) -> Result<Self, FieldErrors> {
        let mut errors = FieldErrors::default();
        let mut fields = Fields::body(body, &mut errors);
        let id = fields.parsed("id", INVALID, &mut errors);
        let name = fields.required_text("name", &mut errors);
        let name = name.and_then(|text| errors.take("name", INVALID, Name::new_resource(&text)));
        let size = size(&mut fields, &mut errors);
        let tags = fields.map("tags", &mut errors).unwrap_or_default();
        check_tags(&mut errors, "tags", &tags);
        fields.finish(&mut errors);
        match (name, size) {
            (Some(name), Some(size)) if errors.is_empty() => Ok(Self { id, name, size, tags }),
            _ => Err(errors),
        }
    }
}

/// The body of `PATCH /volumes/{id}`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VolumePatch {
    /// The new size.
    pub size: Bytes,
}

impl VolumePatch {
    /// Reads the body.
    ///
    /// # Errors
    /// Returns every problem of the body.
    pub fn read(body: Value) -> Result<Self, FieldErrors> {
        let mut errors = FieldErrors::default();
        let mut fields = Fields::body(body, &mut errors);
        let size = size(&mut fields, &mut errors);
        fields.finish(&mut errors);
        match size {
            Some(size) if errors.is_empty() => Ok(Self { size }),
            _ => Err(errors),
        }
    }
}

/// Reads the required size of a volume.
fn size(fields: &mut Fields, errors: &mut FieldErrors) -> Option<Bytes> {
    if !fields.has("size_gb") {
        errors.push("size_gb", INVALID, "is required");
    }
    let size = fields.number("size_gb", 1..=limits::VOLUME_GB_MAX, errors)?;
    Some(Bytes(u64::from(size) << 30))
}

/// A requested mount; the volume is named by its id or its name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MountRequest {
    pub volume: String,
    pub path: String,
    pub access: AccessRequest,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AccessRequest {
    ReadWrite,
    ReadOnly,
    Overlay(Bytes),
}

/// Reads `volumes` of a create request.
pub(super) fn mounts(fields: &mut Fields, errors: &mut FieldErrors) -> Vec<MountRequest> {
    let entries = fields.objects("volumes", errors);
    let mut mounts: Vec<MountRequest> = Vec::new();
    for mut entry in entries {
        let volume = entry.required_text("volume_id", errors);
        let path = mount_path(&mut entry, errors);
        let access = access(&mut entry, errors);
        let (at_volume, at_path) = (entry.path("volume_id"), entry.path("mount_path"));
        entry.finish(errors);
        let (Some(volume), Some(path)) = (volume, path) else { continue };
        if mounts.iter().any(|mount| mount.volume == volume) {
            errors.push(at_volume, INVALID, "is mounted twice");
        }
        if mounts.iter().any(|mount| mount.path == path) {
            errors.push(at_path, INVALID, "is used twice");
        }
        mounts.push(MountRequest { volume, path, access });
    }
    let devices: usize = mounts.iter().map(|mount| devices(mount.access)).sum();
    if devices > limits::VOLUME_DEVICES_MAX {
        let message = format!("need {devices} devices; {} fit", limits::VOLUME_DEVICES_MAX);
        errors.push(fields.path("volumes"), INVALID, message);
    }
    mounts
}

/// Returns the number of block devices that a mount takes.
fn devices(access: AccessRequest) -> usize {
    match access {
        AccessRequest::ReadWrite | AccessRequest::ReadOnly => 1,
        AccessRequest::Overlay(_) => 2,
    }
}

fn access(entry: &mut Fields, errors: &mut FieldErrors) -> AccessRequest {
    let is_read_only = entry.flag("readonly", errors).unwrap_or(false);
    let is_overlay = entry.flag("overlay", errors).unwrap_or(false);
    let size: Option<Bytes> = entry.parsed("overlay_size", "invalid_overlay_size", errors);
    let (low, high) = (limits::OVERLAY_MIN, limits::OVERLAY_MAX);
    match (is_read_only, is_overlay, size) {
        (false, false, _) => AccessRequest::ReadWrite,
        (true, false, _) => AccessRequest::ReadOnly,
        (false, true, _) => {
            errors.push(entry.path("overlay"), INVALID, "needs readonly");
            AccessRequest::ReadOnly
        }
        (true, true, Some(size)) if (low..=high).contains(&size) => AccessRequest::Overlay(size),
        (true, true, size) => {
            let message = match size {
                None => "is required with overlay".to_owned(),
                Some(_) => format!("must be from {low} to {high}"),
            };
            errors.push(entry.path("overlay_size"), "invalid_overlay_size", message);
            AccessRequest::ReadOnly
        }
    }
}

/// Reads an absolute path and normalises it to its shortest form. The path must be outside of the
/// directories that hold the image's own files.
fn mount_path(entry: &mut Fields, errors: &mut FieldErrors) -> Option<String> {
    let given = entry.required_text("mount_path", errors)?;
    let names: Vec<&str> = given.split('/').filter(|name| !matches!(*name, "" | ".")).collect();
    let path = format!("/{}", names.join("/"));
    let is_below = |reserved: &str| {
        path.strip_prefix(reserved).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
    };
    let problem = if !given.starts_with('/') {
        Some("must be absolute".to_owned())
    } else if given.contains('\0') || names.contains(&"..") {
        Some("must not contain .. or a NUL".to_owned())
    } else if given.len() > limits::MOUNT_PATH_BYTES_MAX {
        Some(format!("is longer than {} bytes", limits::MOUNT_PATH_BYTES_MAX))
    } else if path == "/" {
        Some("must not be the root".to_owned())
    } else {
        let reserved = RESERVED.into_iter().find(|reserved| is_below(reserved));
        reserved.map(|reserved| format!("must not be {reserved} or below it"))
    };
    match problem {
        Some(problem) => {
            errors.push(entry.path("mount_path"), INVALID, problem);
            None
        }
        None => Some(path),
    }
}

/// The body of `POST /instances/{id}/volumes/{volume}`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VolumeAttach {
    pub path: String,
    pub access: AccessRequest,
}

impl VolumeAttach {
    /// Reads the body.
    ///
    /// # Errors
    /// Returns every problem of the body.
    pub fn read(body: Value) -> Result<Self, FieldErrors> {
        let mut errors = FieldErrors::default();
        let mut fields = Fields::body(body, &mut errors);
        let path = mount_path(&mut fields, &mut errors);
        let access = access(&mut fields, &mut errors);
        fields.finish(&mut errors);
        match path {
            Some(path) if errors.is_empty() => Ok(Self { path, access }),
            _ => Err(errors),
        }
    }
}

/// A volume as clients read it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Volume {
    /// Id of the volume.
    pub id: String,
    /// Name of the volume.
    pub name: String,
    /// Size, in GiB.
    pub size_gb: u64,
    /// Time of the creation.
    #[schemars(with = "Time")]
    pub created_at: Timestamp,
    /// Instances that mount the volume.
    pub attachments: Vec<Attachment>,
    /// Tags of the volume.
    #[schemars(with = "TagMap")]
    pub tags: Tags,
    /// An addition to Hypeman's API: conditions; `Ready` reports whether the disk exists.
    pub conditions: Vec<Condition>,
}

/// A mount of a volume in an instance.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[schemars(rename = "VolumeAttachment")]
pub struct Attachment {
    /// Id of the instance.
    pub instance_id: String,
    /// Path of the mount.
    pub mount_path: String,
    /// True if the instance cannot write to the volume.
    pub readonly: bool,
}

impl Volume {
    /// Converts a record to its wire form; `mounts` are the mounts of this volume, each with its instance.
    #[must_use]
    pub fn of<'a>(object: &Object<Kind>, mounts: impl Iterator<Item = (&'a Uid, &'a VolumeMount)>) -> Self {
        let Object { meta, spec, status } = object;
        let attachment = |(instance, mount): (&Uid, &VolumeMount)| Attachment {
            instance_id: instance.to_string(),
            mount_path: mount.path.clone(),
            readonly: !mount.access.is_writing(),
        };
        Self {
            id: meta.uid.to_string(),
            name: meta.name.to_string(),
            size_gb: spec.size.0 >> 30,
            created_at: meta.created_at,
            attachments: mounts.map(attachment).collect(),
            tags: meta.tags.clone(),
            conditions: status.conditions.clone(),
        }
    }
}

/// A mount as clients read it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[schemars(rename = "VolumeMount")]
pub struct MountView {
    /// Id of the volume.
    pub volume_id: String,
    /// Path of the mount.
    pub mount_path: String,
    /// True if the instance cannot write to the volume.
    pub readonly: bool,
    /// True if a writable layer of this instance is over the volume.
    pub overlay: bool,
    /// Size of the overlay.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub overlay_size: Option<String>,
}

impl From<&VolumeMount> for MountView {
    fn from(mount: &VolumeMount) -> Self {
        let overlay_size = match &mount.access {
            Access::Overlay { size, .. } => Some(size.to_string()),
            Access::ReadWrite | Access::ReadOnly => None,
        };
        Self {
            volume_id: mount.volume.to_string(),
            mount_path: mount.path.clone(),
            readonly: !mount.access.is_writing(),
            overlay: overlay_size.is_some(),
            overlay_size,
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(volumes: Value) -> Result<Vec<MountRequest>, String> {
        let mut errors = FieldErrors::default();
        let mut fields = Fields::body(json!({ "volumes": volumes }), &mut errors);
        let mounts = mounts(&mut fields, &mut errors);
        errors.into_result().map(|()| mounts).map_err(|errors| errors.to_string())
    }

    #[test]
    fn a_path_is_accepted_in_its_shortest_form_or_refused_with_its_field() {
        for (given, expected) in [
            ("/data", Ok("/data")),
            ("//data/./deep/", Ok("/data/deep")),
            ("/variable", Ok("/variable")),
            ("/usr2/x", Ok("/usr2/x")),
            ("data", Err("must be absolute")),
            ("/", Err("must not be the root")),
            ("/./", Err("must not be the root")),
            ("/a/../etc", Err("must not contain .. or a NUL")),
            ("/a\0b", Err("must not contain .. or a NUL")),
            ("/var", Err("must not be /var or below it")),
            ("//usr//local", Err("must not be /usr or below it")),
            ("/lib64/x", Err("must not be /lib64 or below it")),
        ] {
            let read = read(json!([{ "volume_id": "v", "mount_path": given }]));
            let read = read.map(|mounts| mounts[0].path.clone());
            let expected = expected.map(ToOwned::to_owned);
            assert_eq!(read, expected.map_err(|why| format!("volumes[0].mount_path {why}")), "{given:?}");
        }
        let long = format!("/{}", "x".repeat(limits::MOUNT_PATH_BYTES_MAX));
        assert!(read(json!([{ "volume_id": "v", "mount_path": long }])).is_err());
        assert!(read(json!([{ "volume_id": "v", "mount_path": long[1..].replacen('x', "/", 1) }])).is_ok());
    }

    #[test]
    fn access_has_three_values_and_every_error_is_reported() {
        let mount = |more: Value| {
            let mut mount = json!({ "volume_id": "v", "mount_path": "/data" });
            for (key, value) in more.as_object().expect("an object") {
                mount[key] = value.clone();
            }
            read(json!([mount])).map(|mounts| mounts[0].access)
        };
        assert_eq!(mount(json!({})), Ok(AccessRequest::ReadWrite));
        assert_eq!(mount(json!({ "readonly": true })), Ok(AccessRequest::ReadOnly));
        let overlay = json!({ "readonly": true, "overlay": true, "overlay_size": "64MB" });
        assert_eq!(mount(overlay), Ok(AccessRequest::Overlay(Bytes(64 << 20))));
        for wrong in [
            json!({ "overlay": true }),
            json!({ "readonly": true, "overlay": true }),
            json!({ "readonly": true, "overlay": true, "overlay_size": "1KB" }),
            json!({ "mode": "ro" }),
        ] {
            assert!(mount(wrong.clone()).is_err(), "{wrong}");
        }
        let twice =
            json!([{ "volume_id": "v", "mount_path": "/a" }, { "volume_id": "v", "mount_path": "/a/" }]);
        let why = read(twice).expect_err("refused");
        assert_eq!(why, "volumes[1].volume_id is mounted twice; volumes[1].mount_path is used twice");
    }

    #[test]
    fn as_many_devices_as_fit_and_not_one_more() {
        let many = |count: usize| {
            let mounts =
                (0..count).map(|n| json!({ "volume_id": format!("v{n}"), "mount_path": format!("/m{n}") }));
            read(Value::Array(mounts.collect()))
        };
        assert!(many(limits::VOLUME_DEVICES_MAX).is_ok());
        assert!(many(limits::VOLUME_DEVICES_MAX + 1).is_err());
    }

    #[test]
    fn a_volume_needs_a_name_and_a_whole_number_of_gigabytes() {
        let read = |body: Value| VolumeCreate::read(body).map_err(|errors| errors.to_string());
        assert_eq!(
            read(json!({ "name": "data", "size_gb": 2 })).map(|request| request.size),
            Ok(Bytes(2 << 30))
        );
        assert_eq!(read(json!({})), Err("name is required; size_gb is required".to_owned()));
        for body in [
            json!({ "name": "data", "size_gb": 0 }),
            json!({ "name": "data", "size_gb": limits::VOLUME_GB_MAX + 1 }),
            json!({ "name": "Data", "size_gb": 1 }),
            json!({ "name": "data", "size_gb": 1, "id": "mine" }),
            json!({ "name": "data", "size_gb": 1, "sise": 1 }),
        ] {
            assert!(read(body.clone()).is_err(), "{body}");
        }
    }
}
