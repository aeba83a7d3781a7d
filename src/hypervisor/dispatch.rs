//! The choice of a VM's driver: by its plan at a launch, and by its record afterwards.
//!
//! A new VMM is a folder beside this file, and one line in [`Drivers::built_in`].

use std::sync::Arc;

use futures::future::join_all;
use stead_schemas::capabilities::VmmCapabilities;
use stead_schemas::instance::Hypervisor;

use super::driver::{Driver, MachineType};
use super::record::VmPaths;
use super::{Accelerator, Programs};

/// The drivers of this host; clones share them.
#[derive(Clone)]
pub struct Drivers(Arc<Vec<Arc<dyn Driver>>>);

/// A driver, and the machine type of one VM.
#[derive(Clone)]
pub(crate) struct Choice {
    pub(crate) driver: Arc<dyn Driver>,
    pub(crate) machine_type: MachineType,
}

impl Drivers {
    /// Uses these drivers. The first one is that of records that name no machine type.
    #[must_use]
    pub fn new(drivers: Vec<Arc<dyn Driver>>) -> Self {
        Self(Arc::new(drivers))
    }

    /// Makes all drivers of this build: one line for each.
    #[must_use]
    pub fn built_in(programs: &Programs, accelerator: Accelerator) -> Self {
        Self::new(vec![
            Arc::new(super::qemu::Qemu::new(programs, accelerator)), // keep one line for each
        ])
    }

    /// Lists all hypervisors that have a driver. The first one is the default of new instances.
    #[must_use]
    pub fn hypervisors(&self) -> Vec<Hypervisor> {
        let machine_types = self.0.iter().flat_map(|driver| driver.machine_types());
        machine_types.map(|machine_type| machine_type.hypervisor).collect()
    }

    /// Asks the installed programs which of these they have.
    pub async fn probe(&self) -> Vec<Hypervisor> {
        join_all(self.0.iter().map(|driver| driver.probe())).await.concat()
    }

    /// Returns what VMs on this hypervisor can do, or `None` when it has no driver.
    #[must_use]
    pub fn capabilities(&self, hypervisor: Hypervisor) -> Option<VmmCapabilities> {
        self.by_hypervisor(hypervisor).map(|choice| choice.machine_type.capabilities)
    }

    /// Returns the driver for a plan.
    pub(crate) fn by_hypervisor(&self, hypervisor: Hypervisor) -> Option<Choice> {
        self.find(|machine_type| machine_type.hypervisor == hypervisor)
    }

    /// Returns the driver for the machine type in a record.
    pub(crate) fn by_record(&self, name: Option<&str>) -> Option<Choice> {
        self.find(|machine_type| name.is_none_or(|name| machine_type.name == name))
    }

    /// Returns the arguments that mark the process of this VM, whatever its driver and the version of that.
    pub(crate) fn marks(&self, paths: &VmPaths) -> Vec<String> {
        let marks = |driver: &Arc<dyn Driver>| {
            let mut marks = driver.earlier_marks(paths);
            marks.push(driver.mark(paths));
            marks
        };
        self.0.iter().flat_map(marks).collect()
    }

    fn find(&self, is_wanted: impl Fn(&MachineType) -> bool) -> Option<Choice> {
        self.0.iter().find_map(|driver| {
            let machine_type =
                *driver.machine_types().iter().find(|&machine_type| is_wanted(machine_type))?;
            Some(Choice { driver: driver.clone(), machine_type })
        })
    }
}

impl std::fmt::Debug for Drivers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.0.iter().map(|driver| driver.name())).finish()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn each_machine_type_has_a_name_and_a_hypervisor_of_its_own() {
        let drivers = Drivers::built_in(&Programs::default(), Accelerator::Tcg);
        let all: Vec<MachineType> =
            drivers.0.iter().flat_map(|driver| driver.machine_types()).copied().collect();
        let names: BTreeSet<&str> = all.iter().map(|machine_type| machine_type.name).collect();
        let hypervisors: BTreeSet<Hypervisor> =
            all.iter().map(|machine_type| machine_type.hypervisor).collect();
        assert_eq!((names.len(), hypervisors.len()), (all.len(), all.len()), "{all:?}");
        for machine_type in all {
            let by_record = drivers.by_record(Some(machine_type.name)).expect("known");
            let by_plan = drivers.by_hypervisor(machine_type.hypervisor).expect("known");
            assert_eq!((by_record.machine_type, by_plan.machine_type), (machine_type, machine_type));
        }
        assert!(drivers.by_record(Some("no such type")).is_none());
        assert!(drivers.by_record(None).is_some(), "records of before there was a choice");
    }
}
