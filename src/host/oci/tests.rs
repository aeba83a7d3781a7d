//! Tests of hostile and ordinary layers, built into a real squashfs and read back.

use std::process::Command;

use sha2::{Digest as _, Sha256};
use stead_controllers::host::HostErrorKind;
use stead_schemas::image::ImageConfig;
use stead_schemas::names::Digest;
use stead_schemas::quantity::Bytes;

use super::jobs::Stop;
use super::layout::Layout;
use super::manifest::{Blob, Manifest};
use super::rootfs::build;

enum Entry {
    Dir(&'static str),
    File(&'static str, &'static str),
    Symlink(&'static str, &'static str),
    Link(&'static str, &'static str),
    Device(&'static str),
}
use Entry::{Device, Dir, File, Link, Symlink};

/// Returns an archive with names exactly as given. The safe builder would refuse half of them.
fn archive(entries: &[Entry]) -> Vec<u8> {
    let mut out = tar::Builder::new(Vec::new());
    for entry in entries {
        let (path, kind, link, content) = match entry {
            Dir(path) => (path, tar::EntryType::Directory, "", ""),
            File(path, content) => (path, tar::EntryType::Regular, "", *content),
            Symlink(path, target) => (path, tar::EntryType::Symlink, *target, ""),
            Link(path, target) => (path, tar::EntryType::Link, *target, ""),
            Device(path) => (path, tar::EntryType::Char, "", ""),
        };
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(kind);
        header.set_size(content.len() as u64);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(0);
        header.set_mode(if kind == tar::EntryType::Directory { 0o755 } else { 0o644 });
        let old = header.as_old_mut();
        old.name[..path.len()].copy_from_slice(path.as_bytes());
        old.linkname[..link.len()].copy_from_slice(link.as_bytes());
        header.set_cksum();
        out.append(&header, content.as_bytes()).expect("appended");
    }
    out.into_inner().expect("written")
}

struct Built {
    dir: tempfile::TempDir,
    layout: Layout,
    digest: Digest,
    result: Result<(), stead_controllers::host::HostError>,
}

fn digest(bytes: &[u8]) -> Digest {
    format!("sha256:{}", hex::encode(Sha256::digest(bytes))).parse().expect("a digest")
}

fn build_layers(layers: &[Vec<u8>]) -> Built {
    let dir = tempfile::tempdir().expect("scratch");
    let layout = Layout::open(dir.path().join("images"), Bytes(0), None).expect("opened");
    let blobs = layers.iter().map(|bytes| {
        let digest = digest(bytes);
        std::fs::write(layout.blob(&digest), bytes).expect("written");
        Blob { digest: digest.clone(), size: Bytes(bytes.len() as u64), diff_id: digest }
    });
    let manifest = Manifest { digest: digest(b"m"), layers: blobs.collect(), config: ImageConfig::default() };
    layout.write_manifest(&manifest).expect("written");
    let (_wanted, stop) = Stop::new();
    let result = build(&layout, &manifest, &stop);
    Built { dir, layout, digest: manifest.digest, result }
}

impl Built {
    fn cat(&self, path: &str) -> String {
        let image = self.layout.rootfs(&self.digest);
        let output =
            Command::new("unsquashfs").args(["-cat"]).arg(image).arg(path).output().expect("unsquashfs runs");
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    fn names(&self) -> Vec<String> {
        let image = self.layout.rootfs(&self.digest);
        let output =
            Command::new("unsquashfs").args(["-ls", "-d", ""]).arg(image).output().expect("unsquashfs runs");
        let text = String::from_utf8_lossy(&output.stdout);
        let names = text.lines().filter_map(|line| line.strip_prefix('/')).map(ToOwned::to_owned);
        let mut names: Vec<String> = names.collect();
        names.sort();
        names
    }
}

#[test]
fn layers_are_merged_as_container_runtimes_merge_them() {
    let lower = archive(&[
        Dir("etc/"),
        File("etc/keep", "lower"),
        File("etc/replaced", "lower"),
        File("etc/removed", "lower"),
        Dir("opaque/"),
        File("opaque/old", "x"),
        File("linked", "shared"),
        Dir("was-dir/"),
        File("was-dir/inside", "x"),
        Symlink("lib", "usr/lib"),
        Dir("usr/lib/"),
    ]);
    let upper = archive(&[
        File("etc/replaced", "upper"),
        File("etc/.wh.removed", ""),
        File("opaque/new", "y"),
        File("opaque/.wh..wh..opq", ""),
        Link("hard", "linked"),
        File("was-dir", "a file now"),
        File("lib/through-link", "z"),
        Device("dev/null"),
        File("./deep/made/parents", "p"),
    ]);
    let top = archive(&[File(".wh.linked", "")]);
    let built = build_layers(&[lower, upper, top]);
    built.result.as_ref().expect("built");
    assert_eq!(
        built.names(),
        [
            "deep",
            "deep/made",
            "deep/made/parents",
            "dev",
            "etc",
            "etc/keep",
            "etc/replaced",
            "hard",
            "lib",
            "opaque",
            "opaque/new",
            "usr",
            "usr/lib",
            "usr/lib/through-link",
            "was-dir"
        ]
    );
    assert_eq!(built.cat("etc/replaced"), "upper");
    assert_eq!(built.cat("hard"), "shared", "a link keeps what its target held when it was made");
    assert_eq!(built.cat("was-dir"), "a file now");
    drop(built.dir);
}

#[test]
fn hostile_layers_are_refused_with_a_sentence() {
    let mut truncated = archive(&[File("a", "0123456789")]);
    truncated.truncate(515);
    let mut lying = archive(&[File("a", "x")]);
    lying[124..136].copy_from_slice(b"77777777777\0");
    let checksum: u32 = lying[..512]
        .iter()
        .enumerate()
        .map(|(at, &byte)| if (148..156).contains(&at) { 32 } else { u32::from(byte) })
        .sum();
    lying[148..156].copy_from_slice(format!("{checksum:06o}\0 ").as_bytes());
    let cases: [(&str, Vec<u8>, &str); 9] = [
        ("traversal", archive(&[File("../../etc/passwd", "x")]), "leads out"),
        ("traversal inside", archive(&[File("a/../../b", "x")]), "leads out"),
        ("link out of the root", archive(&[Link("a", "../../etc/shadow")]), "leads out"),
        ("link to nothing", archive(&[Link("a", "etc/shadow")]), "not in the image"),
        ("link to a directory", archive(&[Dir("d/"), Link("a", "d")]), "to a directory"),
        (
            "loop of links",
            archive(&[Symlink("a", "b"), Symlink("b", "a"), File("a/x", "y")]),
            "loop of links",
        ),
        ("truncated", truncated, ""),
        ("a size that lies", lying, ""),
        ("no archive", vec![7u8; 4096], "broken"),
    ];
    for (name, layer, words) in cases {
        let error = build_layers(&[layer]).result.expect_err(name);
        assert_eq!(error.kind, HostErrorKind::Permanent, "{name}: {error:?}");
        assert!(error.chain().contains(words), "{name}: {}", error.chain());
    }
}

#[test]
fn an_archive_that_ends_with_its_last_content_is_whole() {
    let mut layer = archive(&[File("a", "first"), File("b", "0123456789")]);
    layer.truncate(512 * 3 + 10);
    let built = build_layers(&[layer.clone()]);
    built.result.as_ref().expect("built");
    assert_eq!((built.cat("a").as_str(), built.cat("b").as_str()), ("first", "0123456789"));
    layer.pop();
    build_layers(&[layer]).result.expect_err("a byte of the content is missing");
}

#[test]
fn escaping_symbolic_links_are_only_data() {
    let built = build_layers(&[archive(&[
        Symlink("out", "../../../etc"),
        Symlink("abs", "/etc/shadow"),
        File("out/x", "in the image"),
    ])]);
    built.result.as_ref().expect("built");
    assert_eq!(built.names(), ["abs", "etc", "etc/x", "out"]);
}

#[test]
fn content_that_differs_from_the_configuration_is_refused() {
    let layer = archive(&[File("a", "x")]);
    let dir = tempfile::tempdir().expect("scratch");
    let layout = Layout::open(dir.path().join("images"), Bytes(0), None).expect("opened");
    let blob = Blob { digest: digest(&layer), size: Bytes(layer.len() as u64), diff_id: digest(b"another") };
    std::fs::write(layout.blob(&blob.digest), &layer).expect("written");
    let manifest = Manifest { digest: digest(b"m"), layers: vec![blob], config: ImageConfig::default() };
    let (_wanted, stop) = Stop::new();
    let error = build(&layout, &manifest, &stop).expect_err("diff_id");
    assert!(error.chain().contains("diff_id"));
    assert!(layout.stored(&manifest.digest).expect("read").is_none(), "nothing half done is left");
}
