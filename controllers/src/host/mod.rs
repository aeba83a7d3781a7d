//! The ports: what reconcilers may ask of a host, one small trait per capability.
//!
//! Guarantees of every port: verbs are primitive (one host step); `list` and `inspect` only read;
//! everything made carries our mark, and `list` finds it by that mark; nothing unmarked is ever
//! changed; a verb repeated after a crash finds its own work and succeeds (create of what is there
//! as asked, and remove of what is gone, are `Ok`).
//! Never: a verb decides. A diff belongs in a plan.
//! Cancel/crash: every await may be the last; each verb says what it leaves behind.

mod disks;
mod doors;
mod error;
mod firewall;
mod flows;
mod images;
mod links;
mod listeners;
mod machines;
mod ports;
mod probes;
mod snapshots;

pub use disks::{DiskFile, Disks, Space};
pub use doors::{Door, Doors, Knock};
pub use error::{HostError, HostErrorKind};
pub use firewall::{Firewall, FirewallRules, FirewallSeen, PortRule};
pub use flows::{Age, Flow, FlowState, Flows, Inbound};
pub use images::{Images, Job, Layer, Resolved, StoredImage};
pub use links::{Forwarding, Link, LinkChange, LinkKind, LinkPlan, Links, Route, Routes};
pub use listeners::Listeners;
pub use machines::{
    AdoptPlan, GuestPhase, GuestView, LaunchPlan, Machine, Machines, Memory, NetworkCard, SavedMemory,
    VmmState, VolumeDisk,
};
pub use ports::Host;
pub use probes::{ProbePlan, ProbeSeen, Probes};
pub use snapshots::{CapturePlan, Captured, Snapshots};
