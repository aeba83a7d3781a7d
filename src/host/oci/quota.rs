//! The limit on the size of the image directory.

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::{fs, io};

use stead_controllers::host::HostError;
use stead_schemas::node::ImageSpace;
use stead_schemas::quantity::Bytes;

/// Number of bytes that may be written before the directory is measured again. The quota may be exceeded by this
/// amount.
const UNMEASURED_MAX: u64 = 64 << 20;

/// Directory of the root file systems, in that of the images.
const ROOTFS: &str = "rootfs";

/// Unit of `st_blocks`, in bytes.
const BLOCK_BYTES: u64 = 512;

/// A limit on the contents of a directory, with the last measurement.
#[derive(Debug)]
pub(super) struct Quota {
    most: Bytes,
    seen: Mutex<Option<Seen>>,
}

#[derive(Debug, Clone, Copy)]
struct Seen {
    used: u64,
    /// Number of bytes admitted since the last measurement.
    since: u64,
}

impl Quota {
    pub(super) fn of(most: Bytes) -> Self {
        Self { most, seen: Mutex::default() }
    }

    /// Admits `bytes` more below the directory. Calls `collect` first if there is no room otherwise.
    pub(super) fn admit(
        &self,
        directory: &Path,
        bytes: u64,
        collect: impl FnOnce() -> io::Result<()>,
    ) -> io::Result<()> {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let fits = |used: u64| used.saturating_add(bytes) <= self.most.0;
        if let Some(Seen { used, since }) = *seen
            // A check without a size follows writes that happened since the last check.
            && bytes > 0
            && since < UNMEASURED_MAX
            && fits(used.saturating_add(since))
        {
            *seen = Some(Seen { used, since: since.saturating_add(bytes) });
            return Ok(());
        }
        let mut used = taken(directory)?;
        if !fits(used) {
            collect()?;
            used = taken(directory)?;
        }
        *seen = Some(Seen { used, since: bytes });
        if fits(used) {
            return Ok(());
        }
        let message = format!(
            "images may take {} (image_quota), and take {used} bytes; this needs {bytes} more",
            self.most
        );
        Err(io::Error::new(io::ErrorKind::QuotaExceeded, message))
    }
}

/// Measures the space of an image directory, which need not exist. Waits for the disk.
///
/// # Errors
/// Returns an error when the directory cannot be read.
pub fn space(directory: &Path) -> Result<ImageSpace, HostError> {
    let failed = |error| HostError::io("measure", directory.display().to_string(), error);
    let (all, content) = (taken(directory).map_err(failed)?, taken(&directory.join(ROOTFS)).map_err(failed)?);
    Ok(ImageSpace { content: Bytes(content), cache: Bytes(all.saturating_sub(content)) })
}

/// Returns the disk space of the files below the directory, in bytes. A directory that is not there takes none.
fn taken(directory: &Path) -> io::Result<u64> {
    let mut sum = 0u64;
    let entries = match fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(0),
        entries => entries?,
    };
    for entry in entries {
        let entry = entry?;
        // A file that has been removed meanwhile takes no space.
        let Ok(meta) = entry.metadata() else { continue };
        sum = sum.saturating_add(if meta.is_dir() {
            taken(&entry.path())?
        } else {
            meta.blocks().saturating_mul(BLOCK_BYTES)
        });
    }
    Ok(sum)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn what_is_collected_makes_room_and_what_is_beyond_is_refused() {
        let dir = tempfile::tempdir().expect("scratch");
        let file = |name: &str| dir.path().join("blobs").join(name);
        fs::create_dir(dir.path().join("blobs")).expect("made");
        let fill = |name: &str, mib: u64| {
            let bytes = vec![1u8; usize::try_from(mib * MIB).expect("small")];
            fs::write(file(name), bytes).expect("written");
        };
        fill("kept", 2);
        fill("stray", 3);
        let quota = Quota::of(Bytes(6 * MIB));
        quota.admit(dir.path(), 0, || panic!("there is room")).expect("room");
        let collect = || fs::remove_file(file("stray"));
        quota.admit(dir.path(), 3 * MIB, collect).expect("room once it is collected");
        assert!(!file("stray").exists());
        fs::create_dir(dir.path().join(ROOTFS)).expect("made");
        fs::write(dir.path().join(ROOTFS).join("a"), vec![1u8; 1 << 20]).expect("written");
        let seen = space(dir.path()).expect("measured");
        assert_eq!((seen.content, seen.cache), (Bytes(MIB), Bytes(2 * MIB)));
        fs::remove_dir_all(dir.path().join(ROOTFS)).expect("removed");
        assert_eq!(space(Path::new("/no/such/directory")).expect("nothing"), ImageSpace::default());
        fill("new", 3);
        let refused = quota.admit(dir.path(), 2 * MIB, || Ok(())).expect_err("6 MiB and no more");
        assert_eq!(refused.kind(), io::ErrorKind::QuotaExceeded);
        fs::remove_file(file("new")).expect("removed");
        quota.admit(dir.path(), 2 * MIB, || Ok(())).expect("measured anew");
    }
}
