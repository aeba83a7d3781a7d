//! The goal of an instance, derived from its spec and from the recorded status of its runs.

use crate::instance::{Instance, InstanceSpec, InstanceStatus, Power, State};
use crate::meta::Object;
use crate::numbers::RunNo;
use crate::policy::AutoStandbyPolicy;

/// The state that an instance should reach.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Goal {
    /// The instance and everything of it should be gone: its deletion was requested.
    Absent,
    /// The instance should have no VM: it was stopped, or its run is over.
    Stopped,
    /// A VM should exist in which this run continues.
    Running(RunNo),
    /// The memory of this run should be kept, without a VM.
    Standby(RunNo),
    /// A VM of this run should be held until a fork takes it.
    Pooled(RunNo),
}

impl Goal {
    /// Returns the goal under a status other than the stored one.
    #[must_use]
    pub fn under(object: &Object<Instance>, status: &InstanceStatus) -> Self {
        let InstanceSpec { power, run, .. } = object.spec;
        if object.meta.is_deleting() {
            return Self::Absent;
        }
        if run <= status.ended_run {
            return Self::Stopped;
        }
        match power {
            Power::Stopped => Self::Stopped,
            Power::Running => Self::Running(run),
            Power::Standby => Self::Standby(run),
            Power::Warm => Self::Pooled(run),
        }
    }

    /// Returns the run that should continue or be kept. A run must be running before it can be saved.
    #[must_use]
    pub fn run(self) -> Option<RunNo> {
        match self {
            Self::Absent | Self::Stopped => None,
            Self::Running(run) | Self::Standby(run) | Self::Pooled(run) => Some(run),
        }
    }
}

impl Object<Instance> {
    /// Returns the goal of the instance under its stored status.
    #[must_use]
    pub fn goal(&self) -> Goal {
        Goal::under(self, &self.status)
    }

    /// True if the instance holds processors and memory of its host. A change of its status can only end that:
    /// whatever begins it is admitted.
    #[must_use]
    pub fn holds_resources(&self) -> bool {
        // A record of an earlier version has no grant. It was admitted by running.
        matches!(self.goal(), Goal::Running(_) | Goal::Pooled(_)) || self.spec.grant > self.status.returned
    }

    /// True if a VM exists or should exist, or if connections should wake a VM in standby. A bridge holds 1,024
    /// ports, so a VM that is down keeps its addresses and their rule, and its port releases its TAP.
    #[must_use]
    pub fn needs_port(&self) -> bool {
        let is_up = !matches!(self.status.state, State::Stopped | State::Standby);
        let is_waking = self.spec.auto_standby.as_ref().is_some_and(AutoStandbyPolicy::is_waking);
        let should_be_up = match self.goal() {
            Goal::Running(_) | Goal::Pooled(_) => true,
            // A VM whose memory is to be saved has to run first.
            Goal::Standby(_) => is_waking || !self.status.has_saved_memory,
            Goal::Stopped | Goal::Absent => false,
        };
        is_up || should_be_up
    }
}
