//! Host capabilities: the real adapters of the ports.

pub mod boot_files;
pub mod capacity;
pub mod cgroup;
mod conntrack_forget;
mod ctnetlink;
pub(crate) mod directories;
pub mod disks;
pub mod doors;
pub(crate) mod files;
pub mod flows;
#[cfg(feature = "fuzzing")]
pub(crate) mod fuzzing;
pub mod initrd;
pub mod journal;
pub mod kernel;
mod links_seen;
pub mod logs;
mod marks;
pub mod monitor;
pub mod netlink;
pub mod nft;
mod nft_cache;
mod nft_generation;
mod nft_ports;
mod nft_rules;
mod notices;
pub mod oci;
mod packet;
pub mod probe;
pub(crate) mod process;
mod report;
pub(crate) mod sparse;
pub mod tap;
pub(crate) mod tsc;
pub mod usage;
pub mod watch_directories;
pub mod watch_files;

pub use marks::Scope;
