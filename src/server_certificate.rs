//! Servers whose certificates are accepted without an authority.
//!
//! The server must still prove that it has the certificate's key, as the protocol requires.

use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{self, CryptoProvider};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{ClientConfig, DigitallySignedStruct, Error, SignatureScheme};
use sha2::{Digest, Sha256};

/// Length of a SHA-256, in bytes.
pub(crate) const FINGERPRINT_BYTES: usize = 32;

/// The certificates that are accepted, whatever they say.
#[derive(Debug)]
pub(crate) enum Accepted {
    /// All certificates, where the server is known by its address.
    Any,
    /// The certificate with this SHA-256.
    Fingerprint([u8; FINGERPRINT_BYTES]),
}

#[derive(Debug)]
struct Verifier {
    accepted: Accepted,
    provider: Arc<CryptoProvider>,
}

/// Returns the configuration of a client that accepts these certificates.
pub(crate) fn config(accepted: Accepted) -> Result<ClientConfig, Error> {
    let provider = Arc::new(crypto::ring::default_provider());
    let config =
        ClientConfig::builder_with_provider(provider.clone()).with_safe_default_protocol_versions()?;
    let verifier = Arc::new(Verifier { accepted, provider });
    Ok(config.dangerous().with_custom_certificate_verifier(verifier).with_no_client_auth())
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        certificate: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let Accepted::Fingerprint(expected) = self.accepted else {
            return Ok(ServerCertVerified::assertion());
        };
        let digest = Sha256::digest(certificate);
        if digest.as_slice() == expected {
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
