//! Tests of the effects that connections have on an instance: tables for its idle clock, its standby and its
//! wake listener, and a property of the clock.

use std::net::Ipv4Addr;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use proptest::prelude::*;
use stead_schemas::api::{AutoStandbyReason, AutoStandbyState, AutoStandbyView};
use stead_schemas::instance::{Exit, Instance, InstanceStatus, Power, PowerCause, State};
use stead_schemas::limits::PROBE_PORTS;
use stead_schemas::meta::Object;
use stead_schemas::network::{Bandwidth, Mac, NicSpec};
use stead_schemas::numbers::{LaunchId, RunNo, StandbyNo};
use stead_schemas::policy::{AutoStandbyPolicy, IdleStatus};
use stead_schemas::quantity::GoDuration;
use stead_schemas::snapshot::CompressionState;

use super::plan::plan;
use super::status::status;
use super::tests::{at, instance, machine, name, seen};
use super::{Action, Blind, NicSeen, Observed};
use crate::host::{
    Flow, FlowState, GuestPhase, Inbound, Machine, Memory, NetworkCard, PendingConnection, SavedMemory,
    VmmState, WakeListener,
};
use crate::runtime::{Desired, Outcome, PassEnd, Plan};

const TIMEOUT: i64 = 10;
const IGNORED: u16 = 22;

/// Returns an instance that runs since second 0, with a policy that ignores a port.
fn counted(power: Power, by: PowerCause) -> Object<Instance> {
    let mut object = instance(power, 1, 0);
    object.spec.has_network = true;
    object.spec.power_by = by;
    object.spec.standby = StandbyNo(1);
    object.spec.auto_standby = Some(AutoStandbyPolicy {
        enabled: true,
        idle_timeout: Some(GoDuration(Duration::from_secs(TIMEOUT.unsigned_abs()))),
        ignore_source_cidrs: vec!["192.0.2.0/24".parse().expect("valid")],
        ignore_destination_ports: vec![IGNORED],
        wake_on_traffic: true,
    });
    (object.status.started_at, object.status.started_launch) = (Some(at(0)), Some(LaunchId(1)));
    (object.status.state, object.status.state_since) = (State::Running, Some(at(0)));
    object
}

fn up() -> Object<Instance> {
    counted(Power::Running, PowerCause::Client)
}

fn flow(port: u16, state: FlowState) -> Flow {
    Flow { source: Ipv4Addr::new(10, 0, 0, 9).into(), source_port: 4000, port, state }
}

fn open(port: u16) -> Flow {
    flow(port, FlowState::Open)
}

fn closed(port: u16, seconds: i64) -> Flow {
    flow(port, FlowState::Closed(at(seconds)))
}

/// Moves the source of a flow to the address and port range from which the host probes health.
fn probe(flow: Flow) -> Flow {
    Flow { source: Ipv4Addr::new(10, 9, 0, 1).into(), source_port: *PROBE_PORTS.start(), ..flow }
}

fn with(machine: Option<Machine>, flows: Vec<Flow>, watched_since: i64) -> Observed {
    let address = Ipv4Addr::new(10, 9, 0, 2);
    let mac = Mac::of_address(address);
    let card = NetworkCard { tap: "tap".parse().expect("valid"), mac, address, has_queues: false };
    let gateway = Ipv4Addr::new(10, 9, 0, 1);
    let nic = NicSeen {
        is_ready: true,
        trouble: None,
        card,
        bridge: "br0".parse().expect("valid"),
        gateway,
        prefix: 24,
        dns: Vec::new(),
        resolver: Default::default(),
        mtu: None,
    };
    let mut observed = seen(machine);
    observed.parts.nic = Some(nic);
    observed.inbound = Some(Ok(Inbound { watched_since: at(watched_since), flows }));
    observed
}

fn running(flows: Vec<Flow>) -> Observed {
    with(Some(machine(VmmState::Running, GuestPhase::Ready)), flows, 0)
}

fn status_after(object: &Object<Instance>, seen: &Observed, now: Timestamp) -> InstanceStatus {
    status(object, Some(seen), &PassEnd { now: now.into(), outcome: Outcome::Converged })
}

#[test]
fn the_clock_begins_when_the_last_one_left_and_never_counts_what_nobody_watched() {
    let known = |idle_since: Option<i64>, last: Option<i64>| IdleStatus {
        idle_since: idle_since.map(at),
        last_inbound_at: last.map(at),
        ..IdleStatus::default()
    };
    // Each row: the known status; the flows and the start of the watch; the expected clock at 100, and the
    // number of connections.
    let table = [
        // The policy is new: time before it does not count.
        (known(None, None), vec![], 0, (Some(100), 0)),
        (known(Some(40), None), vec![], 0, (Some(40), 0)),
        (known(Some(40), None), vec![open(80)], 0, (None, 1)),
        (known(Some(40), None), vec![open(80), open(81), open(IGNORED)], 0, (None, 2)),
        (known(Some(40), None), vec![open(IGNORED), closed(IGNORED, 99)], 0, (Some(40), 0)),
        // A health check of this host does not count. Another connection from the host's address does, and so
        // does one from another address with the same port.
        (known(Some(40), None), vec![probe(open(80)), probe(closed(80, 99))], 0, (Some(40), 0)),
        (known(Some(40), None), vec![Flow { source_port: 4000, ..probe(open(80)) }], 0, (None, 1)),
        (known(Some(40), None), vec![Flow { source: open(80).source, ..probe(open(80)) }], 0, (None, 1)),
        // A connection came and went between two observations.
        (known(Some(40), None), vec![closed(80, 70)], 0, (Some(70), 0)),
        // The connection of the last observation closed; the table shows when, or no longer has the entry.
        (known(None, Some(90)), vec![closed(80, 93)], 0, (Some(93), 0)),
        (known(None, Some(90)), vec![], 0, (Some(100), 0)),
        // An old entry that the table still shows is not news.
        (known(None, Some(90)), vec![closed(80, 50)], 0, (Some(100), 0)),
        (known(Some(95), Some(90)), vec![closed(80, 50)], 0, (Some(95), 0)),
        // No daemon observed the connections, or the clock was set.
        (known(Some(40), None), vec![], 80, (Some(80), 0)),
        (known(Some(4000), None), vec![], 80, (Some(100), 0)),
        (known(None, Some(90)), vec![closed(80, 400)], 0, (Some(100), 0)),
    ];
    for (idle, flows, watched_since, (since, connections)) in table {
        let mut object = up();
        object.status.idle = idle.clone();
        let observed =
            with(Some(machine(VmmState::Running, GuestPhase::Ready)), flows.clone(), watched_since);
        let next = status_after(&object, &observed, at(100)).idle;
        let what = format!("{idle:?} {flows:?} {watched_since}");
        assert_eq!((next.idle_since, next.connections), (since.map(at), connections), "{what}");
    }
    // The VM started to run just now: connections before that do not count.
    let mut object = up();
    object.status.idle = known(None, Some(50));
    object.status.state_since = Some(at(97));
    let next = status_after(&object, &running(vec![closed(80, 60)]), at(100)).idle;
    assert_eq!(next.idle_since, Some(at(97)));
    object.status.state = State::Paused;
    let next = status_after(&object, &running(vec![closed(80, 60)]), at(100)).idle;
    assert_eq!(next.idle_since, Some(at(100)));
}

#[test]
fn it_goes_to_standby_when_nobody_was_connected_for_long_enough_and_only_then() {
    let idle_since = |seconds| {
        let mut object = up();
        object.status.idle.idle_since = Some(at(seconds));
        object
    };
    let held = |until| {
        let mut object = idle_since(0);
        object.spec.hold_until = Some(at(until));
        object
    };
    let mut off = idle_since(0);
    off.spec.auto_standby.as_mut().expect("given").enabled = false;
    let blind = || {
        let blind = Blind { message: "no table".to_owned(), is_unsupported: false };
        Observed { inbound: Some(Err(blind)), ..running(Vec::new()) }
    };
    let booting = with(Some(machine(VmmState::Running, GuestPhase::Silent)), Vec::new(), 0);
    let table = [
        (idle_since(0), running(vec![]), "StandBy"),
        (idle_since(91), running(vec![]), "Converged"),
        (idle_since(90), running(vec![]), "StandBy"),
        (idle_since(0), running(vec![open(80)]), "Converged"),
        (idle_since(0), running(vec![open(IGNORED)]), "StandBy"),
        (idle_since(0), running(vec![closed(80, 95)]), "Converged"),
        (held(101), running(vec![]), "Converged"),
        (held(100), running(vec![]), "StandBy"),
        (off, running(vec![]), "Converged"),
        (idle_since(0), blind(), "Converged"),
        (idle_since(0), Observed { inbound: None, ..running(vec![]) }, "Converged"),
        (idle_since(0), booting, "Wait WaitingForGuest"),
    ];
    for (object, observed, expected) in table {
        let plan = plan(&Desired::Present(&object), &observed, at(100).into());
        assert_eq!(name(&plan), expected, "{:?} {observed:?}", object.status.idle);
    }
    let status = status_after(&idle_since(0), &blind(), at(100)).idle;
    assert_eq!((status.idle_since, status.error.as_deref()), (None, Some("no table")));
}

#[test]
fn until_its_process_is_gone_a_connection_undoes_a_standby_that_came_by_itself() {
    use GuestPhase::{Exited, Ready};
    use VmmState::{Dead, Paused, Running};
    let by_itself = || counted(Power::Standby, PowerCause::Idle);
    let asked = || counted(Power::Standby, PowerCause::Client);
    let saved = |observed: Observed| {
        let saved = SavedMemory {
            standby: StandbyNo(1),
            run: RunNo(1),
            launch: LaunchId(1),
            compression_state: CompressionState::Plain,
            volumes: Vec::new(),
        };
        Observed { memory: Some(Memory::Saved(saved)), ..observed }
    };
    let of = |vmm, flows| with(Some(machine(vmm, Ready)), flows, 0);
    let blind = Blind { message: "no table".to_owned(), is_unsupported: false };
    let exited = with(Some(machine(Running, Exited)), vec![], 0);
    let table = [
        (by_itself(), of(Running, vec![]), "Pause", None),
        (by_itself(), of(Running, vec![open(80)]), "Wake", Some(PowerCause::Traffic)),
        (by_itself(), of(Paused, vec![]), "Save", None),
        (by_itself(), of(Paused, vec![open(IGNORED), closed(80, 99)]), "Save", None),
        (by_itself(), of(Paused, vec![open(80)]), "Wake", Some(PowerCause::Traffic)),
        (by_itself(), saved(of(Paused, vec![open(80)])), "Wake", Some(PowerCause::Traffic)),
        (by_itself(), saved(of(Paused, vec![])), "Kill", None),
        (by_itself(), saved(of(Dead, vec![open(80)])), "Watch", None),
        (
            by_itself(),
            Observed { inbound: Some(Err(blind)), ..of(Paused, vec![]) },
            "Wake",
            Some(PowerCause::Client),
        ),
        // A request of a client has priority over connections.
        (asked(), of(Running, vec![open(80)]), "Pause", None),
        (asked(), of(Paused, vec![open(80)]), "Save", None),
        // No memory can be kept any more: the standby is treated as if it had not begun.
        (by_itself(), of(Dead, vec![]), "Wake", Some(PowerCause::Client)),
        (by_itself(), with(None, vec![], 0), "Wake", Some(PowerCause::Client)),
        (asked(), with(None, vec![], 0), "Launch", None),
    ];
    for (object, observed, expected, by) in table {
        let planned = plan(&Desired::Present(&object), &observed, at(100).into());
        assert_eq!(name(&planned), expected, "{:?} {observed:?}", object.spec.power_by);
        if let (Plan::Act(steps), Some(by)) = (&planned, by) {
            let wake = Action::Wake { uid: object.meta.uid.clone(), standby: StandbyNo(1), by };
            assert_eq!(steps[..], [wake]);
        }
    }
    // A program that ended at this moment is restarted or not according to its own policy.
    let mut ended = exited;
    let exit = Exit { code: Some(1), message: String::new(), is_boot_failure: false };
    ended.machine.as_mut().expect("there").guest.exit = Some(exit);
    assert_eq!(name(&plan(&Desired::Present(&by_itself()), &ended, at(100).into())), "Wake");
}

#[test]
fn a_tap_is_watched_in_standby_released_before_the_vm_comes_and_its_packets_are_handed_over() {
    let asleep = |by| {
        let mut object = counted(Power::Standby, by);
        object.status.state = State::Standby;
        object
    };
    let deaf = || {
        let mut object = asleep(PowerCause::Idle);
        object.spec.auto_standby.as_mut().expect("given").wake_on_traffic = false;
        object
    };
    let saved = || {
        let memory = SavedMemory {
            standby: StandbyNo(1),
            run: RunNo(1),
            launch: LaunchId(1),
            compression_state: CompressionState::Plain,
            volumes: Vec::new(),
        };
        Observed { memory: Some(Memory::Saved(memory)), ..with(None, vec![], 0) }
    };
    let pending =
        |source: [u8; 4], port| PendingConnection { source: source.into(), source_port: 4000, port };
    let listener = |is_watched, all_pending| Some(WakeListener { is_watched, all_pending });
    let asleep_with = |listener| Observed { listener, ..saved() };
    let mut no_card = saved();
    no_card.parts.nic.as_mut().expect("given").is_ready = false;
    let counted_pending = || vec![pending([192, 0, 2, 1], 80), pending([10, 0, 0, 9], 80)];
    let ignored = || vec![pending([10, 0, 0, 9], IGNORED), pending([192, 0, 2, 1], 80)];
    let up_with = |listener| Observed { listener, ..running(vec![]) };
    // The VMM has just ended: the card is free, and the remainder of the VMM can wait.
    let dead = || Some(machine(VmmState::Dead, GuestPhase::Ready));
    let ended = |listener| Observed { machine: dead(), ..asleep_with(listener) };
    let table = [
        (asleep(PowerCause::Idle), ended(None), vec!["Watch"]),
        (asleep(PowerCause::Idle), ended(listener(true, vec![])), vec!["Release"]),
        (counted(Power::Standby, PowerCause::Idle), ended(listener(true, vec![])), vec!["Record Converging"]),
        (asleep(PowerCause::Idle), ended(listener(true, counted_pending())), vec!["Wake"]),
        (deaf(), ended(None), vec!["Release"]),
        (up(), ended(listener(true, counted_pending())), vec!["Unwatch", "Release"]),
        (asleep(PowerCause::Idle), saved(), vec!["Watch"]),
        // The listener is set up whatever the cause of the standby was.
        (asleep(PowerCause::Client), saved(), vec!["Watch"]),
        (asleep(PowerCause::Idle), no_card, vec!["Converged"]),
        (asleep(PowerCause::Idle), asleep_with(listener(true, vec![])), vec!["Converged"]),
        (asleep(PowerCause::Idle), asleep_with(listener(true, ignored())), vec!["Converged"]),
        (asleep(PowerCause::Idle), asleep_with(listener(true, counted_pending())), vec!["Wake"]),
        (asleep(PowerCause::Client), asleep_with(listener(false, counted_pending())), vec!["Wake"]),
        (deaf(), saved(), vec!["Converged"]),
        (deaf(), asleep_with(listener(true, counted_pending())), vec!["Unwatch"]),
        (up(), asleep_with(listener(true, counted_pending())), vec!["Unwatch", "Restore"]),
        (up(), up_with(listener(true, counted_pending())), vec!["Unwatch"]),
        (up(), up_with(listener(false, counted_pending())), vec!["HandOver"]),
        (up(), up_with(None), vec!["Converged"]),
    ];
    for (object, observed, expected) in table {
        let planned = plan(&Desired::Present(&object), &observed, at(5).into());
        let names = match &planned {
            Plan::Act(steps) => steps.iter().map(|step| name(&Plan::Act(vec![step.clone()]))).collect(),
            other => vec![name(other)],
        };
        assert_eq!(names, expected, "{:?} {:?}", object.spec.power_by, observed.listener);
    }
    // An instance that is deleted stops its wake listener.
    let mut object = asleep(PowerCause::Idle);
    object.meta.deletion_requested_at = Some(at(1));
    let planned = plan(&Desired::Absent(Some(&object)), &asleep_with(listener(true, vec![])), at(5).into());
    assert_eq!(name(&planned), "Unwatch");
}

#[test]
fn a_client_reads_every_status_with_its_reason() {
    use AutoStandbyReason as Why;
    use AutoStandbyState as Is;
    let nic = NicSpec {
        network: up().meta.uid,
        bridge: "br".parse().expect("valid"),
        tap: "tap".parse().expect("valid"),
        table: "t".to_owned(),
        address: Ipv4Addr::new(10, 9, 0, 2),
        mac: Mac([2; 6]),
        class: 1,
        has_queues: false,
        bandwidth: Bandwidth::default(),
        lane: Default::default(),
    };
    let changed = |change: &dyn Fn(&mut Object<Instance>)| {
        let mut object = up();
        object.status.idle.idle_since = Some(at(95));
        change(&mut object);
        object
    };
    let table = [
        (changed(&|object| object.spec.auto_standby = None), Is::Disabled, Why::PolicyMissing),
        (
            changed(&|object| object.spec.auto_standby.as_mut().expect("given").enabled = false),
            Is::Disabled,
            Why::PolicyDisabled,
        ),
        (
            changed(&|object| object.status.idle.is_unsupported = true),
            Is::Unsupported,
            Why::UnsupportedPlatform,
        ),
        (changed(&|object| object.spec.has_network = false), Is::Ineligible, Why::NetworkDisabled),
        (
            changed(&|object| object.status.state = State::Initializing),
            Is::Ineligible,
            Why::InstanceNotRunning,
        ),
        (
            changed(&|object| (object.spec.power, object.spec.power_by) = (Power::Standby, PowerCause::Idle)),
            Is::StandbyRequested,
            Why::ReadyForStandby,
        ),
        (changed(&|object| object.status.idle.error = Some("no".to_owned())), Is::Error, Why::ObserverError),
        (changed(&|object| object.status.idle.connections = 2), Is::Active, Why::ActiveInboundConnections),
        (changed(&|_| {}), Is::IdleCountdown, Why::IdleTimeoutNotElapsed),
        (
            changed(&|object| object.status.idle.idle_since = Some(at(90))),
            Is::ReadyForStandby,
            Why::ReadyForStandby,
        ),
    ];
    for (object, status, reason) in table {
        let view = AutoStandbyView::of(&object, Some(&nic), at(100));
        assert_eq!((view.status, view.reason), (status, reason), "{:?}", object.status.idle);
        let is_eligible = matches!(status, Is::Active | Is::IdleCountdown | Is::ReadyForStandby);
        assert_eq!(view.eligible, is_eligible, "{status:?}");
        assert_eq!(view.next_standby_at.is_some(), is_eligible && status != Is::Active, "{status:?}");
    }
    let view = AutoStandbyView::of(&changed(&|_| {}), None, at(100));
    assert_eq!((view.status, view.reason), (Is::Ineligible, Why::MissingIp));
    let view = AutoStandbyView::of(&changed(&|_| {}), Some(&nic), at(100));
    assert_eq!(view.countdown_remaining, Some(GoDuration(Duration::from_secs(5))));
}

proptest! {
    /// Checks for all sequences of connections that the clock is never set back, shows no time before the
    /// last close or the start of the watch, and does not run while a connection is open.
    #[test]
    fn the_clock_never_runs_ahead_of_what_was_seen(
        observations in proptest::collection::vec((1i64..30, any::<bool>(), proptest::option::of(0i64..30), any::<bool>()), 1..30),
    ) {
        let mut object = up();
        let (mut now, mut watched_since, mut last_left) = (0, 0, 0);
        for (passed, is_connected, left_ago, is_restart) in observations {
            now += passed;
            if is_restart {
                watched_since = now;
            }
            let mut flows = vec![open(IGNORED)];
            flows.extend(is_connected.then(|| open(80)));
            let left = left_ago.map(|ago| (now - ago).max(now - passed));
            flows.extend(left.map(|left| closed(80, left)));
            last_left = left.unwrap_or(last_left).max(last_left);
            let machine = machine(VmmState::Running, GuestPhase::Ready);
            let observed = with(Some(machine), flows, watched_since);
            let planned = plan(&Desired::Present(&object), &observed, at(now).into());
            let before = object.status.idle.clone();
            object.status = status_after(&object, &observed, at(now));
            let idle = &object.status.idle;
            prop_assert_eq!(idle.idle_since.is_none(), is_connected);
            if let Some(since) = idle.idle_since {
                let earliest = watched_since.max(last_left);
                prop_assert!((at(earliest)..=at(now)).contains(&since), "{} {}", since, earliest);
                prop_assert!(before.idle_since.is_none_or(|before| before <= since));
                let is_due = at(now).duration_since(since) >= SignedDuration::from_secs(TIMEOUT);
                prop_assert_eq!(name(&planned) == "StandBy", is_due);
            } else {
                prop_assert_eq!(planned, Plan::Converged);
            }
        }
    }
}
