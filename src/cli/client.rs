//! The client: requests, retries as the server asks for them, and errors as text.

use std::sync::Arc;
use std::time::Duration;

use backoff::ExponentialBackoffBuilder;
use backoff::backoff::Backoff;
use futures::SinkExt;
use reqwest::header::HeaderValue;
use reqwest::{Method, RequestBuilder, Response, StatusCode};
use rustls::ClientConfig;
use serde::de::DeserializeOwned;
use serde_json::Value;
use stead_schemas::api::ErrorBody;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::tungstenite::{Error, Message};
use tokio_tungstenite::{Connector, MaybeTlsStream, WebSocketStream, client_async_tls_with_config};

use super::base::{Base, Duplex};
use super::{Failure, Remote, show, tls};

/// A client of one server.
#[derive(Debug)]
pub(crate) struct Client {
    http: reqwest::Client,
    base: Base,
    /// The token; a user whom the server's Unix socket lets in needs none.
    key: Option<String>,
    /// Rules for the server's certificate other than the default ones.
    tls: Option<Arc<ClientConfig>>,
}

pub(crate) type Socket = WebSocketStream<MaybeTlsStream<Box<dyn Duplex>>>;

/// Time for a connection.
const CONNECT_DEADLINE: Duration = Duration::from_secs(5);
/// Time for a request: verbs wait up to 55 s on the server's side.
const REQUEST_DEADLINE: Duration = Duration::from_secs(70);
/// Largest response, in bytes: a list of 100,000 instances has some 150 MB.
const ANSWER_BYTES_MAX: usize = 512 << 20;
/// Largest error response, in bytes.
const ERROR_BYTES_MAX: usize = 4 << 20;
/// Time for retries of errors that may pass.
const RETRY_FOR: Duration = Duration::from_secs(20);

fn environment(names: [&str; 2]) -> Option<String> {
    names.into_iter().find_map(|name| std::env::var(name).ok().filter(|value| !value.is_empty()))
}

impl Client {
    pub(crate) fn new(remote: &Remote) -> Result<Self, Failure> {
        // This fails when a provider is installed already, which is fine.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let base = remote.base_url.clone().or_else(|| environment(["STEAD_BASE_URL", "HYPEMAN_BASE_URL"]));
        let base = base.map_or_else(|| Ok(Base::default()), |text| text.parse().map_err(Failure::Usage))?;
        let key = remote.api_key.clone().or_else(|| environment(["STEAD_API_KEY", "HYPEMAN_API_KEY"]));
        base.check(key.is_some())?;
        if let Some(warning) = base.warning(key.is_some()) {
            eprintln!("stead: {}", show::shown(&warning));
        }
        let is_malformed = |key: &String| HeaderValue::from_str(key).is_err();
        if key.as_ref().is_some_and(is_malformed) {
            return Err(Failure::Usage(
                "the token has characters that no token has, such as a line's end".to_owned(),
            ));
        }
        // The API does not redirect, so the contents of a request go to no other host.
        let redirects = reqwest::redirect::Policy::none();
        let mut http = reqwest::Client::builder().connect_timeout(CONNECT_DEADLINE).redirect(redirects);
        // A proxy of the environment would get the token, also of a server on this very host. With TLS it sees nothing.
        if !matches!(&base, Base::Url(url) if url.scheme() == "https") {
            http = http.no_proxy();
        }
        if let Base::Socket(path) = &base {
            http = http.unix_socket(path.as_path());
        }
        let tls = tls::config(remote.cacert.as_deref(), remote.tls_fingerprint.as_deref())?;
        if let Some(tls) = &tls {
            http = http.tls_backend_preconfigured(tls.clone());
        }
        let http = http.build().map_err(|error| Failure::Other(error.to_string()))?;
        Ok(Self { http, base, key, tls: tls.map(Arc::new) })
    }

    /// Makes a request for a path given by its segments, each of which may contain any characters.
    pub(crate) fn request(&self, method: Method, segments: &[&str]) -> RequestBuilder {
        let request = self.http.request(method, self.base.url(segments));
        match &self.key {
            Some(key) => request.bearer_auth(key),
            None => request,
        }
    }

    /// Opens a WebSocket to a verb of an instance, and sends its first frame.
    pub(crate) async fn socket(&self, segments: &[&str], first: &Value) -> Result<Socket, Failure> {
        let mut url = self.base.url(segments);
        let scheme = if url.scheme() == "https" { "wss" } else { "ws" };
        // This cannot fail from http to ws.
        let _ = url.set_scheme(scheme);
        let failed = |error: Error| match error {
            Error::Http(response) => {
                let body = response.body().as_deref().unwrap_or_default();
                let text = serde_json::from_slice(body)
                    .map_or_else(|_| response.status().to_string(), |body: ErrorBody| words(&body));
                if response.status() == 404 { Failure::NotFound(text) } else { Failure::Other(text) }
            }
            error => self.unreachable(&error),
        };
        let mut request = url.as_str().into_client_request().map_err(failed)?;
        if let Some(key) = &self.key {
            let key = format!("Bearer {key}").parse();
            let key = key.map_err(|_| Failure::Usage("the token has characters no token has".to_owned()))?;
            request.headers_mut().insert("authorization", key);
        }
        let connects = async {
            let stream = self.base.connect().await.map_err(Error::Io)?;
            let tls = self.tls.clone().map(Connector::Rustls);
            client_async_tls_with_config(request, stream, None, tls).await
        };
        let connected = tokio::time::timeout(REQUEST_DEADLINE, connects).await;
        let late = |_| Failure::Lost(format!("{} does not answer", self.base));
        let (mut socket, _) = connected.map_err(late)?.map_err(failed)?;
        socket.send(Message::text(first.to_string())).await.map_err(failed)?;
        Ok(socket)
    }

    pub(crate) async fn get<T: DeserializeOwned>(&self, segments: &[&str]) -> Result<T, Failure> {
        self.json(self.request(Method::GET, segments)).await
    }

    pub(crate) async fn post<T: DeserializeOwned>(
        &self,
        segments: &[&str],
        body: &Value,
    ) -> Result<T, Failure> {
        self.json(self.request(Method::POST, segments).json(body)).await
    }

    pub(crate) async fn json<T: DeserializeOwned>(&self, request: RequestBuilder) -> Result<T, Failure> {
        let response = self.send(request).await?;
        self.answer(response).await
    }

    /// Parses a response.
    pub(crate) async fn answer<T: DeserializeOwned>(&self, response: Response) -> Result<T, Failure> {
        let bytes = bounded(response, ANSWER_BYTES_MAX).await?;
        serde_json::from_slice(&bytes)
            .map_err(|error| Failure::Other(format!("the answer is not understood: {error}")))
    }

    /// Sends once, without a deadline, for a response that may have no end.
    pub(crate) async fn stream(&self, request: RequestBuilder) -> Result<Response, Failure> {
        finish(request.send().await.map_err(|error| self.unreachable(&error))?).await
    }

    /// Sends, and retries errors that may pass according to the server.
    pub(crate) async fn send(&self, request: RequestBuilder) -> Result<Response, Failure> {
        let mut delays = ExponentialBackoffBuilder::new()
            .with_initial_interval(Duration::from_millis(200))
            .with_max_elapsed_time(Some(RETRY_FOR))
            .build();
        loop {
            let Some(attempt) = request.try_clone() else {
                // A streamed body cannot be sent twice.
                return finish(request.send().await.map_err(|error| self.unreachable(&error))?).await;
            };
            let failure = match attempt.timeout(REQUEST_DEADLINE).send().await {
                Ok(response) if !may_pass(&response) => return finish(response).await,
                Ok(response) => {
                    finish(response).await.err().unwrap_or(Failure::Other("overloaded".to_owned()))
                }
                Err(error) if error.is_connect() => return Err(self.unreachable(&error)),
                Err(error) => self.unreachable(&error),
            };
            match delays.next_backoff() {
                Some(delay) => tokio::time::sleep(delay).await,
                None => return Err(failure),
            }
        }
    }

    /// Reports the innermost cause: the outer ones only say that there is a cause.
    fn unreachable(&self, error: &dyn std::error::Error) -> Failure {
        let cause = root(error);
        Failure::Lost(format!("cannot reach {}: {cause}; is `stead serve` running?", self.base))
    }

    /// Repeats an operation while the server cannot be reached, as during its restart.
    pub(crate) async fn until_there<T>(
        &self,
        at_most: Duration,
        pause: Duration,
        again: impl AsyncFn() -> Result<T, Failure>,
    ) -> Result<T, Failure> {
        let deadline = tokio::time::Instant::now() + at_most;
        loop {
            match again().await {
                Err(Failure::Lost(_)) if tokio::time::Instant::now() + pause < deadline => {
                    tokio::time::sleep(pause).await;
                }
                other => return other,
            }
        }
    }
}

fn root(error: &dyn std::error::Error) -> String {
    error.source().map_or_else(|| error.to_string(), root)
}

/// Returns the body of a response, and fails when it is larger than a correct server sends.
async fn bounded(mut response: Response, most: usize) -> Result<Vec<u8>, Failure> {
    let lost = |error: reqwest::Error| Failure::Lost(format!("the connection was lost: {}", root(&error)));
    let mut bytes = Vec::new();
    while let Some(chunk) = response.chunk().await.map_err(lost)? {
        if bytes.len() + chunk.len() > most {
            let message = format!("the answer is not understood: it has more than {} MiB", most >> 20);
            return Err(Failure::Other(message));
        }
        bytes.extend_from_slice(&chunk);
    }
    Ok(bytes)
}

fn words(body: &ErrorBody) -> String {
    format!("{} ({})", body.message, body.code)
}

fn may_pass(response: &Response) -> bool {
    let is_refusal = response.headers().get("x-should-retry").is_some_and(|value| value == "false");
    let is_passing = matches!(
        response.status(),
        StatusCode::TOO_MANY_REQUESTS
            | StatusCode::SERVICE_UNAVAILABLE
            | StatusCode::BAD_GATEWAY
            | StatusCode::GATEWAY_TIMEOUT
    );
    is_passing && !is_refusal
}

/// Returns a success, or the server's error text with one line for each problem.
async fn finish(response: Response) -> Result<Response, Failure> {
    let status = response.status();
    if status.is_success() {
        return Ok(response);
    }
    let body = bounded(response, ERROR_BYTES_MAX).await.ok();
    let body: Option<ErrorBody> = body.and_then(|bytes| serde_json::from_slice(&bytes).ok());
    let text = match body {
        Some(body) if body.details.len() > 1 => {
            let lines: Vec<String> =
                body.details.iter().map(|detail| format!("\n  {}", detail.message)).collect();
            format!("{} problems:{}", body.details.len(), lines.concat())
        }
        Some(body) => words(&body),
        None => status.to_string(),
    };
    Err(if status == StatusCode::NOT_FOUND { Failure::NotFound(text) } else { Failure::Other(text) })
}
