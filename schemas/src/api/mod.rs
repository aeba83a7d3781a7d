//! Wire types: the requests and responses of clients, separate from the stored types.
//!
//! Guarantees: a request is read completely before anything is done; all of its problems are reported, each
//! with its field's path; no field is silently ignored, and a field that this server cannot honour yet is
//! refused by name. Responses may gain fields and never lose or rename one.
//! Source: contract.md; behaviour is judged by the official SDKs.

mod auto_standby;
mod bandwidth;
pub mod body;
mod compression;
mod copy;
mod egress;
mod env;
mod error;
mod exec;
mod fields;
mod health;
mod hotplug;
mod image;
mod ingress;
mod instance;
mod network;
mod patch;
mod pending;
mod policy;
pub mod query;
mod rates;
mod reclaim;
mod resources;
mod schedule;
pub mod schema;
mod sizes;
mod snapshot;
mod system;
#[cfg(test)]
mod tests;
mod unsupported;
mod volume;
mod watch;

pub use auto_standby::{AutoStandbyReason, AutoStandbyState, AutoStandbyView};
pub use bandwidth::BandwidthAsked;
pub use compression::{CompressionAsked, CompressionView, SnapshotPolicyView, StandbyRequest};
pub use copy::{CopyFrame, CopyHeader, CopyRequest, Direction, PathView, named, path_fields};
pub use egress::{EgressView, EnforcementView};
pub use env::check_total as check_env;
pub use error::{ErrorBody, ErrorDetail};
pub use exec::{ControlFrame, ExecControl, ExecRequest};
pub use fields::Fields;
pub use health::{ExecView, HealthCheckView, HealthView, HealthWord, HttpView, TcpView, check_fits};
pub use hotplug::{HOTPLUGGED, check_part};
pub use image::{Image, ImageCreate, ImageTag, PushCredentials};
pub use ingress::{Ingress, IngressMatch, IngressRequest, IngressRule, IngressTarget, RequestHeaderAuth};
pub use instance::{Instance, InstanceRequest, InstanceStart, NetworkView, WaitForState, parse_state};
pub use network::NetworkAsked;
pub use patch::{ImageAsked, InstancePatch};
pub use pending::{Applies, MASK, NetworkChangeView, PendingView};
pub use policy::RestartView;
pub use reclaim::{MemoryReclaim, MemoryReclaimAction, PressureState, ReclaimRequest, ReclaimStatus};
pub use resources::{DiskBreakdown, GpuResourceStatus, ResourceAllocation, ResourceStatus, Resources};
pub use schedule::{RetentionView, ScheduleRequest, SnapshotSchedule, SnapshotScheduleSet};
pub use snapshot::{
    ForkCreate, Snapshot, SnapshotCreate, SnapshotFork, SnapshotPatch, SnapshotRestore, parse_kind, state_of,
};
pub use system::{
    Capabilities, Health, HostView, ImagesView, InstanceStats, NetworkModel, Runtime, RuntimeView,
    ServerHealth, ServerView,
};
pub use volume::{
    AccessRequest, Attachment, MountRequest, MountView, Volume, VolumeAttach, VolumeCreate, VolumePatch,
};
pub use watch::{InstanceEvent, LogEvent};
