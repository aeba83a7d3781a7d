//! The guest kernel: found in an unpacked Debian package, with its ELF extracted from the bzImage.
//!
//! Booting the ELF through PVH saves the guest the decompression (0.3 s under emulation). The ELF is cached under the
//! hash of the package's file.

use std::fs;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};
use stead_controllers::host::{HostError, HostErrorKind};

use super::files;

/// The kernel that a guest boots.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Kernel {
    /// Path of the ELF image with a PVH entry.
    pub vmlinux: PathBuf,
    /// Directory of the modules, `lib/modules/VERSION`.
    pub modules: PathBuf,
    /// Squashfs for guests with modules and headers, laid out as in a root. Guests work without it.
    pub headers: Option<PathBuf>,
    /// Squashfs for guests with the modules alone. Guests work without it.
    pub modules_disk: Option<PathBuf>,
}

/// Name of the disk, as created by `deploy/fetch-kernel`.
const MODULES_DISK: &str = "modules.squashfs";
const HEADERS_DISK: &str = "modules-headers.squashfs";
/// Name of the disk of earlier versions, which saved memories may still use.
const OLD_HEADERS_DISK: &str = "headers.squashfs";

/// Limit on an ELF kernel, in bytes. It has some 50 MB; a payload that claims far more is not a kernel.
const VMLINUX_BYTES_MAX: usize = 512 << 20;
/// Block size of the legacy LZ4 frame that the kernel's build uses, in bytes.
const LZ4_LEGACY_BLOCK: usize = 8 << 20;

impl Kernel {
    /// Finds the kernel below `dir` (or `dir/current`) and extracts its ELF into `cache`.
    ///
    /// # Errors
    /// Missing, with a sentence on what to run, when there is no kernel. Permanent when its format is unknown.
    pub fn find(dir: &Path, cache: &Path) -> Result<Self, HostError> {
        let root = root(dir);
        let (image, modules) = parts(dir)?;
        let read = |path: &Path| {
            fs::read(path).map_err(|error| HostError::io("read", path.display().to_string(), error))
        };
        let bytes = read(&image)?;
        let hash = hex::encode(Sha256::digest(&bytes));
        let vmlinux = cache.join(format!("vmlinux-{}", &hash[..16]));
        if !vmlinux.exists() {
            let elf = extract(&bytes).map_err(|why| {
                HostError::new(HostErrorKind::Permanent, "extract the kernel of", image.display().to_string())
                    .because(why)
            })?;
            files::write_whole(&vmlinux, &elf, files::READ_BY_VMMS)?;
        }
        // A saved memory continues with the same disk, even if `current` is another kernel by then.
        let root = fs::canonicalize(&root).unwrap_or(root);
        let disk = |name: &str| Some(root.join(name)).filter(|path| path.is_file());
        Ok(Self { vmlinux, modules, headers: disk(HEADERS_DISK), modules_disk: disk(MODULES_DISK) })
    }

    /// Returns the disk of the kernel's files for a guest, if there is one.
    #[must_use]
    pub fn guest_disk(self, wants_headers: bool) -> Option<PathBuf> {
        self.headers.filter(|_| wants_headers).or(self.modules_disk)
    }

    /// Returns `true` if a guest with this disk has the headers.
    #[must_use]
    pub fn has_headers(disk: &Path) -> bool {
        disk.file_name().is_some_and(|name| name == HEADERS_DISK || name == OLD_HEADERS_DISK)
    }

    /// Returns `true` if guests can be given the headers of the kernel below `dir`.
    #[must_use]
    pub fn has_headers_in(dir: &Path) -> bool {
        root(dir).join(HEADERS_DISK).is_file()
    }

    /// Returns the version of the kernel below `dir`. Extracts nothing.
    ///
    /// # Errors
    /// Missing, with a sentence on what to run, when there is no kernel.
    pub fn version(dir: &Path) -> Result<String, HostError> {
        let (_, modules) = parts(dir)?;
        Ok(modules.file_name().unwrap_or_default().to_string_lossy().into_owned())
    }
}

/// Returns the package's root: `dir/current` if there are several packages.
fn root(dir: &Path) -> PathBuf {
    if dir.join("current").exists() { dir.join("current") } else { dir.to_owned() }
}

/// Returns the compressed kernel and the directory of its modules.
fn parts(dir: &Path) -> Result<(PathBuf, PathBuf), HostError> {
    let root = root(dir);
    let missing = |what: &str| {
        let advice = format!("{what}; run deploy/fetch-kernel {}", dir.display());
        HostError::new(HostErrorKind::Missing, "find a guest kernel in", dir.display().to_string())
            .because(advice)
    };
    let failed = |error| HostError::io("find a guest kernel in", dir.display().to_string(), error);
    let image = only_entry(&root.join("boot"), "vmlinuz-").map_err(failed)?;
    let image = image.ok_or_else(|| missing("no boot/vmlinuz-*"))?;
    let modules = only_entry(&root.join("lib/modules"), "").map_err(failed)?;
    let modules = modules.ok_or_else(|| missing("no lib/modules/*"))?;
    Ok((image, modules))
}

fn only_entry(dir: &Path, prefix: &str) -> io::Result<Option<PathBuf>> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries.map(|entry| Ok(entry?.path())).collect::<io::Result<Vec<PathBuf>>>()?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    let has_prefix = |name: &std::ffi::OsStr| name.to_string_lossy().starts_with(prefix);
    Ok(entries.into_iter().filter(|path| path.file_name().is_some_and(has_prefix)).max())
}

/// Extracts the payload of a bzImage (Linux x86 boot protocol, fields `setup_sects`, `payload_offset`,
/// `payload_length`). An ELF file is returned unchanged.
fn extract(image: &[u8]) -> Result<Vec<u8>, String> {
    const ELF: &[u8] = b"\x7fELF";
    if image.starts_with(ELF) {
        return Ok(image.to_vec());
    }
    if image.get(0x202..0x206) != Some(b"HdrS") {
        return Err("it is neither an ELF file nor a bzImage".to_owned());
    }
    let word = |at: usize| -> Option<usize> {
        let bytes = image.get(at..at + 4)?;
        usize::try_from(u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])).ok()
    };
    let setup_sectors = usize::from(image[0x1f1]).max(1);
    let start = (setup_sectors + 1) * 512 + word(0x248).ok_or("its header is cut")?;
    let length = word(0x24c).ok_or("its header is cut")?;
    let payload = image.get(start..start.saturating_add(length)).ok_or("its payload is cut")?;
    let elf = decompress(payload)?;
    if elf.starts_with(ELF) { Ok(elf) } else { Err("its payload is not an ELF file".to_owned()) }
}

fn decompress(payload: &[u8]) -> Result<Vec<u8>, String> {
    match payload.get(..4) {
        Some([0x02, 0x21, 0x4c, 0x18]) => decompress_lz4(&payload[4..]),
        Some([0x28, 0xb5, 0x2f, 0xfd]) => {
            let decoder = zstd::Decoder::new(payload).map_err(|error| error.to_string())?;
            // The kernel's build appends the size after the frame.
            read_bounded(decoder.single_frame())
        }
        Some([0x1f, 0x8b, ..]) => read_bounded(flate2::read::GzDecoder::new(payload)),
        _ => Err("its payload's compression is not LZ4, zstd or gzip; give a vmlinux".to_owned()),
    }
}

fn read_bounded(reader: impl Read) -> Result<Vec<u8>, String> {
    let mut out = Vec::new();
    let limit = u64::try_from(VMLINUX_BYTES_MAX).unwrap_or(u64::MAX);
    reader.take(limit).read_to_end(&mut out).map_err(|error| error.to_string())?;
    Ok(out)
}

/// Decompresses a legacy frame: blocks of at most 8 MiB, each with its length, until the appended size.
fn decompress_lz4(mut rest: &[u8]) -> Result<Vec<u8>, String> {
    let mut out = Vec::new();
    while let Some((length, tail)) = rest.split_first_chunk::<4>() {
        let length = usize::try_from(u32::from_le_bytes(*length)).unwrap_or(usize::MAX);
        let Some(block) = tail.get(..length).filter(|block| !block.is_empty()) else { break };
        let mut plain = vec![0; LZ4_LEGACY_BLOCK];
        let count = lz4_flex::block::decompress_into(block, &mut plain).map_err(|error| error.to_string())?;
        out.extend_from_slice(&plain[..count]);
        if out.len() > VMLINUX_BYTES_MAX {
            return Err("its payload is too large".to_owned());
        }
        rest = &tail[length..];
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns a bzImage of one setup sector around an LZ4 payload.
    fn bz_image(elf: &[u8]) -> Vec<u8> {
        let block = lz4_flex::block::compress(elf);
        let mut payload = vec![0x02, 0x21, 0x4c, 0x18];
        payload.extend(u32::try_from(block.len()).expect("small").to_le_bytes());
        payload.extend(&block);
        payload.extend(u32::try_from(elf.len()).expect("small").to_le_bytes());
        let mut image = vec![0u8; 1024];
        image[0x1f1] = 1;
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x24c..0x250].copy_from_slice(&u32::try_from(payload.len()).expect("small").to_le_bytes());
        image.extend(payload);
        image
    }

    #[test]
    fn the_elf_is_taken_out_and_nonsense_is_refused() {
        let elf = [b"\x7fELF".as_slice(), &[7; 5000]].concat();
        assert_eq!(extract(&bz_image(&elf)), Ok(elf.clone()));
        assert_eq!(extract(&elf), Ok(elf.clone()));
        assert!(extract(b"nonsense").is_err());
        let whole = bz_image(&elf);
        for cut in [0x205, 0x24d, 1060] {
            assert!(extract(&whole[..cut]).is_err(), "cut at {cut}");
        }
    }
}
