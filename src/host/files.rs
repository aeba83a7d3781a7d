//! Files that are whole or absent: temporary name, content, fsync, rename, fsync of the directory. Files that are not
//! needed after a crash of the host are written without the fsyncs.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use stead_controllers::host::{HostError, HostErrorKind};
use stead_schemas::quantity::Bytes;

/// Mode of files that VMMs read by their paths: the users of VMMs own nothing. The directories of such files are closed
/// to all users, and VMMs see the files by other ways.
pub(crate) const READ_BY_VMMS: u32 = 0o644;

/// Writes the file so that no crash leaves it incomplete.
pub(crate) fn write_whole(path: &Path, bytes: &[u8], mode: u32) -> Result<(), HostError> {
    write(path, bytes, mode, Durability::Host)
}

/// Writes a file that may be lost in a crash of the host, but that a crash of this process never leaves incomplete.
pub(crate) fn write_passing(path: &Path, bytes: &[u8], mode: u32) -> Result<(), HostError> {
    write(path, bytes, mode, Durability::Process)
}

/// Returns the size of the path's file system, and the space that is free there for users other than root.
pub(crate) fn space(path: &Path) -> io::Result<(Bytes, Bytes)> {
    let seen = rustix::fs::statvfs(path)?;
    let bytes = |blocks: u64| Bytes(blocks.saturating_mul(seen.f_frsize));
    Ok((bytes(seen.f_blocks), bytes(seen.f_bavail)))
}

/// Returns the free space at a path, or 0 if it cannot be determined.
pub(crate) fn free_bytes(path: &Path) -> Bytes {
    space(path).map_or(Bytes(0), |(_, free)| free)
}

/// Creates a directory and its parents.
pub(crate) fn make_directory(path: &Path) -> io::Result<()> {
    or_is_there(path, fs::create_dir_all(path))
}

/// Corrects the error of std for a directory that exists and cannot be inspected: std reports that it exists, and not
/// why it failed.
pub(crate) fn or_is_there(path: &Path, made: io::Result<()>) -> io::Result<()> {
    match made {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists && fs::metadata(path)?.is_dir() => Ok(()),
        made => made,
    }
}

#[derive(PartialEq, Eq)]
enum Durability {
    Host,
    Process,
}

fn write(path: &Path, bytes: &[u8], mode: u32, durability: Durability) -> Result<(), HostError> {
    let failed = |error| HostError::io("write", path.display().to_string(), error);
    let no_parent = || HostError::new(HostErrorKind::Permanent, "write", path.display().to_string());
    let parent = path.parent().ok_or_else(no_parent)?;
    make_directory(parent).map_err(failed)?;
    let mut file = tempfile::NamedTempFile::new_in(parent).map_err(failed)?;
    file.as_file().set_permissions(fs::Permissions::from_mode(mode)).map_err(failed)?;
    file.write_all(bytes).map_err(failed)?;
    if durability == Durability::Host {
        file.as_file().sync_all().map_err(failed)?;
    }
    file.persist(path).map_err(|error| failed(error.error))?;
    if durability == Durability::Process {
        return Ok(());
    }
    File::open(parent).and_then(|dir| dir.sync_all()).map_err(failed)
}
