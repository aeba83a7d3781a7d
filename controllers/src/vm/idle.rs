//! Idleness: since when nobody is connected, and what comes of it.
//!
//! The clock is kept in the status. It begins anew when somebody is or was connected, when the VM
//! comes to run, and where nobody watched: time in which no daemon looked, or over which the clock
//! was set, never counts. It never shows an earlier time than it did, unless that lies in the
//! future: then the clock was set back.

use std::net::IpAddr;

use jiff::Timestamp;
use stead_schemas::instance::{Instance, InstanceStatus, Power, PowerCause, State};
use stead_schemas::limits::PROBE_PORTS;
use stead_schemas::meta::Object;
use stead_schemas::policy::{AutoStandbyPolicy, IdleStatus};

use super::facts::{is_idle_standby, is_up};
use super::steps::act;
use super::{Action, Observed};
use crate::host::{Flow, FlowState, Inbound};
use crate::runtime::{Moment, Plan};

/// What is now known of the connections, from what was known and what is seen.
fn look(object: &Object<Instance>, seen: &Observed, now: Timestamp) -> IdleStatus {
    let known = &object.status.idle;
    let blank = IdleStatus { last_inbound_at: known.last_inbound_at, ..IdleStatus::default() };
    let Some(policy) = object.spec.auto_standby.as_ref().filter(|policy| policy.timeout().is_some()) else {
        return blank;
    };
    let inbound = match &seen.inbound {
        Some(Ok(inbound)) => inbound,
        Some(Err(blind)) => {
            let error = Some(blind.message.clone());
            return IdleStatus { error, is_unsupported: blind.is_unsupported, ..blank };
        }
        // Whether this host can is not forgotten in standby.
        None => return IdleStatus { is_unsupported: known.is_unsupported, ..blank },
    };
    let is_up = seen.machine.as_ref().is_some_and(is_up);
    if !is_up || object.spec.power != Power::Running {
        return blank;
    }
    let open = open(policy, seen, inbound).count();
    let connections = u32::try_from(open).unwrap_or(u32::MAX);
    if connections > 0 {
        return IdleStatus { last_inbound_at: Some(now), connections, ..blank };
    }
    let closed_at = closed_at(policy, seen, inbound).map(|at| at.min(now));
    let running_since = match object.status.state {
        State::Running => object.status.state_since.unwrap_or(now),
        _ => now,
    };
    // Between two looks somebody left, or the VM came to run: the table may say when.
    let is_news = closed_at >= known.last_inbound_at;
    let began = known.idle_since.or(closed_at.filter(|_| is_news)).unwrap_or(now);
    let idle_since = began.max(closed_at.unwrap_or(began)).max(inbound.watched_since).max(running_since);
    let last_inbound_at = closed_at.max(known.last_inbound_at);
    IdleStatus { idle_since: Some(idle_since.min(now)), last_inbound_at, ..blank }
}

/// Connections that keep a VM awake: what the policy counts, but for the host's own health checks.
fn counted<'a>(
    policy: &'a AutoStandbyPolicy,
    seen: &'a Observed,
    inbound: &'a Inbound,
) -> impl Iterator<Item = &'a Flow> {
    let host = seen.parts.port.as_ref().map(|port| IpAddr::from(port.gateway));
    let is_probe = move |flow: &Flow| Some(flow.source) == host && PROBE_PORTS.contains(&flow.source_port);
    let flows = inbound.flows.iter().filter(move |flow| !is_probe(flow));
    flows.filter(|flow| policy.counts(flow.source, flow.port))
}

fn open<'a>(
    policy: &'a AutoStandbyPolicy,
    seen: &'a Observed,
    inbound: &'a Inbound,
) -> impl Iterator<Item = &'a Flow> {
    counted(policy, seen, inbound).filter(|flow| flow.state == FlowState::Open)
}

fn closed_at(policy: &AutoStandbyPolicy, seen: &Observed, inbound: &Inbound) -> Option<Timestamp> {
    let times = counted(policy, seen, inbound).filter_map(|flow| match flow.state {
        FlowState::Closed(at) => Some(at),
        FlowState::Open => None,
    });
    times.max()
}

pub(super) fn follow(
    status: &mut InstanceStatus,
    object: &Object<Instance>,
    seen: &Observed,
    now: Timestamp,
) {
    status.idle = look(object, seen, now);
}

/// The next time at which its connections are looked at whatever happens.
pub(super) fn next_look(object: &Object<Instance>) -> Option<Timestamp> {
    let is_running = object.spec.power == Power::Running && object.status.state == State::Running;
    object.spec.standby_due(&object.status.idle).filter(|_| is_running)
}

/// The VM runs as wished: nothing is to be done, unless nobody was connected for long enough.
pub(super) fn plan_running(object: &Object<Instance>, seen: &Observed, now: Moment) -> Plan<Action> {
    let due = object.spec.standby_due(&look(object, seen, now.at()));
    match due {
        Some(due) if due <= now.at() => act(Action::StandBy(object.meta.uid.clone(), object.meta.generation)),
        _ => Plan::Converged,
    }
}

/// Why a standby that came by itself is undone: somebody connected, or it cannot be seen whether.
pub(super) fn disturbance(object: &Object<Instance>, seen: &Observed) -> Option<PowerCause> {
    let policy = object.spec.auto_standby.as_ref().filter(|_| is_idle_standby(object))?;
    match &seen.inbound {
        Some(Ok(inbound)) => open(policy, seen, inbound).next().map(|_| PowerCause::Traffic),
        Some(Err(_)) => Some(PowerCause::Client),
        // The policy was switched off meanwhile, or the port is gone: nobody is counted.
        None => None,
    }
}
