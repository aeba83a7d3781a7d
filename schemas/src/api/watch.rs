//! The contents of streams: the lines of a watch of instances, and the events of a log.

use schemars::JsonSchema;
use serde::Serialize;

use super::instance::Instance;

/// A line of a watch of instances.
#[derive(Debug, Clone, PartialEq, Serialize, JsonSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum InstanceEvent {
    /// An instance was created.
    Added {
        /// Version of the change.
        resource_version: u64,
        /// The instance.
        object: Box<Instance>,
    },
    /// The spec or the status of an instance changed.
    Modified {
        /// Version of the change.
        resource_version: u64,
        /// The instance.
        object: Box<Instance>,
    },
    /// An instance was deleted.
    Deleted {
        /// Version of the change.
        resource_version: u64,
        /// The instance as it was last.
        object: Box<Instance>,
    },
    /// A mark that is sent while there are no changes.
    Bookmark {
        /// Version up to which all changes were sent.
        resource_version: u64,
    },
    /// Changes after the given version are no longer kept: the client has to list again. The watch ends.
    TooOld {
        /// Version from which changes are kept.
        oldest: u64,
    },
}

/// A server-sent event of a log.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, JsonSchema)]
pub struct LogEvent {
    /// Line of the log, as a JSON string.
    pub data: String,
}
