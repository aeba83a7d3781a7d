//! A file that is read from start to end. A large file bypasses the page cache where its file system allows it, as in
//! [`super::sparse`].

use std::fs::File;

use rustix::buffer::spare_capacity;
use rustix::io::{Errno, pread};

use super::aligned::{Aligned, set_direct};

/// Size from which a file is read past the page cache, in bytes.
const DIRECT_FROM: u64 = 1 << 20;

#[derive(Debug)]
pub(super) struct Source {
    file: File,
    /// Offset at which the next read begins, in bytes.
    at: u64,
    ahead: Option<Ahead>,
}

/// Data that was read past the page cache.
#[derive(Debug)]
struct Ahead {
    bytes: Aligned,
    taken: usize,
}

impl Source {
    /// Creates a source for a file of `size` bytes, as far as the size is known.
    pub(super) fn new(file: File, size: u64) -> Self {
        let is_direct = size >= DIRECT_FROM && set_direct(&file, true).is_ok();
        Self { file, at: 0, ahead: is_direct.then(|| Ahead { bytes: Aligned::new(), taken: 0 }) }
    }

    /// Appends at most `room` of the next bytes to the buffer. Returns their number, which is 0 at the end of the
    /// file.
    pub(super) fn read(&mut self, buffer: &mut Vec<u8>, room: usize) -> Result<usize, Errno> {
        let before = buffer.len();
        if let Some(ahead) = &mut self.ahead {
            if ahead.taken == ahead.bytes.bytes().len() {
                ahead.taken = 0;
                match ahead.bytes.fill(|part| again(|| pread(&self.file, &mut *part, self.at))) {
                    Ok(()) => self.at += ahead.bytes.bytes().len() as u64,
                    // A file system that accepts the flag may still require other block sizes.
                    Err(Errno::INVAL) => {
                        set_direct(&self.file, false).map_err(|_| Errno::INVAL)?;
                        self.ahead = None;
                        return self.read(buffer, room);
                    }
                    Err(error) => return Err(error),
                }
            }
            let rest = &ahead.bytes.bytes()[ahead.taken..];
            buffer.extend_from_slice(&rest[..room.min(rest.len())]);
            ahead.taken += buffer.len() - before;
        } else {
            again(|| pread(&self.file, spare_capacity(buffer), self.at))?;
            // The buffer may have been given more room than was asked for.
            buffer.truncate(before + room);
            self.at += (buffer.len() - before) as u64;
        }
        Ok(buffer.len() - before)
    }
}

fn again<T>(mut call: impl FnMut() -> Result<T, Errno>) -> Result<T, Errno> {
    loop {
        match call() {
            Err(Errno::INTR) => {}
            done => return done,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::super::aligned::ALIGNED_BYTES;
    use super::*;

    #[test]
    fn every_byte_comes_once_by_either_way_wherever_the_file_ends() {
        let large = usize::try_from(DIRECT_FROM).expect("small");
        for directory in [Path::new("/dev/shm"), &std::env::current_dir().expect("there")] {
            for length in [0, 5, large, large + 1, large + ALIGNED_BYTES, large + ALIGNED_BYTES - 1] {
                let data: Vec<u8> = (0..length).map(|at| (at % 251).to_le_bytes()[0]).collect();
                let path = directory.join(format!("stead-source-{}-{length}", std::process::id()));
                std::fs::write(&path, &data).expect("written");
                let mut source = Source::new(File::open(&path).expect("there"), length as u64);
                let mut read = Vec::new();
                loop {
                    let mut buffer = Vec::with_capacity(131_072);
                    buffer.push(1);
                    let count = source.read(&mut buffer, 100_003).expect("read");
                    assert!(count <= 100_003 && buffer.len() == 1 + count);
                    if count == 0 {
                        break;
                    }
                    read.extend_from_slice(&buffer[1..]);
                }
                std::fs::remove_file(&path).expect("removed");
                assert!(read == data, "{length} in {}", directory.display());
            }
        }
    }
}
