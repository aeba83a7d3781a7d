//! VMs that lost their TAP, on hypervisors that can and cannot connect them to another one.

use stead_schemas::capabilities::VmmCapabilities;
use stead_schemas::numbers::LaunchId;
use stead_schemas::quantity::Rate;

use super::*;
use crate::vm::NicSeen;

fn capabilities(replace_tap: bool) -> Option<VmmCapabilities> {
    Some(VmmCapabilities {
        standby: true,
        fork_memory: true,
        replace_tap,
        resize_memory: false,
        io_limits: false,
        live_volumes: false,
        devices: false,
        volume_devices_max: 0,
        vcpus_max: 1,
        card_queues_max: 1,
    })
}

/// Returns an observation of a running VM that lost its TAP, with a port that has another one.
fn cut(replace_tap: Option<bool>) -> Observed {
    let mut machine = machine(VmmState::Running, GuestPhase::Ready);
    machine.is_network_cut = true;
    let mut seen = seen(Some(machine));
    seen.parts.capabilities = replace_tap.and_then(capabilities);
    seen.parts.nic = Some(NicSeen {
        is_ready: true,
        trouble: None,
        card: crate::host::NetworkCard {
            tap: "st0".parse().expect("valid"),
            mac: stead_schemas::network::Mac::of_address("10.0.0.2".parse().expect("valid")),
            address: "10.0.0.2".parse().expect("valid"),
            has_queues: false,
        },
        bridge: "br0".parse().expect("valid"),
        gateway: "10.0.0.1".parse().expect("valid"),
        prefix: 24,
        dns: Vec::new(),
        resolver: Default::default(),
        mtu: None,
    });
    seen
}

fn running(power: Power) -> Object<Instance> {
    let mut object = instance(power, 1, 0);
    object.spec.has_network = true;
    object.status.state = State::Running;
    (object.status.started_at, object.status.started_launch) = (Some(at(1)), Some(LaunchId(1)));
    object
}

fn planned(object: &Object<Instance>, seen: &Observed) -> String {
    name(&plan(&Desired::Present(object), seen, at(10).into()))
}

#[test]
fn a_vm_that_can_be_connected_to_another_tap_goes_on() {
    for known in [Some(true), None] {
        assert_eq!(planned(&running(Power::Running), &cut(known)), "Reconnect", "{known:?}");
    }
    // Its guest boots.
    let mut seen = cut(Some(true));
    seen.machine.as_mut().expect("there").guest.phase = GuestPhase::Silent;
    assert_eq!(planned(&running(Power::Running), &seen), "Reconnect");
    seen.parts.nic.as_mut().expect("there").is_ready = false;
    assert_eq!(planned(&running(Power::Running), &seen), "Wait WaitingForNetwork");
}

#[test]
fn the_limit_of_the_disks_of_a_running_vm_follows_the_spec_where_it_can_be_changed() {
    let (mut object, mut seen) = (running(Power::Running), cut(Some(true)));
    object.spec.rates.disk = Some(Rate(1 << 20));
    for (limit, is_cut, expected) in [
        (DiskLimit::Unlimited, false, "LimitDisks"),
        (DiskLimit::Limited(Rate(2 << 20)), false, "LimitDisks"),
        (DiskLimit::Limited(Rate(1 << 20)), false, "Converged"),
        (DiskLimit::Fixed, false, "Converged"),
        (DiskLimit::Unlimited, true, "Reconnect"),
    ] {
        let machine = seen.machine.as_mut().expect("there");
        (machine.disk_limit, machine.is_network_cut) = (limit, is_cut);
        assert_eq!(planned(&object, &seen), expected, "{limit:?}");
    }
    // A rate of 0 is no limit.
    object.spec.rates.disk = Some(Rate(0));
    let machine = seen.machine.as_mut().expect("there");
    (machine.disk_limit, machine.is_network_cut) = (DiskLimit::Unlimited, false);
    assert_eq!(planned(&object, &seen), "Converged");
}

#[test]
fn a_vm_that_cannot_is_launched_again_with_a_condition_and_no_end_of_its_run() {
    let (mut object, seen) = (running(Power::Running), cut(Some(false)));
    assert_eq!(planned(&object, &seen), "Record NetworkLost");
    let end = PassEnd { now: at(10).into(), outcome: Outcome::Acting };
    object.status = status(&object, Some(&seen), &end);
    assert_eq!((object.status.ended_launch, object.status.ended_run), (Some(LaunchId(1)), RunNo(0)));
    for kind in [ConditionType::Ready, ConditionType::Degraded] {
        let reason = condition::find(&object.status.conditions, kind).map(|condition| condition.reason);
        assert_eq!(reason, Some(Reason::NetworkLost), "{kind:?}");
    }
    // The old VM ends in order, and the next launch follows at once.
    assert_eq!(planned(&object, &seen), "Shutdown");
    let mut gone = seen.clone();
    gone.machine = None;
    assert_eq!(planned(&object, &gone), "Launch");
    object.status = status(&object, Some(&gone), &end);
    assert!(object.status.conditions.iter().all(|condition| condition.reason != Reason::NetworkLost));
    assert_eq!((object.status.vmm_deaths, object.status.restart.attempts), (0, 0));
}

#[test]
fn a_vm_that_goes_to_standby_is_connected_when_it_comes_back() {
    assert_eq!(planned(&running(Power::Standby), &cut(Some(false))), "Pause");
}

#[test]
fn a_standby_that_the_hypervisor_cannot_carry_out_is_refused_and_pauses_nothing() {
    let mut seen = cut(Some(true));
    seen.machine.as_mut().expect("there").is_network_cut = false;
    assert_eq!(planned(&running(Power::Standby), &seen), "Pause");
    seen.parts.capabilities.as_mut().expect("known").standby = false;
    assert_eq!(planned(&running(Power::Standby), &seen), "Refuse Unsupported");
}

#[test]
fn a_vmm_that_cannot_save_a_memory_never_goes_to_standby_by_itself() {
    let mut object = running(Power::Running);
    let policy = serde_json::json!({"enabled": true, "idle_timeout": "60s"});
    object.spec.auto_standby = serde_json::from_value(policy).ok();
    assert!(object.spec.auto_standby.is_some());
    let mut seen = cut(Some(true));
    seen.machine.as_mut().expect("there").is_network_cut = false;
    seen.inbound = Some(Err(crate::vm::Blind { message: "no memory".to_owned(), is_unsupported: true }));
    assert_eq!(planned(&object, &seen), "Converged");
    let end = PassEnd { now: at(10).into(), outcome: Outcome::Converged };
    assert!(status(&object, Some(&seen), &end).idle.is_unsupported);
}
