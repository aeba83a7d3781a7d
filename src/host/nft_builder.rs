//! The parts of which the text of our nft tables is put together: expressions, and objects of one table.

use std::borrow::Cow;
use std::net::Ipv4Addr;

use nftables::batch::Batch;
use nftables::expr::{
    CT, Expression, Meta, MetaKey, NamedExpression, Payload, PayloadField, Prefix, SetItem,
};
use nftables::schema::{Chain, NfListObject, Rule, Set, SetTypeValue, Table};
use nftables::stmt::{Match, Operator, Reject, RejectType, Statement};
use nftables::types::{NfChainPolicy, NfChainType, NfFamily, NfHook, RejectCode};
use stead_controllers::host::FirewallRules;
use stead_schemas::network::Cidr;

pub(super) type Text = Expression<'static>;
pub(super) type Step = Statement<'static>;

/// Priority just before the host's own filter: a drop here is final, an accept is not.
pub(super) const PRIORITY_FILTER: i32 = -10;

pub(super) const DNS_PORT: u16 = 53;

/// Networks that are not part of the public Internet (IANA's special-purpose registry): a host's own networks,
/// metadata services of clouds, loopback, multicast. Guests reach them only if the configuration says so.
pub(super) const SPECIAL_NETWORKS: [(Ipv4Addr, u8); 10] = [
    (Ipv4Addr::new(0, 0, 0, 0), 8),
    (Ipv4Addr::new(10, 0, 0, 0), 8),
    (Ipv4Addr::new(100, 64, 0, 0), 10),
    (Ipv4Addr::new(127, 0, 0, 0), 8),
    (Ipv4Addr::new(169, 254, 0, 0), 16),
    (Ipv4Addr::new(172, 16, 0, 0), 12),
    (Ipv4Addr::new(192, 0, 0, 0), 24),
    (Ipv4Addr::new(192, 168, 0, 0), 16),
    (Ipv4Addr::new(198, 18, 0, 0), 15),
    // This is multicast and everything above it.
    (Ipv4Addr::new(224, 0, 0, 0), 3),
];

/// A builder that adds objects of one table to a batch.
pub(super) struct Tables<'b> {
    pub(super) batch: &'b mut Batch<'static>,
    pub(super) family: NfFamily,
    pub(super) table: String,
}

impl Tables<'_> {
    pub(super) fn name(&self) -> Cow<'static, str> {
        self.table.clone().into()
    }

    pub(super) fn table(&mut self) {
        self.batch.add(NfListObject::Table(Table { family: self.family, name: self.name(), handle: None }));
    }

    pub(super) fn set(&mut self, name: &'static str, set_type: SetTypeValue<'static>) {
        self.batch.add(NfListObject::Set(Box::new(Set {
            family: self.family,
            table: self.name(),
            name: name.into(),
            set_type,
            ..Set::default()
        })));
    }

    pub(super) fn chain(&mut self, name: &'static str) {
        self.batch.add(NfListObject::Chain(Chain {
            family: self.family,
            table: self.name(),
            name: name.into(),
            ..Chain::default()
        }));
    }

    pub(super) fn base(&mut self, name: &'static str, kind: NfChainType, hook: NfHook, priority: i32) {
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

    pub(super) fn rule(&mut self, chain: &'static str, steps: Vec<Step>) {
        self.batch.add(NfListObject::Rule(Rule {
            family: self.family,
            table: self.name(),
            chain: chain.into(),
            expr: steps.into(),
            ..Rule::default()
        }));
    }
}

pub(super) fn compare(op: Operator, left: Text, right: Text) -> Step {
    Statement::Match(Match { left, right, op })
}

pub(super) fn is(left: Text, right: Text) -> Step {
    compare(Operator::EQ, left, right)
}

/// Matches a packet that a guest sends through the host.
pub(super) fn from_guest(rules: &FirewallRules) -> Step {
    is(meta(MetaKey::Iifname), text(rules.bridge.to_string()))
}

pub(super) fn state(names: &[&'static str]) -> Step {
    let left = Expression::Named(NamedExpression::CT(CT { key: "state".into(), family: None, dir: None }));
    let names = names.iter().map(|&name| text(name)).collect();
    compare(Operator::IN, left, Expression::List(names))
}

/// Refuses a packet with an answer, so that a guest's program fails at once.
pub(super) fn refuse() -> Step {
    Statement::Reject(Some(Reject::new(Some(RejectType::ICMP), Some(RejectCode::AdminProhibited))))
}

pub(super) fn set(items: impl Iterator<Item = Text>) -> Text {
    Expression::Named(NamedExpression::Set(items.map(SetItem::Element).collect()))
}

pub(super) fn text(value: impl Into<Cow<'static, str>>) -> Text {
    Expression::String(value.into())
}

pub(super) fn meta(key: MetaKey) -> Text {
    Expression::Named(NamedExpression::Meta(Meta { key }))
}

pub(super) fn field(protocol: &'static str, field: &'static str) -> Text {
    let field = PayloadField { protocol: protocol.into(), field: field.into() };
    Expression::Named(NamedExpression::Payload(Payload::PayloadField(field)))
}

pub(super) fn ip(name: &'static str) -> Text {
    field("ip", name)
}

pub(super) fn prefix(subnet: Cidr) -> Text {
    prefix_of(subnet.network(), subnet.prefix)
}

pub(super) fn prefix_of(address: Ipv4Addr, length: u8) -> Text {
    let addr = Box::new(text(address.to_string()));
    Expression::Named(NamedExpression::Prefix(Prefix { addr, len: u32::from(length) }))
}
