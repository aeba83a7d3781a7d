//! Host capabilities: the real adapters of the ports.

pub mod boot_files;
pub mod capacity;
pub mod cgroup;
mod conntrack_forget;
mod ctnetlink;
pub(crate) mod directories;
pub mod disks;
pub(crate) mod files;
pub mod flows;
#[cfg(feature = "fuzzing")]
pub(crate) mod fuzzing;
pub mod initrd;
pub mod journal;
pub mod kernel;
mod link_messages;
pub mod logs;
mod marks;
pub mod monitor;
mod netfilter_messages;
pub mod netlink;
mod netlink_connection;
pub mod nft;
mod nft_builder;
mod nft_cache;
mod nft_generation;
mod nft_mediation;
mod nft_nics;
mod nft_rules;
pub mod oci;
mod packet;
pub mod pressure;
pub mod probe;
pub(crate) mod process;
mod report;
mod shapers;
pub(crate) mod sparse;
pub mod tap;
mod tbf;
pub(crate) mod tsc;
mod uplink;
pub mod usage;
pub mod volume_archives;
pub mod wake;
pub mod watch_directories;
pub mod watch_files;

pub use marks::Scope;
