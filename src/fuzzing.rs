//! Entry points of the fuzzers in `tests/fuzz`: private parsers, each of which gets untrusted bytes.
//!
//! Guarantees: each of them returns on any input; a panic is a finding.

pub use crate::guest_channel::fuzzing::{control, frames};
pub use crate::host::fuzzing::packets;
pub use crate::host::oci::fuzzing::{imports, layers, manifests, registry};
pub use crate::hypervisor::qemu::fuzzing::qmp;
pub use crate::ingress::fuzzing::heads;
pub use crate::store::backup::fuzzing::backup;
