//! The API without a host behind it, for tests in process, for the simulation and for measurements.

use std::sync::{Arc, Mutex};

use futures::StreamExt;
use futures::future::BoxFuture;
use stead::api::auth::Keys;
use stead::api::{
    ApiConfig, Audit, Backend, ImportStream, Imported, LogError, LogStream, PrepareError, PreparedVolume,
};
use stead::guest_channel::{AgentError, AgentStream};
use stead_controllers::host::{HostError, HostErrorKind};
use stead_controllers::store::{Store, StoreError};
use stead_schemas::api::{InstanceStats, PushCredentials};
use stead_schemas::guest::Request;
use stead_schemas::health::{HealthOf, Tally};
use stead_schemas::names::Uid;
use stead_schemas::quantity::Bytes;
use stead_schemas::resource::Pressure;

/// Port in use by another program.
pub(crate) const TAKEN_PORT: u16 = 4973;

/// The state of the host that the test sets.
#[derive(Default)]
pub(crate) struct NoHost {
    pub(crate) store_failure: Mutex<Option<String>>,
    /// Kind of the failure of an import. Without a kind the failure is that the file is no archive.
    pub(crate) import_failure: Mutex<Option<HostErrorKind>>,
    /// Log of every instance. If there are no lines, there is no log.
    pub(crate) log: Mutex<Vec<String>>,
    /// Images for which credentials were given.
    pub(crate) credentials: Mutex<Vec<Uid>>,
}

impl Backend for NoHost {
    fn keep_credentials(&self, image: &Uid, _: PushCredentials) {
        self.credentials.lock().expect("not poisoned").push(image.clone());
    }

    fn asked_by(&self, _: &Uid, _: &Arc<str>) {}

    fn import(&self, _: &Arc<str>, _: ImportStream) -> BoxFuture<'_, Result<Imported, HostError>> {
        let kind = *self.import_failure.lock().expect("not poisoned");
        let failed = HostError::new(kind.unwrap_or(HostErrorKind::Permanent), "import", "an archive");
        Box::pin(std::future::ready(Err(failed.because("no archive"))))
    }

    fn prepare_volume(
        &self,
        _: &Arc<str>,
        _: Uid,
        size: Bytes,
        _: ImportStream,
    ) -> BoxFuture<'_, Result<PreparedVolume, PrepareError>> {
        let kind = *self.import_failure.lock().expect("not poisoned");
        Box::pin(std::future::ready(match kind {
            Some(kind) => {
                let failed = HostError::new(kind, "unpack", "an archive");
                Err(PrepareError::Host(failed.because("no archive")))
            }
            None if size > Bytes(1 << 30) => Ok(PreparedVolume { keep: Box::new(|| {}) }),
            None => Err(PrepareError::TooLarge("the archive is larger".to_owned())),
        }))
    }

    fn log(
        &self,
        _: &Uid,
        _: &str,
        tail: usize,
        follows: bool,
    ) -> BoxFuture<'_, Result<LogStream, LogError>> {
        let log = self.log.lock().expect("not poisoned").clone();
        let found = if log.is_empty() {
            Err(LogError::Missing)
        } else {
            let last = log[log.len().saturating_sub(tail)..].to_vec();
            let last = futures::stream::once(std::future::ready(last));
            Ok(if follows { last.chain(futures::stream::pending()).boxed() } else { last.boxed() })
        };
        Box::pin(std::future::ready(found))
    }

    fn store_failure(&self) -> Option<String> {
        self.store_failure.lock().expect("not poisoned").clone()
    }

    fn backup(&self) -> BoxFuture<'_, Result<ImportStream, StoreError>> {
        Box::pin(async { Err(StoreError::Closed) })
    }

    fn usage(&self, _: &Uid, _: Option<u32>, _: Option<&str>) -> InstanceStats {
        InstanceStats::default()
    }

    fn pressure(&self) -> Pressure {
        Pressure::default()
    }

    fn health(&self, _: &Uid) -> Option<(HealthOf, Tally)> {
        None
    }

    fn can_listen(&self, port: u16) -> bool {
        port != TAKEN_PORT
    }

    fn open_stream<'a>(&'a self, _: &'a Uid, _: Request) -> BoxFuture<'a, Result<AgentStream, AgentError>> {
        Box::pin(async { Err(AgentError::NotReady) })
    }
}

/// Returns the configuration of an API that admits one request at a time and keeps no audit log.
pub(crate) fn api_config(store: &Store, keys: &Keys, backend: &Arc<NoHost>) -> ApiConfig {
    ApiConfig {
        store: store.clone(),
        keys: keys.clone(),
        backend: backend.clone(),
        tap_prefix: "st".to_owned(),
        requests_max: 1,
        sockets_max: 1,
        shows_secrets: false,
        requires_permissions: false,
        audit: Audit::default(),
    }
}
