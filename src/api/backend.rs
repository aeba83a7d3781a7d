//! What the API needs of the host, as a trait: `assemble` provides it.

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

use crate::guest_channel::{AgentError, AgentStream};

/// An archive as it arrives.
pub type ImportStream = BoxStream<'static, std::io::Result<Bytes>>;

/// Lines in batches, as they come.
pub type LogStream = BoxStream<'static, Vec<String>>;

/// Content that an archive brought.
pub struct Imported {
    pub digest: Digest,
    /// Keeps the content from being collected, until an object refers to it.
    pub hold: Box<dyn Send + Sync>,
}

impl std::fmt::Debug for Imported {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Imported").field("digest", &self.digest).finish_non_exhaustive()
    }
}

/// Why a log is not read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LogError {
    Missing,
    /// It is there; the host has no more of what reading or following it takes.
    Busy(String),
}

/// The host behind the API.
pub trait Backend: Send + Sync + 'static {
    /// Keeps a request's registry credentials in memory, for pulls of this image.
    fn keep_credentials(&self, image: &Uid, credentials: PushCredentials);
    /// Tells which client asked for an image first: no client has more than its share of what images cost.
    fn asked_by(&self, image: &Uid, client: &Arc<str>);
    /// Takes an archive (OCI layout, `docker save`, or a bare root file system) into the image
    /// directory for a client; answers when it is there whole.
    fn import(&self, client: &Arc<str>, archive: ImportStream) -> BoxFuture<'_, Result<Imported, HostError>>;
    /// The last lines of an instance's log, and those to come if asked for: `app` is the console,
    /// `vmm` the VMM's own, `stead` what the daemon did for it.
    fn log<'a>(
        &'a self,
        instance: &'a Uid,
        source: &'a str,
        tail: usize,
        follows: bool,
    ) -> BoxFuture<'a, Result<LogStream, LogError>>;
    /// Why the store cannot keep anything any more, when that is so.
    fn store_failure(&self) -> Option<String> {
        None
    }
    /// A backup of everything that is stored, as it is read.
    fn backup(&self) -> BoxFuture<'_, Result<ImportStream, StoreError>>;
    /// What the VMM of an instance uses now; only the figures of use are filled in.
    fn usage(&self, instance: &Uid, pid: Option<u32>, tap: Option<&str>) -> InstanceStats;
    /// What the health check of an instance found by this moment, and of which program.
    fn health(&self, instance: &Uid) -> Option<(HealthOf, Tally)>;
    /// Whether an ingress could have this port of the host: nobody else has it.
    fn can_listen(&self, port: u16) -> bool;
    /// Opens a stream to the agent of an instance's guest.
    fn open_stream<'a>(
        &'a self,
        instance: &'a Uid,
        request: Request,
    ) -> BoxFuture<'a, Result<AgentStream, AgentError>>;
}
