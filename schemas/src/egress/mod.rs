//! Mediated egress: the names, rules and decisions that the API, the reconcilers and the proxy share.
//!
//! Guarantees: hosts are compared in one normal form only; a decision is a pure function of a policy and a
//! host; a credential's value is in a [`Secret`](crate::instance::Secret) wherever it is.

mod audit;
mod authority;
mod control;
mod credential;
mod header;
mod host;
mod name;
mod pattern;
mod placeholder;
mod policy;
mod reason;
mod selection;
mod spec;
mod validation;

pub use audit::{AuditLine, TlsUse};
pub use authority::Authority;
pub use control::{ControlReply, ControlRequest, MediatorPorts, MediatorSettings, MediatorState};
pub use credential::{Credential, Injection, Source, Target};
pub use header::{Format, InjectedHeader};
pub use host::Host;
pub use name::HostName;
pub use pattern::HostPattern;
pub use placeholder::{placeholder, placeholders_in};
pub use policy::{CertificateAuthority, EgressMode, Enforcement, Policy, PolicyCredential, Route};
pub use reason::{Decision, Reason};
pub use selection::{Selected, select};
pub use spec::EgressSpec;
pub use validation::{AskedCredential, AskedEgress, AskedInjection, allow_hosts, credentials, requirements};
