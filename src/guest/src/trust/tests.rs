//! Roots of distributions and of hostile images, with the authority added.

use std::collections::BTreeMap;
use std::fs::{self, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::process::Command;

use stead_schemas::instance::Secret;
use tempfile::TempDir;

use super::{
    ANCHORS, BUNDLE_LINK, BUNDLES, CERTIFICATE, HASH, JAVA_STORE, Paths, file, install_below, java, keystore,
    paths_below,
};

const OURS: &str = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
const OTHER: &str = "-----BEGIN CERTIFICATE-----\nBBBB\n-----END CERTIFICATE-----\n";
const PUBLIC: &str = "# A public one\n-----BEGIN CERTIFICATE-----\nCCCC\n-----END CERTIFICATE-----\n";
const DEBIAN: &str = "/etc/ssl/certs/ca-certificates.crt";
const FEDORA: &str = "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem";

/// A root with the directories that every root has at this time.
struct Root(TempDir);

impl Root {
    fn new() -> Self {
        let root = Self(tempfile::tempdir().expect("made"));
        root.directory("/run");
        root
    }

    fn path(&self, path: &str) -> std::path::PathBuf {
        self.0.path().join(path.trim_start_matches('/'))
    }

    fn directory(&self, path: &str) {
        fs::create_dir_all(self.path(path)).expect("made");
    }

    fn file(&self, path: &str, contents: &str) {
        self.directory(path.rsplit_once('/').expect("absolute").0);
        fs::write(self.path(path), contents).expect("written");
    }

    fn link(&self, path: &str, target: &str) {
        self.directory(path.rsplit_once('/').expect("absolute").0);
        symlink(target, self.path(path)).expect("linked");
    }

    fn read(&self, path: &str) -> String {
        fs::read_to_string(self.path(path)).unwrap_or_else(|error| format!("{path}: {error}"))
    }

    fn install(&self) -> Vec<String> {
        install_below(self.0.path(), OURS, &BTreeMap::new())
    }

    /// Returns the files and links, each with its number and its time of change.
    fn listing(&self) -> Vec<(String, u64, i64, i64)> {
        let (mut found, mut rest) = (Vec::new(), vec![self.0.path().to_owned()]);
        while let Some(path) = rest.pop() {
            let meta = fs::symlink_metadata(&path).expect("there");
            if meta.is_dir() {
                rest.extend(fs::read_dir(&path).expect("read").map(|entry| entry.expect("read").path()));
            } else {
                found.push((path.display().to_string(), meta.ino(), meta.ctime(), meta.ctime_nsec()));
            }
        }
        found.sort();
        found
    }

    /// Asserts that a bundle has the image's certificates and, once, ours.
    #[track_caller]
    fn has_both(&self, bundle: &str) {
        let text = self.read(bundle);
        assert!(text.starts_with(PUBLIC), "{bundle}: {text}");
        assert_eq!(text.matches(OURS).count(), 1, "{bundle}: {text}");
    }

    #[track_caller]
    fn points_to(&self, bundle: Option<&str>) {
        let expected = Paths {
            certificate: Some(CERTIFICATE.to_owned()),
            bundle: bundle.map(str::to_owned),
            java_store: None,
        };
        assert_eq!(paths_below(self.0.path()), expected);
        assert_eq!(self.read(CERTIFICATE), OURS);
    }
}

fn debian() -> Root {
    let root = Root::new();
    root.file(DEBIAN, PUBLIC);
    root.directory("/usr/local/share/ca-certificates");
    root
}

fn alpine() -> Root {
    let root = debian();
    root.link("/etc/ssl/cert.pem", "certs/ca-certificates.crt");
    root
}

fn fedora() -> Root {
    let root = Root::new();
    root.file(FEDORA, PUBLIC);
    fs::set_permissions(root.path(FEDORA), Permissions::from_mode(0o444)).expect("set");
    root.directory("/etc/pki/ca-trust/source/anchors");
    root.directory("/usr/local/share");
    root.link("/etc/pki/tls/certs/ca-bundle.crt", FEDORA);
    root.link("/etc/ssl/certs", "../pki/tls/certs");
    root
}

fn opensuse() -> Root {
    let root = Root::new();
    root.file("/var/lib/ca-certificates/ca-bundle.pem", PUBLIC);
    root.link("/etc/ssl/ca-bundle.pem", "/var/lib/ca-certificates/ca-bundle.pem");
    root.directory("/var/lib/ca-certificates/pem");
    root.link("/etc/ssl/certs", "../../var/lib/ca-certificates/pem");
    root.directory("/etc/pki/trust/anchors");
    root
}

fn arch() -> Root {
    let root = Root::new();
    root.file("/etc/ca-certificates/extracted/tls-ca-bundle.pem", PUBLIC);
    root.link(DEBIAN, "../../ca-certificates/extracted/tls-ca-bundle.pem");
    root.link("/etc/ssl/cert.pem", "../ca-certificates/extracted/tls-ca-bundle.pem");
    root.directory("/etc/ca-certificates/trust-source/anchors");
    root
}

#[test]
fn each_distribution_gets_the_authority_where_its_programs_search() {
    for (name, root, bundle, file, anchors, hashed) in [
        ("debian", debian(), DEBIAN, DEBIAN, ANCHORS[0], "/etc/ssl/certs"),
        ("alpine", alpine(), DEBIAN, DEBIAN, ANCHORS[0], "/etc/ssl/certs"),
        ("fedora", fedora(), FEDORA, FEDORA, ANCHORS[1], "/etc/pki/tls/certs"),
        (
            "opensuse",
            opensuse(),
            "/etc/ssl/ca-bundle.pem",
            "/var/lib/ca-certificates/ca-bundle.pem",
            ANCHORS[2],
            "/var/lib/ca-certificates/pem",
        ),
        (
            "arch",
            arch(),
            DEBIAN,
            "/etc/ca-certificates/extracted/tls-ca-bundle.pem",
            ANCHORS[3],
            "/etc/ssl/certs",
        ),
    ] {
        let mode = fs::metadata(root.path(file)).expect("there").mode();
        assert_eq!(root.install(), Vec::<String>::new(), "{name}");
        root.has_both(file);
        root.points_to(Some(bundle));
        assert_eq!(root.read(&format!("{anchors}/stead-egress.crt")), OURS, "{name}");
        assert_eq!(root.read(&format!("{hashed}/{HASH}")), OURS, "{name}");
        assert_eq!(fs::metadata(root.path(file)).expect("there").mode(), mode, "{name}");
    }
}

#[test]
fn links_of_an_image_stay_links() {
    let (alpine, fedora) = (alpine(), fedora());
    alpine.install();
    fedora.install();
    let target = |root: &Root, path| fs::read_link(root.path(path)).expect("a link");
    assert_eq!(target(&alpine, "/etc/ssl/cert.pem"), Path::new("certs/ca-certificates.crt"));
    assert_eq!(target(&fedora, "/etc/pki/tls/certs/ca-bundle.crt"), Path::new(FEDORA));
    assert_eq!(target(&fedora, "/etc/ssl/certs"), Path::new("../pki/tls/certs"));
    assert!(fedora.path("/usr/local/share/ca-certificates/stead-egress.crt").exists());
}

#[test]
fn an_image_without_anything_gets_a_bundle() {
    let root = Root::new();
    let notes = root.install();
    assert_eq!(notes.len(), 1, "{notes:?}");
    assert!(notes[0].contains(DEBIAN), "{notes:?}");
    assert_eq!(root.read(DEBIAN).matches(OURS).count(), 1);
    root.points_to(Some(DEBIAN));
    assert_eq!(root.read(&format!("/etc/ssl/certs/{HASH}")), OURS);
    let mode = |path| fs::metadata(root.path(path)).expect("there").mode() & 0o7777;
    assert_eq!((mode("/etc/ssl/certs"), mode(DEBIAN)), (0o755, 0o644));
    assert_eq!((mode("/run/stead-egress"), mode(CERTIFICATE)), (0o755, 0o644));
    assert!(!root.path("/usr").exists() && !root.path("/etc/pki").exists(), "directories were invented");
}

#[test]
fn a_second_boot_of_the_same_disk_changes_nothing() {
    for root in [debian(), alpine(), fedora(), opensuse(), arch(), Root::new()] {
        root.install();
        // The memory of the first boot is gone.
        fs::remove_dir_all(root.path("/run/stead-egress")).expect("removed");
        let before = root.listing();
        assert_eq!(root.install(), Vec::<String>::new());
        let (certificate, link) = (root.path(CERTIFICATE), root.path(BUNDLE_LINK));
        assert!(certificate.exists() && link.is_symlink());
        fs::remove_dir_all(root.path("/run/stead-egress")).expect("removed");
        assert_eq!(root.listing(), before);
    }
}

#[test]
fn another_authority_replaces_the_one_of_the_disk() {
    for root in [debian(), fedora(), Root::new()] {
        install_below(root.0.path(), OTHER, &BTreeMap::new());
        root.install();
        let left = root.listing().into_iter().filter(|(path, ..)| Path::new(path).is_file());
        let left: Vec<_> = left
            .filter(|(path, ..)| fs::read_to_string(path).is_ok_and(|text| text.contains(OTHER)))
            .collect();
        assert!(left.is_empty(), "{left:?}");
        root.points_to(paths_below(root.0.path()).bundle.as_deref());
    }
}

#[test]
fn a_bundle_made_again_by_the_images_program_has_the_authority_once() {
    let root = debian();
    root.install();
    let anchor = root.read("/usr/local/share/ca-certificates/stead-egress.crt");
    root.file(DEBIAN, &format!("{PUBLIC}{anchor}"));
    let before = root.listing();
    root.install();
    root.has_both(DEBIAN);
    let changed = |path: &str| !path.contains("stead-egress/bundle.pem");
    let kept =
        |all: Vec<(String, u64, i64, i64)>| all.into_iter().filter(|(path, ..)| changed(path)).collect();
    let (before, after): (Vec<_>, Vec<_>) = (kept(before), kept(root.listing()));
    assert_eq!(after, before);
    // It was made again without the anchors.
    root.file(DEBIAN, PUBLIC);
    root.install();
    root.has_both(DEBIAN);
}

#[test]
fn no_link_leads_out_of_the_root() {
    let outside = tempfile::tempdir().expect("made");
    let victim = outside.path().join("bundle.pem");
    fs::write(&victim, PUBLIC).expect("written");
    let (file, directory) = (victim.display().to_string(), outside.path().display().to_string());
    let root = Root::new();
    root.link("/etc/ssl/cert.pem", &file);
    root.link("/etc/ssl/ca-bundle.pem", &format!("../../../../../../../../..{file}"));
    root.link("/etc/ssl/certs", &directory);
    root.link("/etc/pki/trust", &directory);
    root.link("/usr/local/share", &directory);
    root.link("/etc/ca-certificates/trust-source/anchors", &directory);
    root.install();
    assert_eq!(fs::read_to_string(&victim).expect("there"), PUBLIC);
    assert_eq!(fs::read_dir(outside.path()).expect("read").count(), 1);
    // The links mean the same path below the root, where the new bundle is.
    root.points_to(Some(DEBIAN));
    assert!(root.read(&format!("{directory}/ca-certificates.crt")).contains(OURS));
}

#[test]
fn what_is_no_regular_file_of_bounded_size_is_reported_and_left_alone() {
    let root = debian();
    root.directory("/etc/ssl/ca-bundle.pem");
    let fifo = root.path("/etc/ssl/cert.pem");
    assert!(Command::new("mkfifo").arg(&fifo).status().expect("run").success());
    root.directory("/etc/pki/tls/certs");
    let huge = fs::File::create(root.path("/etc/pki/tls/certs/ca-bundle.crt")).expect("made");
    huge.set_len(file::FILE_BYTES_MAX + 1).expect("grown");
    root.link(FEDORA, "loop");
    root.link("/etc/pki/ca-trust/extracted/pem/loop", "tls-ca-bundle.pem");
    root.link("/etc/ssl/certs/ca-bundle.crt", "/");
    let notes = root.install();
    assert_eq!(notes.len(), 5, "{notes:?}");
    for path in &BUNDLES[1..] {
        assert_eq!(notes.iter().filter(|note| note.contains(path)).count(), 1, "{path}: {notes:?}");
    }
    root.has_both(DEBIAN);
    root.points_to(Some(DEBIAN));
    assert!(huge.metadata().is_ok_and(|meta| meta.len() == file::FILE_BYTES_MAX + 1));
}

#[test]
fn devices_are_not_opened_and_files_of_the_kernel_are_neither_read_nor_written() {
    for device in ["/dev/zero", "/dev/null"] {
        let error = file::read(Path::new(device)).expect_err(device);
        assert_eq!(error.to_string(), "not a regular file", "{device}");
    }
    for path in ["/proc/self/mem", "/proc/self/environ", "/proc/version"].map(Path::new) {
        let existing = file::read(path).expect("it is not opened").expect("there");
        assert!(existing.contents.is_empty(), "{path:?} was read");
        assert!(file::replace(path, &existing, OURS.as_bytes()).is_err(), "{path:?} was replaced");
    }
}

#[test]
fn an_image_that_lets_nothing_be_written_is_reported() {
    let root = Root::new();
    // Files where directories should be: the image has no bundle, and none can be made.
    root.file("/etc/ssl", "");
    root.file("/usr/local/share/ca-certificates", "");
    let notes = root.install();
    assert!(notes.iter().any(|note| note.starts_with("no bundle has the egress authority")), "{notes:?}");
    for path in [DEBIAN, ANCHORS[0]] {
        assert!(notes.iter().any(|note| note.contains(path)), "{path}: {notes:?}");
    }
    root.points_to(None);
}

#[test]
fn what_lies_under_our_names_is_replaced_and_not_followed() {
    let root = debian();
    root.file("/victim", "kept");
    root.link("/usr/local/share/ca-certificates/stead-egress.crt", "/victim");
    root.link(&format!("/etc/ssl/certs/{HASH}"), "../../../victim");
    root.link("/etc/ssl/certs/.stead-egress.new", "../../../victim");
    root.link(BUNDLE_LINK, "/victim");
    symlink(root.path("/victim"), root.path(CERTIFICATE)).expect("linked");
    assert_eq!(root.install(), Vec::<String>::new());
    assert_eq!(root.read("/victim"), "kept");
    root.has_both(DEBIAN);
    root.points_to(Some(DEBIAN));
    assert_eq!(root.read(&format!("/etc/ssl/certs/{HASH}")), OURS);
    assert!(!root.path("/etc/ssl/certs/.stead-egress.new").is_symlink());
}

#[test]
fn a_root_without_the_files_points_to_nothing() {
    assert_eq!(paths_below(Root::new().0.path()), Paths::default());
}

/// A program's own environment.
fn env(variables: &[(&str, &str)]) -> BTreeMap<String, Secret> {
    variables.iter().map(|(key, value)| ((*key).to_owned(), Secret((*value).to_owned()))).collect()
}

#[test]
fn an_image_with_java_gets_a_store_of_all_authorities_of_its_bundle() {
    for (program, own) in [
        ("/usr/bin/java", env(&[])),
        ("/opt/jdk/bin/java", env(&[("PATH", "relative:/bin:/opt/jdk/bin")])),
        ("/srv/jdk/bin/java", env(&[("JAVA_HOME", "/srv/jdk")])),
        ("/usr/lib/jvm/java-21/bin/java", env(&[])),
        ("/opt/java/openjdk/bin/java", env(&[])),
    ] {
        let root = debian();
        root.file(program, "");
        assert!(!java::is_in(root.0.path(), &own), "{program} cannot be executed yet");
        fs::set_permissions(root.path(program), Permissions::from_mode(0o755)).expect("set");
        assert_eq!(install_below(root.0.path(), OURS, &own), Vec::<String>::new(), "{program}");
        assert_eq!(paths_below(root.0.path()).java_store.as_deref(), Some(JAVA_STORE), "{program}");
        let expected = keystore::trust_store(&[vec![0x08, 0x20, 0x82], vec![0, 0, 0]]);
        assert_eq!(fs::read(root.path(JAVA_STORE)).expect("written"), expected, "{program}");
    }
}

#[test]
fn without_java_or_other_authorities_there_is_no_store() {
    let root = debian();
    root.file("/srv/java/bin/java", "");
    root.directory("/usr/bin/java");
    root.link("/bin/java", "/usr/bin/java");
    root.install();
    assert_eq!(paths_below(root.0.path()).java_store, None);
    let root = Root::new();
    root.file("/usr/bin/java", "");
    fs::set_permissions(root.path("/usr/bin/java"), Permissions::from_mode(0o755)).expect("set");
    let notes = root.install();
    assert!(notes.iter().any(|note| note.contains(JAVA_STORE)), "{notes:?}");
    assert_eq!(paths_below(root.0.path()).java_store, None);
}

#[test]
fn a_java_behind_a_link_is_found_below_the_root_only() {
    let outside = tempfile::tempdir().expect("made");
    let program = outside.path().join("java");
    fs::write(&program, "").expect("written");
    fs::set_permissions(&program, Permissions::from_mode(0o755)).expect("set");
    let root = debian();
    root.link("/usr/bin/java", program.to_str().expect("text"));
    assert!(!java::is_in(root.0.path(), &env(&[])));
    root.file(program.to_str().expect("text"), "");
    fs::set_permissions(root.path(program.to_str().expect("text")), Permissions::from_mode(0o755))
        .expect("set");
    assert!(java::is_in(root.0.path(), &env(&[])));
}

/// Returns the SHA-1 of a message of at most 55 bytes: one block (FIPS 180-4, section 6.1).
fn sha1_of_one_block(message: &[u8]) -> [u32; 5] {
    let mut block = [0u8; 64];
    block[..message.len()].copy_from_slice(message);
    block[message.len()] = 0x80;
    block[56..].copy_from_slice(&(message.len() as u64 * 8).to_be_bytes());
    let mut words = [0u32; 80];
    for (word, bytes) in words.iter_mut().zip(block.chunks_exact(4)) {
        *word = u32::from_be_bytes(bytes.try_into().expect("four"));
    }
    for at in 16..80 {
        words[at] = (words[at - 3] ^ words[at - 8] ^ words[at - 14] ^ words[at - 16]).rotate_left(1);
    }
    let initial = [0x6745_2301u32, 0xefcd_ab89, 0x98ba_dcfe, 0x1032_5476, 0xc3d2_e1f0];
    let [mut a, mut b, mut c, mut d, mut e] = initial;
    for (at, word) in words.iter().enumerate() {
        let (mixed, constant) = match at / 20 {
            0 => ((b & c) | (!b & d), 0x5a82_7999u32),
            1 => (b ^ c ^ d, 0x6ed9_eba1),
            2 => ((b & c) | (b & d) | (c & d), 0x8f1b_bcdc),
            _ => (b ^ c ^ d, 0xca62_c1d6),
        };
        let next = a.rotate_left(5).wrapping_add(mixed).wrapping_add(e);
        (a, b, c, d, e) = (next.wrapping_add(constant).wrapping_add(*word), a, b.rotate_left(30), c, d);
    }
    let sum = [a, b, c, d, e];
    std::array::from_fn(|at| initial[at].wrapping_add(sum[at]))
}

/// The name is what OpenSSL computes: the first four bytes, little-endian, of the SHA-1 of the subject's canonical
/// encoding, whose letters are small and whose strings are UTF-8 (`X509_NAME_hash_ex`). `openssl x509 -subject_hash`
/// printed the same for a certificate of `CN=Stead egress`.
#[test]
fn the_hashed_name_is_that_of_the_subject_of_every_authority() {
    let tagged = |tag: u8, contents: &[u8]| {
        let length = u8::try_from(contents.len()).expect("short");
        [&[tag, length], contents].concat()
    };
    let attribute = [tagged(0x06, &[0x55, 0x04, 0x03]), tagged(0x0c, b"stead egress")].concat();
    let canonical = tagged(0x31, &tagged(0x30, &attribute));
    assert_eq!(sha1_of_one_block(b"abc")[0], 0xa999_3e36, "the example of the standard");
    let hash = sha1_of_one_block(&canonical)[0].swap_bytes();
    assert_eq!(format!("{hash:08x}.0"), HASH);
}
