//! A registry on loopback that gives the answers set by a test, however invalid.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use axum::Router;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use futures::StreamExt;
use serde_json::json;
use sha2::{Digest as _, Sha256};
use tokio::sync::watch;

type Answer = Arc<dyn Fn(&Request) -> Response + Send + Sync>;

/// A registry with answers by path. Other paths are not found.
#[derive(Clone)]
pub(crate) struct Fake {
    pub(crate) address: SocketAddr,
    answers: Arc<Mutex<BTreeMap<String, Answer>>>,
    seen: Arc<Mutex<Vec<String>>>,
}

/// An image as a registry stores it.
pub(crate) struct Made {
    pub(crate) manifest: Vec<u8>,
    pub(crate) config: Vec<u8>,
    pub(crate) layers: Vec<Vec<u8>>,
}

pub(crate) fn digest(bytes: &[u8]) -> String {
    format!("sha256:{}", hex::encode(Sha256::digest(bytes)))
}

/// Returns a layer with one file, not compressed, so that its end is the end of the file.
pub(crate) fn layer(name: &str, content: &[u8]) -> Vec<u8> {
    let mut archive = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_size(content.len() as u64);
    header.set_mode(0o755);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header.set_cksum();
    archive.append_data(&mut header, name, content).expect("appended");
    archive.into_inner().expect("written")
}

pub(crate) fn image(layers: &[Vec<u8>]) -> Made {
    let diff_ids: Vec<String> = layers.iter().map(|layer| digest(layer)).collect();
    let config = json!({ "architecture": "amd64", "os": "linux", "config": { "Cmd": ["true"] },
                         "rootfs": { "type": "layers", "diff_ids": diff_ids } });
    let config = config.to_string().into_bytes();
    let descriptors = layers.iter().map(|layer| {
        json!({ "mediaType": "application/vnd.oci.image.layer.v1.tar", "digest": digest(layer), "size": layer.len() })
    });
    let manifest = json!({
        "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": { "mediaType": "application/vnd.oci.image.config.v1+json",
                    "digest": digest(&config), "size": config.len() },
        "layers": descriptors.collect::<Vec<_>>()
    });
    Made { manifest: manifest.to_string().into_bytes(), config, layers: layers.to_vec() }
}

impl Fake {
    pub(crate) async fn start() -> Self {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("bound");
        let fake = Self { address, answers: Arc::default(), seen: Arc::default() };
        let router = Router::new().fallback(answer).with_state(fake.clone());
        tokio::spawn(async move { axum::serve(listener, router).await });
        fake
    }

    pub(crate) fn on(&self, path: &str, answer: impl Fn(&Request) -> Response + Send + Sync + 'static) {
        self.answers.lock().expect("no panic holds it").insert(path.to_owned(), Arc::new(answer));
    }

    pub(crate) fn on_bytes(&self, path: &str, bytes: Vec<u8>) {
        self.on(path, move |_| bytes.clone().into_response());
    }

    /// Serves an image whole, without resuming: every blob is sent from its beginning.
    pub(crate) fn serve(&self, name: &str, made: &Made) {
        self.on_bytes(&format!("/v2/{name}/manifests/v1"), made.manifest.clone());
        self.on_bytes(&format!("/v2/{name}/manifests/{}", digest(&made.manifest)), made.manifest.clone());
        for blob in made.layers.iter().chain([&made.config]) {
            self.on_bytes(&format!("/v2/{name}/blobs/{}", digest(blob)), blob.clone());
        }
    }

    /// Returns the number of requests whose path contains this text.
    pub(crate) fn seen(&self, words: &str) -> usize {
        self.seen.lock().expect("no panic holds it").iter().filter(|line| line.contains(words)).count()
    }
}

async fn answer(State(fake): State<Fake>, request: Request) -> Response {
    let path = request.uri().path().to_owned();
    let rights = request.headers().get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
    fake.seen.lock().expect("no panic holds it").push(format!("{path} {}", rights.unwrap_or_default()));
    let known = fake.answers.lock().expect("no panic holds it").get(&path).cloned();
    known.map_or_else(|| StatusCode::NOT_FOUND.into_response(), |answer| answer(&request))
}

/// Returns an endless body, sent as fast as it is read.
pub(crate) fn endless() -> Body {
    Body::from_stream(futures::stream::repeat_with(|| {
        Ok::<_, std::io::Error>(Bytes::from(vec![b' '; 64 << 10]))
    }))
}

/// Returns a body that begins, and continues when the gate opens.
pub(crate) fn gated(first: Vec<u8>, then: Vec<u8>, mut gate: watch::Receiver<bool>) -> Response {
    let length = first.len() + then.len();
    let rest = futures::stream::once(async move {
        // A dropped gate counts as open: the test is over.
        let _ = gate.wait_for(|is_open| *is_open).await;
        Ok::<_, std::io::Error>(Bytes::from(then))
    });
    let body = futures::stream::once(async move { Ok(Bytes::from(first)) }).chain(rest);
    ([(header::CONTENT_LENGTH, length.to_string())], Body::from_stream(body)).into_response()
}

pub(crate) fn redirect(to: String) -> Response {
    (StatusCode::FOUND, [(header::LOCATION, to)]).into_response()
}

pub(crate) fn challenge(realm: &str) -> Response {
    let words = format!("Bearer realm=\"{realm}\",service=\"s\"");
    (StatusCode::UNAUTHORIZED, [(header::WWW_AUTHENTICATE, words)]).into_response()
}
