//! The pages that a VMM has written to in RAM that it maps privately, as the kernel reports them.
//!
//! `/proc/PID/pagemap` (documented in the kernel's tree, admin-guide/mm/pagemap) has an entry for each
//! page: whether the process has the page in memory or swapped out, and whether the page belongs to the
//! file. All other RAM is as in the file.
//! Assumes: the process does not run while its pages are listed and read.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;

use super::ram::{BLOCK, CHUNK, share_of, side_by_side};

/// Size of one /proc/PID/pagemap entry, in bytes.
const ENTRY_BYTES: usize = 8;
const IS_PRESENT: u64 = 1 << 63;
const IS_SWAPPED: u64 = 1 << 62;
/// Flag of a page that belongs to a file, or is shared memory.
const IS_OF_FILE: u64 = 1 << 61;

/// Adjacent pages, no more than one read holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Run {
    /// The address in the process.
    address: u64,
    /// The offset in the RAM.
    offset: u64,
    bytes: usize,
}

/// A private mapping of a file in a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Mapped {
    start: u64,
    end: u64,
    offset: u64,
}

/// The pages of one process that differ from the mapped file.
#[derive(Debug)]
pub(crate) struct DirtyPages {
    memory: File,
    runs: Vec<Run>,
}

impl DirtyPages {
    /// Finds the dirty pages of a process that maps RAM of this length from the file with this inode.
    pub(crate) fn of(pid: u32, inode: u64, length: u64) -> io::Result<Self> {
        if rustix::param::page_size() != BLOCK {
            return Err(io::Error::other("pages of this host are of another size"));
        }
        let maps = mapped(&fs::read_to_string(format!("/proc/{pid}/maps"))?, inode);
        if maps.iter().map(|map| map.end - map.start).sum::<u64>() != length {
            return Err(io::Error::other("its RAM is not mapped as it was"));
        }
        let page_map = File::open(format!("/proc/{pid}/pagemap"))?;
        let mut runs = Vec::new();
        for map in maps {
            add_runs(&page_map, map, &mut runs)?;
        }
        Ok(Self { memory: File::open(format!("/proc/{pid}/mem"))?, runs })
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.runs.iter().map(|run| run.bytes as u64).sum()
    }

    /// Writes the dirty pages into a copy of the file. Returns the difference that this makes to its sum.
    pub(crate) fn write_to(&self, copy: &File) -> io::Result<u64> {
        side_by_side(self.runs.len(), |new, index| {
            let run = self.runs[index];
            let (new, mut old) = (&mut new[..run.bytes], vec![0; run.bytes]);
            self.memory.read_exact_at(new, run.address)?;
            copy.read_exact_at(&mut old, run.offset)?;
            write_changed(copy, run.offset, new, &old)
        })
    }
}

/// Writes adjacent blocks that differ together. Blocks that are zero in both files may be holes.
fn write_changed(copy: &File, start: u64, new: &[u8], old: &[u8]) -> io::Result<u64> {
    let blocks: Vec<_> = new.chunks(BLOCK).zip(old.chunks(BLOCK)).collect();
    let (mut offset, mut change) = (0, 0u64);
    for run in blocks.chunk_by(|(a, b), (c, d)| (a == b) == (c == d)) {
        let length: usize = run.iter().map(|(new, _)| new.len()).sum();
        let (run_range, at) = (offset..offset + length, start + offset as u64);
        if run[0].0 != run[0].1 {
            copy.write_all_at(&new[run_range.clone()], at)?;
            change = change.wrapping_add(share_of(at, &new[run_range.clone()]));
            change = change.wrapping_sub(share_of(at, &old[run_range]));
        }
        offset += length;
    }
    Ok(change)
}

/// Parses lines as in proc(5): addresses, permissions, offset, device, inode, path.
fn mapped(maps: &str, inode: u64) -> Vec<Mapped> {
    let hex = |word: &str| u64::from_str_radix(word, 16).ok();
    let parse_line = |line: &str| {
        let mut words = line.split_ascii_whitespace();
        let (start, end) = words.next()?.split_once('-')?;
        let (permissions, offset, _device) = (words.next()?, words.next()?, words.next()?);
        let is_it = permissions.ends_with('p') && words.next()?.parse() == Ok(inode);
        let map = Mapped { start: hex(start)?, end: hex(end)?, offset: hex(offset)? };
        is_it.then_some(map).filter(|map| map.start <= map.end)
    };
    maps.lines().filter_map(parse_line).collect()
}

fn add_runs(page_map: &File, map: Mapped, runs: &mut Vec<Run>) -> io::Result<()> {
    let mut entries = vec![0u8; CHUNK];
    let page = BLOCK as u64;
    let mut at = map.start;
    while at < map.end {
        let pages = usize::try_from((map.end - at) / page).unwrap_or(usize::MAX).min(CHUNK / ENTRY_BYTES);
        let entries = &mut entries[..pages * ENTRY_BYTES];
        page_map.read_exact_at(entries, at / page * ENTRY_BYTES as u64)?;
        for entry in entries.chunks_exact(ENTRY_BYTES) {
            if is_dirty(u64::from_ne_bytes(entry.try_into().unwrap_or_default())) {
                add_page(runs, at, map.offset + (at - map.start));
            }
            at += page;
        }
    }
    Ok(())
}

fn is_dirty(entry: u64) -> bool {
    entry & (IS_PRESENT | IS_SWAPPED) != 0 && entry & IS_OF_FILE == 0
}

fn add_page(runs: &mut Vec<Run>, address: u64, offset: u64) {
    match runs.last_mut() {
        Some(last)
            if last.bytes < CHUNK
                && last.address + last.bytes as u64 == address
                && last.offset + last.bytes as u64 == offset =>
        {
            last.bytes += BLOCK;
        }
        _ => runs.push(Run { address, offset, bytes: BLOCK }),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::os::unix::fs::MetadataExt;
    use std::path::Path;
    use std::ptr::null_mut;

    use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

    use super::super::ram::{copy_ram, sum_ram};
    use super::*;

    /// A file that this process maps privately, as a VMM does.
    pub(crate) struct Ram {
        address: *mut u8,
        length: usize,
        inode: u64,
    }

    impl Ram {
        #[expect(unsafe_code, reason = "a mapping is made with a system call on addresses")]
        pub(crate) fn map(path: &Path) -> Self {
            let file = File::open(path).expect("there");
            let seen = file.metadata().expect("there");
            let length = usize::try_from(seen.len()).expect("small");
            let (protection, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE);
            // SAFETY: this is a new mapping, at an address of the kernel's choice, and no process truncates the file.
            let address = unsafe { mmap(null_mut(), length, protection, flags, &file, 0) }.expect("mapped");
            Self { address: address.cast(), length, inode: seen.ino() }
        }

        #[expect(unsafe_code, reason = "as a guest writes to its memory")]
        pub(crate) fn write(&mut self, at: usize, bytes: &[u8]) {
            assert!(at + bytes.len() <= self.length);
            // SAFETY: within the mapping, which is this value's alone.
            unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.address.add(at), bytes.len()) };
        }

        /// Reads the mapping, which makes no page dirty.
        #[expect(unsafe_code, reason = "as a guest reads its memory")]
        pub(crate) fn bytes(&self) -> Vec<u8> {
            // SAFETY: this is the whole mapping, and no code writes to it meanwhile.
            unsafe { std::slice::from_raw_parts(self.address, self.length) }.to_vec()
        }

        pub(crate) fn dirty_pages(&self) -> DirtyPages {
            DirtyPages::of(std::process::id(), self.inode, self.length as u64).expect("listed")
        }

        pub(crate) fn inode(&self) -> u64 {
            self.inode
        }
    }

    impl Drop for Ram {
        #[expect(unsafe_code, reason = "the other half of mmap")]
        fn drop(&mut self) {
            // SAFETY: the mapping that was made, and no reference into it outlives this value.
            let _ = unsafe { munmap(self.address.cast(), self.length) };
        }
    }

    #[test]
    fn exactly_the_written_pages_are_listed_and_make_a_copy_equal_to_the_ram() {
        let dir = tempfile::tempdir().expect("scratch");
        let (path, copy) = (dir.path().join("ram"), dir.path().join("copy"));
        let length = 40 * CHUNK;
        let file = File::options().create_new(true).read(true).write(true).open(&path).expect("made");
        file.set_len(length as u64).expect("sized");
        file.write_all_at(&vec![1; CHUNK * 3], CHUNK as u64).expect("written");
        let before = sum_ram(&file).expect("read");
        let mut ram = Ram::map(&path);
        assert_eq!(ram.bytes().len(), length);
        assert_eq!(ram.dirty_pages().bytes(), 0, "to read is not to have");
        // A byte in a hole, pages beyond the end of a run, zeros over data, zeros over a hole, and
        // unchanged content.
        ram.write(9, &[7]);
        ram.write(CHUNK * 10 - 5, &vec![8; CHUNK * 2]);
        ram.write(CHUNK * 2, &[0; BLOCK]);
        ram.write(CHUNK * 20, &[0; BLOCK]);
        ram.write(CHUNK, &[1; BLOCK]);
        let pages = ram.dirty_pages();
        assert_eq!(pages.bytes(), (1 + 129 + 3) * BLOCK as u64);
        assert!(pages.runs.iter().all(|run| run.bytes <= CHUNK), "{:?}", pages.runs);
        let to = File::options().create_new(true).read(true).write(true).open(&copy).expect("made");
        assert_eq!(copy_ram(&file, &to).expect("copied"), before);
        let blocks = to.metadata().expect("there").blocks();
        let change = pages.write_to(&to).expect("written");
        assert!(fs::read(&copy).expect("there") == ram.bytes(), "the copy is another");
        let after = sum_ram(&to).expect("read");
        assert_eq!(after, (before.0, before.1.wrapping_add(change)));
        assert_ne!(after, before);
        let more = (to.metadata().expect("there").blocks() - blocks) * 512;
        assert!(more <= 131 * BLOCK as u64, "{more} more bytes on the disk: zeros over a hole stay a hole");
        // In the mapped file itself: what is read through the mapping does not change.
        let ram_before = ram.bytes();
        let mapped = File::options().read(true).write(true).open(&path).expect("there");
        pages.write_to(&mapped).expect("written");
        assert!(ram.bytes() == ram_before && fs::read(&path).expect("there") == ram_before);
        assert!(DirtyPages::of(std::process::id(), ram.inode, 4096).is_err(), "another length");
        assert!(DirtyPages::of(std::process::id(), ram.inode + 1, length as u64).is_err(), "another file");
    }

    #[test]
    fn private_pages_in_memory_or_swapped_out_are_dirty_and_pages_of_the_file_are_not() {
        for (entry, expected) in [
            (0, false),
            (IS_PRESENT, true),
            (IS_SWAPPED | 77, true),
            (IS_PRESENT | IS_OF_FILE | 77, false),
            (IS_SWAPPED | IS_OF_FILE, false),
            (77, false),
        ] {
            assert_eq!(is_dirty(entry), expected, "{entry:x}");
        }
    }

    #[test]
    fn only_private_mappings_of_the_file_are_found() {
        let maps = "7f0000000000-7f0000002000 rw-p 00000000 fe:01 4242    /data/memory/x/running/ram\n\
                    7f0000002000-7f0000003000 ---p 00000000 00:00 0 \n\
                    7f0000003000-7f0000004000 rw-s 00002000 fe:01 4242    /data/a b\n\
                    7f0000005000-7f0000006000 rw-p 00002000 fe:01 4242    /data/gone (deleted)\n\
                    garbage\n7f-zz rw-p 0 0 4242\n";
        let map = |start, end, offset| Mapped { start, end, offset };
        let expected =
            [map(0x7f00_0000_0000, 0x7f00_0000_2000, 0), map(0x7f00_0000_5000, 0x7f00_0000_6000, 0x2000)];
        assert_eq!(mapped(maps, 4242), expected);
        assert_eq!(mapped(maps, 0), [map(0x7f00_0000_2000, 0x7f00_0000_3000, 0)]);
    }
}
