//! Tests of the ports on a real host, each in its own new network (and mount) namespace.
//!
//! They need root and the Debian packages that `deploy/setup` installs.

mod disks;
mod doctor;
mod fake_registry;
mod firewall;
mod firewall_nics;
mod forwarding;
mod groups;
mod guest;
mod guest_reach;
mod healing;
mod hostile_registry;
mod links;
#[path = "../it/loop_disk.rs"]
#[expect(dead_code, reason = "other tests need the rest")]
mod loop_disk;
mod monitors;
mod namespace;
mod probes;
mod registry;
mod registry_harness;
mod shaping;
mod stalled_disk;
mod taps;
mod wake;
