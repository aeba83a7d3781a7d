//! Tests of import: image archives in every accepted form, and the refused ones.

use std::io::Write;

use serde_json::json;
use stead_controllers::host::{HostError, HostErrorKind};
use stead_schemas::names::Platform;
use stead_schemas::quantity::Bytes;

use super::import::import;
use super::jobs::Stop;
use super::layout::Layout;
use super::manifest::{Manifest, Target, digest_of};
use super::odd_archives::entry;
use super::unpack::{self, UNPACKED_BYTES_MAX};

struct Tried {
    _dir: tempfile::TempDir,
    layout: Layout,
    result: Result<Manifest, HostError>,
}

fn tried(archive: &[u8]) -> Tried {
    let dir = tempfile::tempdir().expect("scratch");
    let layout = Layout::open(dir.path().join("images"), Bytes(0), None).expect("opened");
    let path = dir.path().join("archive");
    std::fs::write(&path, archive).expect("written");
    let (_wanted, stop) = Stop::new();
    let target = Target::plain(Platform::LinuxAmd64);
    let result = import(&layout, &path, target, &stop).map(|(manifest, _)| manifest);
    Tried { _dir: dir, layout, result }
}

fn refused(archive: &[u8], words: &str) {
    let error = tried(archive).result.expect_err(words);
    assert_eq!(error.kind, HostErrorKind::Permanent, "{}", error.chain());
    assert!(error.chain().contains(words), "{}", error.chain());
}

fn hex(bytes: &[u8]) -> String {
    digest_of(bytes).hex().to_owned()
}

fn config(layer: &[u8]) -> Vec<u8> {
    let config = json!({ "os": "linux", "architecture": "amd64", "config": { "Cmd": ["true"] },
                         "rootfs": { "type": "layers", "diff_ids": [digest_of(layer), digest_of(layer)] } });
    config.to_string().into_bytes()
}

/// Returns a layer with one file of this name.
fn layer(name: &str) -> Vec<u8> {
    entry(b'0', name, "", b"content")
}

/// Returns an archive as `docker save` writes it. The second occurrence of a layer is a link to the first.
fn saved(name: &str) -> Vec<u8> {
    let (layer, link) = (layer("a"), "../one/layer.tar");
    let list = json!([{ "Config": "config.json", "RepoTags": [name], "Layers": ["one/layer.tar", "two/layer.tar"] }]);
    [
        entry(b'0', "one/layer.tar", "", &layer),
        entry(b'2', "two/layer.tar", link, b""),
        entry(b'0', "config.json", "", &config(&layer)),
        entry(b'0', "manifest.json", "", list.to_string().as_bytes()),
    ]
    .concat()
}

/// Returns the documents of an OCI layout, whose index is wrapped in `depth` others.
fn layout(depth: usize) -> Vec<u8> {
    let layer = layer("a");
    let config = config(&layer);
    let blob = |bytes: &[u8]| entry(b'0', &format!("blobs/sha256/{}", hex(bytes)), "", bytes);
    let descriptor = |bytes: &[u8], kind: &str| json!({ "mediaType": kind, "digest": digest_of(bytes), "size": bytes.len() });
    let layers = vec![descriptor(&layer, "application/vnd.oci.image.layer.v1.tar"); 2];
    let manifest = json!({ "schemaVersion": 2, "layers": layers,
                           "config": descriptor(&config, "application/vnd.oci.image.config.v1+json") });
    let mut inner = manifest.to_string().into_bytes();
    let mut kind = "application/vnd.oci.image.manifest.v1+json";
    let mut archive = [blob(&layer), blob(&config), blob(&inner)].concat();
    for _ in 0..depth {
        inner =
            json!({ "schemaVersion": 2, "manifests": [descriptor(&inner, kind)] }).to_string().into_bytes();
        kind = "application/vnd.oci.image.index.v1+json";
        archive.extend(blob(&inner));
    }
    let index = json!({ "schemaVersion": 2, "manifests": [descriptor(&inner, kind)] });
    archive.extend(entry(b'0', "index.json", "", index.to_string().as_bytes()));
    archive
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut compressed = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    compressed.write_all(bytes).expect("packed");
    compressed.finish().expect("packed")
}

#[test]
fn every_form_is_taken_plain_and_compressed() {
    for (name, archive) in [("saved", saved("app:v1")), ("layout", layout(0)), ("nested", layout(2))] {
        let compressed = [gzip(&archive), zstd::encode_all(&archive[..], 1).expect("packed")];
        for archive in compressed.into_iter().chain([archive]) {
            let tried = tried(&archive);
            let manifest = tried.result.unwrap_or_else(|error| panic!("{name}: {}", error.chain()));
            assert_eq!(manifest.layers.len(), 2, "{name}");
            assert_eq!(manifest.config.cmd, ["true"], "{name}");
            assert!(manifest.layers.iter().all(|blob| tried.layout.blob(&blob.digest).exists()), "{name}");
        }
    }
    let bare = layer("bin");
    for archive in [bare.clone(), gzip(&bare), zstd::encode_all(&bare[..], 1).expect("packed")] {
        let manifest = tried(&archive).result.expect("a bare root file system");
        assert_eq!((manifest.layers.len(), &manifest.layers[0].diff_id), (1, &digest_of(&bare)));
    }
}

#[test]
fn unsupported_imports_are_refused_in_words() {
    refused(&[b"BZh9".as_slice(), &[0; 600]].concat(), "compressed with bzip2");
    refused(&[b"\xfd7zXZ\0".as_slice(), &[0; 600]].concat(), "compressed with xz");
    refused(&[b"PK\x03\x04".as_slice(), &[0; 600]].concat(), "compressed with zip");
    refused(b"no archive", "broken");
    refused(&layout(9), "nested too deep");
    let list = json!([{ "Config": "a.json", "RepoTags": ["one:v1"], "Layers": [] },
                      { "Config": "b.json", "RepoTags": ["two:v1"], "Layers": [] }]);
    refused(&entry(b'0', "manifest.json", "", list.to_string().as_bytes()), "one:v1, two:v1");
    let loops = json!([{ "Config": "config.json", "Layers": ["x"] }]);
    let looping = [
        entry(b'2', "x", "y", b""),
        entry(b'2', "y", "x", b""),
        entry(b'0', "config.json", "", &config(b"")),
        entry(b'0', "manifest.json", "", loops.to_string().as_bytes()),
    ];
    refused(&looping.concat(), "lacks one of its layers");
    let outside = [
        entry(b'2', "x", "../../../etc/passwd", b""),
        entry(b'0', "config.json", "", &config(b"")),
        entry(b'0', "manifest.json", "", loops.to_string().as_bytes()),
    ];
    refused(&outside.concat(), "lacks one of its layers");
}

#[test]
fn documents_that_nothing_refers_to_are_not_read_and_large_ones_are_refused() {
    let mut archive = Vec::new();
    for number in 0..40 {
        // The documents are small when compressed. Together they are larger than the limit on all documents of an
        // archive.
        archive.extend(entry(b'0', &format!("blobs/sha256/{number}"), "", &[b'{'; 1 << 20]));
    }
    archive.extend(saved("app:v1"));
    tried(&gzip(&archive)).result.expect("they are nobody's");
    refused(&entry(b'0', "index.json", "", &[b' '; 5 << 20]), "too large");
}

#[test]
fn what_unpacks_out_of_all_proportion_ends() {
    let mut file = tempfile::tempfile().expect("scratch");
    // The size is beyond what is exempt from the ratio: 2 GiB of zeros in some 100 KiB.
    let zeros = std::io::Read::take(std::io::repeat(0), 2 << 30);
    zstd::stream::copy_encode(zeros, &mut file, 1).expect("packed");
    std::io::Seek::rewind(&mut file).expect("sought");
    let (_wanted, stop) = Stop::new();
    let mut reader = unpack::open(file, UNPACKED_BYTES_MAX, &stop).expect("opened");
    let error = std::io::copy(&mut reader, &mut std::io::sink()).expect_err("too much");
    assert!(error.to_string().contains("unpacks to more"), "{error}");
}
