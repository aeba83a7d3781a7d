//! Addresses of instances, and the networks that contain them.
//!
//! A Linux bridge has 1,023 ports, so a subnet of more addresses is divided into segments of 1,024. The first
//! segment belongs to the default network and its bridge. Each further segment belongs to a network of its
//! own, which is created when the segments before it are full. Guests of different segments are isolated from
//! each other just as guests of the same segment are.
//!
//! ```text
//! default    10.100.0.1/16   bridge stead0     addresses 10.100.0.2 to 10.100.3.255
//! default-1  10.100.4.1/22   bridge stead0-1   addresses 10.100.4.2 to 10.100.7.254
//! ```

use std::net::Ipv4Addr;

use stead_schemas::limits::PORTS_PER_BRIDGE_MAX;
use stead_schemas::meta::Tags;
use stead_schemas::names::{Name, Uid};
use stead_schemas::network::{Cidr, Network, NetworkSpec, Nic};

use crate::refused::Refused;
use crate::store::{New, Tx};

/// Claim table of the addresses of all segments, as numbers.
const ADDRESSES: &str = "port_address";

/// Name of the network of the configuration. The name of a further segment is this name with a number.
pub const DEFAULT_NETWORK: &str = "default";

/// Prefix length of a further segment.
const SEGMENT_PREFIX: u8 = 22;
/// Number of addresses of a segment: one more than a bridge has ports, because the segment's own address is
/// never a guest's.
const SEGMENT_ADDRESSES: u32 = 1 << (32 - SEGMENT_PREFIX);

const _: () = assert!(PORTS_PER_BRIDGE_MAX + 1 == SEGMENT_ADDRESSES as usize, "a segment is one bridge");

/// Claims the lowest free address of the subnet for a port, and creates the segment that contains it if the
/// segment does not exist yet. The work does not grow with the number of segments.
pub(crate) fn assign(tx: &mut Tx<'_>, nic: &Uid) -> Result<(Uid, NetworkSpec, Ipv4Addr), Refused> {
    let name = Name::resource(DEFAULT_NETWORK).map_err(|error| Refused::conflict(error.to_string()))?;
    let default = tx.find::<Network>(&name);
    let default = default.ok_or_else(|| Refused::no_room("there is no network yet"))?;
    let (default, spec) = (&default.meta.uid, &default.spec);
    let subnet = spec.gateway;
    let (network, last) = (u32::from(subnet.network()), u32::from(subnet.broadcast()) - 1);
    let mut from = network + 1;
    while let Some(address) = tx.claim_lowest(ADDRESSES, from..=last, nic) {
        let number = (address - network) / SEGMENT_ADDRESSES;
        if number == 0 {
            return Ok((default.clone(), spec.clone(), address.into()));
        }
        let base = network + number * SEGMENT_ADDRESSES;
        let is_own = own(base).contains(&address);
        if is_own {
            tx.release(ADDRESSES, address, nic);
        }
        match segment(tx, spec, number, base)? {
            Some((uid, spec)) if !is_own => return Ok((uid, spec, address.into())),
            Some((uid, _)) => tx
                .claim(ADDRESSES, address, &uid)
                .map_err(|claimed| Refused::conflict(claimed.to_string()))?,
            None => from = base + SEGMENT_ADDRESSES,
        }
    }
    Err(Refused::no_room(format!("no address of {} is free", subnet.subnet())))
}

/// Returns the addresses of a further segment that no guest gets: the segment's own address, its gateway's
/// address and its broadcast address.
fn own(base: u32) -> [u32; 3] {
    [base, base + 1, base + SEGMENT_ADDRESSES - 1]
}

/// Returns a further segment and creates it if needed, or `None` if another owner has its addresses.
fn segment(
    tx: &mut Tx<'_>,
    default: &NetworkSpec,
    number: u32,
    base: u32,
) -> Result<Option<(Uid, NetworkSpec)>, Refused> {
    let name = Name::resource(&format!("{DEFAULT_NETWORK}-{number}"));
    let name = name.map_err(|error| Refused::conflict(error.to_string()))?;
    if let Some(there) = tx.find::<Network>(&name) {
        return Ok(Some((there.meta.uid.clone(), there.spec.clone())));
    }
    let own = own(base);
    if own.iter().any(|address| tx.claimed_by(ADDRESSES, address).is_some()) {
        return Ok(None);
    }
    let bridge = format!("{}-{number}", default.bridge).parse().map_err(|_| {
        let message =
            format!("all ports of bridge {} are taken, and its name is too long for another", default.bridge);
        Refused::no_room(message)
    })?;
    let spec = NetworkSpec {
        bridge,
        gateway: Cidr { address: Ipv4Addr::from(base + 1), prefix: SEGMENT_PREFIX },
        table: format!("{}_{number}", default.table),
        ..default.clone()
    };
    let new = New { uid: None, name, tags: Tags::new(), owner: None, spec: spec.clone() };
    let uid = tx.create::<Network>(new)?.meta.uid.clone();
    for address in own {
        // The check above found these addresses free, within the same transaction.
        tx.claim(ADDRESSES, address, &uid).map_err(|claimed| Refused::conflict(claimed.to_string()))?;
    }
    Ok(Some((uid, spec)))
}

/// Sets the default network to the configuration and claims the address of its gateway. A network with
/// another bridge, table or gateway is a different network: the earlier network is deleted, with its
/// segments, bridges and tables.
///
/// # Errors
/// Returns an error if instances use the earlier network, or if an instance has the gateway's address.
pub fn declare_network(tx: &mut Tx<'_>, spec: NetworkSpec) -> Result<(), Refused> {
    let name = Name::resource(DEFAULT_NETWORK).map_err(|error| Refused::conflict(error.to_string()))?;
    let gateway = u32::from(spec.gateway.address);
    let earlier = tx.find::<Network>(&name);
    let uid = match earlier.filter(|earlier| is_in_place(&earlier.spec, &spec)) {
        Some(network) => {
            update_segments(tx, &spec)?;
            tx.update_spec::<Network>(&network.meta.uid, None, |old| *old = spec)?
        }
        None => {
            replace_network(tx, &name)?;
            tx.create::<Network>(New { uid: None, name, tags: Tags::new(), owner: None, spec })?
        }
    }
    .meta
    .uid
    .clone();
    tx.claim(ADDRESSES, gateway, &uid)
        .map_err(|claimed| Refused::conflict(format!("the gateway's address is {claimed}")))
}

/// True if both specs name the same objects of the host.
fn is_in_place(old: &NetworkSpec, new: &NetworkSpec) -> bool {
    (&old.bridge, &old.table, old.gateway) == (&new.bridge, &new.table, new.gateway)
}

/// Copies the settings that all segments share from the default network to the further segments.
fn update_segments(tx: &mut Tx<'_>, spec: &NetworkSpec) -> Result<(), Refused> {
    for segment in tx.list::<Network>() {
        if segment.meta.name.as_str() == DEFAULT_NETWORK || segment.meta.is_deleting() {
            continue;
        }
        tx.update_spec::<Network>(&segment.meta.uid, None, |old| {
            old.dns.clone_from(&spec.dns);
            old.reach = spec.reach.clone();
            old.mediator = spec.mediator.clone();
            old.resolver = spec.resolver.clone();
            old.mtu = spec.mtu;
        })?;
    }
    Ok(())
}

/// Requests the deletion of the network of this name and its segments, if they exist.
fn replace_network(tx: &mut Tx<'_>, name: &Name) -> Result<(), Refused> {
    let Some(old) = tx.find::<Network>(name) else { return Ok(()) };
    let nics = tx.list::<Nic>();
    let users = nics.iter().filter(|nic| !nic.meta.is_deleting()).count();
    if users > 0 {
        let NetworkSpec { bridge, gateway, table, .. } = &old.spec;
        return Err(Refused::conflict(format!(
            "the network of bridge {bridge}, gateway {gateway} and table {table} is in use by instances \
             ({users}): configure these again, or delete the instances first"
        )));
    }
    for network in tx.list::<Network>() {
        if network.meta.is_deleting() {
            continue;
        }
        // The record stays until the bridge is gone; its addresses are free now.
        let gateway = u32::from(network.spec.gateway.address);
        for address in own(gateway - 1) {
            tx.release(ADDRESSES, address, &network.meta.uid);
        }
        tx.request_deletion::<Network>(&network.meta.uid)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};
    use std::sync::Arc;

    use jiff::Timestamp;
    use stead_schemas::meta::{Object, OwnerRef};
    use stead_schemas::network::{Bandwidth, Lane};

    use super::*;
    use crate::nic::admission::TapForm;
    use crate::refused::RefusedKind;
    use crate::runtime::{SequentialIds, TokioClock};
    use crate::store::{Kinds, MemoryKv, PlainSealer, Store};

    fn open() -> Store {
        let clock = Arc::new(TokioClock::starting_at(Timestamp::UNIX_EPOCH));
        let ids = Arc::new(SequentialIds::starting_at(1));
        let kinds = Kinds::new().with::<Network>().with::<Nic>();
        let opened = Store::open(MemoryKv::new(), Arc::new(PlainSealer), clock, ids, kinds);
        let (store, writer) = opened.expect("opens");
        tokio::spawn(writer.run(std::future::pending()));
        store
    }

    fn spec(gateway: &str) -> NetworkSpec {
        NetworkSpec {
            bridge: "stead0".parse().expect("valid"),
            gateway: gateway.parse().expect("valid"),
            dns: Vec::new(),
            table: "stead".to_owned(),
            reach: Default::default(),
            resolver: Default::default(),
            mtu: None,
            mediator: None,
        }
    }

    async fn declare(store: &Store, spec: NetworkSpec) {
        store.transact(move |tx| declare_network(tx, spec)).await.expect("declared");
    }

    /// Creates ports that the default network owns, because this test has no instances.
    async fn nics(store: &Store, count: usize) -> Result<(), Refused> {
        let name = Name::resource(DEFAULT_NETWORK).expect("valid");
        let uid = store.find::<Network>(&name).expect("declared").meta.uid.clone();
        let made = store.transact(move |tx| {
            let owner = OwnerRef { kind: "network".to_owned(), uid };
            let form = TapForm {
                prefix: "st",
                has_queues: false,
                bandwidth: Bandwidth::default(),
                lane: Lane::Direct,
            };
            (0..count).try_for_each(|_| crate::nic::admission::create(tx, &owner, form).map(drop))
        });
        made.await.map_err(|error| match error {
            crate::store::TransactError::Refused(refused) => refused,
            crate::store::TransactError::Store(error) => panic!("{error}"),
        })
    }

    fn by_bridge(store: &Store) -> BTreeMap<String, Vec<Arc<Object<Nic>>>> {
        let mut all = BTreeMap::<String, Vec<_>>::new();
        for nic in store.list::<Nic>() {
            all.entry(nic.spec.bridge.to_string()).or_default().push(nic);
        }
        all
    }

    #[tokio::test]
    async fn more_nics_than_one_bridge_holds_are_spread_over_several() {
        let store = open();
        declare(&store, spec("10.100.0.1/16")).await;
        nics(&store, 3000).await.expect("a subnet of 65,534 addresses has room");
        let networks = store.list::<Network>();
        assert_eq!(networks.len(), 3);
        let bridges = by_bridge(&store);
        assert_eq!(
            bridges.keys().map(String::as_str).collect::<Vec<_>>(),
            ["stead0", "stead0-1", "stead0-2"]
        );
        let mut addresses = BTreeSet::new();
        for (bridge, nics) in &bridges {
            assert!(nics.len() <= PORTS_PER_BRIDGE_MAX, "{bridge} has {} ports", nics.len());
            let network =
                networks.iter().find(|network| network.spec.bridge.as_str() == bridge).expect("there");
            for nic in nics {
                let spec = &nic.spec;
                assert!(network.spec.gateway.contains(spec.address), "{spec:?} of {:?}", network.spec);
                assert_eq!((&spec.network, &spec.table), (&network.meta.uid, &network.spec.table));
                let is_own = networks.iter().all(|network| network.spec.gateway.address != spec.address);
                assert!(is_own && addresses.insert(spec.address), "{} has two owners", spec.address);
            }
        }
        // The configuration of the next daemon has another name server for all segments.
        let dns = vec![Ipv4Addr::new(9, 9, 9, 9)];
        declare(&store, NetworkSpec { dns: dns.clone(), ..spec("10.100.0.1/16") }).await;
        assert!(store.list::<Network>().iter().all(|network| network.spec.dns == dns));
    }

    #[tokio::test]
    async fn a_small_subnet_is_one_segment_and_its_end_is_reported() {
        let store = open();
        declare(&store, spec("10.9.0.1/24")).await;
        nics(&store, 253).await.expect("all addresses but the gateway's");
        let refused = nics(&store, 1).await.expect_err("full");
        assert_eq!(refused, Refused::no_room("no address of 10.9.0.0/24 is free"));
        assert_eq!(store.count::<Network>(), 1);
    }

    #[tokio::test]
    async fn a_subnet_whose_gateway_is_elsewhere_skips_that_segment() {
        let store = open();
        declare(&store, spec("10.100.4.1/21")).await;
        nics(&store, 1023).await.expect("the first segment");
        let refused = nics(&store, 1).await.expect_err("the second one is the gateway's");
        assert!(refused.kind == RefusedKind::NoRoom, "{refused:?}");
    }

    #[tokio::test]
    async fn another_configuration_replaces_all_segments_when_nobody_uses_them() {
        let store = open();
        declare(&store, spec("10.100.0.1/16")).await;
        nics(&store, 1100).await.expect("room");
        let moved = spec("10.200.0.1/16");
        let refused = store.transact(move |tx| declare_network(tx, moved)).await;
        assert!(refused.is_err(), "instances use it");
        for nic in store.list::<Nic>() {
            let uid = nic.meta.uid.clone();
            store.transact(move |tx| tx.request_deletion::<Nic>(&uid).map(drop)).await.expect("stored");
        }
        declare(&store, spec("10.200.0.1/16")).await;
        let left: Vec<_> = store.list::<Network>().into_iter().filter(|it| !it.meta.is_deleting()).collect();
        assert_eq!(left.len(), 1);
        assert_eq!(left[0].spec.gateway.to_string(), "10.200.0.1/16");
    }
}
