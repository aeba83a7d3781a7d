//! Limits of an instance's traffic, as flags of `run` and `update` and as a line of `describe`.

use clap::Args;
use serde_json::Value;
use stead_schemas::api::NetworkView;

#[derive(Debug, Args)]
pub(crate) struct Bandwidth {
    /// Limit of the traffic to the instance, such as 100Mbps or 12MB/s; 0 for no limit.
    #[arg(long)]
    bandwidth_down: Option<String>,
    /// Limit of the traffic from the instance.
    #[arg(long)]
    bandwidth_up: Option<String>,
}

impl Bandwidth {
    /// Adds the given flags to a request; the server validates the values.
    pub(super) fn put(&self, body: &mut Value) {
        for (key, limit) in
            [("bandwidth_download", &self.bandwidth_down), ("bandwidth_upload", &self.bandwidth_up)]
        {
            if let Some(limit) = limit {
                body["network"][key] = limit.as_str().into();
            }
        }
    }
}

/// Returns the limits in words, or `None` without any.
pub(super) fn summary(network: &NetworkView) -> Option<String> {
    let limits = [(&network.bandwidth_download, "down"), (&network.bandwidth_upload, "up")];
    let limits: Vec<String> =
        limits.iter().filter_map(|(limit, way)| Some(format!("{} {way}", limit.as_ref()?))).collect();
    (!limits.is_empty()).then(|| limits.join(", "))
}
