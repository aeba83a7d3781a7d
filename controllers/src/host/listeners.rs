//! Listeners: ports of this host at which HTTP requests are taken for instances.
//!
//! What is served at a port is kept by owner: a port is opened with its first owner and closed with
//! its last, and one owner's coming and going is not felt by the others. All of it ends with the daemon.

use std::collections::BTreeMap;
use std::future::Future;

use stead_schemas::ingress::IngressRule;
use stead_schemas::names::Uid;

use super::HostError;

/// Ports by those whose rules are served there. A port that was lost is announced on the adapter's
/// change channel.
pub trait Listeners: Send + Sync + 'static {
    /// Everybody who has a port.
    fn list(&self) -> impl Future<Output = Result<Vec<Uid>, HostError>> + Send;
    /// The rules that are served for this owner, at each of its ports.
    fn inspect(
        &self,
        owner: &Uid,
    ) -> impl Future<Output = Result<BTreeMap<u16, Vec<IngressRule>>, HostError>> + Send;
    /// Whether we listen at this port, or could: no other program does, and it is not our own API's.
    fn is_free(&self, port: u16) -> impl Future<Output = Result<bool, HostError>> + Send;
    /// Serves these rules of the owner at this port, instead of those it had there. Conflict when
    /// somebody else has the port.
    fn open(
        &self,
        owner: &Uid,
        port: u16,
        rules: &[IngressRule],
    ) -> impl Future<Output = Result<(), HostError>> + Send;
    /// Serves nothing of the owner there any more and cuts what goes on by its rules; closes the port
    /// when nobody else has it.
    fn close(&self, owner: &Uid, port: u16) -> impl Future<Output = Result<(), HostError>> + Send;
}
