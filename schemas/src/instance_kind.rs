//! The kind of instances: their two halves, and the things that an instance points at.

use crate::condition::{self, ConditionType, Reason};
use crate::image::Image;
use crate::instance::{Instance, InstanceSpec, InstanceStatus, State};
use crate::meta::{Kind, Object};
use crate::network::Nic;
use crate::numbers::Generation;
use crate::policy::AutoStandbyPolicy;
use crate::references::{Ref, Role, Target, WokenBy};
use crate::resource::Usage;
use crate::snapshot::Snapshot;
use crate::volume::VolumeMount;

impl Kind for Instance {
    const NAME: &'static str = "instance";
    const FINALIZER: &'static str = "vm";
    type Spec = InstanceSpec;
    type Status = InstanceStatus;
    const WOKEN_BY: &'static [WokenBy] = &[
        WokenBy::Target(Role::Image),
        WokenBy::Target(Role::AwaitsMemory),
        WokenBy::Target(Role::Writes),
        WokenBy::Target(Role::Reads),
        // An instance that writes to a volume waits for all others, and for copies of it; an instance that
        // reads it waits for those that wrote.
        WokenBy::Departure { left: Role::Writes, waits: Role::Writes },
        WokenBy::Departure { left: Role::Writes, waits: Role::Reads },
        WokenBy::Departure { left: Role::Reads, waits: Role::Writes },
        WokenBy::Departure { left: Role::Copies, waits: Role::Writes },
        WokenBy::Departure { left: Role::Holds, waits: Role::AwaitsRoom },
        WokenBy::Referrer(Role::Mediates),
    ];

    fn observed_generation(status: &Self::Status) -> Option<Generation> {
        Some(status.observed_generation)
    }

    fn references(object: &Object<Self>) -> Vec<Ref> {
        let (spec, status) = (&object.spec, &object.status);
        let origin_content = spec.origin.as_ref().and_then(|origin| origin.image_digest.as_ref());
        let content = object.content().into_iter().chain(object.next_content());
        let content = content.chain(origin_content).map(Ref::to_content);
        let awaited = object.awaits_memory().map(|origin| &origin.snapshot);
        let awaited = awaited.map(|snapshot| Ref::to::<Snapshot>(Role::AwaitsMemory, snapshot));
        let timeout = spec.auto_standby.as_ref().and_then(AutoStandbyPolicy::timeout);
        let is_counted = status.state == State::Running && timeout.is_some();
        let counted = is_counted.then_some(Ref { role: Role::Counts, target: Target::Connections });
        let images = spec.pending.image.iter().map(|next| &next.image).chain([&spec.allocated.image]);
        let images = images.map(|image| Ref::to::<Image>(Role::Image, image));
        let mounts = spec.volumes.iter().map(VolumeMount::reference);
        let port = spec.allocated.nic.as_ref().filter(|_| object.needs_port());
        let port = port.map(|port| Ref::to::<Nic>(Role::Attaches, port));
        let held = object.holds_resources().then_some(Ref { role: Role::Holds, target: Target::Room });
        let ready = condition::find(&status.conditions, ConditionType::Ready);
        let is_waiting = ready.is_some_and(|ready| ready.reason == Reason::InsufficientResources);
        let waited = is_waiting.then_some(Ref { role: Role::AwaitsRoom, target: Target::Room });
        let room = held.into_iter().chain(waited);
        content.chain(awaited).chain(counted).chain(images).chain(mounts).chain(port).chain(room).collect()
    }

    fn usage(object: &Object<Self>) -> Usage {
        let mut usage = if object.holds_resources() { object.spec.demand() } else { Usage::default() };
        // The disk itself grows when the changes that wait are carried out.
        let overlay = object.spec.pending.overlay.unwrap_or_default();
        usage.overlays += u128::from(overlay.0.saturating_sub(object.spec.overlay.0));
        usage
    }
}
