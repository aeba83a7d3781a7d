//! Bodies of requests about volumes.

use schemars::JsonSchema;

use crate::api::schema::{Id, NewName, Size, TagMap};
use crate::limits;

/// The body of `POST /volumes`.
#[derive(Debug, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct VolumeCreate {
    /// Id of the volume; a new one by default.
    pub id: Option<Id>,
    /// Name of the volume, unique on this host.
    pub name: NewName,
    /// Size, in GiB.
    #[schemars(range(min = 1, max = limits::VOLUME_GB_MAX))]
    pub size_gb: u32,
    /// Key-value pairs for filters of lists.
    pub tags: Option<TagMap>,
}

/// The body of `PATCH /volumes/{id}`.
#[derive(Debug, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct VolumeUpdate {
    /// New size, in GiB, which is at least the present one.
    #[schemars(range(min = 1, max = limits::VOLUME_GB_MAX))]
    pub size_gb: u32,
}

/// A volume with the place where it is mounted.
#[derive(Debug, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct VolumeMountRequest {
    /// Id or name of the volume.
    pub volume_id: String,
    /// Absolute path of the mount, outside of the directories of the image's own files.
    #[schemars(regex(pattern = r"^/[^\u0000]*$"), length(max = limits::MOUNT_PATH_BYTES_MAX))]
    pub mount_path: String,
    /// True to mount it read-only; false by default.
    pub readonly: Option<bool>,
    /// True to put a writable layer of this instance over the volume, which needs `readonly`.
    pub overlay: Option<bool>,
    /// Size of the overlay, from 16 MB to 100 GB; required with `overlay`.
    pub overlay_size: Option<Size>,
}

/// The body of `POST /instances/{id}/volumes/{volume}`.
#[derive(Debug, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct VolumeAttach {
    /// Absolute path of the mount, outside of the directories of the image's own files.
    #[schemars(regex(pattern = r"^/[^\u0000]*$"), length(max = limits::MOUNT_PATH_BYTES_MAX))]
    pub mount_path: String,
    /// True to mount it read-only; false by default.
    pub readonly: Option<bool>,
    /// True to put a writable layer of this instance over the volume, which needs `readonly`.
    pub overlay: Option<bool>,
    /// Size of the overlay, from 16 MB to 100 GB; required with `overlay`.
    pub overlay_size: Option<Size>,
}
