//! The certificates of the authorities that servers are verified by.
//!
//! Guarantees: a certificate that cannot be used is skipped and counted; there is at least one certificate.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use rustls::RootCertStore;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;

/// Largest bundle, in bytes. Those of distributions have 0.2 MB.
const BUNDLE_BYTES_MAX: u64 = 16 << 20;

/// The reason why there are no certificates.
#[derive(Debug, thiserror::Error)]
pub enum RootsError {
    #[error("the bundle of certificates {path} cannot be read")]
    Read { path: PathBuf, source: io::Error },
    #[error("the bundle of certificates {0} has more than {max} bytes", max = BUNDLE_BYTES_MAX)]
    TooLarge(PathBuf),
    #[error("there is no usable certificate of an authority in {paths:?}; {skipped} cannot be used")]
    None { paths: Vec<PathBuf>, skipped: usize },
}

/// Reads the certificates of bundles in PEM.
///
/// # Errors
/// Fails when a bundle cannot be read, or there is no usable certificate in all of them.
pub(super) fn read(paths: &[PathBuf]) -> Result<RootCertStore, RootsError> {
    let mut roots = RootCertStore::empty();
    let mut skipped = 0;
    for path in paths {
        skipped += add(&mut roots, &bytes(path)?);
    }
    if roots.is_empty() {
        return Err(RootsError::None { paths: paths.to_vec(), skipped });
    }
    tracing::info!(used = roots.len(), skipped, "the certificates of authorities were read");
    Ok(roots)
}

fn bytes(path: &Path) -> Result<Vec<u8>, RootsError> {
    let failed = |source| RootsError::Read { path: path.to_owned(), source };
    let mut bytes = Vec::new();
    let file = File::open(path).map_err(failed)?;
    let length = file.take(BUNDLE_BYTES_MAX + 1).read_to_end(&mut bytes).map_err(failed)?;
    if u64::try_from(length).is_ok_and(|length| length <= BUNDLE_BYTES_MAX) {
        Ok(bytes)
    } else {
        Err(RootsError::TooLarge(path.to_owned()))
    }
}

/// Adds the certificates of a bundle; returns the number of those that cannot be used.
fn add(roots: &mut RootCertStore, bundle: &[u8]) -> usize {
    let mut skipped = 0;
    for certificate in CertificateDer::pem_slice_iter(bundle) {
        let is_added = certificate.is_ok_and(|certificate| roots.add(certificate).is_ok());
        skipped += usize::from(!is_added);
    }
    skipped
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::authority::generate;

    fn bundle(dir: &tempfile::TempDir, name: &str, text: &str) -> PathBuf {
        let path = dir.path().join(name);
        std::fs::write(&path, text).expect("written");
        path
    }

    #[test]
    fn certificates_that_cannot_be_used_are_skipped() {
        let dir = tempfile::tempdir().expect("a folder");
        let certificate = || generate().expect("made").certificate;
        let bad = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
        let broken = "-----BEGIN CERTIFICATE-----\n!!!\n-----END CERTIFICATE-----\n";
        let text =
            format!("# a remark\n{}{bad}{broken}{}-----BEGIN CERTIFICATE", certificate(), certificate());
        let first = bundle(&dir, "first", &text);
        let second = bundle(&dir, "second", &certificate());
        assert_eq!(read(&[first, second]).expect("read").len(), 3);
        assert_eq!(add(&mut RootCertStore::empty(), text.as_bytes()), 3, "the one that is cut counts too");
    }

    #[test]
    fn bundles_without_a_usable_certificate_are_an_error() {
        let dir = tempfile::tempdir().expect("a folder");
        let empty = bundle(&dir, "empty", "nothing");
        assert!(matches!(read(&[empty]), Err(RootsError::None { skipped: 0, .. })));
        assert!(matches!(read(&[]), Err(RootsError::None { .. })));
        assert!(matches!(read(&[dir.path().join("absent")]), Err(RootsError::Read { .. })));
    }
}
