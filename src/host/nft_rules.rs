//! The text of our nft tables: the rules for what guests may send, to which destination, and from which address.
//!
//! ```text
//! bridge prerouting  frames from our TAPs: only ARP and unicast IPv4, only as set `ports` says
//!        input       nothing to link-local hardware addresses: those would pass the bridge by
//!        forward     nothing from TAP to TAP (besides port isolation)
//! inet   input       guests reach DNS and configured ports at the gateway address, and answer what the host asked
//!        forward     nothing of others unless the host is a router; no guest to guest, no forged source, no IPv6,
//!                    no special networks but configured ones, a bound of connections for each guest; inward
//!                    only answers
//!        postrouting guests leave with the host's address
//!        capture     connections of mediated guests are led to the process that carries them (`nft_mediation`)
//!        confine     what that process may reach
//! ```
//! Our frames are recognised by the device group of their TAP, which is set before the TAP is raised: without a
//! loaded rule for it, a frame is dropped.

use std::net::Ipv4Addr;

use nftables::batch::Batch;
use nftables::expr::{BinaryOperation, Elem, Expression, MetaKey, NamedExpression};
use nftables::schema::{Element, NfListObject, Nftables, SetType, SetTypeValue, Table};
use nftables::stmt::{CTCount, JumpTarget, Limit, Meter, Operator, Statement};
use nftables::types::{NfChainType, NfFamily, NfHook};
use stead_controllers::host::{FirewallRules, NicRule};
use stead_schemas::network::Lane;

use super::marks::{BRIDGES, port_group};
use super::nft_builder::{
    DNS_PORT, PRIORITY_FILTER, SPECIAL_NETWORKS, Step, Tables, Text, compare, field, from_guest, ip, is,
    meta, prefix, prefix_of, refuse, set, state, text,
};
use super::nft_mediation::{self as mediation, LANES, lane_set};

/// Name of the set of allowed senders: interface, hardware address, network address.
pub(super) const PORTS: &str = "ports";
/// Name of the chain for frames from guests.
const GUESTS: &str = "guests";

/// Priority before all decisions of the bridge (nft calls it `dstnat` in this family).
const PRIORITY_BRIDGE_FIRST: i32 = -300;
/// Priority of `filter` in the bridge family.
const PRIORITY_BRIDGE_FILTER: i32 = -200;
/// Priority of `srcnat`.
const PRIORITY_SOURCE_NAT: i32 = 100;

/// Limit on the tracked connections of one guest. The kernel's table has 262,144 entries by default, for the host and
/// all guests.
const GUEST_CONNECTIONS_MAX: u32 = 8192;
/// Limit on the broadcast and multicast frames of one guest per second. A booting guest sends a few.
const BROADCASTS_PER_SECOND: u32 = 64;
/// Time after which the meter forgets a TAP that sends no broadcasts, in seconds.
const METER_SECONDS: u32 = 60;

/// Returns one transaction that gives both tables their desired content, with these ports.
pub(super) fn replace(rules: &FirewallRules, nics: &[NicRule]) -> Nftables<'static> {
    let mut batch = removal(&rules.table);
    let mut inet = Tables { batch: &mut batch, family: NfFamily::INet, table: rules.table.clone() };
    inet.table();
    LANES.iter().for_each(|&lane| inet.set(lane_set(lane), SetTypeValue::Single(SetType::Ipv4Addr)));
    inet_chains(&mut inet, rules);
    let mut bridge = Tables { batch: &mut batch, family: NfFamily::Bridge, table: rules.table.clone() };
    bridge.table();
    bridge_chains(&mut bridge, rules);
    if !nics.is_empty() {
        elements(&rules.table, nics).into_iter().for_each(|element| batch.add(element));
    }
    batch.to_nftables()
}

/// Returns one transaction that removes both tables. It also succeeds if there were none.
pub(super) fn remove(table: &str) -> Nftables<'static> {
    removal(table).to_nftables()
}

/// Returns the set elements of these ports: those of the allowed senders, and those of each lane.
pub(super) fn elements(table: &str, nics: &[NicRule]) -> Vec<NfListObject<'static>> {
    let lanes = LANES.iter().filter_map(|&lane| {
        let addresses = nics.iter().filter(|nic| nic.lane == lane);
        let elem: Vec<Text> = addresses.map(|nic| text(nic.address.to_string())).collect();
        (!elem.is_empty()).then(|| {
            NfListObject::Element(Element {
                family: NfFamily::INet,
                table: table.to_owned().into(),
                name: lane_set(lane).into(),
                elem: elem.into(),
            })
        })
    });
    lanes.chain([senders(table, nics)]).collect()
}

/// Returns the element of one lane for an address.
pub(super) fn in_lane(table: &str, lane: Lane, address: Ipv4Addr) -> NfListObject<'static> {
    NfListObject::Element(Element {
        family: NfFamily::INet,
        table: table.to_owned().into(),
        name: lane_set(lane).into(),
        elem: vec![text(address.to_string())].into(),
    })
}

fn senders(table: &str, nics: &[NicRule]) -> NfListObject<'static> {
    let concat = |nic: &NicRule| {
        let parts = [nic.tap.to_string(), nic.mac.to_string(), nic.address.to_string()];
        Expression::Named(NamedExpression::Concat(parts.map(text).to_vec()))
    };
    NfListObject::Element(Element {
        family: NfFamily::Bridge,
        table: table.to_owned().into(),
        name: PORTS.into(),
        elem: nics.iter().map(concat).collect(),
    })
}

fn removal(table: &str) -> Batch<'static> {
    let mut batch = Batch::new();
    for family in [NfFamily::INet, NfFamily::Bridge] {
        let object = || NfListObject::Table(Table { family, name: table.to_owned().into(), handle: None });
        // Deleting an absent object would fail the transaction.
        batch.add(object());
        batch.delete(object());
    }
    batch
}

fn inet_chains(inet: &mut Tables<'_>, rules: &FirewallRules) {
    let bridge = || text(rules.bridge.to_string());
    inet_input(inet, rules);
    inet_forward(inet, rules);
    if let Some(gate) = &rules.mediator {
        mediation::capture(inet, rules, gate);
        mediation::confine(inet, rules, gate);
    }

    inet.base("postrouting", NfChainType::NAT, NfHook::Postrouting, PRIORITY_SOURCE_NAT);
    let leaves = compare(Operator::NEQ, meta(MetaKey::Oifname), bridge());
    inet.rule("postrouting", vec![is(ip("saddr"), prefix(rules.subnet)), leaves, Step::Masquerade(None)]);
}

/// Adds the rules for what guests may reach on the host.
fn inet_input(inet: &mut Tables<'_>, rules: &FirewallRules) {
    let from_guest = || from_guest(rules);
    let from_tap = || is(meta(MetaKey::Iifgroup), group(rules));
    inet.base("input", NfChainType::Filter, NfHook::Input, PRIORITY_FILTER);
    inet.rule("input", vec![from_tap(), Step::Drop(None)]);
    inet.rule("input", vec![from_guest(), state(&["invalid"]), Step::Drop(None)]);
    inet.rule("input", vec![from_guest(), state(&["established", "related"]), Step::Accept(None)]);
    inet.rule("input", vec![from_guest(), too_many_connections("to_host"), Step::Drop(None)]);
    if let Some(gate) = &rules.mediator {
        mediation::admit(inet, rules, gate);
    }
    let gateway = text(rules.subnet.address.to_string());
    let is_elsewhere = compare(Operator::NEQ, ip("daddr"), gateway);
    inet.rule("input", vec![from_guest(), is_elsewhere, Step::Drop(None)]);
    let is_ping = is(field("icmp", "type"), text("echo-request"));
    inet.rule("input", vec![from_guest(), is_ping, Step::Accept(None)]);
    let mut ports = vec![DNS_PORT];
    ports.extend(&rules.reach.host_ports);
    ports.sort_unstable();
    ports.dedup();
    for protocol in ["udp", "tcp"] {
        let all = ports.iter().map(|&port| Expression::Number(port.into()));
        let is_open = is(field(protocol, "dport"), set(all));
        inet.rule("input", vec![from_guest(), is_open, Step::Accept(None)]);
    }
    inet.rule("input", vec![from_guest(), refuse()]);
}

/// Adds the rules for where guests may send, and for packets to them.
fn inet_forward(inet: &mut Tables<'_>, rules: &FirewallRules) {
    let from_guest = || from_guest(rules);
    let to_guest = || is(meta(MetaKey::Oifname), text(rules.bridge.to_string()));
    let from_tap = || is(meta(MetaKey::Iifgroup), group(rules));
    inet.base("forward", NfChainType::Filter, NfHook::Forward, PRIORITY_FILTER);
    if rules.is_for_guests_only {
        let not_bridges = |key| compare(Operator::NEQ, meta(key), Expression::Number(BRIDGES));
        let is_others = vec![not_bridges(MetaKey::Iifgroup), not_bridges(MetaKey::Oifgroup)];
        inet.rule("forward", [is_others, vec![Step::Drop(None)]].concat());
    }
    inet.rule("forward", vec![from_tap(), Step::Drop(None)]);
    inet.rule("forward", vec![from_guest(), to_guest(), Step::Drop(None)]);
    inet.rule("forward", vec![from_guest(), is(meta(MetaKey::Nfproto), text("ipv6")), Step::Drop(None)]);
    let is_forged = compare(Operator::NEQ, ip("saddr"), prefix(rules.subnet));
    inet.rule("forward", vec![from_guest(), is_forged, Step::Drop(None)]);
    inet.rule("forward", vec![from_guest(), state(&["invalid"]), Step::Drop(None)]);
    mediation::refuse_the_rest(inet, rules);
    let is_new = || state(&["new"]);
    inet.rule("forward", vec![from_guest(), is_new(), too_many_connections("outward"), Step::Drop(None)]);
    for server in &rules.dns {
        for protocol in ["udp", "tcp"] {
            let is_server = is(ip("daddr"), text(server.to_string()));
            let is_dns = is(field(protocol, "dport"), Expression::Number(DNS_PORT.into()));
            inet.rule("forward", vec![from_guest(), is_server, is_dns, Step::Accept(None)]);
        }
    }
    for network in &rules.reach.networks {
        inet.rule("forward", vec![from_guest(), is(ip("daddr"), prefix(*network)), Step::Accept(None)]);
    }
    let special = SPECIAL_NETWORKS.iter().map(|&(address, length)| prefix_of(address, length));
    inet.rule("forward", vec![from_guest(), is(ip("daddr"), set(special)), refuse()]);
    inet.rule("forward", vec![to_guest(), state(&["established", "related"]), Step::Accept(None)]);
    inet.rule("forward", vec![to_guest(), Step::Drop(None)]);
}

fn bridge_chains(bridge: &mut Tables<'_>, rules: &FirewallRules) {
    let from_tap = || is(meta(MetaKey::Iifgroup), group(rules));
    let to_tap = || is(meta(MetaKey::Oifgroup), group(rules));
    let iifname = || meta(MetaKey::Iifname);
    let may_send = |sender: Text, address: Text| {
        is(
            Expression::Named(NamedExpression::Concat(vec![iifname(), sender, address])),
            text(format!("@{PORTS}")),
        )
    };
    let sender = vec![SetType::Ifname, SetType::EtherAddr, SetType::Ipv4Addr];
    bridge.set(PORTS, SetTypeValue::Concatenated(sender.into()));
    bridge.chain(GUESTS);
    // A guest is alone on its part of the bridge: its broadcasts reach the host only, and a flood of them costs the
    // host's processor.
    let to_group = || {
        let bit = || text("01:00:00:00:00:00");
        let masked = BinaryOperation::AND(field("ether", "daddr"), bit());
        is(Expression::BinaryOperation(Box::new(masked)), bit())
    };
    bridge.rule(GUESTS, vec![to_group(), too_many_broadcasts(), Step::Drop(None)]);
    // The frame's sender and the sender in the ARP header are both checked. nft adds the frame types itself.
    let asks = may_send(field("ether", "saddr"), field("arp", "saddr ip"));
    let names_itself = may_send(field("arp", "saddr ether"), field("arp", "saddr ip"));
    bridge.rule(GUESTS, vec![asks, names_itself, Step::Accept(None)]);
    // ARP is the only broadcast that guests need.
    bridge.rule(GUESTS, vec![to_group(), Step::Drop(None)]);
    bridge.rule(GUESTS, vec![may_send(field("ether", "saddr"), ip("saddr")), Step::Accept(None)]);
    // This also drops VLAN tags, IPv6, spanning tree and everything else.
    bridge.rule(GUESTS, vec![Step::Drop(None)]);

    bridge.base("prerouting", NfChainType::Filter, NfHook::Prerouting, PRIORITY_BRIDGE_FIRST);
    let jump = Step::Jump(JumpTarget { target: GUESTS.into() });
    bridge.rule("prerouting", vec![from_tap(), jump]);

    bridge.base("input", NfChainType::Filter, NfHook::Input, PRIORITY_BRIDGE_FILTER);
    // The bridge passes such frames to the TAP's own IP stack without the prerouting hook.
    let (mask, link_local) = (text("ff:ff:ff:ff:ff:f0"), text("01:80:c2:00:00:00"));
    let masked = Expression::BinaryOperation(Box::new(BinaryOperation::AND(field("ether", "daddr"), mask)));
    bridge.rule("input", vec![from_tap(), is(masked, link_local), Step::Drop(None)]);

    bridge.base("forward", NfChainType::Filter, NfHook::Forward, PRIORITY_BRIDGE_FILTER);
    bridge.rule("forward", vec![from_tap(), Step::Drop(None)]);
    bridge.rule("forward", vec![to_tap(), Step::Drop(None)]);
}

/// Matches the packet that exceeds its guest's limit of tracked connections. The name of a meter belongs to one rule.
fn too_many_connections(meter: &'static str) -> Step {
    let count = CTCount { val: Expression::Number(GUEST_CONNECTIONS_MAX), inv: Some(true) };
    let stmt = Box::new(Statement::CTCount(count));
    Statement::Meter(Meter { name: meter.into(), key: ip("saddr"), stmt })
}

/// Matches the frame that exceeds the limit per second at its TAP.
fn too_many_broadcasts() -> Step {
    let limit = Limit {
        rate: BROADCASTS_PER_SECOND,
        rate_unit: None,
        per: Some("second".into()),
        burst: Some(BROADCASTS_PER_SECOND),
        burst_unit: None,
        inv: Some(true),
    };
    let key = Expression::Named(NamedExpression::Elem(Elem {
        val: Box::new(meta(MetaKey::Iifname)),
        timeout: Some(METER_SECONDS),
        expires: None,
        comment: None,
        counter: None,
    }));
    let stmt = Box::new(Statement::Limit(limit));
    Statement::Meter(Meter { name: "broadcasts".into(), key, stmt })
}

fn group(rules: &FirewallRules) -> Text {
    Expression::Number(port_group(&rules.bridge))
}
