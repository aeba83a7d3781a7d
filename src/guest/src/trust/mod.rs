//! Trust in the certificate authority of mediated egress: its certificate is added, before the program starts, to the
//! files from which programs of an image read their authorities.
//!
//! | of the image                  | what is written                                                            |
//! |-------------------------------|----------------------------------------------------------------------------|
//! | each bundle that it has       | the certificate at its end, between two marks                              |
//! | no bundle                     | a new one with the certificate alone                                       |
//! | each directory of anchors     | a file: programs of the image that make bundles again include it           |
//! | directory of OpenSSL's hashes | a file named by the hash of the authority's subject                        |
//! | any image                     | [`CERTIFICATE`], the certificate alone, and [`BUNDLE_LINK`], in memory     |
//! | a `java`                      | [`JAVA_STORE`], the certificates of the bundle, in memory                  |
//!
//! Guarantees: no program of the image is run. No link of the image leads out of its root, and only regular files of
//! bounded size are read. A second boot of the same disk changes nothing. A failure is logged and does not stop the
//! boot.
//! A guest that continues from memory has all of it: the files of the disk, and `/run`, which is memory.

mod bundle;
mod file;
mod java;
mod keystore;
mod pem;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use stead_schemas::guest::Config;
use stead_schemas::instance::Secret;

use crate::{inside, log_line};

/// Directories from which the programs of distributions make their bundles: Debian and Alpine, Fedora, openSUSE, Arch.
const ANCHORS: [&str; 4] = [
    "/usr/local/share/ca-certificates",
    "/etc/pki/ca-trust/source/anchors",
    "/etc/pki/trust/anchors",
    "/etc/ca-certificates/trust-source/anchors",
];
/// Name of the certificate's file among the anchors. Debian's program reads only files that end in `.crt`.
const ANCHOR: &str = "stead-egress.crt";
/// Bundles of distributions. Many of these paths are links to others of them.
const BUNDLES: [&str; 6] = [
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
    "/etc/ssl/certs/ca-bundle.crt",
];
/// Bundle that is made in an image without any. Most TLS libraries read it by default.
const NEW_BUNDLE: &str = BUNDLES[0];
/// Directory in which OpenSSL searches an authority by the hash of its subject.
const HASHED: &str = "/etc/ssl/certs";
/// Name of the authority's file in it: the output of `openssl x509 -subject_hash` for the subject that every authority
/// has (see the test), and the number of the certificate with this hash.
const HASH: &str = "c2cea079.0";

/// Directory of what programs are pointed to. `/run` is memory that we mount for any image, however small.
const DIRECTORY: &str = "/run/stead-egress";
/// File with the certificate alone, for programs that add authorities to their own.
const CERTIFICATE: &str = "/run/stead-egress/authority.pem";
/// Link to the bundle that has the certificate. An agent that starts anew learns from it which one that is.
const BUNDLE_LINK: &str = "/run/stead-egress/bundle.pem";
/// Trust store that takes the position of the one of a Java installation.
const JAVA_STORE: &str = "/run/stead-egress/java.p12";

/// The files that programs are pointed to, as far as they could be written.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(crate) struct Paths {
    /// Path of the certificate alone.
    pub(crate) certificate: Option<String>,
    /// Path of the image's bundle, the certificate included.
    pub(crate) bundle: Option<String>,
    /// Path of Java's trust store, in PKCS #12.
    pub(crate) java_store: Option<String>,
}

/// Adds the authority to the present root. Failures are logged.
pub(crate) fn install(config: &Config) {
    let Some(certificate) = config.egress.as_ref().and_then(|egress| egress.certificate.as_deref()) else {
        return;
    };
    let notes = install_below(Path::new("/"), certificate, &config.env);
    notes.iter().for_each(|note| log_line(note));
}

/// Finds the files that programs are pointed to in the present root.
pub(crate) fn paths() -> Paths {
    paths_below(Path::new("/"))
}

fn paths_below(root: &Path) -> Paths {
    let below = |path: &str| inside::resolve(root, DIRECTORY).map(|dir| dir.join(file_name(path)));
    let written = |path: &str| below(path).is_ok_and(|file| file.is_file()).then(|| path.to_owned());
    let bundle = below(BUNDLE_LINK).and_then(fs::read_link);
    Paths {
        certificate: written(CERTIFICATE),
        java_store: written(JAVA_STORE),
        bundle: bundle.ok().and_then(|path| path.into_os_string().into_string().ok()),
    }
}

/// Returns the last component of one of the constant paths.
fn file_name(path: &str) -> &str {
    path.rsplit('/').next().unwrap_or(path)
}

/// Adds the authority to a root. Returns what its owner should know. `env` is the program's own environment.
fn install_below(root: &Path, certificate: &str, env: &BTreeMap<String, Secret>) -> Vec<String> {
    let certificate = format!("{}\n", certificate.trim());
    let mut notes = Vec::new();
    for directory in ANCHORS {
        note(&mut notes, directory, add_anchor(root, directory, &certificate));
    }
    let bundle = add_to_bundles(root, &certificate, &mut notes);
    // The directory may have been made with the bundle.
    note(&mut notes, HASHED, add_hashed(root, &certificate));
    note(&mut notes, DIRECTORY, point_to(root, &certificate, bundle));
    match bundle {
        Some(bundle) if java::is_in(root, env) => note(&mut notes, JAVA_STORE, add_java_store(root, bundle)),
        Some(_) => {}
        None => {
            let lost = "no bundle has the egress authority: most programs refuse intercepted connections";
            notes.push(lost.to_owned());
        }
    }
    notes
}

fn note(notes: &mut Vec<String>, path: &str, done: io::Result<()>) {
    if let Err(error) = done {
        notes.push(format!("the egress authority is not added to {path}: {error}"));
    }
}

/// Writes the certificate among the anchors, whose directory is made if the image has the one above it.
fn add_anchor(root: &Path, directory: &str, certificate: &str) -> io::Result<()> {
    let directory = inside::resolve(root, directory)?;
    if !directory.parent().is_some_and(Path::is_dir) {
        return Ok(());
    }
    file::make_directory(&directory)?;
    file::write_own(&directory.join(ANCHOR), certificate.as_bytes())
}

/// Adds the certificate to every bundle, or makes one. Returns the path of the first one that has it.
fn add_to_bundles(root: &Path, certificate: &str, notes: &mut Vec<String>) -> Option<&'static str> {
    let (mut first, mut seen) = (None, BTreeSet::new());
    for path in BUNDLES {
        match add_to_bundle(root, path, certificate, &mut seen) {
            Ok(true) => first = first.or(Some(path)),
            Ok(false) => {}
            Err(error) => note(notes, path, Err(error)),
        }
    }
    if first.is_none() {
        match make_bundle(root, certificate) {
            Ok(true) => {
                first = Some(NEW_BUNDLE);
                notes.push(format!("the image has no bundle: {NEW_BUNDLE} has the egress authority alone"));
            }
            // The loop has reported what is there.
            Ok(false) => {}
            Err(error) => note(notes, NEW_BUNDLE, Err(error)),
        }
    }
    first
}

/// Adds the certificate to a bundle. Returns `false` if there is none, or if another path led to it.
fn add_to_bundle(
    root: &Path,
    path: &str,
    certificate: &str,
    seen: &mut BTreeSet<PathBuf>,
) -> io::Result<bool> {
    let path = inside::resolve(root, path)?;
    if !seen.insert(path.clone()) {
        return Ok(false);
    }
    let Some(existing) = file::read(&path)? else { return Ok(false) };
    let merged = bundle::with_certificate(&existing.contents, certificate);
    if merged != existing.contents {
        file::replace(&path, &existing, &merged)?;
    }
    Ok(true)
}

/// Makes a bundle of the certificate alone. Returns `false` if something is there that is no bundle.
fn make_bundle(root: &Path, certificate: &str) -> io::Result<bool> {
    let path = inside::resolve(root, NEW_BUNDLE)?;
    if !matches!(file::read(&path), Ok(None)) {
        return Ok(false);
    }
    if let Some(directory) = path.parent() {
        file::make_directory(directory)?;
    }
    // With the marks, the next boot knows it for what it is.
    file::write_own(&path, &bundle::with_certificate(&[], certificate))?;
    Ok(true)
}

/// Writes the file that OpenSSL finds by the subject's hash. A link of the image in its position is replaced.
fn add_hashed(root: &Path, certificate: &str) -> io::Result<()> {
    let directory = inside::resolve(root, HASHED)?;
    if !directory.is_dir() {
        return Ok(());
    }
    file::write_own(&directory.join(HASH), certificate.as_bytes())
}

/// Writes the certificate alone, and the link to the bundle, where every user may read them.
fn point_to(root: &Path, certificate: &str, bundle: Option<&str>) -> io::Result<()> {
    let directory = inside::resolve(root, DIRECTORY)?;
    file::make_directory(&directory)?;
    file::write_own(&directory.join(file_name(CERTIFICATE)), certificate.as_bytes())?;
    let link = directory.join(file_name(BUNDLE_LINK));
    let _ = fs::remove_file(&link);
    bundle.map_or(Ok(()), |bundle| symlink(bundle, link))
}

/// Writes the trust store of Java from a bundle that has the certificate.
fn add_java_store(root: &Path, bundle: &str) -> io::Result<()> {
    let directory = inside::resolve(root, DIRECTORY)?;
    java::write_store(&directory.join(file_name(JAVA_STORE)), &inside::resolve(root, bundle)?)
}
