//! Listeners: ports of this host that accept HTTP requests for instances.
//!
//! Rules are kept by owner. A port is opened for its first owner and closed with its last, and changes of one
//! owner do not disturb the others. All listeners end with the daemon.

use std::collections::BTreeMap;
use std::future::Future;

use stead_schemas::ingress::IngressRule;
use stead_schemas::names::Uid;

use super::HostError;

/// Access to the listening ports by the owner of their rules. The loss of a port is announced on the
/// adapter's change channel.
pub trait Listeners: Send + Sync + 'static {
    /// Returns every owner that has a port.
    fn list(&self) -> impl Future<Output = Result<Vec<Uid>, HostError>> + Send;
    /// Returns the rules that are served for this owner, at each of its ports.
    fn inspect(
        &self,
        owner: &Uid,
    ) -> impl Future<Output = Result<BTreeMap<u16, Vec<IngressRule>>, HostError>> + Send;
    /// Returns true if this daemon listens at the port or could: no other program does, and the port is not
    /// that of our own API.
    fn is_free(&self, port: u16) -> impl Future<Output = Result<bool, HostError>> + Send;
    /// Serves these rules of the owner at this port and replaces the rules it had there. The error is
    /// Conflict if another program has the port.
    fn open(
        &self,
        owner: &Uid,
        port: u16,
        rules: &[IngressRule],
    ) -> impl Future<Output = Result<(), HostError>> + Send;
    /// Stops serving the owner's rules at this port and cuts the connections that use them. Closes the port
    /// if it has no other owner.
    fn close(&self, owner: &Uid, port: u16) -> impl Future<Output = Result<(), HostError>> + Send;
}
