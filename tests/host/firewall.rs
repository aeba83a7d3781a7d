//! Firewall: the promises of the port, on real tables, and the effect of the rules on real frames.

use std::net::Ipv4Addr;

use stead::host::nft::Nft;
use stead_controllers::host::{Firewall, HostErrorKind, Links, NicRule};
use stead_schemas::network::{Lane, Mac};

use crate::guest::{
    Frame, GATEWAY, Network, PORT, TABLE, Wire, arp_request, host_socket, mac_of, received_until, rules,
};
use crate::namespace::{in_namespace, link_name, shell};

pub(crate) fn rule(number: u8) -> NicRule {
    let address = Ipv4Addr::new(10, 99, 0, number);
    NicRule {
        tap: link_name(&format!("st-tap.{number}")),
        mac: Mac::of_address(address),
        address,
        lane: Lane::Direct,
    }
}

#[test]
fn tables_are_loaded_with_nics_and_removed_without_a_trace() {
    in_namespace(async || {
        let firewall = Nft::new();
        let nics = [rule(2), rule(3)];
        assert_eq!(firewall.inspect(&rules()).await.expect("read"), None);
        assert!(!firewall.has_nic(TABLE, &nics[0]).await.expect("read"));
        let error = firewall.add_nic(TABLE, &nics[0]).await.expect_err("there is no table");
        assert_eq!(error.kind, HostErrorKind::Missing);
        firewall.remove_nic(TABLE, &nics[0]).await.expect("gone already");

        firewall.replace(&rules()).await.unwrap_or_else(|error| panic!("{}", error.chain()));
        for nic in &nics {
            firewall.add_nic(TABLE, nic).await.expect("added");
            firewall.add_nic(TABLE, nic).await.expect("adding it again is nothing");
            assert!(firewall.has_nic(TABLE, nic).await.expect("read"));
        }
        let other_mac = NicRule { mac: Mac([2; 6]), ..rule(2) };
        assert!(!firewall.has_nic(TABLE, &other_mac).await.expect("read"));
        firewall.replace(&rules()).await.expect("replaced");
        let seen = firewall.inspect(&rules()).await.expect("read").expect("there");
        assert_eq!((seen.is_intact, seen.nics.as_slice()), (true, &nics[..]));
        let fresh = Nft::new().inspect(&rules()).await.expect("read").expect("there");
        assert_eq!(fresh, seen, "another daemon recognises them");

        firewall.remove_nic(TABLE, &nics[0]).await.expect("removed");
        firewall.remove_nic(TABLE, &nics[0]).await.expect("removing it again is nothing");
        let seen = firewall.inspect(&rules()).await.expect("read").expect("there");
        assert_eq!((seen.is_intact, seen.nics.as_slice()), (true, &nics[1..]));
        firewall.remove(TABLE).await.expect("removed");
        firewall.remove(TABLE).await.expect("removing it again is nothing");
        assert_eq!(firewall.inspect(&rules()).await.expect("read"), None);
        assert_eq!(shell("nft list ruleset"), "");
    });
}

#[test]
fn a_port_is_in_the_one_lane_that_its_rule_names() {
    in_namespace(async || {
        let firewall = Nft::new();
        firewall.replace(&rules()).await.expect("loaded");
        let lanes = || {
            shell("nft list table inet steadtest | grep -A3 'set \\(direct\\|mediated\\)' | tr -d '\\n\\t'")
        };
        let in_lane = |lane| NicRule { lane, ..rule(2) };
        let nothing = lanes();
        for lane in [Lane::Direct, Lane::All, Lane::Web, Lane::Direct] {
            firewall.add_nic(TABLE, &in_lane(lane)).await.expect("added");
            for other in [Lane::Direct, Lane::All, Lane::Web] {
                let is_loaded = firewall.has_nic(TABLE, &in_lane(other)).await.expect("read");
                assert_eq!(is_loaded, other == lane, "{other:?} of {lane:?}");
            }
            assert_eq!(lanes().matches("10.99.0.2").count(), 1, "{}", lanes());
            let seen = Nft::new().inspect(&rules()).await.expect("read").expect("there");
            assert_eq!((seen.is_intact, seen.nics), (true, vec![in_lane(lane)]));
        }
        // An element that somebody adds counts, and is gone with the next change.
        shell("nft add element inet steadtest mediated_web { 10.99.0.2 }");
        assert!(!firewall.has_nic(TABLE, &rule(2)).await.expect("read"));
        firewall.add_nic(TABLE, &rule(2)).await.expect("added");
        assert!(firewall.has_nic(TABLE, &rule(2)).await.expect("read"));
        // So does one that somebody removes.
        shell("nft delete element inet steadtest direct { 10.99.0.2 }");
        assert!(!firewall.has_nic(TABLE, &rule(2)).await.expect("read"));
        firewall.replace(&rules()).await.expect("replaced");
        assert!(!firewall.has_nic(TABLE, &rule(2)).await.expect("read"), "no lane is guessed");
        firewall.add_nic(TABLE, &in_lane(Lane::All)).await.expect("added");
        firewall.remove_nic(TABLE, &in_lane(Lane::All)).await.expect("removed");
        assert_eq!(lanes(), nothing);
    });
}

#[test]
fn whatever_is_changed_in_our_tables_is_seen_and_other_tables_stay() {
    in_namespace(async || {
        shell("nft 'table inet other { chain c { type filter hook input priority 0; tcp dport 1 drop; }; }'");
        let before = shell("nft -a list table inet other");
        let firewall = Nft::new();
        firewall.replace(&rules()).await.expect("loaded");
        firewall.add_nic(TABLE, &rule(2)).await.expect("added");
        for damage in [
            "flush table inet steadtest",
            "flush table bridge steadtest",
            "flush chain inet steadtest postrouting",
            "delete table inet steadtest",
            "delete table bridge steadtest; add table bridge steadtest",
            "insert rule inet steadtest input accept",
            "add rule bridge steadtest guests accept",
            "add chain inet steadtest strange",
            "add set inet steadtest strange { type ipv4_addr; }",
            "chain inet steadtest forward { policy drop; }",
        ] {
            shell(&format!("nft '{damage}'"));
            let seen = firewall.inspect(&rules()).await.expect("read").expect("one table is left");
            assert!(!seen.is_intact, "{damage}");
            firewall.replace(&rules()).await.expect("replaced");
            let seen = firewall.inspect(&rules()).await.expect("read").expect("there");
            assert!(seen.is_intact, "{damage}");
            // Each of the tables has a part of what is known of a port.
            if !damage.contains("delete table") {
                assert_eq!(seen.nics, [rule(2)], "{damage}");
            }
            firewall.add_nic(TABLE, &rule(2)).await.expect("added");
        }
        shell("nft flush set bridge steadtest ports");
        let seen = firewall.inspect(&rules()).await.expect("read").expect("there");
        assert_eq!((seen.is_intact, seen.nics.as_slice()), (true, &[][..]));
        let moved = stead_controllers::host::FirewallRules { bridge: link_name("st-br2"), ..rules() };
        let seen = firewall.inspect(&moved).await.expect("read").expect("there");
        assert!(!seen.is_intact, "rules of another bridge are not these");
        firewall.remove(TABLE).await.expect("removed");
        assert_eq!(shell("nft -a list table inet other"), before);
    });
}

#[test]
fn a_guest_sends_as_nobody_but_itself() {
    in_namespace(async || {
        let network = Network::new().await;
        let host = host_socket();
        let mut guest = network.guest(2, true).await;
        let mut neighbour = network.guest(3, true).await;
        guest.greet(&host);
        neighbour.greet(&host);
        let good = guest.datagram(GATEWAY, "good");
        let mut forged = [good.clone(), good.clone(), good.clone(), good.clone(), good.clone()];
        forged[0].from = Ipv4Addr::new(10, 99, 0, 3);
        forged[1].from_mac = neighbour.rule.mac;
        (forged[2].from, forged[2].from_mac) = (neighbour.rule.address, neighbour.rule.mac);
        forged[3].from = Ipv4Addr::new(8, 8, 8, 8);
        forged[4].tag = Some(1);
        for (number, frame) in forged.iter_mut().enumerate() {
            frame.text = format!("forged {number}");
            guest.send(frame);
        }
        guest.send(&good);
        assert_eq!(received_until(&host, "good"), ["good"]);

        // The host learns the senders by ARP; only a true address may be learnt.
        shell("ip neigh flush dev st-br nud permanent; ip neigh flush dev st-br");
        let foreign = Ipv4Addr::new(10, 99, 0, 77);
        let (own, address) = (guest.rule.mac, guest.rule.address);
        guest.wire.send(&arp_request(own, own, foreign));
        guest.wire.send(&arp_request(own, neighbour.rule.mac, address));
        guest.wire.send(&arp_request(neighbour.rule.mac, own, address));
        guest.wire.send(&arp_request(own, own, address));
        guest.send(&good);
        received_until(&host, "good");
        let learnt = shell("ip neigh show dev st-br");
        assert!(learnt.contains(&format!("{address} lladdr {own}")), "{learnt}");
        assert!(
            !learnt.contains("10.99.0.77") && !learnt.contains(&neighbour.rule.mac.to_string()),
            "{learnt}"
        );

        // Without a rule no frame passes, even with the guest's own addresses.
        network.firewall.remove_nic(TABLE, &guest.rule).await.expect("removed");
        guest.send(&guest.datagram(GATEWAY, "no rule"));
        neighbour.send(&neighbour.datagram(GATEWAY, "good"));
        assert_eq!(received_until(&host, "good"), ["good"]);
    });
}

#[test]
fn a_guest_reaches_the_gateway_address_and_no_other_of_the_host() {
    in_namespace(async || {
        let network = Network::new().await;
        let host = host_socket();
        let other = Ipv4Addr::new(192, 0, 2, 1);
        shell("ip link add up0 type veth peer up1; ip addr add 192.0.2.1/32 dev up0; ip link set up0 up");
        shell("for s in all default; do echo 0 > /proc/sys/net/ipv4/conf/$s/rp_filter; done");
        let mut guest = network.guest(2, true).await;
        guest.greet(&host);
        guest.send(&guest.datagram(other, "to another address"));
        // Frames to such hardware addresses bypass the bridge and go into the TAP's own IP stack.
        for last in [0x00, 0x02, 0x03, 0x0e] {
            for (address, text) in [(other, "past the bridge"), (GATEWAY, "past the bridge too")] {
                let mut frame = guest.datagram(address, text);
                frame.to_mac = Mac([0x01, 0x80, 0xc2, 0, 0, last]);
                // The first address is forwarded like any other where no spanning tree is used.
                if last != 0 || address == other {
                    guest.send(&frame);
                }
            }
        }
        guest.send(&guest.datagram(GATEWAY, "good"));
        assert_eq!(received_until(&host, "good"), ["good"]);
        network.firewall.remove(TABLE).await.expect("removed");
        guest.send(&guest.datagram(other, "unguarded"));
        let past = Frame { to_mac: Mac([0x01, 0x80, 0xc2, 0, 0, 0x0e]), ..guest.datagram(other, "past") };
        guest.send(&past);
        guest.send(&guest.datagram(GATEWAY, "good"));
        let received = received_until(&host, "good");
        assert_eq!(received, ["unguarded", "past", "good"], "it is the rules that hold both back");
    });
}

#[test]
fn guests_do_not_reach_each_other_by_either_guard_alone() {
    in_namespace(async || {
        let network = Network::new().await;
        let host = host_socket();
        let mut one = network.guest(2, true).await;
        let mut two = network.guest(3, true).await;
        one.greet(&host);
        two.greet(&host);
        let mut passes = |text: &str| {
            let mut direct = one.datagram(two.rule.address, text);
            direct.to_mac = two.rule.mac;
            one.send(&direct);
            direct.to_mac = Mac([0xff; 6]);
            one.send(&direct);
            // This datagram goes through the host's routing.
            one.send(&one.datagram(two.rule.address, text));
            // The marker to the host follows the datagrams that the host forwarded.
            one.send(&one.datagram(GATEWAY, "sent"));
            received_until(&host, "sent");
            host.send_to(b"marker", (two.rule.address, PORT)).expect("sent");
            two.wire.saw_before(text, "marker")
        };
        assert!(!passes("both guards"));
        shell("bridge link set dev st-tap2 isolated off; bridge link set dev st-tap3 isolated off");
        assert!(!passes("rules alone"));
        shell("bridge link set dev st-tap2 isolated on; bridge link set dev st-tap3 isolated on");
        network.firewall.remove(TABLE).await.expect("removed");
        shell("echo 0 > /proc/sys/net/ipv4/conf/st-br/forwarding");
        assert!(!passes("isolation alone"));
        shell("bridge link set dev st-tap2 isolated off");
        assert!(passes("no guard"), "the test can see what passes");
    });
}

#[test]
fn guests_leave_with_the_hosts_address_and_only_answers_come_back() {
    in_namespace(async || {
        let network = Network::new().await;
        let host = host_socket();
        let mut guest = network.guest(2, true).await;
        guest.greet(&host);
        shell("ip tuntap add dev up0 mode tap vnet_hdr; ip addr add 198.51.100.2/24 dev up0");
        shell("ip link set up0 up");
        shell("ip neigh replace 198.51.100.1 lladdr 02:00:00:00:00:01 dev up0");
        network.links.set_forwarding().await.expect("set");
        let mut uplink = Wire::attach(&link_name("up0"));
        let uplink_mac: Mac = mac_of("up0");
        let outside = Ipv4Addr::new(198, 51, 100, 1);
        let deadline = std::time::Instant::now() + crate::namespace::PATIENCE;
        let left = loop {
            assert!(std::time::Instant::now() < deadline, "nothing leaves");
            guest.send(&guest.datagram(outside, "outward"));
            let frame = uplink.receive(std::time::Duration::from_millis(50));
            let is_it = |frame: &Vec<u8>| frame.ends_with(b"outward");
            if let Some(frame) = frame.filter(is_it) {
                break frame;
            }
        };
        assert_eq!(left[26..30], [198, 51, 100, 2], "it bears the host's address");

        let answer = |to: Ipv4Addr, text: &str| Frame {
            to_mac: uplink_mac,
            from_mac: Mac([2, 0, 0, 0, 0, 1]),
            tag: None,
            from: outside,
            to,
            to_port: PORT,
            text: text.to_owned(),
        };
        uplink.send(
            &Frame { from: Ipv4Addr::new(198, 51, 100, 9), ..answer(guest.rule.address, "unasked") }.bytes(),
        );
        uplink.send(&answer(Ipv4Addr::new(198, 51, 100, 2), "answer").bytes());
        assert!(!guest.wire.saw_before("unasked", "answer"));

        // The port is removed, and its tracked connections are forgotten.
        assert!(shell("conntrack -L --orig-src 10.99.0.2 2>/dev/null").contains("198.51.100.1"));
        network.firewall.remove_nic(TABLE, &guest.rule).await.expect("removed");
        assert_eq!(shell("conntrack -L --orig-src 10.99.0.2 2>/dev/null"), "");
    });
}
