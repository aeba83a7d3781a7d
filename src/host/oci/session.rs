//! One exchange with a registry: documents and small blobs, bounded and verified, and its errors in
//! our words.

use std::io;
use std::time::Duration;

use futures::StreamExt;
use oci_client::errors::{OciDistributionError, OciErrorCode};
use oci_client::manifest::OciDescriptor;
use oci_client::secrets::RegistryAuth;
use oci_client::{Client, Reference, RegistryOperation};
use stead_controllers::host::{HostError, HostErrorKind};
use stead_schemas::names::Digest;

use super::registry::{CONNECT_TIMEOUT, STALL, USER_AGENT, digest_of};

/// Manifest kinds, of OCI and of Docker.
const ACCEPTED: [&str; 4] = [
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
];
/// The distribution specification asks registries to take 4 MiB.
const DOCUMENT_BYTES_MAX: usize = 4 << 20;
/// For one exchange; blobs have the read timeout instead.
const DEADLINE: Duration = Duration::from_secs(30);

/// One exchange's client, rights and words.
pub(super) struct Session {
    pub(super) client: Client,
    pub(super) auth: RegistryAuth,
    pub(super) scheme: &'static str,
    pub(super) subject: String,
}

impl Session {
    /// A manifest or index, verified against the digest that names it.
    pub(super) async fn document(&self, reference: &Reference) -> Result<(Digest, Vec<u8>), HostError> {
        let bytes = tokio::time::timeout(DEADLINE, self.get(reference)).await.map_err(|_| self.late())??;
        let digest = digest_of(&bytes);
        if reference.digest().is_some_and(|asked| asked != digest.as_str()) {
            return Err(self
                .error(HostErrorKind::Permanent)
                .because("the registry's manifest is not the one asked for"));
        }
        Ok((digest, bytes))
    }

    /// Our own request with the library's token: the library would read an answer of any length.
    async fn get(&self, reference: &Reference) -> Result<Vec<u8>, HostError> {
        let token = self
            .client
            .auth(reference, &self.auth, RegistryOperation::Pull)
            .await
            .map_err(|error| self.failed(&error))?;
        let name = reference.digest().or_else(|| reference.tag()).unwrap_or("latest");
        let (registry, repository) = (reference.resolve_registry(), reference.repository());
        let url = format!("{}://{registry}/v2/{repository}/manifests/{name}", self.scheme);
        let request = self.http()?.get(url).header(reqwest::header::ACCEPT, ACCEPTED.join(", "));
        let request = match (token, &self.auth) {
            (Some(token), _) => request.bearer_auth(token),
            (None, RegistryAuth::Basic(user, password)) => request.basic_auth(user, Some(password)),
            (None, _) => request,
        };
        let response = request.send().await.map_err(|error| self.transport(error))?;
        if !response.status().is_success() {
            let status = response.status();
            return Err(self
                .error(kind_of_status(status.as_u16()))
                .because(format!("the registry says {status}")));
        }
        let mut bytes = Vec::new();
        let mut body = response.bytes_stream();
        while let Some(chunk) = body.next().await {
            bytes.extend_from_slice(&chunk.map_err(|error| self.transport(error))?);
            if bytes.len() > DOCUMENT_BYTES_MAX {
                return Err(self
                    .error(HostErrorKind::Permanent)
                    .because("its manifest is larger than 4 MiB"));
            }
        }
        Ok(bytes)
    }

    fn http(&self) -> Result<reqwest::Client, HostError> {
        let builder = reqwest::Client::builder().connect_timeout(CONNECT_TIMEOUT).read_timeout(STALL);
        builder.user_agent(USER_AGENT).build().map_err(|error| self.transport(error))
    }

    /// Without the address: it may hold what a redirect put there.
    fn transport(&self, error: reqwest::Error) -> HostError {
        let error = error.without_url();
        let cause = std::error::Error::source(&error).map(|cause| format!(": {cause}")).unwrap_or_default();
        self.error(HostErrorKind::Transient).because(format!("{error}{cause}"))
    }

    fn late(&self) -> HostError {
        self.error(HostErrorKind::Transient).because(format!("no answer within {} s", DEADLINE.as_secs()))
    }

    /// A small blob, verified.
    pub(super) async fn blob(
        &self,
        reference: &Reference,
        descriptor: &OciDescriptor,
    ) -> Result<Vec<u8>, HostError> {
        let bounded = async {
            let mut stream = self
                .client
                .pull_blob_stream(reference, descriptor)
                .await
                .map_err(|error| self.failed(&error))?;
            let mut bytes = Vec::new();
            while let Some(chunk) = stream.next().await {
                bytes.extend_from_slice(
                    &chunk.map_err(|error| self.error(HostErrorKind::Transient).because(error))?,
                );
                if bytes.len() > DOCUMENT_BYTES_MAX {
                    return Err(self
                        .error(HostErrorKind::Permanent)
                        .because("its configuration is larger than 4 MiB"));
                }
            }
            Ok(bytes)
        };
        let bytes = tokio::time::timeout(DEADLINE, bounded).await.map_err(|_| self.late())??;
        if digest_of(&bytes).as_str() == descriptor.digest {
            Ok(bytes)
        } else {
            Err(self
                .error(HostErrorKind::Permanent)
                .because("its configuration does not have the digest it is named by"))
        }
    }

    pub(super) fn error(&self, kind: HostErrorKind) -> HostError {
        HostError::new(kind, "pull", self.subject.clone())
    }

    pub(super) fn io(&self, error: io::Error) -> HostError {
        HostError::io("pull", self.subject.clone(), error)
    }

    pub(super) fn failed(&self, error: &OciDistributionError) -> HostError {
        self.error(kind_of(error)).because(sentence(error))
    }
}

fn kind_of_status(status: u16) -> HostErrorKind {
    match status {
        401 | 403 => HostErrorKind::Denied,
        404 => HostErrorKind::Missing,
        429 => HostErrorKind::Exhausted,
        _ => HostErrorKind::Transient,
    }
}

fn kind_of(error: &OciDistributionError) -> HostErrorKind {
    match error {
        OciDistributionError::ImageManifestNotFoundError(_) => HostErrorKind::Missing,
        OciDistributionError::AuthenticationFailure(_) | OciDistributionError::UnauthorizedError { .. } => {
            HostErrorKind::Denied
        }
        OciDistributionError::ServerError { code, .. } => kind_of_status(*code),
        OciDistributionError::RegistryError { envelope, .. } => {
            match envelope.errors.first().map(|error| &error.code) {
                Some(
                    OciErrorCode::ManifestUnknown | OciErrorCode::NameUnknown | OciErrorCode::BlobUnknown,
                ) => HostErrorKind::Missing,
                Some(OciErrorCode::Unauthorized | OciErrorCode::Denied) => HostErrorKind::Denied,
                Some(OciErrorCode::Toomanyrequests) => HostErrorKind::Exhausted,
                _ => HostErrorKind::Transient,
            }
        }
        OciDistributionError::JsonError(_)
        | OciDistributionError::ManifestParsingError(_)
        | OciDistributionError::ManifestEncodingError(_)
        | OciDistributionError::VersionedParsingError(_)
        | OciDistributionError::UnsupportedMediaTypeError(_)
        | OciDistributionError::UnsupportedSchemaVersionError(_)
        | OciDistributionError::DigestError(_) => HostErrorKind::Permanent,
        _ => HostErrorKind::Transient,
    }
}

/// The library's words, with the causes it keeps to itself.
fn sentence(error: &OciDistributionError) -> String {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(inner) = cause {
        let words = inner.to_string();
        if !text.contains(&words) {
            text = format!("{text}: {words}");
        }
        cause = inner.source();
    }
    stead_schemas::validate::printable(&text, 512)
}
