//! All ports of one host in one value.

use super::{Disks, Doors, Firewall, Flows, Images, Links, Listeners, Machines, Probes, Snapshots};

/// A host: one port for each subject. Clones share what is behind the ports.
pub trait Host: Clone + Send + Sync + 'static {
    type Machines: Machines;
    type Snapshots: Snapshots;
    type Images: Images;
    type Links: Links;
    type Firewall: Firewall;
    type Disks: Disks;
    type Probes: Probes;
    type Flows: Flows;
    type Doors: Doors;
    type Listeners: Listeners;

    fn machines(&self) -> &Self::Machines;
    fn snapshots(&self) -> &Self::Snapshots;
    fn images(&self) -> &Self::Images;
    fn links(&self) -> &Self::Links;
    fn firewall(&self) -> &Self::Firewall;
    fn disks(&self) -> &Self::Disks;
    fn probes(&self) -> &Self::Probes;
    fn flows(&self) -> &Self::Flows;
    fn doors(&self) -> &Self::Doors;
    fn listeners(&self) -> &Self::Listeners;
}

/// Implements [`Host`] for a type, with the type and the expression of each port, in which `$host` is the value.
#[macro_export]
macro_rules! host {
    ($of:ty, $host:ident: $($port:ident $name:ident: $kind:ty = $value:expr;)*) => {
        impl $crate::host::Host for $of {
            $(type $port = $kind;)*
            $(fn $name(&self) -> &$kind {
                let $host = self;
                &$value
            })*
        }
    };
}
