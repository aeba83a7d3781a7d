//! Changes of an instance that its program cannot see before its next start.
//!
//! Guarantees: a change to what an instance has already does not wait, and a later change of a field replaces an earlier
//! one.

use crate::instance::{CardChange, InstanceSpec, Pending, Secret};

/// The field that connects an instance to the network, as the wire names it.
pub const NETWORK_ENABLED: &str = "network.enabled";

impl Pending {
    #[must_use]
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Lists the fields that change, by their names on the wire.
    #[must_use]
    pub fn fields(&self) -> Vec<&'static str> {
        let Self {
            vcpus,
            memory,
            hotplug,
            overlay,
            env,
            entrypoint,
            cmd,
            hypervisor,
            skip_guest_agent,
            skip_kernel_headers,
            image,
            card,
            restarts: _,
        } = self;
        let fields = [
            ("vcpus", vcpus.is_some()),
            ("size", memory.is_some()),
            ("hotplug_size", hotplug.is_some()),
            ("overlay_size", overlay.is_some()),
            ("env", !env.is_empty()),
            ("entrypoint", entrypoint.is_some()),
            ("cmd", cmd.is_some()),
            ("hypervisor", hypervisor.is_some()),
            ("skip_guest_agent", skip_guest_agent.is_some()),
            ("skip_kernel_headers", skip_kernel_headers.is_some()),
            ("image", image.is_some()),
            (NETWORK_ENABLED, card.is_some()),
        ];
        fields.into_iter().filter_map(|(name, is_changed)| is_changed.then_some(name)).collect()
    }

    fn add(&mut self, newer: Self) {
        fn replace<T>(old: &mut Option<T>, new: Option<T>) {
            if new.is_some() {
                *old = new;
            }
        }
        replace(&mut self.vcpus, newer.vcpus);
        replace(&mut self.memory, newer.memory);
        replace(&mut self.hotplug, newer.hotplug);
        replace(&mut self.overlay, newer.overlay);
        self.env.extend(newer.env);
        replace(&mut self.entrypoint, newer.entrypoint);
        replace(&mut self.cmd, newer.cmd);
        replace(&mut self.hypervisor, newer.hypervisor);
        replace(&mut self.skip_guest_agent, newer.skip_guest_agent);
        replace(&mut self.skip_kernel_headers, newer.skip_kernel_headers);
    }

    /// Drops the changes to what the spec has already.
    fn without_present(self, spec: &InstanceSpec) -> Self {
        fn other<T: PartialEq>(new: Option<T>, present: &T) -> Option<T> {
            new.filter(|new| new != present)
        }
        let is_other = |name: &String, value: &Option<Secret>| spec.env.get(name) != value.as_ref();
        Self {
            vcpus: other(self.vcpus, &spec.vcpus),
            memory: other(self.memory, &spec.memory),
            hotplug: other(self.hotplug, &spec.hotplug),
            overlay: other(self.overlay, &spec.overlay),
            env: self.env.into_iter().filter(|(name, value)| is_other(name, value)).collect(),
            entrypoint: self.entrypoint.filter(|new| spec.entrypoint.as_ref() != Some(new)),
            cmd: self.cmd.filter(|new| spec.cmd.as_ref() != Some(new)),
            hypervisor: other(self.hypervisor, &spec.hypervisor),
            skip_guest_agent: other(self.skip_guest_agent, &spec.skip_guest_agent),
            skip_kernel_headers: other(self.skip_kernel_headers, &spec.skip_kernel_headers),
            image: self.image,
            card: self.card,
            restarts: self.restarts,
        }
    }
}

impl InstanceSpec {
    /// Adds changes that wait for the next start. Image and card stay as they are: admission decides about them.
    pub fn defer(&mut self, newer: Pending) {
        let mut pending = std::mem::take(&mut self.pending);
        pending.add(newer);
        self.pending = pending.without_present(self);
    }

    /// Carries out the changes that waited for a start.
    pub fn apply_pending(&mut self) {
        let changes = std::mem::take(&mut self.pending);
        self.vcpus = changes.vcpus.unwrap_or(self.vcpus);
        self.memory = changes.memory.unwrap_or(self.memory);
        self.hotplug = changes.hotplug.unwrap_or(self.hotplug);
        self.overlay = changes.overlay.unwrap_or(self.overlay);
        for (name, value) in changes.env {
            match value {
                Some(value) => drop(self.env.insert(name, value)),
                None => drop(self.env.remove(&name)),
            }
        }
        self.entrypoint = changes.entrypoint.or_else(|| self.entrypoint.take());
        self.cmd = changes.cmd.or_else(|| self.cmd.take());
        self.hypervisor = changes.hypervisor.unwrap_or(self.hypervisor);
        self.skip_guest_agent = changes.skip_guest_agent.unwrap_or(self.skip_guest_agent);
        self.skip_kernel_headers = changes.skip_kernel_headers.unwrap_or(self.skip_kernel_headers);
        if let Some(next) = changes.image {
            (self.image, self.platform, self.pull) = (next.reference, next.platform, next.pull);
            self.allocated.image = next.image;
            self.image_version += 1;
            // The disk of the origin, and its memory with it, belong to the image before.
            self.origin = None;
        }
        match changes.card {
            Some(CardChange::Add(nic)) => (self.has_network, self.allocated.nic) = (true, Some(nic)),
            Some(CardChange::Remove) => {
                (self.has_network, self.allocated.nic) = (false, None);
                (self.rates.download, self.rates.upload) = (None, None);
            }
            None => {}
        }
    }

    /// Returns the spec as it will be after the next start.
    #[must_use]
    pub fn after_start(&self) -> Self {
        let mut next = self.clone();
        next.apply_pending();
        next
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::instance::Hypervisor;
    use crate::quantity::Bytes;
    use crate::resource::vm_memory;

    fn spec() -> InstanceSpec {
        let spec = serde_json::json!({
            "image": "docker.io/library/alpine:latest", "platform": "linux/amd64", "vcpus": 2, "memory": 1 << 30,
            "overlay": 1 << 30, "env": {"KEPT": "1", "OLD": "1"}, "entrypoint": null, "cmd": ["run"],
            "has_network": false, "hypervisor": "qemu", "skip_guest_agent": false, "skip_kernel_headers": false,
            "power": "running", "power_since": "2026-01-01T00:00:00Z", "run": 1, "is_forced": false,
            "allocated": {"image": "tz4a98xxat96iws9zmbrgj3a", "disk": "tz4a98xxat96iws9zmbrgj3a", "port": null, "cid": 3},
        });
        serde_json::from_value(spec).expect("a record without changes")
    }

    fn variable(name: &str, value: Option<&str>) -> (String, Option<Secret>) {
        (name.to_owned(), value.map(|value| Secret(value.to_owned())))
    }

    #[test]
    fn changes_wait_together_and_are_carried_out_at_once() {
        let mut spec = spec();
        let env = [variable("OLD", None), variable("NEW", Some("2"))].into();
        spec.defer(Pending { vcpus: Some(4), env, ..Pending::default() });
        let env = [variable("NEW", Some("3"))].into();
        let (memory, hotplug) = (Some(Bytes(2 << 30)), Some(Bytes(1 << 30)));
        spec.defer(Pending { memory, hotplug, env, ..Pending::default() });
        assert_eq!(spec.pending.fields(), ["vcpus", "size", "hotplug_size", "env"]);
        assert_eq!((spec.vcpus, spec.memory), (2, Bytes(1 << 30)));
        // What runs counts, and what is to run.
        assert_eq!((spec.demand().vcpus, spec.demand().memory), (4, vm_memory(Bytes(3 << 30))));
        spec.apply_pending();
        assert_eq!((spec.hotplug, spec.hotplug_target(spec.power_since)), (Bytes(1 << 30), Bytes(1 << 30)));
        assert_eq!((spec.vcpus, spec.memory, spec.pending.is_empty()), (4, Bytes(2 << 30), true));
        let names: Vec<_> = spec.env.iter().map(|(name, value)| (name.as_str(), value.0.as_str())).collect();
        assert_eq!(names, [("KEPT", "1"), ("NEW", "3")]);
        assert_eq!((spec.cmd, spec.hypervisor), (Some(vec!["run".to_owned()]), Hypervisor::Qemu));
    }

    #[test]
    fn a_change_to_what_is_there_already_does_not_wait() {
        let mut spec = spec();
        spec.defer(Pending { vcpus: Some(4), skip_guest_agent: Some(true), ..Pending::default() });
        let cmd = Some(vec!["run".to_owned()]);
        let env = [variable("KEPT", Some("1")), variable("ABSENT", None)].into();
        spec.defer(Pending { vcpus: Some(2), cmd, env, ..Pending::default() });
        assert_eq!(spec.pending.fields(), ["skip_guest_agent"]);
        spec.defer(Pending { hotplug: Some(Bytes(0)), ..Pending::default() });
        assert_eq!(spec.pending.fields(), ["skip_guest_agent"]);
        assert_eq!(spec.demand().vcpus, 2);
    }
}
