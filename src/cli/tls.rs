//! Rules for the server's certificate: authorities from a file, or the one certificate with a fingerprint.

use std::path::Path;
use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{self, CryptoProvider};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{ClientConfig, DigitallySignedStruct, Error, RootCertStore, SignatureScheme};
use sha2::{Digest, Sha256};

use super::Failure;

/// Length of a SHA-256, in bytes.
const FINGERPRINT_BYTES: usize = 32;

/// Returns the configuration that applies these rules; `None` if there are no rules, and the authorities of this host
/// decide.
pub(super) fn config(
    authorities: Option<&Path>,
    fingerprint: Option<&str>,
) -> Result<Option<ClientConfig>, Failure> {
    let provider = Arc::new(crypto::ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider.clone()).with_safe_default_protocol_versions();
    let builder = builder.map_err(|error| Failure::Other(error.to_string()))?;
    // A variable without a value is the same as none.
    let authorities = authorities.filter(|path| !path.as_os_str().is_empty());
    let fingerprint = fingerprint.filter(|text| !text.is_empty());
    match (authorities, fingerprint) {
        (None, None) => Ok(None),
        (Some(_), Some(_)) => {
            Err(Failure::Usage("set either the authorities or the fingerprint of the server".to_owned()))
        }
        (Some(path), None) => {
            let roots = roots(path).map_err(|why| Failure::Usage(format!("{}: {why}", path.display())))?;
            Ok(Some(builder.with_root_certificates(roots).with_no_client_auth()))
        }
        (None, Some(text)) => {
            let digest = digest(text).ok_or_else(|| {
                let message =
                    format!("the fingerprint must have {FINGERPRINT_BYTES} bytes in hexadecimal digits");
                Failure::Usage(message)
            })?;
            let pinned = Arc::new(Pinned { digest, provider });
            Ok(Some(builder.dangerous().with_custom_certificate_verifier(pinned).with_no_client_auth()))
        }
    }
}

fn roots(path: &Path) -> Result<RootCertStore, String> {
    let certificates = CertificateDer::pem_file_iter(path).map_err(|error| error.to_string())?;
    let mut roots = RootCertStore::empty();
    for certificate in certificates {
        let certificate = certificate.map_err(|error| error.to_string())?;
        roots.add(certificate).map_err(|error| error.to_string())?;
    }
    if roots.is_empty() { Err("it has no certificate".to_owned()) } else { Ok(roots) }
}

/// Reads a fingerprint, with or without colons, and with or without `sha256:` before it.
fn digest(text: &str) -> Option<[u8; FINGERPRINT_BYTES]> {
    let text = text.trim();
    let text = text.strip_prefix("sha256:").unwrap_or(text).replace(':', "");
    hex::decode(text).ok()?.try_into().ok()
}

/// A verifier that accepts one certificate, whatever it says.
#[derive(Debug)]
struct Pinned {
    digest: [u8; FINGERPRINT_BYTES],
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for Pinned {
    fn verify_server_cert(
        &self,
        certificate: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let digest = Sha256::digest(certificate);
        if digest.as_slice() == self.digest {
            return Ok(ServerCertVerified::assertion());
        }
        Err(Error::General(format!("the certificate has the fingerprint {}", hex::encode(digest))))
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        crypto::verify_tls12_signature(message, certificate, signed, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        crypto::verify_tls13_signature(message, certificate, signed, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fingerprint_is_read_in_the_forms_in_which_tools_print_it() {
        let plain = "00".repeat(31) + "ff";
        let colons = "00:".repeat(31) + "FF";
        let mut bytes = [0; FINGERPRINT_BYTES];
        bytes[31] = 255;
        for text in [plain.clone(), colons, format!("sha256:{plain}"), format!(" {plain}\n")] {
            assert_eq!(digest(&text), Some(bytes), "{text:?}");
        }
        for wrong in ["", "00", "zz", &"0".repeat(63), &"0".repeat(66)] {
            assert_eq!(digest(wrong), None, "{wrong:?}");
        }
    }
}
