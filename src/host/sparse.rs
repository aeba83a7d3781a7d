//! Copies of large files in which holes stay holes: blocks are shared if the file system supports it, otherwise only
//! data is copied.

use std::fs::File;
use std::io;

use rustix::fs::{SeekFrom, copy_file_range, ioctl_ficlone, seek};
use rustix::io::Errno;

/// Number of bytes copied by one call. The kernel returns in between, so that a shutdown does not wait for gigabytes.
const CHUNK: u64 = 64 << 20;

/// Makes an empty file a copy of another.
///
/// # Errors
/// Returns an error of either file. The copy is unusable then.
pub(crate) fn copy(from: &File, to: &File) -> io::Result<()> {
    if ioctl_ficlone(to, from).is_ok() {
        return Ok(());
    }
    let length = from.metadata()?.len();
    to.set_len(length)?;
    let mut at = 0;
    while at < length {
        let data = match seek(from, SeekFrom::Data(at)) {
            Ok(data) => data,
            // There is no data up to the end.
            Err(Errno::NXIO) => break,
            Err(error) => return Err(error.into()),
        };
        let end = seek(from, SeekFrom::Hole(data))?;
        copy_range(from, to, data, end)?;
        at = end;
    }
    Ok(())
}

fn copy_range(from: &File, to: &File, start: u64, end: u64) -> io::Result<()> {
    let (mut read_at, mut write_at) = (start, start);
    while read_at < end {
        let wanted = usize::try_from((end - read_at).min(CHUNK)).unwrap_or(usize::MAX);
        if copy_file_range(from, Some(&mut read_at), to, Some(&mut write_at), wanted)? == 0 {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the file became shorter"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{FileExt, MetadataExt};

    use super::*;

    #[test]
    fn a_copy_has_the_bytes_and_the_holes_of_its_source() {
        let (from, to) = (tempfile::tempfile().expect("made"), tempfile::tempfile().expect("made"));
        let length = 64 << 20;
        from.set_len(length).expect("sized");
        let pieces: [(u64, &[u8]); 3] = [(0, b"head"), (9_000_001, &[7; 70_000]), (length - 4, b"tail")];
        for (at, bytes) in pieces {
            from.write_all_at(bytes, at).expect("written");
        }
        copy(&from, &to).expect("copied");
        assert_eq!(to.metadata().expect("there").len(), length);
        for (at, bytes) in pieces {
            let mut seen = vec![0; bytes.len()];
            to.read_exact_at(&mut seen, at).expect("read");
            assert_eq!(seen, bytes);
        }
        let blocks = |file: &File| file.metadata().expect("there").blocks();
        assert!(blocks(&to) <= blocks(&from) + 8, "{} of {}", blocks(&to), blocks(&from));
    }
}
