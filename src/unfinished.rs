//! Files that were being written under a temporary name when their writer was killed.

use std::fs;
use std::io;
use std::path::Path;

/// Prefix of the names that the crate `tempfile` gives.
const PREFIX: &str = ".tmp";

/// Removes such files from a directory that has no writer now: the files of killed writers would fill it in
/// time.
///
/// # Errors
/// Fails when the directory exists and cannot be read, or a file cannot be removed.
pub(crate) fn remove_unfinished(directory: &Path) -> io::Result<()> {
    let entries = match fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries?,
    };
    for entry in entries {
        let entry = entry?;
        if entry.file_name().to_string_lossy().starts_with(PREFIX) && entry.file_type()?.is_file() {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_killed_writer_left_is_removed_and_nothing_else() {
        let dir = tempfile::tempdir().expect("scratch");
        remove_unfinished(&dir.path().join("none")).expect("nothing is there");
        let kept = tempfile::NamedTempFile::new_in(dir.path()).expect("made");
        let (_, left) = kept.keep().expect("kept, as a SIGKILL keeps it");
        fs::write(dir.path().join("whole"), "").expect("written");
        fs::create_dir(dir.path().join(".tmpdir")).expect("made");
        remove_unfinished(dir.path()).expect("removed");
        assert!(!left.exists() && dir.path().join("whole").exists() && dir.path().join(".tmpdir").exists());
    }
}
