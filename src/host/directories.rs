//! Directories and files: created private, listed, and removed whether they exist or not.

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
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

fn tail(log: &Path) -> io::Result<Vec<u8>> {
    const BYTES: u64 = 4096;
    let (mut file, mut bytes) = (File::open(log)?, Vec::new());
    let length = file.seek(SeekFrom::End(0))?;
    file.seek(SeekFrom::Start(length.saturating_sub(BYTES)))?;
    file.take(BYTES).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Returns the last line that a failed program wrote. The program decides how long its log is.
pub(crate) fn last_line(log: &Path) -> String {
    let text = String::from_utf8_lossy(&tail(log).unwrap_or_default()).into_owned();
    text.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or("it wrote nothing").to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_end_of_a_log_is_read() {
        let scratch = tempfile::tempdir().expect("scratch");
        let log = scratch.path().join("log");
        assert_eq!(last_line(&log), "it wrote nothing");
        for (text, line) in [("", "it wrote nothing"), ("one\ntwo\n \n", "two"), ("one", "one")] {
            fs::write(&log, text).expect("written");
            assert_eq!(last_line(&log), line);
        }
        // Longer than any memory.
        File::create(&log).and_then(|file| file.set_len(1 << 43)).expect("a hole");
        assert!(last_line(&log).len() <= 4096);
    }
}
