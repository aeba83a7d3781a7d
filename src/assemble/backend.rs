//! The host behind the API's `Backend`.

use std::path::PathBuf;
use std::sync::Arc;

use futures::future::BoxFuture;
use stead_controllers::host::HostError;
use stead_controllers::store::{Store, StoreError};
use stead_schemas::api::{InstanceStats, PushCredentials};
use stead_schemas::guest::Request;
use stead_schemas::health::{HealthOf, Tally};
use stead_schemas::names::Uid;
use stead_schemas::quantity::Bytes;
use stead_schemas::resource::Pressure;

use super::backups::Backups;
use super::host::Host;
use crate::api::{Backend, ImportStream, Imported, LogError, LogStream, PrepareError, PreparedVolume};
use crate::config::Config;
use crate::guest_channel::{AgentError, AgentStream};
use crate::host::oci::Oci;
use crate::host::pressure;
use crate::host::probe::Prober;
use crate::host::usage::Usage;
use crate::host::volume_archives::{ArchiveError, VolumeArchives};
use crate::host::watch_directories::DirectoryWatches;
use crate::hypervisor::Hypervisors;
use crate::ingress::HttpListeners;

/// The parts of the host that the API uses.
pub(super) struct HostBackend {
    backups: Backups,
    store: Store,
    images: Oci,
    archives: VolumeArchives,
    machines: Hypervisors,
    probes: Prober,
    listeners: HttpListeners,
    data_dir: PathBuf,
    watches: DirectoryWatches,
}

impl HostBackend {
    pub(super) fn new(host: &Host, config: &Config, store: Store) -> Self {
        Self {
            backups: Backups::new(store.clone(), config.data_dir.clone()),
            store,
            images: host.ports.images.clone(),
            archives: host.archives.clone(),
            machines: host.ports.hypervisors.clone(),
            probes: host.ports.probes.clone(),
            listeners: host.ports.listeners.clone(),
            data_dir: config.data_dir.clone(),
            watches: host.watches.clone(),
        }
    }
}

impl Backend for HostBackend {
    fn backup(&self) -> BoxFuture<'_, Result<ImportStream, StoreError>> {
        Box::pin(self.backups.begin())
    }

    fn store_failure(&self) -> Option<String> {
        self.store.health().err().map(|error| error.to_string())
    }

    fn keep_credentials(&self, image: &Uid, credentials: PushCredentials) {
        self.images.keep_credentials(image, credentials);
    }

    fn asked_by(&self, image: &Uid, client: &Arc<str>) {
        self.images.asked_by(image, client);
    }

    fn import(&self, client: &Arc<str>, archive: ImportStream) -> BoxFuture<'_, Result<Imported, HostError>> {
        let client = client.clone();
        Box::pin(async move {
            let hold = self.images.import(&client, archive).await?;
            Ok(Imported { digest: hold.digest().clone(), hold: Box::new(hold) })
        })
    }

    fn prepare_volume(
        &self,
        client: &Arc<str>,
        name: Uid,
        size: Bytes,
        archive: ImportStream,
    ) -> BoxFuture<'_, Result<PreparedVolume, PrepareError>> {
        let client = client.clone();
        Box::pin(async move {
            match self.archives.prepare(&client, name, size, archive).await {
                Ok(prepared) => Ok(PreparedVolume { keep: Box::new(move || prepared.keep()) }),
                Err(ArchiveError::TooLarge(why)) => Err(PrepareError::TooLarge(why)),
                Err(ArchiveError::Host(error)) => Err(PrepareError::Host(error)),
            }
        })
    }

    fn log<'a>(
        &'a self,
        instance: &'a Uid,
        source: &'a str,
        tail: usize,
        follows: bool,
    ) -> BoxFuture<'a, Result<LogStream, LogError>> {
        Box::pin(crate::log_sources::open(&self.data_dir, &self.watches, instance, source, tail, follows))
    }

    fn usage(&self, instance: &Uid, pid: Option<u32>, tap: Option<&str>) -> InstanceStats {
        let usage = Usage::read(pid, instance.as_str(), tap);
        InstanceStats {
            cpu_seconds: usage.cpu_seconds,
            memory_rss_bytes: usage.resident_bytes,
            memory_vms_bytes: usage.virtual_bytes,
            network_rx_bytes: usage.received_bytes,
            network_tx_bytes: usage.sent_bytes,
            ..InstanceStats::default()
        }
    }

    fn pressure(&self) -> Pressure {
        pressure::read()
    }

    fn health(&self, instance: &Uid) -> Option<(HealthOf, Tally)> {
        self.probes.seen(instance).map(|seen| (seen.of, seen.tally))
    }

    fn can_listen(&self, port: u16) -> bool {
        // If this cannot be determined, the reconciler reports it.
        self.listeners.can_listen(port).unwrap_or(true)
    }

    fn open_stream<'a>(
        &'a self,
        instance: &'a Uid,
        request: Request,
    ) -> BoxFuture<'a, Result<AgentStream, AgentError>> {
        Box::pin(self.machines.open_stream(instance, request))
    }
}
