//! The build of one read-only root file system from layers, without unpacking anything on the host.
//!
//! There are two passes over the layers. The first reads only names and checks every diff id. The second streams the
//! content of the surviving entries into one archive, which `sqfstar` (as an unprivileged user) turns into a
//! squashfs. Memory holds the names, never the content.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use sha2::{Digest as _, Sha256};
use stead_controllers::host::{HostError, HostErrorKind};

use super::Refused;
use super::archive;
use super::emit::Emitter;
use super::jobs::Stop;
use super::layout::Layout;
use super::manifest::{Blob, Manifest, digest_from};
use super::merge::{Merged, Position, Tree};
use super::transfer::hash_file;
use super::unpack::{self, Bounded, UNPACKED_BYTES_MAX};

/// User id of `nobody` on Debian. The builder of file systems needs no privilege at all.
const NOBODY: u32 = 65534;
/// Memory for the builder's queues, in MiB, and the limit on its mapped memory, which includes its threads' stacks
/// and its tables of names.
const BUILDER_QUEUES_MIB: u32 = 256;
const BUILDER_MEMORY_MAX: u64 = 4 << 30;
/// Limit on the processors of one builder. The host has other work, and images are not urgent.
const BUILDER_PROCESSORS_MAX: usize = 4;
/// Limit on the builder's open descriptors: its standard streams and some more.
const BUILDER_FILES_MAX: u64 = 64;

/// Builds the root file system of a manifest whose blobs are all here.
pub(super) fn build(layout: &Layout, manifest: &Manifest, stop: &Stop) -> Result<(), HostError> {
    let refused = |error: Refused| error.into_host("convert the image", manifest.digest.as_str());
    let failed = |error| HostError::io("convert the image", manifest.digest.as_str(), error);
    let merged = merge(layout, manifest, stop).map_err(refused)?;
    let scratch = tempfile::NamedTempFile::new_in(layout.scratch()).map_err(failed)?;
    let mut builder = Builder(start_builder(scratch.as_file()).map_err(failed)?);
    let stdin = builder.0.stdin.take().expect("it was asked for");
    let written = emit(layout, manifest, &merged, stdin, stop);
    if stop.is_set() {
        return written.map_err(refused);
    }
    let reported = builder.wait().map_err(failed)?;
    if let Some(reported) = reported {
        // If the builder ran out of space, only its message says so, not its status.
        let kind = if reported.contains("No space left") {
            io::ErrorKind::StorageFull
        } else {
            io::ErrorKind::Other
        };
        // Our own write error is the cause, unless the builder stopped reading.
        return match written {
            Err(error) if error.kind != HostErrorKind::Transient => Err(refused(error)),
            _ => Err(failed(io::Error::new(kind, reported))),
        };
    }
    written.map_err(refused)?;
    let finish = || -> io::Result<()> {
        std::os::unix::fs::chown(scratch.path(), Some(0), Some(0))?;
        scratch.as_file().sync_all()?;
        fs::rename(scratch.path(), layout.rootfs(&manifest.digest))?;
        File::open(layout.rootfs(&manifest.digest).parent().unwrap_or(Path::new("/")))?.sync_all()
    };
    finish().map_err(failed)
}

/// Runs the first pass: reads the names and the digest of every layer.
fn merge(layout: &Layout, manifest: &Manifest, stop: &Stop) -> Result<Merged, Refused> {
    let mut tree = Tree::default();
    let mut budget = UNPACKED_BYTES_MAX;
    for (layer, blob) in (0..).zip(&manifest.layers) {
        let mut reader = Hashing::new(open(layout, blob, budget, stop)?);
        let mut ordinal = 0;
        archive::read(&mut reader, |item, _, _| {
            let position = Position { layer, ordinal };
            ordinal += 1;
            tree.apply(position, item)
        })?;
        budget = budget.saturating_sub(reader.end(layout, blob)?);
    }
    Ok(tree.finish())
}

/// Runs the second pass: emits directories first, then the surviving entries of each layer. The layers are hashed
/// again, so that the emitted data is the verified data.
fn emit(
    layout: &Layout,
    manifest: &Manifest,
    merged: &Merged,
    stdin: impl io::Write,
    stop: &Stop,
) -> Result<(), Refused> {
    let mut out = Emitter::new(stdin, layout);
    for (path, meta) in merged.directories.iter().filter(|(path, _)| !path.is_empty()) {
        out.directory(path, meta)?;
    }
    for (layer, blob) in (0..).zip(&manifest.layers) {
        let mut reader = Hashing::new(open(layout, blob, UNPACKED_BYTES_MAX, stop)?);
        let mut ordinal = 0;
        archive::read(&mut reader, |_, size, content| {
            let position = Position { layer, ordinal };
            ordinal += 1;
            match merged.at(position) {
                Some((node, paths)) => out.node(node, paths, size, content),
                None => Ok(()),
            }
        })?;
        reader.end(layout, blob)?;
    }
    out.finish()
}

/// Opens a layer's archive and decompresses it according to its first bytes, within the budget.
fn open(layout: &Layout, blob: &Blob, budget: u64, stop: &Stop) -> Result<Bounded, Refused> {
    let file = File::open(layout.blob(&blob.digest)).map_err(Refused::of_io)?;
    unpack::open(file, budget, stop)
}

struct Hashing {
    inner: Bounded,
    hash: Sha256,
    count: u64,
}

impl Hashing {
    fn new(inner: Bounded) -> Self {
        Self { inner, hash: Sha256::new(), count: 0 }
    }

    /// Reads to the end, which is part of the digest, and checks the digest. Returns the number of bytes.
    fn end(mut self, layout: &Layout, blob: &Blob) -> Result<u64, Refused> {
        io::copy(&mut self, &mut io::sink()).map_err(Refused::of_io)?;
        if digest_from(self.hash) == blob.diff_id {
            return Ok(self.count);
        }
        // The disk may have changed the data. The layer is then fetched again.
        let path = layout.blob(&blob.digest);
        if hash_file(&path).is_ok_and(|digest| digest != blob.digest) {
            fs::remove_file(&path).map_err(Refused::of_io)?;
            let message = "a layer on the disk was no longer what it is named by; it is fetched again";
            return Err(Refused { kind: HostErrorKind::Transient, message: message.to_owned() });
        }
        Err(Refused::new("a layer's content is not what the image's configuration says (diff_id)"))
    }
}

impl Read for Hashing {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        self.hash.update(&buffer[..count]);
        self.count += count as u64;
        Ok(count)
    }
}

/// The builder process. It is killed when this value is dropped.
struct Builder(Child);

impl Builder {
    /// Waits for the builder. Returns its message if it failed.
    fn wait(&mut self) -> io::Result<Option<String>> {
        let mut reported = Vec::new();
        if let Some(mut stderr) = self.0.stderr.take() {
            // Its messages are short. Longer output would consist of names from the image.
            stderr.by_ref().take(BUILDER_WORDS_MAX).read_to_end(&mut reported)?;
            io::copy(&mut stderr, &mut io::sink())?;
        }
        let status = self.0.wait()?;
        let words = || stead_schemas::validate::printable(String::from_utf8_lossy(&reported).trim(), 512);
        Ok((!status.success()).then(|| format!("sqfstar ended with {status}: {}", words())))
    }
}

/// Limit on the kept output of the builder, in bytes.
const BUILDER_WORDS_MAX: u64 = 4096;

impl Drop for Builder {
    fn drop(&mut self) {
        // A process that has already ended cannot be killed, so the error is ignored.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Starts `sqfstar` as nobody, with no environment and with limits. Its only file is passed by descriptor, so that it
/// needs no access to the data directory.
fn start_builder(out: &File) -> io::Result<Child> {
    std::os::unix::fs::fchown(out, Some(NOBODY), Some(NOBODY))?;
    let processors = std::thread::available_parallelism().map_or(1, usize::from).min(BUILDER_PROCESSORS_MAX);
    // `setpriv` and `prlimit` of util-linux execute the builder. A process needs no privilege to lower its own limits.
    Command::new("setpriv")
        .args(["--no-new-privs", "--", "prlimit"])
        .arg(format!("--as={BUILDER_MEMORY_MAX}"))
        .arg(format!("--nofile={BUILDER_FILES_MAX}"))
        .args(["--core=0", "--", "sqfstar", "-comp", "lz4", "-quiet", "-no-progress", "-force"])
        .args(["-processors", &processors.to_string(), "-mem", &format!("{BUILDER_QUEUES_MIB}M")])
        .arg("/proc/self/fd/1")
        .env_clear()
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .current_dir("/")
        .uid(NOBODY)
        .gid(NOBODY)
        .stdin(Stdio::piped())
        .stdout(out.try_clone()?)
        .stderr(Stdio::piped())
        .spawn()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns the value of a line of a file of `/proc`, in words.
    fn line(pid: u32, file: &str, name: &str) -> Vec<String> {
        let text = fs::read_to_string(format!("/proc/{pid}/{file}")).expect("it runs");
        let line = text.lines().find_map(|line| line.strip_prefix(name));
        line.expect(name).split_whitespace().map(str::to_owned).collect()
    }

    #[test]
    fn the_builder_is_nobody_with_limits_and_gains_no_rights() {
        let out = tempfile::tempfile().expect("a file");
        let builder = Builder(start_builder(&out).expect("started"));
        let pid = builder.0.id();
        // Nothing is written to its standard input, so it runs until it is dropped.
        while fs::read_to_string(format!("/proc/{pid}/comm")).expect("it runs") != "sqfstar\n" {
            std::thread::yield_now();
        }
        for (name, limit) in
            [("Max address space", "4294967296"), ("Max open files", "64"), ("Max core file size", "0")]
        {
            assert_eq!(line(pid, "limits", name)[..2], [limit, limit], "{name}");
        }
        assert_eq!(line(pid, "status", "Uid:"), ["65534"; 4]);
        assert_eq!(line(pid, "status", "Gid:"), ["65534"; 4]);
        assert_eq!(line(pid, "status", "NoNewPrivs:"), ["1"]);
        assert_eq!(line(pid, "status", "CapEff:"), ["0000000000000000"]);
        assert_eq!(
            fs::read(format!("/proc/{pid}/environ")).expect("it runs"),
            b"PATH=/usr/sbin:/usr/bin:/sbin:/bin\0"
        );
    }
}
