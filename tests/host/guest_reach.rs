//! The parts of the host and of its networks that a guest reaches, and the bounds of what it sends.

use std::net::{Ipv4Addr, UdpSocket};
use std::time::Duration;

use stead_controllers::host::{Firewall, FirewallRules};
use stead_schemas::network::{Cidr, GuestReach};

use crate::guest::{
    Frame, GATEWAY, Guest, Network, PORT, TABLE, Wire, arp_request, host_socket, received_until, rules,
};
use crate::namespace::{PATIENCE, in_namespace, link_name, shell};

/// Type and code of ICMP "destination unreachable, administratively prohibited".
const REFUSED: [u8; 2] = [3, 13];

fn is_refusal(frame: &[u8]) -> bool {
    frame.get(23) == Some(&1) && frame.get(34..36) == Some(&REFUSED[..])
}

/// Sends a datagram and returns whether it was refused with an answer, before the marker comes back.
fn is_refused(guest: &mut Guest, host: &UdpSocket, frame: &Frame) -> bool {
    guest.send(frame);
    guest.send(&guest.datagram(GATEWAY, "sent"));
    received_until(host, "sent");
    host.send_to(b"marker", (guest.rule.address, PORT)).expect("sent");
    let mut is_refused = false;
    loop {
        let frame = guest.wire.receive(PATIENCE).expect("the marker comes");
        is_refused |= is_refusal(&frame);
        if frame.ends_with(b"marker") {
            return is_refused;
        }
    }
}

#[test]
fn guests_reach_dns_and_configured_ports_of_the_host_and_are_refused_at_others() {
    in_namespace(async || {
        let network = Network::new().await;
        let host = host_socket();
        let mut guest = network.guest(2, true).await;
        guest.greet(&host);
        let closed = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 2222)).expect("free");
        let dns = UdpSocket::bind((GATEWAY, 53)).expect("free");
        let frame = Frame { to_port: 2222, ..guest.datagram(GATEWAY, "to a service of the host") };
        assert!(is_refused(&mut guest, &host, &frame), "the guest is answered at once");
        let frame = Frame { to_port: 53, ..guest.datagram(GATEWAY, "question") };
        assert!(!is_refused(&mut guest, &host, &frame));
        assert_eq!(received_until(&dns, "question"), ["question"]);
        let open = GuestReach { host_ports: vec![PORT, 2222], networks: Vec::new() };
        network.firewall.replace(&FirewallRules { reach: open, ..rules() }).await.expect("replaced");
        let frame = Frame { to_port: 2222, ..guest.datagram(GATEWAY, "configured") };
        assert!(!is_refused(&mut guest, &host, &frame));
        assert_eq!(
            received_until(&closed, "configured"),
            ["configured"],
            "nothing came before it was configured"
        );
    });
}

/// Returns the texts that leave by the uplink, up to the marker.
fn leaves(guest: &mut Guest, uplink: &mut Wire, frames: &[Frame]) -> Vec<String> {
    for frame in frames {
        guest.send(frame);
    }
    let marker = guest.datagram(Ipv4Addr::new(203, 0, 113, 9), "to the internet");
    let mut all = Vec::new();
    let deadline = std::time::Instant::now() + PATIENCE;
    loop {
        assert!(std::time::Instant::now() < deadline, "the marker never left");
        guest.send(&marker);
        while let Some(frame) = uplink.receive(Duration::from_millis(20)) {
            let Some(text) = frame.get(42..).filter(|_| frame.get(23) == Some(&17)) else { continue };
            let text = String::from_utf8_lossy(text).into_owned();
            if text == marker.text {
                return all;
            }
            all.push(text);
        }
    }
}

#[test]
fn guests_reach_no_metadata_service_and_no_private_network_unless_it_is_configured() {
    in_namespace(async || {
        let network = Network::new().await;
        let host = host_socket();
        let mut guest = network.guest(2, true).await;
        guest.greet(&host);
        shell(
            "ip tuntap add dev up0 mode tap vnet_hdr; ip addr add 198.51.100.2/24 dev up0; ip link set up0 up",
        );
        shell(
            "ip neigh replace 198.51.100.1 lladdr 02:00:00:00:00:01 dev up0; ip route add default via 198.51.100.1",
        );
        let mut uplink = Wire::attach(&link_name("up0"));
        let addresses =
            ["169.254.169.254", "10.0.0.9", "172.20.1.1", "192.168.77.2", "100.64.3.4", "198.18.0.7"];
        let to = |guest: &Guest, free: &str| guest.datagram(free.parse().expect("an address"), free);
        let frames: Vec<Frame> = addresses.iter().map(|free| to(&guest, free)).collect();
        assert_eq!(leaves(&mut guest, &mut uplink, &frames), Vec::<String>::new());
        assert!(is_refused(&mut guest, &host, &frames[0]), "the guest is answered at once");
        // A name server in a private network is reached for DNS alone, and one network as configured.
        let networks = vec!["192.168.77.0/24".parse::<Cidr>().expect("valid")];
        let reach = GuestReach { networks, ..rules().reach };
        let dns = vec![Ipv4Addr::new(10, 0, 0, 9)];
        network.firewall.replace(&FirewallRules { reach, dns, ..rules() }).await.expect("replaced");
        let question = Frame { to_port: 53, text: "question".to_owned(), ..frames[1].clone() };
        let frames = [frames, vec![question]].concat();
        assert_eq!(leaves(&mut guest, &mut uplink, &frames), ["192.168.77.2", "question"]);
    });
}

#[test]
fn a_guest_has_a_bound_of_tracked_connections_and_takes_none_from_others() {
    in_namespace(async || {
        let network = Network::new().await;
        let host = host_socket();
        let (mut greedy, mut other) = (network.guest(2, true).await, network.guest(3, true).await);
        greedy.greet(&host);
        other.greet(&host);
        shell(
            "ip tuntap add dev up0 mode tap vnet_hdr; ip addr add 198.51.100.2/24 dev up0; ip link set up0 up",
        );
        // On a slow machine no connection may expire before they are counted.
        shell("echo 3600 > /proc/sys/net/netfilter/nf_conntrack_udp_timeout");
        let _uplink = Wire::attach(&link_name("up0"));
        shell(
            "ip neigh replace 198.51.100.1 lladdr 02:00:00:00:00:01 dev up0; ip route add default via 198.51.100.1",
        );
        let far = Ipv4Addr::new(203, 0, 113, 9);
        for port in 1..=10_000 {
            greedy.send(&Frame { to_port: port, ..greedy.datagram(far, "flood") });
        }
        greedy.send(&greedy.datagram(GATEWAY, "sent"));
        received_until(&host, "sent");
        let count = |address: Ipv4Addr| -> usize {
            let listed = shell(&format!("conntrack -L --orig-src {address} 2>/dev/null"));
            listed.lines().filter(|line| line.contains("dst=203.0.113.9")).count()
        };
        assert_eq!(count(greedy.rule.address), 8192, "the bound of one guest");
        other.send(&other.datagram(far, "mine"));
        other.send(&other.datagram(GATEWAY, "sent"));
        received_until(&host, "sent");
        assert_eq!(count(other.rule.address), 1);
        network.firewall.remove_nic(TABLE, &greedy.rule).await.expect("removed");
        assert_eq!(
            (count(greedy.rule.address), count(other.rule.address)),
            (0, 1),
            "only its own are forgotten"
        );
    });
}

#[test]
fn broadcasts_of_guests_are_few_and_none_of_them_carries_ip() {
    in_namespace(async || {
        let network = Network::new().await;
        let host = host_socket();
        let mut guest = network.guest(2, true).await;
        guest.greet(&host);
        let to_all = |guest: &Guest, last: [u8; 6], to: Ipv4Addr, text: &str| Frame {
            to_mac: stead_schemas::network::Mac(last),
            ..guest.datagram(to, text)
        };
        let everyone = to_all(&guest, [0xff; 6], Ipv4Addr::new(10, 99, 0, 255), "broadcast");
        let group = to_all(&guest, [1, 0, 0x5e, 0, 0, 1], Ipv4Addr::new(224, 0, 0, 1), "multicast");
        let hidden = to_all(&guest, [0xff; 6], GATEWAY, "to the host by broadcast");
        for frame in [&everyone, &group, &hidden] {
            guest.send(frame);
        }
        guest.send(&guest.datagram(GATEWAY, "good"));
        assert_eq!(received_until(&host, "good"), ["good"]);
        // An ARP storm: each request that passes is answered.
        let (own, address) = (guest.rule.mac, guest.rule.address);
        let storm = 2000;
        for _ in 0..storm {
            guest.wire.send(&arp_request(own, own, address));
        }
        guest.send(&guest.datagram(GATEWAY, "sent"));
        received_until(&host, "sent");
        host.send_to(b"marker", (address, PORT)).expect("sent");
        let mut answers = 0;
        loop {
            let frame = guest.wire.receive(PATIENCE).expect("the marker comes");
            answers += usize::from(frame.get(12..14) == Some(&[0x08, 0x06]));
            if frame.ends_with(b"marker") {
                break;
            }
        }
        assert!((1..storm / 2).contains(&answers), "{answers} of {storm} requests were answered");
    });
}
