//! The resolver of names on the gateway, for all guests.
//!
//! A question passes these files in their order: `server` receives it, `message` reads it, `rate` counts it, `rules`
//! decides on it; then the `cache` has the answer, or `upstream` is asked through `in_flight`; `guard` removes
//! addresses that a name must not stand for. `resolve` goes the same way for the proxy.
//!
//! Guarantees: only guests are answered; a mediated guest gets nothing but IPv4 addresses of hosts that its policy
//! allows, and for no other name is anybody outside asked; every table, queue and message has a limit (`limits`); no
//! message makes it panic.
//!
//! Without a list of allowed hosts, names are as good a tunnel as HTTPS to any host, which such a guest has anyway.

mod answer;
mod cache;
mod guard;
mod host;
mod in_flight;
mod limits;
mod message;
mod rate;
mod report;
mod resolve;
mod resolver;
mod rules;
mod server;
mod shares;
mod upstream;

pub use guard::Addresses;
pub use report::{Counts, Event, OnEvent, Reason};
pub use resolve::{ResolveError, Resolved};
pub use resolver::{Clock, Parts, Resolver};
pub use rules::{AllowedHosts, Directory, Guest, INSTANCES_DOMAIN};
pub use server::serve;
pub use upstream::{Upstream, UpstreamError, UpstreamTimes, upstreams_of};
