//! The port to the resolver of names.

use std::future::Future;
use std::net::IpAddr;
use std::pin::Pin;

use stead_schemas::egress::HostName;

/// The reason why a name has no addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NamesError {
    #[error("the name does not exist or has no address")]
    NotFound,
    #[error("the policy does not allow the name")]
    NotAllowed,
    #[error("the name has only addresses that the guest may not reach")]
    Denied,
    #[error("the name could not be resolved")]
    Failed,
}

/// A future with the addresses of a name.
pub type Addresses<'a> = Pin<Box<dyn Future<Output = Result<Vec<IpAddr>, NamesError>> + Send + 'a>>;

/// A resolver of names.
///
/// Guarantees of an implementation: it answers within a bounded time. It need not check the addresses: they
/// are checked before each connection.
pub trait Names: Send + Sync + 'static {
    /// Returns the addresses of a name for the guest with this address, in the order in which they are tried.
    fn resolve<'a>(&'a self, guest: IpAddr, name: &'a HostName) -> Addresses<'a>;
}
