//! The ports: the operations that reconcilers may request from a host, one small trait per capability.
//!
//! Guarantees of every port: verbs are primitive (one host step). `list` and `inspect` only read. Every
//! object that a verb makes carries our mark, and `list` finds it by that mark. An unmarked object is never
//! changed. A verb repeated after a crash finds its own work and succeeds: to create what exists as
//! requested, or to remove what is gone, is `Ok`. A port has at most eight verbs. Each function counts, except
//! `capabilities`: it returns a constant and requests nothing from the host.
//! Never: a verb decides. A comparison of desired and actual state belongs in a plan.
//! Cancel/crash: every await may be the last; each verb documents what it leaves behind.

mod disks;
mod error;
mod facts;
mod firewall;
mod flows;
mod guests;
mod image_jobs;
mod images;
mod instance_logs;
mod limits;
mod links;
mod listeners;
mod mediators;
mod memories;
mod policies;
mod ports;
mod probes;
mod shapers;
mod snapshots;
mod vmms;
mod wake;

pub use disks::{DiskFile, Disks, Space};
pub use error::{HostError, HostErrorKind};
pub use facts::{Facts, HostSeen};
pub use firewall::{Firewall, FirewallRules, FirewallSeen, NicRule};
pub use flows::{Age, Flow, FlowState, Flows, Inbound};
pub use guests::{GuestMemory, GuestPhase, GuestView, Guests};
pub use image_jobs::{ImageJobs, Job};
pub use images::{Images, Layer, Resolved, StoredImage};
pub use instance_logs::InstanceLogs;
pub use limits::{Limits, LimitsSeen, VmmLimits};
pub use links::{Forwarding, Link, LinkChange, LinkKind, LinkPlan, Links, Route, Routes};
pub use listeners::Listeners;
pub use mediators::{MediatorSeen, Mediators};
pub use memories::{AdoptPlan, Memories, Memory, SavedMemory};
pub use policies::{Policies, PolicySeen};
pub use ports::Host;
pub use probes::{ProbePlan, ProbeSeen, Probes};
pub use shapers::{Detour, Limit, Shapers, Shaping};
pub use snapshots::{CapturePlan, Captured, Snapshots};
pub use vmms::{DiskLimit, LaunchPlan, Machine, MachineChange, NetworkCard, VmmState, Vmms, VolumeDisk};
pub use wake::{PendingConnection, WakeListener, WakeListeners};
