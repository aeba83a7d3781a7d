//! The exchange with the registry for one image: authorization, documents and blobs, bounded and verified, with
//! errors in our own words.

use std::sync::Arc;

use http_auth::ChallengeParser;
use oci_client::Reference;
use oci_client::manifest::OciDescriptor;
use reqwest::header::{ACCEPT, CONTENT_RANGE, HeaderMap, HeaderValue, RANGE, WWW_AUTHENTICATE};
use reqwest::{Response, StatusCode, Url};
use serde::Deserialize;
use stead_controllers::host::{HostError, HostErrorKind};
use stead_schemas::instance::Secret;
use stead_schemas::names::Digest;
use tokio::sync::Mutex;
use zeroize::Zeroizing;

use super::manifest::digest_of;
use super::transport::{Failed, Transport, host_of, read};

/// Manifest types, of OCI and of Docker.
const ACCEPTED: &str = "application/vnd.oci.image.index.v1+json, \
    application/vnd.docker.distribution.manifest.list.v2+json, application/vnd.oci.image.manifest.v1+json, \
    application/vnd.docker.distribution.manifest.v2+json";
/// Limit on a document, in bytes. The distribution specification asks registries to accept 4 MiB.
const DOCUMENT_BYTES_MAX: usize = 4 << 20;
/// Limit on a token service's answer, in bytes. Tokens have a few KiB.
const TOKEN_BYTES_MAX: usize = 64 << 10;

/// Credentials that a client gave for its pull. The memory is cleared when the last user drops them.
pub(super) enum Credentials {
    Basic(String, Secret),
    Bearer(Secret),
}

/// The context of one pull: the registry, the credentials of its owner, and the token obtained with them.
pub(super) struct Session {
    transport: Arc<Transport>,
    reference: Reference,
    credentials: Option<Arc<Credentials>>,
    /// True if the registry is used without TLS.
    is_plain: bool,
    subject: String,
    authorization: Mutex<Option<HeaderValue>>,
}

/// A blob that is being received.
pub(super) struct Incoming {
    pub(super) response: Response,
    pub(super) host: String,
    /// Offset of the first byte. It is 0 when the registry does not resume.
    pub(super) start: u64,
}

impl Session {
    pub(super) fn new(
        transport: Arc<Transport>,
        reference: Reference,
        credentials: Option<Arc<Credentials>>,
        is_plain: bool,
        subject: String,
    ) -> Self {
        let authorization = match credentials.as_deref() {
            Some(Credentials::Bearer(token)) => secret(&Zeroizing::new(format!("Bearer {}", token.0))),
            _ => None,
        };
        Self {
            transport,
            reference,
            credentials,
            is_plain,
            subject,
            authorization: Mutex::new(authorization),
        }
    }

    /// Fetches a manifest or index. It is verified if a digest names it.
    pub(super) async fn document(&self, asked: Option<&Digest>) -> Result<(Digest, Vec<u8>), HostError> {
        let name = match asked {
            Some(digest) => digest.as_str(),
            None => self.reference.digest().or_else(|| self.reference.tag()).unwrap_or("latest"),
        };
        let url = self.url("manifests", name)?;
        let headers = HeaderMap::from_iter([(ACCEPT, HeaderValue::from_static(ACCEPTED))]);
        let response = self.get_ok(url, &headers).await?;
        let bytes = self.reported(read(response, DOCUMENT_BYTES_MAX, "the manifest").await)?;
        let digest = digest_of(&bytes);
        if name.contains(':') && name != digest.as_str() {
            return Err(self.permanent("the registry's manifest is not the one asked for"));
        }
        Ok((digest, bytes))
    }

    /// Fetches a small blob and verifies it.
    pub(super) async fn blob(&self, descriptor: &OciDescriptor) -> Result<Vec<u8>, HostError> {
        let digest: Digest = descriptor
            .digest
            .parse()
            .map_err(|error| self.permanent(&format!("its configuration's digest {error}")))?;
        let response = self.get_ok(self.url("blobs", digest.as_str())?, &HeaderMap::new()).await?;
        let bytes = self.reported(read(response, DOCUMENT_BYTES_MAX, "the configuration").await)?;
        if digest_of(&bytes) == digest {
            Ok(bytes)
        } else {
            Err(self.permanent("its configuration does not have the digest it is named by"))
        }
    }

    /// Opens a blob at an offset, or at its start if the registry does not resume.
    pub(super) async fn open_blob(&self, digest: &Digest, from: u64) -> Result<Incoming, HostError> {
        let url = self.url("blobs", digest.as_str())?;
        let mut headers = HeaderMap::new();
        if from > 0 {
            headers.extend(HeaderValue::from_str(&format!("bytes={from}-")).map(|range| (RANGE, range)));
        }
        let mut response = self.get(url.clone(), &headers).await?;
        if response.status() == StatusCode::RANGE_NOT_SATISFIABLE {
            response = self.get(url, &HeaderMap::new()).await?;
        }
        let host = host_of(response.url());
        match response.status() {
            StatusCode::OK => Ok(Incoming { response, host, start: 0 }),
            StatusCode::PARTIAL_CONTENT => {
                let range = response.headers().get(CONTENT_RANGE).and_then(|range| range.to_str().ok());
                if range.is_some_and(|range| range.starts_with(&format!("bytes {from}-"))) {
                    return Ok(Incoming { response, host, start: from });
                }
                Err(self.error(HostErrorKind::Transient).because(format!("{host} sends another part")))
            }
            status => Err(self.failed(Failed::of_status(&host, status.as_u16()))),
        }
    }

    fn url(&self, kind: &str, name: &str) -> Result<Url, HostError> {
        let scheme = if self.is_plain { "http" } else { "https" };
        let (registry, repository) = (self.reference.resolve_registry(), self.reference.repository());
        let url = format!("{scheme}://{registry}/v2/{repository}/{kind}/{name}");
        url.parse().map_err(|_| self.permanent("its registry's name makes no address"))
    }

    async fn get_ok(&self, url: Url, headers: &HeaderMap) -> Result<Response, HostError> {
        let response = self.get(url, headers).await?;
        if response.status().is_success() {
            return Ok(response);
        }
        let status = response.status().as_u16();
        Err(self.failed(Failed::of_status(&host_of(response.url()), status)))
    }

    /// Sends a request. If the registry asks for authorization, answers its challenge once and repeats the request.
    async fn get(&self, url: Url, headers: &HeaderMap) -> Result<Response, HostError> {
        let known = self.authorization.lock().await.clone();
        let response = self.reported(self.transport.get(url.clone(), headers, known.as_ref()).await)?;
        let is_challenge = response.status() == StatusCode::UNAUTHORIZED
            && response.url().origin() == url.origin()
            && !matches!(self.credentials.as_deref(), Some(Credentials::Bearer(_)));
        if !is_challenge {
            return Ok(response);
        }
        let Some(fresh) = self.reported(self.answer(&response).await)? else { return Ok(response) };
        drop(response);
        *self.authorization.lock().await = Some(fresh.clone());
        self.reported(self.transport.get(url, headers, Some(&fresh)).await)
    }

    /// Returns the authorization for the registry's challenge, or `None` when there is none.
    async fn answer(&self, response: &Response) -> Result<Option<HeaderValue>, Failed> {
        let texts = response.headers().get_all(WWW_AUTHENTICATE).iter().filter_map(|text| text.to_str().ok());
        match challenge(texts) {
            Some((realm, service)) => self.token(&realm, service).await.map(Some),
            None => Ok(self.basic()),
        }
    }

    fn basic(&self) -> Option<HeaderValue> {
        let Some(Credentials::Basic(user, password)) = self.credentials.as_deref() else { return None };
        use base64::Engine as _;
        let words = Zeroizing::new(format!("{user}:{}", password.0));
        let words = Zeroizing::new(base64::engine::general_purpose::STANDARD.encode(words.as_bytes()));
        secret(&Zeroizing::new(format!("Basic {}", *words)))
    }

    /// Requests a token from the service that the registry names. The guard checks the service like any other host.
    async fn token(&self, realm: &str, service: Option<String>) -> Result<HeaderValue, Failed> {
        let mut url = token_service(realm, self.is_plain).map_err(broken)?;
        let scope = format!("repository:{}:pull", self.reference.repository());
        url.query_pairs_mut().append_pair("scope", &scope);
        if let Some(service) = service {
            url.query_pairs_mut().append_pair("service", &service);
        }
        let response = self.transport.get(url, &HeaderMap::new(), self.basic().as_ref()).await?;
        let host = host_of(response.url());
        if !response.status().is_success() {
            let failed = Failed::of_status(&host, response.status().as_u16());
            return Err(Failed { words: format!("the token service {}", failed.words), ..failed });
        }
        let bytes = Zeroizing::new(read(response, TOKEN_BYTES_MAX, "the token").await?);
        let token = serde_json::from_slice::<TokenAnswer>(&bytes).ok().and_then(TokenAnswer::into_token);
        let header = token.and_then(|token| secret(&Zeroizing::new(format!("Bearer {}", token.0))));
        header.ok_or_else(|| broken(&format!("the token service {host} gives no token")))
    }

    fn reported<T>(&self, result: Result<T, Failed>) -> Result<T, HostError> {
        result.map_err(|failed| self.failed(failed))
    }

    pub(super) fn failed(&self, failed: Failed) -> HostError {
        self.error(failed.kind).because(failed.words)
    }

    pub(super) fn error(&self, kind: HostErrorKind) -> HostError {
        HostError::new(kind, "pull", self.subject.clone())
    }

    pub(super) fn permanent(&self, words: &str) -> HostError {
        self.error(HostErrorKind::Permanent).because(words)
    }
}

/// Returns the token service and the service's name from the first challenge that asks for a token.
fn challenge<'t>(texts: impl Iterator<Item = &'t str>) -> Option<(String, Option<String>)> {
    let mut challenges = texts.flat_map(|text| ChallengeParser::new(text).flatten());
    let bearer = challenges.find(|challenge| challenge.scheme.eq_ignore_ascii_case("Bearer"))?;
    let of = |name: &str| {
        let mut params = bearer.params.iter();
        params.find(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| value.to_unescaped())
    };
    Some((of("realm").unwrap_or_default(), of("service")))
}

fn broken(words: &str) -> Failed {
    Failed::new(HostErrorKind::Permanent, words)
}

/// Returns the address of the token service that a registry names. The service gets the password, so it must have TLS
/// if the registry has.
fn token_service(realm: &str, is_plain: bool) -> Result<Url, &'static str> {
    let url: Url = realm.parse().map_err(|_| "the registry names no token service")?;
    match url.scheme() {
        "https" => Ok(url),
        "http" if is_plain => Ok(url),
        _ => Err("the registry names a token service without TLS"),
    }
}

#[cfg(feature = "fuzzing")]
pub(super) fn fuzz(data: &[u8]) {
    let value = HeaderValue::from_bytes(data).ok();
    if let Some(text) = value.as_ref().and_then(|value| value.to_str().ok())
        && let Some((realm, service)) = challenge(std::iter::once(text))
        && let Ok(mut url) = realm.parse::<Url>()
    {
        url.query_pairs_mut().append_pair("service", &service.unwrap_or_default());
    }
    let token = serde_json::from_slice::<TokenAnswer>(data).ok().and_then(TokenAnswer::into_token);
    token.and_then(|token| secret(&Zeroizing::new(format!("Bearer {}", token.0))));
}

/// Returns a header value marked as sensitive, or `None` if the text is not valid in a header.
fn secret(text: &Zeroizing<String>) -> Option<HeaderValue> {
    let mut value = HeaderValue::from_str(text).ok()?;
    value.set_sensitive(true);
    Some(value)
}

/// An answer of a token service. The token has one of two names.
#[derive(Deserialize)]
struct TokenAnswer {
    token: Option<Secret>,
    access_token: Option<Secret>,
}

impl TokenAnswer {
    fn into_token(self) -> Option<Secret> {
        self.token.or(self.access_token).filter(|token| !token.0.is_empty())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_password_for_a_registry_with_tls_goes_to_no_token_service_without() {
        for is_plain in [false, true] {
            assert!(token_service("https://auth.example.com/token", is_plain).is_ok());
            for other in ["ftp://auth.example.com/", "file:///token", "//auth.example.com/", "token", ""] {
                assert!(token_service(other, is_plain).is_err(), "{other}");
            }
        }
        assert!(token_service("http://localhost:5000/token", true).is_ok());
        let refused = token_service("http://auth.example.com/token", false);
        assert_eq!(refused, Err("the registry names a token service without TLS"));
    }
}
