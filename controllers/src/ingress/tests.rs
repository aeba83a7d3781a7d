//! Tables and properties of the ingress plan, status and routes, and tests of requests on the store.

use std::collections::{BTreeMap, BTreeSet};

use jiff::Timestamp;
use proptest::prelude::*;
use serde_json::json;
use stead_schemas::api::IngressRequest;
use stead_schemas::condition::{self, ConditionStatus, ConditionType, Reason};
use stead_schemas::ingress::IngressSpec;
use stead_schemas::instance::{Instance, InstanceStatus, Power, State};
use stead_schemas::limits::{INGRESS_PORTS_MAX, INGRESS_RULES_MAX};
use stead_schemas::meta::{Kind, Meta, OwnerRef, Tags};
use stead_schemas::names::Name;
use stead_schemas::network::{Bandwidth, Mac, Network, NetworkSpec, Nic, NicSpec};
use stead_schemas::numbers::Generation;
use stead_schemas::policy::AutoStandbyPolicy;
use stead_schemas::quantity::GoDuration;

use super::admission;
use super::plan::plan;
use super::status::status;
use super::*;
use crate::refused::{Refused, RefusedKind};
use crate::runtime::Outcome;
use crate::store::tests::opened;
use crate::store::{Kinds, New, Store, TransactError};

fn uid(first: char) -> Uid {
    format!("{first}{:023}", 0).parse().expect("valid")
}

fn at(second: i64) -> Timestamp {
    Timestamp::from_second(second).expect("in range")
}

/// Returns the rule of `hostname:port`. The target is a capture if the host name contains `{i}`.
fn rule(text: &str) -> IngressRule {
    let (hostname, port) = text.split_once(':').expect("both");
    let instance = if hostname.contains("{i}") { "{i}" } else { "web" };
    let body = json!({ "hostname": hostname, "port": port.parse::<u16>().expect("a port"),
        "target": { "instance": instance, "port": 80 } });
    serde_json::from_value(body).expect("valid")
}

fn rules(texts: &[&str]) -> Vec<IngressRule> {
    texts.iter().map(|text| rule(text)).collect()
}

fn object(rules: Vec<IngressRule>) -> Object<Ingress> {
    let meta = Meta {
        uid: uid('g'),
        name: Name::resource("web").expect("valid"),
        tags: Tags::new(),
        generation: Generation(1),
        resource_version: 1,
        created_at: at(0),
        deletion_requested_at: None,
        finalizers: BTreeSet::from([Ingress::FINALIZER.to_owned()]),
        owner: None,
    };
    Object { meta, spec: IngressSpec { rules }, status: IngressStatus::default() }
}

fn seen(served: &[&str], taken: &[u16]) -> Observed {
    let taken = taken.iter().copied().collect();
    Observed { owner: uid('g'), served: by_port(&rules(served)), taken }
}

fn shown_plan(plan: &Plan<Action>) -> String {
    match plan {
        Plan::Converged => "Converged".to_owned(),
        Plan::Record(record) => format!("Record {:?}", record.reason),
        Plan::Wait(wait) => format!("Wait {:?} {}", wait.reason, wait.message),
        Plan::Refuse(_) => "Refuse".to_owned(),
        Plan::Act(steps) => {
            let each = steps.iter().map(|step| match step {
                Action::Close { port, .. } => format!("Close {port}"),
                Action::Open { port, rules, .. } => format!("Open {port} with {}", rules.len()),
            });
            each.collect::<Vec<_>>().join(", ")
        }
    }
}

#[test]
fn ports_are_opened_and_closed_by_the_rules_and_a_taken_port_delays_no_other() {
    let object = object(rules(&["a.test:80", "{i}.test:80", "a.test:81"]));
    let all = ["a.test:80", "{i}.test:80", "a.test:81"];
    for (served, taken, expected) in [
        (&[][..], &[][..], "Open 80 with 2, Open 81 with 1"),
        (&all, &[], "Converged"),
        (&all[1..], &[], "Open 80 with 2"),
        (&["a.test:80", "{i}.test:80", "a.test:81", "a.test:82"], &[], "Close 82"),
        (&[], &[80], "Open 81 with 1"),
        (&all[2..], &[80], "Wait PortInUse port 80: in use by another program"),
        (&[], &[80, 81], "Wait PortInUse ports 80, 81: in use by another program"),
    ] {
        let planned = plan(&Desired::Present(&object), &seen(served, taken), at(0));
        assert_eq!(shown_plan(&planned), expected, "{served:?} {taken:?}");
    }
    for desired in [Desired::Absent(Some(&object)), Desired::Absent(None)] {
        assert_eq!(shown_plan(&plan(&desired, &seen(&all, &[]), at(0))), "Close 80, Close 81");
        assert_eq!(shown_plan(&plan(&desired, &seen(&[], &[]), at(0))), "Converged");
    }
}

#[test]
fn a_port_in_use_is_retried_and_reported_as_degraded() {
    let mut object = object(rules(&["a.test:80"]));
    let held_up = seen(&[], &[80]);
    let Plan::Wait(wait) = plan(&Desired::Present(&object), &held_up, at(10)) else { panic!("it waits") };
    assert!(wait.until.is_some_and(|until| until > at(10)));
    let conditions = |object: &Object<Ingress>, second| {
        let end = PassEnd { now: at(second).into(), outcome: Outcome::Waiting(wait.clone()) };
        status(object, Some(&held_up), &end)
    };
    object.status = conditions(&object, 10);
    let degraded = condition::find(&object.status.conditions, ConditionType::Degraded).expect("set");
    assert_eq!((degraded.status, degraded.reason), (ConditionStatus::True, Reason::PortInUse));
    assert!(!condition::is_ready(&object.status.conditions));
    assert_eq!(conditions(&object, 20), object.status, "looking again is no news");
    let end = PassEnd { now: at(30).into(), outcome: Outcome::Converged };
    let healed = status(&object, Some(&seen(&["a.test:80"], &[])), &end);
    assert!(condition::is_ready(&healed.conditions), "{healed:?}");
}

/// A host with ports of several owners and of foreign programs.
#[derive(Debug, Clone, Default)]
struct Host {
    open: BTreeMap<(u16, Uid), Vec<IngressRule>>,
    taken: BTreeSet<u16>,
}

impl Host {
    fn seen(&self, owner: &Uid, wanted: &[IngressRule]) -> Observed {
        let owned = self.open.iter().filter(|((_, one), _)| one == owner);
        let served: BTreeMap<_, _> = owned.map(|((port, _), rules)| (*port, rules.clone())).collect();
        let taken = wanted.iter().map(|rule| rule.port);
        let taken = taken.filter(|port| self.taken.contains(port) && !served.contains_key(port)).collect();
        Observed { owner: owner.clone(), served, taken }
    }

    fn act(&mut self, action: &Action) {
        match action {
            Action::Close { owner, port } => drop(self.open.remove(&(*port, owner.clone()))),
            Action::Open { owner, port, rules } => {
                assert!(!self.taken.contains(port), "a taken port is not tried");
                self.open.insert((*port, owner.clone()), rules.clone());
            }
        }
    }
}

fn some_rules() -> impl Strategy<Value = Vec<IngressRule>> {
    let one = ("[a-c]|\\{i\\}", 80u16..84).prop_map(|(label, port)| rule(&format!("{label}.test:{port}")));
    proptest::collection::vec(one, 0..6)
}

proptest! {
    #[test]
    fn any_prefix_of_any_plan_leads_to_the_spec_and_changes_no_other_object(
        request in some_rules(),
        before in some_rules(),
        of_others in some_rules(),
        taken in proptest::collection::btree_set(80u16..84, 0..3),
        cuts in proptest::collection::vec(0usize..4, 8),
        is_desired: bool,
    ) {
        let object = object(request.clone());
        let own = object.meta.uid.clone();
        let mut host = Host { taken, ..Host::default() };
        for (owner, rules) in [(own.clone(), &before), (uid('o'), &of_others)] {
            for (port, rules) in by_port(rules) {
                if !host.taken.contains(&port) {
                    host.open.insert((port, owner.clone()), rules);
                }
            }
        }
        let others: Vec<_> = host.open.iter().filter(|((_, one), _)| *one != own)
            .map(|(key, rules)| (key.clone(), rules.clone())).collect();
        let desired = || if is_desired { Desired::Present(&object) } else { Desired::Absent(Some(&object)) };
        let wanted = if is_desired { request } else { Vec::new() };
        // Each plan is cut off by a crash after some steps, and the last two are not.
        for cut in cuts.into_iter().chain([usize::MAX, usize::MAX]) {
            if let Plan::Act(steps) = plan(&desired(), &host.seen(&own, &wanted), at(0)) {
                steps.iter().take(cut).for_each(|step| host.act(step));
            }
        }
        let end = plan(&desired(), &host.seen(&own, &wanted), at(0));
        let is_held_up = wanted.iter().any(|rule| host.taken.contains(&rule.port));
        prop_assert_eq!(matches!(end, Plan::Converged), !is_held_up);
        prop_assert_eq!(matches!(end, Plan::Wait(_)), is_held_up);
        let mut expected: BTreeMap<_, _> = others.into_iter().collect();
        for (port, rules) in by_port(&wanted) {
            if !host.taken.contains(&port) {
                expected.insert((port, own.clone()), rules);
            }
        }
        prop_assert_eq!(host.open, expected);
    }

    #[test]
    fn routes_know_exactly_what_was_set_and_not_removed(
        sets in proptest::collection::vec((0u8..3, some_rules(), any::<bool>()), 0..8),
    ) {
        let mut routes = Routes::default();
        let mut model: BTreeMap<Uid, Vec<IngressRule>> = BTreeMap::new();
        for (owner, rules, is_removed) in sets {
            let owner_uid = uid(char::from(b'a' + owner));
            // Admission ensures that two owners never have the same name.
            let rules: Vec<IngressRule> = rules.into_iter().map(|mut rule| {
                rule.hostname = format!("{}.o{owner}", rule.hostname).parse().expect("valid");
                rule
            }).collect();
            if is_removed {
                routes.remove(&owner_uid);
                model.remove(&owner_uid);
            } else {
                routes.set(&owner_uid, &rules);
                model.insert(owner_uid, rules);
            }
        }
        prop_assert_eq!(routes.owners().collect::<Vec<_>>(), model.keys().collect::<Vec<_>>());
        for owner in ['a', 'b', 'c'].map(uid) {
            prop_assert_eq!(routes.of(&owner), model.get(&owner).cloned());
        }
        for label in ["a", "b", "c", "x"] {
            for index in 0..3u8 {
                let host = format!("{label}.test.o{index}");
                let owner = uid(char::from(b'a' + index));
                let matching = model.get(&owner).is_some_and(|rules| {
                    rules.iter().any(|rule| rule.hostname.matched(&host).is_some())
                });
                prop_assert_eq!(routes.find(&host).map(|found| found.owner), matching.then_some(owner));
            }
        }
    }
}

#[test]
fn the_most_literal_name_counts_and_captures_are_filled_from_the_host() {
    let mut routes = Routes::default();
    routes.set(&uid('a'), &rules(&["{i}.{x}.test:80", "{i}.b.test:80"]));
    routes.set(&uid('b'), &rules(&["a.b.test:80"]));
    let find = |routes: &Routes, host: &str| {
        let found = routes.find(host)?;
        Some((found.owner, found.rule.hostname.to_string(), found.instance))
    };
    let expected =
        |owner, name: &str, instance: &str| Some((uid(owner), name.to_owned(), instance.to_owned()));
    assert_eq!(find(&routes, "a.b.test"), expected('b', "a.b.test", "web"));
    assert_eq!(find(&routes, "c.b.test"), expected('a', "{i}.b.test", "c"));
    assert_eq!(find(&routes, "c.d.test"), expected('a', "{i}.{x}.test", "c"));
    assert_eq!(find(&routes, "b.test"), None);
    routes.remove(&uid('b'));
    assert_eq!(find(&routes, "a.b.test"), expected('a', "{i}.b.test", "a"));
}

async fn store_with(state: State, power: Power, policy: Option<AutoStandbyPolicy>) -> (Store, Uid) {
    let kinds = Kinds::new().with::<Instance>().with::<Nic>().with::<Network>().with::<Ingress>();
    let store = opened(kinds);
    let made = store.transact(move |tx| {
        let named = |text: &str| Name::resource(text).expect("valid");
        let network = tx.create::<Network>(New {
            uid: None,
            name: named("default"),
            tags: Tags::new(),
            owner: None,
            spec: NetworkSpec {
                bridge: "br0".parse().expect("valid"),
                gateway: "10.9.0.1/24".parse().expect("valid"),
                dns: Vec::new(),
                table: "t".to_owned(),
                reach: Default::default(),
                resolver: Default::default(),
                mtu: None,
                mediator: None,
            },
        })?;
        let address = "10.9.0.2".parse().expect("valid");
        let (instance, port) = (tx.next_uid(), tx.next_uid());
        tx.create::<Nic>(New {
            uid: Some(port.clone()),
            name: Name::from(&port),
            tags: Tags::new(),
            owner: Some(OwnerRef { kind: Instance::NAME.to_owned(), uid: instance.clone() }),
            spec: NicSpec {
                network: network.meta.uid.clone(),
                bridge: "br0".parse().expect("valid"),
                tap: "tap0".parse().expect("valid"),
                table: "t".to_owned(),
                address,
                mac: Mac::of_address(address),
                class: 1,
                has_queues: false,
                bandwidth: Bandwidth::default(),
                lane: Default::default(),
            },
        })?;
        let mut spec = crate::vm::example(power, 1, 0).spec;
        (spec.allocated.nic, spec.auto_standby) = (Some(port), policy);
        let new = New { uid: Some(instance), name: named("web"), tags: Tags::new(), owner: None, spec };
        tx.create::<Instance>(new)
    });
    let instance = made.await.expect("created").meta.uid.clone();
    let status = InstanceStatus { state, ..InstanceStatus::default() };
    store.write_status::<Instance>(&instance, status).await.expect("written");
    (store, instance)
}

#[tokio::test]
async fn an_instance_is_reached_in_the_states_in_which_a_connection_can_be_made() {
    use Power::{Running as Up, Standby as Kept, Stopped as Off};
    let policy = |enabled: bool, wakes: bool| AutoStandbyPolicy {
        enabled,
        idle_timeout: Some(GoDuration(std::time::Duration::from_secs(1))),
        wake_on_traffic: wakes,
        ignore_destination_ports: vec![22],
        ..AutoStandbyPolicy::default()
    };
    let gateway_policy = AutoStandbyPolicy {
        ignore_source_cidrs: vec!["10.9.0.0/24".parse().expect("valid")],
        ..policy(true, true)
    };
    for (state, power, policy, port, is_at) in [
        (State::Running, Up, None, 80, true),
        (State::Initializing, Up, None, 80, true),
        (State::Paused, Up, None, 80, true),
        (State::Created, Up, None, 80, false),
        (State::Stopped, Off, None, 80, false),
        (State::Standby, Kept, None, 80, false),
        (State::Standby, Up, None, 80, true),
        (State::Standby, Kept, Some(policy(true, true)), 80, true),
        (State::Standby, Kept, Some(policy(true, true)), 22, false),
        (State::Standby, Kept, Some(policy(true, false)), 80, false),
        (State::Standby, Kept, Some(policy(false, true)), 80, false),
        (State::Standby, Kept, Some(gateway_policy), 80, false),
    ] {
        let case = format!("{state:?} {power:?} {policy:?} {port}");
        let (store, instance) = store_with(state, power, policy).await;
        let expected = match is_at {
            true => {
                Reach::At { instance: instance.clone(), address: "10.9.0.2".parse().expect("valid"), state }
            }
            false => Reach::Down(state),
        };
        assert_eq!(reach(&store, "web", port), expected, "{case}");
        assert_eq!(reach(&store, instance.as_str(), port), expected, "{case}");
        for word in ["we", "", "10.9.0.2", &instance.as_str()[..10]] {
            assert_eq!(reach(&store, word, port), Reach::Unknown, "{word}");
        }
    }
    let (store, instance) = store_with(State::Running, Up, None).await;
    let moved = instance.clone();
    let deleted = store.transact(move |tx| tx.request_deletion::<Instance>(&moved)).await;
    deleted.expect("asked for");
    assert_eq!(reach(&store, "web", 80), Reach::Unknown);
    assert_eq!(reach(&store, instance.as_str(), 80), Reach::Unknown);
}

async fn asked(store: &Store, name: &str, rules: &[&str]) -> Result<Uid, Refused> {
    let rules: Vec<_> = rules
        .iter()
        .map(|text| {
            let (host, target) = text.split_once('=').unwrap_or((text, "web"));
            let (hostname, port) = host.split_once(':').expect("both");
            let port: u16 = port.parse().expect("a port");
            json!({ "match": { "hostname": hostname, "port": port }, "target": { "instance": target, "port": 1 } })
        })
        .collect();
    let request = IngressRequest::read(json!({ "name": name, "rules": rules })).expect("valid");
    match store.transact(move |tx| admission::create(tx, request)).await {
        Ok(object) => Ok(object.meta.uid.clone()),
        Err(TransactError::Refused(refused)) => Err(refused),
        Err(TransactError::Store(error)) => panic!("{error}"),
    }
}

#[tokio::test]
async fn a_host_name_belongs_to_one_ingress_at_a_port_until_it_is_gone() {
    let (store, instance) = store_with(State::Running, Power::Running, None).await;
    let paths = |refused: Refused| match refused.kind {
        RefusedKind::InstanceNotFound | RefusedKind::HostnameInUse => {
            let fields = refused.fields.iter().map(|error| format!("{} {}", error.code, error.path));
            fields.collect::<Vec<_>>().join(", ")
        }
        _ => refused.to_string(),
    };
    let first = asked(&store, "one", &["a.test:80", "{i}.test:80={i}", "a.test:81"]).await.expect("free");
    let refused =
        async |name: &str, rules: &[&str]| paths(asked(&store, name, rules).await.expect_err("taken"));
    let name = |index| format!("hostname_in_use rules[{index}].match.hostname");
    assert_eq!(refused("one", &["b.test:80"]).await, "an ingress named one exists already");
    assert_eq!(refused("two", &["b.test:80", "A.test:80"]).await, name(1));
    assert_eq!(refused("two", &["{x}.test:80={x}", "a.test:81"]).await, format!("{}, {}", name(0), name(1)));
    assert_eq!(refused("two", &["c.test:80", "c.test:80"]).await, name(1));
    let missing = "instance_not_found rules[1].target.instance";
    assert_eq!(refused("two", &["c.test:80", "d.test:80=other"]).await, missing);
    // A refused request has claimed nothing.
    let by_id = format!("c.test:80={instance}");
    asked(&store, "two", &[&by_id, "a.test:82"]).await.expect("free");
    let moved = first.clone();
    store.transact(move |tx| admission::delete(tx, &moved)).await.expect("asked for");
    assert_eq!(refused("three", &["a.test:80"]).await, name(0), "it is still served");
    store.remove_finalizer::<Ingress>(&first).await.expect("gone");
    asked(&store, "three", &["a.test:80"]).await.expect("free again");
}

#[tokio::test]
async fn ports_of_all_ingresses_are_bounded() {
    let (store, _) = store_with(State::Running, Power::Running, None).await;
    let texts: Vec<String> = (0..INGRESS_PORTS_MAX).map(|index| format!("a.test:{}", 1000 + index)).collect();
    for (index, chunk) in texts.chunks(INGRESS_RULES_MAX).enumerate() {
        let chunk: Vec<&str> = chunk.iter().map(String::as_str).collect();
        asked(&store, &format!("i{index}"), &chunk).await.expect("as many as allowed");
    }
    let refused = asked(&store, "more", &["b.test:1"]).await.expect_err("one more");
    assert_eq!(refused.kind, RefusedKind::Quota);
    asked(&store, "same", &["b.test:1000"]).await.expect("a port that is open already");
}
