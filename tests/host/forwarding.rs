//! Tests that the host forwards for its guests and does not become a router between its other networks, unless it is
//! one already.

use std::net::Ipv4Addr;

use stead_controllers::host::{Firewall, FirewallRules, Forwarding, Links};
use stead_schemas::network::Mac;

use crate::guest::{Frame, Guest, Network, Wire, host_socket, mac_of, rules};
use crate::namespace::{PATIENCE, in_namespace, link_name, shell};

/// Makes another network of the host beside that of its guests: a TAP whose other end is the returned wire.
fn other_network(name: &str, address: &str, neighbour: &str) -> Wire {
    shell(&format!(
        "ip tuntap add dev {name} mode tap vnet_hdr; ip addr add {address}/24 dev {name}; ip link set {name} up; \
         ip neigh replace {neighbour} lladdr 02:00:00:00:00:01 dev {name}"
    ));
    Wire::attach(&link_name(name))
}

/// Returns `true` if a datagram comes out of the wire before the marker that was sent after it.
fn comes_out(wire: &mut Wire, text: &str, marker: &str) -> bool {
    let mut has_come = false;
    loop {
        let frame = wire.receive(PATIENCE).expect("the marker comes");
        has_come |= frame.ends_with(text.as_bytes());
        if frame.ends_with(marker.as_bytes()) {
            return has_come;
        }
    }
}

#[test]
fn packets_of_others_pass_only_where_the_host_is_a_router_and_those_of_guests_always() {
    in_namespace(async || {
        let network = Network::new().await;
        let host = host_socket();
        let mut guest = network.guest(2, true).await;
        guest.greet(&host);
        let mut left = other_network("left", "198.51.100.2", "198.51.100.1");
        let mut right = other_network("right", "203.0.113.2", "203.0.113.1");
        network.links.set_forwarding().await.expect("set");
        let (from, to) = (Ipv4Addr::new(198, 51, 100, 1), Ipv4Addr::new(203, 0, 113, 1));
        let from_mac = Mac([2, 0, 0, 0, 0, 1]);
        let mut passes = |text: &str, guest: &mut Guest| {
            let foreign_frame = Frame { from_mac, to_mac: mac_of("left"), from, ..guest.datagram(to, text) };
            left.send(&foreign_frame.bytes());
            let marker = format!("{text}: of a guest");
            guest.send(&guest.datagram(to, &marker));
            comes_out(&mut right, text, &marker)
        };
        assert_eq!(network.links.forwarding().await.expect("read"), Forwarding::ForGuests);
        assert!(!passes("while the host is none", &mut guest));
        // A bridge of another daemon is in the same group: its guests are not "others".
        shell("ip link set left group 542632656");
        assert!(passes("of another daemon's bridge", &mut guest));
        shell("ip link set left group 0");
        assert!(!passes("again of a stranger", &mut guest));
        shell("echo 1 > /proc/sys/net/ipv4/ip_forward");
        let router_rules = FirewallRules { is_for_guests_only: false, ..rules() };
        let seen = network.firewall.inspect(&router_rules).await.expect("read").expect("there");
        assert!(!seen.is_intact, "the reconciler sees that its rules are those of a host that is no router");
        network.firewall.replace(&router_rules).await.expect("replaced");
        assert!(passes("while the host is a router", &mut guest));
    });
}
