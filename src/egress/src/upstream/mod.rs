//! Connections to servers.
//!
//! Guarantees: every address of a name is checked, and the connection is made to an address that was checked;
//! a host's certificate is verified before anything is sent to it.

mod dial;
mod resolve;
mod tls;

pub(crate) use dial::{Dialed, Dialer};
pub use resolve::{Addresses, Names, NamesError};
pub(crate) use tls::{Protocol, Secured, UpstreamTls, Verified, protocols_of};
