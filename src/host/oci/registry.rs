//! Registries: what a reference means, and its blobs, verified while they stream.

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use futures::StreamExt;
use oci_client::client::{BlobResponse, ClientConfig, ClientProtocol};
use oci_client::manifest::{OciImageIndex, OciImageManifest};
use oci_client::secrets::RegistryAuth;
use oci_client::{Client, Reference};
use serde::Deserialize;
use sha2::{Digest as _, Sha256};
use stead_controllers::host::{HostError, HostErrorKind};
use stead_schemas::api::PushCredentials;
use stead_schemas::image::ImageConfig;
use stead_schemas::names::{Digest, ImageRef, Platform, Uid};
use stead_schemas::quantity::Bytes;

use super::Refused;
use super::layout::{Blob, Layout, Manifest};
use super::session::Session;

/// overlayfs takes 500; Docker makes at most 127.
const LAYERS_MAX: usize = 500;
/// For a connection to be made; a registry that is there answers within one.
pub(super) const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// A transfer that stands still this long has died.
pub(super) const STALL: Duration = Duration::from_secs(30);
pub(super) const USER_AGENT: &str = concat!("stead/", env!("CARGO_PKG_VERSION"));
/// How long credentials of a request may serve the pull they came for.
const CREDENTIALS_TTL: Duration = Duration::from_secs(30 * 60);

/// Registry access.
pub(super) struct Registry {
    plain_http_hosts: Vec<String>,
    credentials: Mutex<BTreeMap<Uid, (Instant, RegistryAuth)>>,
}

impl Registry {
    pub(super) fn new(plain_http_hosts: Vec<String>) -> Self {
        // The second installation in one process is refused, which is fine.
        let _ = rustls::crypto::ring::default_provider().install_default();
        Self { plain_http_hosts, credentials: Mutex::default() }
    }

    pub(super) fn keep_credentials(&self, owner: &Uid, given: PushCredentials) {
        let auth = match (given.username, given.password, given.registry_token) {
            (Some(username), Some(password), _) => RegistryAuth::Basic(username, password.0),
            (_, _, Some(token)) => RegistryAuth::Bearer(token.0),
            _ => return,
        };
        let mut kept = self.credentials.lock().unwrap_or_else(PoisonError::into_inner);
        kept.retain(|_, (since, _)| since.elapsed() < CREDENTIALS_TTL);
        kept.insert(owner.clone(), (Instant::now(), auth));
    }

    fn auth(&self, owner: &Uid) -> RegistryAuth {
        let kept = self.credentials.lock().unwrap_or_else(PoisonError::into_inner);
        let fresh = kept.get(owner).filter(|(since, _)| since.elapsed() < CREDENTIALS_TTL);
        fresh.map_or(RegistryAuth::Anonymous, |(_, auth)| auth.clone())
    }

    /// A client of its own for each pull: credentials of one never serve another.
    fn client(&self, registry: &str) -> Client {
        let protocol = if self.is_plain(registry) { ClientProtocol::Http } else { ClientProtocol::Https };
        Client::new(ClientConfig {
            protocol,
            connect_timeout: Some(CONNECT_TIMEOUT),
            read_timeout: Some(STALL),
            user_agent: USER_AGENT,
            ..ClientConfig::default()
        })
    }

    fn session(&self, owner: &Uid, reference: &ImageRef, subject: String) -> Session {
        let scheme = if self.is_plain(&reference.registry) { "http" } else { "https" };
        Session { client: self.client(&reference.registry), auth: self.auth(owner), scheme, subject }
    }

    /// Plain HTTP is for loopback and for hosts that the configuration names.
    fn is_plain(&self, registry: &str) -> bool {
        let host = registry.rsplit_once(':').map_or(registry, |(host, _)| host);
        let is_loopback =
            host == "localhost" || host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback());
        is_loopback || self.plain_http_hosts.iter().any(|plain| plain == registry || plain == host)
    }

    /// Asks what the reference means on the platform, down to the configuration.
    pub(super) async fn resolve(
        &self,
        owner: &Uid,
        reference: &ImageRef,
        platform: Platform,
    ) -> Result<Manifest, HostError> {
        let subject = reference.to_string();
        let session = self.session(owner, reference, subject);
        let (mut digest, mut bytes) = session.document(&oci_reference(reference)?).await?;
        if let Some(index) = as_index(&bytes) {
            let chosen = choose(&index, platform).ok_or_else(|| {
                session
                    .error(HostErrorKind::Unsupported)
                    .because(format!("it is not made for {}", platform.as_str()))
            })?;
            (digest, bytes) = session.document(&oci_reference(&reference.with_digest(&chosen))?).await?;
        }
        let manifest: OciImageManifest = serde_json::from_slice(&bytes).map_err(|error| {
            session.error(HostErrorKind::Permanent).because(format!("its manifest is not one: {error}"))
        })?;
        let config = session.blob(&oci_reference(reference)?, &manifest.config).await?;
        read_manifest(digest, &manifest, &config, Some(platform))
            .map_err(|error| error.into_host("resolve", reference.to_string()))
    }

    /// Fetches one blob to where it belongs, from where an earlier try ended.
    pub(super) async fn fetch(
        &self,
        owner: &Uid,
        reference: &ImageRef,
        blob: &Blob,
        layout: &Layout,
    ) -> Result<(), HostError> {
        if layout.blob(&blob.digest).exists() {
            return Ok(());
        }
        let session = self.session(owner, reference, format!("{} of {reference}", blob.digest));
        session.client.store_auth_if_needed(&reference.registry, &session.auth).await;
        let mut partial = Partial::open(layout, blob).map_err(|error| session.io(error))?;
        let response = session
            .client
            .pull_blob_stream_partial(&oci_reference(reference)?, blob.digest.as_str(), partial.length, None)
            .await
            .map_err(|error| session.failed(&error))?;
        let mut stream = match response {
            BlobResponse::Partial(stream) => stream,
            BlobResponse::Full(stream) => {
                partial.restart().map_err(|error| session.io(error))?;
                stream
            }
        };
        while let Some(chunk) = stream.next().await {
            // A cut transfer keeps what it brought for the next try.
            let chunk = chunk.map_err(|error| session.error(HostErrorKind::Transient).because(error))?;
            partial.write(&chunk).map_err(|error| session.io(error))?;
        }
        partial.finish(layout).map_err(|error| session.io(error))
    }
}

fn oci_reference(reference: &ImageRef) -> Result<Reference, HostError> {
    reference.to_string().parse().map_err(|error| {
        HostError::new(HostErrorKind::Permanent, "pull", reference.to_string()).because(format!("{error}"))
    })
}

pub(super) fn as_index(bytes: &[u8]) -> Option<OciImageIndex> {
    #[derive(Deserialize)]
    struct Probe {
        manifests: Option<serde::de::IgnoredAny>,
    }
    let probe: Probe = serde_json::from_slice(bytes).ok()?;
    probe.manifests.and_then(|_| serde_json::from_slice(bytes).ok())
}

/// The entry of the platform; a lone entry without one is taken as it is.
pub(super) fn choose(index: &OciImageIndex, platform: Platform) -> Option<Digest> {
    let fits = |entry: &&oci_client::manifest::ImageIndexEntry| {
        entry.platform.as_ref().is_some_and(|given| {
            given.os.to_string() == "linux" && given.architecture.to_string() == platform.architecture()
        })
    };
    let lone =
        || index.manifests.first().filter(|entry| index.manifests.len() == 1 && entry.platform.is_none());
    index.manifests.iter().find(fits).or_else(lone)?.digest.parse().ok()
}

/// Checks a manifest and its configuration against each other.
pub(super) fn read_manifest(
    digest: Digest,
    manifest: &OciImageManifest,
    config: &[u8],
    platform: Option<Platform>,
) -> Result<Manifest, Refused> {
    let config: ConfigFile = serde_json::from_slice(config)
        .map_err(|error| Refused::new(format!("its configuration is not one: {error}")))?;
    if let Some(platform) = platform.filter(|platform| config.architecture != platform.architecture()) {
        let words = stead_schemas::validate::printable(&config.architecture, 32);
        return Err(Refused::unsupported(format!("it is made for {words}, not for {}", platform.as_str())));
    }
    let diff_ids = &config.rootfs.diff_ids;
    if manifest.layers.len() != diff_ids.len() || diff_ids.len() > LAYERS_MAX {
        return Err(Refused::new(
            "its manifest and configuration list different numbers of layers, or too many",
        ));
    }
    let layers = manifest.layers.iter().zip(diff_ids).map(|(layer, diff_id)| {
        let digest =
            |text: &str| text.parse().map_err(|error| Refused::new(format!("a layer's digest {error}")));
        let size = u64::try_from(layer.size).map_err(|_| Refused::new("a layer has a negative size"))?;
        Ok(Blob { digest: digest(&layer.digest)?, size: Bytes(size), diff_id: digest(diff_id)? })
    });
    Ok(Manifest {
        digest,
        layers: layers.collect::<Result<_, Refused>>()?,
        config: config.config.unwrap_or_default().into_config(),
    })
}

/// The parts of an OCI image configuration that run a program.
#[derive(Deserialize)]
struct ConfigFile {
    #[serde(default)]
    architecture: String,
    config: Option<RunConfig>,
    #[serde(default)]
    rootfs: RootFs,
}

#[derive(Default, Deserialize)]
struct RootFs {
    #[serde(default)]
    diff_ids: Vec<String>,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct RunConfig {
    entrypoint: Option<Vec<String>>,
    cmd: Option<Vec<String>>,
    env: Option<Vec<String>>,
    working_dir: Option<String>,
    user: Option<String>,
    stop_signal: Option<String>,
}

impl RunConfig {
    fn into_config(self) -> ImageConfig {
        let pairs = self.env.unwrap_or_default();
        let env = pairs.iter().filter_map(|pair| pair.split_once('=')).filter(|(key, _)| !key.is_empty());
        ImageConfig {
            entrypoint: self.entrypoint.unwrap_or_default(),
            cmd: self.cmd.unwrap_or_default(),
            env: env.map(|(key, value)| (key.to_owned(), value.to_owned())).collect(),
            working_dir: self.working_dir.unwrap_or_default(),
            user: self.user.unwrap_or_default(),
            stop_signal: self.stop_signal.filter(|signal| !signal.is_empty()),
        }
    }
}

pub(super) fn digest_of(bytes: &[u8]) -> Digest {
    format!("sha256:{}", hex::encode(Sha256::digest(bytes))).parse().expect("a hash is a digest")
}

/// A blob on its way to disk.
struct Partial {
    file: std::fs::File,
    length: u64,
    hash: Sha256,
    blob: Blob,
    path: std::path::PathBuf,
}

impl Partial {
    /// Continues what is there; its bytes are hashed again, since nothing vouches for them.
    fn open(layout: &Layout, blob: &Blob) -> io::Result<Self> {
        let path = layout.partial(&blob.digest);
        let file =
            std::fs::File::options().read(true).write(true).create(true).truncate(false).open(&path)?;
        let mut partial = Self { file, length: 0, hash: Sha256::new(), blob: blob.clone(), path };
        let mut buffer = vec![0u8; 256 << 10];
        loop {
            let count = partial.file.read(&mut buffer)?;
            if count == 0 {
                break;
            }
            partial.hash.update(&buffer[..count]);
            partial.length += count as u64;
        }
        if partial.length >= blob.size.0 {
            // Whole and yet not renamed: it was wrong, or the crash came between.
            partial.restart()?;
        }
        Ok(partial)
    }

    fn restart(&mut self) -> io::Result<()> {
        self.file.set_len(0)?;
        io::Seek::rewind(&mut self.file)?;
        (self.length, self.hash) = (0, Sha256::new());
        Ok(())
    }

    fn write(&mut self, chunk: &[u8]) -> io::Result<()> {
        self.length += chunk.len() as u64;
        if self.length > self.blob.size.0 {
            let _ = std::fs::remove_file(&self.path);
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "the blob is larger than its manifest says",
            ));
        }
        self.hash.update(chunk);
        self.file.write_all(chunk)
    }

    fn finish(self, layout: &Layout) -> io::Result<()> {
        if self.length < self.blob.size.0 {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the transfer ended early"));
        }
        if hex::encode(self.hash.finalize()) != self.blob.digest.hex() {
            let _ = std::fs::remove_file(&self.path);
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "the blob does not have the digest it is named by",
            ));
        }
        self.file.sync_all()?;
        std::fs::rename(&self.path, layout.blob(&self.blob.digest))?;
        std::fs::File::open(self.path.parent().unwrap_or(std::path::Path::new("/")))?.sync_all()
    }
}

/// Shared by the jobs of one daemon.
pub(super) type SharedRegistry = Arc<Registry>;
