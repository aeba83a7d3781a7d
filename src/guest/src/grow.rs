//! Disks that are mounted for writing: their file systems grow to the size of the disk, which the host may have raised
//! before they are mounted, or while they are.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::Path;

use rustix::ioctl::{Opcode, Setter, ioctl, opcode};
use rustix::mount::{MountFlags, mount};

use crate::devices::update_size;

/// Request number `EXT4_IOC_RESIZE_FS`, with the new number of blocks.
const RESIZE: Opcode = opcode::write::<u64>(b'f', 16);
/// Offset of the superblock of ext4, and those of its fields: the number of blocks in two halves, and the size of a block
/// as a power of two from 1,024 bytes on.
const SUPERBLOCK: u64 = 1024;
const BLOCKS_LOW: u64 = SUPERBLOCK + 0x4;
const BLOCKS_HIGH: u64 = SUPERBLOCK + 0x150;
const BLOCK_SIZE: u64 = SUPERBLOCK + 0x18;
const SMALLEST_BLOCK: u64 = 1024;

/// Mounts a disk for writing. A file system that cannot grow is used as it is.
///
/// # Errors
/// Returns an error if the disk cannot be mounted.
pub(crate) fn mount_writable(device: &Path, at: &Path) -> io::Result<()> {
    mount(device, at, "ext4", MountFlags::NOATIME, None)?;
    if let Err(error) = File::open(at).and_then(|mounted| fill_disk(&mounted, device, 0)) {
        crate::log_line(&format!("the file system at {} does not grow to its disk: {error}", at.display()));
    }
    Ok(())
}

/// Lets a mounted file system grow to the size of its disk.
///
/// # Errors
/// Returns an error if the disk has less than `size_min` bytes as far as the kernel knows, or if the file system does not
/// grow.
pub(crate) fn fill_disk(mounted: &File, device: &Path, size_min: u64) -> io::Result<()> {
    let mut disk = File::open(device)?;
    if disk.seek(SeekFrom::End(0))? < size_min {
        update_size(device);
    }
    let present = disk.seek(SeekFrom::End(0))?;
    if present < size_min {
        return Err(io::Error::other(format!("its disk has {present} of {size_min} bytes")));
    }
    let (blocks, block_size) = geometry(&disk)?;
    let fitting = present / block_size;
    if fitting <= blocks { Ok(()) } else { resize(mounted, fitting) }
}

/// Reads the number of blocks of a file system, and the size of a block in bytes.
fn geometry(disk: &File) -> io::Result<(u64, u64)> {
    let field = |offset| {
        let mut bytes = [0; 4];
        disk.read_exact_at(&mut bytes, offset).map(|()| u32::from_le_bytes(bytes))
    };
    let blocks = u64::from(field(BLOCKS_HIGH)?) << 32 | u64::from(field(BLOCKS_LOW)?);
    let size = SMALLEST_BLOCK.checked_shl(field(BLOCK_SIZE)?).filter(|size| *size > 0);
    let size = size.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "its blocks have no size"))?;
    Ok((blocks, size))
}

#[expect(unsafe_code, reason = "no library has this request")]
fn resize(mounted: &File, blocks: u64) -> io::Result<()> {
    // SAFETY: the kernel reads a number of 64 bits, which is there.
    unsafe { ioctl(mounted, Setter::<RESIZE, u64>::new(blocks)) }?;
    Ok(())
}
