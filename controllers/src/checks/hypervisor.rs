//! The invariant of the hypervisors that machines were launched on. It supplements those of `checks`, and is
//! independent of every plan as they are.

use super::{Broken, HostSnapshot, Records};

/// Checks that the machine of a run is on the hypervisor of the spec. The spec changes it only between two
/// runs, so the machine of an earlier run may still be on another hypervisor.
pub(crate) fn machines(broken: &mut Broken, records: &Records, host: &HostSnapshot) {
    for instance in &records.instances {
        let (uid, spec) = (&instance.meta.uid, &instance.spec);
        let Some(machine) = host.machines.get(uid).filter(|machine| machine.run == spec.run) else {
            continue;
        };
        if machine.hypervisor != spec.hypervisor {
            let (is, desired) = (machine.hypervisor.as_str(), spec.hypervisor.as_str());
            broken.push(format!("{uid}: run {} is on {is} and should be on {desired}", spec.run));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::sync::Arc;

    use stead_schemas::instance::{Hypervisor, Power};
    use stead_schemas::numbers::RunNo;

    use super::*;
    use crate::host::{GuestPhase, VmmState};

    #[test]
    fn a_run_on_another_hypervisor_than_the_desired_is_broken_and_an_earlier_run_is_not() {
        let desired = crate::vm::example(Power::Running, 2, 0).spec.hypervisor;
        for (launched_on, run, is_broken) in
            [(desired, 2, false), (Hypervisor::Firecracker, 2, true), (Hypervisor::Firecracker, 1, false)]
        {
            let mut machine = crate::vm::example_machine(VmmState::Running, GuestPhase::Ready);
            (machine.hypervisor, machine.run) = (launched_on, RunNo(run));
            let instance = crate::vm::example(Power::Running, 2, 0);
            let host = HostSnapshot {
                machines: BTreeMap::from([(instance.meta.uid.clone(), machine)]),
                ..HostSnapshot::default()
            };
            let records = Records { instances: vec![Arc::new(instance)], ..Records::default() };
            let mut broken = Broken::new();
            machines(&mut broken, &records, &host);
            assert_eq!(!broken.is_empty(), is_broken, "{launched_on:?} {run}: {broken:?}");
        }
    }
}
