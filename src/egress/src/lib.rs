//! Mediated egress: the proxy, which carries the connections of guests and injects credentials, the resolver of their
//! names, and the process that has both and is controlled by the daemon.
//!
//! Guarantees: a guest reaches only hosts that its policy allows, at addresses that were checked; the value of
//! a credential is sent only over TLS, only to a host whose certificate was verified and whose name matches;
//! everything that a guest or a server can make larger or slower is bounded.
//! Assumes: guests and servers are untrusted; a guest's address cannot be forged.
//! Never: reads the TLS connections of hosts without a credential, translates between versions of HTTP, or
//! shares a connection between guests.

mod address_filter;
mod alert;
mod audit;
mod authority;
mod bucket;
mod connection;
mod control;
mod directory;
mod guest;
mod http;
mod intercept;
mod listeners;
mod mask;
pub mod names;
mod own_address;
mod peek;
mod policies;
mod process;
mod progress;
mod proxy;
mod refused_names;
mod stream;
mod tunnel;
mod upstream;

pub use address_filter::AddressFilter;
pub use audit::{AuditLines, AuditLog, LogFiles};
pub use authority::{AuthorityError, generate as generate_authority};
pub use control::{ControlError, ask};
pub use listeners::{serve_captured, serve_explicit};
pub use own_address::is_own_address;
pub use policies::Policies;
pub use process::{
    ProcessArguments, ProcessError, RootsError, SocketError, SocketNumbers, Surroundings, run, run_in,
};
pub use proxy::{Destinations, Proxy, ProxyConfig, ProxyError, Redirected};
pub use upstream::{Addresses, Names, NamesError};
