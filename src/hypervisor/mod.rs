//! VMMs behind the ports `Vmms`, `Guests`, `Memories`, `InstanceLogs` and `Snapshots`.
//!
//! ```text
//! driver       the boundary: what a VMM does in its own way
//! dispatch     which driver a VM has
//! process      starting a VMM and noticing its end
//! jail         the walls around a VMM
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
mod jail;
mod launch;
mod live_volumes;
mod memories;
mod process;
pub mod qemu;
pub mod record;
mod restore;
mod save;
mod taps;
mod unused_memory;
mod vmms;

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

pub use self::dispatch::Drivers;
pub use self::hypervisors::{Hypervisors, HypervisorsConfig};
pub(crate) use self::jail::CarrierCommand;
pub use self::jail::{Jails, Spawned, USERS, UserRange, host_walls, missing_walls};
pub use self::process::{SpawnPlan, spawn};
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

/// The accelerator that the configuration asks for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum WantedAccelerator {
    /// KVM where the host has it, and emulation elsewhere.
    #[default]
    Auto,
    /// KVM, or no VMs: emulation is no security boundary.
    Kvm,
    Tcg,
}

impl WantedAccelerator {
    /// Returns the accelerator of VMs on this host now.
    #[must_use]
    pub fn accelerator(self) -> Accelerator {
        match self {
            Self::Auto => Accelerator::probe(),
            Self::Kvm => Accelerator::Kvm,
            Self::Tcg => Accelerator::Tcg,
        }
    }

    /// Returns the reason why no VM can be started, if what is demanded cannot be used now.
    #[must_use]
    pub fn problem(self) -> Option<String> {
        let lack = Accelerator::kvm_problem().filter(|_| self == Self::Kvm)?;
        Some(format!("the configuration demands accelerator: kvm, and this host cannot use KVM: {lack}"))
    }
}

impl Accelerator {
    /// Returns KVM where it can be used, and emulation elsewhere.
    #[must_use]
    pub fn probe() -> Self {
        if Self::kvm_problem().is_none() { Self::Kvm } else { Self::Tcg }
    }

    /// Returns why a stock guest kernel does not run on KVM here. It does where the device opens and one of the
    /// hardware modules is loaded. A paravirtual `/dev/kvm` without these modules opens and then hangs such guests.
    #[must_use]
    pub fn kvm_problem() -> Option<String> {
        if let Err(error) = std::fs::File::options().read(true).write(true).open("/dev/kvm") {
            return Some(format!("/dev/kvm cannot be opened: {error}"));
        }
        let has_module = ["kvm_intel", "kvm_amd"]
            .iter()
            .any(|name| std::path::Path::new("/sys/module").join(name).exists());
        let is_usable = has_module || cfg!(target_arch = "aarch64");
        (!is_usable).then(|| "neither the module kvm_intel nor kvm_amd is loaded".to_owned())
    }

    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
        }
    }
}
