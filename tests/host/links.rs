//! Links: the promises of the port, on real interfaces.

use std::pin::Pin;
use std::task::{Context, Poll};

use stead_controllers::host::{
    Forwarding, HostErrorKind, LinkChange, LinkKind, LinkPlan, Links, Route, Routes,
};
use stead_schemas::network::Cidr;
use stead_schemas::quantity::Rate;

use crate::namespace::{in_namespace, link_name, netlink, shell, uid};

fn bridge(owner: char) -> LinkPlan {
    LinkPlan { name: link_name("st-br"), owner: uid(owner), kind: LinkKind::Bridge, has_queues: false }
}

fn tap(owner: char) -> LinkPlan {
    LinkPlan { name: link_name("st-tap"), owner: uid(owner), kind: LinkKind::Tap, has_queues: false }
}

fn ifb(owner: char) -> LinkPlan {
    LinkPlan { name: link_name("St-tap"), owner: uid(owner), kind: LinkKind::Ifb, has_queues: false }
}

fn cidr(text: &str) -> Cidr {
    text.parse().expect("valid")
}

#[test]
fn a_bridge_and_a_tap_live_from_create_to_remove() {
    in_namespace(async || {
        let links = netlink("test");
        for plan in [bridge('b'), tap('t')] {
            assert_eq!(links.inspect(&plan.name).await.expect("read"), None);
            links.create(&plan).await.expect("made");
            links.create(&plan).await.expect("making it again is nothing");
            let made = links.inspect(&plan.name).await.expect("read").expect("there");
            assert_eq!((&made.name, &made.owner, made.kind), (&plan.name, &plan.owner, plan.kind));
            assert!(!made.is_up && !made.is_isolated && made.master.is_none() && made.addresses.is_empty());
        }
        let (bridge, tap) = (bridge('b').name, tap('t').name);
        // The view of devices that belongs to this network.
        let view = "at=$(mktemp -d); mount -t sysfs sysfs $at; cat $at/class/net";
        let owner = shell(&format!("{view}/{}/owner; umount $at; rmdir $at", tap.as_str()));
        assert_eq!(owner.trim(), "0", "no VMM may attach to it");
        let changes = [
            (&bridge, LinkChange::AddAddress(cidr("10.99.0.1/24"))),
            (&bridge, LinkChange::AddAddress(cidr("10.99.0.1/24"))),
            (&bridge, LinkChange::AddAddress(cidr("10.98.0.1/24"))),
            (&bridge, LinkChange::RemoveAddress(cidr("10.98.0.1/24"))),
            (&bridge, LinkChange::RemoveAddress(cidr("10.97.0.1/24"))),
            (&bridge, LinkChange::Up),
            (&tap, LinkChange::Master(bridge.clone())),
            (&tap, LinkChange::Isolated),
            (&tap, LinkChange::Up),
        ];
        for (name, change) in &changes {
            links.change(name, change).await.unwrap_or_else(|error| panic!("{change:?}: {}", error.chain()));
        }
        let all = links.list().await.expect("listed");
        assert_eq!(all.len(), 2);
        let seen = all.iter().find(|link| link.name == bridge).expect("listed");
        assert!(seen.is_up && seen.addresses == [cidr("10.99.0.1/24")], "{seen:?}");
        let seen = all.iter().find(|link| link.name == tap).expect("listed");
        assert!(seen.is_up && seen.is_isolated && seen.master.as_ref() == Some(&bridge), "{seen:?}");
        assert_eq!(links.inspect(&tap).await.expect("read").as_ref(), Some(seen));
        assert_eq!(shell("ip -6 addr show dev st-br; ip -6 addr show dev st-tap"), "", "IPv6 is silent");

        links.remove(&bridge).await.expect("removed");
        let orphan = links.inspect(&tap).await.expect("read").expect("there");
        assert!(orphan.master.is_none() && !orphan.is_isolated, "{orphan:?}");
        let error = links.change(&tap, &LinkChange::Isolated).await.expect_err("it is on no bridge");
        assert_eq!(error.kind, HostErrorKind::Missing);
        let error = links.change(&bridge, &LinkChange::Up).await.expect_err("it is gone");
        assert_eq!(error.kind, HostErrorKind::Missing);
        links.remove(&tap).await.expect("removed");
        links.remove(&tap).await.expect("removing it again is nothing");
        assert_eq!(links.list().await.expect("listed"), []);
        assert_eq!(shell("ip -o link | wc -l").trim(), "1", "only lo is left");
    });
}

#[test]
fn a_foreign_link_of_our_name_is_a_conflict_and_stays_as_it_is() {
    in_namespace(async || {
        let links = netlink("test");
        for kind in ["veth", "bridge"] {
            for plan in [bridge('b'), tap('t')] {
                let name = &plan.name;
                shell(&format!("ip link add {name} type {kind}; ip link set {name} alias 'somebody: else'"));
                let before = shell(&format!("ip -d -o link show {name}"));
                assert_eq!(links.inspect(name).await.expect("read"), None);
                let errors = [
                    links.create(&plan).await.expect_err("taken"),
                    links.change(name, &LinkChange::Up).await.expect_err("not ours"),
                    links.remove(name).await.expect_err("not ours"),
                ];
                assert!(errors.iter().all(|error| error.kind == HostErrorKind::Conflict), "{errors:?}");
                assert_eq!(shell(&format!("ip -d -o link show {name}")), before);
                shell(&format!("ip link del {name}"));
            }
        }
    });
}

#[test]
fn links_of_another_scope_or_object_are_not_ours() {
    in_namespace(async || {
        let (ours, theirs) = (netlink("test"), netlink("test2"));
        theirs.create(&bridge('b')).await.expect("made");
        assert_eq!(ours.list().await.expect("listed"), []);
        assert_eq!(ours.inspect(&bridge('b').name).await.expect("read"), None);
        let error = ours.remove(&bridge('b').name).await.expect_err("not ours");
        assert_eq!(error.kind, HostErrorKind::Conflict);
        ours.create(&tap('t')).await.expect("made");
        let error = ours.change(&tap('t').name, &LinkChange::Master(bridge('b').name)).await;
        assert_eq!(error.expect_err("the bridge is not ours").kind, HostErrorKind::Conflict);
        let error = theirs.create(&tap('t')).await.expect_err("taken");
        assert_eq!(error.kind, HostErrorKind::Conflict);
        let error = ours.create(&tap('u')).await.expect_err("made for another object");
        assert_eq!(error.kind, HostErrorKind::Conflict);
    });
}

#[test]
fn a_bridge_whose_making_was_interrupted_is_completed_or_removed() {
    in_namespace(async || {
        let links = netlink("test");
        let plan = bridge('b');
        for is_completed in [true, false] {
            links.create(&plan).await.expect("made");
            // This is the bridge's state between its creation and its alias.
            shell("ip link set st-br alias ''");
            assert_eq!(links.inspect(&plan.name).await.expect("read"), None);
            let other = netlink("test2").remove(&plan.name).await.expect_err("another scope's");
            assert_eq!(other.kind, HostErrorKind::Conflict);
            if is_completed {
                links.create(&plan).await.expect("completed");
                let seen = links.inspect(&plan.name).await.expect("read").expect("there");
                assert_eq!(seen.owner, plan.owner);
            }
            links.remove(&plan.name).await.expect("removed");
            assert_eq!(shell("ip -o link | wc -l").trim(), "1");
        }
    });
}

/// Number of polls that exceeds the awaits of a create: the last attempts are not interrupted.
const POLLS_MAX: usize = 12;

/// A wrapper that drops the future after a number of polls.
struct Polls<Inner> {
    future: Pin<Box<Inner>>,
    left: usize,
}

impl<Inner: Future> Future for Polls<Inner> {
    type Output = Option<Inner::Output>;
    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        if self.left == 0 {
            return Poll::Ready(None);
        }
        self.left -= 1;
        self.future.as_mut().poll(context).map(Some)
    }
}

#[test]
fn a_create_that_is_dropped_at_any_await_leaves_nothing_that_is_not_ours() {
    in_namespace(async || {
        let links = netlink("test");
        for plan in [tap('t'), bridge('b'), ifb('i')] {
            for left in 0..POLLS_MAX {
                let future = Box::pin(links.create(&plan));
                let done = Polls { future, left }.await;
                if let Some(done) = done {
                    done.unwrap_or_else(|error| panic!("after {left} polls: {}", error.chain()));
                }
                // Requests that were sent are carried out; the list comes after them.
                links.list().await.expect("listed");
                if plan.kind == LinkKind::Tap {
                    let unmarked = shell("ip -o link show type tun | grep -v 'alias stead:test:' || true");
                    assert_eq!(unmarked, "", "after {left} polls");
                }
                links.remove(&plan.name).await.expect("whatever is there is ours");
                assert_eq!(shell("ip -o link | wc -l").trim(), "1", "after {left} polls");
            }
        }
    });
}

#[test]
fn the_speed_of_an_uplink_is_that_of_the_slowest_default_route_with_a_real_one() {
    in_namespace(async || {
        let links = netlink("test");
        let speed = async || links.uplink_speed().await.unwrap_or_else(|error| panic!("{}", error.chain()));
        assert_eq!(speed().await, None, "there is no route");
        shell("ip link add up0 type veth peer up1; ip link set up1 up; ip link set up0 up");
        shell("ip addr add 192.0.2.1/24 dev up0; ip route add default via 192.0.2.254 metric 9");
        links.create(&tap('t')).await.expect("made");
        shell("ip link set st-tap up; ip route add default dev st-tap metric 8");
        assert_eq!(speed().await, None, "the kernel makes up a speed of virtual links");
        shell(
            "ip link add up2 link up1 type macvlan; ip link set up2 up; ip route add default dev up2 metric 7",
        );
        let shown: u64 = shell("cat /sys/class/net/up2/speed").trim().parse().expect("a speed");
        assert_eq!(speed().await, Some(Rate(shown * 125_000)));
        shell("ip route del default metric 7");
        assert_eq!(speed().await, None);
    });
}

#[test]
fn routes_are_those_with_a_destination_and_forwarding_is_switched_on() {
    in_namespace(async || {
        let links = netlink("test");
        shell("ip link add up0 type veth peer up1; ip link set up1 up");
        shell("ip addr add 192.0.2.1/24 dev up0; ip link set up0 up");
        shell("ip route add default via 192.0.2.254; ip route add 198.51.100.7/32 via 192.0.2.2");
        shell("ip route add blackhole 10.0.0.0/8; ip route add 203.0.113.0/24 dev up0 table 77");
        shell("ip link set up0 mtu 1400");
        let Routes { mut routes, uplink_mtu } = links.routes().await.expect("listed");
        assert_eq!(uplink_mtu, Some(1400));
        routes.sort_by_key(|route| route.destination);
        let route = |destination: Cidr, link: Option<&str>| Route { destination, link: link.map(link_name) };
        let host_route = Cidr { address: "198.51.100.7".parse().expect("valid"), prefix: 32 };
        let expected = [
            route(cidr("10.0.0.0/8"), None),
            route(cidr("192.0.2.0/24"), Some("up0")),
            route(host_route, Some("up0")),
        ];
        assert_eq!(routes, expected);
        let of = async || links.forwarding().await.expect("read");
        assert_eq!(of().await, Forwarding::Off);
        links.set_forwarding().await.expect("set");
        assert_eq!(of().await, Forwarding::ForGuests);
        assert_eq!(shell("cat /proc/sys/net/ipv4/ip_forward").trim(), "0", "the host is no router");
        // A link that gets its address later carries guests' packets too.
        shell("ip link add late type veth; ip addr add 192.0.2.1/24 dev late");
        assert_eq!(of().await, Forwarding::Off);
        links.set_forwarding().await.expect("set");
        assert_eq!(of().await, Forwarding::ForGuests);
        shell("echo 1 > /proc/sys/net/ipv4/ip_forward");
        assert_eq!(of().await, Forwarding::ByHost);
    });
}
