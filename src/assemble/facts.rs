//! The facts of this host: its size, its hypervisors and the files for guests.

use std::path::PathBuf;

use stead_controllers::host::{Facts, HostError, HostErrorKind, HostSeen, Vmms};
use stead_schemas::instance::Hypervisor;
use stead_schemas::node::{Accelerator as Accelerated, HypervisorStatus};

use crate::host::kernel::Kernel;
use crate::host::netlink::Netlink;
use crate::host::tap::has_vhost_net;
use crate::host::{capacity, oci};
use crate::hypervisor::{Accelerator, Hypervisors, WantedAccelerator, host_walls};

/// The facts of this host. The programs of the drivers were asked when the daemon started.
#[derive(Clone)]
pub(super) struct HostFacts {
    pub(super) hypervisors: Hypervisors,
    /// The hypervisors that VMs can be launched on.
    pub(super) available: Vec<Hypervisor>,
    pub(super) data_dir: PathBuf,
    pub(super) kernel_dir: PathBuf,
    pub(super) has_cgroups: bool,
    pub(super) accelerator: WantedAccelerator,
    pub(super) links: Netlink,
}

impl HostFacts {
    fn status(&self, hypervisor: Hypervisor) -> Option<(Hypervisor, HypervisorStatus)> {
        let capabilities = self.hypervisors.capabilities(hypervisor)?;
        let is_available = self.available.contains(&hypervisor);
        Some((hypervisor, HypervisorStatus { is_available, capabilities }))
    }
}

impl Facts for HostFacts {
    async fn inspect(&self) -> Result<HostSeen, HostError> {
        let (data_dir, kernel_dir) = (self.data_dir.clone(), self.kernel_dir.clone());
        let files = move || -> Result<_, HostError> {
            let has_headers = Kernel::has_headers_in(&kernel_dir);
            let images = oci::space(&data_dir.join("images"))?;
            Ok((capacity::read(&data_dir)?, images, has_headers, has_vhost_net()))
        };
        let read = tokio::task::spawn_blocking(files).await;
        let failed = |error| HostError::new(HostErrorKind::Transient, "inspect", "the host").because(error);
        let (capacity, images, has_kernel_headers, has_vhost_net) =
            read.map_err(|error: tokio::task::JoinError| failed(error.to_string()))??;
        let uplink_speed = self.links.uplink_speed().await?;
        let all = self.hypervisors.hypervisors().into_iter();
        Ok(HostSeen {
            capacity,
            images,
            hypervisors: all.filter_map(|hypervisor| self.status(hypervisor)).collect(),
            accelerator: match self.accelerator.accelerator() {
                Accelerator::Kvm => Accelerated::Kvm,
                Accelerator::Tcg => Accelerated::Tcg,
            },
            has_kernel_headers,
            has_cgroups: self.has_cgroups,
            has_vhost_net,
            uplink_speed,
            accelerator_problem: self.accelerator.problem(),
            missing_walls: host_walls(),
        })
    }
}
