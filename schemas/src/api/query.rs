//! The query parameters of requests as the OpenAPI document describes them. Others are refused.

use schemars::JsonSchema;

use super::schema::{Base64, Id, ImageReference, NewName, TagMap};
use crate::instance::State;
use crate::limits;
use crate::quantity::GoDuration;
use crate::snapshot::SnapshotKind;

/// The parameters of lists that only tags filter.
#[derive(Debug, JsonSchema)]
pub struct TagFilter {
    /// Tags that an object must have, all of them: `tags[team]=a&tags[env]=b`.
    pub tags: Option<TagMap>,
}

/// The parameters of `GET /instances`.
#[derive(Debug, JsonSchema)]
pub struct InstanceList {
    /// State of the instances; it excludes `watch`.
    pub state: Option<State>,
    /// Tags that an instance must have, all of them: `tags[team]=a&tags[env]=b`.
    pub tags: Option<TagMap>,
    /// True for a stream of changes, one JSON object a line, instead of a list.
    pub watch: Option<bool>,
    /// Version after which the changes of a watch begin; by default the present one.
    pub resource_version: Option<u64>,
}

/// The parameters of `PATCH /instances/{id}`.
#[derive(Debug, JsonSchema)]
pub struct InstanceUpdate {
    /// True to read what the change would do: nothing is stored.
    pub dry_run: Option<bool>,
}

/// The parameters of `DELETE /instances/{id}`.
#[derive(Debug, JsonSchema)]
pub struct InstanceDelete {
    /// False to end the VM at once; true, the default, lets the guest shut down.
    pub graceful_shutdown: Option<bool>,
}

/// The states that can be waited for.
#[derive(Debug, JsonSchema)]
pub enum AwaitedState {
    Created,
    Initializing,
    Running,
    Paused,
    Shutdown,
    Stopped,
    Standby,
}

/// The parameters of `GET /instances/{id}/wait`.
#[derive(Debug, JsonSchema)]
pub struct Wait {
    /// State to wait for.
    pub state: AwaitedState,
    /// Time limit, more than 0; longer than 5 minutes is shortened to that. `60s` by default.
    pub timeout: Option<GoDuration>,
}

/// The logs of an instance.
#[derive(Debug, JsonSchema)]
#[schemars(rename_all = "lowercase")]
pub enum LogSource {
    /// The console of the guest: the output of the program.
    App,
    /// The output of the program that runs the VM.
    Vmm,
    /// The actions of the server for this instance.
    Hypeman,
    /// The same as `hypeman`.
    Stead,
    /// The connections of mediated egress; an addition to Hypeman's API.
    Egress,
}

/// The parameters of `GET /instances/{id}/egress/log`.
#[derive(Debug, JsonSchema)]
pub struct EgressLog {
    /// Number of lines from the end of the log; 100 by default.
    #[schemars(range(min = 0, max = 100_000))]
    pub tail: Option<u32>,
    /// True to continue with the lines that come; false by default.
    pub follow: Option<bool>,
}

/// The parameters of `GET /instances/{id}/logs`.
#[derive(Debug, JsonSchema)]
pub struct Logs {
    /// Number of lines from the end of the log; 100 by default.
    #[schemars(range(min = 0, max = 100_000))]
    pub tail: Option<u32>,
    /// True to continue with the lines that come; false by default.
    pub follow: Option<bool>,
    /// Log to read; `app` by default.
    pub source: Option<LogSource>,
}

/// The parameters of `GET /instances/{id}/stat`. One of the two paths is required.
#[derive(Debug, JsonSchema)]
pub struct PathQuery {
    /// Absolute path in the guest.
    pub path: Option<String>,
    /// The path in base64, for one that is not UTF-8; it replaces `path`. It is an addition to the contract.
    pub path_base64: Option<Base64>,
    /// True for what a symbolic link leads to; false, the default, for the link itself.
    pub follow_links: Option<bool>,
}

/// The parameters of `GET /snapshots`.
#[derive(Debug, JsonSchema)]
pub struct SnapshotList {
    /// Id of the instance that the snapshots were taken of.
    pub source_instance_id: Option<String>,
    /// Kind of the snapshots.
    pub kind: Option<SnapshotKind>,
    /// Name of the snapshots.
    pub name: Option<String>,
    /// Tags that a snapshot must have, all of them: `tags[team]=a&tags[env]=b`.
    pub tags: Option<TagMap>,
}

/// The parameters of `POST /volumes/from-archive`.
#[derive(Debug, JsonSchema)]
pub struct VolumeFromArchive {
    /// Name of the volume.
    pub name: NewName,
    /// Size of the volume in whole gigabytes, into which the archive's files have to fit.
    #[schemars(range(min = 1, max = limits::VOLUME_GB_MAX))]
    pub size_gb: u32,
    /// Id of the volume; without it the server chooses one.
    pub id: Option<Id>,
    /// Tags of the volume, as `tags[KEY]=VALUE`.
    pub tags: Option<TagMap>,
}

/// The parameters of `POST /images/import`.
#[derive(Debug, JsonSchema)]
pub struct ImageImport {
    /// Reference that names the imported content.
    pub name: ImageReference,
}
