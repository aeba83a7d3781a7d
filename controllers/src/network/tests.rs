//! Tables and properties of the network plan and status, on a modelled host.

use std::collections::BTreeMap;

use jiff::Timestamp;
use proptest::prelude::*;
use stead_schemas::condition::{self, ConditionStatus, ConditionType, Reason};
use stead_schemas::meta::Meta;
use stead_schemas::names::Name;
use stead_schemas::network::NetworkSpec;
use stead_schemas::numbers::Generation;

use super::*;
use crate::host::{FirewallSeen, Forwarding, Link, Route};
use crate::runtime::{Outcome, Refusal};

fn uid(first: char) -> Uid {
    format!("{first}{:023}", 0).parse().expect("valid")
}

fn at(second: i64) -> Timestamp {
    Timestamp::from_second(second).expect("in range")
}

fn bridge() -> LinkName {
    "st-br".parse().expect("valid")
}

fn cidr(text: &str) -> Cidr {
    text.parse().expect("valid")
}

fn object() -> Object<Network> {
    let meta = Meta {
        uid: uid('n'),
        name: Name::resource("default").expect("valid"),
        tags: BTreeMap::default(),
        generation: Generation(1),
        resource_version: 1,
        created_at: at(0),
        deletion_requested_at: None,
        finalizers: Default::default(),
        owner: None,
    };
    let gateway = cidr("10.99.0.1/24");
    let spec = NetworkSpec {
        bridge: bridge(),
        gateway,
        dns: Vec::new(),
        table: "stead".to_owned(),
        reach: Default::default(),
        resolver: Default::default(),
        mtu: None,
        mediator: None,
    };
    Object { meta, spec, status: NetworkStatus::default() }
}

fn link(owner: char) -> Link {
    Link {
        name: bridge(),
        owner: uid(owner),
        kind: LinkKind::Bridge,
        master: None,
        is_up: false,
        is_isolated: false,
        addresses: Vec::new(),
    }
}

fn nothing() -> Observed {
    Observed {
        bridge: None,
        firewall: None,
        is_table_shared: false,
        forwarding: Forwarding::Off,
        uplink_mtu: None,
        conflicts: Vec::new(),
    }
}

/// Applies the effect of an action to the host. The port rules of the table do not concern the network.
fn apply(seen: &mut Observed, action: &Action) {
    let bridge_of = |seen: &mut Observed| seen.bridge.take().expect("steps on a bridge follow its making");
    match action {
        Action::LoadFirewall(rules) => {
            assert_eq!((rules.table.as_str(), &rules.bridge), ("stead", &bridge()));
            assert_eq!(rules.is_for_guests_only, seen.forwarding != Forwarding::ByHost);
            let nics = seen.firewall.take().map_or_else(Vec::new, |firewall| firewall.nics);
            seen.firewall = Some(FirewallSeen { is_intact: true, nics });
        }
        Action::CreateBridge { name, owner } => {
            assert!(seen.firewall.as_ref().is_some_and(|firewall| firewall.is_intact), "guarded first");
            assert_eq!((name, owner), (&bridge(), &uid('n')));
            seen.bridge.get_or_insert_with(|| link('n'));
        }
        Action::AddAddress { address, .. } => {
            let mut link = bridge_of(seen);
            link.addresses.push(*address);
            seen.bridge = Some(link);
        }
        Action::RemoveAddress { address, .. } => {
            let mut link = bridge_of(seen);
            link.addresses.retain(|other| other != address);
            seen.bridge = Some(link);
        }
        Action::RaiseBridge(_) => seen.bridge = Some(Link { is_up: true, ..bridge_of(seen) }),
        Action::Forward => seen.forwarding = Forwarding::ForGuests,
        Action::RemoveBridge(_) => seen.bridge = None,
        Action::RemoveFirewall { .. } => seen.firewall = None,
    }
}

fn is_desired(seen: &Observed) -> bool {
    let is_bridge_good = seen
        .bridge
        .as_ref()
        .is_some_and(|link| link.is_up && link.owner == uid('n') && link.addresses == [cidr("10.99.0.1/24")]);
    is_bridge_good
        && seen.forwarding != Forwarding::Off
        && seen.firewall.as_ref().is_some_and(|firewall| firewall.is_intact)
}

#[test]
fn a_network_is_made_guarded_first_and_raised_last() {
    let object = object();
    let Plan::Act(steps) = plan::plan(&Desired::Present(&object), &nothing(), at(0)) else {
        panic!("there is work to do")
    };
    let bridge = bridge();
    let expected = [
        Action::LoadFirewall(rules(&object, Forwarding::Off)),
        Action::CreateBridge { name: bridge.clone(), owner: uid('n') },
        Action::AddAddress { bridge: bridge.clone(), address: object.spec.gateway },
        Action::RaiseBridge(bridge),
        Action::Forward,
    ];
    assert_eq!(steps, expected);
}

#[test]
fn a_conflicting_route_refuses_a_new_network_and_degrades_a_standing_one() {
    let object = object();
    let route = Route { destination: cidr("10.0.0.0/8"), link: Some("up0".parse().expect("valid")) };
    let mut seen = Observed { conflicts: vec![route], ..nothing() };
    let Plan::Refuse(Refusal { reason, message }) = plan::plan(&Desired::Present(&object), &seen, at(0))
    else {
        panic!("nothing is made")
    };
    assert_eq!(reason, Reason::SubnetConflict);
    assert_eq!(message, "the subnet 10.99.0.0/24 overlaps the host's route to 10.0.0.0/8 by up0");
    seen.bridge = Some(Link { is_up: true, addresses: vec![cidr("10.99.0.1/24")], ..link('n') });
    seen.firewall = Some(FirewallSeen { is_intact: true, nics: Vec::new() });
    seen.forwarding = Forwarding::ForGuests;
    assert_eq!(plan::plan(&Desired::Present(&object), &seen, at(0)), Plan::Converged);
    let mut object = object;
    for second in [3, 4] {
        let end = PassEnd { now: at(second).into(), outcome: Outcome::Converged };
        object.status = status::status(&object, Some(&seen), &end);
        let degraded = condition::find(&object.status.conditions, ConditionType::Degraded).expect("set");
        assert_eq!((degraded.status, degraded.reason), (ConditionStatus::True, Reason::SubnetConflict));
        assert_eq!(degraded.last_transition_time, at(3));
        assert!(condition::is_ready(&object.status.conditions));
    }
    seen.conflicts.clear();
    let status =
        status::status(&object, Some(&seen), &PassEnd { now: at(5).into(), outcome: Outcome::Converged });
    let degraded = condition::find(&status.conditions, ConditionType::Degraded).expect("set");
    assert_eq!(degraded.status, ConditionStatus::False);
}

#[test]
fn links_of_other_objects_are_waited_for_or_refused_and_never_removed() {
    let object = object();
    let tap = Link { kind: LinkKind::Tap, ..link('n') };
    let seen = Observed { bridge: Some(tap), ..nothing() };
    let refused = plan::plan(&Desired::Present(&object), &seen, at(0));
    assert!(matches!(refused, Plan::Refuse(Refusal { reason: Reason::NameTaken, .. })), "{refused:?}");
    let firewall = Some(FirewallSeen { is_intact: true, nics: Vec::new() });
    let seen = Observed { bridge: Some(link('m')), firewall, ..nothing() };
    let waits = plan::plan(&Desired::Present(&object), &seen, at(0));
    assert!(matches!(&waits, Plan::Wait(wait) if wait.until > Some(at(0))), "{waits:?}");
    // The tables of a deleted network are removed under the bridge of another network; those of its successor
    // stay.
    let removal = Plan::Act(vec![Action::RemoveFirewall { table: "stead".to_owned() }]);
    assert_eq!(plan::plan(&Desired::Absent(Some(&object)), &seen, at(0)), removal);
    let seen = Observed { is_table_shared: true, ..seen };
    assert_eq!(plan::plan(&Desired::Absent(Some(&object)), &seen, at(0)), Plan::Converged);
    let seen = Observed { bridge: Some(link('n')), ..seen };
    let removal = Plan::Act(vec![Action::RemoveBridge(bridge())]);
    assert_eq!(plan::plan(&Desired::Absent(Some(&object)), &seen, at(0)), removal);
}

#[test]
fn an_orphaned_bridge_goes_and_a_half_made_one_goes_with_its_tables() {
    let object = object();
    let seen = Observed { bridge: Some(link('n')), forwarding: Forwarding::ForGuests, ..nothing() };
    let removal = Plan::Act(vec![Action::RemoveBridge(bridge())]);
    assert_eq!(plan::plan(&Desired::Absent(None), &seen, at(0)), removal);
    let firewall = Some(FirewallSeen { is_intact: false, nics: Vec::new() });
    let seen = Observed { firewall, ..nothing() };
    let Plan::Act(steps) = plan::plan(&Desired::Absent(Some(&object)), &seen, at(0)) else {
        panic!("the tables are left")
    };
    assert_eq!(steps, [Action::RemoveBridge(bridge()), Action::RemoveFirewall { table: "stead".to_owned() }]);
}

fn any_host() -> impl Strategy<Value = Observed> {
    let addresses = proptest::collection::vec(
        prop_oneof![Just("10.99.0.1/24"), Just("10.99.0.2/24"), Just("192.0.2.1/30")].prop_map(cidr),
        0..30,
    );
    let bridge = proptest::option::of((any::<bool>(), addresses).prop_map(|(is_up, mut addresses)| {
        addresses.sort_unstable();
        addresses.dedup();
        Link { is_up, addresses, ..link('n') }
    }));
    let firewall = proptest::option::of(
        any::<bool>().prop_map(|is_intact| FirewallSeen { is_intact, nics: Vec::new() }),
    );
    let forwarding =
        prop_oneof![Just(Forwarding::Off), Just(Forwarding::ForGuests), Just(Forwarding::ByHost)];
    (bridge, firewall, forwarding).prop_map(|(bridge, firewall, forwarding)| Observed {
        bridge,
        firewall,
        is_table_shared: false,
        forwarding,
        uplink_mtu: None,
        conflicts: Vec::new(),
    })
}

proptest! {
    /// Checks that the spec is reached in few rounds, from any state of the host and wherever the daemon
    /// dies.
    #[test]
    fn any_host_converges_through_any_crash(
        mut seen in any_host(),
        deaths in proptest::collection::vec(0..6usize, 0..4),
    ) {
        let object = object();
        let mut deaths = deaths.into_iter();
        for _ in 0..8 {
            let Plan::Act(steps) = plan::plan(&Desired::Present(&object), &seen, at(0)) else { break };
            let done = deaths.next().unwrap_or(steps.len());
            steps.iter().take(done).for_each(|step| apply(&mut seen, step));
        }
        prop_assert_eq!(plan::plan(&Desired::Present(&object), &seen, at(0)), Plan::Converged);
        prop_assert!(is_desired(&seen), "{seen:?}");
    }

    #[test]
    fn a_plan_is_empty_exactly_when_the_host_is_as_specified(seen in any_host()) {
        let object = object();
        let is_converged = plan::plan(&Desired::Present(&object), &seen, at(0)) == Plan::Converged;
        prop_assert_eq!(is_converged, is_desired(&seen));
    }

    #[test]
    fn deletion_leaves_nothing_and_forwarding_as_it_is(mut seen in any_host(), death in 0..3usize) {
        let object = object();
        let before = seen.forwarding;
        for limit in [death, usize::MAX, usize::MAX] {
            if let Plan::Act(steps) = plan::plan(&Desired::Absent(Some(&object)), &seen, at(0)) {
                steps.iter().take(limit).for_each(|step| apply(&mut seen, step));
            }
        }
        prop_assert_eq!(plan::plan(&Desired::Absent(Some(&object)), &seen, at(0)), Plan::Converged);
        prop_assert!(seen.bridge.is_none() && seen.firewall.is_none());
        prop_assert_eq!(seen.forwarding, before);
    }
}
