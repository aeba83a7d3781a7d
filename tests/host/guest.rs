//! A network with guests simulated by the test: frames written to and read from real TAPs.

use std::fs::File;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, UdpSocket};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use stead::host::netlink::Netlink;
use stead::host::nft::Nft;
use stead::host::tap;
use stead_controllers::host::{Firewall, FirewallRules, LinkChange, LinkKind, LinkPlan, Links, NicRule};
use stead_schemas::egress::{MediatorPorts, MediatorSettings};
use stead_schemas::names::LinkName;
use stead_schemas::network::{Cidr, GuestReach, Lane, Mac, MediatorGate};

use crate::namespace::{PATIENCE, link_name, netlink, shell, uid};

pub(crate) const TABLE: &str = "steadtest";
pub(crate) const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 99, 0, 1);
/// Size of the virtio header before each frame, in bytes.
const VNET_HEADER: usize = 10;
pub(crate) const PORT: u16 = 9999;

/// A bridge with its gateway address and the firewall.
pub(crate) struct Network {
    pub(crate) links: Netlink,
    pub(crate) firewall: Nft,
    pub(crate) bridge_mac: Mac,
}

pub(crate) fn bridge() -> LinkName {
    link_name("st-br")
}

pub(crate) fn rules() -> FirewallRules {
    let subnet = Cidr { address: GATEWAY, prefix: 24 };
    // This is the port on which the tests listen on the host.
    let reach = GuestReach { host_ports: vec![PORT], networks: Vec::new() };
    FirewallRules {
        table: TABLE.to_owned(),
        bridge: bridge(),
        subnet,
        dns: Vec::new(),
        reach,
        is_for_guests_only: true,
        mediator: Some(MediatorGate { settings: mediator(), user: 1_234_567 }),
    }
}

/// Returns the settings of a process that no test of this file starts.
pub(crate) fn mediator() -> MediatorSettings {
    MediatorSettings {
        address: GATEWAY,
        ports: MediatorPorts { captured: 18443, explicit: 18080, names: 18053 },
        subnet: Cidr { address: GATEWAY, prefix: 24 },
        dns: vec![[203, 0, 113, 53].into()],
        open: ["10.7.0.0/16".parse().expect("a network")].into(),
    }
}

impl Network {
    pub(crate) async fn new() -> Self {
        let (links, firewall) = (netlink("test"), Nft::new());
        firewall.replace(&rules()).await.unwrap_or_else(|error| panic!("{}", error.chain()));
        let plan = LinkPlan { name: bridge(), owner: uid('b'), kind: LinkKind::Bridge, has_queues: false };
        links.create(&plan).await.expect("made");
        links.change(&bridge(), &LinkChange::AddAddress(rules().subnet)).await.expect("added");
        links.change(&bridge(), &LinkChange::Up).await.expect("raised");
        links.set_forwarding().await.expect("set");
        shell("ip link set lo up");
        let bridge_mac = mac_of("st-br");
        Self { links, firewall, bridge_mac }
    }

    /// Adds a guest with its TAP, and with its rule if it should have one.
    pub(crate) async fn guest(&self, number: u8, has_rule: bool) -> Guest {
        let address = Ipv4Addr::new(10, 99, 0, number);
        let rule = NicRule {
            tap: link_name(&format!("st-tap{number}")),
            mac: Mac::of_address(address),
            address,
            lane: Lane::Direct,
        };
        let owner = uid(char::from(b'a' + number));
        let plan = LinkPlan { name: rule.tap.clone(), owner, kind: LinkKind::Tap, has_queues: false };
        self.links.create(&plan).await.expect("made");
        self.links.change(&rule.tap, &LinkChange::Master(bridge())).await.expect("enslaved");
        self.links.change(&rule.tap, &LinkChange::Isolated).await.expect("isolated");
        if has_rule {
            self.firewall.add_nic(TABLE, &rule).await.expect("added");
        }
        self.links.change(&rule.tap, &LinkChange::Up).await.expect("raised");
        shell(&format!("ip neigh replace {address} lladdr {} dev st-br", rule.mac));
        let wire = Wire::attach(&rule.tap);
        Guest { rule, wire, gateway_mac: self.bridge_mac }
    }
}

/// Returns the hardware address of an interface in this namespace.
pub(crate) fn mac_of(link: &str) -> Mac {
    let shown = shell(&format!("ip -o link show dev {link}"));
    let mut words = shown.split_whitespace().skip_while(|word| *word != "link/ether");
    words.nth(1).and_then(|word| word.parse().ok()).expect("an Ethernet interface")
}

/// The other end of a TAP.
pub(crate) struct Wire(File);

impl Wire {
    pub(crate) fn attach(name: &LinkName) -> Self {
        let file = tap::attach(name).expect("the TAP can be used");
        tap::set_frames(&file, tap::Frames::PLAIN).expect("set");
        rustix::fs::fcntl_setfl(&file, rustix::fs::OFlags::NONBLOCK).expect("set");
        Self(file)
    }

    /// Chooses another form of frames than this reader parses.
    pub(crate) fn takes_long_frames(&self) {
        let frames = tap::Frames { header: tap::Frames::LONG_HEADER, offloads: tap::OFFLOAD_CHECKSUM };
        tap::set_frames(&self.0, frames).expect("set");
    }

    pub(crate) fn send(&mut self, frame: &[u8]) {
        let bytes = [&[0; VNET_HEADER], frame].concat();
        self.0.write_all(&bytes).expect("the TAP is up");
    }

    /// Returns the next frame, or `None` when none comes within the time.
    pub(crate) fn receive(&mut self, within: Duration) -> Option<Vec<u8>> {
        let mut buffer = vec![0; 65_536];
        let deadline = Instant::now() + within;
        loop {
            if let Ok(length) = self.0.read(&mut buffer) {
                return Some(buffer[VNET_HEADER..length].to_vec());
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return None;
            }
            let time = Timespec {
                tv_sec: left.as_secs().try_into().expect("short"),
                tv_nsec: left.subsec_nanos().into(),
            };
            poll(&mut [PollFd::new(&self.0, PollFlags::IN)], Some(&time)).expect("polled");
        }
    }

    /// Reads until a frame contains the marker. Returns `true` if a frame with the unwanted text came before it.
    pub(crate) fn saw_before(&mut self, unwanted: &str, marker: &str) -> bool {
        let has = |frame: &[u8], text: &str| frame.windows(text.len()).any(|part| part == text.as_bytes());
        let mut is_seen = false;
        loop {
            let frame = self.receive(PATIENCE).expect("the marker comes");
            is_seen |= has(&frame, unwanted);
            if has(&frame, marker) {
                return is_seen;
            }
        }
    }
}

pub(crate) struct Guest {
    pub(crate) rule: NicRule,
    pub(crate) wire: Wire,
    pub(crate) gateway_mac: Mac,
}

impl Guest {
    /// Returns a datagram as this guest sends it to the host or through it.
    pub(crate) fn datagram(&self, to: Ipv4Addr, text: &str) -> Frame {
        Frame {
            to_mac: self.gateway_mac,
            from_mac: self.rule.mac,
            tag: None,
            from: self.rule.address,
            to,
            to_port: PORT,
            text: text.to_owned(),
        }
    }

    pub(crate) fn send(&mut self, frame: &Frame) {
        self.wire.send(&frame.bytes());
    }

    /// Sends until the host receives it: the carrier of a TAP takes a moment to be noticed.
    pub(crate) fn greet(&mut self, host: &UdpSocket) {
        let hello = self.datagram(GATEWAY, "hello");
        let deadline = Instant::now() + PATIENCE;
        host.set_read_timeout(Some(Duration::from_millis(20))).expect("set");
        let mut buffer = [0; 64];
        loop {
            assert!(Instant::now() < deadline, "the host never heard {:?}", self.rule);
            self.send(&hello);
            if host.recv_from(&mut buffer).is_ok() {
                break;
            }
        }
    }
}

/// A UDP datagram from port [`PORT`] in an Ethernet frame.
#[derive(Clone)]
pub(crate) struct Frame {
    pub(crate) to_mac: Mac,
    pub(crate) from_mac: Mac,
    /// VLAN tag, if the frame has one.
    pub(crate) tag: Option<u16>,
    pub(crate) from: Ipv4Addr,
    pub(crate) to: Ipv4Addr,
    pub(crate) to_port: u16,
    pub(crate) text: String,
}

impl Frame {
    pub(crate) fn bytes(&self) -> Vec<u8> {
        let udp_length = u16::try_from(8 + self.text.len()).expect("short");
        let mut ip = vec![0x45, 0, 0, 0, 0, 1, 0, 0, 64, 17, 0, 0];
        ip[2..4].copy_from_slice(&(20 + udp_length).to_be_bytes());
        ip.extend(self.from.octets());
        ip.extend(self.to.octets());
        let sum: u32 = ip.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum();
        let folded = (sum & 0xffff) + (sum >> 16);
        let checksum = !u16::try_from((folded & 0xffff) + (folded >> 16)).expect("folded");
        ip[10..12].copy_from_slice(&checksum.to_be_bytes());
        let mut bytes = [self.to_mac.0, self.from_mac.0].concat();
        if let Some(vlan) = self.tag {
            bytes.extend([[0x81, 0x00], vlan.to_be_bytes()].concat());
        }
        bytes.extend([0x08, 0x00]);
        bytes.extend(ip);
        // There is no UDP checksum, as IPv4 allows.
        bytes.extend([PORT, self.to_port, udp_length, 0].map(u16::to_be_bytes).concat());
        bytes.extend(self.text.as_bytes());
        bytes
    }
}

/// Returns an ARP request for the gateway's address, with any sender.
pub(crate) fn arp_request(frame_mac: Mac, named_mac: Mac, named: Ipv4Addr) -> Vec<u8> {
    let mut bytes = [[0xff; 6], frame_mac.0].concat();
    bytes.extend([0x08, 0x06, 0, 1, 0x08, 0x00, 6, 4, 0, 1]);
    bytes.extend(named_mac.0);
    bytes.extend(named.octets());
    bytes.extend([0; 6]);
    bytes.extend(GATEWAY.octets());
    bytes
}

/// Opens a socket of the host on all its addresses.
pub(crate) fn host_socket() -> UdpSocket {
    UdpSocket::bind((Ipv4Addr::UNSPECIFIED, PORT)).expect("the port is free in a fresh namespace")
}

/// Returns the texts of datagrams up to and including the marker.
pub(crate) fn received_until(host: &UdpSocket, marker: &str) -> Vec<String> {
    host.set_read_timeout(Some(PATIENCE)).expect("set");
    let mut all = Vec::new();
    let mut buffer = [0; 2048];
    loop {
        let (length, _) = host.recv_from(&mut buffer).expect("the marker comes");
        let text = String::from_utf8_lossy(&buffer[..length]).into_owned();
        if text == "hello" {
            continue;
        }
        let is_end = text == marker;
        all.push(text);
        if is_end {
            return all;
        }
    }
}
