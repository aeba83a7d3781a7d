//! Observations of a network.

use stead_schemas::meta::Object;
use stead_schemas::names::{LinkName, Uid};
use stead_schemas::network::Network;

use super::{NetworkReconciler, rules};
use crate::host::{
    Firewall, FirewallSeen, Forwarding, Host, HostError, Link, LinkKind, Links, Route, Routes,
};

/// The state of bridge, tables and forwarding, and the conflicts of the subnet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Observed {
    /// The link of the desired name, whichever object of ours it was made for. Without a record it is the
    /// bridge that was made for this uid.
    pub bridge: Option<Link>,
    pub firewall: Option<FirewallSeen>,
    /// True if another network that is not being deleted has its tables under the same name.
    pub is_table_shared: bool,
    pub forwarding: Forwarding,
    pub uplink_mtu: Option<u32>,
    /// Routes of the host by other links that overlap the subnet.
    pub conflicts: Vec<Route>,
}

pub(super) async fn observe<H: Host>(
    reconciler: &NetworkReconciler<H>,
    uid: &Uid,
    object: Option<&Object<Network>>,
) -> Result<Observed, HostError> {
    let (links, firewall, store) = (reconciler.host.links(), reconciler.host.firewall(), &reconciler.store);
    let Some(object) = object else {
        let mut all = links.list().await?.into_iter();
        let bridge = all.find(|link| link.owner == *uid && link.kind == LinkKind::Bridge);
        let nothing = Observed {
            bridge,
            firewall: None,
            is_table_shared: false,
            forwarding: Forwarding::ForGuests,
            uplink_mtu: None,
            conflicts: Vec::new(),
        };
        return Ok(nothing);
    };
    let spec = &object.spec;
    let bridge = links.inspect(&spec.bridge).await?;
    let forwarding = links.forwarding().await?;
    let firewall = firewall.inspect(&rules(object, forwarding)).await?;
    let networks = store.list::<Network>();
    let is_table_shared = networks
        .iter()
        .any(|other| other.meta.uid != *uid && !other.meta.is_deleting() && other.spec.table == spec.table);
    let Routes { routes: mut conflicts, uplink_mtu } = links.routes().await?;
    // The segments of one subnet overlap it, but each is on a bridge of ours.
    let is_ours = |link: &LinkName| networks.iter().any(|network| network.spec.bridge == *link);
    conflicts.retain(|route| {
        route.destination.overlaps(spec.gateway) && !route.link.as_ref().is_some_and(is_ours)
    });
    Ok(Observed { bridge, firewall, is_table_shared, forwarding, uplink_mtu, conflicts })
}
