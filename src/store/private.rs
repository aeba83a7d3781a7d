//! Directories that belong to the daemon alone.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

/// Mode of directories that hold disks, memories, keys and sockets.
const MODE: u32 = 0o700;
/// Rights of group and others.
const OTHERS: u32 = 0o077;

/// Makes the directory with mode 0700, or removes the rights of group and others from an existing one.
///
/// # Errors
/// Fails when it cannot be made or changed, or belongs to another user.
pub fn private_directory(path: &Path) -> io::Result<()> {
    match DirBuilder::new().recursive(true).mode(MODE).create(path) {
        // An existing directory that cannot be inspected is reported as existing: the call below returns the
        // reason.
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    let seen = fs::metadata(path)?;
    if !seen.is_dir() {
        return Err(io::ErrorKind::NotADirectory.into());
    }
    let own = rustix::process::geteuid().as_raw();
    if seen.uid() != own {
        let message = format!("{} belongs to user {}, not to {own}", path.display(), seen.uid());
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, message));
    }
    if seen.permissions().mode() & OTHERS == 0 {
        return Ok(());
    }
    fs::set_permissions(path, fs::Permissions::from_mode(MODE))
}

/// Removes the rights of group and others from the files of a directory, and from everything in those of its
/// directories that `inner` names. Returns the number of entries that had such rights.
///
/// Links are not followed. What belongs to another user keeps its rights, and so does everything below it. The
/// directory itself must be private already: otherwise others could exchange its entries meanwhile.
///
/// # Errors
/// Fails when a directory cannot be read, or an entry cannot be changed.
pub fn close(directory: &Path, inner: &[&str]) -> io::Result<usize> {
    let (mut count, mut pending) = (0, Vec::new());
    for (path, seen) in entries(directory)? {
        let is_inner = path.file_name().is_some_and(|name| inner.iter().any(|inner| name == *inner));
        if seen.is_file() || is_inner {
            count += usize::from(close_entry(&path, &seen)?);
            pending.extend(seen.is_dir().then_some(path));
        }
    }
    while let Some(directory) = pending.pop() {
        for (path, seen) in entries(&directory)? {
            count += usize::from(close_entry(&path, &seen)?);
            pending.extend(seen.is_dir().then_some(path));
        }
    }
    Ok(count)
}

/// Returns the files and directories of this user in a directory.
fn entries(directory: &Path) -> io::Result<Vec<(PathBuf, fs::Metadata)>> {
    let at = |error: io::Error| io::Error::new(error.kind(), format!("{}: {error}", directory.display()));
    let own = rustix::process::geteuid().as_raw();
    let mut found = Vec::new();
    for entry in fs::read_dir(directory).map_err(at)? {
        let entry = entry.map_err(at)?;
        match entry.metadata() {
            Ok(seen) if seen.uid() == own && (seen.is_dir() || seen.is_file()) => {
                found.push((entry.path(), seen));
            }
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(at(error)),
            _ => {}
        }
    }
    Ok(found)
}

/// Removes the rights of group and others from a file or directory; returns `true` if it had any.
fn close_entry(path: &Path, seen: &fs::Metadata) -> io::Result<bool> {
    let mode = seen.permissions().mode() & 0o7777;
    if mode & OTHERS == 0 {
        return Ok(false);
    }
    match fs::set_permissions(path, fs::Permissions::from_mode(mode & !OTHERS)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(io::Error::new(error.kind(), format!("{}: {error}", path.display()))),
        Ok(()) => Ok(true),
    }
}

/// Sets the umask so that all files that this process makes are closed to group and others, whatever umask
/// it was started with.
pub fn close_new_files() {
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(OTHERS));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_open_directory_is_closed_and_a_foreign_one_is_refused() {
        let scratch = tempfile::tempdir().expect("a scratch directory");
        let mode = |path: &Path| fs::metadata(path).expect("there").permissions().mode() & 0o777;
        let deep = scratch.path().join("a/b");
        private_directory(&deep).expect("made");
        assert_eq!((mode(&deep), mode(&scratch.path().join("a"))), (0o700, 0o700));
        fs::set_permissions(&deep, fs::Permissions::from_mode(0o755)).expect("opened");
        private_directory(&deep).expect("closed");
        assert_eq!(mode(&deep), 0o700);
        std::os::unix::fs::chown(&deep, Some(65_534), None).expect("tests run as root");
        let refused = private_directory(&deep).expect_err("somebody else's");
        assert_eq!(refused.kind(), io::ErrorKind::PermissionDenied);
    }

    #[test]
    fn files_that_were_open_to_others_are_closed_and_links_are_not_followed() {
        let scratch = tempfile::tempdir().expect("a scratch directory");
        let root = scratch.path().join("data");
        let path = |name: &str| root.join(name);
        let mode = |path: &Path| fs::metadata(path).expect("there").permissions().mode() & 0o7777;
        let open = |path: &Path, mode: u32| {
            fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("opened");
        };
        for directory in ["images/manifests", "kernel", "images/foreign"] {
            fs::create_dir_all(path(directory)).expect("made");
            open(&path(directory), 0o755);
        }
        open(&path("images"), 0o750);
        let files = ["lock", "images/manifests/a.json", "kernel/vmlinuz", "images/foreign/disk"];
        for file in files.map(path).iter().chain([&scratch.path().join("outside")]) {
            fs::write(file, "x").expect("written");
            open(file, 0o664);
        }
        std::os::unix::fs::symlink(scratch.path().join("outside"), path("images/link")).expect("linked");
        std::os::unix::fs::chown(path("images/foreign"), Some(65_534), None).expect("tests run as root");
        // The lock, the directory of images, that of manifests, and a manifest.
        assert_eq!(close(&root, &["images", "db"]).expect("closed"), 4);
        let modes = ["lock", "images", "images/manifests", "images/manifests/a.json"].map(path);
        assert_eq!(modes.map(|path| mode(&path)), [0o600, 0o700, 0o700, 0o600]);
        assert_eq!(mode(&path("kernel/vmlinuz")), 0o664, "it is not named");
        assert_eq!((mode(&path("images/foreign")), mode(&path("images/foreign/disk"))), (0o755, 0o664));
        assert_eq!(mode(&scratch.path().join("outside")), 0o664);
        assert_eq!(close(&root, &["images", "db"]).expect("closed already"), 0);
    }
}
