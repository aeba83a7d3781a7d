//! Preparation of the files of a sled database before sled opens them.
//!
//! sled 0.34 writes `snap.LSN.generating` at every start, syncs it and renames it to `snap.LSN`. At the next
//! start it takes the last `snap.*` by name, an unfinished one included, and always reports a short one as
//! damage. A full disk, a power cut or a kill at that moment leaves such a file. It holds nothing that the
//! log does not hold.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::path::Path;

use super::reserve::free_bytes;
use super::sync::sync_directory;

/// Space that a start needs on the disk, in bytes: the notes on where 100,000 objects are, and one segment.
pub(super) const START_BYTES: u64 = 8 << 20;

/// Removes snapshot files that a start did not finish. Does nothing in a directory without a database.
///
/// # Errors
/// Fails when the directory cannot be read, or a file cannot be removed.
pub(super) fn remove_unfinished(directory: &Path) -> io::Result<()> {
    let mut is_changed = false;
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if name.starts_with("snap.") && name.ends_with(".generating") {
            fs::remove_file(entry.path())?;
            is_changed = true;
        }
    }
    if is_changed { sync_directory(directory) } else { Ok(()) }
}

/// Returns the blocks that the store holds beyond the end of the database's file to the disk, if the disk
/// has too little space for a start. They are allocated again as soon as the database is open.
///
/// # Errors
/// Fails when the file cannot be examined or cut.
pub(super) fn free_held_blocks(directory: &Path) -> io::Result<()> {
    let file = match OpenOptions::new().write(true).open(directory.join("db")) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    if free_bytes(&file)? >= START_BYTES {
        return Ok(());
    }
    file.set_len(file.metadata()?.len())
}

/// Syncs the file of sled's own settings, which sled writes once and does not sync.
///
/// # Errors
/// Fails when it cannot be opened or synced.
pub(super) fn sync_settings(directory: &Path) -> io::Result<()> {
    File::open(directory.join("conf"))?.sync_all()
}
