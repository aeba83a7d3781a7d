//! Disks that are mounted for writing: their file systems grow to the size of the disk, which the host may have raised.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::Path;

use rustix::ioctl::{Opcode, Setter, ioctl, opcode};
use rustix::mount::{MountFlags, mount};

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
    if let Err(error) = grow(device, at) {
        crate::log_line(&format!("the file system at {} does not grow to its disk: {error}", at.display()));
    }
    Ok(())
}

fn grow(device: &Path, at: &Path) -> io::Result<()> {
    let mut disk = File::open(device)?;
    let (blocks, size) = geometry(&disk)?;
    let fitting = disk.seek(SeekFrom::End(0))? / size;
    if fitting <= blocks {
        return Ok(());
    }
    resize(&File::open(at)?, fitting)
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
