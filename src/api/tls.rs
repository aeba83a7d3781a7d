//! The certificate of the TCP listener: read from two files, read again when they change, or made here.
//!
//! Guarantees: a pair of files that is broken or does not fit together changes nothing and is logged; connections
//! go on with the certificate that they began with.

use std::fs;
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rustix::fs::OFlags;
use rustls::ServerConfig;
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use sha2::{Digest, Sha256};
use tokio::sync::watch;
use tokio_rustls::TlsAcceptor;
use zeroize::Zeroizing;

/// Time between two polls of the files.
const POLL_INTERVAL: Duration = Duration::from_secs(1);
/// Largest file, in bytes: a chain of certificates has some 10 kB.
const FILE_BYTES_MAX: u64 = 1 << 20;
/// Rights of users outside of the file's group. Programs that renew certificates give keys to a group.
const EVERYBODY: u32 = 0o007;

/// The reason why a pair of files cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    #[error("cannot {operation} {path}", path = path.display())]
    Io { operation: &'static str, path: PathBuf, source: io::Error },
    #[error("{path} must be a regular file", path = path.display())]
    Kind { path: PathBuf },
    #[error("{path} is not what it must be", path = path.display())]
    Pem { path: PathBuf, source: pem::Error },
    #[error("{path} has mode {mode:o}: the key must not be open to everybody (chmod 600)", path = path.display())]
    Mode { path: PathBuf, mode: u32 },
    #[error("{certificate} and {key} cannot be used together", certificate = certificate.display(), key = key.display())]
    Pair { certificate: PathBuf, key: PathBuf, source: rustls::Error },
    #[error("cannot make a certificate")]
    Make(#[source] rcgen::Error),
}

/// The two files, in PEM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsFiles {
    /// The certificate, followed by those of the authorities between it and the root.
    pub certificate: PathBuf,
    pub key: PathBuf,
}

/// The certificate in force; clones share it.
#[derive(Clone)]
pub struct Tls {
    files: TlsFiles,
    config: Arc<watch::Sender<Arc<ServerConfig>>>,
}

impl std::fmt::Debug for Tls {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tls").field("files", &self.files).finish_non_exhaustive()
    }
}

/// A pair of files that was read.
struct Loaded {
    config: Arc<ServerConfig>,
    fingerprint: String,
}

/// Modification times, inodes and lengths of the two files; `None` for a file that does not exist.
type Stamp = [Option<(SystemTime, u64, u64)>; 2];

impl TlsFiles {
    fn load(&self) -> Result<Loaded, TlsError> {
        let pem = |path: &Path| {
            let path = path.to_path_buf();
            move |source| TlsError::Pem { path, source }
        };
        let (text, _) = read(&self.certificate)?;
        let chain: Vec<CertificateDer<'static>> = CertificateDer::pem_slice_iter(&text)
            .collect::<Result<_, _>>()
            .map_err(pem(&self.certificate))?;
        let leaf = chain.first().ok_or(pem::Error::NoItemsFound).map_err(pem(&self.certificate))?;
        let fingerprint = fingerprint(leaf);
        let (text, mode) = read(&self.key)?;
        if mode & EVERYBODY != 0 {
            return Err(TlsError::Mode { path: self.key.clone(), mode });
        }
        let key = PrivateKeyDer::from_pem_slice(&text).map_err(pem(&self.key))?;
        let config = config(chain, key).map_err(|source| TlsError::Pair {
            certificate: self.certificate.clone(),
            key: self.key.clone(),
            source,
        })?;
        Ok(Loaded { config: Arc::new(config), fingerprint })
    }

    fn stamp(&self) -> io::Result<Stamp> {
        let poll = |path: &Path| match fs::metadata(path) {
            Ok(seen) => Ok(Some((seen.modified()?, seen.ino(), seen.len()))),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        };
        Ok([poll(&self.certificate)?, poll(&self.key)?])
    }
}

fn failed(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> TlsError {
    let path = path.to_path_buf();
    move |source| TlsError::Io { operation, path, source }
}

/// Reads a file; returns its content and its mode.
fn read(path: &Path) -> Result<(Zeroizing<Vec<u8>>, u32), TlsError> {
    // Without a wait: the opening of a named pipe would last until somebody writes to it.
    let flags = i32::try_from(OFlags::NONBLOCK.bits()).unwrap_or(0);
    let file = fs::File::options().read(true).custom_flags(flags).open(path).map_err(failed("read", path))?;
    let seen = file.metadata().map_err(failed("read", path))?;
    if !seen.is_file() {
        return Err(TlsError::Kind { path: path.to_path_buf() });
    }
    // The whole room is reserved at the start, so that no copies of a key stay behind.
    let room = usize::try_from(seen.len().min(FILE_BYTES_MAX)).unwrap_or(0);
    let mut bytes = Zeroizing::new(Vec::with_capacity(room + 1));
    file.take(FILE_BYTES_MAX).read_to_end(&mut bytes).map_err(failed("read", path))?;
    Ok((bytes, seen.permissions().mode() & 0o777))
}

/// Returns the SHA-256 of a certificate, in hexadecimal digits.
fn fingerprint(certificate: &CertificateDer<'_>) -> String {
    hex::encode(Sha256::digest(certificate))
}

fn config(
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
) -> Result<ServerConfig, rustls::Error> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions()?;
    let mut config = config.with_no_client_auth().with_single_cert(chain, key)?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(config)
}

impl Tls {
    /// Reads the files. Blocks briefly.
    ///
    /// # Errors
    /// Fails when a file cannot be read, or the two do not fit together.
    pub fn open(files: TlsFiles) -> Result<Self, TlsError> {
        let Loaded { config, fingerprint } = files.load()?;
        tracing::info!(certificate = %files.certificate.display(), fingerprint, "TLS certificate");
        Ok(Self { files, config: Arc::new(watch::Sender::new(config)) })
    }

    pub(super) fn acceptor(&self) -> TlsAcceptor {
        TlsAcceptor::from(self.config.borrow().clone())
    }

    /// Applies the files if they have changed; returns their new stamp.
    fn poll(&self, before: Option<Stamp>) -> anyhow::Result<Stamp> {
        let now = self.files.stamp()?;
        if before.is_some_and(|before| before != now) {
            let Loaded { config, fingerprint } = self.files.load()?;
            // Sessions of the earlier certificate are not resumed: the new configuration does not know them.
            self.config.send_replace(config);
            tracing::info!(fingerprint, "new TLS certificate");
        }
        Ok(now)
    }

    /// Follows the files, and applies every change. Files that cannot be used change nothing, are logged once,
    /// and are read again at every poll.
    pub async fn follow(self) {
        let (mut seen, mut failure) = (self.files.stamp().ok(), None);
        loop {
            tokio::time::sleep(POLL_INTERVAL).await;
            let tls = self.clone();
            match tokio::task::spawn_blocking(move || tls.poll(seen)).await {
                Ok(Ok(stamp)) => (seen, failure) = (Some(stamp), None),
                Ok(Err(error)) => {
                    let error = format!("{error:#}");
                    if failure.as_ref() != Some(&error) {
                        tracing::error!(error, "the TLS certificate is not replaced: the one before stays");
                    }
                    failure = Some(error);
                }
                Err(_) => {}
            }
        }
    }
}

/// Makes a certificate of this daemon's own, unless the directory has one. Its names are those by which the host is
/// reached; clients trust the file itself or its fingerprint. It does not expire.
///
/// # Errors
/// Fails when it cannot be made or written.
pub fn own_certificate(directory: &Path, names: Vec<String>) -> Result<TlsFiles, TlsError> {
    let files = TlsFiles { certificate: directory.join("tls.crt"), key: directory.join("tls.key") };
    if files.certificate.exists() && files.key.exists() {
        return Ok(files);
    }
    let key = rcgen::KeyPair::generate().map_err(TlsError::Make)?;
    let mut parameters = rcgen::CertificateParams::new(names).map_err(TlsError::Make)?;
    parameters.distinguished_name = rcgen::DistinguishedName::new();
    parameters.distinguished_name.push(rcgen::DnType::CommonName, "stead");
    parameters.extended_key_usages = vec![rcgen::ExtendedKeyUsagePurpose::ServerAuth];
    let certificate = parameters.self_signed(&key).map_err(TlsError::Make)?;
    let write = |path: &Path, text: &str| {
        // The file is readable only by its owner from the start.
        let mut file = tempfile::NamedTempFile::new_in(directory)?;
        file.write_all(text.as_bytes())?;
        file.as_file().sync_all()?;
        file.persist(path).map(drop).map_err(|error| error.error)
    };
    let pem = Zeroizing::new(key.serialize_pem());
    write(&files.key, &pem).map_err(failed("write", &files.key))?;
    write(&files.certificate, &certificate.pem()).map_err(failed("write", &files.certificate))?;
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn made(directory: &Path) -> TlsFiles {
        own_certificate(directory, vec!["localhost".to_owned(), "127.0.0.1".to_owned()]).expect("made")
    }

    fn copy(from: &TlsFiles, to: &TlsFiles) {
        fs::copy(&from.certificate, &to.certificate).expect("copied");
        fs::copy(&from.key, &to.key).expect("copied");
    }

    #[test]
    fn a_broken_or_mixed_pair_keeps_the_one_before_and_a_new_pair_replaces_it() {
        let scratch = [0, 1].map(|_| tempfile::tempdir().expect("scratch"));
        let [files, other] = [made(scratch[0].path()), made(scratch[1].path())];
        assert_eq!(fs::metadata(&files.key).expect("there").permissions().mode() & 0o777, 0o600);
        assert_eq!(made(scratch[0].path()), files);
        let tls = Tls::open(files.clone()).expect("opened");
        let first = Arc::as_ptr(&tls.config.borrow());
        let seen = tls.poll(None).expect("as it was");
        let kept = |tls: &Tls| Arc::as_ptr(&tls.config.borrow()) == first;
        let original = fs::read(&files.certificate).expect("read");
        for content in ["", "nonsense", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"] {
            fs::remove_file(&files.certificate).expect("removed");
            fs::write(&files.certificate, content).expect("written");
            tls.poll(Some(seen)).expect_err("broken");
        }
        fs::remove_file(&files.certificate).expect("removed");
        let pipe = rustix::fs::FileType::Fifo;
        rustix::fs::mknodat(rustix::fs::CWD, &files.certificate, pipe, 0o600.into(), 0).expect("made");
        assert!(tls.poll(Some(seen)).expect_err("no file").to_string().contains("regular file"));
        // The certificate of one pair and the key of the other, as between two renames.
        fs::rename(&other.certificate, &files.certificate).expect("renamed");
        tls.poll(Some(seen)).expect_err("mixed");
        fs::remove_file(&files.key).expect("removed");
        tls.poll(Some(seen)).expect_err("no key");
        assert!(kept(&tls));
        fs::rename(&other.key, &files.key).expect("renamed");
        let after = tls.poll(Some(seen)).expect("a new pair");
        assert!(!kept(&tls) && after != seen && original != fs::read(&files.certificate).expect("read"));
        fs::set_permissions(&files.key, fs::Permissions::from_mode(0o644)).expect("opened");
        assert!(Tls::open(files).expect_err("open to everybody").to_string().contains("644"));
    }

    #[test]
    fn half_of_an_own_certificate_is_made_again() {
        let scratch = [0, 1].map(|_| tempfile::tempdir().expect("scratch"));
        let [files, other] = [made(scratch[0].path()), made(scratch[1].path())];
        copy(&other, &files);
        fs::remove_file(&files.certificate).expect("removed");
        Tls::open(made(scratch[0].path())).expect("the two fit together");
    }
}
