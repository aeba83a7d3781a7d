//! The boot files of guests: the kernel and the initial root, prepared when they are first needed.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use stead_controllers::host::HostError;

use super::files::READ_BY_VMMS;
use super::initrd;
use super::kernel::Kernel;
use crate::unfinished::remove_unfinished;

/// The boot files, found once. While there is no kernel, every request searches again, so that a kernel installed
/// later is used without a restart.
#[derive(Debug)]
pub struct BootFiles {
    kernel_dir: PathBuf,
    cache: PathBuf,
    found: Mutex<Option<(Kernel, PathBuf)>>,
}

impl BootFiles {
    /// Creates the value without a search.
    #[must_use]
    pub fn new(kernel_dir: PathBuf, cache: PathBuf) -> Self {
        Self { kernel_dir, cache, found: Mutex::default() }
    }

    /// Returns the kernel, and the path of its initial root.
    ///
    /// # Errors
    /// Missing, with a sentence on what to run, when there is no kernel.
    pub fn get(&self) -> Result<(Kernel, PathBuf), HostError> {
        let mut found = self.found.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(files) = found.as_ref() {
            return Ok(files.clone());
        }
        // A process that writes here holds the lock.
        remove_unfinished(&self.cache)
            .map_err(|error| HostError::io("prepare", self.cache.display().to_string(), error))?;
        let kernel = Kernel::find(&self.kernel_dir, &self.cache)?;
        let initrd = initrd::assemble(&kernel.modules, &self.cache)?;
        // Earlier versions closed these files to all users.
        for path in [&kernel.vmlinux, &initrd] {
            fs::set_permissions(path, fs::Permissions::from_mode(READ_BY_VMMS))
                .map_err(|error| HostError::io("prepare", path.display().to_string(), error))?;
        }
        Ok(found.insert((kernel, initrd)).clone())
    }
}
