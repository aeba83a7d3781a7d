//! The text of our nft tables: what guests may send, to whom, and as whom.
//!
//! ```text
//! bridge prerouting  frames from our TAPs: only ARP and IPv4, only as set `ports` says
//!        input       nothing to link-local hardware addresses: those would pass the bridge by
//!        forward     nothing from TAP to TAP (besides port isolation)
//! inet   input       guests reach the gateway address, and answers to what the host asked; nothing else
//!        forward     no guest to guest, no forged source, no IPv6; inward only answers
//!        postrouting guests leave with the host's address
//! ```
//! A frame of ours is known by the device group of its TAP, which is set before the TAP is raised:
//! with no rule loaded for it, it is dropped.

use std::borrow::Cow;

use nftables::batch::Batch;
use nftables::expr::{
    BinaryOperation, CT, Expression, Meta, MetaKey, NamedExpression, Payload, PayloadField, Prefix,
};
use nftables::schema::{Chain, Element, NfListObject, Nftables, Rule, Set, SetType, SetTypeValue, Table};
use nftables::stmt::{JumpTarget, Match, Operator, Statement};
use nftables::types::{NfChainPolicy, NfChainType, NfFamily, NfHook};
use stead_controllers::host::{FirewallRules, PortRule};
use stead_schemas::network::Cidr;

use super::marks::port_group;

/// The set of what may send: interface, hardware address, network address.
pub(super) const PORTS: &str = "ports";
/// Frames from guests come here.
const GUESTS: &str = "guests";

/// Before bridging decides anything (what nft calls `dstnat` in this family).
const PRIORITY_BRIDGE_FIRST: i32 = -300;
/// The bridge family's `filter`.
const PRIORITY_BRIDGE_FILTER: i32 = -200;
/// Just before the host's own filter: a drop here is final, an accept is not.
const PRIORITY_FILTER: i32 = -10;
/// `srcnat`.
const PRIORITY_SOURCE_NAT: i32 = 100;

type Text = Expression<'static>;
type Step = Statement<'static>;

/// One transaction that makes both tables as they shall be, with these ports.
pub(super) fn replace(rules: &FirewallRules, ports: &[PortRule]) -> Nftables<'static> {
    let mut batch = removal(&rules.table);
    let mut inet = Tables { batch: &mut batch, family: NfFamily::INet, table: rules.table.clone() };
    inet.table();
    inet_chains(&mut inet, rules);
    let mut bridge = Tables { batch: &mut batch, family: NfFamily::Bridge, table: rules.table.clone() };
    bridge.table();
    bridge_chains(&mut bridge, rules);
    if !ports.is_empty() {
        batch.add(element(&rules.table, ports));
    }
    batch.to_nftables()
}

/// One transaction after which neither table is there; it also succeeds where none was.
pub(super) fn remove(table: &str) -> Nftables<'static> {
    removal(table).to_nftables()
}

/// The set elements of these ports.
pub(super) fn element(table: &str, ports: &[PortRule]) -> NfListObject<'static> {
    let concat = |port: &PortRule| {
        let parts = [port.tap.to_string(), port.mac.to_string(), port.address.to_string()];
        Expression::Named(NamedExpression::Concat(parts.map(text).to_vec()))
    };
    NfListObject::Element(Element {
        family: NfFamily::Bridge,
        table: table.to_owned().into(),
        name: PORTS.into(),
        elem: ports.iter().map(concat).collect(),
    })
}

fn removal(table: &str) -> Batch<'static> {
    let mut batch = Batch::new();
    for family in [NfFamily::INet, NfFamily::Bridge] {
        let object = || NfListObject::Table(Table { family, name: table.to_owned().into(), handle: None });
        // Deleting what is not there would fail the transaction.
        batch.add(object());
        batch.delete(object());
    }
    batch
}

fn inet_chains(inet: &mut Tables<'_>, rules: &FirewallRules) {
    let bridge = || text(rules.bridge.to_string());
    let from_guest = || is(meta(MetaKey::Iifname), bridge());
    let to_guest = || is(meta(MetaKey::Oifname), bridge());
    let is_answer = || state(&["established", "related"]);
    let of_tap = || is(meta(MetaKey::Iifgroup), group(rules));

    inet.base("input", NfChainType::Filter, NfHook::Input, PRIORITY_FILTER);
    inet.rule("input", vec![of_tap(), Step::Drop(None)]);
    inet.rule("input", vec![from_guest(), state(&["invalid"]), Step::Drop(None)]);
    inet.rule("input", vec![from_guest(), is_answer(), Step::Accept(None)]);
    let gateway = text(rules.subnet.address.to_string());
    inet.rule("input", vec![from_guest(), is(ip("daddr"), gateway), Step::Accept(None)]);
    inet.rule("input", vec![from_guest(), Step::Drop(None)]);

    inet.base("forward", NfChainType::Filter, NfHook::Forward, PRIORITY_FILTER);
    inet.rule("forward", vec![of_tap(), Step::Drop(None)]);
    inet.rule("forward", vec![from_guest(), to_guest(), Step::Drop(None)]);
    inet.rule("forward", vec![from_guest(), is(meta(MetaKey::Nfproto), text("ipv6")), Step::Drop(None)]);
    let forged = compare(Operator::NEQ, ip("saddr"), prefix(rules.subnet));
    inet.rule("forward", vec![from_guest(), forged, Step::Drop(None)]);
    inet.rule("forward", vec![from_guest(), state(&["invalid"]), Step::Drop(None)]);
    inet.rule("forward", vec![to_guest(), is_answer(), Step::Accept(None)]);
    inet.rule("forward", vec![to_guest(), Step::Drop(None)]);

    inet.base("postrouting", NfChainType::NAT, NfHook::Postrouting, PRIORITY_SOURCE_NAT);
    let leaves = compare(Operator::NEQ, meta(MetaKey::Oifname), bridge());
    inet.rule("postrouting", vec![is(ip("saddr"), prefix(rules.subnet)), leaves, Step::Masquerade(None)]);
}

fn bridge_chains(bridge: &mut Tables<'_>, rules: &FirewallRules) {
    let of_tap = || is(meta(MetaKey::Iifgroup), group(rules));
    let to_tap = || is(meta(MetaKey::Oifgroup), group(rules));
    let iifname = || meta(MetaKey::Iifname);
    let may_send = |sender: Text, address: Text| {
        is(
            Expression::Named(NamedExpression::Concat(vec![iifname(), sender, address])),
            text(format!("@{PORTS}")),
        )
    };
    bridge.ports();
    bridge.chain(GUESTS);
    // Both the frame's sender and the one that ARP names; the types of frames are implied by nft.
    let asks = may_send(field("ether", "saddr"), field("arp", "saddr ip"));
    let names_itself = may_send(field("arp", "saddr ether"), field("arp", "saddr ip"));
    bridge.rule(GUESTS, vec![asks, names_itself, Step::Accept(None)]);
    bridge.rule(GUESTS, vec![may_send(field("ether", "saddr"), ip("saddr")), Step::Accept(None)]);
    // Also VLAN tags, IPv6, spanning tree and whatever else there is.
    bridge.rule(GUESTS, vec![Step::Drop(None)]);

    bridge.base("prerouting", NfChainType::Filter, NfHook::Prerouting, PRIORITY_BRIDGE_FIRST);
    let jump = Step::Jump(JumpTarget { target: GUESTS.into() });
    bridge.rule("prerouting", vec![of_tap(), jump]);

    bridge.base("input", NfChainType::Filter, NfHook::Input, PRIORITY_BRIDGE_FILTER);
    // The bridge hands such frames to the TAP's own IP stack without the prerouting hook.
    let (mask, link_local) = (text("ff:ff:ff:ff:ff:f0"), text("01:80:c2:00:00:00"));
    let masked = Expression::BinaryOperation(Box::new(BinaryOperation::AND(field("ether", "daddr"), mask)));
    bridge.rule("input", vec![of_tap(), is(masked, link_local), Step::Drop(None)]);

    bridge.base("forward", NfChainType::Filter, NfHook::Forward, PRIORITY_BRIDGE_FILTER);
    bridge.rule("forward", vec![of_tap(), Step::Drop(None)]);
    bridge.rule("forward", vec![to_tap(), Step::Drop(None)]);
}

/// Adds objects of one table to a batch.
struct Tables<'b> {
    batch: &'b mut Batch<'static>,
    family: NfFamily,
    table: String,
}

impl Tables<'_> {
    fn name(&self) -> Cow<'static, str> {
        self.table.clone().into()
    }

    fn table(&mut self) {
        self.batch.add(NfListObject::Table(Table { family: self.family, name: self.name(), handle: None }));
    }

    fn ports(&mut self) {
        let parts = vec![SetType::Ifname, SetType::EtherAddr, SetType::Ipv4Addr];
        self.batch.add(NfListObject::Set(Box::new(Set {
            family: self.family,
            table: self.name(),
            name: PORTS.into(),
            set_type: SetTypeValue::Concatenated(parts.into()),
            ..Set::default()
        })));
    }

    fn chain(&mut self, name: &'static str) {
        self.batch.add(NfListObject::Chain(Chain {
            family: self.family,
            table: self.name(),
            name: name.into(),
            ..Chain::default()
        }));
    }

    fn base(&mut self, name: &'static str, kind: NfChainType, hook: NfHook, priority: i32) {
        self.batch.add(NfListObject::Chain(Chain {
            family: self.family,
            table: self.name(),
            name: name.into(),
            _type: Some(kind),
            hook: Some(hook),
            prio: Some(priority),
            policy: Some(NfChainPolicy::Accept),
            ..Chain::default()
        }));
    }

    fn rule(&mut self, chain: &'static str, steps: Vec<Step>) {
        self.batch.add(NfListObject::Rule(Rule {
            family: self.family,
            table: self.name(),
            chain: chain.into(),
            expr: steps.into(),
            ..Rule::default()
        }));
    }
}

fn compare(op: Operator, left: Text, right: Text) -> Step {
    Statement::Match(Match { left, right, op })
}

fn is(left: Text, right: Text) -> Step {
    compare(Operator::EQ, left, right)
}

fn state(names: &[&'static str]) -> Step {
    let left = Expression::Named(NamedExpression::CT(CT { key: "state".into(), family: None, dir: None }));
    let names = names.iter().map(|&name| text(name)).collect();
    compare(Operator::IN, left, Expression::List(names))
}

fn text(value: impl Into<Cow<'static, str>>) -> Text {
    Expression::String(value.into())
}

fn meta(key: MetaKey) -> Text {
    Expression::Named(NamedExpression::Meta(Meta { key }))
}

fn field(protocol: &'static str, field: &'static str) -> Text {
    let field = PayloadField { protocol: protocol.into(), field: field.into() };
    Expression::Named(NamedExpression::Payload(Payload::PayloadField(field)))
}

fn ip(name: &'static str) -> Text {
    field("ip", name)
}

fn prefix(subnet: Cidr) -> Text {
    let addr = Box::new(text(subnet.network().to_string()));
    Expression::Named(NamedExpression::Prefix(Prefix { addr, len: u32::from(subnet.prefix) }))
}

fn group(rules: &FirewallRules) -> Text {
    Expression::Number(port_group(&rules.bridge))
}
