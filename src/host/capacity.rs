//! The size of the host: processors, memory, and the file system of the data.

use std::fs;
use std::path::Path;

use stead_controllers::host::{HostError, HostErrorKind};
use stead_schemas::node::Resources;
use stead_schemas::quantity::Bytes;

use super::files;

/// The file in which the kernel shows the size of the memory.
pub(super) const MEMORY: &str = "/proc/meminfo";

/// Reads the size of the host. Processors are those that this process may use.
///
/// # Errors
/// Fails when the kernel does not show the memory, or when the data directory cannot be read.
pub fn read(data_dir: &Path) -> Result<Resources, HostError> {
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    let shown = fs::read_to_string(MEMORY).map_err(|error| HostError::io("read", MEMORY, error))?;
    let memory = memory(&shown, "MemTotal");
    let memory =
        memory.ok_or_else(|| HostError::new(HostErrorKind::Permanent, "find MemTotal in", MEMORY))?;
    let disk = files::space(data_dir);
    let (disk, _) = disk.map_err(|error| HostError::io("measure", data_dir.display().to_string(), error))?;
    Ok(Resources { cpus: u32::try_from(cpus).unwrap_or(u32::MAX), memory, disk })
}

/// Returns the value of a line such as `MemTotal:       16318480 kB`.
pub(super) fn memory(shown: &str, name: &str) -> Option<Bytes> {
    let line = shown.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    let kibibytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kibibytes.checked_mul(1024).map(Bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_memory_is_read_from_its_line_and_from_no_other() {
        let shown = "MemFree:  1 kB\nMemTotal:       16318480 kB\n";
        assert_eq!(memory(shown, "MemTotal"), Some(Bytes(16_318_480 * 1024)));
        for bad in
            ["", "MemFree: 1 kB", "MemTotal: 1 MB", "MemTotal: x kB", "MemTotal: 18446744073709551615 kB"]
        {
            assert_eq!(memory(bad, "MemTotal"), None, "{bad}");
        }
    }

    #[test]
    fn this_host_has_a_size() {
        let size = read(Path::new("/")).expect("readable");
        assert!(size.cpus > 0 && size.memory > Bytes(0) && size.disk > Bytes(0), "{size:?}");
        assert!(read(Path::new("/no/such/directory")).is_err());
    }
}
