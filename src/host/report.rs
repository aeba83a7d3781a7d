//! The report of a monitor: the part of the host that has to be observed again.

use std::net::Ipv4Addr;

use stead_schemas::names::{LinkName, Uid};

/// A report that something may have changed.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Notification {
    /// A link that carries this object's mark.
    Owner(Uid),
    /// A link that carried this object's mark, and was removed.
    Gone(Uid),
    /// The rule of the port on this interface, or its membership in a bridge. The port may be foreign, because these
    /// messages carry no mark.
    Nic(LinkName),
    /// The lane of the port with this address, which may be foreign too.
    Lane(Ipv4Addr),
    /// Routes, addresses or forwarding of the host, which networks depend on and ports do not.
    Host,
    /// Any object: messages were lost, or the change has no owner.
    Everything,
}
