//! Netlink messages about links and routes, decoded as far as the adapter needs them.

use std::net::Ipv4Addr;

use rtnetlink::RouteMessageBuilder;
use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::link::{
    InfoBridgePort, InfoKind, InfoPortData, LinkAttribute, LinkFlags, LinkInfo, LinkMessage,
};
use rtnetlink::packet_route::route::{RouteAddress, RouteAttribute, RouteHeader, RouteMessage};
use stead_controllers::host::{LinkKind, Route, Routes};
use stead_schemas::names::{LinkName, Uid};
use stead_schemas::network::Cidr;

use super::marks::Scope;
use super::report::Notification;

/// The content of a message about a link, ours or foreign.
#[derive(Debug, Clone)]
pub(super) struct Seen {
    pub(super) index: u32,
    pub(super) name: Option<LinkName>,
    /// Kind of the link, or `None` for kinds that we never create.
    pub(super) kind: Option<LinkKind>,
    pub(super) alias: Option<String>,
    pub(super) mac: Vec<u8>,
    pub(super) master: Option<u32>,
    pub(super) group: u32,
    /// MTU of the link, in bytes.
    pub(super) mtu: u32,
    pub(super) is_up: bool,
    pub(super) is_isolated: bool,
    /// True for an end of a pair of virtual links and for a TAP: the speed that the kernel shows of them means nothing.
    pub(super) has_made_up_speed: bool,
    /// Kind of the queueing discipline at the link's root.
    pub(super) qdisc: Option<String>,
}

impl From<LinkMessage> for Seen {
    fn from(message: LinkMessage) -> Self {
        let mut seen = Self {
            index: message.header.index,
            name: None,
            kind: None,
            alias: None,
            mac: Vec::new(),
            master: None,
            group: 0,
            mtu: 0,
            is_up: message.header.flags.contains(LinkFlags::Up),
            is_isolated: false,
            has_made_up_speed: false,
            qdisc: None,
        };
        for attribute in message.attributes {
            match attribute {
                LinkAttribute::IfName(name) => seen.name = name.parse().ok(),
                LinkAttribute::IfAlias(alias) => seen.alias = Some(alias),
                LinkAttribute::Address(mac) => seen.mac = mac,
                LinkAttribute::Controller(index) => seen.master = Some(index).filter(|&index| index != 0),
                LinkAttribute::Group(group) => seen.group = group,
                LinkAttribute::Mtu(mtu) => seen.mtu = mtu,
                LinkAttribute::Qdisc(kind) => seen.qdisc = Some(kind),
                LinkAttribute::LinkInfo(infos) => infos.iter().for_each(|info| seen.note(info)),
                _ => {}
            }
        }
        seen
    }
}

impl Seen {
    fn note(&mut self, info: &LinkInfo) {
        match info {
            LinkInfo::Kind(InfoKind::Bridge) => self.kind = Some(LinkKind::Bridge),
            LinkInfo::Kind(InfoKind::Tun) => {
                self.kind = Some(LinkKind::Tap);
                self.has_made_up_speed = true;
            }
            LinkInfo::Kind(InfoKind::Veth) => self.has_made_up_speed = true,
            LinkInfo::Kind(InfoKind::Ifb) => self.kind = Some(LinkKind::Ifb),
            LinkInfo::PortData(InfoPortData::BridgePort(port)) => {
                self.is_isolated = port.iter().any(|info| matches!(info, InfoBridgePort::Isolated(true)));
            }
            _ => {}
        }
    }

    /// Returns the object that the link was made for, if it carries the scope's mark.
    pub(super) fn owner(&self, scope: &Scope) -> Option<Uid> {
        scope.owner(self.alias.as_deref()?)
    }

    /// Returns `true` for a bridge or an IFB that we created and had no time to mark.
    pub(super) fn is_half_made(&self, scope: &Scope) -> bool {
        matches!(self.kind, Some(LinkKind::Bridge | LinkKind::Ifb))
            && self.alias.as_deref().unwrap_or("").is_empty()
            && self.name.as_ref().is_some_and(|name| scope.creation_mac(name).0.as_slice() == self.mac)
    }
}

/// Returns the request for all IPv4 routes.
pub(super) fn main_table_ipv4() -> RouteMessage {
    RouteMessageBuilder::<Ipv4Addr>::new().build()
}

/// Returns the routes of the main table, and the properties of the links of its default routes.
pub(super) fn routes(messages: &[RouteMessage], links: &[Seen]) -> Routes {
    let mut all = Routes::default();
    for (destination, link) in messages.iter().filter_map(|message| route(message, links)) {
        match destination {
            Some(destination) => {
                all.routes.push(Route { destination, link: link.and_then(|link| link.name.clone()) });
            }
            None => {
                let mtu = link.map(|link| link.mtu).filter(|mtu| *mtu > 0);
                all.uplink_mtu = all.uplink_mtu.into_iter().chain(mtu).min();
            }
        }
    }
    all
}

/// Returns the links of the default routes of the main table.
pub(super) fn uplinks<'a>(messages: &[RouteMessage], links: &'a [Seen]) -> Vec<&'a Seen> {
    let routes = messages.iter().filter_map(|message| route(message, links));
    routes.filter(|(destination, _)| destination.is_none()).filter_map(|(_, link)| link).collect()
}

/// Returns the destination of a route of the main table (`None` for a default route) and its link.
fn route<'a>(message: &RouteMessage, links: &'a [Seen]) -> Option<(Option<Cidr>, Option<&'a Seen>)> {
    let mut table = u32::from(message.header.table);
    let mut destination = None;
    let mut output = None;
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Table(number) => table = *number,
            RouteAttribute::Destination(RouteAddress::Inet(address)) => destination = Some(*address),
            RouteAttribute::Oif(index) => output = Some(*index),
            _ => {}
        }
    }
    let prefix = message.header.destination_prefix_length;
    if table != u32::from(RouteHeader::RT_TABLE_MAIN) {
        return None;
    }
    let link = links.iter().find(|link| Some(link.index) == output);
    match prefix {
        0 => Some((None, link)),
        _ => Some((Some(Cidr { address: destination?, prefix }), link)),
    }
}

/// Returns the object that a link message concerns.
pub(super) fn notification(message: &LinkMessage, scope: &Scope) -> Option<Notification> {
    // A bridge's message about its ports (isolation, for example) contains the interface's name but not its alias.
    let is_of_bridge = message.header.interface_family == AddressFamily::Bridge;
    message.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::IfAlias(alias) => scope.owner(alias).map(Notification::Owner),
        LinkAttribute::IfName(name) if is_of_bridge => name.parse().ok().map(Notification::Nic),
        _ => None,
    })
}
