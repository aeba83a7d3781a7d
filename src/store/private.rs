//! Directories that belong to the daemon alone.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::Path;

/// Mode of directories that hold disks, memories, keys and sockets.
const MODE: u32 = 0o700;

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
    if seen.permissions().mode() & 0o077 == 0 {
        return Ok(());
    }
    fs::set_permissions(path, fs::Permissions::from_mode(MODE))
}

/// Sets the umask so that all files that this process makes are closed to group and others, whatever umask
/// it was started with.
pub fn close_new_files() {
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o077));
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
}
