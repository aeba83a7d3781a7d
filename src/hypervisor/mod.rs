//! VMM drivers behind the port `Machines`.

pub mod qemu;

use std::sync::Arc;

use stead_schemas::names::Uid;

/// Told whenever something about a machine may have changed: a hint to look, never content.
pub type Changed = Arc<dyn Fn(&Uid) + Send + Sync>;

/// Takes a line for people that a guest said: cleaned of nothing, bounded in length and in number.
pub type Noted = Arc<dyn Fn(&Uid, &str) + Send + Sync>;

/// How guests' instructions are executed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Accelerator {
    Kvm,
    /// Emulation: works everywhere, slowly.
    Tcg,
}

impl Accelerator {
    /// KVM only where a stock guest kernel runs on it: the device opens and one of the hardware
    /// modules is there. A paravirtual `/dev/kvm` without them opens and then hangs such guests.
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
