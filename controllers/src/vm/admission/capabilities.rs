//! Refusals by the capabilities that the hypervisor of an instance declares.

use stead_schemas::capabilities::VmmCapabilities;
use stead_schemas::compression::SnapshotPolicy;
use stead_schemas::instance::{Hypervisor, InstanceSpec};
use stead_schemas::policy::AutoStandbyPolicy;
use stead_schemas::quantity::{Bytes, Rate};
use stead_schemas::volume::{Access, VolumeMount};

use crate::node::admission::check_field;
use crate::refused::{Refused, RefusedKind};

/// A hypervisor with its declared capabilities.
#[derive(Debug, Clone, Copy)]
pub(super) struct Declared {
    pub(super) hypervisor: Hypervisor,
    pub(super) has: VmmCapabilities,
}

impl Declared {
    /// Checks the spec of a new instance, apart from its volumes.
    ///
    /// # Errors
    /// Returns the refusal of the first field that asks for too much.
    pub(super) fn check(&self, spec: &InstanceSpec) -> Result<(), Refused> {
        self.check_vcpus(spec.vcpus, "vcpus")?;
        self.check_auto_standby(spec.auto_standby.as_ref(), "auto_standby")?;
        self.check_disk_rate(spec.rates.disk)?;
        check_field(self.hypervisor, self.has.resize_memory || spec.hotplug == Bytes(0), "hotplug_size")?;
        let has_compression =
            spec.snapshot_policy.as_ref().is_some_and(|policy| *policy != SnapshotPolicy::default());
        check_field(self.hypervisor, self.has.standby || !has_compression, "snapshot_policy")
    }

    /// Checks that an instance of another hypervisor can move to this hypervisor, apart from its volumes.
    ///
    /// # Errors
    /// Returns the refusal of the field `target_hypervisor`.
    pub(super) fn check_move(&self, spec: &InstanceSpec) -> Result<(), Refused> {
        self.check_vcpus(spec.vcpus, "target_hypervisor")?;
        if spec.hotplug > Bytes(0) && !self.has.resize_memory {
            let why = format!("is {}, which has no hotplug memory", self.hypervisor.as_str());
            return Err(Refused::unsupported("target_hypervisor", why));
        }
        self.check_auto_standby(spec.auto_standby.as_ref(), "target_hypervisor")
    }

    /// Checks that the hypervisor can carry out a policy, which `path` asks for.
    ///
    /// # Errors
    /// Returns `UnsupportedField`.
    pub(super) fn check_auto_standby(
        &self,
        policy: Option<&AutoStandbyPolicy>,
        path: &str,
    ) -> Result<(), Refused> {
        let is_enabled = policy.is_some_and(|policy| policy.timeout().is_some());
        if self.has.standby || !is_enabled {
            return Ok(());
        }
        let name = self.hypervisor.as_str();
        Err(Refused::unsupported(
            path,
            format!("asks for an automatic standby, which {name} does not support"),
        ))
    }

    /// Checks that the hypervisor can limit its disks, if a limit is asked for.
    ///
    /// # Errors
    /// Returns `UnsupportedField`.
    pub(super) fn check_disk_rate(&self, rate: Option<Rate>) -> Result<(), Refused> {
        let is_limited = rate.is_some_and(|rate| rate.0 > 0);
        check_field(self.hypervisor, self.has.io_limits || !is_limited, "disk_io_bps")
    }

    fn check_vcpus(&self, vcpus: u32, path: &str) -> Result<(), Refused> {
        let most = self.has.vcpus_max;
        if vcpus <= most {
            return Ok(());
        }
        let name = self.hypervisor.as_str();
        Err(Refused::unsupported(path, format!("asks for {vcpus} vcpus on {name}, which has at most {most}")))
    }

    /// Checks that the hypervisor has enough devices for these mounts.
    ///
    /// # Errors
    /// Returns `Invalid`.
    pub(super) fn check_volumes<'a>(
        &self,
        mounts: impl IntoIterator<Item = &'a VolumeMount>,
    ) -> Result<(), Refused> {
        let needed = mounts.into_iter().map(devices).sum::<usize>();
        let most = self.has.volume_devices_max;
        if needed <= most {
            return Ok(());
        }
        let name = self.hypervisor.as_str();
        let message = format!("volumes need {needed} devices; on {name} {most} fit");
        Err(Refused::at(RefusedKind::Invalid, "volumes", message))
    }
}

fn devices(mount: &VolumeMount) -> usize {
    match mount.access {
        Access::ReadWrite | Access::ReadOnly => 1,
        Access::Overlay { .. } => 2,
    }
}
