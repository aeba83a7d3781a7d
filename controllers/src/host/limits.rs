//! Limits of VMMs: what each may take of its host.

use std::future::Future;

use stead_schemas::names::Uid;
use stead_schemas::quantity::Bytes;

use super::HostError;

/// Limits of one VMM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VmmLimits {
    /// Number of processors of its VM. The VMM may use them and a share for itself, and competes by them for busy
    /// processors and disks.
    pub vcpus: u32,
    /// Memory of the VMM and of its guest, in bytes.
    pub memory: Bytes,
}

/// The limits in force for a VMM. `None` stands for a limit that the host cannot enforce.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LimitsSeen {
    pub vcpus: Option<u32>,
    pub memory: Option<Bytes>,
}

impl LimitsSeen {
    /// True if everything that the host can enforce is as it should be.
    #[must_use]
    pub fn are(&self, limits: VmmLimits) -> bool {
        self.vcpus.is_none_or(|vcpus| vcpus == limits.vcpus)
            && self.memory.is_none_or(|memory| memory == limits.memory)
    }
}

/// The limits of VMMs. A launch sets them before the VMM runs; this port changes them while it runs.
pub trait Limits: Send + Sync + 'static {
    /// Returns the limits of a VMM, or `None` if it has none because the host enforces none for it.
    fn inspect(&self, owner: &Uid) -> impl Future<Output = Result<Option<LimitsSeen>, HostError>> + Send;
    /// Replaces the limits of a VMM. After a crash during the call some are the new ones.
    fn set(&self, owner: &Uid, limits: VmmLimits) -> impl Future<Output = Result<(), HostError>> + Send;
}
