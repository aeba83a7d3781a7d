//! Changes that wait for the next start of an instance, and the times at which changes apply, as clients read them.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::instance::{CardChange, Hypervisor, Pending, Secret};
use crate::quantity::Bytes;

/// Text instead of a secret value.
pub const MASK: &str = "***";

/// The time at which a change applies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[schemars(rename = "ChangeApplies")]
#[serde(rename_all = "snake_case")]
pub enum Applies {
    /// The change applies already.
    Now,
    /// The program is started again for it.
    WithRestart,
    /// The program sees the change from its next start on.
    AtNextStart,
}

/// The changes of an instance that wait for its next start, with their new values.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[schemars(rename = "PendingChanges")]
pub struct PendingView {
    /// New number of virtual CPUs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vcpus: Option<u32>,
    /// New memory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size: Option<String>,
    /// New hotplug memory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hotplug_size: Option<String>,
    /// New size of the writable layer over the image.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub overlay_size: Option<String>,
    /// Names of variables that change. Their values are not shown; null stands for a variable that is removed.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, Option<String>>,
    /// New entrypoint.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub entrypoint: Option<Vec<String>>,
    /// New command.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cmd: Option<Vec<String>>,
    /// New program that runs the VM.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hypervisor: Option<Hypervisor>,
    /// True if the agent is left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub skip_guest_agent: Option<bool>,
    /// True if the headers of the kernel are left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub skip_kernel_headers: Option<bool>,
    /// New image, normalised. The root file system begins anew with it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<String>,
    /// New connection to the network.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network: Option<NetworkChangeView>,
}

/// A change of an instance's connection to the network that waits for its next start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[schemars(rename = "PendingNetwork")]
pub struct NetworkChangeView {
    /// True if the instance will be connected to the network of the host.
    pub enabled: bool,
}

impl PendingView {
    /// Returns the changes, or `None` if there are none.
    #[must_use]
    pub fn of(pending: &Pending) -> Option<Self> {
        if pending.is_empty() {
            return None;
        }
        let mask = |value: &Option<Secret>| value.as_ref().map(|_| MASK.to_owned());
        Some(Self {
            vcpus: pending.vcpus,
            size: pending.memory.as_ref().map(Bytes::to_string),
            hotplug_size: pending.hotplug.as_ref().map(Bytes::to_string),
            overlay_size: pending.overlay.as_ref().map(Bytes::to_string),
            env: pending.env.iter().map(|(name, value)| (name.clone(), mask(value))).collect(),
            entrypoint: pending.entrypoint.clone(),
            cmd: pending.cmd.clone(),
            hypervisor: pending.hypervisor,
            skip_guest_agent: pending.skip_guest_agent,
            skip_kernel_headers: pending.skip_kernel_headers,
            image: pending.image.as_ref().map(|next| next.reference.to_string()),
            network: pending
                .card
                .as_ref()
                .map(|card| NetworkChangeView { enabled: *card != CardChange::Remove }),
        })
    }
}
