//! Invariants of limits: the traffic of a card that is in use has exactly the limits of its spec.

use stead_schemas::meta::Object;
use stead_schemas::names::LinkName;
use stead_schemas::network::Nic;
use stead_schemas::quantity::Rate;

use super::{Broken, HostSnapshot};
use crate::host::{Detour, Limit, LinkKind, Shaping};

/// Checks the limits of a nic whose VM or wake listener is there.
pub(super) fn limits(broken: &mut Broken, nic: &Object<Nic>, host: &HostSnapshot) {
    let (spec, uid) = (&nic.spec, &nic.meta.uid);
    let limit = |rate: Option<Rate>| rate.map_or(Limit::None, Limit::At);
    let found = |link: &LinkName| host.shaping.get(link).cloned().unwrap_or_default();
    let ifb = spec.ifb();
    let detour = match spec.bandwidth.upload {
        Some(_) => Detour::Through(ifb.clone()),
        None => Detour::None,
    };
    let (at_tap, at_ifb) = (found(&spec.tap), found(&ifb));
    if at_tap != (Shaping { limit: limit(spec.bandwidth.download), detour }) {
        broken.push(format!("the tap of port {uid} should have {:?} but has {at_tap:?}", spec.bandwidth));
    }
    if at_ifb.limit != limit(spec.bandwidth.upload) {
        broken.push(format!("the ifb of port {uid} should have {:?} but has {at_ifb:?}", spec.bandwidth));
    }
    let link = host.links.iter().find(|link| link.name == ifb);
    let is_good = link.is_some_and(|link| link.kind == LinkKind::Ifb && link.is_up && link.owner == *uid);
    if spec.bandwidth.upload.is_some() && !is_good {
        broken.push(format!("the ifb of port {uid} is {link:?}"));
    }
}
