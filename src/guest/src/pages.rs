//! Reads of the port: reads as many of the driver's pages as are available with one call.
//!
//! For each part of a vector the driver returns at most the rest of one page, and the kernel ends the call at a part
//! that was not filled. So the parts end where pages end: a frame that has arrived is then read whole in one call.

use std::io::{self, IoSliceMut, Read};

/// Size of the buffers that the driver gives to the host, in bytes. They are full if more data follows.
const PAGE_BYTES: usize = 4096;
/// Limit on the parts of one read, as in the kernel.
const PARTS_MAX: usize = 1024;

#[derive(Debug, Default)]
pub(crate) struct Pages {
    /// Number of bytes already taken of the page that is read next, as far as known. A wrong guess costs a shorter
    /// read.
    taken: usize,
}

impl Pages {
    /// Reads into the first slice and then into the second. Returns the number of bytes read.
    pub(crate) fn read(&mut self, port: &mut impl Read, targets: [&mut [u8]; 2]) -> io::Result<usize> {
        let mut parts = Vec::new();
        let mut room = PAGE_BYTES - self.taken;
        for mut target in targets {
            while !target.is_empty() && parts.len() < PARTS_MAX {
                let (part, rest) = target.split_at_mut(room.min(target.len()));
                room = if part.len() == room { PAGE_BYTES } else { room - part.len() };
                parts.push(IoSliceMut::new(part));
                target = rest;
            }
        }
        let asked: usize = parts.iter().map(|part| part.len()).sum();
        let count = port.read_vectored(&mut parts)?;
        // A short read means that the last available page was read to its end.
        self.taken = if count < asked { 0 } else { (self.taken + count) % PAGE_BYTES };
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use super::*;

    /// A port that behaves like the driver.
    struct Port {
        pages: VecDeque<Vec<u8>>,
        calls: usize,
    }

    impl Read for Port {
        fn read(&mut self, target: &mut [u8]) -> io::Result<usize> {
            let Some(page) = self.pages.front_mut() else { return Err(io::ErrorKind::WouldBlock.into()) };
            let count = target.len().min(page.len());
            target[..count].copy_from_slice(&page[..count]);
            page.drain(..count);
            if page.is_empty() {
                self.pages.pop_front();
            }
            Ok(count)
        }

        fn read_vectored(&mut self, parts: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
            self.calls += 1;
            let mut all = 0;
            for part in parts {
                let count = match self.read(part) {
                    Ok(count) => count,
                    Err(error) if all == 0 => return Err(error),
                    Err(_) => break,
                };
                all += count;
                if count < part.len() {
                    break;
                }
            }
            Ok(all)
        }
    }

    #[test]
    fn all_that_is_there_is_read_by_one_call_wherever_pages_end() {
        let bytes: Vec<u8> = (0..64 * PAGE_BYTES).map(|at| (at / 7).to_le_bytes()[0]).collect();
        let mut port = Port { pages: bytes.chunks(PAGE_BYTES).map(<[u8]>::to_vec).collect(), calls: 0 };
        let (mut pages, mut read) = (Pages::default(), Vec::<u8>::new());
        let (mut head, mut rest) = ([0; 13], vec![0; 5 * PAGE_BYTES]);
        while let Ok(count) = pages.read(&mut port, [&mut head, &mut rest]) {
            read.extend_from_slice(&[&head[..], &rest[..]].concat()[..count]);
        }
        assert!(read == bytes);
        assert_eq!(port.calls, 64 * PAGE_BYTES / (head.len() + rest.len()) + 2);
    }
}
