//! Admission of ports. Only the admission of instances makes ports.

use stead_schemas::egress::EgressSpec;
use stead_schemas::instance::{Hypervisor, Rates};
use stead_schemas::meta::{Object, OwnerRef, Tags};
use stead_schemas::names::{LinkName, Name, Uid};
use stead_schemas::network::{Bandwidth, Lane, Mac, Nic, NicSpec};
use stead_schemas::node::{Accelerator, Node};
use stead_schemas::quantity::Rate;

use crate::mediation::admission as mediations;
use crate::network::admission as networks;
use crate::node::admission as nodes;
use crate::refused::Refused;
use crate::store::{New, Tx};

/// Claim table of traffic classes. Minor numbers have 16 bits; the kernel uses the first and the last itself.
const CLASSES: &str = "shaping_class";
const CLASS_FIRST: u32 = 1;
const CLASS_LAST: u32 = 0xfffe;

/// The form of the TAP of a new port.
#[derive(Debug, Clone, Copy)]
pub(crate) struct TapForm<'a> {
    /// Beginning of the TAP's name.
    pub(crate) prefix: &'a str,
    /// True if the TAP can have several queues.
    pub(crate) has_queues: bool,
    pub(crate) bandwidth: Bandwidth,
    pub(crate) lane: Lane,
}

impl<'a> TapForm<'a> {
    /// Returns the form for an instance. Emulated guests have one queue: their processors are slower than the thread
    /// that moves the frames. An instance with one processor has one queue too, because the kernel takes some 6 MiB
    /// for a TAP that can have several (measured: it prepares 256).
    ///
    /// # Errors
    /// Returns the refusal of a hypervisor without a driver, and of a host that was not observed yet.
    pub(crate) fn new(
        tx: &Tx<'_>,
        prefix: &'a str,
        hypervisor: Hypervisor,
        vcpus: u32,
        rates: &Rates,
        egress: Option<&EgressSpec>,
    ) -> Result<Self, Refused> {
        let node = nodes::local(tx)?;
        let is_executed = node.status.accelerator == Some(Accelerator::Kvm);
        let can_have = nodes::declared(&node, hypervisor)?.card_queues_max > 1;
        let has_queues = is_executed && can_have && vcpus > 1;
        let lane = egress.map(Lane::from).unwrap_or_default();
        Ok(Self { prefix, has_queues, bandwidth: bandwidth(&node, rates, vcpus), lane })
    }
}

/// Stores the spec of a new port with its address, on the first segment of the network that has room.
pub(crate) fn create(tx: &mut Tx<'_>, owner: &OwnerRef, form: TapForm<'_>) -> Result<Uid, Refused> {
    let uid = tx.next_uid();
    let (network, spec, address) = networks::assign(tx, &uid)?;
    let tap: Result<LinkName, _> = format!("{}{}", form.prefix, uid.short()).parse();
    let spec = NicSpec {
        network,
        bridge: spec.bridge,
        tap: tap.map_err(|error| Refused::conflict(format!("the TAP prefix {error}")))?,
        table: spec.table,
        address,
        mac: Mac::of_address(address),
        class: class(tx, &uid)?,
        has_queues: form.has_queues,
        bandwidth: form.bandwidth,
        lane: form.lane,
    };
    let name = Name::from(&uid);
    let new = New { uid: Some(uid.clone()), name, tags: Tags::new(), owner: Some(owner.clone()), spec };
    tx.create::<Nic>(new)?;
    if form.lane != Lane::Direct {
        mediations::create(tx, &owner.uid, &uid, address)?;
    }
    Ok(uid)
}

/// Leads the traffic of a port as an instance with this egress needs it.
pub(crate) fn lead(
    tx: &mut Tx<'_>,
    instance: &Uid,
    nic: &Uid,
    egress: Option<&EgressSpec>,
) -> Result<(), Refused> {
    let lane = egress.map(Lane::from).unwrap_or_default();
    let Some(before) = tx.get::<Nic>(nic).filter(|before| before.spec.lane != lane) else { return Ok(()) };
    tx.update_spec::<Nic>(nic, None, |spec| spec.lane = lane)?;
    match (before.spec.lane, lane) {
        (Lane::Direct, _) => mediations::create(tx, instance, nic, before.spec.address),
        (_, Lane::Direct) => mediations::remove(tx, nic),
        _ => Ok(()),
    }
}

/// Changes the limits of a port to those of an instance with these rates and processors.
pub(crate) fn limit(tx: &mut Tx<'_>, nic: &Uid, rates: &Rates, vcpus: u32) -> Result<(), Refused> {
    let node = nodes::local(tx)?;
    let bandwidth = bandwidth(&node, rates, vcpus);
    tx.update_spec::<Nic>(nic, None, |spec| spec.bandwidth = bandwidth)?;
    Ok(())
}

/// Returns the limits of an instance: those that its rates name, and otherwise the default of the node.
fn bandwidth(node: &Object<Node>, rates: &Rates, vcpus: u32) -> Bandwidth {
    let default = node.default_bandwidth(vcpus);
    let limit = |asked: Option<Rate>| asked.or(default).filter(|rate| rate.0 > 0);
    Bandwidth { download: limit(rates.download), upload: limit(rates.upload) }
}

fn class(tx: &mut Tx<'_>, nic: &Uid) -> Result<u16, Refused> {
    let class = tx.claim_lowest(CLASSES, CLASS_FIRST..=CLASS_LAST, nic);
    let class = class.and_then(|class| u16::try_from(class).ok());
    class.ok_or_else(|| Refused::no_room("no traffic class is free"))
}
