//! The bodies of requests as the OpenAPI document describes them.
//!
//! The readers of requests report every problem with its field, which no derived reader does; so these types
//! are never read or made, and only their schemas are used. The tests compare them with the readers: a field
//! that is read and not described here fails them, and so does a field that is described and not read.

mod image;
mod ingress;
mod instance;
mod policy;
mod reclaim;
mod snapshot;
#[cfg(test)]
pub(super) mod tests;
mod volume;

pub use image::{ImageCreate, ImageTag, RegistryCredentials};
pub use ingress::{
    IngressCreate, IngressMatchRequest, IngressRuleRequest, IngressTargetRequest, RequestHeaderAuthRequest,
};
pub use instance::{
    CredentialInjection, CredentialRequest, CredentialSource, EgressEnforcement, EgressMode, EgressRequest,
    GpuRequest, HeaderFormat, InstanceCreate, InstanceStart, InstanceUpdate, NetworkRequest, Pull,
};
pub use policy::{
    AutoStandbyRequest, CompressionRequest, ExecCheckRequest, HealthCheckRequest, HealthCheckType,
    HttpCheckRequest, RestartPolicyRequest, SnapshotPolicyRequest, StandbyRequest, TcpCheckRequest,
};
pub use reclaim::MemoryReclaimRequest;
pub use snapshot::{ForkCreate, SnapshotCreate, SnapshotFork, SnapshotRestore, SnapshotUpdate, TargetState};
pub use volume::{VolumeAttach, VolumeCreate, VolumeMountRequest, VolumeUpdate};
