//! Hostile archives: what of them is in the tree, and that nothing is outside of it.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;

use stead_schemas::quantity::Bytes;

use super::tree::Tree;
use crate::host::oci::Refused;
use crate::host::oci::archive;

/// Makes an archive of entries: kind, name, link target, content.
fn archive_of(entries: &[(u8, &str, &str, &str)]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (kind, name, link, content) in entries {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(tar::EntryType::new(*kind));
        header.set_mode(0o4750);
        header.set_uid(1234);
        header.set_gid(5678);
        header.set_mtime(77);
        header.set_size(content.len() as u64);
        let old = header.as_old_mut();
        old.name[..name.len()].copy_from_slice(name.as_bytes());
        old.linkname[..link.len()].copy_from_slice(link.as_bytes());
        header.set_cksum();
        builder.append(&header, content.as_bytes()).expect("memory");
    }
    builder.into_inner().expect("memory")
}

/// Unpacks an archive into a directory. Returns the refusal, and whether the archive was too large.
fn unpacked(root: &Path, size: u64, entries: &[(u8, &str, &str, &str)]) -> Result<(), (Refused, bool)> {
    let mut tree = Tree::new(root, Bytes(size)).expect("a directory");
    let bytes = archive_of(entries);
    match archive::read(bytes.as_slice(), |item, size, content| tree.put(item, size, content)) {
        Ok(()) => tree.finish().map_err(|refused| (refused, false)),
        Err(refused) => Err((refused, tree.is_full())),
    }
}

const ROOM: u64 = 1 << 20;

#[test]
fn files_links_and_directories_have_their_owners_modes_and_times() {
    let root = tempfile::tempdir().expect("scratch");
    let entries = [
        (b'5', "dir", "", ""),
        (b'0', "dir/file", "", "words"),
        (b'1', "dir/same", "dir/file", ""),
        (b'2', "link", "/etc/passwd", ""),
        (b'6', "pipe", "", ""),
        (b'3', "device", "", ""),
        (b'0', "no/such/parent", "", ""),
    ];
    unpacked(root.path(), ROOM, &entries).expect("unpacked");
    let at = |path: &str| fs::symlink_metadata(root.path().join(path)).expect("made");
    for path in ["dir", "dir/file", "link", "pipe"] {
        let found = at(path);
        assert_eq!((found.uid(), found.gid(), found.mtime()), (1234, 5678, 77), "{path}");
    }
    for path in ["dir", "dir/file"] {
        assert_eq!(at(path).permissions().mode() & 0o7777, 0o4750, "{path}");
    }
    assert_eq!(fs::read_to_string(root.path().join("dir/same")).expect("read"), "words");
    assert_eq!(at("dir/same").ino(), at("dir/file").ino());
    assert_eq!(fs::read_link(root.path().join("link")).expect("read"), Path::new("/etc/passwd"));
    // A guest has device nodes of its own.
    assert!(!root.path().join("device").exists());
}

#[test]
fn nothing_is_written_outside_of_the_tree() {
    let outside = tempfile::tempdir().expect("scratch");
    let target = outside.path().display().to_string();
    let victim = format!("{target}/victim");
    for entries in [
        vec![(b'2', "out", target.as_str(), ""), (b'0', "out/file", "", "x")],
        vec![(b'2', "out", "..", ""), (b'0', "out/file", "", "x")],
        vec![(b'2', "out", target.as_str(), ""), (b'5', "out/dir", "", "")],
        vec![(b'0', "../file", "", "x")],
        vec![(b'1', "file", "../../etc/passwd", "")],
        vec![(b'2', "out", target.as_str(), ""), (b'1', "file", "out/victim", "")],
        vec![(b'0', "file", "", ""), (b'0', "file/below", "", "x")],
        vec![(b'1', "file", "missing", "")],
    ] {
        fs::write(&victim, "whole").expect("written");
        let root = tempfile::tempdir_in(outside.path()).expect("scratch");
        let (refused, is_full) = unpacked(root.path(), ROOM, &entries).expect_err("refused");
        assert!(!is_full, "{refused:?}");
        assert_eq!(fs::read_to_string(&victim).expect("read"), "whole");
        let names: Vec<_> = fs::read_dir(outside.path()).expect("read").collect();
        assert_eq!(names.len(), 2, "{entries:?}: {names:?}");
    }
}

#[test]
fn a_link_is_replaced_by_a_later_file_and_not_written_through() {
    let outside = tempfile::NamedTempFile::new().expect("scratch");
    fs::write(outside.path(), "whole").expect("written");
    let before = outside.path().metadata().expect("there");
    let target = outside.path().display().to_string();
    let root = tempfile::tempdir().expect("scratch");
    let entries = [
        (b'2', "file", target.as_str(), ""),
        (b'0', "file", "", "mine"),
        (b'2', "dir", "/", ""),
        (b'5', "dir", "", ""),
        (b'5', "gone", "", ""),
        (b'2', "gone", target.as_str(), ""),
    ];
    unpacked(root.path(), ROOM, &entries).expect("unpacked");
    assert_eq!(fs::read_to_string(root.path().join("file")).expect("read"), "mine");
    assert!(root.path().join("dir").symlink_metadata().expect("made").is_dir());
    let after = outside.path().metadata().expect("there");
    assert_eq!((before.uid(), before.mode(), before.mtime()), (after.uid(), after.mode(), after.mtime()));
    assert_eq!(fs::read_to_string(outside.path()).expect("read"), "whole");
}

#[test]
fn an_archive_with_more_than_fits_is_too_large() {
    let root = tempfile::tempdir().expect("scratch");
    let entries = [(b'0', "a", "", "12345678"), (b'0', "b", "", "12345678")];
    unpacked(root.path(), 16, &entries).expect("it fits");
    let (_, is_full) = unpacked(root.path(), 15, &entries).expect_err("it does not fit");
    assert!(is_full);
}
