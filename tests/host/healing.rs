//! The reconcilers on the real ports: damage by others is repaired by the events that it causes, long before the next
//! comparison of everything.

use std::sync::Arc;
use std::time::{Duration, Instant};

use stead::host::monitor::{Notification, monitor_table};
use stead::host::netlink::Netlink;
use stead::host::nft::Nft;
use stead::store::{CuidIds, SystemClock};
use stead_controllers::host::{
    Detour, Firewall, FirewallRules, Forwarding, Limit, Links, NicRule, Shapers, Shaping,
};
use stead_controllers::network::NetworkReconciler;
use stead_controllers::nic::NicReconciler;
use stead_controllers::runtime::{Drift, NoBoundary, Runner, RunnerConfig};
use stead_controllers::sim::World;
use stead_controllers::store::{Kinds, MemoryKv, New, PlainSealer, Store, TxError};
use stead_schemas::condition::is_ready;
use stead_schemas::limits::RESYNC_INTERVAL;
use stead_schemas::names::{Name, Uid};
use stead_schemas::network::{Bandwidth, Lane, Mac, Network, NetworkSpec, Nic, NicSpec};
use stead_schemas::quantity::Rate;
use tokio::sync::mpsc::Receiver;

use crate::guest::{TABLE, bridge, rules};
use crate::namespace::{in_namespace, link_name, netlink, shell, uid};

/// Time limit from the damage to the repaired host, on a machine that others keep busy.
const HEALED_WITHIN: Duration = crate::namespace::PATIENCE;
const _: () =
    assert!(HEALED_WITHIN.as_secs() < RESYNC_INTERVAL.as_secs(), "a comparison could undo the damage");

/// Command that shows everything that the damages change.
const SCRIPT: &str = "ip -o link; bridge -d link; ip -o addr; nft list ruleset; tc qdisc; cat /proc/sys/net/ipv4/ip_forward; \
     tc filter show dev st-tap ingress || true; \
     cat /proc/sys/net/ipv4/conf/st-br/forwarding || true";

/// The real links and tables; the other ports are not used.
#[derive(Clone)]
struct Net {
    links: Netlink,
    firewall: Nft,
    rest: World,
}

stead_controllers::host! { Net, host:
    Links, Shapers: Netlink = host.links;
    Firewall: Nft = host.firewall;
    ..World = host.rest;
}

struct Daemon {
    store: Store,
    links: Netlink,
    firewall: Nft,
}

/// Returns limits of both directions, of which that of the guest's sending is half as high.
fn limits(rate: u64) -> Bandwidth {
    Bandwidth { download: Some(Rate(rate)), upload: Some(Rate(rate / 2)) }
}

fn rule() -> NicRule {
    let address = "10.99.0.2".parse().expect("valid");
    NicRule { tap: link_name("st-tap"), mac: Mac::of_address(address), address, lane: Lane::Direct }
}

impl Daemon {
    fn start() -> Self {
        let kinds = Kinds::new().with::<Network>().with::<Nic>();
        let clock = Arc::new(SystemClock);
        let (store, writer) =
            Store::open(MemoryKv::new(), Arc::new(PlainSealer), clock.clone(), Arc::new(CuidIds), kinds)
                .expect("an empty store opens");
        tokio::spawn(writer.run(std::future::pending()));
        let (links, firewall) = (netlink("test"), Nft::new());
        let host = Net { links: links.clone(), firewall: firewall.clone(), rest: World::new(1) };
        let networks = Runner::new(
            NetworkReconciler { host: host.clone(), store: store.clone() },
            store.clone(),
            clock.clone(),
            Arc::new(NoBoundary),
            RunnerConfig::seeded(1),
        );
        let nics = Runner::new(
            NicReconciler { host: host.clone(), store: store.clone() },
            store.clone(),
            clock,
            Arc::new(NoBoundary),
            RunnerConfig::seeded(2),
        );
        for monitor in [links.monitor(), monitor_table(TABLE)] {
            let monitor = monitor.expect("monitors open");
            tokio::spawn(report(monitor, store.clone(), networks.drift(), nics.drift()));
        }
        tokio::spawn(networks.run(std::future::pending()));
        tokio::spawn(nics.run(std::future::pending()));
        Self { store, links, firewall }
    }

    async fn create(&self) -> (Uid, Uid) {
        let FirewallRules {
            table,
            bridge: name,
            subnet: gateway,
            dns,
            reach,
            is_for_guests_only: _,
            mediator,
        } = rules();
        let (resolver, mtu) = (Default::default(), None);
        let spec = NetworkSpec { bridge: name, gateway, dns, table, reach, resolver, mtu, mediator };
        let NicRule { tap, mac, address, lane: _ } = rule();
        let made = self.store.transact(move |tx| {
            let name = Name::resource("default").expect("valid");
            let (tags, owner) = (Default::default(), None);
            let network = tx.create::<Network>(New { uid: None, name, tags, owner, spec })?.meta.uid.clone();
            let spec = NicSpec {
                network: network.clone(),
                bridge: bridge(),
                tap,
                table: TABLE.to_owned(),
                address,
                mac,
                class: 1,
                has_queues: false,
                bandwidth: limits(12_500_000),
                lane: Default::default(),
            };
            let new =
                New { uid: None, name: Name::from(&uid('p')), tags: Default::default(), owner: None, spec };
            Ok::<_, TxError>((network, tx.create::<Nic>(new)?.meta.uid.clone()))
        });
        made.await.unwrap_or_else(|error| panic!("{error:?}"))
    }

    /// Returns `true` if the host matches the specs, and the statuses say so.
    async fn is_whole(&self, network: &Uid, nic: &Uid) -> bool {
        let is_reported =
            self.store.get::<Network>(network).is_some_and(|it| is_ready(&it.status.conditions))
                && self.store.get::<Nic>(nic).is_some_and(|it| is_ready(&it.status.conditions));
        let forwarding = self.links.forwarding().await.expect("read");
        let tap = Links::inspect(&self.links, &rule().tap).await.expect("read");
        let is_tap_good =
            tap.is_some_and(|tap| tap.is_up && tap.is_isolated && tap.master.as_ref() == Some(&bridge()));
        let link = Links::inspect(&self.links, &bridge()).await.expect("read");
        let is_bridge_good = link.is_some_and(|link| link.is_up && link.addresses == [rules().subnet]);
        let rules = FirewallRules { is_for_guests_only: forwarding != Forwarding::ByHost, ..rules() };
        let shaping = async |link| Shapers::inspect(&self.links, &link).await.expect("read");
        let nic = self.store.get::<Nic>(nic).expect("it is stored");
        let Bandwidth { download, upload } = nic.spec.bandwidth;
        let limit = |rate: Option<Rate>| rate.map_or(Limit::None, Limit::At);
        let detour = upload.map_or(Detour::None, |_| Detour::Through(nic.spec.ifb()));
        let is_limited = shaping(nic.spec.tap.clone()).await == Shaping { limit: limit(download), detour }
            && shaping(nic.spec.ifb()).await.limit == limit(upload);
        let ifb = Links::inspect(&self.links, &nic.spec.ifb()).await.expect("read");
        let is_ifb_good = ifb.map(|ifb| ifb.is_up) == upload.map(|_| true);
        let firewall = self.firewall.inspect(&rules).await.expect("read");
        let is_guarded = firewall.is_some_and(|seen| seen.is_intact && seen.nics == [rule()]);
        let is_shaped = is_limited && is_ifb_good;
        is_reported
            && is_tap_good
            && is_bridge_good
            && is_guarded
            && is_shaped
            && forwarding != Forwarding::Off
    }

    async fn until_whole(&self, network: &Uid, nic: &Uid, within: Duration, after: &str) {
        let start = Instant::now();
        while !self.is_whole(network, nic).await {
            assert!(start.elapsed() < within, "not healed in {within:?} after: {after}");
            // The pause only spares the machine between two polls.
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}

/// Reports what monitors observe, as the daemon does.
async fn report(mut monitor: Receiver<Notification>, store: Store, networks: Drift, nics: Drift) {
    while let Some(notification) = monitor.recv().await {
        match notification {
            Notification::Owner(owner) | Notification::Gone(owner)
                if store.get::<Network>(&owner).is_some() =>
            {
                networks.object(owner)
            }
            Notification::Owner(owner) | Notification::Gone(owner) => nics.object(owner),
            Notification::Nic(tap) => {
                let all = store.list::<Nic>().into_iter().filter(|nic| nic.spec.tap == tap);
                all.for_each(|nic| nics.object(nic.meta.uid.clone()));
            }
            Notification::Lane(address) => {
                let all = store.list::<Nic>().into_iter().filter(|nic| nic.spec.address == address);
                all.for_each(|nic| nics.object(nic.meta.uid.clone()));
            }
            Notification::Host => networks.everything(),
            Notification::Everything => {
                networks.everything();
                nics.everything();
            }
        }
    }
}

#[test]
fn what_is_broken_behind_the_daemon_is_repaired_by_the_events_of_the_damage() {
    in_namespace(async || {
        let daemon = Daemon::start();
        let (network, nic) = daemon.create().await;
        daemon.until_whole(&network, &nic, crate::namespace::PATIENCE, "creation").await;
        for damage in [
            "ip link del st-tap",
            "ip link set st-tap down",
            "ip link set st-tap nomaster",
            "bridge link set dev st-tap isolated off",
            "ip link set st-tap group 0",
            "tc qdisc del dev st-tap root",
            "tc qdisc replace dev st-tap root pfifo",
            "tc qdisc change dev st-tap root handle 5ead: tbf rate 1gbit burst 1mb latency 1s",
            "tc qdisc del dev St-tap root",
            "tc filter del dev st-tap ingress",
            "tc qdisc del dev st-tap clsact",
            "ip link set St-tap down",
            "ip link del St-tap",
            "ip link del St-tap; ip link del st-tap",
            "ip link del st-br",
            "ip link set st-br down",
            "ip addr flush dev st-br",
            "ip addr add 192.0.2.1/24 dev st-br",
            "nft flush table inet steadtest",
            "nft flush table bridge steadtest",
            "nft delete table inet steadtest; nft delete table bridge steadtest",
            "nft add rule bridge steadtest guests accept",
            "nft flush set bridge steadtest ports",
            "nft flush ruleset; ip link del st-br; ip link del st-tap",
            // Switching it on and off also switches it off on the links.
            "echo 1 > /proc/sys/net/ipv4/ip_forward; echo 0 > /proc/sys/net/ipv4/ip_forward",
            "echo 1 > /proc/sys/net/ipv4/ip_forward",
            "echo 0 > /proc/sys/net/ipv4/ip_forward",
        ] {
            // There is no await in between, so nothing is repaired yet.
            let before = shell(SCRIPT);
            shell(damage);
            assert!(shell(SCRIPT) != before, "{damage} did nothing");
            daemon.until_whole(&network, &nic, HEALED_WITHIN, damage).await;
        }

        changed_limits_are_in_force(&daemon, &network, &nic).await;
        strays_are_removed(&daemon).await;

        let (network_of, nic_of) = (network.clone(), nic.clone());
        let deleted = daemon.store.transact(move |tx| {
            tx.request_deletion::<Nic>(&nic_of)?;
            tx.request_deletion::<Network>(&network_of)?;
            Ok::<_, TxError>(())
        });
        deleted.await.unwrap_or_else(|error| panic!("{error:?}"));
        let start = Instant::now();
        while daemon.store.get::<Network>(&network).is_some() || daemon.store.get::<Nic>(&nic).is_some() {
            assert!(start.elapsed() < HEALED_WITHIN, "the records are still there");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        assert_eq!(shell("nft list ruleset"), "");
        assert_eq!(shell("ip -o link | wc -l").trim(), "1", "only lo is left");
    });
}

/// Checks that limits which a client changes or removes are in force, and that nothing of earlier ones is left.
async fn changed_limits_are_in_force(daemon: &Daemon, network: &Uid, nic: &Uid) {
    let download_only = Bandwidth { upload: None, ..limits(1_000_000) };
    for bandwidth in [limits(1_000_000), download_only, Bandwidth::default()] {
        let uid = nic.clone();
        let changed = daemon.store.transact(move |tx| {
            tx.update_spec::<Nic>(&uid, None, |spec| spec.bandwidth = bandwidth)?;
            Ok::<_, TxError>(())
        });
        changed.await.unwrap_or_else(|error| panic!("{error:?}"));
        daemon.until_whole(network, nic, HEALED_WITHIN, &format!("{bandwidth:?}")).await;
    }
}

/// Checks that the links of an object that is in no store are removed, as after the loss of a database.
async fn strays_are_removed(daemon: &Daemon) {
    let mark = "alias stead:test:a23456789012345678901234";
    shell(&format!("ip link add Stray type ifb; ip link set Stray {mark}; ip link set Stray up"));
    let start = Instant::now();
    while Links::inspect(&daemon.links, &link_name("Stray")).await.expect("read").is_some() {
        assert!(start.elapsed() < HEALED_WITHIN, "it is left over");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}
