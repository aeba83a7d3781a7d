//! Network: a bridge with its subnet, NAT and isolation. Nic: an instance's connection to a network.

use std::fmt;
use std::net::Ipv4Addr;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::condition::Condition;
use crate::egress::{EgressMode, EgressSpec, MediatorSettings};
use crate::meta::{Kind, Object};
use crate::names::{LinkName, NameError, Uid};
use crate::numbers::Generation;
use crate::quantity::Rate;
use crate::references::{Ref, Role, Target, WokenBy};

/// The kind of networks; today the store holds a single network, named `default`, made from configuration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Network {}

impl Kind for Network {
    const NAME: &'static str = "network";
    const FINALIZER: &'static str = "network";
    type Spec = NetworkSpec;
    type Status = NetworkStatus;

    fn observed_generation(status: &Self::Status) -> Option<Generation> {
        Some(status.observed_generation)
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkSpec {
    pub bridge: LinkName,
    /// Gateway address (the host's on the bridge) and prefix.
    pub gateway: Cidr,
    /// Name servers that guests get in resolv.conf.
    pub dns: Vec<Ipv4Addr>,
    #[serde(default)]
    pub resolver: Resolver,
    /// MTU of the guests' cards, in bytes; without it, the MTU follows the host's uplink.
    #[serde(default)]
    pub mtu: Option<u16>,
    /// Name of our nft tables (`inet` and `bridge` families).
    pub table: String,
    #[serde(default)]
    pub reach: GuestReach,
    /// The process that carries mediated egress; `None` in records of earlier versions.
    #[serde(default)]
    pub mediator: Option<MediatorGate>,
}

/// The firewall's side of the process that carries mediated egress.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MediatorGate {
    pub settings: MediatorSettings,
    /// User id of the process.
    pub user: u32,
}

/// The other entries of the guests' resolv.conf.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resolver {
    /// Domains in which names are searched.
    pub search: Vec<String>,
    /// Options of resolv.conf(5), such as `ndots:2`.
    pub options: Vec<String>,
}

/// The parts of the host and of private networks that guests may reach. All other parts are refused; public
/// addresses can be reached by all guests.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestReach {
    /// TCP and UDP ports of the host at the gateway's address, besides DNS.
    pub host_ports: Vec<u16>,
    /// Private, link-local or other special networks that the host routes to.
    pub networks: Vec<Cidr>,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct NetworkStatus {
    pub conditions: Vec<Condition>,
    pub observed_generation: Generation,
    /// Smallest MTU of the links with a default route, in bytes, at the last observation.
    #[serde(default)]
    pub uplink_mtu: Option<u32>,
}

/// The kind of network interfaces of instances, each owned by its instance. Its stored name is `port`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Nic {}

impl Kind for Nic {
    const NAME: &'static str = "port";
    const FINALIZER: &'static str = "port";
    type Spec = NicSpec;
    type Status = NicStatus;
    const WOKEN_BY: &'static [WokenBy] =
        &[WokenBy::Target(Role::Network), WokenBy::Gain(Role::Attaches), WokenBy::Release(Role::Attaches)];

    fn observed_generation(status: &Self::Status) -> Option<Generation> {
        Some(status.observed_generation)
    }

    fn references(object: &Object<Self>) -> Vec<Ref> {
        let address = Ref { role: Role::Address, target: Target::Address(object.spec.address) };
        vec![Ref::to::<Network>(Role::Network, &object.spec.network), address]
    }
}

/// The desired state of a network interface: chosen in admission, and stored before anything is made from it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NicSpec {
    pub network: Uid,
    pub bridge: LinkName,
    pub tap: LinkName,
    pub table: String,
    pub address: Ipv4Addr,
    pub mac: Mac,
    /// Number of the port's traffic class on this host, 1 to 65,534; 0 in records older than the field. It
    /// is chosen with the address, so that limits can be set on a port that already exists.
    #[serde(default)]
    pub class: u16,
    /// True if the TAP can have several queues, one for each processor of the instance.
    #[serde(default)]
    pub has_queues: bool,
    #[serde(default)]
    pub bandwidth: Bandwidth,
    #[serde(default)]
    pub lane: Lane,
}

/// The way by which a guest's packets leave the host.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Lane {
    /// The guest reaches public addresses by itself.
    #[default]
    Direct,
    /// HTTP and HTTPS pass through the mediator, and everything else leaves by itself.
    Web,
    /// The mediator carries everything that leaves.
    All,
}

impl From<&EgressSpec> for Lane {
    fn from(egress: &EgressSpec) -> Self {
        match egress.mode {
            EgressMode::All => Self::All,
            EgressMode::HttpHttpsOnly => Self::Web,
        }
    }
}

/// The limits of a network card's traffic, in bytes per second. `None` means no limit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bandwidth {
    /// Limit of the traffic to the guest.
    pub download: Option<Rate>,
    /// Limit of the traffic from the guest.
    pub upload: Option<Rate>,
}

impl NicSpec {
    /// Returns the name of the link that the guest's traffic is led through to be limited: the TAP's name with its
    /// first letter in the other case.
    #[must_use]
    pub fn ifb(&self) -> LinkName {
        self.tap.with_other_first_case()
    }
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct NicStatus {
    pub conditions: Vec<Condition>,
    pub observed_generation: Generation,
}

/// A hardware address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Mac(pub [u8; 6]);

impl Mac {
    /// Makes a locally administered unicast address from a network address: unique where the network
    /// addresses are unique.
    #[must_use]
    pub fn of_address(address: Ipv4Addr) -> Self {
        let [a, b, c, d] = address.octets();
        Self([0x02, 0x5d, a, b, c, d])
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl FromStr for Mac {
    type Err = NameError;
    fn from_str(text: &str) -> Result<Self, NameError> {
        let refuse = || NameError("must be six hexadecimal bytes joined by colons".to_owned());
        let mut bytes = [0u8; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts.next().filter(|part| part.len() == 2).ok_or_else(refuse)?;
            *byte = u8::from_str_radix(part, 16).map_err(|_| refuse())?;
        }
        if parts.next().is_some() { Err(refuse()) } else { Ok(Self(bytes)) }
    }
}

impl TryFrom<String> for Mac {
    type Error = NameError;
    fn try_from(text: String) -> Result<Self, NameError> {
        text.parse()
    }
}

impl From<Mac> for String {
    fn from(mac: Mac) -> String {
        mac.to_string()
    }
}

/// An IPv4 address within its network: `10.100.0.1/16`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Cidr {
    pub address: Ipv4Addr,
    /// Length of the prefix, 1 to 30 bits: a network needs a host part.
    pub prefix: u8,
}

impl Cidr {
    #[must_use]
    pub fn mask(self) -> u32 {
        u32::MAX << (32 - u32::from(self.prefix))
    }
    /// Returns the network's own address.
    #[must_use]
    pub fn network(self) -> Ipv4Addr {
        Ipv4Addr::from(u32::from(self.address) & self.mask())
    }
    /// Returns the same prefix with the network's address: `10.100.0.0/16`.
    #[must_use]
    pub fn subnet(self) -> Self {
        Self { address: self.network(), prefix: self.prefix }
    }
    #[must_use]
    pub fn broadcast(self) -> Ipv4Addr {
        Ipv4Addr::from(u32::from(self.address) | !self.mask())
    }
    #[must_use]
    pub fn contains(self, address: Ipv4Addr) -> bool {
        u32::from(address) & self.mask() == u32::from(self.network())
    }
    /// True if the two share an address.
    #[must_use]
    pub fn overlaps(self, other: Self) -> bool {
        self.contains(other.network()) || other.contains(self.network())
    }
    /// Returns the usable host addresses in order: neither network, broadcast nor `self.address`.
    pub fn hosts(self) -> impl Iterator<Item = Ipv4Addr> {
        let (first, last) = (u32::from(self.network()) + 1, u32::from(self.broadcast()));
        (first..last).map(Ipv4Addr::from).filter(move |&host| host != self.address)
    }
}

impl fmt::Display for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.prefix)
    }
}

impl FromStr for Cidr {
    type Err = NameError;
    fn from_str(text: &str) -> Result<Self, NameError> {
        let parsed = text.split_once('/').and_then(|(address, prefix)| {
            let prefix: u8 = prefix.parse().ok().filter(|prefix| (1..=30).contains(prefix))?;
            Some(Self { address: address.parse().ok()?, prefix })
        });
        parsed.ok_or_else(|| {
            NameError("must be an IPv4 address with a prefix of 1 to 30, such as 10.100.0.1/16".to_owned())
        })
    }
}

impl TryFrom<String> for Cidr {
    type Error = NameError;
    fn try_from(text: String) -> Result<Self, NameError> {
        text.parse()
    }
}

impl From<Cidr> for String {
    fn from(cidr: Cidr) -> String {
        cidr.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn subnets_know_their_hosts_and_overlaps() {
        let cidr: Cidr = "10.100.0.1/29".parse().expect("valid");
        let hosts: Vec<_> = cidr.hosts().collect();
        assert_eq!(hosts.first(), Some(&Ipv4Addr::new(10, 100, 0, 2)));
        assert_eq!(hosts.last(), Some(&Ipv4Addr::new(10, 100, 0, 6)));
        assert!(cidr.overlaps("10.0.0.0/8".parse().expect("valid")));
        assert!(!cidr.overlaps("10.100.0.8/29".parse().expect("valid")));
        for text in ["10.0.0.1", "10.0.0.1/31", "10.0.0.1/0", "x/8", "10.0.0.256/8"] {
            assert!(text.parse::<Cidr>().is_err(), "{text} was accepted");
        }
    }

    #[test]
    fn hardware_addresses_are_local_unicast_and_round_trip() {
        let mac = Mac::of_address(Ipv4Addr::new(10, 100, 0, 7));
        assert_eq!(mac.to_string(), "02:5d:0a:64:00:07");
        assert_eq!(mac.to_string().parse(), Ok(mac));
        assert!("02:5d:0a:64:00".parse::<Mac>().is_err());
    }
}
