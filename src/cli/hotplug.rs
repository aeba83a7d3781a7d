//! Hotplug memory, as flags of `run` and `update` and as a line of `describe`.

use clap::Args;
use serde_json::Value;
use stead_schemas::api::Instance;
use stead_schemas::quantity::Bytes;

#[derive(Debug, Args)]
pub(crate) struct Hotplug {
    /// Memory on top of --memory that the guest can give back and get again while it runs, such as 3GB.
    #[arg(long)]
    hotplug_size: Option<String>,
    /// The part of the hotplug memory that the guest should have.
    #[arg(long)]
    hotplugged_size: Option<String>,
}

impl Hotplug {
    /// Adds the given flags to a request; the server validates the values.
    pub(super) fn put(&self, body: &mut Value) {
        for (key, size) in [("hotplug_size", &self.hotplug_size), ("hotplugged_size", &self.hotplugged_size)]
        {
            if let Some(size) = size {
                body[key] = size.as_str().into();
            }
        }
    }
}

/// Returns the hotplug memory of an instance in words, or `None` without any.
pub(super) fn summary(instance: &Instance) -> Option<String> {
    let (all, part) = (instance.hotplug_size.as_ref()?, instance.hotplugged_size.as_ref()?);
    let used = instance.hotplugged_bytes.map(|bytes| format!(", {} used", Bytes(bytes)));
    Some(format!("{part} of {all}{}", used.unwrap_or_default()))
}
