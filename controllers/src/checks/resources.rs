//! Invariants of the resources of a host: what is promised fits, and so does what runs.

use jiff::Timestamp;
use stead_schemas::condition::{self, ConditionType, Reason};
use stead_schemas::instance::State;
use stead_schemas::limits::TRANSLATED_CODE_MAX;
use stead_schemas::quantity::Bytes;
use stead_schemas::resource::{Resource, Usage, vm_memory};

use super::{Broken, HostSnapshot, Records};
use crate::host::VmmState;

/// Checks that the sums are those of a scan and within the limits of the host, whose capacity must not have become
/// smaller since. What runs is counted from the host, whatever the records say of it.
pub(super) fn always(broken: &mut Broken, records: &Records, host: &HostSnapshot) {
    if records.usage != records.scanned_usage {
        let (kept, scanned) = (records.usage, records.scanned_usage);
        broken.push(format!("the sums {kept:?} are not those of a scan: {scanned:?}"));
    }
    let mut running = Usage::default();
    for instance in &records.instances {
        if host.machines.get(&instance.meta.uid).is_some_and(|machine| machine.pid.is_some()) {
            running.vcpus += u128::from(instance.spec.vcpus);
            running.memory += vm_memory(instance.spec.memory_max());
        }
    }
    for node in &records.nodes {
        let over = |resource: &Resource, usage: &Usage| {
            node.budget(*resource).limit().is_some_and(|limit| usage.of(*resource) > limit)
        };
        for resource in Resource::ALL.iter().filter(|resource| over(resource, &records.usage)) {
            broken.push(format!("more {} is promised than there is: {:?}", resource.as_str(), records.usage));
        }
        for resource in [Resource::Cpu, Resource::Memory].iter().filter(|resource| over(resource, &running)) {
            broken.push(format!("VMs take more {} than there is: {running:?}", resource.as_str()));
        }
    }
}

/// Checks that each VM that runs can have what its spec says, and little more.
pub(super) fn limits(broken: &mut Broken, records: &Records, host: &HostSnapshot) {
    for instance in &records.instances {
        let machine = host.machines.get(&instance.meta.uid);
        let is_up = machine.is_some_and(|machine| machine.vmm == VmmState::Running);
        let Some(seen) = host.limits.get(&instance.meta.uid).filter(|_| is_up) else { continue };
        let guest = u128::from(instance.spec.memory_max().0);
        let most = vm_memory(instance.spec.memory_max()) + u128::from(TRANSLATED_CODE_MAX.0) + (1 << 20);
        let is_memory_right = seen.memory.is_none_or(|memory| {
            let memory = u128::from(memory.0);
            memory > guest && memory <= most
        });
        if !is_memory_right || seen.vcpus.is_some_and(|vcpus| vcpus != instance.spec.vcpus) {
            broken.push(format!("{} has other limits than its spec: {seen:?}", instance.meta.uid));
        }
    }
}

/// Checks that each guest that runs has the hotplug memory of its spec, or says why it has not.
pub(super) fn memory(broken: &mut Broken, records: &Records, host: &HostSnapshot, now: Timestamp) {
    for instance in &records.instances {
        let (spec, status) = (&instance.spec, &instance.status);
        if status.state != State::Running || spec.hotplug == Bytes(0) {
            continue;
        }
        let guest = host.machines.get(&instance.meta.uid).map(|machine| &machine.guest);
        let Some(memory) = guest.and_then(|guest| guest.memory.as_ref()) else {
            broken.push(format!("{}: its hotplug memory is not reported", instance.meta.uid));
            continue;
        };
        if host.machines.get(&instance.meta.uid).is_some_and(|machine| machine.has_unused_memory) {
            broken.push(format!("{}: its unused memory is kept", instance.meta.uid));
        }
        let held =
            spec.memory_hold.filter(|hold| now < hold.until).map_or(spec.hotplug, |hold| hold.hotplugged);
        let is_right = memory.used == spec.hotplugged.unwrap_or(spec.hotplug).min(spec.hotplug).min(held);
        let condition = condition::find(&status.conditions, ConditionType::MemoryResized);
        if !is_right && memory.error.is_none() || is_right != condition.is_none() {
            broken.push(format!(
                "{}: its hotplug memory is {memory:?}, reported as {condition:?}",
                instance.meta.uid
            ));
        }
    }
}

/// Checks that nothing waits for room that is there.
pub(super) fn settled(broken: &mut Broken, records: &Records) {
    let Some(node) = records.nodes.first() else { return };
    for instance in &records.instances {
        let ready = condition::find(&instance.status.conditions, ConditionType::Ready);
        let is_waiting = ready.is_some_and(|ready| ready.reason == Reason::InsufficientResources);
        let mut with_it = records.usage;
        with_it += instance.spec.demand();
        if is_waiting && node.lacks(&records.usage, &with_it).is_empty() {
            broken.push(format!("{} waits for room, and there is some", instance.meta.uid));
        }
    }
}
