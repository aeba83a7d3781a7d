//! Idleness: the time since which no client is connected, and what follows from it.
//!
//! The clock is kept in the status. It restarts when a client is or was connected, when the VM starts to run,
//! and after any time that was not watched: time in which no daemon observed the connections, or in which the
//! clock was set, never counts. The clock never shows an earlier time than before, unless the recorded time
//! lies in the future: then the system clock was set back.

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

/// Returns the idle status that follows from the recorded status and the observation.
fn observe(object: &Object<Instance>, seen: &Observed, now: Timestamp) -> IdleStatus {
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
        // The knowledge whether this host can observe connections is kept in standby.
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
    // Between two observations a client left or the VM started to run: the table may show when.
    let is_news = closed_at >= known.last_inbound_at;
    let began = known.idle_since.or(closed_at.filter(|_| is_news)).unwrap_or(now);
    let idle_since = began.max(closed_at.unwrap_or(began)).max(inbound.watched_since).max(running_since);
    let last_inbound_at = closed_at.max(known.last_inbound_at);
    IdleStatus { idle_since: Some(idle_since.min(now)), last_inbound_at, ..blank }
}

/// Returns the connections that keep a VM out of standby: those that the policy counts, without the host's
/// own health checks.
fn counted<'a>(
    policy: &'a AutoStandbyPolicy,
    seen: &'a Observed,
    inbound: &'a Inbound,
) -> impl Iterator<Item = &'a Flow> {
    let host = seen.parts.nic.as_ref().map(|nic| IpAddr::from(nic.gateway));
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
    status.idle = observe(object, seen, now);
}

/// Returns the next time at which the connections are observed even without an event.
pub(super) fn next_poll(object: &Object<Instance>) -> Option<Timestamp> {
    let is_running = object.spec.power == Power::Running && object.status.state == State::Running;
    object.spec.standby_due(&object.status.idle).filter(|_| is_running)
}

/// Plans for a VM that runs as the spec asks: nothing is due, unless no client was connected for long enough.
pub(super) fn plan_running(object: &Object<Instance>, seen: &Observed, now: Moment) -> Plan<Action> {
    let due = object.spec.standby_due(&observe(object, seen, now.at()));
    match due {
        Some(due) if due <= now.at() => act(Action::StandBy(object.meta.uid.clone(), object.meta.generation)),
        _ => Plan::Converged,
    }
}

/// Returns why an automatic standby is undone: a client connected, or the connections cannot be observed.
pub(super) fn disturbance(object: &Object<Instance>, seen: &Observed) -> Option<PowerCause> {
    let policy = object.spec.auto_standby.as_ref().filter(|_| is_idle_standby(object))?;
    match &seen.inbound {
        Some(Ok(inbound)) => open(policy, seen, inbound).next().map(|_| PowerCause::Traffic),
        Some(Err(_)) => Some(PowerCause::Client),
        // The policy was switched off meanwhile, or the port is gone: no connection counts.
        None => None,
    }
}
