//! Directories and files: created private, listed, and removed whether they exist or not.

use std::fs;
use std::io;
use std::path::Path;

use stead_controllers::host::HostError;
use stead_schemas::names::Uid;

use crate::host::files::or_is_there;

pub(crate) fn uids_in(dir: &Path) -> Result<Vec<Uid>, HostError> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(HostError::io("list", dir.display().to_string(), error)),
    };
    // Names that are no uid are foreign. An incomplete listing is an error: missing objects would be taken for
    // removed ones.
    let uid =
        |entry: io::Result<fs::DirEntry>| Ok(entry?.file_name().to_str().and_then(|name| name.parse().ok()));
    let uids = entries.filter_map(|entry| uid(entry).transpose()).collect::<io::Result<_>>();
    uids.map_err(|error| HostError::io("list", dir.display().to_string(), error))
}

pub(crate) fn make_private_dir(dir: &Path) -> io::Result<()> {
    use std::os::unix::fs::DirBuilderExt;
    or_is_there(dir, fs::DirBuilder::new().recursive(true).mode(0o700).create(dir))
}

pub(crate) fn remove_dir(dir: &Path) -> io::Result<()> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

pub(crate) fn remove_file(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Returns the last line that a failed program wrote.
pub(crate) fn last_line(log: &Path) -> String {
    let text = fs::read(log).unwrap_or_default();
    let tail = &text[text.len().saturating_sub(4096)..];
    let text = String::from_utf8_lossy(tail).into_owned();
    text.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or("it wrote nothing").to_owned()
}
