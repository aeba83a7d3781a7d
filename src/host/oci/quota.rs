//! How much the image directory may take.

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::{fs, io};

use stead_schemas::quantity::Bytes;

/// Bytes that may be written before what is there is measured again: an overdraft of so many is borne.
const UNMEASURED_MAX: u64 = 64 << 20;

/// Unit of `st_blocks`, in bytes.
const BLOCK_BYTES: u64 = 512;

/// A bound on what is below a directory, and what was measured of it last.
#[derive(Debug)]
pub(super) struct Quota {
    most: Bytes,
    seen: Mutex<Option<Seen>>,
}

#[derive(Debug, Clone, Copy)]
struct Seen {
    used: u64,
    /// What was let in since.
    since: u64,
}

impl Quota {
    pub(super) fn of(most: Bytes) -> Self {
        Self { most, seen: Mutex::default() }
    }

    /// Lets so many bytes in below the directory, after `collect` where there is no room for them otherwise.
    pub(super) fn admit(
        &self,
        directory: &Path,
        bytes: u64,
        collect: impl FnOnce() -> io::Result<()>,
    ) -> io::Result<()> {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let fits = |used: u64| used.saturating_add(bytes) <= self.most.0;
        if let Some(Seen { used, since }) = *seen
            // What asks about nothing in particular has written since it asked last.
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

/// Bytes of disk that files below the directory take.
fn taken(directory: &Path) -> io::Result<u64> {
    let mut sum = 0u64;
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        // One that has gone meanwhile takes nothing.
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
        fill("new", 3);
        let refused = quota.admit(dir.path(), 2 * MIB, || Ok(())).expect_err("6 MiB and no more");
        assert_eq!(refused.kind(), io::ErrorKind::QuotaExceeded);
        fs::remove_file(file("new")).expect("removed");
        quota.admit(dir.path(), 2 * MIB, || Ok(())).expect("measured anew");
    }
}
