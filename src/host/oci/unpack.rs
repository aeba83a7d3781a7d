//! Decompression by the first bytes of a file, with bounds on the unpacked size.

use std::fs::File;
use std::io::{self, BufReader, Read, Seek};

use super::Refused;
use super::jobs::Stop;

/// Limit on the unpacked size of an image, in bytes. The largest in common use have some 20 GiB.
pub(super) const UNPACKED_BYTES_MAX: u64 = 64 << 30;
/// Limit on the compression ratio. gzip reaches 1030, and real layers stay below 20. A small archive may unpack to
/// `RATIO_FREE_BYTES` in any case.
const RATIO_MAX: u64 = 200;
const RATIO_FREE_BYTES: u64 = 1 << 30;

/// Opens a reader of a file's decompressed bytes. It ends with an error beyond `budget` bytes, when the compression
/// ratio is suspicious, or when the work was stopped.
pub(in crate::host) fn open(mut file: File, budget: u64, stop: &Stop) -> Result<Bounded, Refused> {
    let compressed = file.metadata().map_err(Refused::of_io)?.len();
    let mut magic = [0u8; 6];
    let mut count = 0;
    while count < magic.len() {
        match file.read(&mut magic[count..]).map_err(Refused::of_io)? {
            0 => break,
            more => count += more,
        }
    }
    file.rewind().map_err(Refused::of_io)?;
    let file = BufReader::with_capacity(256 << 10, file);
    let reader: Box<dyn Read> = match &magic[..count] {
        [0x1f, 0x8b, ..] => Box::new(flate2::bufread::MultiGzDecoder::new(file)),
        [0x28, 0xb5, 0x2f, 0xfd, ..] => Box::new(zstd::Decoder::with_buffer(file).map_err(Refused::of_io)?),
        [b'B', b'Z', b'h', ..] => return Err(foreign("bzip2")),
        [0xfd, b'7', b'z', b'X', b'Z', 0] => return Err(foreign("xz")),
        [0x04, 0x22, 0x4d, 0x18, ..] => return Err(foreign("lz4")),
        [b'P', b'K', 3, 4, ..] => return Err(foreign("zip")),
        _ => Box::new(file),
    };
    let by_ratio = RATIO_FREE_BYTES.saturating_add(compressed.saturating_mul(RATIO_MAX));
    Ok(Bounded { inner: reader, left: budget.min(by_ratio), stop: stop.clone(), is_over: false })
}

fn foreign(name: &str) -> Refused {
    Refused::new(format!("it is compressed with {name}, which is not taken; gzip and zstd are"))
}

/// A reader that ends with an error where `take` would end silently.
pub(in crate::host) struct Bounded {
    inner: Box<dyn Read>,
    left: u64,
    stop: Stop,
    is_over: bool,
}

impl Bounded {
    /// Returns whether there is more than the budget, or the compression ratio is suspicious.
    pub(in crate::host) fn is_over(&self) -> bool {
        self.is_over
    }
}

impl Read for Bounded {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.stop.is_set() {
            return Err(io::Error::new(io::ErrorKind::TimedOut, "it was given up"));
        }
        let count = self.inner.read(buffer)?;
        let Some(left) = self.left.checked_sub(count as u64) else {
            self.is_over = true;
            return Err(io::Error::new(io::ErrorKind::InvalidData, "it unpacks to more than it may"));
        };
        self.left = left;
        Ok(count)
    }
}
