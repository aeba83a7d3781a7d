//! Durability of the names in a directory.

use std::fs::File;
use std::io;
use std::path::Path;

/// Writes a directory's entries to the disk, so that files which were made or renamed in it survive a power cut.
///
/// # Errors
/// Fails when the directory cannot be opened or synced.
pub(super) fn sync_directory(path: &Path) -> io::Result<()> {
    // The parent of a relative one-part path is the empty path.
    let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
    File::open(path)?.sync_all()
}
