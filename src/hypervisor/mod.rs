//! VMMs behind the ports `Vmms`, `Guests`, `Memories`, `InstanceLogs` and `Snapshots`.
//!
//! ```text
//! driver       the boundary: what a VMM does in its own way
//! dispatch     which driver a VM has
//! process      starting a VMM and noticing its end
//! record       what is on disk of a VM that was launched
//! hypervisors  the VMs of this host; attached: the connections to one that lives
//! vmms         the port `Vmms`; launch is its large verb
//! memories     the port `Memories`; save and restore are its large verbs
//! guests       the port `Guests`; instance_logs: the port `InstanceLogs`
//! ```
//! Each driver is a folder beside these files.

mod attached;
mod console;
pub mod dispatch;
pub mod driver;
mod guests;
mod hypervisors;
mod instance_logs;
mod launch;
mod memories;
mod process;
pub mod qemu;
pub mod record;
mod restore;
mod save;
mod taps;
mod vmms;

use std::collections::BTreeMap;
use std::path::PathBuf;

pub use self::dispatch::Drivers;
pub use self::hypervisors::{Hypervisors, HypervisorsConfig};
pub(crate) use self::save::{on_thread, prove};

/// The programs of drivers by the drivers' names. A driver without one here uses its default.
pub type Programs = BTreeMap<&'static str, PathBuf>;

/// The way in which guests' instructions are executed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Accelerator {
    Kvm,
    /// Emulation: works everywhere, slowly.
    Tcg,
}

impl Accelerator {
    /// Returns KVM only where a stock guest kernel runs on it: the device opens, and one of the hardware
    /// modules is loaded. A paravirtual `/dev/kvm` without these modules opens and then hangs such guests.
    #[must_use]
    pub fn probe() -> Self {
        let opens = std::fs::File::options().read(true).write(true).open("/dev/kvm").is_ok();
        let has_module = ["kvm_intel", "kvm_amd"]
            .iter()
            .any(|name| std::path::Path::new("/sys/module").join(name).exists());
        if opens && (has_module || cfg!(target_arch = "aarch64")) { Self::Kvm } else { Self::Tcg }
    }

    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
        }
    }
}
