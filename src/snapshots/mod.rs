//! Snapshots: memory and disks of one moment, each in a directory of its own, whatever VMM they are of.
//!
//! ```text
//! snapshots/UID/saved/     disk.ext4, volume-*.ext4, snapshot.json; and of a memory ram, state, manifest.json
//! ```
//! Guarantees: `saved` appears whole, durably, by one rename.

mod capture;
mod files;

pub(crate) use self::files::check_whole;
