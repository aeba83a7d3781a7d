//! The trust store of Java, which reads no bundle: made of the certificates of the image's bundle, in an image that has
//! a `java`.
//!
//! A store replaces the one of the Java installation. Certificates that are only there are not in ours.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use stead_schemas::instance::Secret;

use super::{file, keystore, pem};
use crate::inside;

/// Directories of programs that are searched besides those of the program's `PATH`.
const PROGRAMS: [&str; 3] = ["/usr/local/bin", "/usr/bin", "/bin"];
/// Directories in which each Java installation has one.
const INSTALLATIONS: [&str; 2] = ["/usr/lib/jvm", "/opt/java"];
/// Limit on the entries of such a directory that are searched. An image has a few; a hostile one could have millions.
const INSTALLATIONS_MAX: usize = 64;
/// Number of certificates from which a bundle is worth a store: one is our own, which alone would make Java refuse the
/// hosts that it trusts without us.
const CERTIFICATES_MIN: usize = 2;

/// Returns whether a root has a `java`, in the directories of the program's environment or the usual ones.
pub(super) fn is_in(root: &Path, env: &BTreeMap<String, Secret>) -> bool {
    let value = |key| env.get(key).map_or("", |secret: &Secret| secret.0.as_str());
    let home = format!("{}/bin", value("JAVA_HOME"));
    let named = value("PATH").split(':').chain([home.as_str()]).chain(PROGRAMS);
    let is_named = named.filter(|directory| directory.starts_with('/')).any(|bin| has_java(root, bin));
    is_named || INSTALLATIONS.iter().any(|directory| is_installed_below(root, directory))
}

fn is_installed_below(root: &Path, directory: &str) -> bool {
    let Ok(entries) = inside::resolve(root, directory).and_then(fs::read_dir) else { return false };
    let names = entries.flatten().take(INSTALLATIONS_MAX).map(|entry| entry.file_name());
    names
        .filter_map(|name| name.into_string().ok())
        .any(|name| has_java(root, &format!("{directory}/{name}/bin")))
}

fn has_java(root: &Path, directory: &str) -> bool {
    let program = inside::resolve(root, &format!("{directory}/java"));
    let meta = program.and_then(fs::symlink_metadata);
    meta.is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
}

/// Writes the store of a bundle's certificates. A bundle with ours alone gets none.
pub(super) fn write_store(path: &Path, bundle: &Path) -> io::Result<()> {
    let Some(bundle) = file::read(bundle)? else { return Ok(()) };
    let certificates = pem::certificates(&bundle.contents);
    if certificates.len() < CERTIFICATES_MIN {
        return Err(io::Error::other("there are no certificates of other authorities for a store"));
    }
    file::write_own(path, &keystore::trust_store(&certificates))
}
