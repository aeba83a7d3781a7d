//! All ports of one host in one value.

use super::{
    Disks, Facts, Firewall, Flows, Guests, ImageJobs, Images, InstanceLogs, Limits, Links, Listeners,
    Mediators, Memories, Policies, Probes, Shapers, Snapshots, Vmms, WakeListeners,
};

/// A host: one port for each subject. Clones share what is behind the ports.
pub trait Host: Clone + Send + Sync + 'static {
    type Vmms: Vmms;
    type Guests: Guests;
    type Memories: Memories;
    type InstanceLogs: InstanceLogs;
    type Snapshots: Snapshots;
    type Images: Images;
    type ImageJobs: ImageJobs;
    type Limits: Limits;
    type Links: Links;
    type Shapers: Shapers;
    type Firewall: Firewall;
    type Disks: Disks;
    type Probes: Probes;
    type Flows: Flows;
    type WakeListeners: WakeListeners;
    type Listeners: Listeners;
    type Mediators: Mediators;
    type Policies: Policies;
    type Facts: Facts;

    fn vmms(&self) -> &Self::Vmms;
    fn guests(&self) -> &Self::Guests;
    fn memories(&self) -> &Self::Memories;
    fn instance_logs(&self) -> &Self::InstanceLogs;
    fn snapshots(&self) -> &Self::Snapshots;
    fn images(&self) -> &Self::Images;
    fn image_jobs(&self) -> &Self::ImageJobs;
    fn limits(&self) -> &Self::Limits;
    fn links(&self) -> &Self::Links;
    fn shapers(&self) -> &Self::Shapers;
    fn firewall(&self) -> &Self::Firewall;
    fn disks(&self) -> &Self::Disks;
    fn probes(&self) -> &Self::Probes;
    fn flows(&self) -> &Self::Flows;
    fn wake_listeners(&self) -> &Self::WakeListeners;
    fn listeners(&self) -> &Self::Listeners;
    fn mediators(&self) -> &Self::Mediators;
    fn policies(&self) -> &Self::Policies;
    fn facts(&self) -> &Self::Facts;
}

/// Implements [`Host`] for a type. A line names ports, the type behind them, and the expression of its value, in
/// which `$host` is the host. A last line that begins with `..` names the host that has all other ports, so that
/// a test names only what it replaces:
///
/// ```text
/// host! { Partial, host:
///     Links, Firewall: OwnNetwork = host.network;
///     Disks: OwnDisks = host.disks;
///     ..World = host.rest;
/// }
/// ```
#[macro_export]
macro_rules! host {
    // The first word is a dollar sign, by which the inner macro has variables of its own.
    (@implement ($d:tt) $host_type:ty, $host:ident:
        $($($port:ident),+: $kind:ty = $value:expr;)*
        $(..$base:ty = $rest:expr;)?
    ) => {
        /// Chooses the line for a port.
        macro_rules! port {
            $($(($port $d accessor:ident) => {
                type $port = $kind;
                fn $d accessor(&self) -> &Self::$port {
                    let $host = self;
                    &$value
                }
            };)+)*
            $(($d other:ident $d accessor:ident) => {
                type $d other = <$base as $crate::host::Host>::$d other;
                fn $d accessor(&self) -> &Self::$d other {
                    let $host = self;
                    $crate::host::Host::$d accessor(&$rest)
                }
            };)?
        }

        impl $crate::host::Host for $host_type {
            port!(Vmms vmms);
            port!(Guests guests);
            port!(Memories memories);
            port!(InstanceLogs instance_logs);
            port!(Snapshots snapshots);
            port!(Images images);
            port!(ImageJobs image_jobs);
            port!(Limits limits);
            port!(Links links);
            port!(Shapers shapers);
            port!(Firewall firewall);
            port!(Disks disks);
            port!(Probes probes);
            port!(Flows flows);
            port!(WakeListeners wake_listeners);
            port!(Listeners listeners);
            port!(Mediators mediators);
            port!(Policies policies);
            port!(Facts facts);
        }
    };
    ($($line:tt)*) => {
        $crate::host! { @implement ($) $($line)* }
    };
}
