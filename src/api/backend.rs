//! The traits through which the API uses the host; `assemble` implements them.

use std::sync::Arc;

use bytes::Bytes;
use futures::future::BoxFuture;
use futures::stream::BoxStream;
use stead_controllers::host::HostError;
use stead_controllers::store::StoreError;
use stead_schemas::api::{InstanceStats, PushCredentials};
use stead_schemas::guest::Request;
use stead_schemas::health::{HealthOf, Tally};
use stead_schemas::names::{Digest, Uid};
use stead_schemas::quantity::Bytes as Size;
use stead_schemas::resource::Pressure;

use crate::guest_channel::{AgentError, AgentStream};

/// The bytes of an archive, as they arrive.
pub type ImportStream = BoxStream<'static, std::io::Result<Bytes>>;

/// Lines in batches, as they come.
pub type LogStream = BoxStream<'static, Vec<String>>;

/// Content that an archive brought.
pub struct Imported {
    pub digest: Digest,
    /// Keeps the content from being collected until an object refers to it.
    pub hold: Box<dyn Send + Sync>,
}

impl std::fmt::Debug for Imported {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Imported").field("digest", &self.digest).finish_non_exhaustive()
    }
}

/// The content of a volume, which is removed with this value unless it is kept.
pub struct PreparedVolume {
    /// Leaves the content to the volume that was stored.
    pub keep: Box<dyn FnOnce() + Send>,
}

impl std::fmt::Debug for PreparedVolume {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PreparedVolume").finish_non_exhaustive()
    }
}

/// The reason why an archive did not become the content of a volume.
#[derive(Debug)]
pub enum PrepareError {
    /// The archive does not fit. The text says what of it.
    TooLarge(String),
    Host(HostError),
}

/// The reason why a log cannot be read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LogError {
    Missing,
    /// The log exists; the host lacks the resources for reading or following it now.
    Busy(String),
}

/// The host behind the API.
pub trait Backend: Send + Sync + 'static {
    /// Keeps a request's registry credentials in memory, for pulls of this image.
    fn keep_credentials(&self, image: &Uid, credentials: PushCredentials);
    /// Records which client asked for an image first: no client gets more than its share of the resources
    /// for images.
    fn asked_by(&self, image: &Uid, client: &Arc<str>);
    /// Imports an archive (OCI layout, `docker save`, or a bare root file system) into the image directory
    /// for a client; returns when the content is complete.
    fn import(&self, client: &Arc<str>, archive: ImportStream) -> BoxFuture<'_, Result<Imported, HostError>>;
    /// Makes the content of a volume of this size from a client's archive, under a name by which a volume takes it.
    fn prepare_volume(
        &self,
        client: &Arc<str>,
        name: Uid,
        size: Size,
        archive: ImportStream,
    ) -> BoxFuture<'_, Result<PreparedVolume, PrepareError>>;
    /// Returns the last lines of an instance's log, and the following ones if requested: `app` is the
    /// console, `vmm` the VMM's own log, `stead` the daemon's actions for the instance.
    fn log<'a>(
        &'a self,
        instance: &'a Uid,
        source: &'a str,
        tail: usize,
        follows: bool,
    ) -> BoxFuture<'a, Result<LogStream, LogError>>;
    /// Returns the reason why the store cannot write any more, if there is one.
    fn store_failure(&self) -> Option<String> {
        None
    }
    /// Returns a backup of everything that is stored, as a stream.
    fn backup(&self) -> BoxFuture<'_, Result<ImportStream, StoreError>>;
    /// Returns the current resource usage of an instance's VMM; only the figures of usage are filled in.
    fn usage(&self, instance: &Uid, pid: Option<u32>, tap: Option<&str>) -> InstanceStats;
    /// Returns the pressure on the memory of the host.
    fn pressure(&self) -> Pressure;
    /// Returns the results of an instance's health check so far, and the program and check that they belong
    /// to.
    fn health(&self, instance: &Uid) -> Option<(HealthOf, Tally)>;
    /// True if an ingress could use this port of the host: no other program has it.
    fn can_listen(&self, port: u16) -> bool;
    /// Opens a stream to the agent of an instance's guest.
    fn open_stream<'a>(
        &'a self,
        instance: &'a Uid,
        request: Request,
    ) -> BoxFuture<'a, Result<AgentStream, AgentError>>;
}
