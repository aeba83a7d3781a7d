//! The rules for guests whose egress is mediated, and for the process that carries it.
//!
//! ```text
//! inet   capture   connections to ports 80 and 443, and for lane `all` questions for names, go to the process
//!        input     mediated guests reach the ports of the process (`admit`)
//!        forward   what is left of lane `all` is refused at once; lane `web` keeps all but HTTP, HTTPS and QUIC; a
//!                  guest in no lane reaches nothing (`refuse_the_rest`)
//!        confine   the process reaches public addresses, name servers and configured networks, and neither this host
//!                  nor a guest, whatever becomes of its own checks
//! ```
//! An address is in the set of exactly one lane, and the rules of the bridge let nobody else send with it.

use std::collections::HashSet;

use nftables::expr::{Expression, Fib, FibFlag, FibResult, MetaKey, NamedExpression};
use nftables::stmt::{NAT, NATFamily, Operator, Reject, RejectType, Statement};
use nftables::types::{NfChainType, NfHook, RejectCode};
use stead_controllers::host::FirewallRules;
use stead_schemas::network::{Lane, MediatorGate};

use super::nft_builder::{
    DNS_PORT, PRIORITY_FILTER, SPECIAL_NETWORKS, Step, Tables, Text, compare, field, from_guest, ip, is,
    meta, prefix_of, refuse, set, state, text,
};

/// Priority of `dstnat`.
const PRIORITY_DESTINATION_NAT: i32 = -100;
/// Ports of HTTP and HTTPS.
const WEB_PORTS: [u16; 2] = [80, 443];

/// The ways by which packets of guests leave the host.
pub(super) const LANES: [Lane; 3] = [Lane::Direct, Lane::Web, Lane::All];

/// Returns the name of the set with the addresses of the guests of a lane.
pub(super) fn lane_set(lane: Lane) -> &'static str {
    match lane {
        Lane::Direct => "direct",
        Lane::Web => "mediated_web",
        Lane::All => "mediated_all",
    }
}

/// Matches a packet from a guest of the lane.
fn is_in(lane: Lane) -> Step {
    is(ip("saddr"), text(format!("@{}", lane_set(lane))))
}

fn is_not_in(lane: Lane) -> Step {
    compare(Operator::NEQ, ip("saddr"), text(format!("@{}", lane_set(lane))))
}

fn ports(ports: impl IntoIterator<Item = u16>) -> Text {
    set(ports.into_iter().map(|port| Expression::Number(port.into())))
}

fn to_ports(protocol: &'static str, all: impl IntoIterator<Item = u16>) -> Step {
    is(field(protocol, "dport"), ports(all))
}

/// Leads connections of mediated guests to the process.
pub(super) fn capture(inet: &mut Tables<'_>, rules: &FirewallRules, gate: &MediatorGate) {
    let settings = &gate.settings;
    let lead = |port: u16| {
        Statement::DNAT(Some(NAT {
            addr: Some(text(settings.address.to_string())),
            family: Some(NATFamily::IP),
            port: Some(Expression::Number(port.into())),
            flags: None,
        }))
    };
    inet.base("capture", NfChainType::NAT, NfHook::Prerouting, PRIORITY_DESTINATION_NAT);
    let mut own = vec![rules.subnet.address, settings.address];
    own.dedup();
    let own = || set(own.iter().map(|address| text(address.to_string())));
    for lane in [Lane::All, Lane::Web] {
        let is_elsewhere = compare(Operator::NEQ, ip("daddr"), own());
        let is_web = to_ports("tcp", WEB_PORTS);
        let steps = vec![from_guest(rules), is_in(lane), is_elsewhere, is_web, lead(settings.ports.captured)];
        inet.rule("capture", steps);
    }
    for protocol in ["udp", "tcp"] {
        let is_question = is(field(protocol, "dport"), Expression::Number(DNS_PORT.into()));
        let steps = vec![from_guest(rules), is_in(Lane::All), is_question, lead(settings.ports.names)];
        inet.rule("capture", steps);
    }
}

/// Lets mediated guests reach the ports of the process.
pub(super) fn admit(inet: &mut Tables<'_>, rules: &FirewallRules, gate: &MediatorGate) {
    let settings = &gate.settings;
    let is_process = || is(ip("daddr"), text(settings.address.to_string()));
    let carried = [settings.ports.captured, settings.ports.explicit];
    for lane in [Lane::All, Lane::Web] {
        let steps = vec![from_guest(rules), is_in(lane), is_process(), to_ports("tcp", carried)];
        inet.rule("input", [steps, vec![Statement::Accept(None)]].concat());
    }
    for protocol in ["udp", "tcp"] {
        let is_question = to_ports(protocol, [settings.ports.names]);
        let steps = vec![from_guest(rules), is_in(Lane::All), is_process(), is_question];
        inet.rule("input", [steps, vec![Statement::Accept(None)]].concat());
    }
}

/// Refuses what mediated guests send to elsewhere.
pub(super) fn refuse_the_rest(inet: &mut Tables<'_>, rules: &FirewallRules) {
    let is_tcp = || is(meta(MetaKey::L4proto), text("tcp"));
    let all = || vec![from_guest(rules), is_in(Lane::All)];
    inet.rule("forward", [all(), vec![is_tcp(), reset()]].concat());
    inet.rule("forward", [all(), vec![unreachable()]].concat());
    let web = || vec![from_guest(rules), is_in(Lane::Web)];
    inet.rule("forward", [web(), vec![to_ports("tcp", WEB_PORTS), reset()]].concat());
    inet.rule("forward", [web(), vec![to_ports("udp", WEB_PORTS), unreachable()]].concat());
    let lanes = vec![from_guest(rules), is_not_in(Lane::Direct), is_not_in(Lane::Web)];
    inet.rule("forward", [lanes, vec![Statement::Drop(None)]].concat());
}

/// Restricts what the process may reach.
pub(super) fn confine(inet: &mut Tables<'_>, rules: &FirewallRules, gate: &MediatorGate) {
    let by_process = || is(meta(MetaKey::Skuid), Expression::Number(gate.user));
    inet.base("confine", NfChainType::Filter, NfHook::Output, PRIORITY_FILTER);
    let mut rule = |steps: Vec<Step>| inet.rule("confine", [vec![by_process()], steps].concat());
    let settings = &gate.settings;
    rule(vec![state(&["established"]), Statement::Accept(None)]);
    let open = settings.open.iter().filter_map(|network| match network {
        ipnet::IpNet::V4(network) => Some(prefix_of(network.network(), network.prefix_len())),
        ipnet::IpNet::V6(_) => None,
    });
    for network in open {
        rule(vec![is(ip("daddr"), network), Statement::Accept(None)]);
    }
    for server in settings.dns.iter().filter(|server| server.is_ipv4()) {
        for protocol in ["udp", "tcp"] {
            let is_server = is(ip("daddr"), text(server.to_string()));
            rule(vec![is_server, to_ports(protocol, [DNS_PORT]), Statement::Accept(None)]);
        }
    }
    rule(vec![is(meta(MetaKey::Oifname), text(rules.bridge.to_string())), refuse()]);
    let flags = HashSet::from([FibFlag::Daddr]);
    let destination = Expression::Named(NamedExpression::Fib(Fib { result: FibResult::Type, flags }));
    rule(vec![is(meta(MetaKey::Nfproto), text("ipv6")), Statement::Drop(None)]);
    rule(vec![is(destination, text("local")), refuse()]);
    let special = SPECIAL_NETWORKS.iter().map(|&(address, length)| prefix_of(address, length));
    rule(vec![is(ip("daddr"), set(special)), refuse()]);
}

fn reset() -> Step {
    Statement::Reject(Some(Reject::new(Some(RejectType::TCPReset), None)))
}

/// Refuses a packet as if nothing listened at its port: clients of QUIC then use TCP.
fn unreachable() -> Step {
    Statement::Reject(Some(Reject::new(Some(RejectType::ICMP), Some(RejectCode::PortUnreach))))
}
