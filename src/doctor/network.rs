//! The guests' network: whether a route of the host is in its way.

use std::collections::BTreeSet;

use stead_controllers::host::{HostError, Links};

use super::Finding;
use crate::config::Config;
use crate::host::Scope;
use crate::host::netlink::Netlink;

pub(super) async fn examine(config: &Config) -> Vec<Finding> {
    let subnet = config.gateway.subnet();
    match conflicts(config).await {
        Ok(conflicts) if conflicts.is_empty() => {
            vec![Finding::ok("subnet", format!("no route of this host is in the way of {subnet}"))]
        }
        Ok(conflicts) => vec![Finding::problem(
            "subnet",
            format!("the guests' subnet {subnet} overlaps {}", conflicts.join("; ")),
            "set `gateway` to an address in a subnet that nothing else uses",
        )],
        Err(error) => vec![Finding::warning(
            "subnet",
            format!("the host's routes cannot be read: {}", error.chain()),
            "run the doctor as root, in the daemon's network",
        )],
    }
}

/// Describes the routes that overlap the subnet, apart from those of our own bridges.
async fn conflicts(config: &Config) -> Result<Vec<String>, HostError> {
    let netlink = Netlink::new(Scope::new(config.bridge.as_str())?)?;
    let ours: BTreeSet<_> = netlink.list().await?.into_iter().map(|link| link.name).collect();
    let routes = netlink.routes().await?.routes.into_iter();
    let conflicts = routes.filter(|route| {
        route.destination.overlaps(config.gateway)
            && !route.link.as_ref().is_some_and(|link| ours.contains(link))
    });
    let described = conflicts.map(|route| {
        let by = route.link.map(|link| format!(" by {link}")).unwrap_or_default();
        format!("the host's route to {}{by}", route.destination)
    });
    Ok(described.collect())
}
