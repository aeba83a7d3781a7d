//! The initial root: the embedded guest program and the modules that its boot needs.
//!
//! The daemon assembles it, so that one `stead` and one kernel package are the whole installation. The result is cached
//! under the hash of its parts. It is not compressed: it is small, and the guest would have to decompress it under
//! emulation.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};
use stead_controllers::host::{HostError, HostErrorKind};

use super::files;

/// Binary of the guest program, which is PID 1 of every guest.
const GUEST: &[u8] = include_bytes!(env!("STEAD_GUEST_BINARY"));

/// Modules that a guest may need, by name. Built-in drivers have no module file and are left out.
const MODULES: [&str; 12] = [
    "virtio_pci",
    "virtio_mmio",
    "virtio_blk",
    "virtio_console",
    "virtio-rng",
    "virtio_net",
    "squashfs",
    "erofs",
    "overlay",
    "ext4",
    // These are for programs that make their own network interface or file system. Their devices exist as on an
    // ordinary host, and images that need them rarely contain a module loader.
    "tun",
    "fuse",
];

/// Modules for the disks of volumes. They are beside the others: a guest loads them when it gets its first volume,
/// because loading them takes a tenth of a second under emulation.
const VOLUME_MODULES: [&str; 4] = ["scsi_common", "scsi_mod", "sd_mod", "virtio_scsi"];

/// Assembles the initial root with these modules. Returns the path of the cached file.
///
/// # Errors
/// Returns an error when a module cannot be read, or the cache cannot be written.
pub fn assemble(modules: &Path, cache: &Path) -> Result<PathBuf, HostError> {
    let index = Index::read(modules)?;
    let mut archive = Archive::default();
    for dir in ["dev", "proc", "sys"] {
        archive.add(dir, 0o040_755, &[], (0, 0));
    }
    archive.add("dev/console", 0o020_600, &[], (5, 1));
    archive.add("init", 0o100_755, GUEST, (0, 0));
    let mut seen = BTreeSet::new();
    for (dir, names) in [("modules", &MODULES[..]), ("volume-modules", &VOLUME_MODULES)] {
        archive.add_modules(dir, &index.order(names, &mut seen)?);
    }
    let bytes = archive.finish();
    let path = cache.join(format!("initrd-{}", &hex::encode(Sha256::digest(&bytes))[..16]));
    if !path.exists() {
        files::write_whole(&path, &bytes, files::READ_BY_VMMS)?;
    }
    Ok(path)
}

/// The module files by normalised name.
struct Index(std::collections::BTreeMap<String, PathBuf>);

impl Index {
    fn read(root: &Path) -> Result<Self, HostError> {
        let mut files = std::collections::BTreeMap::new();
        let mut dirs = vec![root.join("kernel")];
        while let Some(dir) = dirs.pop() {
            let entries = fs::read_dir(&dir)
                .map_err(|error| HostError::io("list", dir.display().to_string(), error))?;
            for entry in entries {
                let failed = |error| HostError::io("list", dir.display().to_string(), error);
                let entry = entry.map_err(failed)?;
                let path = entry.path();
                if entry.file_type().map_err(failed)?.is_dir() {
                    dirs.push(path);
                } else if let Some(name) =
                    path.file_name().and_then(|name| name.to_str()?.strip_suffix(".ko"))
                {
                    files.insert(normal(name), path.clone());
                }
            }
        }
        Ok(Self(files))
    }

    /// Returns modules with all that they depend on, in the order in which they are loaded. Those that were seen before
    /// are left out.
    fn order(
        &self,
        names: &[&str],
        seen: &mut BTreeSet<String>,
    ) -> Result<Vec<(String, Vec<u8>)>, HostError> {
        let mut order = Vec::new();
        for name in names {
            self.resolve(name, seen, &mut order)?;
        }
        Ok(order)
    }

    /// Appends the module after its dependencies.
    fn resolve(
        &self,
        name: &str,
        seen: &mut BTreeSet<String>,
        order: &mut Vec<(String, Vec<u8>)>,
    ) -> Result<(), HostError> {
        let name = normal(name);
        let Some(path) = self.0.get(&name) else { return Ok(()) };
        if !seen.insert(name.clone()) {
            return Ok(());
        }
        let bytes =
            fs::read(path).map_err(|error| HostError::io("read", path.display().to_string(), error))?;
        for dependency in depends(&bytes).ok_or_else(|| {
            HostError::new(HostErrorKind::Permanent, "read the dependencies of", path.display().to_string())
        })? {
            self.resolve(&dependency, seen, order)?;
        }
        order.push((format!("{name}.ko"), bytes));
        Ok(())
    }
}

fn normal(name: &str) -> String {
    name.replace('-', "_")
}

/// Returns the `depends=` entry of a module's `.modinfo`, a sequence of NUL-terminated texts.
fn depends(module: &[u8]) -> Option<Vec<String>> {
    const KEY: &[u8] = b"\0depends=";
    let at = module.windows(KEY.len()).position(|window| window == KEY)? + KEY.len();
    let end = module[at..].iter().position(|&byte| byte == 0)? + at;
    let text = std::str::from_utf8(&module[at..end]).ok()?;
    Some(text.split(',').filter(|name| !name.is_empty()).map(ToOwned::to_owned).collect())
}

/// A cpio archive in the `newc` format (linux Documentation/driver-api/early-userspace). It is encoded here because
/// the format is one header, and the available crates cannot write device nodes.
#[derive(Default)]
struct Archive {
    bytes: Vec<u8>,
    entries: u32,
}

impl Archive {
    fn add(&mut self, name: &str, mode: u32, content: &[u8], device: (u32, u32)) {
        self.entries += 1;
        let size = u32::try_from(content.len()).expect("modules and the guest are far below 4 GiB");
        let name_size = u32::try_from(name.len() + 1).expect("names are short");
        let fields = [self.entries, mode, 0, 0, 1, 0, size, 0, 0, device.0, device.1, name_size, 0];
        self.bytes.extend(b"070701");
        for field in fields {
            self.bytes.extend(format!("{field:08x}").bytes());
        }
        self.bytes.extend(name.bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend(content);
        self.pad();
    }

    /// Adds a directory of modules, with the list of their names.
    fn add_modules(&mut self, dir: &str, modules: &[(String, Vec<u8>)]) {
        self.add(dir, 0o040_755, &[], (0, 0));
        let mut list = String::new();
        for (name, bytes) in modules {
            self.add(&format!("{dir}/{name}"), 0o100_644, bytes, (0, 0));
            list.push_str(name);
            list.push('\n');
        }
        self.add(&format!("{dir}/order"), 0o100_644, list.as_bytes(), (0, 0));
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    fn finish(mut self) -> Vec<u8> {
        self.add("TRAILER!!!", 0, &[], (0, 0));
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dependencies_are_read_from_modinfo() {
        assert_eq!(
            depends(b"ELF..\0license=GPL\0depends=virtio,virtio_ring\0x"),
            Some(vec!["virtio".into(), "virtio_ring".into()])
        );
        assert_eq!(depends(b"..\0depends=\0retpoline=Y\0"), Some(vec![]));
        assert_eq!(depends(b"no module"), None);
    }

    #[test]
    fn modules_come_after_what_they_depend_on_and_once() {
        let root = tempfile::tempdir().expect("scratch");
        let dir = root.path().join("kernel/drivers");
        fs::create_dir_all(&dir).expect("made");
        for (name, depends) in [("a", "b,c"), ("b", "c"), ("c", "")] {
            fs::write(dir.join(format!("{name}.ko")), format!("x\0depends={depends}\0y")).expect("written");
        }
        let index = Index::read(root.path()).expect("read");
        let mut seen = BTreeSet::new();
        let names =
            |order: Vec<(String, Vec<u8>)>| order.into_iter().map(|(name, _)| name).collect::<Vec<_>>();
        assert_eq!(names(index.order(&["b", "built-in"], &mut seen).expect("resolved")), ["c.ko", "b.ko"]);
        // A second list goes on where the first one ended.
        assert_eq!(names(index.order(&["c", "a"], &mut seen).expect("resolved")), ["a.ko"]);
    }
}
