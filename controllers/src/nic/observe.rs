//! Observations of a port.

use stead_schemas::condition::{self, ConditionStatus, ConditionType};
use stead_schemas::instance::Instance;
use stead_schemas::meta::Object;
use stead_schemas::names::Uid;
use stead_schemas::network::{Network, Nic};
use stead_schemas::references::{Ref, Role};

use super::{NicReconciler, rule};
use crate::host::{Firewall, Host, HostError, Limit, Link, LinkKind, Links, Shapers, Shaping};

/// The state of TAP, rule, limits and network.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Observed {
    pub is_network_ready: bool,
    /// The reason that the network gives for not being ready.
    pub network_trouble: Option<String>,
    pub is_needed: bool,
    /// The link of the desired name; without a record, the TAP that was made for this uid.
    pub tap: Option<Link>,
    pub has_rule: bool,
    /// The rules for the TAP's traffic; empty without a TAP.
    pub shaping: Shaping,
    /// The link of the name that the IFB has; without a record, the IFB that was made for this uid.
    pub ifb: Option<Link>,
    /// The limit of the IFB, which limits what the guest sends.
    pub ifb_limit: Limit,
}

pub(super) async fn observe<H: Host>(
    reconciler: &NicReconciler<H>,
    uid: &Uid,
    object: Option<&Object<Nic>>,
) -> Result<Observed, HostError> {
    let (links, firewall, store) = (reconciler.host.links(), reconciler.host.firewall(), &reconciler.store);
    let Some(object) = object else {
        // The rule is not known without a record. It names a TAP that is gone and whose name, derived from
        // the uid, never returns, so it allows no traffic.
        let all = links.list().await?;
        let find = |kind| all.iter().find(|link| link.owner == *uid && link.kind == kind).cloned();
        let nothing = Observed {
            is_network_ready: false,
            network_trouble: None,
            is_needed: false,
            tap: find(LinkKind::Tap),
            has_rule: false,
            shaping: Shaping::default(),
            ifb: find(LinkKind::Ifb),
            ifb_limit: Limit::None,
        };
        return Ok(nothing);
    };
    let network = store.get::<Network>(&object.spec.network);
    let owner = object.meta.owner.as_ref();
    let is_orphan = owner.is_none_or(|owner| store.get::<Instance>(&owner.uid).is_none());
    let not_ready = network.as_ref().and_then(|network| {
        condition::find(&network.status.conditions, ConditionType::Ready)
            .filter(|ready| ready.status != ConditionStatus::True && !ready.message.is_empty())
    });
    let (tap, ifb) = (links.inspect(&object.spec.tap).await?, links.inspect(&object.spec.ifb()).await?);
    let shapers = reconciler.host.shapers();
    let shaping = match &tap {
        Some(tap) => shapers.inspect(&tap.name).await?,
        None => Shaping::default(),
    };
    let ifb_limit = match &ifb {
        Some(ifb) => shapers.inspect(&ifb.name).await?.limit,
        None => Limit::None,
    };
    Ok(Observed {
        network_trouble: not_ready.map(|ready| ready.message.clone()),
        is_network_ready: network.is_some_and(|network| {
            !network.meta.is_deleting() && condition::is_ready(&network.status.conditions)
        }),
        // A port without an instance is about to be deleted.
        is_needed: is_orphan || store.is_referred_to(&Ref::to::<Nic>(Role::Attaches, uid)),
        tap,
        has_rule: firewall.has_nic(&object.spec.table, &rule(object)).await?,
        shaping,
        ifb,
        ifb_limit,
    })
}
