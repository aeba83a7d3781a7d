//! Registries: resolves references and fetches blobs, with the credentials of the owner that asks.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::StreamExt;
use oci_client::Reference;
use stead_controllers::host::{HostError, HostErrorKind};
use stead_schemas::api::PushCredentials;
use stead_schemas::names::{ImageRef, Uid};
use tokio::time::Instant;

use super::Refused;
use super::guard::{Allowed, Guard};
use super::layout::{Layout, Source};
use super::manifest::{INDEXES_MAX, Manifest, Target, as_index, as_manifest, choose, read_manifest};
use super::session::{Credentials, Session};
use super::transfer::Transfers;
use super::transport::Transport;

/// Time for which a request's credentials may serve its pull.
const CREDENTIALS_TTL: Duration = Duration::from_secs(30 * 60);
/// Limit on simultaneously fetched layers of one image.
const LAYERS_AT_ONCE: usize = 4;

/// Credentials by owner, with the time at which they arrived.
type Kept = BTreeMap<Uid, (Instant, Arc<Credentials>)>;

fn lock(kept: &Mutex<Kept>) -> MutexGuard<'_, Kept> {
    kept.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The access to registries.
pub(super) struct Registry {
    transport: Arc<Transport>,
    plain_http_hosts: Vec<String>,
    credentials: Arc<Mutex<Kept>>,
    transfers: Transfers,
}

impl Registry {
    /// Creates the access. Hosts configured without TLS are also hosts that the daemon may connect to.
    pub(super) fn new(plain_http_hosts: Vec<String>, mut allowed: Vec<Allowed>) -> Result<Self, HostError> {
        allowed.extend(plain_http_hosts.iter().filter_map(|host| host.parse().ok()));
        let failed = |error: reqwest::Error| {
            HostError::new(HostErrorKind::Transient, "prepare", "the client of registries").because(error)
        };
        let transport = Arc::new(Transport::new(Guard::new(allowed)).map_err(failed)?);
        Ok(Self { transport, plain_http_hosts, credentials: Arc::default(), transfers: Transfers::default() })
    }

    pub(super) fn keep_credentials(&self, owner: &Uid, given: PushCredentials) {
        let credentials = match (given.username, given.password, given.registry_token) {
            (Some(username), Some(password), _) => Credentials::Basic(username, password),
            (_, _, Some(token)) => Credentials::Bearer(token),
            _ => return,
        };
        let since = Instant::now();
        lock(&self.credentials).insert(owner.clone(), (since, Arc::new(credentials)));
        let (all, owner) = (Arc::downgrade(&self.credentials), owner.clone());
        // Expired credentials leave the memory even if no new ones arrive.
        tokio::spawn(async move {
            tokio::time::sleep(CREDENTIALS_TTL).await;
            let Some(all) = all.upgrade() else { return };
            let mut all = lock(&all);
            if all.get(&owner).is_some_and(|(kept, _)| *kept == since) {
                all.remove(&owner);
            }
        });
    }

    pub(super) fn forget(&self, owner: &Uid) {
        lock(&self.credentials).remove(owner);
    }

    fn credentials(&self, owner: &Uid) -> Option<Arc<Credentials>> {
        let kept = lock(&self.credentials);
        let fresh = kept.get(owner).filter(|(since, _)| since.elapsed() < CREDENTIALS_TTL);
        fresh.map(|(_, credentials)| credentials.clone())
    }

    fn session(&self, owner: &Uid, reference: &ImageRef) -> Result<Session, HostError> {
        let subject = reference.to_string();
        let parsed: Reference = subject.parse().map_err(|error| {
            HostError::new(HostErrorKind::Permanent, "pull", subject.clone()).because(format!("{error}"))
        })?;
        let is_plain = self.is_plain(&reference.registry);
        Ok(Session::new(self.transport.clone(), parsed, self.credentials(owner), is_plain, subject))
    }

    /// Returns `true` for registries used with plain HTTP: loopback, and hosts that the configuration names.
    fn is_plain(&self, registry: &str) -> bool {
        let host = registry.rsplit_once(':').map_or(registry, |(host, _)| host);
        let is_loopback =
            host == "localhost" || host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback());
        is_loopback || self.plain_http_hosts.iter().any(|plain| plain == registry || plain == host)
    }

    /// Resolves a reference for the target, down to the configuration.
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

    /// Fetches all layers of a manifest. If one fails, the data of the others is kept.
    pub(super) async fn fetch(
        &self,
        owner: &Uid,
        reference: &ImageRef,
        manifest: &Manifest,
        layout: &Layout,
    ) -> Result<(), HostError> {
        let session = self.session(owner, reference)?;
        let source = Source::of(reference);
        // A manifest may list a layer several times. It is one blob.
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

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{BufRead, BufReader};
    use std::ops::Range;
    use std::os::unix::fs::FileExt;

    use stead_schemas::instance::Secret;

    use super::*;

    /// Password that is in memory only under this mask until the test makes it.
    const MASKED: [u8; 24] =
        *b"\x9a\xd1\x83\xc7\xf2\x95\xe8\xb4\xa1\xde\x97\xcb\xfa\x8d\xe3\xb9\xd6\x9f\xa4\xce\x88\xf1\xb7\xdb";
    const MASK: u8 = 0xa5;
    const CHUNK: usize = 1 << 20;
    /// Number of bytes before the password: the allocator overwrites the first few bytes of freed memory.
    const PADDING: usize = 40;

    fn password() -> Secret {
        let mut text = String::with_capacity(PADDING + MASKED.len());
        text.extend(std::iter::repeat_n('x', PADDING));
        // The bytes may be unprintable, but each is ASCII.
        text.extend(MASKED.iter().map(|byte| char::from((byte ^ MASK) & 0x7f)));
        Secret(text)
    }

    fn is_password(bytes: &[u8]) -> bool {
        bytes.iter().zip(MASKED).all(|(&byte, masked)| byte == (masked ^ MASK) & 0x7f)
    }

    /// Counts the copies of the password in the part of the heap with this address, which belongs to this thread.
    fn copies_in_memory(near: usize) -> usize {
        let memory = File::open("/proc/self/mem").expect("opened");
        let maps = BufReader::new(File::open("/proc/self/maps").expect("opened"));
        let mut buffer = vec![0u8; CHUNK];
        // The read buffer itself contains the password again.
        let own = buffer.as_ptr().addr()..buffer.as_ptr().addr() + CHUNK;
        let address = |text: &str| usize::from_str_radix(text, 16).expect("an address");
        let range = maps.lines().map_while(Result::ok).find_map(|line| {
            let (from, to) = line.split_once(' ')?.0.split_once('-')?;
            Some(address(from)..address(to)).filter(|range| range.contains(&near))
        });
        let Range { start: mut from, end } = range.expect("it is mapped");
        let mut found = 0;
        while from + MASKED.len() <= end {
            let length = CHUNK.min(end - from);
            memory.read_exact_at(&mut buffer[..length], from as u64).expect("read");
            let windows = buffer[..length].windows(MASKED.len()).enumerate();
            found += windows.filter(|(at, bytes)| !own.contains(&(from + at)) && is_password(bytes)).count();
            from += length - MASKED.len() + 1;
        }
        found
    }

    #[tokio::test]
    async fn a_password_leaves_nothing_in_memory_when_its_pull_is_over() {
        let registry = Registry::new(Vec::new(), Vec::new()).expect("made");
        let owner: Uid = format!("a{:023}", 0).parse().expect("a letter and digits");
        let password = password();
        let near = password.0.as_ptr().addr();
        let given = PushCredentials {
            username: Some("user".to_owned()),
            password: Some(password),
            registry_token: None,
        };
        registry.keep_credentials(&owner, given);
        let session = registry.session(&owner, &"127.0.0.1:5000/x".parse().expect("a reference"));
        assert_eq!(copies_in_memory(near), 1, "it is kept once");
        registry.forget(&owner);
        assert_eq!(copies_in_memory(near), 1, "the session still has it");
        drop(session);
        assert_eq!(copies_in_memory(near), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn a_password_that_nobody_asks_for_goes_by_itself() {
        let registry = Registry::new(Vec::new(), Vec::new()).expect("made");
        let owner: Uid = format!("b{:023}", 0).parse().expect("a letter and digits");
        let given = PushCredentials {
            username: None,
            password: None,
            registry_token: Some(Secret("token".to_owned())),
        };
        registry.keep_credentials(&owner, given);
        assert!(registry.credentials(&owner).is_some());
        tokio::time::sleep(CREDENTIALS_TTL + Duration::from_secs(1)).await;
        assert!(lock(&registry.credentials).is_empty());
    }
}
