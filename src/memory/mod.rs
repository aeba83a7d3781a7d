//! Saved memories: the RAM and the device state of VMs as files, whatever VMM they are of.
//!
//! Nothing here knows a VMM. A driver says how its RAM reaches these files: the host copies RAM that the
//! VMM maps from a file, and a VMM with RAM of its own writes the file itself.

mod compression;
mod compressor;
mod directory;
mod dirty_pages;
mod manifest;
mod mapping;
mod ram;

pub(crate) use self::compressor::Compressor;
pub(crate) use self::directory::{MemoryDir, RamFile, STATE_BYTES_MAX, length};
pub(crate) use self::dirty_pages::DirtyPages;
pub(crate) use self::manifest::{
    EARLIER_QUEUES, FileMark, Manifest, Origin, RamKept, VolumeMark, number_launch,
};
pub(crate) use self::ram::{HeldRam, free_ram, fresh_ram, ram_of};
