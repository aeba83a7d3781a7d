//! Registries: what a reference means, and its blobs, with the credentials of the owner that asks.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use futures::StreamExt;
use oci_client::Reference;
use oci_client::secrets::RegistryAuth;
use stead_controllers::host::{HostError, HostErrorKind};
use stead_schemas::api::PushCredentials;
use stead_schemas::names::{ImageRef, Uid};

use super::Refused;
use super::guard::{Allowed, Guard};
use super::layout::{Layout, Manifest, Source};
use super::manifest::{INDEXES_MAX, Target, as_index, as_manifest, choose, read_manifest};
use super::session::Session;
use super::transfer::Transfers;
use super::transport::Transport;

/// How long credentials of a request may serve the pull they came for.
const CREDENTIALS_TTL: Duration = Duration::from_secs(30 * 60);
/// Layers of one image fetched at once.
const LAYERS_AT_ONCE: usize = 4;

/// Registry access.
pub(super) struct Registry {
    transport: Arc<Transport>,
    plain_http_hosts: Vec<String>,
    credentials: Mutex<BTreeMap<Uid, (Instant, RegistryAuth)>>,
    transfers: Transfers,
}

impl Registry {
    /// Hosts that are named as ones without TLS are ones that the daemon may connect to.
    pub(super) fn new(plain_http_hosts: Vec<String>, mut allowed: Vec<Allowed>) -> Result<Self, HostError> {
        allowed.extend(plain_http_hosts.iter().filter_map(|host| host.parse().ok()));
        let failed = |error: reqwest::Error| {
            HostError::new(HostErrorKind::Transient, "prepare", "the client of registries").because(error)
        };
        let transport = Arc::new(Transport::new(Guard::new(allowed)).map_err(failed)?);
        Ok(Self {
            transport,
            plain_http_hosts,
            credentials: Mutex::default(),
            transfers: Transfers::default(),
        })
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

    pub(super) fn forget(&self, owner: &Uid) {
        self.credentials.lock().unwrap_or_else(PoisonError::into_inner).remove(owner);
    }

    fn auth(&self, owner: &Uid) -> RegistryAuth {
        let kept = self.credentials.lock().unwrap_or_else(PoisonError::into_inner);
        let fresh = kept.get(owner).filter(|(since, _)| since.elapsed() < CREDENTIALS_TTL);
        fresh.map_or(RegistryAuth::Anonymous, |(_, auth)| auth.clone())
    }

    fn session(&self, owner: &Uid, reference: &ImageRef) -> Result<Session, HostError> {
        let subject = reference.to_string();
        let parsed: Reference = subject.parse().map_err(|error| {
            HostError::new(HostErrorKind::Permanent, "pull", subject.clone()).because(format!("{error}"))
        })?;
        let is_plain = self.is_plain(&reference.registry);
        Ok(Session::new(self.transport.clone(), parsed, self.auth(owner), is_plain, subject))
    }

    /// Plain HTTP is for loopback and for hosts that the configuration names.
    fn is_plain(&self, registry: &str) -> bool {
        let host = registry.rsplit_once(':').map_or(registry, |(host, _)| host);
        let is_loopback =
            host == "localhost" || host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback());
        is_loopback || self.plain_http_hosts.iter().any(|plain| plain == registry || plain == host)
    }

    /// Asks what the reference means for the target, down to the configuration.
    pub(super) async fn resolve(
        &self,
        owner: &Uid,
        reference: &ImageRef,
        target: Target,
    ) -> Result<Manifest, HostError> {
        let session = self.session(owner, reference)?;
        let refused = |error: Refused| error.into_host("resolve", reference.to_string());
        let (mut digest, mut bytes) = session.document(None).await?;
        for _ in 0..INDEXES_MAX {
            let Some(index) = as_index(&bytes) else {
                let manifest = as_manifest(&bytes).map_err(refused)?;
                let config = session.blob(&manifest.config).await?;
                return read_manifest(digest, &manifest, &config, target.platform).map_err(refused);
            };
            let chosen = choose(&index, target).map_err(refused)?;
            (digest, bytes) = session.document(Some(&chosen)).await?;
        }
        Err(session.permanent("its indexes are nested too deep"))
    }

    /// Fetches every layer of a manifest; what others brought is kept when one fails.
    pub(super) async fn fetch(
        &self,
        owner: &Uid,
        reference: &ImageRef,
        manifest: &Manifest,
        layout: &Layout,
    ) -> Result<(), HostError> {
        let session = self.session(owner, reference)?;
        let source = Source::of(reference);
        // A manifest may list a layer several times; it is one blob.
        let blobs: BTreeMap<_, _> =
            manifest.layers.iter().map(|blob| (blob.digest.clone(), blob.clone())).collect();
        let fetches = blobs.into_values().map(|blob| {
            let (session, source) = (&session, &source);
            async move { self.transfers.fetch(session, source, &blob, layout).await }
        });
        let mut fetches = futures::stream::iter(fetches).buffer_unordered(LAYERS_AT_ONCE);
        while let Some(result) = fetches.next().await {
            result?;
        }
        Ok(())
    }
}
