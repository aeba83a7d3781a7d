//! Invariants of changes that wait for the next start of an instance. They are part of `checks` and so independent of
//! every plan.

use stead_schemas::instance::{CardChange, Pending, State};

use super::{Broken, HostSnapshot, Records, live};

/// Checks that nothing waits for a VM or a memory that is not there, that a restart which waited for an image is
/// carried out once the image is there, and that each card is used or waits for a start.
pub(crate) fn changes(broken: &mut Broken, records: &Records, host: &HostSnapshot) {
    for instance in live(&records.instances) {
        let (uid, pending, status) = (&instance.meta.uid, &instance.spec.pending, &instance.status);
        let is_there = host.machines.contains_key(uid) || host.memories.contains_key(uid);
        if *pending != Pending::default() && !is_there && instance.awaits_memory().is_none() {
            broken.push(format!("{uid} has neither a VM nor a memory, and waits with {pending:?}"));
        }
        let is_image_there = match (&pending.image, &status.next_image) {
            (Some(next), Some(pinned)) => (&pinned.image, pinned.pull) == (&next.image, next.pull),
            (next, _) => next.is_none(),
        };
        if pending.restarts && is_image_there && status.state == State::Running {
            broken.push(format!("{uid} runs and should be started again for {pending:?}"));
        }
        let added = match &pending.card {
            Some(CardChange::Add(nic)) => Some(nic),
            Some(CardChange::Remove) | None => None,
        };
        let expected: Vec<_> = instance.spec.allocated.nic.iter().chain(added).collect();
        let nics = live(&records.nics).filter(|nic| nic.meta.owner.as_ref().is_some_and(|o| o.uid == *uid));
        let nics: Vec<_> = nics.map(|nic| &nic.meta.uid).collect();
        if nics.len() != expected.len() || expected.iter().any(|nic| !nics.contains(nic)) {
            broken.push(format!("{uid} has the ports {nics:?} and should have {expected:?}"));
        }
        if instance.spec.has_network != instance.spec.allocated.nic.is_some() {
            broken.push(format!("{uid} has a network without a port, or the reverse"));
        }
        let disk = &instance.spec.allocated.disk;
        if !live(&records.disks).any(|one| one.meta.uid == *disk) {
            broken.push(format!("{uid} has lost its root disk {disk}"));
        }
    }
}
