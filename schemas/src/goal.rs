//! What an instance should be, from its spec and what is recorded of its runs.

use crate::instance::{Instance, InstanceSpec, InstanceStatus, Power};
use crate::meta::Object;
use crate::numbers::RunNo;

/// What an instance should be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Goal {
    /// Gone with everything of it: its deletion was asked for.
    Absent,
    /// Without a VM: it was stopped, or its run is over.
    Stopped,
    /// A VM in which this run goes on.
    Running(RunNo),
    /// The memory of this run, without a VM.
    Standby(RunNo),
    /// A VM of this run that is held until a fork takes it.
    Pooled(RunNo),
}

impl Goal {
    /// The goal under another status than the stored one.
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

    /// The run that should go on or be kept. What is to be saved has to run first.
    #[must_use]
    pub fn run(self) -> Option<RunNo> {
        match self {
            Self::Absent | Self::Stopped => None,
            Self::Running(run) | Self::Standby(run) | Self::Pooled(run) => Some(run),
        }
    }
}

impl Object<Instance> {
    /// What the instance should be.
    #[must_use]
    pub fn goal(&self) -> Goal {
        Goal::under(self, &self.status)
    }
}
