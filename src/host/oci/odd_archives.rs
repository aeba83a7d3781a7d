//! Tests of archives by unusual writers: read, built into a real root file system and read back.

use std::process::Command;

use stead_controllers::host::HostErrorKind;
use stead_schemas::image::ImageConfig;
use stead_schemas::quantity::Bytes;

use super::Refused;
use super::archive::{self, Item, Kind};
use super::jobs::Stop;
use super::layout::Layout;
use super::manifest::{Blob, Manifest, digest_of};
use super::merge::{Position, Tree};
use super::rootfs;

/// Returns an entry as bytes: a header of the kind, and content in whole blocks.
pub(super) fn entry(kind: u8, name: &str, link: &str, content: &[u8]) -> Vec<u8> {
    raw(kind, name, link, content, content.len() as u64, |_| {})
}

fn raw(
    kind: u8,
    name: &str,
    link: &str,
    content: &[u8],
    size: u64,
    change: impl FnOnce(&mut tar::Header),
) -> Vec<u8> {
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(tar::EntryType::new(kind));
    header.set_mode(0o644);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(7);
    header.set_size(size);
    let old = header.as_old_mut();
    old.name[..name.len()].copy_from_slice(name.as_bytes());
    old.linkname[..link.len()].copy_from_slice(link.as_bytes());
    change(&mut header);
    header.set_cksum();
    let mut bytes = header.as_bytes().to_vec();
    bytes.extend_from_slice(content);
    bytes.resize(bytes.len().next_multiple_of(512), 0);
    bytes
}

/// Returns the records of an extended header, each with its length in front.
fn pax(records: &[(&str, &[u8])]) -> Vec<u8> {
    let mut content = Vec::new();
    for (key, value) in records {
        let rest = key.len() + value.len() + 3;
        let mut length = rest + 1;
        while length.to_string().len() + rest != length {
            length = length.to_string().len() + rest;
        }
        content.extend_from_slice(format!("{length} {key}=").as_bytes());
        content.extend_from_slice(value);
        content.push(b'\n');
    }
    entry(b'x', "pax", "", &content)
}

fn items(archive: &[u8]) -> Result<Vec<(Item, Vec<u8>)>, Refused> {
    let mut found = Vec::new();
    archive::read(archive, |item, _, content| {
        let mut bytes = Vec::new();
        content.read_to_end(&mut bytes).map_err(Refused::of_io)?;
        found.push((item, bytes));
        Ok(())
    })?;
    Ok(found)
}

fn path(item: &Item) -> String {
    String::from_utf8_lossy(&item.path.join(&b'/')).into_owned()
}

#[test]
fn a_value_with_a_newline_is_one_value_and_brings_no_record_along() {
    let capability: &[u8] = b"\x01\0\0\x02\n10 path=x\n\0\0\0";
    let archive = [
        pax(&[("SCHILY.xattr.security.capability", capability), ("SCHILY.xattr.user.note", b"a\nb=c")]),
        entry(b'0', "ping", "", b"x"),
    ];
    let found = items(&archive.concat()).expect("taken");
    assert_eq!(path(&found[0].0), "ping");
    let kept = &found[0].0.meta.attributes;
    assert_eq!(
        kept,
        &[
            (b"security.capability".to_vec(), capability.to_vec()),
            (b"user.note".to_vec(), b"a\nb=c".to_vec())
        ]
    );
}

#[test]
fn a_size_that_stands_only_in_an_extended_header_is_the_size() {
    let content = vec![b'z'; 1500];
    for size in [0, 700, 2_000_000] {
        let archive = [
            pax(&[("size", b"1500")]),
            raw(b'0', "large", "", &content, size, |_| {}),
            entry(b'0', "next", "", b"n"),
        ];
        let found = items(&archive.concat()).expect("taken");
        let seen: Vec<_> = found.iter().map(|(item, bytes)| (path(item), bytes.len())).collect();
        assert_eq!(seen, [("large".to_owned(), 1500), ("next".to_owned(), 1)], "{size} in the header");
    }
    let lying = [pax(&[("size", b"18446744073709551615")]), entry(b'0', "a", "", b"x")];
    assert!(items(&lying.concat()).is_err());
    let nonsense = [pax(&[("size", b"many")]), entry(b'0', "a", "", b"x")];
    assert!(items(&nonsense.concat()).is_err());
}

#[test]
fn sparse_entries_of_every_form_are_refused_in_words() {
    let forms = [
        vec![
            pax(&[("GNU.sparse.major", b"1"), ("GNU.sparse.name", b"real")]),
            entry(b'0', "GNUSparseFile.0/real", "", b"1\n0\n"),
        ],
        vec![
            pax(&[("GNU.sparse.size", b"9"), ("GNU.sparse.numblocks", b"1")]),
            entry(b'0', "real", "", b"x"),
        ],
        vec![entry(b'S', "old", "", b"x")],
    ];
    for form in forms {
        let refused = items(&form.concat()).expect_err("sparse");
        assert!(refused.message.contains("sparse"), "{}", refused.message);
    }
}

#[test]
fn times_before_1970_are_0_and_extended_ones_count() {
    let before = raw(b'0', "old", "", b"", 0, |header| header.as_old_mut().mtime = [0xff; 12]);
    let archive = [
        before,
        pax(&[("mtime", b"-12.5")]),
        entry(b'0', "older", "", b""),
        pax(&[("mtime", b"1700000000.25")]),
        entry(b'0', "exact", "", b""),
        entry(b'0', "plain", "", b""),
    ];
    let found = items(&archive.concat()).expect("taken");
    let times: Vec<u64> = found.iter().map(|(item, _)| item.meta.mtime).collect();
    assert_eq!(times, [0, 0, 1_700_000_000, 7]);
}

#[test]
fn labels_are_skipped_dumps_are_directories_and_other_kinds_are_named() {
    let archive =
        [entry(b'V', "label", "", b""), entry(b'D', "d", "", b"Yfile\0\0"), entry(b'0', "old/", "", b"")];
    let found = items(&archive.concat()).expect("taken");
    let kinds: Vec<_> = found.iter().map(|(item, _)| (path(item), item.kind.clone())).collect();
    assert_eq!(kinds, [("d".to_owned(), Kind::Directory), ("old".to_owned(), Kind::Directory)]);
    for letter in [b'M', b'?', b'A'] {
        let refused = items(&entry(letter, "odd", "", b"")).expect_err("unknown");
        let words = format!("kind '{}'", char::from(letter));
        assert!(refused.message.contains(&words), "{}", refused.message);
    }
}

#[test]
fn broken_and_cut_archives_are_refused() {
    let whole = entry(b'0', "a", "", &[1; 600]);
    items(&whole[..512 + 600]).expect("only the padding is missing");
    items(&whole[..512 + 599]).expect_err("a byte of the content is missing");
    items(&whole[..500]).expect_err("the header is cut");
    let mut flipped = whole.clone();
    flipped[0] ^= 1;
    let refused = items(&flipped).expect_err("the checksum is wrong");
    assert!(refused.message.contains("checksum"), "{}", refused.message);
    assert_eq!(items(&[0; 1024]).expect("empty").len(), 0);
}

#[test]
fn names_links_and_attributes_reach_the_root_file_system_byte_for_byte() {
    let long = format!("{}/target", "d".repeat(120));
    let targets = ["a//b/./c/", "/", "..//x", long.as_str()];
    let mut archive = Vec::new();
    for (number, target) in targets.iter().enumerate() {
        archive.extend(pax(&[("linkpath", target.as_bytes())]));
        archive.extend(entry(b'2', &format!("link{number}"), "", b""));
    }
    archive.extend(pax(&[("SCHILY.xattr.user.note", b"kept"), ("SCHILY.xattr.trusted.no", b"dropped")]));
    archive.extend(entry(b'5', "dir", "", b""));
    let name = "n".repeat(200);
    archive.extend(pax(&[("path", name.as_bytes()), ("SCHILY.xattr.user.note", b"a\nb")]));
    archive.extend(entry(b'0', "short", "", b"content"));
    archive.extend(entry(b'0', "plain", "", b"x"));

    let dir = tempfile::tempdir().expect("scratch");
    let layout = Layout::open(dir.path().join("images"), Bytes(0), None).expect("opened");
    let blob = digest_of(&archive);
    std::fs::write(layout.blob(&blob), &archive).expect("written");
    let layer = Blob { digest: blob.clone(), size: Bytes(archive.len() as u64), diff_id: blob };
    let manifest = Manifest { digest: digest_of(b"m"), layers: vec![layer], config: ImageConfig::default() };
    let (_wanted, stop) = Stop::new();
    rootfs::build(&layout, &manifest, &stop).expect("built");
    let image = layout.rootfs(&manifest.digest);
    let run = |program: &str, arguments: &[&str]| {
        let output = Command::new(program).args(arguments).arg(&image).output().expect("it runs");
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    let listing = run("unsquashfs", &["-lls", "-d", ""]);
    for (number, target) in targets.iter().enumerate() {
        let line = format!("/link{number} -> {target}");
        assert!(listing.lines().any(|seen| seen.ends_with(&line)), "{line} in\n{listing}");
    }
    let unpacked = dir.path().join("out");
    let output = Command::new("unsquashfs")
        .args(["-quiet", "-no-progress", "-user-xattrs", "-d"])
        .args([&unpacked, &image])
        .output()
        .expect("it runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(std::fs::read(unpacked.join(&name)).expect("there"), b"content");
    let attribute = |of: &str, key: &str| {
        let mut value = vec![0; 64];
        rustix::fs::lgetxattr(unpacked.join(of), key, &mut value[..]).ok().map(|length| {
            value.truncate(length);
            value
        })
    };
    // The file system of the scratch directory may not support such attributes.
    if rustix::fs::setxattr(&unpacked, "user.probe", b"1", rustix::fs::XattrFlags::empty()).is_ok() {
        assert_eq!(attribute("dir", "user.note").as_deref(), Some(&b"kept"[..]));
        assert_eq!(attribute(&name, "user.note").as_deref(), Some(&b"a\nb"[..]));
        assert_eq!(attribute("plain", "user.note"), None);
    }
}

#[test]
fn names_and_links_beyond_their_budgets_are_refused_soon() {
    // Each entry follows forty links, each through a thousand components.
    let mut tree = Tree::nearly_spent();
    let name = |text: &str| text.split('/').map(|part| part.as_bytes().to_vec()).collect::<Vec<_>>();
    let item = |path: &str, kind: Kind| Item { path: name(path), kind, meta: Default::default() };
    let position = |ordinal| Position { layer: 0, ordinal };
    tree.apply(position(0), item("d", Kind::Directory)).expect("taken");
    let around = format!("{}d", "d/../".repeat(800));
    tree.apply(position(1), item("d/L", Kind::Symlink(format!("../{around}").into_bytes()))).expect("taken");
    let through = format!("d/{}f", "L/".repeat(40));
    let refused =
        (2..1_000_000).find_map(|number| tree.apply(position(number), item(&through, Kind::File)).err());
    let refused = refused.expect("its steps are counted");
    assert_eq!(refused.kind, HostErrorKind::Permanent);
    assert!(refused.message.contains("too long to follow"), "{}", refused.message);

    let mut tree = Tree::default();
    let refused = (0..1_000_000).find_map(|number| {
        let target = vec![b't'; 4000];
        tree.apply(position(number), item(&format!("l{number}"), Kind::Symlink(target))).err()
    });
    assert!(refused.expect("its bytes are counted").message.contains("MiB"));
}

#[test]
fn work_that_nobody_wants_any_more_ends() {
    let dir = tempfile::tempdir().expect("scratch");
    let layout = Layout::open(dir.path().join("images"), Bytes(0), None).expect("opened");
    let archive = entry(b'0', "a", "", b"x");
    let blob = digest_of(&archive);
    std::fs::write(layout.blob(&blob), &archive).expect("written");
    let layer = Blob { digest: blob.clone(), size: Bytes(archive.len() as u64), diff_id: blob };
    let manifest = Manifest { digest: digest_of(b"m"), layers: vec![layer], config: ImageConfig::default() };
    let (wanted, stop) = Stop::new();
    drop(wanted);
    rootfs::build(&layout, &manifest, &stop).expect_err("given up");
    assert!(!layout.rootfs(&manifest.digest).exists());
}
