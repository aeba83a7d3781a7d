//! Files of an image that are read and replaced, whatever the image has in their position.
//!
//! Guarantees: only regular files of bounded size are read, and no open waits. A crash leaves the old file or the new
//! one. A path has no links when it comes here (see `inside`); no program runs yet that could put one there.

use std::fs::{self, DirBuilder, File, Metadata, Permissions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;

use rustix::fs::{Gid, OFlags, Uid};

/// Limit on the size of a bundle, in bytes. Those of distributions have about 250 KB.
pub(super) const FILE_BYTES_MAX: u64 = 8 << 20;
/// Name of the file that is filled before it takes the name of the replaced one. No program of an image reads it as a
/// certificate.
const SCRATCH: &str = ".stead-egress.new";
/// Mode of files that are made: every user reads them.
const FILE_MODE: u32 = 0o644;
const DIRECTORY_MODE: u32 = 0o755;

/// A file that was read, with what its replacement keeps.
#[derive(Debug)]
pub(super) struct Existing {
    pub(super) contents: Vec<u8>,
    meta: Metadata,
}

/// Reads a file. Returns `None` if there is none.
///
/// # Errors
/// Fails for anything but a regular file of at most [`FILE_BYTES_MAX`] bytes.
pub(super) fn read(path: &Path) -> io::Result<Option<Existing>> {
    let meta = match fs::symlink_metadata(path) {
        Ok(meta) => meta,
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
            return Ok(None);
        }
        Err(error) => return Err(error),
    };
    if !meta.is_file() {
        return Err(io::Error::other("not a regular file"));
    }
    if meta.len() > FILE_BYTES_MAX {
        return Err(io::Error::other(format!("larger than {FILE_BYTES_MAX} bytes")));
    }
    let mut contents = Vec::new();
    // The files of /proc have no size: they are not read, because reading some of them waits or has effects.
    if meta.len() > 0 {
        let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY;
        let flags = i32::try_from(flags.bits()).unwrap_or(0);
        let file = File::options().read(true).custom_flags(flags).open(path)?;
        file.take(meta.len()).read_to_end(&mut contents)?;
    }
    Ok(Some(Existing { contents, meta }))
}

/// Replaces a file that was read. Owner and mode are kept, and the new contents are on the disk before the old ones
/// are given up: nothing else has them.
pub(super) fn replace(path: &Path, existing: &Existing, contents: &[u8]) -> io::Result<()> {
    let meta = &existing.meta;
    exchange(path, |file| {
        file.write_all(contents)?;
        rustix::fs::fchown(&*file, Some(Uid::from_raw(meta.uid())), Some(Gid::from_raw(meta.gid())))?;
        file.set_permissions(Permissions::from_mode(meta.mode() & 0o7777))?;
        file.sync_data()
    })
}

/// Writes a file that is ours alone, unless it has these contents already. Anything else in its position but a
/// directory is replaced. It does not wait for the disk: the next boot writes a file again that a crash cut off.
pub(super) fn write_own(path: &Path, contents: &[u8]) -> io::Result<()> {
    if read(path).is_ok_and(|existing| existing.is_some_and(|existing| existing.contents == contents)) {
        return Ok(());
    }
    exchange(path, |file| {
        file.write_all(contents)?;
        file.set_permissions(Permissions::from_mode(FILE_MODE))
    })
}

/// Makes a directory, with those above it, that every user may read.
pub(super) fn make_directory(path: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(DIRECTORY_MODE).create(path)
}

/// Fills a new file and gives it the name of the replaced one.
fn exchange(path: &Path, fill: impl FnOnce(&mut File) -> io::Result<()>) -> io::Result<()> {
    let scratch = path.with_file_name(SCRATCH);
    // A crash may have left one.
    let _ = fs::remove_file(&scratch);
    let mut file = File::options().write(true).create_new(true).mode(0o600).open(&scratch)?;
    let done = fill(&mut file).and_then(|()| fs::rename(&scratch, path));
    if done.is_err() {
        let _ = fs::remove_file(&scratch);
    }
    done
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use rustix::io::Errno;
    use rustix::mount::{MountFlags, mount, mount_remount};

    use super::*;
    use crate::volumes::scratch;

    /// Size of a small disk, in bytes: 16 pages.
    const DISK_BYTES: usize = 64 << 10;

    /// Runs a test with a small disk, in a thread with a mount namespace of its own. An ordinary user gets none, which
    /// is all that the test shows then.
    fn with_disk(test: impl FnOnce(&Path) + Send + 'static) {
        let work = || {
            if let Err(error) = scratch::own_namespace() {
                assert_eq!(error, Errno::PERM);
                return;
            }
            // The namespace has an empty directory in memory there.
            let disk = Path::new("/sys/disk");
            fs::create_dir(disk).expect("made");
            mount("disk", disk, "tmpfs", MountFlags::empty(), Some(c"size=64k")).expect("mounted");
            test(disk);
        };
        std::thread::spawn(work).join().expect("it succeeds");
    }

    #[test]
    fn a_full_disk_keeps_the_old_file() {
        with_disk(|disk| {
            let path = disk.join("bundle");
            fs::write(&path, vec![1; DISK_BYTES / 2]).expect("written");
            let existing = read(&path).expect("read").expect("there");
            let failed = replace(&path, &existing, &vec![2; DISK_BYTES]).expect_err("it is full");
            assert_eq!(failed.kind(), io::ErrorKind::StorageFull);
            assert_eq!(fs::read(&path).expect("read"), vec![1; DISK_BYTES / 2]);
            assert_eq!(fs::read_dir(disk).expect("read").count(), 1);
        });
    }

    #[test]
    fn a_disk_that_is_only_read_is_an_error_unless_there_is_nothing_to_write() {
        with_disk(|disk| {
            let path = disk.join("own");
            write_own(&path, b"ours").expect("written");
            mount_remount(disk, MountFlags::RDONLY, "").expect("remounted");
            write_own(&path, b"ours").expect("nothing to write");
            let failed = write_own(&path, b"other").expect_err("it is only read");
            assert_eq!(failed.kind(), io::ErrorKind::ReadOnlyFilesystem);
            assert_eq!(fs::read(&path).expect("read"), b"ours");
        });
    }

    #[test]
    fn a_replaced_file_keeps_its_mode_and_nothing_is_left_beside_it() {
        let dir = tempfile::tempdir().expect("made");
        let path = dir.path().join("bundle");
        fs::write(&path, "old").expect("written");
        fs::set_permissions(&path, Permissions::from_mode(0o440)).expect("set");
        let existing = read(&path).expect("read").expect("there");
        replace(&path, &existing, b"new").expect("replaced");
        assert_eq!(fs::read(&path).expect("read"), b"new");
        assert_eq!(fs::metadata(&path).expect("there").mode() & 0o7777, 0o440);
        assert_eq!(fs::read_dir(dir.path()).expect("read").count(), 1);
    }

    #[test]
    fn a_failed_write_leaves_the_old_file_and_nothing_beside_it() {
        let dir = tempfile::tempdir().expect("made");
        let path = dir.path().join("bundle");
        fs::write(&path, "old").expect("written");
        let full = || io::Error::from(io::ErrorKind::StorageFull);
        let failed = exchange(&path, |file| file.write_all(b"ne").and_then(|()| Err(full())));
        assert_eq!(failed.map_err(|error| error.kind()), Err(io::ErrorKind::StorageFull));
        assert_eq!(fs::read(&path).expect("read"), b"old");
        assert_eq!(fs::read_dir(dir.path()).expect("read").count(), 1);
    }

    #[test]
    fn what_a_crash_or_an_image_left_under_the_scratch_name_is_not_written_to() {
        let dir = tempfile::tempdir().expect("made");
        let (path, victim) = (dir.path().join("own"), dir.path().join("victim"));
        fs::write(&victim, "kept").expect("written");
        symlink(&victim, dir.path().join(SCRATCH)).expect("linked");
        write_own(&path, b"ours").expect("written");
        assert_eq!(
            (fs::read(&path).expect("read"), fs::read(&victim).expect("read")),
            (b"ours".into(), b"kept".into())
        );
        fs::create_dir(dir.path().join(SCRATCH)).expect("made");
        assert!(write_own(&path, b"other").is_err(), "a directory is not removed");
        assert_eq!(fs::read(&path).expect("read"), b"ours");
    }

    #[test]
    fn an_own_file_is_written_once() {
        let dir = tempfile::tempdir().expect("made");
        let path = dir.path().join("own");
        write_own(&path, b"ours").expect("written");
        let number = || fs::metadata(&path).expect("there").ino();
        let first = number();
        write_own(&path, b"ours").expect("the same");
        assert_eq!(number(), first);
        assert_eq!(fs::metadata(&path).expect("there").mode() & 0o7777, FILE_MODE);
    }
}
