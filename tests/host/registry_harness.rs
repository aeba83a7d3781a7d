//! A real registry on loopback, images made for it, and a proxy in front that records and cuts requests.

use std::fs;
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use axum::Router;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use flate2::Compression;
use flate2::write::GzEncoder;
use futures::StreamExt;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use crate::namespace::{PATIENCE, shell};

/// A registry process that does not outlive the value.
pub(crate) struct Registry {
    pub(crate) dir: tempfile::TempDir,
    pub(crate) address: SocketAddr,
    process: Child,
}

impl Drop for Registry {
    fn drop(&mut self) {
        // A process that has already ended cannot be killed, so the error is ignored.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

pub(crate) fn free_port() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    listener.local_addr().expect("bound")
}

impl Registry {
    /// Starts a registry. `more` is YAML at the top level of its configuration; `DIR` is the scratch directory.
    pub(crate) async fn start(more: &str) -> Self {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let (dir, address) = (tempfile::tempdir().expect("scratch"), free_port());
        let directory = dir.path().display().to_string();
        let config = format!(
            "version: 0.1\nlog: {{level: error}}\nstorage: {{filesystem: {{rootdirectory: {directory}/store}}}}\n\
             http: {{addr: '{address}'}}\n{}\n",
            more.replace("DIR", &directory)
        );
        if more.contains("htpasswd") {
            shell(&format!("htpasswd -Bbn user right >{directory}/htpasswd"));
        }
        if more.contains("rootcertbundle") {
            shell(&format!(
                "openssl req -x509 -newkey rsa:2048 -nodes -subj /CN=test -days 2 -keyout {directory}/key.pem -out {directory}/cert.pem 2>&1
                 openssl rsa -in {directory}/key.pem -traditional -outform DER -out {directory}/key.der 2>&1"
            ));
        }
        let path = dir.path().join("registry.yml");
        fs::write(&path, config).expect("written");
        let mut command = Command::new("docker-registry");
        command.arg("serve").arg(&path).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let process = command.spawn().expect("docker-registry runs: deploy/setup installs it");
        let registry = Self { dir, address, process };
        let deadline = std::time::Instant::now() + PATIENCE;
        while std::net::TcpStream::connect(address).is_err() {
            assert!(std::time::Instant::now() < deadline, "the registry does not answer");
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
        registry
    }

    /// Returns the path at which the registry keeps a blob.
    pub(crate) fn blob(&self, digest: &str) -> PathBuf {
        let hex = digest.strip_prefix("sha256:").expect("a digest");
        let store = self.dir.path().join("store/docker/registry/v2/blobs/sha256");
        store.join(&hex[..2]).join(hex).join("data")
    }
}

/// An image with layers of given contents, as an OCI layout.
pub(crate) struct Image {
    pub(crate) layers: Vec<String>,
    pub(crate) manifest: String,
    pub(crate) manifest_bytes: Vec<u8>,
    layout: PathBuf,
}

fn store(layout: &Path, bytes: &[u8]) -> String {
    let hex = hex::encode(Sha256::digest(bytes));
    fs::write(layout.join("blobs/sha256").join(&hex), bytes).expect("written");
    format!("sha256:{hex}")
}

impl Image {
    /// Makes an image with one file per layer. Each file has the given number of incompressible bytes, generated from
    /// `seed`.
    pub(crate) fn make(dir: &Path, seed: u32, sizes: &[usize], architecture: &str) -> Self {
        let layout = dir.join(format!("layout-{seed}-{architecture}"));
        fs::create_dir_all(layout.join("blobs/sha256")).expect("made");
        let (mut layers, mut diff_ids, mut descriptors) = (Vec::new(), Vec::new(), Vec::new());
        for (number, size) in sizes.iter().enumerate() {
            let contents = noise(seed * 100 + u32::try_from(number).expect("few"), *size);
            let mut archive = tar::Builder::new(Vec::new());
            let mut header = tar::Header::new_gnu();
            header.set_size(*size as u64);
            header.set_mode(0o644);
            header.set_uid(0);
            header.set_gid(0);
            header.set_mtime(0);
            header.set_cksum();
            archive.append_data(&mut header, format!("file{number}"), &contents[..]).expect("appended");
            let archive = archive.into_inner().expect("written");
            diff_ids.push(format!("sha256:{}", hex::encode(Sha256::digest(&archive))));
            let mut compressed = GzEncoder::new(Vec::new(), Compression::fast());
            std::io::Write::write_all(&mut compressed, &archive).expect("packed");
            let compressed = compressed.finish().expect("packed");
            let digest = store(&layout, &compressed);
            descriptors.push(json!({
                "mediaType": "application/vnd.oci.image.layer.v1.tar+gzip", "digest": digest, "size": compressed.len()
            }));
            layers.push(digest);
        }
        let config = json!({
            "architecture": architecture, "os": "linux", "config": { "Cmd": ["true"] },
            "rootfs": { "type": "layers", "diff_ids": diff_ids }
        });
        let config = config.to_string().into_bytes();
        let manifest = json!({
            "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": { "mediaType": "application/vnd.oci.image.config.v1+json",
                        "digest": store(&layout, &config), "size": config.len() },
            "layers": descriptors
        });
        let bytes = manifest.to_string().into_bytes();
        let digest = store(&layout, &bytes);
        fs::write(layout.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).expect("written");
        let index = json!({ "schemaVersion": 2, "manifests": [{
            "mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": digest, "size": bytes.len(),
            "annotations": { "org.opencontainers.image.ref.name": "it" }
        }] });
        fs::write(layout.join("index.json"), index.to_string()).expect("written");
        Self { layers, manifest: digest, manifest_bytes: bytes, layout }
    }

    /// Pushes it with skopeo, as users do.
    pub(crate) fn push(&self, to: &str, credentials: Option<&str>) {
        let credentials = credentials.map_or(String::new(), |given| format!("--dest-creds {given}"));
        let from = self.layout.display();
        shell(&format!(
            "skopeo copy -q --dest-tls-verify=false {credentials} oci:{from}:it docker://{to} 2>&1"
        ));
    }
}

/// Returns incompressible bytes, the same for the same seed.
fn noise(seed: u32, length: usize) -> Vec<u8> {
    let mut state = u64::from(seed).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

/// The path and the `Range` of a request.
type Seen = (String, Option<String>);

/// A proxy in front of a registry that records every request, and can cut blobs short.
#[derive(Clone)]
pub(crate) struct Proxy {
    pub(crate) address: SocketAddr,
    upstream: SocketAddr,
    http: reqwest::Client,
    seen: Arc<Mutex<Vec<Seen>>>,
    /// Number of bytes after which blob answers end with a broken connection.
    cut_after: Arc<AtomicU64>,
}

impl Proxy {
    pub(crate) async fn start(upstream: SocketAddr) -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let proxy = Self {
            address: listener.local_addr().expect("bound"),
            upstream,
            http: reqwest::Client::new(),
            seen: Arc::default(),
            cut_after: Arc::new(AtomicU64::new(u64::MAX)),
        };
        let router = Router::new().fallback(forward).with_state(proxy.clone());
        tokio::spawn(async move { axum::serve(listener, router).await });
        proxy
    }

    pub(crate) fn cut_after(&self, bytes: u64) {
        self.cut_after.store(bytes, Ordering::SeqCst);
    }

    /// Returns the `Range` headers of requests for a digest since the last call.
    pub(crate) fn take_seen(&self, digest: &str) -> Vec<Option<String>> {
        let mut seen = self.seen.lock().expect("no panic holds it");
        let (matching, others): (Vec<_>, Vec<_>) =
            seen.drain(..).partition(|(path, _)| path.contains(digest));
        *seen = others;
        matching.into_iter().map(|(_, range)| range).collect()
    }
}

async fn forward(State(proxy): State<Proxy>, request: Request) -> Response {
    let (request, _) = request.into_parts();
    let path = request.uri.path().to_owned();
    let of = |name: header::HeaderName| {
        request.headers.get(name).and_then(|value| value.to_str().ok()).map(ToOwned::to_owned)
    };
    proxy.seen.lock().expect("no panic holds it").push((path.clone(), of(header::RANGE)));
    let mut upstream =
        proxy.http.request(request.method.clone(), format!("http://{}{}", proxy.upstream, request.uri));
    for name in [header::RANGE, header::ACCEPT, header::AUTHORIZATION] {
        if let Some(value) = of(name.clone()) {
            upstream = upstream.header(name, value);
        }
    }
    let Ok(answer) = upstream.send().await else { return StatusCode::BAD_GATEWAY.into_response() };
    let (status, headers): (StatusCode, HeaderMap) = (answer.status(), answer.headers().clone());
    let mut left = if path.contains("/blobs/") { proxy.cut_after.load(Ordering::SeqCst) } else { u64::MAX };
    let body = answer.bytes_stream().map(move |chunk| {
        let chunk = chunk.map_err(std::io::Error::other)?;
        left = left.checked_sub(chunk.len() as u64).ok_or_else(|| std::io::Error::other("cut"))?;
        Ok::<_, std::io::Error>(chunk)
    });
    let mut response = (status, Body::from_stream(body)).into_response();
    for (name, value) in headers.iter().filter(|(name, _)| **name != header::TRANSFER_ENCODING) {
        response.headers_mut().insert(name.clone(), value.clone());
    }
    response
}

/// A token service as named in the challenges of registries: clients with the password get a token.
#[derive(Clone)]
pub(crate) struct TokenService {
    pub(crate) address: SocketAddr,
    key: Arc<Mutex<Option<(jsonwebtoken::EncodingKey, String)>>>,
    pub(crate) issued: Arc<AtomicU64>,
}

impl TokenService {
    pub(crate) async fn start() -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("bound");
        let service = Self { address, key: Arc::default(), issued: Arc::default() };
        let router = Router::new().fallback(issue).with_state(service.clone());
        tokio::spawn(async move { axum::serve(listener, router).await });
        service
    }

    /// Signs with the key whose certificate the registry trusts.
    pub(crate) fn sign_for(&self, registry: &Registry) {
        let dir = registry.dir.path();
        let key = jsonwebtoken::EncodingKey::from_rsa_der(&fs::read(dir.join("key.der")).expect("made"));
        let certificate = fs::read_to_string(dir.join("cert.pem")).expect("made");
        let certificate = certificate.lines().filter(|line| !line.starts_with('-')).collect::<String>();
        *self.key.lock().expect("no panic holds it") = Some((key, certificate));
    }
}

async fn issue(State(service): State<TokenService>, request: Request) -> Response {
    // These are the credentials user:right.
    let is_known =
        request.headers().get(header::AUTHORIZATION).is_some_and(|value| value == "Basic dXNlcjpyaWdodA==");
    if !is_known {
        return StatusCode::UNAUTHORIZED.into_response();
    }
    let query: Vec<(String, String)> = request
        .uri()
        .query()
        .unwrap_or_default()
        .split('&')
        .filter_map(|pair| pair.split_once('='))
        .map(|(key, value)| {
            (key.to_owned(), value.replace("%3A", ":").replace("%2F", "/").replace("%2C", ","))
        })
        .collect();
    let access: Vec<Value> = query
        .iter()
        .filter(|(key, _)| key == "scope")
        .filter_map(|(_, scope)| {
            let mut parts = scope.split(':');
            let (kind, name, actions) = (parts.next()?, parts.next()?, parts.next()?);
            Some(json!({ "type": kind, "name": name, "actions": actions.split(',').collect::<Vec<_>>() }))
        })
        .collect();
    let now = jiff::Timestamp::now().as_second();
    let claims = json!({
        "iss": "tests", "sub": "user", "aud": "registry", "exp": now + 300, "nbf": now - 10, "iat": now,
        "jti": "1", "access": access
    });
    let kept = service.key.lock().expect("no panic holds it");
    let (key, certificate) = kept.as_ref().expect("given before the first pull");
    let mut header = jsonwebtoken::Header::new(jsonwebtoken::Algorithm::RS256);
    header.x5c = Some(vec![certificate.clone()]);
    let token = jsonwebtoken::encode(&header, &claims, key).expect("signed");
    service.issued.fetch_add(1, Ordering::SeqCst);
    axum::Json(json!({ "token": token, "access_token": token, "expires_in": 300 })).into_response()
}
