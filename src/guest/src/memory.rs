//! Hotplug memory: blocks of memory that the guest's kernel gives back, and takes again, while programs run.
//!
//! The kernel's command line keeps so much memory for pages that can be moved. Its blocks are in
//! `/sys/devices/system/memory` (documented in the kernel's tree, admin-guide/mm/memory-hotplug).
//! Guarantees: a block is only given back while the programs can do without it. What does not succeed is tried again,
//! less and less often.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use rustix::process::Signal;
use stead_schemas::guest::{Config, HotplugMemory};
use stead_schemas::limits::MEMORY_BLOCK;

use crate::children::Children;
use crate::control::Control;

const BLOCKS: &str = "/sys/devices/system/memory";
const ITSELF: &str = "/proc/self/exe";
/// First argument of the process that takes a block out of use.
pub(crate) const OFFLINE: &str = "offline";
/// Time that the kernel has to move the pages of a block, which takes tenths of a second. It would go on for ever where
/// a page cannot be moved, and ends when its process is killed.
const OFFLINE_DEADLINE: Duration = Duration::from_secs(10);
/// Memory that stays available to programs when a block is given back, in bytes.
const AVAILABLE_MIN: u64 = 64 << 20;
/// Delays between observations of the blocks, which double while some could not be given back.
const RETRY_FIRST: Duration = Duration::from_secs(30);
const RETRY_MAX: Duration = Duration::from_secs(600);

/// A block of memory.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Block {
    number: u64,
    is_used: bool,
    /// True if the kernel keeps only pages in it that can be moved.
    is_movable: bool,
}

/// The memory of this guest, in its kernel's own files.
struct Memory {
    blocks: PathBuf,
    /// Size of all hotplug memory, in bytes.
    hotplug: u64,
}

/// Starts the thread that uses as much hotplug memory as the host asks, if the machine has some.
pub(crate) fn start(control: &Control, children: &Children, config: &Config) {
    if config.hotplug_bytes == 0 {
        return;
    }
    let (control, children) = (control.clone(), children.clone());
    let memory = Memory { blocks: BLOCKS.into(), hotplug: config.hotplug_bytes };
    let started = std::thread::Builder::new()
        .name("memory".to_owned())
        .spawn(move || follow(&control, &children, &memory));
    if let Err(error) = started {
        crate::log_line(&format!("the hotplug memory stays as it is: {error}"));
    }
}

fn follow(control: &Control, children: &Children, memory: &Memory) {
    let (mut target, mut delay, mut known) = (None, RETRY_FIRST, HotplugMemory::default());
    loop {
        let resized = match target {
            Some(target) => memory.resize(target, |block| offline(children, block)),
            None => Ok(()),
        };
        known = memory.report(target, resized.err(), &known);
        // Somebody in the guest may use other blocks meanwhile.
        let next = control.wait_for_memory(known.clone(), delay);
        delay = match &known.error {
            Some(_) if next == target => (delay * 2).min(RETRY_MAX),
            Some(_) | None => RETRY_FIRST,
        };
        target = next;
    }
}

impl Memory {
    /// Returns all blocks by their numbers, and the size of one in bytes.
    fn blocks(&self) -> io::Result<(Vec<Block>, u64)> {
        let invalid = |what: &str| io::Error::new(io::ErrorKind::InvalidData, what.to_owned());
        let size = fs::read_to_string(self.blocks.join("block_size_bytes"))?;
        let size = u64::from_str_radix(size.trim(), 16).ok().filter(|&size| size > 0);
        let size = size.ok_or_else(|| invalid("the size of a block of memory"))?;
        let mut blocks = Vec::new();
        for entry in fs::read_dir(&self.blocks)? {
            let entry = entry?;
            let name = entry.file_name();
            let number = name.to_str().and_then(|name| name.strip_prefix("memory")?.parse().ok());
            let Some(number) = number else { continue };
            let state = fs::read_to_string(entry.path().join("state"))?;
            let zones = fs::read_to_string(entry.path().join("valid_zones"))?;
            let is_movable = zones.split_whitespace().next() == Some("Movable");
            blocks.push(Block { number, is_used: state.trim() == "online", is_movable });
        }
        blocks.sort_by_key(|block| block.number);
        Ok((blocks, size))
    }

    /// Returns how much hotplug memory is in use, in bytes: all but the blocks that were given back.
    fn used(&self, blocks: &[Block], size: u64) -> u64 {
        let unused = blocks.iter().filter(|block| !block.is_used).count() as u64;
        self.hotplug.saturating_sub(unused.saturating_mul(size))
    }

    /// Returns the present state, in words of the protocol.
    fn report(&self, target: Option<u64>, error: Option<String>, earlier: &HotplugMemory) -> HotplugMemory {
        let (blocks, size) = match self.blocks() {
            Ok(read) => read,
            Err(unread) => return HotplugMemory { error: Some(unread.to_string()), ..earlier.clone() },
        };
        let unused = blocks.iter().filter(|block| !block.is_used).map(|block| block.number);
        // The host knows blocks of one size only.
        let unused_blocks: Vec<u64> = if size == MEMORY_BLOCK.0 { unused.collect() } else { Vec::new() };
        let change = earlier.change + u64::from(unused_blocks != earlier.unused_blocks);
        HotplugMemory {
            target_bytes: target,
            used_bytes: self.used(&blocks, size),
            error,
            unused_blocks,
            change,
        }
    }

    /// Gives blocks back, or takes them, until so much is in use. An error says in words why it is not.
    fn resize(&self, target: u64, offline: impl Fn(&Path) -> io::Result<()>) -> Result<(), String> {
        let words = |error: io::Error| error.to_string();
        let (blocks, size) = self.blocks().map_err(words)?;
        let used = self.used(&blocks, size);
        if used < target {
            let missing = (target - used).div_ceil(size);
            let unused = blocks.iter().filter(|block| !block.is_used);
            for block in unused.take(usize::try_from(missing).unwrap_or(usize::MAX)) {
                fs::write(self.state(block), "online_movable").map_err(words)?;
            }
            return Ok(());
        }
        let mut surplus = (used - target) / size;
        // From the end, because the kernel fills blocks from the beginning.
        for block in blocks.iter().rev().filter(|block| block.is_used && block.is_movable) {
            if surplus == 0 {
                break;
            }
            let available = available(&fs::read_to_string("/proc/meminfo").map_err(words)?);
            if available < size + AVAILABLE_MIN {
                return Err(format!(
                    "the programs of the guest use it: {} MB are available",
                    available >> 20
                ));
            }
            surplus -= u64::from(offline(&self.state(block)).is_ok());
        }
        match surplus {
            0 => Ok(()),
            _ => Err(format!("the kernel of the guest uses {} MB of it", (surplus * size) >> 20)),
        }
    }

    fn state(&self, block: &Block) -> PathBuf {
        self.blocks.join(format!("memory{}", block.number)).join("state")
    }
}

/// Returns the memory that programs can still get, in bytes, from the lines of `/proc/meminfo`.
fn available(meminfo: &str) -> u64 {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kilobytes = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
    kilobytes.unwrap_or_default() << 10
}

/// Takes a block out of use, in a process of its own, which can be killed.
fn offline(children: &Children, state: &Path) -> io::Result<()> {
    let mut command = Command::new(ITSELF);
    command.arg(OFFLINE).arg(state).env_clear();
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let (sender, end) = mpsc::sync_channel(1);
    let pid = children.spawn(&mut command, move |status| {
        // The receiver waits for the status.
        let _ = sender.send(status);
    })?;
    let status = end.recv_timeout(OFFLINE_DEADLINE).or_else(|_| {
        children.signal(pid, Signal::KILL);
        end.recv()
    });
    match status {
        Ok(status) if status.exit_status() == Some(0) => Ok(()),
        Ok(_) | Err(_) => Err(io::Error::other("a page of the block cannot be moved")),
    }
}

/// Does the work of the process that takes the block with this state file out of use.
pub(crate) fn offline_main(state: &OsStr) -> io::Result<()> {
    fs::write(state, "offline")
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: u64 = 128 << 20;

    /// Makes the files of a kernel with blocks of these numbers, of which the last four are movable.
    fn memory(dir: &Path, numbers: &[u64]) -> Memory {
        fs::write(dir.join("block_size_bytes"), "8000000\n").expect("written");
        fs::write(dir.join("uevent"), "").expect("written");
        for (index, number) in numbers.iter().enumerate() {
            let block = dir.join(format!("memory{number}"));
            fs::create_dir(&block).expect("made");
            let is_movable = index + 4 >= numbers.len();
            fs::write(block.join("state"), "online\n").expect("written");
            fs::write(block.join("valid_zones"), if is_movable { "Movable\n" } else { "DMA32\n" })
                .expect("written");
        }
        Memory { blocks: dir.to_owned(), hotplug: 4 * SIZE }
    }

    fn unused(memory: &Memory) -> Vec<u64> {
        let (blocks, _) = memory.blocks().expect("read");
        blocks.into_iter().filter(|block| !block.is_used).map(|block| block.number).collect()
    }

    fn used(memory: &Memory) -> u64 {
        let (blocks, size) = memory.blocks().expect("read");
        memory.used(&blocks, size)
    }

    #[test]
    fn movable_blocks_are_given_back_from_the_end_and_taken_again_and_a_held_one_is_left() {
        let dir = std::env::temp_dir().join(format!("stead-memory-{}", std::process::id()));
        fs::create_dir(&dir).expect("made");
        let memory = memory(&dir, &[0, 1, 2, 32, 33, 34, 35]);
        // The kernel holds the last block.
        let held = |state: &Path| match state.starts_with(dir.join("memory35")) {
            true => Err(io::Error::other("busy")),
            false => fs::write(state, "offline"),
        };
        assert_eq!((used(&memory), unused(&memory)), (4 * SIZE, vec![]));
        memory.resize(2 * SIZE, held).expect("enough others");
        assert_eq!((used(&memory), unused(&memory)), (2 * SIZE, vec![33, 34]));
        let error = memory.resize(0, held).expect_err("one is held");
        assert_eq!(error, "the kernel of the guest uses 128 MB of it");
        assert_eq!(unused(&memory), [32, 33, 34]);
        // As the kernel shows a block that was put to use.
        memory.resize(3 * SIZE, held).expect("there are enough");
        assert_eq!(fs::read_to_string(dir.join("memory32/state")).expect("there"), "online_movable");
        for number in [32, 33] {
            fs::write(dir.join(format!("memory{number}/state")), "online\n").expect("written");
        }
        assert_eq!((used(&memory), unused(&memory)), (3 * SIZE, vec![34]));
        let first = memory.report(Some(3 * SIZE), None, &HotplugMemory::default());
        assert_eq!((first.used_bytes, &*first.unused_blocks, first.change), (3 * SIZE, &[34][..], 1));
        let again = memory.report(Some(2 * SIZE), Some("held".to_owned()), &first);
        assert_eq!(
            (again.target_bytes, again.change, again.error.as_deref()),
            (Some(2 * SIZE), 1, Some("held"))
        );
        assert_eq!(again.clone().asked(Some(2 * SIZE)), again);
        let following = again.asked(Some(4 * SIZE));
        assert_eq!((following.target_bytes, following.unused_blocks.len()), (Some(4 * SIZE), 0));
        fs::remove_dir_all(dir).expect("removed");
    }

    #[test]
    fn available_memory_is_read_and_an_unknown_one_is_none() {
        assert_eq!(available("MemTotal: 9 kB\nMemAvailable:    2048 kB\n"), 2 << 20);
        assert_eq!(available("MemTotal: 9 kB\n"), 0);
    }
}
