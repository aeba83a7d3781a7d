//! Tables and properties of the port plan, on a modelled host.

use std::collections::BTreeMap;

use jiff::Timestamp;
use proptest::prelude::*;
use stead_schemas::condition::{Condition, ConditionStatus, ConditionType, Reason};
use stead_schemas::limits::TAP_KEPT;
use stead_schemas::meta::Meta;
use stead_schemas::names::Name;
use stead_schemas::network::{Bandwidth, Mac, NicSpec};
use stead_schemas::numbers::Generation;

use super::*;
use crate::host::{Detour, Limit, Link, Shaping};
use crate::runtime::{Record, Refusal, Wait};

fn uid(first: char) -> Uid {
    format!("{first}{:023}", 0).parse().expect("valid")
}

fn name(text: &str) -> LinkName {
    text.parse().expect("valid")
}

fn now() -> Timestamp {
    Timestamp::from_second(5).expect("in range")
}

/// Limits of both directions.
const LIMITED: Bandwidth = Bandwidth { download: Some(Rate(1_000_000)), upload: Some(Rate(500_000)) };

fn object() -> Object<Nic> {
    limited(Bandwidth::default())
}

/// Returns a nic with these limits.
fn limited(bandwidth: Bandwidth) -> Object<Nic> {
    let meta = Meta {
        uid: uid('p'),
        name: Name::from(&uid('p')),
        tags: BTreeMap::default(),
        generation: Generation(1),
        resource_version: 1,
        created_at: now(),
        deletion_requested_at: None,
        finalizers: Default::default(),
        owner: None,
    };
    let address = "10.99.0.2".parse().expect("valid");
    let spec = NicSpec {
        network: uid('n'),
        bridge: name("st-br"),
        tap: name("st-tap"),
        table: "stead".to_owned(),
        address,
        mac: Mac::of_address(address),
        class: 1,
        has_queues: false,
        bandwidth,
        lane: Default::default(),
    };
    Object { meta, spec, status: NicStatus::default() }
}

fn tap(owner: char) -> Link {
    Link {
        name: name("st-tap"),
        owner: uid(owner),
        kind: LinkKind::Tap,
        master: None,
        is_up: false,
        is_isolated: false,
        addresses: Vec::new(),
    }
}

fn ifb() -> Link {
    Link { name: name("St-tap"), kind: LinkKind::Ifb, ..tap('p') }
}

fn nothing() -> Observed {
    Observed {
        is_network_ready: true,
        network_trouble: None,
        is_needed: true,
        tap: None,
        has_rule: false,
        shaping: Shaping::default(),
        ifb: None,
        ifb_limit: Limit::None,
    }
}

fn limit(rate: Option<Rate>) -> Limit {
    rate.map_or(Limit::None, Limit::At)
}

/// Applies the effect of an action to the host, and asserts what must never happen for a nic with these limits.
fn apply(seen: &mut Observed, bandwidth: Bandwidth, action: &Action) {
    let tap_of = |seen: &mut Observed| seen.tap.take().expect("steps on a TAP follow its making");
    match action {
        Action::CreateTap { name: made, owner, has_queues } => {
            assert_eq!((made, owner, *has_queues), (&name("st-tap"), &uid('p'), false));
            seen.tap.get_or_insert_with(|| tap('p'));
        }
        Action::Enslave { bridge, .. } => {
            seen.tap = Some(Link { master: Some(bridge.clone()), is_isolated: false, ..tap_of(seen) });
        }
        Action::Isolate(_) => {
            let tap = tap_of(seen);
            assert!(tap.master.is_some(), "only a bridge's port can be isolated");
            seen.tap = Some(Link { is_isolated: true, ..tap });
        }
        Action::AddRule { rule, .. } => {
            assert_eq!((&rule.tap, rule.mac), (&name("st-tap"), object().spec.mac));
            seen.has_rule = true;
        }
        Action::RaiseTap(_) => {
            let tap = tap_of(seen);
            assert!(tap.is_isolated && seen.has_rule, "a guest was let loose");
            assert!(is_limited(seen, bandwidth), "a guest was not limited: {seen:?}");
            seen.tap = Some(Link { is_up: true, ..tap });
        }
        Action::CreateIfb { name: made, owner } => {
            assert_eq!((made, owner), (&name("St-tap"), &uid('p')));
            seen.ifb.get_or_insert_with(ifb);
        }
        Action::Limit { link, rate } if *link == name("st-tap") => {
            assert!(seen.tap.is_some());
            seen.shaping.limit = limit(*rate);
        }
        Action::Limit { link, rate } => {
            assert_eq!((link, seen.ifb.is_some()), (&name("St-tap"), true));
            seen.ifb_limit = limit(*rate);
        }
        Action::RaiseIfb(_) => seen.ifb.as_mut().expect("it was made").is_up = true,
        Action::Divert { tap, through: Some(through) } => {
            assert_eq!((tap, through), (&name("st-tap"), &name("St-tap")));
            let is_ready = seen.ifb.as_ref().is_some_and(|ifb| ifb.is_up);
            assert!(is_ready && seen.ifb_limit == limit(bandwidth.upload), "frames are led to nowhere");
            seen.shaping.detour = Detour::Through(through.clone());
        }
        Action::Divert { tap, through: None } => {
            assert_eq!(tap, &name("st-tap"));
            seen.shaping.detour = Detour::None;
        }
        Action::RemoveRule { .. } => seen.has_rule = false,
        Action::RemoveTap(_) => {
            assert!(!seen.has_rule, "the rule goes first");
            (seen.tap, seen.shaping) = (None, Shaping::default());
        }
        Action::RemoveIfb(_) => {
            assert_ne!(seen.shaping.detour, Detour::Through(name("St-tap")), "frames are led to nowhere");
            (seen.ifb, seen.ifb_limit) = (None, Limit::None);
        }
    }
}

/// Returns whether the traffic has exactly these limits, and nothing else is left of others.
fn is_limited(seen: &Observed, bandwidth: Bandwidth) -> bool {
    let detour = bandwidth.upload.map_or(Detour::None, |_| Detour::Through(name("St-tap")));
    let is_ifb_good = match bandwidth.upload {
        Some(_) => seen.ifb.as_ref().is_some_and(|ifb| ifb.is_up),
        None => seen.ifb.is_none(),
    };
    let is_tap_good = seen.shaping == Shaping { limit: limit(bandwidth.download), detour };
    is_tap_good && is_ifb_good && seen.ifb_limit == limit(bandwidth.upload)
}

fn is_desired(seen: &Observed, bandwidth: Bandwidth) -> bool {
    let is_tap_good = seen.tap.as_ref().is_some_and(|tap| {
        tap.is_up && tap.is_isolated && tap.master == Some(name("st-br")) && tap.owner == uid('p')
    });
    is_tap_good && seen.has_rule && is_limited(seen, bandwidth)
}

#[test]
fn a_nic_waits_for_its_network_in_every_state() {
    let object = object();
    for tap in [None, Some(tap('p'))] {
        let why = "the subnet 10.9.0.0/24 overlaps the host's route to 10.0.0.0/8 by eth0";
        let network_trouble = Some(why.to_owned());
        let seen = Observed { is_network_ready: false, network_trouble, tap, ..nothing() };
        let Plan::Wait(Wait { reason, until, message }) =
            plan::plan(&Desired::Present(&object), &seen, now().into())
        else {
            panic!("it waits");
        };
        assert_eq!((reason, until), (Reason::WaitingForNetwork, None));
        assert!(message.ends_with(why), "the network's own reason is passed on: {message}");
    }
}

#[test]
fn a_link_of_another_object_is_refused_and_never_removed() {
    let object = object();
    let bridge = Link { kind: LinkKind::Bridge, ..tap('p') };
    for link in [tap('q'), bridge] {
        let seen = Observed { tap: Some(link), ..nothing() };
        let plan = plan::plan(&Desired::Present(&object), &seen, now().into());
        assert!(matches!(plan, Plan::Refuse(Refusal { reason: Reason::NameTaken, .. })), "{plan:?}");
        assert_eq!(plan::plan(&Desired::Absent(Some(&object)), &seen, now().into()), Plan::Converged);
    }
    for link in [Link { owner: uid('q'), ..ifb() }, Link { kind: LinkKind::Tap, ..ifb() }] {
        let seen = Observed { ifb: Some(link), ..nothing() };
        let plan = plan::plan(&Desired::Present(&object), &seen, now().into());
        assert!(matches!(plan, Plan::Refuse(Refusal { reason: Reason::NameTaken, .. })), "{plan:?}");
        assert_eq!(plan::plan(&Desired::Absent(Some(&object)), &seen, now().into()), Plan::Converged);
    }
}

#[test]
fn an_orphaned_tap_goes() {
    let seen = Observed { is_network_ready: false, tap: Some(tap('p')), ..nothing() };
    let removal = Plan::Act(vec![Action::RemoveTap(name("st-tap"))]);
    assert_eq!(plan::plan(&Desired::Absent(None), &seen, now().into()), removal);
    let seen = Observed { ifb: Some(ifb()), ..nothing() };
    let removal = Plan::Act(vec![Action::RemoveIfb(name("St-tap"))]);
    assert_eq!(plan::plan(&Desired::Absent(None), &seen, now().into()), removal);
    assert_eq!(plan::plan(&Desired::Absent(None), &nothing(), now().into()), Plan::Converged);
}

/// Returns the object with the record of the pass that ends with this plan.
fn recorded(mut object: Object<Nic>, plan: &Plan<Action>) -> Object<Nic> {
    let (status, reason) = match plan {
        Plan::Wait(Wait { reason, .. }) | Plan::Record(Record { reason, .. }) => {
            (ConditionStatus::False, *reason)
        }
        _ => (ConditionStatus::True, Reason::Converged),
    };
    object.status.conditions = vec![Condition {
        kind: ConditionType::Ready,
        status,
        reason,
        message: String::new(),
        observed_generation: Generation(1),
        last_transition_time: now(),
    }];
    object
}

#[test]
fn the_tap_of_a_vm_that_is_down_goes_after_that_was_recorded_and_its_rule_stays() {
    let good = Link { is_up: true, is_isolated: true, master: Some(name("st-br")), ..tap('p') };
    let up_again = Observed {
        tap: Some(good),
        has_rule: true,
        shaping: Shaping { limit: limit(LIMITED.download), detour: Detour::Through(name("St-tap")) },
        ifb: Some(Link { is_up: true, ..ifb() }),
        ifb_limit: limit(LIMITED.upload),
        ..nothing()
    };
    let down = Observed { is_needed: false, ..up_again.clone() };
    let object = recorded(limited(LIMITED), &Plan::Converged);
    let first = plan::plan(&Desired::Present(&object), &down, now().into());
    assert!(matches!(&first, Plan::Record(record) if record.reason == Reason::NotNeeded), "{first:?}");
    let object = recorded(object, &first);
    let kept_until = now() + TAP_KEPT;
    let kept = plan::plan(&Desired::Present(&object), &down, now().into());
    assert!(matches!(kept, Plan::Wait(Wait { until: Some(until), .. }) if until == kept_until), "{kept:?}");
    let back = plan::plan(&Desired::Present(&object), &up_again, now().into());
    assert_eq!(back, Plan::Converged, "whoever comes back soon finds it");
    let (tap_goes, ifb_goes) = (Action::RemoveTap(name("st-tap")), Action::RemoveIfb(name("St-tap")));
    let removal = Plan::Act(vec![tap_goes, ifb_goes.clone()]);
    assert_eq!(plan::plan(&Desired::Present(&object), &down, kept_until.into()), removal);
    // The daemon died between the two.
    let half_gone = Observed { tap: None, shaping: Shaping::default(), ..down };
    let rest = plan::plan(&Desired::Present(&object), &half_gone, kept_until.into());
    assert_eq!(rest, Plan::Act(vec![ifb_goes]));
    let gone = Observed { ifb: None, ifb_limit: Limit::None, ..half_gone };
    let rest = plan::plan(&Desired::Present(&object), &gone, now().into());
    assert!(matches!(rest, Plan::Wait(Wait { reason: Reason::NotNeeded, until: None, .. })), "{rest:?}");
    // The table was lost meanwhile.
    let lost = Observed { has_rule: false, ..gone.clone() };
    let Plan::Act(steps) = plan::plan(&Desired::Present(&object), &lost, now().into()) else {
        panic!("no rule")
    };
    assert!(matches!(steps[..], [Action::AddRule { .. }]), "{steps:?}");
    // The port is needed again in between, so its TAP is not removed.
    let again = plan::plan(&Desired::Present(&object), &Observed { is_needed: true, ..gone }, now().into());
    assert!(matches!(&again, Plan::Act(steps) if matches!(steps[0], Action::CreateTap { .. })), "{again:?}");
}

#[test]
fn a_limit_that_changes_is_changed_in_one_step() {
    let converged = {
        let mut seen = nothing();
        let Plan::Act(steps) = plan::plan(&Desired::Present(&limited(LIMITED)), &seen, now().into()) else {
            panic!("there is much to do")
        };
        steps.iter().for_each(|step| apply(&mut seen, LIMITED, step));
        seen
    };
    let tap = |rate| Action::Limit { link: name("st-tap"), rate };
    let ifb = |rate| Action::Limit { link: name("St-tap"), rate };
    let straight = Action::Divert { tap: name("st-tap"), through: None };
    let faster = Some(Rate(2_000_000));
    let table = [
        (LIMITED, vec![]),
        (Bandwidth { download: faster, ..LIMITED }, vec![tap(faster)]),
        (Bandwidth { upload: faster, ..LIMITED }, vec![ifb(faster)]),
        (Bandwidth { download: None, ..LIMITED }, vec![tap(None)]),
        (Bandwidth { upload: None, ..LIMITED }, vec![straight, Action::RemoveIfb(name("St-tap"))]),
    ];
    for (bandwidth, steps) in table {
        let expected = if steps.is_empty() { Plan::Converged } else { Plan::Act(steps) };
        let planned = plan::plan(&Desired::Present(&limited(bandwidth)), &converged, now().into());
        assert_eq!(planned, expected, "{bandwidth:?}");
    }
}

fn any_bandwidth() -> impl Strategy<Value = Bandwidth> {
    let rate = || proptest::option::of(prop_oneof![Just(Rate(500_000)), Just(Rate(1_000_000))]);
    (rate(), rate()).prop_map(|(download, upload)| Bandwidth { download, upload })
}

fn any_limit() -> impl Strategy<Value = Limit> {
    prop_oneof![
        Just(Limit::None),
        Just(Limit::Altered),
        Just(Limit::At(Rate(500_000))),
        Just(Limit::At(Rate(1_000_000))),
    ]
}

/// Generates any TAP that this port's steps, or interference with them, can leave.
fn any_host() -> impl Strategy<Value = Observed> {
    let ways = ["St-tap", "other"].map(|way| Just(Detour::Through(name(way))));
    let [own, other] = ways;
    let detour = prop_oneof![Just(Detour::None), Just(Detour::Broken), own, other];
    let shaping = (any_limit(), detour, proptest::option::of((any::<bool>(), any_limit())));
    let master = proptest::option::of(prop_oneof![Just("st-br"), Just("other")].prop_map(name));
    let tap = (master, any::<bool>(), any::<bool>()).prop_map(|(master, is_up, is_isolated)| Link {
        is_isolated: is_isolated && master.is_some(),
        master,
        is_up,
        ..tap('p')
    });
    (proptest::option::of(tap), any::<bool>(), shaping).prop_map(|(tap, has_rule, shaping)| {
        let (limit, detour, seen_ifb) = shaping;
        // A rule to a link that is gone leads nowhere.
        let is_gone = detour == Detour::Through(name("St-tap")) && seen_ifb.is_none();
        let detour = if is_gone { Detour::Broken } else { detour };
        let shaping = tap.as_ref().map(|_| Shaping { limit, detour }).unwrap_or_default();
        let (is_up, ifb_limit) = seen_ifb.unwrap_or_default();
        let ifb = seen_ifb.map(|_| Link { is_up, ..ifb() });
        Observed { tap, has_rule, shaping, ifb, ifb_limit, ..nothing() }
    })
}

proptest! {
    /// Checks that the spec is reached in few rounds, from any state of the host and wherever the daemon
    /// dies, and that the guest is never unrestricted on the way (`apply` asserts it).
    #[test]
    fn any_host_converges_through_any_crash(
        mut seen in any_host(),
        bandwidth in any_bandwidth(),
        deaths in proptest::collection::vec(0..10usize, 0..4),
    ) {
        let object = limited(bandwidth);
        let mut deaths = deaths.into_iter();
        for _ in 0..6 {
            let Plan::Act(steps) = plan::plan(&Desired::Present(&object), &seen, now().into()) else { break };
            let done = deaths.next().unwrap_or(steps.len());
            steps.iter().take(done).for_each(|step| apply(&mut seen, bandwidth, step));
        }
        prop_assert_eq!(plan::plan(&Desired::Present(&object), &seen, now().into()), Plan::Converged);
        prop_assert!(is_desired(&seen, bandwidth), "{seen:?}");
    }

    #[test]
    fn a_plan_is_empty_exactly_when_the_host_is_as_specified(
        seen in any_host(),
        bandwidth in any_bandwidth(),
    ) {
        let object = limited(bandwidth);
        let is_converged = plan::plan(&Desired::Present(&object), &seen, now().into()) == Plan::Converged;
        prop_assert_eq!(is_converged, is_desired(&seen, bandwidth));
    }

    #[test]
    fn deletion_leaves_nothing_whatever_the_network_is(
        mut seen in any_host(),
        death in 0..4usize,
        is_network_ready: bool,
    ) {
        let object = object();
        seen.is_network_ready = is_network_ready;
        for limit in [death, usize::MAX, usize::MAX] {
            if let Plan::Act(steps) = plan::plan(&Desired::Absent(Some(&object)), &seen, now().into()) {
                steps.iter().take(limit).for_each(|step| apply(&mut seen, Bandwidth::default(), step));
            }
        }
        prop_assert_eq!(plan::plan(&Desired::Absent(Some(&object)), &seen, now().into()), Plan::Converged);
        prop_assert!(seen.tap.is_none() && seen.ifb.is_none() && !seen.has_rule);
    }
}
