//! The daemon's only way of connecting to registries, token services and redirect targets.
//!
//! Guarantees: the guard checks every hop. A redirect never leads from TLS to plain text, is one of at most
//! `REDIRECTS_MAX`, and passes credentials to the first origin only. Answers are read with a bound. No body, path or
//! query of an address is ever part of an error.
//! Proxies of the environment are not used, because their connections would not be checked.

use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use reqwest::header::{AUTHORIZATION, HeaderMap, HeaderValue, LOCATION};
use reqwest::{Client, Response, Url};
use stead_controllers::host::HostErrorKind;

use super::guard::{Forbidden, Guard, Resolver};

/// Time limit for establishing a connection. A reachable registry answers within a second.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Time after which a transfer without data is considered dead.
const STALL: Duration = Duration::from_secs(30);
/// Time limit for the head of an answer, redirects included, and for a document.
pub(super) const DEADLINE: Duration = Duration::from_secs(30);
/// Limit on redirects. Registries redirect blobs once, to their storage; a few more hops come from their networks.
const REDIRECTS_MAX: usize = 5;
const USER_AGENT: &str = concat!("stead/", env!("CARGO_PKG_VERSION"));

/// A failed request: its kind, and a message with nothing but the host and what it did.
#[derive(Debug)]
pub(super) struct Failed {
    pub(super) kind: HostErrorKind,
    pub(super) words: String,
}

impl Failed {
    pub(super) fn new(kind: HostErrorKind, words: impl Into<String>) -> Self {
        Self { kind, words: words.into() }
    }

    pub(super) fn of_status(host: &str, status: u16) -> Self {
        let kind = match status {
            401 | 403 => HostErrorKind::Denied,
            404 | 410 => HostErrorKind::Missing,
            429 => HostErrorKind::Exhausted,
            _ => HostErrorKind::Transient,
        };
        let words = reqwest::StatusCode::from_u16(status).ok().and_then(|status| status.canonical_reason());
        Self::new(kind, format!("{host} says {status} {}", words.unwrap_or_default()))
    }

    fn late(host: &str) -> Self {
        Self::new(HostErrorKind::Transient, format!("{host} gave no answer within {} s", DEADLINE.as_secs()))
    }

    /// Converts a transfer error. The address is left out, because it may hold text from a redirect.
    pub(super) fn of_transfer(host: &str, error: &reqwest::Error) -> Self {
        let mut cause = std::error::Error::source(error);
        let mut root = None;
        while let Some(inner) = cause {
            if inner.is::<Forbidden>() {
                return Self::new(HostErrorKind::Denied, format!("{host}: {inner}"));
            }
            root = Some(inner);
            cause = inner.source();
        }
        let what = if error.is_connect() {
            "cannot be connected to"
        } else if error.is_timeout() {
            "stopped answering"
        } else {
            "broke the connection off"
        };
        let root =
            root.map(|root| format!(": {}", stead_schemas::validate::printable(&root.to_string(), 128)));
        Self::new(HostErrorKind::Transient, format!("{host} {what}{}", root.unwrap_or_default()))
    }
}

/// The clients, created once: one with the guard's resolver, one for names that the configuration lists.
#[derive(Debug)]
pub(super) struct Transport {
    guard: Arc<Guard>,
    strict: Client,
    listed: Client,
}

impl Transport {
    /// Creates the clients.
    ///
    /// # Errors
    /// Returns an error when the host's certificates cannot be read.
    pub(super) fn new(guard: Guard) -> Result<Self, reqwest::Error> {
        // The second installation in one process is refused, so the error is ignored.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let guard = Arc::new(guard);
        let client = |is_for_listed| {
            Client::builder()
                .connect_timeout(CONNECT_TIMEOUT)
                .read_timeout(STALL)
                .user_agent(USER_AGENT)
                .no_proxy()
                .redirect(reqwest::redirect::Policy::none())
                .dns_resolver(Resolver { guard: guard.clone(), is_for_listed })
                .build()
        };
        Ok(Self { strict: client(false)?, listed: client(true)?, guard: guard.clone() })
    }

    /// Sends a request and follows redirects. The caller handles the status of the answer.
    pub(super) async fn get(
        &self,
        url: Url,
        headers: &HeaderMap,
        authorization: Option<&HeaderValue>,
    ) -> Result<Response, Failed> {
        let host = host_of(&url);
        let answer = tokio::time::timeout(DEADLINE, self.follow(url, headers, authorization)).await;
        answer.map_err(|_| Failed::late(&host))?
    }

    async fn follow(
        &self,
        mut url: Url,
        headers: &HeaderMap,
        authorization: Option<&HeaderValue>,
    ) -> Result<Response, Failed> {
        let origin = url.origin();
        for _ in 0..=REDIRECTS_MAX {
            let host = host_of(&url);
            let client = self.client_for(&url)?;
            let mut headers = headers.clone();
            if let Some(authorization) = authorization.filter(|_| url.origin() == origin) {
                headers.insert(AUTHORIZATION, authorization.clone());
            }
            let request = client.get(url.clone()).headers(headers);
            let response = request.send().await.map_err(|error| Failed::of_transfer(&host, &error))?;
            if !matches!(response.status().as_u16(), 301 | 302 | 303 | 307 | 308) {
                return Ok(response);
            }
            let target = response.headers().get(LOCATION).and_then(|target| target.to_str().ok());
            url = redirected(&url, target)?;
        }
        Err(Failed::new(HostErrorKind::Permanent, format!("{} redirects too often", host_of(&url))))
    }

    /// Returns the client for an address. The resolver checks names as they are connected to, but it never sees IP
    /// addresses.
    fn client_for(&self, url: &Url) -> Result<&Client, Failed> {
        let host = host_of(url);
        let name = url.host_str().unwrap_or_default();
        let port = url.port_or_known_default().unwrap_or_default();
        if self.guard.lists(name, port) {
            return Ok(&self.listed);
        }
        let literal = name.trim_start_matches('[').trim_end_matches(']').parse();
        if let Ok(address) = literal {
            let forbidden = |error| Failed::new(HostErrorKind::Denied, format!("{host}: {error}"));
            self.guard.check(address).map_err(forbidden)?;
        }
        Ok(&self.strict)
    }
}

fn redirected(from: &Url, target: Option<&str>) -> Result<Url, Failed> {
    let host = host_of(from);
    let refused = |why: &str| Failed::new(HostErrorKind::Permanent, format!("{host} redirects {why}"));
    let mut url = target.and_then(|target| from.join(target).ok()).ok_or_else(|| refused("to no address"))?;
    match (from.scheme(), url.scheme()) {
        (_, "https") | ("http", "http") => {}
        ("https", "http") => return Err(refused("from TLS to plain text")),
        _ => return Err(refused("to what is no HTTP")),
    }
    // A name and password in an address would be sent as credentials.
    let _ = url.set_username("");
    let _ = url.set_password(None);
    url.set_fragment(None);
    Ok(url)
}

#[cfg(feature = "fuzzing")]
pub(super) fn fuzz(target: &str) {
    for from in ["https://registry.example/v2/", "http://127.0.0.1:5000/v2/"] {
        if let Ok(from) = from.parse()
            && let Ok(url) = redirected(&from, Some(target))
        {
            host_of(&url);
        }
    }
}

/// Returns host and port for messages.
pub(super) fn host_of(url: &Url) -> String {
    let host = url.host_str().unwrap_or("no host");
    url.port().map_or_else(|| host.to_owned(), |port| format!("{host}:{port}"))
}

/// Reads an answer of at most `max` bytes. `what` names it in the error for a longer one.
pub(super) async fn read(response: Response, max: usize, what: &str) -> Result<Vec<u8>, Failed> {
    let host = host_of(response.url());
    let bounded = async {
        let mut bytes = Vec::new();
        let mut body = response.bytes_stream();
        while let Some(chunk) = body.next().await {
            bytes.extend_from_slice(&chunk.map_err(|error| Failed::of_transfer(&host, &error))?);
            if bytes.len() > max {
                let words = format!("{what} of {host} is larger than {} KiB", max >> 10);
                return Err(Failed::new(HostErrorKind::Permanent, words));
            }
        }
        Ok(bytes)
    };
    tokio::time::timeout(DEADLINE, bounded).await.map_err(|_| Failed::late(&host))?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn redirects_never_leave_tls_and_bring_no_credentials() {
        let url = |text: &str| text.parse::<Url>().expect("an address");
        let (tls, plain) = (url("https://a.test/v2/x"), url("http://a.test/v2/x"));
        assert_eq!(redirected(&tls, Some("/y")).expect("relative").as_str(), "https://a.test/y");
        assert_eq!(
            redirected(&plain, Some("https://b.test/y")).expect("better").as_str(),
            "https://b.test/y"
        );
        let stripped = redirected(&tls, Some("https://user:secret@b.test/y#z")).expect("taken");
        assert_eq!(stripped.as_str(), "https://b.test/y");
        for target in [Some("http://a.test/y"), Some("file:///etc/passwd"), Some("gopher://a.test/"), None] {
            redirected(&tls, target).expect_err("refused");
        }
        redirected(&plain, Some("ftp://a.test/")).expect_err("refused");
    }
}
