//! The mounts of a process, from mountinfo of proc(5).

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use crate::devices::DeviceNumber;

/// The mounts of this thread, which are those of the process except in tests.
const OWN: &str = "/proc/thread-self/mountinfo";
/// Limit on the bytes of mounts that are read. Thousands of mounts fit.
const BYTES_MAX: u64 = 4 << 20;

/// A mount that a process sees.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Mount {
    pub(super) id: u64,
    parent: u64,
    pub(super) device: DeviceNumber,
    /// Directory of the file system that is mounted.
    pub(super) root: PathBuf,
    /// Mount point.
    pub(super) at: PathBuf,
    pub(super) is_read_only: bool,
    pub(super) kind: String,
    pub(super) source: String,
    /// Options of the file system, separated by commas.
    pub(super) options: String,
}

/// Reads the mounts of this process.
pub(super) fn own() -> io::Result<Vec<Mount>> {
    read(Path::new(OWN))
}

/// Reads the mounts of the process with this file.
pub(super) fn read(path: &Path) -> io::Result<Vec<Mount>> {
    let mut text = Vec::new();
    File::open(path)?.take(BYTES_MAX).read_to_end(&mut text)?;
    Ok(parse(&text))
}

/// Parses the lines. One that is not understood is left out.
pub(super) fn parse(text: &[u8]) -> Vec<Mount> {
    text.split(|&byte| byte == b'\n').filter_map(parse_line).collect()
}

fn parse_line(line: &[u8]) -> Option<Mount> {
    let mut words = line.split(|&byte| byte == b' ');
    let mut word = || words.next();
    let number = |word: &[u8]| std::str::from_utf8(word).ok()?.parse().ok();
    let (id, parent) = (number(word()?)?, number(word()?)?);
    let device = DeviceNumber::parse(std::str::from_utf8(word()?).ok()?, 10)?;
    let (root, at) = (path(word()?), path(word()?));
    let is_read_only = word()?.split(|&byte| byte == b',').any(|option| option == b"ro");
    // Optional fields come before the hyphen.
    while word()? != b"-" {}
    let (kind, source, options) = (text(word()?), text(word()?), text(word()?));
    Some(Mount { id, parent, device, root, at, is_read_only, kind, source, options })
}

fn path(word: &[u8]) -> PathBuf {
    OsString::from_vec(unescaped(word)).into()
}

fn text(word: &[u8]) -> String {
    String::from_utf8_lossy(&unescaped(word)).into_owned()
}

/// Decodes the bytes that are written as a backslash and three octal digits.
fn unescaped(word: &[u8]) -> Vec<u8> {
    let (mut rest, mut out) = (word, Vec::with_capacity(word.len()));
    while let Some((&first, others)) = rest.split_first() {
        let digits =
            others.get(..3).filter(|_| first == b'\\').and_then(|digits| std::str::from_utf8(digits).ok());
        match digits.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(byte) => {
                out.push(byte);
                rest = &others[3..];
            }
            None => {
                out.push(first);
                rest = others;
            }
        }
    }
    out
}

/// Returns the mount that a path without links leads to, without using the path: that could block.
pub(super) fn visible<'a>(mounts: &'a [Mount], at: &Path) -> Option<&'a Mount> {
    let has_no_parent =
        |mount: &Mount| !mounts.iter().any(|other| other.id == mount.parent && other != mount);
    let mut here = mounts.iter().find(|mount| mount.at == Path::new("/") && has_no_parent(mount))?;
    let mut steps: Vec<&Path> = at.ancestors().collect();
    steps.reverse();
    for step in steps {
        let is_over =
            |mount: &&Mount, below: u64| mount.parent == below && mount.id != below && mount.at == step;
        // Each mount on the way is over another one, so there are at most as many steps as mounts.
        for _ in 0..mounts.len() {
            let Some(over) = mounts.iter().find(|mount| is_over(mount, here.id)) else { break };
            here = over;
        }
    }
    Some(here)
}

/// Returns the mount inside another one, if there is one.
pub(super) fn inner<'a>(mounts: &'a [Mount], outer: &Mount) -> Option<&'a Mount> {
    mounts.iter().find(|mount| mount.parent == outer.id && mount.id != outer.id)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "\
21 1 0:20 / / rw,relatime shared:1 - overlay overlay rw,lowerdir=/lower,upperdir=/upper/upper
22 21 0:5 / /dev rw,nosuid - devtmpfs dev rw,size=1k
30 21 8:0 / /data rw,noatime shared:5 master:2 - ext4 /dev/sda rw
31 30 8:16 / /data/with\\040space ro - ext4 /dev/sdb ro
32 21 8:32 /sub /srv rw - ext4 /dev/sdc rw
nonsense
33 21 8:48 / /cut";

    #[test]
    fn lines_are_read_and_others_left_out() {
        let mounts = parse(TEXT.as_bytes());
        assert_eq!(mounts.iter().map(|mount| mount.id).collect::<Vec<_>>(), [21, 22, 30, 31, 32]);
        let mount = &mounts[3];
        assert_eq!((mount.parent, mount.device), (30, DeviceNumber { major: 8, minor: 16 }));
        assert_eq!(
            (mount.root.as_path(), mount.at.as_path()),
            (Path::new("/"), Path::new("/data/with space"))
        );
        assert_eq!(
            (mount.is_read_only, &*mount.kind, &*mount.source, &*mount.options),
            (true, "ext4", "/dev/sdb", "ro")
        );
        assert!(!mounts[0].is_read_only && mounts[0].options.ends_with("upperdir=/upper/upper"));
        assert_eq!(mounts[4].root, Path::new("/sub"));
        assert_eq!(unescaped(b"a\\134b\\04"), b"a\\b\\04");
    }

    #[test]
    fn the_mount_on_top_is_visible_and_those_under_it_are_not() {
        let text = format!(
            "{TEXT} rw - ext4 /dev/sdd rw\n40 30 0:50 / /data rw - tmpfs x rw\n41 21 0:51 / / rw - tmpfs y rw\n"
        );
        let mounts = parse(text.as_bytes());
        let visible = |mounts: &[Mount], path: &str| visible(mounts, Path::new(path)).map(|mount| mount.id);
        let before = &mounts[..6];
        assert_eq!(visible(before, "/data"), Some(30));
        assert_eq!(visible(before, "/data/with space/file"), Some(31));
        assert_eq!((visible(before, "/"), visible(before, "/other")), (Some(21), Some(21)));
        // Another file system over the volume, and one over the root of everything.
        assert_eq!(
            (visible(&mounts[..7], "/data"), visible(&mounts[..7], "/data/with space")),
            (Some(40), Some(40))
        );
        assert_eq!((visible(&mounts, "/data"), visible(&mounts, "/")), (Some(41), Some(41)));
        assert_eq!(visible(&[], "/data"), None);
        assert_eq!(inner(before, &mounts[2]).map(|mount| mount.id), Some(31));
        assert_eq!(inner(before, &mounts[3]), None);
    }

    #[test]
    fn the_mounts_of_this_process_are_read() {
        let mounts = own().expect("read");
        assert!(visible(&mounts, Path::new("/proc")).is_some_and(|mount| mount.kind == "proc"), "{mounts:?}");
    }
}
