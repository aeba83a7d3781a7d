//! Host capabilities: the real adapters of the ports.

pub mod cgroup;
pub(crate) mod files;
pub mod initrd;
pub mod kernel;
pub(crate) mod process;
