//! Rules for the server's certificate: authorities from a file, or the one certificate with a fingerprint.

use std::path::Path;
use std::sync::Arc;

use rustls::crypto;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use rustls::{ClientConfig, RootCertStore};

use super::Failure;
use crate::server_certificate::{self, Accepted, FINGERPRINT_BYTES};

/// Returns the configuration that applies these rules; `None` if there are no rules, and the authorities of this host
/// decide.
pub(super) fn config(
    authorities: Option<&Path>,
    fingerprint: Option<&str>,
) -> Result<Option<ClientConfig>, Failure> {
    let failed = |error: rustls::Error| Failure::Other(error.to_string());
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
            let provider = Arc::new(crypto::ring::default_provider());
            let builder = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
            Ok(Some(builder.map_err(failed)?.with_root_certificates(roots).with_no_client_auth()))
        }
        (None, Some(text)) => {
            let digest = digest(text).ok_or_else(|| {
                let message =
                    format!("the fingerprint must have {FINGERPRINT_BYTES} bytes in hexadecimal digits");
                Failure::Usage(message)
            })?;
            server_certificate::config(Accepted::Fingerprint(digest)).map(Some).map_err(failed)
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
