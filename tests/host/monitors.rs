//! Monitors: drift of links and tables is reported in under a second.

use std::time::Duration;

use stead::host::monitor::{Notification, monitor_table};
use stead_controllers::host::{Firewall, LinkChange, LinkKind, LinkPlan, Links, Shapers};
use tokio::sync::mpsc::Receiver;
use tokio::time::timeout;

use crate::guest::{Network, TABLE};
use crate::namespace::{in_namespace, link_name, netlink, shell, uid};

/// Time limit for noticing drift, as the issue demands.
const SOON: Duration = Duration::from_secs(1);

async fn receives(monitor: &mut Receiver<Notification>, wanted: &Notification) {
    let wait = async { while monitor.recv().await.expect("the monitor goes on") != *wanted {} };
    assert!(timeout(SOON, wait).await.is_ok(), "{wanted:?} was not reported");
}

/// Takes the reports gathered so far, so that the next report is about a new change.
async fn settle(monitor: &mut Receiver<Notification>) {
    while timeout(Duration::from_millis(300), monitor.recv()).await.is_ok() {}
}

#[test]
fn changes_of_our_links_are_notified_by_owner_and_of_other_scopes_not() {
    in_namespace(async || {
        let links = netlink("test");
        let mut monitor = links.monitor().expect("opened");
        let plan = |owner, name| LinkPlan {
            name: link_name(name),
            owner: uid(owner),
            kind: LinkKind::Tap,
            has_queues: false,
        };
        links.create(&plan('t', "st-tap")).await.expect("made");
        links.change(&link_name("st-tap"), &LinkChange::Up).await.expect("raised");
        receives(&mut monitor, &Notification::Owner(uid('t'))).await;
        settle(&mut monitor).await;
        netlink("test2").create(&plan('u', "st-tap2")).await.expect("made");
        shell("ip link set st-tap2 up; ip link set st-tap down");
        let first = timeout(SOON, monitor.recv()).await.expect("heard soon").expect("the monitor goes on");
        assert_eq!(first, Notification::Owner(uid('t')), "the other scope's link says nothing");
        settle(&mut monitor).await;
        shell("ip link add br0 type bridge; ip link set st-tap master br0");
        settle(&mut monitor).await;
        shell("bridge link set dev st-tap isolated on");
        receives(&mut monitor, &Notification::Nic(link_name("st-tap"))).await;
        settle(&mut monitor).await;
        shell("ip link del st-tap");
        receives(&mut monitor, &Notification::Gone(uid('t'))).await;
        shell("ip link set lo up; ip addr add 192.0.2.1/32 dev lo");
        receives(&mut monitor, &Notification::Host).await;
        // A new namespace begins with the host's setting.
        shell("echo 0 > /proc/sys/net/ipv4/ip_forward");
        settle(&mut monitor).await;
        for value in [1, 0] {
            shell(&format!("echo {value} > /proc/sys/net/ipv4/ip_forward"));
            receives(&mut monitor, &Notification::Host).await;
        }
    });
}

#[test]
fn limits_that_others_change_are_notified_by_owner_and_our_own_changes_are_not() {
    in_namespace(async || {
        let links = netlink("test");
        let mut monitor = links.monitor().expect("opened");
        let taps = [('t', link_name("st-tap")), ('u', link_name("st-tap2"))];
        let ifb = link_name("St-tap2");
        for (owner, name, kind) in [
            (taps[0].0, &taps[0].1, LinkKind::Tap),
            (taps[1].0, &taps[1].1, LinkKind::Tap),
            (taps[1].0, &ifb, LinkKind::Ifb),
        ] {
            let plan = LinkPlan { name: name.clone(), owner: uid(owner), kind, has_queues: false };
            links.create(&plan).await.expect("made");
        }
        let limit = "10Mbps".parse().expect("valid");
        links.limit(&taps[1].1, limit).await.expect("limited");
        links.divert(&taps[1].1, &ifb).await.expect("diverted");
        settle(&mut monitor).await;
        shell("tc qdisc add dev lo root pfifo; tc qdisc del dev lo root");
        for damage in [
            "tc qdisc change dev st-tap2 root handle 5ead: tbf rate 1mbit burst 10kb latency 10ms",
            "tc qdisc replace dev st-tap2 root pfifo",
            "tc qdisc del dev st-tap2 root",
            "tc filter del dev st-tap2 ingress",
            "tc qdisc del dev st-tap2 clsact",
        ] {
            // Our own change of another TAP comes first.
            links.limit(&taps[0].1, limit).await.expect("limited");
            Shapers::inspect(&links, &taps[0].1).await.expect("read");
            shell(damage);
            let first =
                timeout(SOON, monitor.recv()).await.expect("heard soon").expect("the monitor goes on");
            assert_eq!(first, Notification::Owner(uid('u')), "{damage}");
            settle(&mut monitor).await;
        }
        shell("ip link del St-tap2");
        receives(&mut monitor, &Notification::Gone(uid('u'))).await;
    });
}

#[test]
fn changes_of_our_tables_are_notified_and_lost_ports_by_name() {
    in_namespace(async || {
        let network = Network::new().await;
        let guest = network.guest(2, true).await;
        let mut monitor = monitor_table(TABLE).expect("opened");
        shell("nft add table inet other; nft add chain inet other c; nft delete table inet other");
        network.firewall.remove_nic(TABLE, &guest.rule).await.expect("removed");
        let first = timeout(SOON, monitor.recv()).await.expect("heard soon").expect("the monitor goes on");
        assert_eq!(first, Notification::Nic(guest.rule.tap.clone()), "other tables say nothing");
        for damage in ["flush table inet steadtest", "delete table bridge steadtest"] {
            shell(&format!("nft '{damage}'"));
            receives(&mut monitor, &Notification::Everything).await;
            settle(&mut monitor).await;
        }
    });
}
