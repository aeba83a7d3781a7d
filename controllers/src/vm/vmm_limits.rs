//! Limits of the VMM of an instance.

use stead_schemas::condition::Reason;
use stead_schemas::instance::{Instance, InstanceSpec, InstanceStatus};
use stead_schemas::limits::TRANSLATED_CODE_MAX;
use stead_schemas::meta::Object;
use stead_schemas::node::Accelerator;
use stead_schemas::quantity::Bytes;
use stead_schemas::resource::vm_memory;

use super::steps::act;
use super::{Action, Observed};
use crate::host::{Machine, VmmLimits};
use crate::runtime::{Moment, Plan, conditions};

/// Returns the limits that a VMM should have. An emulating VMM keeps the code that it translated, too. While the
/// accelerator is not known, it counts as one.
pub(super) fn desired(spec: &InstanceSpec, accelerator: Option<Accelerator>) -> VmmLimits {
    let code = match accelerator {
        Some(Accelerator::Kvm) => 0,
        Some(Accelerator::Tcg) | None => TRANSLATED_CODE_MAX.0,
    };
    let memory = u64::try_from(vm_memory(spec.memory_max())).unwrap_or(u64::MAX).saturating_add(code);
    VmmLimits { vcpus: spec.vcpus, memory: Bytes(memory) }
}

/// Sets the limits of a VMM to which nothing else is to be done, if they are others.
pub(super) fn plan(object: &Object<Instance>, machine: &Machine, seen: &Observed) -> Plan<Action> {
    let desired = desired(&object.spec, seen.parts.accelerator);
    match seen.limits {
        Some(limits) if machine.pid.is_some() && !limits.are(desired) => {
            act(Action::Limit(object.meta.uid.clone(), desired))
        }
        Some(_) | None => Plan::Converged,
    }
}

/// Reports that the kernel ended the VMM because memory was short, until the VM has run for a while since.
pub(super) fn report(status: &mut InstanceStatus, object: &Object<Instance>, now: Moment) {
    let death = status.last_death.filter(|death| death.is_out_of_memory && status.vmm_deaths > 0);
    if death.is_none() || object.goal().run().is_none() {
        return;
    }
    let message = "the kernel ended the VMM because memory was short: that of its limit, or that of the host; the VM was \
                   started again";
    let (previous, generation) = (&object.status.conditions, object.meta.generation);
    conditions::degrade(
        &mut status.conditions,
        previous,
        (Reason::OutOfMemory, message),
        generation,
        now.at(),
    );
}
